"""Which trainings are alike but for their seed, and in what the others differ.

facts = alike.facts(flags, history)      # equal facts: the same experiment
names = alike.differences([facts, ...])  # "lr 0.003", or "" where all are equal
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import recipes

ORIGIN = ("data", "data_sha256", "code")  # what histories and checkpoints record beside the flags
LABELS = {"data_sha256": "images", "muon_lr": "lr", "train_images": "training images"}
DIGESTS = ("data_sha256", "code")  # of which the first digits are shown


def facts(flags: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a training depends on, except the seed: plain values. Of the teachers the weights count.

    flags: of recipes.upgrade; origin: a history, or what a checkpoint says. What it does not record is None.
    """
    return json.loads(recipes.setting(dict(flags))) | {key: origin.get(key) for key in ORIGIN}


def key(found: Mapping[str, Any]) -> str:
    """Write facts as one text, which is equal for equal facts."""
    return json.dumps(found, sort_keys=True)


def differences(every: Sequence[Mapping[str, Any]], leave_out: Collection[str] = ()) -> list[str]:
    """Say for each of several facts where it differs from the others, except in the keys to leave out."""
    names = list(dict.fromkeys(name for each in every for name in each if name not in leave_out))
    differing = [name for name in names if len({json.dumps(each.get(name), sort_keys=True) for each in every}) > 1]
    return [", ".join(_words(name, each.get(name)) for name in differing) for each in every]


def _words(name: str, value: Any) -> str:
    label = LABELS.get(name, name.replace("_", " "))
    if value is None:
        return f"{label} not recorded"
    texts = [_text(name, part) for part in (value if isinstance(value, list) else [value])]
    return f"{label} {'/'.join(texts) or 'none'}"


def _text(name: str, value: Any) -> str:
    if name == "teachers":
        digest, *normalisation = value
        return digest[:8] + ("" if normalisation == [0.5, 0.5] else " by mean {} and std {}".format(*normalisation))
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text[:8] if name in DIGESTS else text
