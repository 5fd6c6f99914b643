"""Accuracy against what it costs: every run in runs/, the published systems, and who is beaten by nobody.

python frontier.py            # figures/frontier.png and .json, and the table of the README on the screen
"""

import json
from pathlib import Path
from statistics import mean, median, stdev

import cli

RUNS = cli.HERE / "runs"
TABLE = "https://github.com/zalandoresearch/fashion-mnist#benchmark"  # as submitted there, verified by nobody
LITERATURE = (  # system, test accuracy, parameters, source; which images chose the epoch none of them says
    ("2 convolutions", 0.922, 113e3, TABLE),
    ("2 convolutions, 3 linear", 0.932, 1.8e6, TABLE),
    ("VGG16", 0.935, 26e6, TABLE),
    ("Capsule network", 0.936, 8e6, TABLE),
    ("DenseNet-BC", 0.954, 768e3, TABLE),
    ("WRN-40-4", 0.967, 8.9e6, TABLE),
    ("WRN-28-10", 0.959, 36.5e6, f"{TABLE}; parameters: arXiv:1605.07146"),
    ("WRN-28-10, random erasing", 0.963, 36.5e6, f"{TABLE}; arXiv:1708.04896"),
)
CHOSEN = {"test": "the test set, as published", "val": "5,000 validation images", "last": "nothing: the last"}
PUBLISHED = {"mlp": "87.14%", "cnn": "91.82%"}


def parse_args(argv=None):
    parser = cli.Parser("Compare all runs by accuracy and cost.")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=RUNS, help="a folder of checkpoint folders (default: runs)"
    )
    parser.add_argument(
        "--figures-dir", metavar="DIR", type=Path, default=cli.FIGURES, help="where to write (default: figures)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import checkpoint
    import data
    import plots

    args.figures_dir.mkdir(parents=True, exist_ok=True)
    rows = collect(args.runs_dir)
    if not rows:
        raise data.UserError(f"{cli.shown(args.runs_dir)} has no finished run, as */best_*_fmnist.json of train.py")
    literature = [dict(zip(("name", "accuracy", "parameters", "source"), row, strict=True)) for row in LITERATURE]
    checkpoint.write_json(args.figures_dir / "frontier.json", {"runs": rows, "literature": literature})
    checkpoint.write_atomically(args.figures_dir / "frontier.png", plots.frontier(rows, literature))
    print(markdown(rows))
    print(f"written to {cli.shown(args.figures_dir / 'frontier.png')} and frontier.json")
    return 0


def collect(folder):
    """A row for each way of training with finished runs below the folder, in the order of models and recipes.

    Runs belong together that differ in their seed alone.
    """
    import data
    import models
    import recipes

    groups = {}
    for path in sorted(folder.glob("*/best_*_fmnist.json")):
        try:
            run = json.loads(path.read_text())
            flags = {"recipe": "published"} | run["flags"]
            wanted = run["status"] == "finished" and run["model"] in models.MODELS
        except (ValueError, KeyError, TypeError):
            raise data.UserError(f"{cli.shown(path)} is no history of a run of train.py") from None
        if not wanted or flags["recipe"] not in recipes.RECIPES:
            continue
        teachers = [teacher["checkpoint"] for teacher in flags.get("teachers", [])]
        key = (run["model"], flags["recipe"], flags["select"], flags["epochs"], tuple(teachers))
        groups.setdefault(key, []).append(run)
    places = {name: place for names in (models.MODELS, recipes.RECIPES, CHOSEN) for place, name in enumerate(names)}
    return [describe(key, groups[key]) for key in sorted(groups, key=lambda key: [places[name] for name in key[:3]])]


def describe(key, runs):
    """The row of some runs that differ in their seed alone: plain values, fit for JSON.

    Its seconds are the median of those that had the most cores, as several trained at once have one each.
    """
    from scipy.stats import t

    import models

    model, recipe, select, epochs, teachers = key
    accuracies = [run["test"]["accuracy"] for run in runs]
    cores = max(map(cores_of, runs))
    network = models.build(model)
    row = {
        "model": model,
        "recipe": recipe,
        "select": select,
        "teachers": list(teachers),
        "epochs": epochs,
        "seeds": sorted(run["seed"] for run in runs),
        "accuracy": mean(accuracies),
        "seconds": median(sum(epoch["seconds"] for epoch in run["epochs"]) for run in runs if cores_of(run) == cores),
        "cores": cores,
        "precision": runs[0]["flags"].get("precision", "float32"),
        "parameters": models.count_parameters(network),
        "mflop": models.count_flop(network) / 1e6,
        "command": command(*key),
    }
    if len(runs) > 1:
        half = float(t.ppf(0.975, len(runs) - 1)) * stdev(accuracies) / len(runs) ** 0.5
        row |= {"sd": stdev(accuracies), "ci95": [row["accuracy"] - half, row["accuracy"] + half]}  # of the mean
    return row


def cores_of(run):
    """The most threads that a run had, as it may have been resumed with more or fewer."""
    return max(part.get("threads", 0) for part in (run, *run.get("resumed", [])))


def command(model, recipe, select, epochs, teachers):
    """The flags of train.py that repeat it, but for the seed."""
    import recipes

    usual = recipes.find(recipe, model)
    words = ["--model", model]
    words += ["--recipe", recipe] if recipe != recipes.default(model) else []
    words += ["--select", select] if select != usual.select else []
    words += ["--epochs", str(epochs)] if epochs != usual.epochs else []
    return " ".join([*words, *(["--teacher", *teachers] if teachers else [])])


def markdown(rows):
    """The README's table of results."""
    lines = [
        "| model | recipe | best epoch chosen on | published | here: mean ± SD of seeds | 95% interval of the mean "
        "| training | `python train.py` with |",
        "|---" * 8 + "|",
    ]
    best = {row["model"]: max(other["accuracy"] for other in rows if other["model"] == row["model"]) for row in rows}
    for row in rows:
        told = f"{row['accuracy']:.2%}"
        interval = ""
        if "sd" in row:
            told = f"{100 * row['accuracy']:.2f} ± {row['sd']:.2%}"
            interval = "{:.2f} to {:.2f}%".format(*(100 * end for end in row["ci95"]))
        told = f"**{told}**" if row["accuracy"] == best[row["model"]] else told
        published = PUBLISHED.get(row["model"], "") if row["recipe"] == "published" and row["select"] == "test" else ""
        lines.append(
            f"| {row['model']} | {row['recipe']}, {row['epochs']} epochs | {CHOSEN[row['select']]} | {published} "
            f"| {told} of {len(row['seeds'])} | {interval} "
            f"| {duration(row['seconds'])}, {row['precision']}{', one core' if row['cores'] == 1 else ''} "
            f"| `{row['command']}` |"
        )
    return "\n".join(lines) + "\n"


def duration(seconds):
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    cli.run(main)
