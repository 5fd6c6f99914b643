"""Measure the answers also without the images that a CSV file lists, such as those of suspect labels.

listed = excluded.read(Path("suspects.csv"), val, train_val)    # a split, and all images of the files that it is from
result["without"] = excluded.measure(listed, logits, val.labels)

The columns are `split`, "train" or "test", and `index`, which counts from 0 in the files of the data: "train" stands
for all training images, of which the splits train and val are parts. A column `label` holds names of classes and must
be right. Other columns are ignored.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import data
import metrics
from data import Split
from dataset import idx
from runtime import cli, tables
from runtime.errors import UserError, one_line
from runtime.files import read_bytes

WHOLE = {"test": "test", "val": "train+val", "train": "train+val"}  # the split that an index of a list counts in
PARTS = ("train", "test")  # in the column split


class Listed(NamedTuple):
    """Which images of a split a file lists."""

    path: Path
    sha256: str
    listed: np.ndarray  # bool (n,)


def read(path: Path, split: Split, whole: Split) -> Listed:
    """Read a list of images. whole: the split WHOLE[split.name].

    Raises UserError for the first fault, with its line, and where the file lists none of the split, or all of it;
    OSError where it cannot be read.
    """
    content, name = read_bytes(path, tables.MOST_BYTES), cli.shown(path)
    if what := idx.foreign(content[:1000]):
        raise UserError(f"{name} is {what}")
    lines: dict[tuple[str, int], int] = {}
    for line, row in tables.rows(path, content, partial(_check_header, path)):
        try:
            key = _key(row, whole)
            if key in lines:
                raise UserError(f"image {key[1]} of {key[0]} is there twice, first in line {lines[key]}")
        except UserError as error:
            raise UserError(f"{name}, line {line}: {one_line(error)}") from None
        lines[key] = line
    marked = np.zeros(len(whole.labels), bool)
    marked[[index for part, index in lines if part == _part(whole)]] = True
    listed = marked[_places(split, whole)]
    if not listed.any() or listed.all():
        which = "all images" if listed.any() else f"none of the {len(listed):,} images"
        raise UserError(f"{name} lists {which} of the {split.name} split: there is nothing to compare")
    return Listed(path, hashlib.sha256(content).hexdigest(), listed)


def _check_header(path: Path, header: list[str]) -> None:
    if lacking := [f"the column {name}" for name in ("split", "index") if name not in header]:
        raise UserError(
            f"{cli.shown(path)}, line 1: it lacks {' and '.join(lacking)}: it must be split,index, with commas; other "
            "columns may follow"
        )


def _key(row: dict[str, str], whole: Split) -> tuple[str, int]:
    """Return the split and the index in a row, once they and the label have been checked. Raises UserError."""
    part, text = row["split"].strip(), row["index"].strip()
    if part not in PARTS:
        raise UserError(f"its split is {part[:40]!r}, not train or test")
    n = len(whole.labels) if part == _part(whole) else idx.MAX_IMAGES
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < n):
        raise UserError(f"its index is {text[:40]!r}, not a whole number from 0 to {n - 1:,}")
    if part == _part(whole) and "label" in row:
        title = whole.classes[int(whole.labels[int(text)])]
        if row["label"].strip() != title:
            label = f"its label is {row['label'].strip()[:40]!r}"
            raise UserError(f"{label}, but image {text} of {part} is a {title!r}: the file is of other data")
    return part, int(text)


def _part(whole: Split) -> str:
    return "test" if whole.name == "test" else "train"


def _places(split: Split, whole: Split) -> np.ndarray:
    """Return where the images of a split are among all, int64 (n,)."""
    if split.name == whole.name:
        return np.arange(len(whole.labels))
    return data.split_indices(whole.labels.numpy())[split.name]


def measure(listed: Listed, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Compute the accuracy on the images that are not listed, with Wilson's interval, for the JSON.

    logits: float (n, 10); labels: int64 (n,), both on the CPU.
    """
    right = (logits.argmax(1) == labels).numpy()[~listed.listed]
    share = metrics.share(right.sum(), len(right))
    return {
        "file": cli.relative(listed.path),
        "sha256": listed.sha256,
        "excluded": int(listed.listed.sum()),
        "n": share["n"],
        "accuracy": share["share"],
        "accuracy_ci95": share["ci95"],
    }
