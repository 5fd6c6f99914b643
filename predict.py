"""Classify pictures of your own, of one object each on a plain light or dark background.

python predict.py shirt.jpg photos/                 # a table; a folder stands for all files in it
python predict.py photos/ --json > answers.jsonl    # or --csv
curl -s URL | python predict.py - --show figures/seen.png   # draws what the network saw
python predict.py --evaluate labels.csv             # how right it is on pictures of your own, and how often it is sure
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import cli
from runtime.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

    from tqdm import tqdm

    from analysis.classify import Candidate, Classified
    from pictures.convert import Conversion

BATCH = 64  # pictures that are in memory at the same time
SHOWN = 100  # pictures that --show has room for
TITLE = "what the network saw"  # in the metadata of a figure that --show drew


def parse_args(argv: list[str] | None = None) -> "argparse.Namespace":
    """Parse the command line."""
    parser = cli.Parser('Classify pictures; an answer that is not sure says "not sure" or "unlike all ten kinds".')
    parser.add_argument("pictures", metavar="PICTURE", nargs="*", help="a picture, a folder of them, or - for stdin")
    parser.add_argument(
        "--evaluate",
        metavar="LABELS.csv",
        type=Path,
        help="instead of pictures: measure on those that a CSV file names, file,label or file,strict,lenient",
    )
    cli.add_pictures_checkpoint(parser)
    parser.add_argument("--top", metavar="K", type=cli.whole_number(1, 10), help="classes shown (default: 3)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="a line of JSON for each picture")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="comma-separated values")
    parser.set_defaults(form="table")
    parser.add_argument(
        "--show", metavar="FILE.png", type=cli.file_to_write(".png"), help="also draw what the network saw"
    )
    cli.add_bare(parser)
    cli.add_device(parser)
    args = parser.parse_args(argv)
    if bool(args.pictures) == bool(args.evaluate):
        parser.error("name pictures, or --evaluate LABELS.csv" + ", not both" * bool(args.pictures))
    if args.evaluate and (args.show or args.top or args.form == "csv"):
        parser.error("--evaluate prints figures or, with --json, all as JSON: it takes no --show, --top or --csv")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script; return 1 if a picture could not be read, else 0."""
    args = parse_args(argv)
    return evaluate(args) if args.evaluate else answer(args)


def answer(args: "argparse.Namespace") -> int:
    """Print the answers to pictures; return 1 if one could not be read, else 0."""
    from pictures import worker
    from pictures.read import find

    names = find(args.pictures)
    if args.show:
        refuse_overwriting(args.show, names)
    worker.start()  # while PyTorch is loaded
    candidate = load(args)
    from tqdm import tqdm

    from analysis.classify import FORMS, classify
    from pictures.convert import small

    form = FORMS[args.form](args.top or 3, names, candidate.classes)
    to_show, count = [], 0
    with tqdm(total=len(names), unit=" pictures", disable=None if len(names) > 1 else True) as bar:
        for found in read_in_batches(names, bar):
            for row in classify(candidate, found):
                if not count and (head := form.head()):
                    bar.write(head)
                bar.write(form.line(row))
                count += 1
                if count <= SHOWN:
                    to_show.append(row._replace(conversion=small(row.conversion)))
    sys.stdout.flush()
    if args.show and to_show:
        show(args.show, to_show, count)
    return 0 if count == len(names) else 1


def evaluate(args: "argparse.Namespace") -> int:
    """Print how right the answers to labelled pictures are."""
    from pictures import worker

    worker.start()  # while PyTorch is loaded
    candidate = load(args)
    from tqdm import tqdm

    from analysis import photos

    labelled = photos.read_labels(args.evaluate, candidate.classes)
    with tqdm(total=len(labelled), unit=" pictures", disable=None) as bar:
        answers = photos.answers(candidate, labelled, bar.update)
        judged = [photos.judge(*pair) for pair in zip(labelled, answers, strict=True)]
    found = photos.figures(judged, candidate.classes)
    print(json.dumps({"checkpoint": candidate.name, **found}) if args.form == "json" else photos.text(found))
    return 0


def load(args: "argparse.Namespace") -> "Candidate":
    """Load the checkpoint, and say on stderr which one it is."""
    with cli.loading():
        import checkpoint
        from analysis.classify import candidate
        from runtime.device import pick_device

    ((model, info),) = checkpoint.load_all([args.checkpoint], checkpoint.Bare(args.model, args.mean, args.std))
    found = candidate(args.checkpoint, model.to(pick_device(args.device)), info)
    print(f"predict.py: answers of {cli.shown(args.checkpoint)}, {info['model']}", file=sys.stderr)
    return found


def read_in_batches(names: Sequence[str], bar: "tqdm") -> Iterator[list[tuple[str, "Conversion"]]]:
    """Read and convert pictures: (name, conversion) of up to BATCH at a time.

    An unreadable one is skipped, with a line on stderr.
    """
    from pictures.convert import explain_all
    from pictures.read import MOST_BYTES, PictureError

    for start in range(0, len(names), BATCH):
        batch, found = names[start : start + BATCH], []
        sources = (sys.stdin.buffer.read(MOST_BYTES + 1) if name == "-" else name for name in batch)
        for name, result in zip(batch, explain_all(sources), strict=True):
            if isinstance(result, PictureError):
                bar.write(f"predict.py: {one_line(name)}: {one_line(result)}", file=sys.stderr)
            else:
                found.append((name, result))
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


def _answer(row: "Classified") -> str:
    """Return an answer and the most probable class."""
    best, probability = row.ranking[0]
    return f"{row.answer}, {probability:.0%}" if row.answer == best else f"{row.answer} ({best}, {probability:.0%})"


def show(path: Path, rows: Sequence["Classified"], count: int) -> None:
    """Draw the pictures, or the first of so many, what counts as the object of each, and what the network saw."""
    import numpy as np

    from analysis import plots
    from runtime import files

    shown = []
    for row in rows:
        picture, mask, pixels, notes = row.conversion[:4]
        shown.append((row.name, _answer(row), np.asarray(picture), mask, pixels, notes))
    files.write_atomically(path, plots.png(plots.seen(shown), TITLE))
    some = f" of the first {len(rows)} pictures" if len(rows) < count else ""
    print(f"predict.py: what the network saw{some} is in {cli.shown(path)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
