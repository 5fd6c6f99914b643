"""Checkpoints: written whole or not at all, and loaded without running anything they contain.

checkpoint.save("best.pt", model, name="cnn", epoch=3, ...)
model, info = checkpoint.load("best.pt")
"""

import io
import pickletools
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

import models
from data import CLASSES, MEAN, STD, DataError, Split
from recipes import FLAGS, upgrade
from runtime import device, sources
from runtime.errors import UserError
from runtime.files import write_atomically

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
MAX_BYTES = 2**28  # of a file; those of these models have a hundredth
MAX_PICKLE = 2**17  # bytes of the part that is no tensor
ALLOWED = re.compile(  # what the pickle of a state_dict names
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys others keep a state_dict under


class CheckpointError(UserError):
    """A file that is no usable checkpoint."""


def save(path: str | Path, model: nn.Module, **details: Any) -> str:
    """Write a checkpoint atomically, with the details that serialise takes. Returns the SHA-256 of the file."""
    return write_atomically(path, serialise(model, **details))


def serialise(
    model: nn.Module, *, name: str, epoch: int, metrics: dict[str, float], flags: dict[str, Any], seed: int, data: str,
    classes: tuple[str, ...] = CLASSES,
) -> bytes:  # fmt: skip
    """Return the bytes of a checkpoint: the same for the same run, so nothing here depends on the clock.

    metrics: figures of that epoch; flags: those that shape the training; data: the name of the data set.
    """
    values = [
        name,
        {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()},
        *(list(classes), MEAN, STD, epoch, metrics, flags, seed, data, device.versions(), device.git_revision()),
    ]
    return to_bytes({"format": FORMAT, **dict(zip(FIELDS, values, strict=True))})


def to_bytes(content: Any) -> bytes:
    """Return what torch.save writes: a zip archive that holds a CRC-32 of each of its parts."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the model of a checkpoint, in evaluation mode on the CPU, and a dict of what the checkpoint says of it.

    A bare state_dict of a known architecture is accepted too. Its tensors are matched by name, or else by order and
    shape; stderr says so. Its dict holds "model" and "classes" alone.
    Raises CheckpointError when the file is missing, damaged, foreign, or holds more than plain weights.
    """
    path = Path(path)
    content = read(path)
    kind = content.get("format") if isinstance(content, dict) else None
    if isinstance(kind, str) and kind.startswith("fmnist-checkpoint-") and kind.isprintable():
        name, weights = _check(path, content)
        info = {key: content[key] for key in FIELDS if key != "weights"}
    else:
        name, weights = _adopt(path, content)
        info = {"model": name, "classes": list(CLASSES)}
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise CheckpointError(f"{path}: holds weights that are not finite numbers")
    model = models.build(name)
    model.load_state_dict(weights)
    return model.eval(), info


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
    if info["data"] != split.source:
        return "other data", f"trained on {info['data']}, measured on {split.source}"
    flags = upgrade(info["flags"])
    if split.name == "train" or (split.name == "val" and flags["select"] in ("test", "last")):
        return "trained", "trained on these very images"
    if any(teacher["select"] == split.name for teacher in flags["teachers"]):
        return "teacher", "a teacher's best epoch was chosen on these very images, which flatters it"
    if split.name == flags["select"]:
        return "chosen", "its best epoch was chosen on these very images, which flatters it"
    return None


def read(path: str | Path) -> Any:
    """Read a file of torch.save, checked for damage, with nothing in it executed.

    Raises CheckpointError when the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; `python train.py --model cnn` writes checkpoints")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than any checkpoint of these models")
    content = path.read_bytes()
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):  # what torch.save writes; torch.load does not check the sums
            pickles = _checked_pickles(path, content)
        else:  # what it wrote before version 1.6: five pickles, the fourth of which is the content
            pickles = [io.BytesIO(content[: 5 * MAX_PICKLE])] * 5
        for stream in pickles:
            _check_pickle(path, stream)
        return from_bytes(content)
    except CheckpointError:
        raise
    except Exception:  # a hostile file can make the unpickler raise anything
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch checkpoint") from None


def from_bytes(content: bytes) -> Any:
    """Return what to_bytes was given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _checked_pickles(path: Path, content: bytes) -> list[IO[bytes]]:
    """Check a zip archive for damage, and return streams of the pickles in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{path}: a zip archive, but not one of torch.save")
        if sum(member.file_size for member in members) > len(content):  # parts that overlap, to keep readers busy
            raise CheckpointError(f"{path}: damaged: its parts are longer than the file")
        if damaged := archive.testzip():
            raise CheckpointError(f"{path}: damaged: the checksum of {damaged!r} inside it is wrong")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if any(member.file_size > MAX_PICKLE for member in pickles):
            raise CheckpointError(f"{path}: holds more than weights: refused")
        return [io.BytesIO(archive.read(member)) for member in pickles]


def _check_pickle(path: Path, stream: IO[bytes]) -> None:
    """Refuse what a state_dict does not need. torch.load runs no code, but knows functions that fill the memory."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and not ALLOWED.fullmatch(str(argument))):
            raise CheckpointError(f"{path}: holds Python objects, not only weights: refused, nothing was run")


def _check(path: Path, content: dict[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """Return model name and weights of a checkpoint of ours, once every field has been checked."""
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in {content['format'][:40]}, this version reads {FORMAT}")
    if missing := [key for key in FIELDS if key not in content]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
    for key, kind in FIELDS.items():
        if not isinstance(content[key], kind) or (key != "weights" and not _is_plain(content[key])):
            raise CheckpointError(f"{path}: its {key} is not what a checkpoint holds there")
    name = content["model"]
    if name not in models.MODELS:
        raise CheckpointError(f"{path}: holds a {name[:40]!r}; the models here are {', '.join(models.MODELS)}")
    if [content["mean"], content["std"]] != [MEAN, STD]:
        raise CheckpointError(f"{path}: trained with another normalisation")
    if any(not fits(value, FLAGS[key]) for key, value in content["flags"].items() if key in FLAGS):
        raise CheckpointError(f"{path}: its flags are not what a checkpoint holds there")
    try:
        if list(sources.check_classes(content["classes"])) != content["classes"]:
            raise DataError("its classes are not names")
    except DataError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not _is_state_dict(content["weights"]) or _shapes(content["weights"]) != _shapes(_empty(name)):
        raise CheckpointError(f"{path}: its weights do not have the shapes of {name}")
    return name, content["weights"]


def fits(value: Any, kind: Any) -> bool:
    """Say whether a value is of a type, or a dict (a list) whose values (parts) are, with just these keys."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and value.keys() == kind.keys() and all(fits(value[k], kind[k]) for k in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(part, kind[0]) for part in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) or (whole and isinstance(0.0, kind))  # 1 is as good as 1.0


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Say whether a value, or everything in a list or dict, can be printed in a line."""
    if isinstance(value, list | dict):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return value.isprintable()
    return value is None or (isinstance(value, bool | int | float) and (abs(value) < 2**63 or value != value))


def _adopt(path: Path, content: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Match someone else's state_dict to a model: return the model's name and the renamed weights."""
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not _is_state_dict(content):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a model's state_dict")
    for name in models.MODELS:
        own = _empty(name)
        if _shapes(content) == _shapes(own):
            how, weights = "by name", content
        elif list(_shapes(content).values()) == list(_shapes(own).values()):
            pairs = ", ".join(f"{theirs} as {ours}" for theirs, ours in zip(content, own, strict=True))
            how, weights = f"by order and shape ({pairs})", dict(zip(own, content.values(), strict=True))
        else:
            continue
        print(
            f"checkpoint: {path} is a bare state_dict, matched to {name} {how}; "
            f"mean {MEAN} and std {STD} are assumed for its normalisation",
            file=sys.stderr,
        )
        return name, weights
    shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in list(_shapes(content).values())[:12])
    raise CheckpointError(f"{path}: its tensors ({shapes or 'none'}) are not those of {' or '.join(models.MODELS)}")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(key, str)
        and key.isprintable()
        and isinstance(value, torch.Tensor)
        and (value.is_floating_point() or (value.dtype == torch.int64 and not value.dim()))  # batch norm's counter
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for key, value in content.items()
    )


def _empty(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return models.build(name).state_dict()


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in weights.items()}
