"""Which trainings are alike but for their seed, and in what the others differ.

facts = alike.facts(flags, history)      # equal facts: the same experiment
unit = alike.unit(seed, flags)           # which of its runs: the seed, and of a run by folds the fold
names = alike.differences([facts, ...])  # "lr 0.003", or "" where all are equal
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import recipes

ORIGIN = ("data", "data_sha256", "code")  # what histories and checkpoints record beside the flags
LABELS = {"data_sha256": "images", "muon_lr": "lr", "train_images": "training images"}
DIGESTS = ("data_sha256", "code")  # of which the first digits are shown


class Unit(NamedTuple):
    """What tells a run from the others of its row. Runs of two rows with one unit are a pair."""

    seed: int
    fold: int = 0  # of several, counted from 1; 0 for a run on other images


def unit(seed: int, flags: Mapping[str, Any]) -> Unit:
    """Return which of the runs of a row this one is."""
    fold = flags.get("fold") and recipes.fold_of(flags["fold"])
    return Unit(seed, fold[0] if fold else 0)


def folds(flags: Mapping[str, Any]) -> str | None:
    """Say which training images a run holds out: one of so many folds ("5"), "val", or none, as all usual runs."""
    fold = flags.get("fold") and recipes.fold_of(flags["fold"])
    return str(fold[1]) if fold else flags.get("fold")


def overlap(units: Collection[Unit], of: str | None) -> float:
    """Return the ratio of held-out to training images where units are of several folds, else 0.

    of: of folds(). It corrects the standard error of their mean: metrics.corrected_error.
    """
    return 1 / (int(of) - 1) if of and len({each.fold for each in units}) > 1 else 0.0


def facts(flags: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a training depends on, except the seed and the fold's number: plain values.

    Of the teachers the weights count; the number of the folds is "folds", and absent without any.

    flags: of recipes.upgrade; origin: a history, or what a checkpoint says. What it does not record is None.
    """
    found = json.loads(recipes.setting(dict(flags))) | {key: origin.get(key) for key in ORIGIN}
    found.pop("fold", None)
    return found | ({"folds": of} if (of := folds(flags)) else {})


def flat(every: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return several facts with a key for each augmentation, as in train.py's --set: false where it is left out."""
    found = [each.get("augment") or {} for each in every]
    names = dict.fromkeys(name for augment in found for name in augment)
    written = [
        {name: json.dumps(augment.get(name, False), separators=(",", ":")) for name in names} for augment in found
    ]
    return [
        {name: value for name, value in each.items() if name != "augment"} | values
        for each, values in zip(every, written, strict=True)
    ]


def key(found: Mapping[str, Any]) -> str:
    """Write facts as one text, which is equal for equal facts."""
    return json.dumps(found, sort_keys=True)


def differing(every: Sequence[Mapping[str, Any]], leave_out: Collection[str] = ()) -> list[str]:
    """Return the keys in which several facts differ, except those to leave out."""
    names = dict.fromkeys(name for each in every for name in each if name not in leave_out)
    return [name for name in names if len({json.dumps(each.get(name), sort_keys=True) for each in every}) > 1]


def differences(every: Sequence[Mapping[str, Any]], leave_out: Collection[str] = ()) -> list[str]:
    """Say for each of several facts where it differs from the others, except in the keys to leave out."""
    names = differing(every, leave_out)
    return [", ".join(_words(name, each[name]) for name in names if name in each) for each in every]


def _words(name: str, value: Any) -> str:
    label = LABELS.get(name, name.replace("_", " "))
    return f"{label} not recorded" if value is None else f"{label} {text(name, value)}"


def text(name: str, value: Any) -> str:
    """Write the value of a fact in short."""
    if value is None:
        return "none"
    return "/".join(_text(name, part) for part in (value if isinstance(value, list) else [value])) or "none"


def _text(name: str, value: Any) -> str:
    if name == "teachers":
        digest, *normalisation = value
        return digest[:8] + ("" if normalisation == [0.5, 0.5] else " by mean {} and std {}".format(*normalisation))
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text[:8] if name in DIGESTS else text
