"""Checkpoints: written whole or not at all, and loaded without running anything they contain.

checkpoint.save("best.pt", model, name="cnn", epoch=3, ...)
model, info = checkpoint.load("best.pt")
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import models
import recipes
from data import CLASSES, MEAN, STD, DataError, Split
from dataset import published, sources
from recipes import FLAGS, upgrade
from runtime import adopt, device, weights
from runtime.cli import shown
from runtime.code_key import code_key
from runtime.errors import one_line
from runtime.files import write_atomically
from runtime.schema import problem
from runtime.weights import CheckpointError, from_bytes, read, to_bytes

__all__ = ["Bare", "CheckpointError", "from_bytes", "load", "read", "save", "to_bytes"]

FORMAT = "fmnist-checkpoint-1"
FIELDS: dict[str, Any] = {  # what serialise writes beside the format, and of which types
    "model": str,
    "weights": dict,
    "classes": list,
    "mean": float,
    "std": float,
    "epoch": int,
    "metrics": dict,
    "flags": dict,
    "seed": int,
    "data": str,
    "versions": dict,
    "git": str | None,
}
NEWER: dict[str, Any] = {"code": str | None, "data_sha256": str | None}  # older checkpoints and histories lack these
SUSPICIOUS = 0.1  # below the published accuracy of a model: such a checkpoint may be used in a wrong way
MOST_VALUES = 10_000  # in the field of a checkpoint
LONGEST_TEXT = 4096  # characters of each: the same text can be there again and again


class Bare(NamedTuple):
    """What a user says of a bare state_dict, which says nothing of itself. None: not said."""

    model: str | None = None
    mean: float | None = None
    std: float | None = None  # mean and std: of pixels in [0, 1], by which the network's input is normalised


def save(path: str | Path, model: nn.Module, **details: Any) -> str:
    """Write a checkpoint atomically, with the details that serialise takes. Returns the SHA-256 of the file."""
    return write_atomically(path, serialise(model, **details))


def serialise(
    model: nn.Module, *, name: str, epoch: int, metrics: dict[str, float], flags: dict[str, Any], seed: int, data: str,
    classes: Sequence[str] = CLASSES, code: str | None = None, data_sha256: str | None = None,
) -> bytes:  # fmt: skip
    """Return the bytes of a checkpoint: the same for the same run, so nothing here depends on the clock.

    metrics: figures of that epoch; flags: those that shape the training; data: the name of the data set, and
    data_sha256 its fingerprint; code: the key of the model's code.
    """
    state = model.state_dict()
    if odd := [key for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"the state of {name} holds {odd[0]}, which is no tensor: it could not be read back")
    values = [
        name,
        {key: value.detach().cpu().contiguous() for key, value in state.items()},
        *(list(classes), MEAN, STD, epoch, metrics, flags, seed, data, device.versions(), device.git_revision()),
    ]
    newer = {"code": code, "data_sha256": data_sha256}
    return to_bytes({"format": FORMAT, **dict(zip(FIELDS, values, strict=True)), **newer})


def load(
    path: str | Path, bare: Bare = Bare(), quiet: bool = False  # noqa: B008 - it is immutable
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """Load the model of a checkpoint, in evaluation mode on the CPU, and a dict of what the checkpoint says of it.

    The dict holds "sha256" too, of the bytes that were read, and the fields of serialise but the weights.
    Someone else's state_dict is accepted too: runtime/adopt.py matches it to a model, and stderr says how unless quiet.
    Its dict holds "model", "classes", "normalisation" ("mean", "std", and whether they are "assumed"), "matched" ("by
    name" or "by order") and "notes". Its model takes the usual input too, (pixel / 255 - 0.5) / 0.5, and converts it.
    `bare` is what the user says of such a file, and has no meaning for a checkpoint of ours.
    Raises CheckpointError when the file is missing, damaged, foreign, or holds more than plain weights.
    """
    path = Path(path)
    model, info = _interpret(path, weights.contents(path), bare)
    if is_bare(info) and not quiet:
        said = f"{path} is a bare state_dict, matched to {info['model']} {info['matched']}: {'; '.join(info['notes'])}"
        print(one_line(f"checkpoint: {said}; normalised by {normalisation(info)}"), file=sys.stderr)
    return model, info


def load_all(paths: Sequence[Path], bare: Bare) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Load checkpoints, as load does; what the user says of a bare state_dict must be of use to one of them."""
    loaded = [load(path, bare) for path in paths]
    if bare != Bare() and not any(is_bare(info) for _, info in loaded):  # an explicit request is never ignored
        given = ", ".join(f"--{name}" for name, value in zip(Bare._fields, bare, strict=True) if value is not None)
        names = [f"{shown(path)} ({info['model']})" for path, (_, info) in zip(paths, loaded, strict=True)]
        own = f", unlike {', '.join(names)}, which says itself what it is" if names else ""
        raise CheckpointError(f"{given}: only for a bare state_dict{own}: leave the flags out")
    return loaded


def from_content(path: Path, content: bytes) -> tuple[nn.Module, dict[str, Any]]:
    """Load a checkpoint from its bytes, as load does from its file; errors name the path."""
    return _interpret(path, content, Bare())


def is_bare(info: dict[str, Any]) -> bool:
    """Say whether a dict of load is of someone else's state_dict, whose training is not known."""
    return "normalisation" in info


def _interpret(path: Path, file: bytes, bare: Bare) -> tuple[nn.Module, dict[str, Any]]:
    content, digest = weights.parse(path, file), {"sha256": hashlib.sha256(file).hexdigest()}
    kind = content.get("format") if isinstance(content, dict) else None
    if isinstance(kind, str) and kind.startswith("fmnist-checkpoint-") and kind.isprintable():
        network = _check(path, content)
        return network, digest | {key: content.get(key) for key in [*FIELDS, *NEWER] if key != "weights"}
    if isinstance(kind, str) and kind.startswith("fmnist-unfinished-"):
        best = path.name.replace("unfinished_", "best_")
        raise CheckpointError(f"{path}: an unfinished run, for train.py --resume; its best epoch so far is in {best}")
    network, info = _adopt(path, content, bare)
    return network, digest | info


def check_classes(path: str | Path, info: dict[str, Any], split: Split) -> None:
    """Raise CheckpointError where a checkpoint and a split have other class names. A bare state_dict has none."""
    if "flags" in info and list(info["classes"]) != list(split.classes):
        theirs, ours = (", ".join(names) for names in (info["classes"], split.classes))
        raise CheckpointError(f"{path}: trained for the classes {theirs}; those of {split.source} are {ours}")


def caution(info: dict[str, Any], split: Split) -> tuple[str, str] | None:
    """Say what keeps a split from being new to a checkpoint, as (kind, sentence), or None.

    Kinds: "unknown", "other data", "trained" (on these images), "teacher" (chosen on them), "chosen" (on them).
    """
    if "flags" not in info:
        return "unknown", "how it was trained is not known, nor whether these images played a part"
    if (trained_on := published.named(info["data"], info.get("data_sha256"))) != split.source:
        return "other data", f"trained on {trained_on}, measured on {split.source}"
    flags = upgrade(info["flags"])
    if flags["fold"]:
        return _fold_caution(flags, split)
    if split.name == "train" or (split.name == "val" and flags["select"] in ("test", "last")):
        return "trained", "trained on these very images"
    if any(teacher["select"] == split.name for teacher in flags["teachers"]):
        return "teacher", "a teacher's best epoch was chosen on these very images, which flatters it"
    if split.name == flags["select"]:
        return "chosen", "its best epoch was chosen on these very images, which flatters it"
    return None


def _fold_caution(flags: dict[str, Any], split: Split) -> tuple[str, str] | None:
    """Say what keeps a split from being new to a checkpoint of a fold run, which never saw the test set."""
    if split.name == "train" or (split.name == "val" and flags["fold"] != "val"):
        return "trained", f"trained on a part of these images: fold {flags['fold']}"
    if split.name == "val" and flags["select"] == "test":
        return "chosen", "its best epoch was chosen on these very images, which flatters it"
    return None


def changed(info: dict[str, Any]) -> str | None:
    """Say whether a model's code is another than that which a checkpoint was trained with, or None."""
    name = info["model"]
    if not info.get("code") or code_key(name) in (None, info["code"]):
        return None
    return f"the code of {name} in models.py has changed since it was trained: its answers may be others"


def suspicion(info: dict[str, Any], split: Split, accuracy: float) -> str | None:
    """Say what may be wrong where someone else's weights are far less accurate on a split than their kind, or None."""
    usual = recipes.PUBLISHED.get(info["model"], min(recipes.PUBLISHED.values()))
    if not is_bare(info) or tuple(split.classes) != CLASSES or accuracy >= usual - SUSPICIOUS:
        return None
    return (
        f"accuracy is far below the {usual:.0%} of its kind: it may have been trained with another normalisation than "
        f"{normalisation(info)}; --mean 0 --std 1 is for pixels / 255, --mean 0.2860 --std 0.3530 for the mean and the "
        "standard deviation of the training images"
    )


def normalisation(info: dict[str, Any]) -> str:
    """Say by what the input of someone else's network is normalised."""
    values = info["normalisation"]
    return f"mean {values['mean']:g} and std {values['std']:g} ({'assumed' if values['assumed'] else 'as given'})"


def _check(path: Path, content: dict[str, Any]) -> nn.Module:
    """Return the model of a checkpoint of ours, once every field has been checked."""
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in {content['format'][:40]}, this version reads {FORMAT}")
    if missing := [key for key in FIELDS if key not in content]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
    for key, kind in (FIELDS | NEWER).items():
        if not isinstance(content.get(key), kind) or (key != "weights" and not _is_plain(content.get(key))):
            raise CheckpointError(f"{path}: its {key} is not what a checkpoint holds there")
    name = content["model"]
    if name not in models.MODELS:
        raise CheckpointError(f"{path}: holds a {name[:40]!r}; the models here are {', '.join(models.MODELS)}")
    if [content["mean"], content["std"]] != [MEAN, STD]:
        raise CheckpointError(f"{path}: trained with another normalisation")
    if not (_are_flags(content["flags"]) and _are_flags(upgrade(content["flags"]))):
        raise CheckpointError(f"{path}: its flags are not what a checkpoint holds there")
    try:
        if list(sources.check_classes(content["classes"])) != content["classes"]:
            raise DataError("its classes are not names")
    except DataError as error:
        raise CheckpointError(f"{path}: {error}") from None
    network = adopt.build(name)
    if odd := _others(content["weights"], adopt.layout(network.state_dict())):
        which = f"{odd[0]!r:.80}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
        git = f"; it was written at git revision {content['git'][:40]}" if content["git"] else ""
        raise CheckpointError(
            f"{path}: its weights do not have the names, shapes and dtypes of {name} in models.py: {which}{git}"
        )
    return adopt.fill(path, network, content["weights"])


def _others(state: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """List the names whose tensors are missing, too many, or not of the layout that is expected."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    found = adopt.layout(tensors)
    return [key for key in {**expected, **state} if found.get(key) is None or found[key] != expected.get(key)]


def _are_flags(flags: dict[str, Any]) -> bool:
    """Say whether those flags that are known here have values that they may have."""
    return not any(problem(value, FLAGS[key]) for key, value in flags.items() if key in FLAGS)


def _is_plain(value: Any) -> bool:
    """Say whether a value, or everything in a list or dict, can be printed in a line, and written as JSON."""
    todo, count = [(value, 3)], 0
    while todo and count < MOST_VALUES:
        each, depth = todo.pop()
        count += 1
        if isinstance(each, list | dict) and depth:
            if isinstance(each, dict) and not all(isinstance(key, str) for key in each):
                return False
            parts = [*each, *each.values()] if isinstance(each, dict) else each
            todo += [(part, depth - 1) for part in parts]
        elif isinstance(each, str):
            if len(each) > LONGEST_TEXT or not each.isprintable():
                return False
        elif isinstance(each, float):
            if not math.isfinite(each):
                return False
        elif each is not None and not (isinstance(each, int) and abs(each) < 2**63):
            return False
    return not todo


def _adopt(path: Path, content: Any, bare: Bare) -> tuple[nn.Module, dict[str, Any]]:
    """Match someone else's state_dict to a model, and let the model convert the usual input to its own."""
    if (bare.mean is None) != (bare.std is None):
        raise CheckpointError("--mean and --std go together: (pixel / 255 - mean) / std")
    found = adopt.adopt(path, content, bare.model)
    assumed = bare.mean is None or bare.std is None
    mean, std = (MEAN, STD) if bare.mean is None or bare.std is None else (bare.mean, bare.std)
    info = {
        "model": found.model,
        "classes": list(CLASSES),
        "normalisation": {"mean": mean, "std": std, "assumed": assumed},
        "matched": found.matched,
        "notes": found.notes,
    }
    if (mean, std) != (MEAN, STD):
        found.network.register_forward_pre_hook(partial(_renormalise, STD / std, (MEAN - mean) / std))
    return found.network, info


def _renormalise(scale: float, shift: float, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Convert images that were normalised as usual to the normalisation of someone else's network."""
    return (inputs[0] * scale + shift,)
