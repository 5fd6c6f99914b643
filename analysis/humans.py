"""Compare models with people who voted on what the test images show.

votes = humans.read_votes(Path("fmh_counts.csv"), test.labels.numpy())
print(humans.sides(votes, answers, labels, answers != labels))      # whom people side with where a model is wrong
print(humans.accuracies(votes, answers, labels), humans.cross_entropies(votes, logits))

The file has a row for each test image, in the data set's order, and ten columns with the counts of votes for the ten
classes: fmh_counts.csv of Fashion-MNIST-H (Ishida et al. 2023, arXiv:2202.00395; github.com/takashiishida/irreducible,
GPL-3.0). It is not part of this repository.
"""

import csv
import hashlib
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import metrics
from metrics import share
from runtime import cli, tables
from runtime.errors import UserError
from runtime.files import read_bytes
from runtime.schema import Number, Text

LARGEST = 2**24  # bytes of a file of votes
MOST = 9_999  # votes for a class of an image
PUBLISHED = "bec7efff5d6f901a6224758d71caadb436dbd8de1284b0be7089d193be94ddbc"  # SHA-256 of fmh_counts.csv
BLOCK = 100  # images in which people must agree with the labels
LEAST_AGREEMENT = 0.5  # of the images of a block: in the data set's order it is 0.72 or more, in another one about 0.1
FEWEST = 9  # images, or fewer, have no rank correlation
AGREEMENTS = (0.6, 0.8, 0.95)  # shares of the people who agree
SIDES = ("model", "label", "other", "tied")  # whose class people choose; tied: several classes have the most votes


@dataclass(frozen=True)
class Votes:
    """The votes on n images."""

    counts: np.ndarray  # int64 (n, 10)
    sha256: str = ""  # of their file

    @cached_property
    def shares(self) -> np.ndarray:
        """The share of each class in an image's votes: float64 (n, 10)."""
        return np.asarray(self.counts / self.counts.sum(1, keepdims=True))

    @cached_property
    def choice(self) -> np.ndarray:
        """The class with the most votes, int64 (n,); -1 where several have as many."""
        most = self.counts == self.counts.max(1, keepdims=True)
        return np.where(most.sum(1) == 1, most.argmax(1), -1)

    @cached_property
    def entropy(self) -> np.ndarray:
        """The entropy of an image's votes in bits: float64 (n,)."""
        return metrics.entropy(self.shares, 1)


# --- what compare returns, as kinds of runtime/schema.py --------------------------------------------------

PART = (Number(0, 1), None)
INTERVAL = ([Number(-1, 1)] * 2, None)
COUNTED: dict[str, Any] = {"count": Number(0), "n": Number(0), "share": PART, "ci95": INTERVAL}
SIDED: dict[str, Any] = {"n": Number(0), **dict.fromkeys(SIDES, COUNTED), "expected": {"model": PART, "label": PART}}
RELATED: dict[str, Any] = {
    "n": Number(0),
    "spearman": (Number(-1, 1), None),
    "ci95": INTERVAL,
    "tenths": [{"value": Number(0), "entropy": Number(0)}],
}
ENTROPIES = {"cross_entropy": Number(), "votes_temperature": Number(0), "cross_entropy_scaled": Number()}
PEOPLE: dict[Any, Any] = {
    "n": Number(1),
    "sha256": Text(64),
    "trainings_sha256": Text(64),
    "votes": Number(1),
    "entropy": Number(0),
    "tied": Number(0),
    "label_chosen": COUNTED,
    "by_class": {str: COUNTED},
    "checkpoints": [
        {
            "name": str,
            "mistakes": SIDED,
            "groups": {str: SIDED},
            "classes": {str: SIDED},
            "often_chosen": {"yes": SIDED, "no": SIDED},
            **dict.fromkeys(("label_accuracy", "people_accuracy"), COUNTED),
            "agreeing": [{"at_least": PART, "label": COUNTED, "people": COUNTED}],
            **ENTROPIES,
            "confidence": RELATED,
        }
    ],
    "trainings": [
        {
            "name": str,
            "n": Number(1),
            "label_ahead": Number(0),
            str: {"mean": (Number(), None), "ci95": ([Number()] * 2, None), "n": Number(0)},
        }
    ],
    "suspects": ({"outvoted": COUNTED, "others_outvoted": COUNTED, "expected": PART}, None),
    "ambiguity": (
        {
            "trainings": Number(1),
            **RELATED,
            "where_they_differ": {"n": Number(0), **dict.fromkeys(("ambiguity", "confidence"), (Number(-1, 1), None))},
        },
        None,
    ),
}


# --- reading ---------------------------------------------------------------------------------------------


def read_votes(path: Path, labels: np.ndarray) -> Votes:
    """Read the votes on images with these labels, int (n,). Raises UserError for the first fault.

    A line on stderr says so where they are not those that were published.
    """
    content = read_bytes(path, LARGEST)
    text = io.StringIO(tables.decode(cli.shown(path), content), newline="")
    try:
        rows = [row for row in csv.reader(text, strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{cli.shown(path)}: no CSV file of votes: {error}") from None
    if len(rows) != len(labels):
        raise UserError(
            f"{cli.shown(path)}: it has {len(rows):,} rows, not one for each of {len(labels):,} test images"
        )
    counts = np.array([_counts(path, line, row) for line, row in enumerate(rows, 1)])
    if wrong := _odd_sum(counts.sum(1)) or _wrong_order(counts, labels):
        raise UserError(f"{cli.shown(path)}: {wrong}")
    if (sha256 := hashlib.sha256(content).hexdigest()) != PUBLISHED:
        print(f"{cli.shown(path)} is not the published fmh_counts.csv: its SHA-256 is {sha256}", file=sys.stderr)
    return Votes(counts, sha256)


def _counts(path: Path, line: int, row: Sequence[str]) -> list[int]:
    """Read a row. Raises UserError."""
    if len(row) != 10:
        raise UserError(f"{cli.shown(path)}, row {line}: it has {len(row)} columns, not ten counts of votes")
    for value in row:
        if not (value.strip().isascii() and value.strip().isdigit() and len(value) < 9 and int(value) <= MOST):
            raise UserError(
                f"{cli.shown(path)}, row {line}: {value[:40]!r} is no count of votes; a header is not expected"
            )
    return [int(value) for value in row]


def _odd_sum(sums: np.ndarray) -> str:
    """Say which row has far fewer or far more votes than most, or return ""."""
    usual = int(np.median(sums))
    odd = np.flatnonzero((sums < usual / 2) | (sums > 2 * usual) | (sums == 0))
    return f"row {odd[0] + 1} has {sums[odd[0]]:,} votes, where others have about {usual:,}" if len(odd) else ""


def _wrong_order(counts: np.ndarray, labels: np.ndarray) -> str:
    """Say that the rows or columns are not in the data set's order, or return ""."""
    agreed = counts.argmax(1) == labels
    for start in range(0, max(1, len(labels) - BLOCK + 1), BLOCK // 2):
        block = agreed[start : start + BLOCK]
        if block.mean() < LEAST_AGREEMENT:
            return (
                f"from row {start + 1} on, the label has the most votes on {block.mean():.0%} of {len(block)} images "
                "only: the rows or columns are not in the order of the test images and classes, or are of other images"
            )
    present = [k for k in range(10) if (labels == k).any()]
    means = np.array([counts[labels == k].mean(0) for k in present])[:, present]
    for place, k in enumerate(present):
        if means[:, place].argmax() != place:
            return f"column {k + 1} has the most votes on images of another class: the columns are in another order"
    return ""


# --- comparing -------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A checkpoint that is compared with people."""

    name: str
    probabilities: np.ndarray  # float64 (n, 10)
    groups: np.ndarray  # str (n,), of each mistake, "" where the checkpoint is right


class Trainings(NamedTuple):
    """Trainings that differ in their seed alone."""

    name: str
    answers: np.ndarray  # int (trainings, n)
    entropies: list[dict[str, float]]  # of cross_entropies, of those trainings that were measured with votes


class Labelled(NamedTuple):
    """What the data set says of n images."""

    labels: np.ndarray  # int (n,)
    classes: Sequence[str]
    suspect: np.ndarray | None  # bool (n,), whether the label is suspect, if that is known


def compare(
    votes: Votes, images: Labelled, subjects: Sequence[Subject], trainings: Sequence[Trainings], bits: np.ndarray | None
) -> dict[str, Any]:
    """Compare checkpoints and trainings with people. Returns plain numbers and lists.

    bits: the entropy of the answers of all trainings, float (n,), if there are any.
    """
    labels, chosen = images.labels, votes.choice == images.labels
    return {
        "n": len(labels),
        "sha256": votes.sha256,
        "trainings_sha256": digest(each.answers for each in trainings),
        "votes": int(votes.counts.sum()),
        "entropy": float(votes.entropy.mean()),
        "label_chosen": share(chosen.sum(), len(labels)),
        "tied": int((votes.choice < 0).sum()),
        "by_class": {
            name: share(chosen[labels == k].sum(), (labels == k).sum()) for k, name in enumerate(images.classes)
        },
        "checkpoints": [_of_subject(each, images, votes) for each in subjects],
        "trainings": [_of_trainings(each, labels, votes) for each in trainings],
        "suspects": None if images.suspect is None else _outvoted(images.suspect, labels, votes),
        "ambiguity": None if bits is None else _ambiguity(votes, bits, subjects[0], trainings),
    }


def _ambiguity(votes: Votes, bits: np.ndarray, first: Subject, trainings: Sequence[Trainings]) -> dict[str, Any]:
    """Relate the votes to the disagreement of trainings; where these disagree, to a model's confidence too."""
    differ, others = bits > 0, {"ambiguity": bits, "confidence": first.probabilities.max(1)}
    found = {name: _spearman(votes.entropy[differ], each[differ]) for name, each in others.items()}
    return {
        "trainings": sum(len(each.answers) for each in trainings),
        **_against(votes.entropy, bits),
        "where_they_differ": {"n": int(differ.sum()), **found},
    }


def digest(answers: Iterable[np.ndarray]) -> str:
    """Name the answers of trainings, int (trainings, n) of each kind, by a SHA-256."""
    return hashlib.sha256(b"".join(each.astype(np.uint8).tobytes() for each in answers)).hexdigest()


def sides(votes: Votes, answers: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Count whose class people choose on some mistakes, and how many would do so by chance.

    answers, labels: int (n,); chosen: bool (n,), which images count. Chance is how often people make that choice on all
    images of the same label. Returns n, a share for each of SIDES, and "expected" with those of model and label.
    """
    side = _side(votes.choice, answers, labels)[chosen]
    choices = np.array([np.bincount(votes.choice[labels == k] + 1, minlength=11) for k in range(10)])
    chances = choices[:, 1:] / np.maximum(choices.sum(1, keepdims=True), 1)
    ours = labels[chosen]
    expected = {"model": chances[ours, answers[chosen]], "label": chances[ours, ours]}
    return {
        "n": int(chosen.sum()),
        **{name: share((side == name).sum(), len(side)) for name in SIDES},
        "expected": {name: float(each.mean()) if len(each) else None for name, each in expected.items()},
    }


def _side(choice: np.ndarray, answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Name whose class people choose on each image: str (n,), "label" where the answer is right too."""
    return np.select([choice < 0, choice == labels, choice == answers], ["tied", "label", "model"], "other")


def _of_subject(each: Subject, images: Labelled, votes: Votes) -> dict[str, Any]:
    labels, answers = images.labels, each.probabilities.argmax(1)
    wrong, confidence = answers != labels, each.probabilities.max(1)
    names = sorted({*each.groups} - {""})
    return {
        "name": each.name,
        "mistakes": sides(votes, answers, labels, wrong),
        "groups": {name: sides(votes, answers, labels, each.groups == name) for name in names},
        "classes": {
            name: sides(votes, answers, labels, wrong & (labels == k)) for k, name in enumerate(images.classes)
        },
        "often_chosen": _by_choice(votes, answers, labels, wrong),
        **accuracies(votes, answers, labels),
        **cross_entropies(votes, torch.from_numpy(np.log(np.maximum(each.probabilities, 1e-300)))),
        "confidence": _against(votes.entropy, confidence),
    }


def _by_choice(votes: Votes, answers: np.ndarray, labels: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Divide the mistakes by whether people choose the label on at least half of the images with that label."""
    chosen = votes.choice == labels
    often = np.array([chosen[labels == k].mean() >= 0.5 if (labels == k).any() else False for k in range(10)])[labels]
    return {
        "yes": sides(votes, answers, labels, wrong & often),
        "no": sides(votes, answers, labels, wrong & ~often),
    }


def accuracies(votes: Votes, answers: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Measure answers, int (n,), against the labels and people's choices, also where many people agree."""
    right, as_people, agreement = answers == labels, answers == votes.choice, votes.shares.max(1)
    return {
        "label_accuracy": share(right.sum(), len(right)),
        "people_accuracy": share(as_people.sum(), len(right)),
        "agreeing": [
            {
                "at_least": least,
                "label": share(right[agreement >= least].sum(), (agreement >= least).sum()),
                "people": share(as_people[agreement >= least].sum(), (agreement >= least).sum()),
            }
            for least in AGREEMENTS
        ],
    }


def cross_entropies(votes: Votes, logits: torch.Tensor) -> dict[str, float]:
    """Measure the mean cross-entropy from the votes to a model's probabilities, in nats; logits: float (n, 10).

    As in Peterson et al. 2019, arXiv:1908.07086. It depends on the confidence most. So "scaled" is that of the logits
    divided by the temperature, fitted to these votes, that makes it least.
    """
    shares, logits = torch.from_numpy(votes.shares), logits.double()
    temperature = metrics.temperature(logits, shares)
    return {
        "cross_entropy": F.cross_entropy(logits, shares).item(),
        "votes_temperature": temperature,
        "cross_entropy_scaled": F.cross_entropy(logits / temperature, shares).item(),
    }


def _of_trainings(own: Trainings, labels: np.ndarray, votes: Votes) -> dict[str, Any]:
    rows = [_in_brief(votes, answers, labels) for answers in own.answers]
    figures = {name: [value for row in rows if (value := row[name]) is not None] for name in rows[0]}
    for name in own.entropies[0] if own.entropies else ():
        figures[name] = [each[name] for each in own.entropies]
    ahead = sum((row["mistakes_label"] or 0) > (row["mistakes_model"] or 0) for row in rows)
    means = {name: _mean(values) for name, values in figures.items()}
    return {"name": own.name, "n": len(rows), "label_ahead": ahead} | means


def _in_brief(votes: Votes, answers: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Compute the figures of one training of which a mean is worth knowing."""
    found, own = accuracies(votes, answers, labels), sides(votes, answers, labels, answers != labels)
    shares = {name: found[name] for name in ("label_accuracy", "people_accuracy")}
    shares |= {f"agreeing_{each['at_least']:.0%}": each["label"] for each in found["agreeing"]}
    shares |= {f"mistakes_{name}": own[name] for name in ("model", "label")}
    return {name: each["share"] for name, each in shares.items()}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """Describe values by their mean, its 95% interval and n."""
    interval = metrics.mean_interval(values) if len(values) > 1 else None
    return {"mean": float(np.mean(values)) if len(values) else None, "ci95": interval, "n": len(values)}


def _outvoted(suspect: np.ndarray, labels: np.ndarray, votes: Votes) -> dict[str, Any]:
    """Count how often people outvote suspect labels, the others, and what the suspects' classes let expect."""
    against = (votes.choice >= 0) & (votes.choice != labels)
    by_class = np.array([against[labels == k].mean() if (labels == k).any() else 0.0 for k in range(10)])
    return {
        "outvoted": share(against[suspect].sum(), suspect.sum()),
        "others_outvoted": share(against[~suspect].sum(), (~suspect).sum()),
        "expected": float(by_class[labels[suspect]].mean()) if suspect.any() else None,
    }


def _against(entropy: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Relate the entropy of the votes to other values, float (n,): Spearman's rank correlation, and means of tenths.

    The tenths are of the images in the order of the values.
    """
    _, place = np.unique(values, return_inverse=True)
    entropy_of_ties = (np.bincount(place, entropy) / np.bincount(place))[place]  # equal values have no order
    rho, n = _spearman(entropy, values), len(values)
    tenths = np.array_split(np.argsort(values, kind="stable"), 10)
    return {
        "n": n,
        "spearman": rho,
        "ci95": None if rho is None else _interval(rho, n),
        "tenths": [
            {"value": float(values[part].mean()), "entropy": float(entropy_of_ties[part].mean())} for part in tenths
        ],
    }


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Compute Spearman's rank correlation; None where one of the two has only one value, or of few images."""
    from scipy.stats import spearmanr  # takes a second to import

    defined = len(a) > FEWEST and len(np.unique(a)) > 1 and len(np.unique(b)) > 1
    return float(spearmanr(a, b).statistic) if defined else None


def _interval(rho: float, n: int) -> list[float]:
    """Compute the 95% interval of a rank correlation: Bonett and Wright 2000, doi:10.1007/BF02294183."""
    centre = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    half = metrics.Z95 * ((1 + rho**2 / 2) / (n - 3)) ** 0.5
    return np.tanh([centre - half, centre + half]).tolist()
