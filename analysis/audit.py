"""The audit of a data set as files that others can use: suspects.csv, near_duplicates.csv, consensus.csv, README.md.

audit.check(folder)                                                           # before the work
contents = audit.contents(summary, measured[0], evidence, train_features, train, test)   # bytes by file name

summary is of analysis.report, the others are of analysis.composition. The same arguments give the same bytes. README.md
is templates/audit.md.j2; its limits, seeds and recipes are the constants of the code.
"""

import csv
import importlib.metadata
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch.nn import functional as F

from analysis import composition, trainings
from analysis.composition import Evidence, Measured
from analysis.report import TEMPLATES
from data import Split
from dataset.published import NAME
from runtime import cli, files
from runtime.errors import UserError, one_line

COLUMNS = {  # of each file, with their meaning
    "suspects.csv": {
        "split": "`train` or `test`",
        "index": "the image's place in its split, from 0, in the order of the data set's files",
        "label": "the label that the data set gives",
        "suggested": "the class that the model of the image's fold finds most likely",
        "p_label": "this model's probability of the label",
        "p_suggested": "this model's probability of the suggested class",
        "rank": "1 is the most suspect image, with the lowest p_label; of equal ones, training images come first",
    },
    "near_duplicates.csv": {
        "test_index": "the test image's place, from 0",
        "train_index": "the place of its twin, the training image that it nearly repeats",
        "pixel_distance": "root mean square difference of the two images' pixels; 1 is the whole grey range",
        "feature_distance": "cosine distance of the two images' features in the checkpoint's network",
        "test_label": "the label of the test image",
        "train_label": "the label of the training image",
    },
    "consensus.csv": {
        "test_index": "the test image's place, from 0",
        "label": "the label that the data set gives",
        "answer": "the wrong answer that the checkpoint and all trainings give",
        "group": "the group that the mistake counts in, see above",
    },
}
TITLE = "# An audit of labels, written by analyze_errors.py --export"  # the first line of README.md
FIRST_LINES = {name: ",".join(columns) for name, columns in COLUMNS.items()} | {"README.md": TITLE}
LARGEST = 2**26  # bytes of a file that may be replaced


def check(folder: Path) -> None:
    """Raise UserError where a file of this folder would be replaced that --export did not write. Changes nothing."""
    for name, line in FIRST_LINES.items():
        try:
            content = files.read_bytes(folder / name, LARGEST)
        except FileNotFoundError:
            continue
        if content.partition(b"\n")[0].rstrip() != line.encode():
            raise UserError(
                f"{cli.shown(folder / name)} was not written by --export and is not replaced: choose another folder"
            )


def contents(
    summary: dict[str, Any],
    first: Measured,
    evidence: Evidence,
    train_features: torch.Tensor,
    train: Split,
    test: Split,
) -> dict[str, bytes]:
    """Write the audit of the first checkpoint, bytes by file name.

    train_features: float32 (N, d), its features of the training images.
    Raises UserError where the folds or the trainings of the checkpoint's kind are missing.
    """
    if missing := composition.missing(summary["report"]):
        raise UserError(f"--export writes nothing without the long trainings. {' '.join(missing)}")
    rows = {
        "suspects.csv": _suspects(evidence),
        "near_duplicates.csv": _near_duplicates(first, evidence, train_features, train, test),
        "consensus.csv": _consensus(first, evidence),
    }
    tables = {name: _as_csv(list(COLUMNS[name]), each) for name, each in rows.items()}
    return {**tables, "README.md": _readme(summary, first, evidence, rows)}


def _suspects(evidence: Evidence) -> list[tuple[Any, ...]]:
    """List the images of suspect label, the most suspect first."""
    assert evidence.issues is not None  # for mypy: contents() has made sure
    assert evidence.out_of_fold is not None
    labels, rows = np.concatenate([evidence.train_labels, evidence.labels]), []
    for rank, image in enumerate(evidence.issues.tolist(), 1):
        place = _place(image, len(evidence.train_labels))
        both = int(labels[image]), int(evidence.out_of_fold[image].argmax())
        names = [evidence.classes[each] for each in both]
        rows.append((*place, *names, *(f"{evidence.out_of_fold[image, each]:.4f}" for each in both), rank))
    return rows


def _place(image: int, n_train: int) -> tuple[str, int]:
    """Return split and index of one of all images, test images from n_train on."""
    return ("train", image) if image < n_train else ("test", image - n_train)


def _near_duplicates(
    first: Measured, evidence: Evidence, train_features: torch.Tensor, train: Split, test: Split
) -> list[tuple[Any, ...]]:
    """List each test image that is a near-duplicate, with its twin."""
    found = np.flatnonzero(evidence.duplicate)
    twins = evidence.twins[found]
    images = (test.images.cpu()[found], train.images.cpu()[twins])
    pixels = [each.flatten(1).double() / 255 for each in images]
    distances = (pixels[0] - pixels[1]).square().mean(1).sqrt()
    features = (first.features.cpu()[found].double(), train_features.cpu()[twins].double())
    cosines = 1 - F.cosine_similarity(*features)
    return [
        (i, twin, f"{pixel:.4f}", f"{max(cosine, 0):.4f}", *_names(evidence, i, twin))
        for i, twin, pixel, cosine in zip(
            found.tolist(), twins.tolist(), distances.tolist(), cosines.tolist(), strict=True
        )
    ]


def _names(evidence: Evidence, i: int, twin: int) -> tuple[str, str]:
    """Name the labels of a test image and of a training image."""
    return evidence.classes[evidence.labels[i]], evidence.classes[evidence.train_labels[twin]]


def _consensus(first: Measured, evidence: Evidence) -> list[tuple[Any, ...]]:
    """List the test images on which the checkpoint and all trainings of its kind make the same mistake."""
    agreed = composition.agreed(first, evidence)
    assert agreed is not None  # for mypy: contents() has made sure
    groups, classes = composition.group_of(first, evidence), evidence.classes
    return [
        (i, classes[evidence.labels[i]], classes[first.predicted[i]], groups[i])
        for i in np.flatnonzero(first.wrong & agreed).tolist()
    ]


def _as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode(errors="backslashreplace")


def _readme(
    summary: dict[str, Any], first: Measured, evidence: Evidence, rows: dict[str, list[tuple[Any, ...]]]
) -> bytes:  # fmt: skip
    """Render README.md; rows: of each file."""
    groups = [row[-1] for row in rows["consensus.csv"]]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    text = environment.get_template("audit.md.j2").render(
        title=TITLE,
        columns=COLUMNS,
        counts={name: len(each) for name, each in rows.items()},
        groups={name: groups.count(name) for name in ("label", "duplicate", "consensus")},
        checkpoint=one_line(summary["checkpoint"]),
        sha256=summary["checkpoint_sha256"],
        about=one_line(first.title),
        data=one_line(summary["data"]),
        is_published=summary["data"] == NAME,
        report=summary["report"],
        own=[(each["key"]["seed"], each["key"]["recipe"]["epochs"]) for each in evidence.trainings[first.kind]],
        composition=composition,
        trainings=trainings,
        cleanlab=importlib.metadata.version("cleanlab"),
    )
    return text.encode(errors="backslashreplace")
