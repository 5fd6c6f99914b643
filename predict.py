"""Classify pictures of your own: any format, any size, a garment on a light or dark plain ground.

python predict.py shirt.jpg photos/            # a table; a folder is taken with all in it
python predict.py photos/ --json > said.jsonl  # or --csv
curl -s URL | python predict.py - --show seen.png   # what the network saw
"""

import csv
import functools
import io
import json
import sys
from pathlib import Path

import cli

SURE = 0.7  # below this probability the answer is "not sure"
BATCH = 256
SHOWN = 100  # pictures that --show has room for
WIDEST = 60  # characters of the table's first column


def parse_args(argv=None):
    parser = cli.Parser(f'Classify pictures of garments; below a probability of {SURE:.0%} the answer is "not sure".')
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture, a folder of them, or - for stdin")
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        default=cli.DEFAULT_CHECKPOINT,
        help="default: checkpoints/best_cnn_fmnist.pt",
    )
    parser.add_argument("--top", metavar="K", type=cli.whole_number(1, 10), default=3, help="classes told (default: 3)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="a line of JSON for each picture")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="comma-separated values")
    parser.set_defaults(form="table")
    parser.add_argument(
        "--show", metavar="FILE.png", type=cli.file_to_write(".png"), help="also draw there what the network saw"
    )
    cli.add_device(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from data import UserError

    names = find(args.pictures)
    from tqdm import tqdm

    import checkpoint
    import engine
    import pictures

    model, _ = checkpoint.load(args.checkpoint)
    model.to(engine.pick_device(args.device))
    temperature = temperature_of(args.checkpoint)
    line = functools.partial(FORMS[args.form], args.top, min(max(map(len, names)), WIDEST))
    rows, failed = [], 0
    if head := line(None):
        print(head)
    with tqdm(total=len(names), unit=" pictures", disable=None if len(names) > 1 else True) as bar:
        for start in range(0, len(names), BATCH):
            found = []
            for name in names[start : start + BATCH]:
                try:
                    picture = pictures.read(sys.stdin.buffer.read() if name == "-" else name)
                    found.append((name, pictures.convert(picture)))
                except UserError as error:
                    failed += 1
                    tqdm.write(f"predict.py: {cli.one_line(name)}: {cli.one_line(error)}", file=sys.stderr)
                bar.update()
            new = classify(model, found, temperature)
            for row in new:
                tqdm.write(line(row))
            rows += new[: SHOWN - len(rows)]
    sys.stdout.flush()
    if args.show and rows:
        import plots

        checkpoint.write_atomically(args.show, plots.seen(rows))
        print(f"predict.py: what the network saw is in {cli.shown(args.show)}", file=sys.stderr)
    return 1 if failed else 0


def find(given):
    """Names of all pictures: the files given, and of folders all in them but hidden ones, in order."""
    from data import UserError

    names = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            names += [
                str(file) for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
        else:
            names.append(name)
    if not names:
        raise UserError("no picture in there")
    return names


def temperature_of(path):
    """The temperature that calibrates a checkpoint's probabilities, as its training measured it, or else 1."""
    from record import history_of

    temperature = (history_of(path) or {}).get("temperature")
    if temperature is None:
        print(
            f"predict.py: the probabilities of {cli.shown(path)} are not calibrated: its training held no images back, "
            "or its history is not beside it",
            file=sys.stderr,
        )
    return temperature or 1.0


def classify(model, found, temperature):
    """What the model says of pictures [(name, uint8 (28, 28))]: (name, pixels, [(class, probability)] by rank)."""
    import analysis
    import data
    import engine

    if not found:
        return []
    split = as_split(model, [pixels for _, pixels in found])
    probabilities = analysis.scaled(engine.predict_logits(model, split), temperature)
    return [
        (name, pixels, sorted(zip(data.CLASSES, map(float, row), strict=True), key=lambda pair: -pair[1]))
        for (name, pixels), row in zip(found, probabilities, strict=True)
    ]


def as_split(model, images):
    """Images uint8 (28, 28) without labels, as a Split on the model's device."""
    import numpy as np
    import torch

    import data

    device = next(model.parameters()).device
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    return data.Split("pictures", torch.from_numpy(np.stack(images)).to(device), labels, "pictures")


def answer(classes):
    """The class, or "not sure"."""
    return classes[0][0] if classes[0][1] >= SURE else "not sure"


def table_line(top, width, row):
    """A line of the table for a row of classify, or the line on top for None. So are the others."""
    if not row:
        return f"{'picture':<{width}}  {'answer':<11}  probabilities"
    name, _, classes = row
    told = ", ".join(f"{each} {probability:.1%}" for each, probability in classes[:top])
    return f"{cli.one_line(name):<{width}}  {answer(classes):<11}  {told}"


def json_line(top, _, row):
    if not row:
        return ""
    name, _, classes = row
    return json.dumps({"picture": name, "answer": answer(classes), "probabilities": dict(classes[:top])})


def csv_line(top, _, row):
    if row:
        name, _, classes = row
        values = [name, answer(classes), *(value for pair in classes[:top] for value in pair)]
    else:
        values = ["picture", "answer", *(f"{kind} {k}" for k in range(1, top + 1) for kind in ("class", "probability"))]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


FORMS = {"table": table_line, "json": json_line, "csv": csv_line}

if __name__ == "__main__":
    cli.run(main)
