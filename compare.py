"""Accuracy against what it costs: every finished run, the published systems, and which of them nothing cheaper equals.

python compare.py                           # all runs in runs/: a table, and figures/frontier.png
python compare.py again/cnn-val-0 again     # runs of your own: the folder of one, or a folder of such folders
python compare.py --json numbers.json       # with all numbers, of the runs and of the literature
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes
from runtime import cli, files

RUNS = cli.RUNS
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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser("Compare runs by accuracy and cost.")
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        default=[RUNS],
        metavar="FOLDER",
        help="a folder of runs' folders, or the folder of one run (default: runs)",
    )
    parser.add_argument("--json", type=cli.file_to_write(".json"), metavar="FILE.json", help="write all numbers")
    parser.add_argument(
        "--figures-dir", metavar="DIR", type=Path, default=cli.FIGURES, help="where to write (default: figures)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, draw the figure and write the numbers. Returns the exit code."""
    args = parse_args(argv)
    files.check_folder(args.figures_dir)
    with cli.loading():
        from analysis import plots

    rows = collect(*args.folders)
    args.figures_dir.mkdir(parents=True, exist_ok=True)
    picture = args.figures_dir / "frontier.png"
    files.write_atomically(picture, plots.png(plots.frontier(rows, literature())))
    print(markdown(rows))
    if args.json:
        files.write_json(args.json, {"runs": rows, "literature": literature()})
    print("written to " + " and ".join(cli.shown(path) for path in (picture, args.json) if path))
    return 0


def collect(*folders: Path) -> list[dict[str, Any]]:
    """Return a row for each way of training with finished runs in the folders: see analysis/runs.py."""
    with cli.loading():  # PyTorch takes a second to import
        from analysis import runs

    return runs.collect(folders)


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
        mean = f"**{_accuracy(row)}**" if row["accuracy"] == best[row["model"]] else _accuracy(row)
        lines.append(
            [
                row["model"],
                _recipe(row),
                recipes.SELECTIONS[row["select"]].chosen,
                f"{row['published']:.2%}" if row["published"] else "",
                f"{mean} of {len(row['seeds'])}",
                "{:.2f} to {:.2f}%".format(*(100 * end for end in row["ci95"])) if "ci95" in row else "",
                _duration(row, row["precision"]),
                _command(row, ""),
            ]
        )
    return _table(head, lines)


def brief(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows in five columns, as README.md shows some of them."""
    head = ["model and recipe", "test accuracy", "n", "training time", "command"]
    lines = []
    for row in rows:
        usual = row["select"] == recipes.find(row["recipe"], row["model"]).select
        chosen = "" if usual else f", best epoch chosen on {recipes.SELECTIONS[row['select']].chosen}"
        published = f" (published result: {row['published']:.2%})" if row["published"] else ""
        name = f"{row['model']}, {_recipe(row)}{chosen}{published}"
        lines.append([name, _accuracy(row), len(row["seeds"]), _duration(row), _command(row, "python train.py ")])
    return _table(head, lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *lines)]
    texts = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([texts[0], "|---" * len(head) + "|", *texts[1:]]) + "\n"


def _recipe(row: dict[str, Any]) -> str:
    """Name the recipe with what sets the row apart: its data, values that recipes.py lost, what differs."""
    from dataset import sources  # NumPy is not needed for --help

    data = "" if row["data"] == sources.NAME else f", on {row['data']}"
    changes = "".join(f", {key} {value}" for key, value in row["changed"].items())
    epochs = f"{row['epochs']} epoch{'s' if row['epochs'] > 1 else ''}"
    differs = f", {row['differs']}" if "differs" in row else ""
    return _plain(f"{row['recipe']}, {epochs}{changes}{data}{differs}")


def _plain(text: str) -> str:
    """Keep a text with names that others chose from being read as HTML, code or links of Markdown."""
    return re.sub(r"[`<\\]|(?<=\])\(", r"\\\g<0>", text)


def _code(text: str) -> str:
    """Lay out code in Markdown, even with backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"`{text}`" if not longest else f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"


def _accuracy(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.2f} ± {row['sd']:.2%}" if "sd" in row else f"{row['accuracy']:.2%}"


def _duration(row: dict[str, Any], *details: str) -> str:
    seconds = row["seconds"]
    duration = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    return ", ".join([duration, *details, *(["one core"] if row["cores"] == 1 else [])])


def _command(row: dict[str, Any], script: str) -> str:
    return "none: recipes.py has changed" if row["changed"] else _code(f"{script}{row['command']}")


if __name__ == "__main__":
    cli.run(main)
