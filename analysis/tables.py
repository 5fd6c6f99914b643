"""The runs of this repository as the tables of docs/results.md and README.md, and the published systems.

python -m analysis.tables     # prints the table of docs/results.md
"""

import re
from collections.abc import Sequence
from typing import Any

import recipes
from analysis import runs
from dataset import sources
from runtime import cli

TABLE = "https://github.com/zalandoresearch/fashion-mnist#benchmark"  # as submitted there; nobody has verified it
ERASING = f"{TABLE}; arXiv:1708.04896; old data: https://github.com/zhunzhong07/Random-Erasing/issues/9"
LITERATURE = (  # system, test accuracy, parameters, source, whether on the data from before its re-release
    ("2 convolutions", 0.922, 113e3, TABLE, False),
    ("2 convolutions, 3 linear", 0.932, 1.8e6, TABLE, False),
    ("VGG16", 0.935, 26e6, TABLE, False),
    ("Capsule network", 0.936, 8e6, TABLE, False),
    ("DenseNet-BC", 0.954, 768e3, TABLE, True),
    ("WRN-40-4", 0.967, 8.9e6, TABLE, True),
    ("WRN-28-10", 0.959, 36.5e6, f"{ERASING}; parameters: arXiv:1605.07146", True),
    ("WRN-28-10, random erasing", 0.963, 36.5e6, ERASING, True),
)


def literature() -> list[dict[str, Any]]:
    """Return the published systems. None of them says which images chose the epoch.

    With "old_release" are those of the first release of the data, in which test images were also training images. The
    data were released anew on 2017-08-31 (zalandoresearch/fashion-mnist#44).
    """
    keys = ("name", "accuracy", "parameters", "source", "old_release")
    return [dict(zip(keys, row, strict=True)) for row in LITERATURE]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows as the table of docs/results.md."""
    head = ["model", "recipe", "best epoch chosen on", "published", "here: mean ± SD of seeds"]
    head += ["95% interval of the mean", "training", "`python train.py` with"]
    best = {row["model"]: max(other["accuracy"] for other in rows if other["model"] == row["model"]) for row in rows}
    lines = []
    for row in rows:
        mean = f"**{accuracy(row)}**" if row["accuracy"] == best[row["model"]] else accuracy(row)
        lines.append(
            [
                row["model"],
                _recipe(row),
                recipes.SELECTIONS[row["select"]].chosen,
                f"{row['published']:.2%}" if row["published"] else "",
                f"{mean} of {row['n']}",
                interval(row),
                _duration(row, row["precision"]),
                command(row, ""),
            ]
        )
    return table(head, lines)


def brief(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows in five columns, as README.md shows some of them."""
    head = ["model and recipe", "test accuracy", "n", "training time", "command"]
    lines = []
    for row in rows:
        usual = row["select"] == recipes.find(row["recipe"], row["model"]).select
        chosen = "" if usual else f", best epoch chosen on {recipes.SELECTIONS[row['select']].chosen}"
        published = f" (published result: {row['published']:.2%})" if row["published"] else ""
        name = f"{row['model']}, {_recipe(row)}{chosen}{published}"
        lines.append([name, accuracy(row), len(row["seeds"]), _duration(row), command(row, "python train.py ")])
    return table(head, lines)


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Lay out a table of Markdown."""
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *lines)]
    texts = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([texts[0], "|---" * len(head) + "|", *texts[1:]]) + "\n"


def _recipe(row: dict[str, Any]) -> str:
    """Name the recipe with what sets the row apart: its data, values that recipes.py lost, what differs."""
    data = "" if row["data"] == sources.NAME else f", on {row['data']}"
    changes = "".join(f", {key} {value}" for key, value in row["changed"].items())
    differs = f", {row['differs']}" if "differs" in row else ""
    return plain(f"{row['recipe']}, {cli.counted(row['epochs'], 'epoch')}{changes}{data}{differs}")


def plain(text: str) -> str:
    """Keep a text with names that others chose from being read as HTML, code or links of Markdown."""
    return re.sub(r"[`<\\]|(?<=\])\(", r"\\\g<0>", text)


def code(text: str) -> str:
    """Lay out code in Markdown, even with backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"`{text}`" if not longest else f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"


def accuracy(row: dict[str, Any]) -> str:
    """Write the accuracy of a row, with its standard deviation."""
    return f"{100 * row['accuracy']:.2f} ± {row['sd']:.2%}" if "sd" in row else f"{row['accuracy']:.2%}"


def interval(row: dict[str, Any]) -> str:
    """Write the 95% interval of a row's mean; "" for a single run."""
    return "{:.2f} to {:.2f}%".format(*(100 * end for end in row["ci95"])) if "ci95" in row else ""


def seconds(row: dict[str, Any]) -> str:
    """Write how long a row trained."""
    return f"{row['seconds']:.1f} s" if row["seconds"] < 60 else f"{row['seconds'] / 60:.1f} min"


def _duration(row: dict[str, Any], *details: str) -> str:
    return ", ".join([seconds(row), *details, *(["one core"] if row["cores"] == 1 else [])])


def command(row: dict[str, Any], script: str) -> str:
    """Write the flags of train.py that repeat a row, after the words of a script."""
    return "none: recipes.py has changed" if row["changed"] else code(f"{script}{row['command']}")


if __name__ == "__main__":
    print(markdown(runs.collect([cli.RUNS])), end="")
