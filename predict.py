"""Classify pictures of your own, of one object each on a plain light or dark background.

python predict.py shirt.jpg photos/                 # a table; a folder stands for all files in it
python predict.py photos/ --json > answers.jsonl    # or --csv
curl -s URL | python predict.py - --show figures/seen.png   # draws what the network saw
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import cli
from runtime.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

    import numpy as np
    from tqdm import tqdm

    from analysis.classify import Classified

BATCH = 256
SHOWN = 100  # pictures that --show has room for
TITLE = "what the network saw"  # in the metadata of a figure that --show drew


def parse_args(argv: list[str] | None = None) -> "argparse.Namespace":
    """Parse the command line."""
    parser = cli.Parser('Classify pictures; an answer with a probability below 70% is "not sure".')
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture, a folder of them, or - for stdin")
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        default=cli.DEFAULT_CHECKPOINT,
        help="default: checkpoints/best_cnn_fmnist.pt",
    )
    parser.add_argument(
        "--top", metavar="K", type=cli.whole_number(1, 10), default=3, help="classes shown (default: 3)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="a line of JSON for each picture")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="comma-separated values")
    parser.set_defaults(form="table")
    parser.add_argument(
        "--show", metavar="FILE.png", type=cli.file_to_write(".png"), help="also draw what the network saw"
    )
    cli.add_bare(parser)
    cli.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return 1 if a picture could not be read, else 0."""
    args = parse_args(argv)
    from pictures import worker
    from pictures.read import find

    names = find(args.pictures)
    if args.show:
        refuse_overwriting(args.show, names)
    worker.start()  # while PyTorch is loaded
    with cli.loading():
        from tqdm import tqdm

        import checkpoint
        from analysis.classify import FORMS, classify, temperature_of
        from runtime.device import pick_device

    ((model, info),) = checkpoint.load_all([args.checkpoint], checkpoint.Bare(args.model, args.mean, args.std))
    model.to(pick_device(args.device))
    temperature = temperature_of(args.checkpoint)
    form = FORMS[args.form](args.top, names, info["classes"])
    print(f"predict.py: answers of {cli.shown(args.checkpoint)}, {info['model']}", file=sys.stderr)
    to_show, count = [], 0
    with tqdm(total=len(names), unit=" pictures", disable=None if len(names) > 1 else True) as bar:
        for found in read_in_batches(names, bar):
            for row in classify(model, found, temperature, info["classes"]):
                if not count and (head := form.head()):
                    bar.write(head)
                bar.write(form.line(row))
                count += 1
                if count <= SHOWN:
                    to_show.append(row)
    sys.stdout.flush()
    if args.show and to_show:
        show(args.show, to_show, count)
    return 0 if count == len(names) else 1


def read_in_batches(names: Sequence[str], bar: "tqdm") -> Iterator[list[tuple[str, "np.ndarray"]]]:
    """Read and convert pictures: (name, uint8 (28, 28)) of up to BATCH at a time.

    An unreadable one is skipped, with a line on stderr.
    """
    from pictures.convert import convert
    from pictures.read import MOST_BYTES, read

    for start in range(0, len(names), BATCH):
        found = []
        for name in names[start : start + BATCH]:
            try:
                found.append((name, convert(read(sys.stdin.buffer.read(MOST_BYTES + 1) if name == "-" else name))))
            except UserError as error:
                bar.write(f"predict.py: {one_line(name)}: {one_line(error)}", file=sys.stderr)
            bar.update()
        yield found


def refuse_overwriting(path: Path, names: Sequence[str]) -> None:
    """Raise UserError if there is a file that --show did not draw: a shell may have expanded `--show *.png`."""
    if path.exists() and any(os.path.exists(name) and path.samefile(name) for name in names):
        raise UserError(f"--show {cli.shown(path)} is one of the pictures: name another file")
    if os.path.lexists(path) and not (path.is_file() and _is_drawn(path)):
        raise UserError(f"{cli.shown(path)} exists; --show replaces only a figure that it drew: name a new file")


def _is_drawn(path: Path) -> bool:
    with open(path, "rb") as file:
        return f"tEXtTitle\0{TITLE}".encode() in file.read(200)


def show(path: Path, rows: Sequence["Classified"], count: int) -> None:
    """Draw what the network saw of the pictures, or of the first of so many."""
    from analysis import plots
    from runtime import files

    files.write_atomically(path, plots.png(plots.seen(rows), TITLE))
    some = f" of the first {len(rows)} pictures" if len(rows) < count else ""
    print(f"predict.py: what the network saw{some} is in {cli.shown(path)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
