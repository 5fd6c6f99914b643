"""Measure how fast this repository trains, against the machine's limit and what people use instead.

python bench.py           # everything, at most 45 minutes; writes figures/bench.json and figures/bench.png
python bench.py --quick   # 2 minutes: the MLP alone, no training of a peer to the end; writes figures/bench_quick.*

Use the machine for nothing else meanwhile. Keras is measured if requirements-bench.txt is installed.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime import cli, files
from runtime.errors import UserError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser("Measure the speed of training and evaluation against their alternatives.")
    parser.add_argument(
        "--quick", action="store_true", help="2 minutes: the MLP alone, no training of a peer to the end"
    )
    parser.add_argument("--figures-dir", metavar="DIR", type=Path, default=cli.FIGURES, help="default: figures")
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

    report = measure.Report()
    train, test = data.load("train+val", "test", data_dir=args.data_dir, other_data=None)
    if len(train.labels) != measure.TRAINING_IMAGES:
        raise UserError("bench.py needs the whole of Fashion-MNIST")
    args.figures_dir.mkdir(parents=True, exist_ok=True)
    measure.write_for_torchvision(torchvision_dir, {"train": train, "t10k": test})
    if not measure.has_keras():
        print(f"Keras is not installed and is left out: {cli.install('requirements-bench.txt')}")
    print(
        f"this takes about {2 if args.quick else 30} minutes on two cores; use the machine for nothing else meanwhile"
    )
    common = {"threads": torch.get_num_threads(), "data_dir": args.data_dir, "torchvision_dir": str(torchvision_dir)}
    results = measure.run(common, args.quick, report)

    stem = "bench_quick" if args.quick else "bench"
    files.write_json(args.figures_dir / f"{stem}.json", results)
    files.write_atomically(args.figures_dir / f"{stem}.png", plots.png(plots.bench(results)))
    print("\n" + markdown(results))
    print(f"\n{results['minutes']:.0f} minutes; written to {cli.shown(args.figures_dir)}/{stem}.json and {stem}.png")
    return 0


def markdown(results: Mapping[str, Any]) -> str:
    """Lay out the results as the tables of docs/speed.md."""
    parts = [machine_line(results)]
    parts += [epoch_table(model, rows) for model, rows in results["epoch"].items()]
    parts += [target_table(results["to_target"]), growth_table(results["growth"])]
    parts.append("; ".join(f"`{name}` {seconds:.2f} s" for name, seconds in results["start_up"].items()))
    return "\n\n".join(parts)


def machine_line(results: Mapping[str, Any]) -> str:
    """Describe the machine and its limit."""
    machine, limits = results["machine"], results["limit_gflops"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['threads']} cores of {machine['processor']} with {', '.join(machine['features'])}; {versions}. "
        f"Matrix product: {limits['float32']:,.0f} GFLOP/s in float32, {limits['bfloat16']:,.0f} in bfloat16."
    )


def epoch_table(model: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out an epoch of every program."""
    head = [f"{model.upper()}, an epoch", "seconds", "times as fast", "of the bfloat16 limit", "tests images/s"]
    slowest = rows["tutorial loop"]["seconds"]
    lines = [
        [
            name,
            f"{row['seconds']:.2f}",
            f"{slowest / row['seconds']:.1f}",
            f"{row['share_of_bfloat16']:.1%}",
            f"{row['test_images_per_second']:,.0f}",
            f"{row['peak_mib']:,.0f}",
        ]
        for name, row in rows.items()
    ]
    return table([*head, "peak MiB"], lines)


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


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


if __name__ == "__main__":
    cli.run(main)
