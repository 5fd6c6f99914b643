"""Measure how fast this repository trains, against the machine's limit and what people use instead.

python bench.py           # everything, 45 minutes; writes figures/bench.json and figures/bench.png
python bench.py --quick   # 3 minutes: the MLP alone, no training of a peer to the end; writes figures/bench_quick.*
python bench.py --device cuda   # the GPU: this repository and the programs of PyTorch; writes figures/bench_cuda.*

Use the machine for nothing else meanwhile. Lightning, Keras and JAX are measured if they are installed, from
requirements-bench.txt.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime import cli, files
from runtime.errors import UserError

TITLES = {"resnet": "ResNet"}  # other models' names are abbreviations


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser("Measure the speed of training and evaluation against their alternatives.")
    parser.add_argument(
        "--quick", action="store_true", help="3 minutes: the MLP alone, no training of a peer to the end"
    )
    parser.add_argument("--figures-dir", metavar="DIR", type=Path, default=cli.FIGURES, help="default: figures")
    parser.add_argument("--device", default="cpu", help="cpu (default), or a GPU: cuda, cuda:1")
    cli.add_data_dir(parser, other=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the numbers and the figure. Returns the exit code."""
    args = parse_args(argv)
    torchvision_dir = cli.ROOT / ".cache" / "bench"
    for folder in (args.figures_dir, torchvision_dir):
        files.check_folder(folder)
    import torch

    import data
    from analysis import plots
    from benchmarks import measure
    from runtime import device

    target = device.pick_device(args.device)
    report = measure.Report()
    train, test = data.load("train+val", "test", data_dir=args.data_dir, other_data=None)
    if len(train.labels) != measure.TRAINING_IMAGES:
        raise UserError("bench.py needs the whole of Fashion-MNIST")
    args.figures_dir.mkdir(parents=True, exist_ok=True)
    measure.write_for_torchvision(torchvision_dir, {"train": train, "t10k": test})
    if missing := measure.missing():
        names = ", ".join(missing)
        print(f"not installed and left out: {names}: {cli.install('requirements-bench.txt')}")
    minutes = 3 if args.quick else 45
    print(f"this takes about {minutes} minutes on two cores; use the machine for nothing else meanwhile")
    common = {
        "threads": torch.get_num_threads(),
        "device": str(target),
        "data_dir": args.data_dir,
        "torchvision_dir": str(torchvision_dir),
    }
    results = measure.run(common, test.images[0], args.quick, report)

    stem = "_".join(["bench", *([target.type] * (target.type != "cpu")), *(["quick"] * args.quick)])
    files.write_json(args.figures_dir / f"{stem}.json", results)
    files.write_atomically(args.figures_dir / f"{stem}.png", plots.png(plots.bench(results)))
    print("\n" + markdown(results))
    print(f"\n{results['minutes']:.0f} minutes; written to {cli.shown(args.figures_dir)}/{stem}.json and {stem}.png")
    return 0


def markdown(results: Mapping[str, Any]) -> str:
    """Lay out the results as the tables of docs/speed.md; those of a GPU lack some."""
    parts = [machine_line(results)]
    layouts: dict[str, Callable[[Any], str]] = {
        "products": product_line,
        "epoch": epoch_tables,
        "to_target": target_table,
        "neighbours": neighbour_table,
        "growth": growth_table,
        "start_up": start_up_table,
    }
    parts += [layout(results[key]) for key, layout in layouts.items() if key in results]
    return "\n\n".join(parts)


def machine_line(results: Mapping[str, Any]) -> str:
    """Describe the machine and its limit."""
    machine, limits = results["machine"], results["limit_gflops"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['threads']} cores of {machine['processor']} with {', '.join(machine['features'])}; {versions}. "
        f"Matrix product: {limits['float32']:,.0f} GFLOP/s in float32, {limits['bfloat16']:,.0f} in bfloat16."
    )


def product_line(products: Mapping[str, Mapping[str, float]]) -> str:
    """Name what multiplies matrices how fast; the fastest is the limit."""
    rates = [
        f"{dtype} by {library} {rate:,.0f}"
        for dtype, libraries in products.items()
        for library, rate in libraries.items()
    ]
    return f"GFLOP/s of a matrix product: {', '.join(rates)}."


def epoch_tables(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Lay out an epoch of every program and model, each with the first epoch where that compiles."""
    parts = [part for model, rows in models.items() for part in (epoch_table(model, rows), compile_line(model, rows))]
    return "\n\n".join(filter(None, parts))


def epoch_table(model: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out an epoch of every program."""
    head = [f"{model.upper()}, an epoch", "seconds", "times as fast"]
    head += ["of the float32 limit", "of the bfloat16 limit", "test images/s", "peak MiB"]
    slowest = rows["tutorial loop"]["seconds"]
    lines = [
        [
            name,
            short(row["seconds"]),
            f"{slowest / row['seconds']:.1f}",
            f"{row['share_of_float32']:.1%}",
            f"{row['share_of_bfloat16']:.1%}",
            f"{row['test_images_per_second']:,.0f}",
            f"{row['peak_mib']:,.0f}",
        ]
        for name, row in rows.items()
    ]
    return table(head, lines)


def compile_line(model: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how long the first epoch of JAX takes, with compiling; "" where it is not measured."""
    first = [
        f"{name} {row['first_seconds']:.1f} s"
        for name, row in rows.items()
        if "JAX" in name and row.get("first_seconds")
    ]
    return f"The first epoch of the {model.upper()}, with compiling: {'; '.join(first)}." if first else ""


def target_table(goals: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out the training to the published accuracy."""
    lines = []
    for model, goal in goals.items():
        ours, theirs, speed = goal["ours"], "not run", ""
        if loop := goal.get("tutorial"):
            theirs = f"{loop['seconds']:.1f} s ({loop['epochs']} epochs, {loop['seeds']} seeds)"
            speed = f"{goal['ratio']:.0f}"
        accuracy = f"{ours['mean_accuracy']:.2%} ± {ours['sd']:.2%}, {ours['seeds']} seeds"
        fast = f"{ours['seconds']:.2f} s ({accuracy})"
        lines.append([f"{model.upper()}, {goal['target']:.2%}", theirs, fast, speed])
    return table(["training to a mean test accuracy of", "tutorial loop", "ours, fast", "times as fast"], lines)


def neighbour_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out an epoch beside busy processes, as times the quiet one."""
    fair = rows[0]["fair"]
    lines = [["*fair sharing of the cores*", "", "", *(f"*{ratio:.2g}*" for ratio in fair.values())]]
    for row in rows:
        ratios = [seconds / row["quiet"] for seconds in [*row["beside"].values(), max(row["two"])]]
        name = f"{TITLES.get(row['model'], row['model'].upper())}, {row['program']}"
        lines.append([name, f"{row['images']:,}", short(row["quiet"]), *(f"{ratio:.1f}" for ratio in ratios)])
    beside = [f"beside {count}, times" for count in rows[0]["beside"]]
    return table(["an epoch", "images", "quiet, seconds", *beside, "two at once, times"], lines)


def start_up_table(seconds: Mapping[str, float]) -> str:
    """Lay out whole commands."""
    shortest = seconds["import torch"]
    lines = [[f"`{name}`", f"{taken:.2f}", f"{taken / shortest:.2f}"] for name, taken in seconds.items()]
    return table(["command", "seconds", "times `import torch`"], lines)


def growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out an epoch by number of images and threads."""
    columns = list(dict.fromkeys((row["model"], row["threads"]) for row in rows))
    cells = {
        (row["images"], row["model"], row["threads"]): f"{row['seconds']:.2f} s, {row['peak_mib']:,.0f} MiB"
        for row in rows
    }
    head = [f"{model.upper()}, {threads} thread{'s' * (threads > 1)}" for model, threads in columns]
    sizes = dict.fromkeys(row["images"] for row in rows)
    lines = [[f"{images:,}", *(cells[images, *column] for column in columns)] for images in sizes]
    return table(["ours, fast: images an epoch", *head], lines)


def short(seconds: float) -> str:
    """Write seconds: 19.16, 0.104."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


if __name__ == "__main__":
    cli.run(main)
