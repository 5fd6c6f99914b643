"""Which way of training is better: runs that differ in their seed alone as a row, and an honest comparison of rows.

python compare.py                                # the runs in runs/ and checkpoints/
python compare.py sweeps/first                   # all runs below a folder
python compare.py again --baseline "cnn best"    # against this row, by its name or number, and not against the best
python compare.py again --json numbers.json --csv runs.csv --markdown table.md
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime import cli, files


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser("Compare runs that differ in more than their seed: accuracy, its differences, and cost.")
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        default=[cli.RUNS, cli.CHECKPOINTS],
        metavar="FOLDER",
        help="folders with runs of train.py, at any depth (default: runs but not runs/deep, and checkpoints; a run in "
        "both counts once)",
    )
    parser.add_argument(
        "--baseline",
        metavar="ROW",
        help="compare with this row: its number, words of its name, or a value that no other row has (default: the "
        "most accurate)",
    )
    for kind, what in {
        ".json": "all numbers, of the rows, the comparisons and the literature",
        ".csv": "every run, a line each",
        ".md": "the tables and comparisons in Markdown, with the command of each row",
    }.items():
        flag = "--markdown" if kind == ".md" else f"--{kind[1:]}"
        parser.add_argument(flag, type=cli.file_to_write(kind), metavar=f"FILE{kind}", help=f"write {what}")
    parser.add_argument(
        "--figures-dir",
        metavar="DIR",
        type=Path,
        default=cli.FIGURES,
        help="where to write curves.png and frontier.png (default: figures)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and the comparisons, draw the figures and write the files. Returns the exit code."""
    args = parse_args(argv)
    files.check_folder(args.figures_dir)
    with cli.loading():  # PyTorch takes a second to import
        from analysis import charts, comparison, plots, runs, tables

    sections = comparison.of(runs.group(runs.read(args.folders)), args.baseline)
    print(comparison.text(sections))
    written = []
    args.figures_dir.mkdir(parents=True, exist_ok=True)
    for name, figure in {"curves.png": charts.curves(sections), "frontier.png": charts.frontier(sections)}.items():
        if figure:
            written.append(args.figures_dir / name)
            files.write_atomically(written[-1], plots.png(figure))
    if args.json:
        files.write_json(args.json, comparison.numbers(sections) | {"literature": tables.literature()})
    if args.csv:
        files.write_atomically(args.csv, comparison.table_of_runs(sections).encode())
    if args.markdown:
        files.write_atomically(args.markdown, comparison.markdown(sections).encode())
    written += filter(None, (args.json, args.csv, args.markdown))
    print("\n" + cli.wrapped("written to " + ", ".join(map(cli.shown, written))))
    return 0


if __name__ == "__main__":
    cli.run(main)
