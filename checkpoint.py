"""Checkpoints: written whole or not at all, and loaded without running anything they contain.

checkpoint.save("best.pt", model, epoch=3, ...)
model, info = checkpoint.load("best.pt")
"""

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import pickletools
import platform
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import torch

import models
from data import CLASSES, MEAN, STD, UserError

FORMAT = "fmnist-checkpoint-1"
FIELDS = {
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
MAX_PICKLE = 2**17  # of the part that is no tensor
ALLOWED = re.compile(  # what the pickle of a state_dict names
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys others keep a state_dict under


class CheckpointError(UserError):
    """A file that is no usable checkpoint."""


def save(path, model, **details):
    """Write a checkpoint atomically, of the details that serialise takes. Returns the SHA-256 of the file."""
    return write_atomically(path, serialise(model, **details))


def serialise(model, *, name, epoch, metrics, flags, seed, data):
    """The bytes of a checkpoint: the same for the same run, so nothing here depends on the clock.

    metrics: dict of floats of that epoch; flags: dict of the flags that shape the training; data: the name of
    the data set.
    """
    content = {
        "format": FORMAT,
        "model": name,
        "weights": {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()},
        "classes": list(CLASSES),
        "mean": MEAN,
        "std": STD,
        "epoch": epoch,
        "metrics": metrics,
        "flags": flags,
        "seed": seed,
        "data": data,
        "versions": versions(),
        "git": git_revision(),
    }
    return to_bytes(content)


def to_bytes(content):
    """What torch.save writes: a zip archive that holds a CRC-32 of each of its parts."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load(path):
    """The model of a checkpoint, in evaluation mode on the CPU, and a dict of what the checkpoint says of it.

    A bare state_dict of a known architecture is taken too, its tensors matched by name or else by order and
    shape, and that is told on stderr; its dict then holds only "model".
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
        info = {"model": name}
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise CheckpointError(f"{path}: holds weights that are not finite numbers")
    model = models.build(name)
    model.load_state_dict(weights)
    return model.eval(), info


def write_atomically(path, content):
    """Write bytes so that after a crash at any moment the path holds the old file or the new one, whole.

    Returns the SHA-256 of the content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return hashlib.sha256(content).hexdigest()


def file_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_json(path, content):
    """Write readable JSON atomically; numbers in full, NaN refused."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def versions():
    """Versions of what shapes a run's numbers."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("torch", "numpy")
    }


@functools.cache  # the code that runs is the code that was loaded, and a save need not ask again
def git_revision():
    """Commit of this clone, with "+changes" when a source file differs from it; None outside a clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        code = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "*.c"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if head.returncode else head.stdout.strip() + "+changes" * code.returncode


def read(path):
    """Content of a file of torch.save, checked for damage, with nothing in it executed.

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


def from_bytes(content):
    """What to_bytes was given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _checked_pickles(path, content):
    """Streams of the pickles in a zip archive, once all of it has proved undamaged."""
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


def _check_pickle(path, stream):
    """Refuse what a state_dict does not need. torch.load runs no code, but has functions that fill the memory."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and not ALLOWED.fullmatch(argument)):
            raise CheckpointError(f"{path}: holds Python objects, not only weights: refused, nothing was run")


def _check(path, content):
    """Model name and weights of a checkpoint of ours, every field looked at before it is believed."""
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
    if [content["classes"], content["mean"], content["std"]] != [list(CLASSES), MEAN, STD]:
        raise CheckpointError(f"{path}: trained for other classes or another normalisation")
    if not _is_state_dict(content["weights"]) or _shapes(content["weights"]) != _shapes(_empty(name)):
        raise CheckpointError(f"{path}: its weights do not have the shapes of {name}")
    return name, content["weights"]


def _is_plain(value, depth=3):
    """Whether a value, or all in a list or dict of them, can be told in a line."""
    if isinstance(value, list | dict):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return value.isprintable()
    return value is None or (isinstance(value, bool | int | float) and abs(value) < 2**63) or value != value


def _adopt(path, content):
    """Model name and renamed weights of someone else's state_dict."""
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


def _is_state_dict(content):
    return isinstance(content, dict) and all(
        isinstance(key, str)
        and key.isprintable()
        and isinstance(value, torch.Tensor)
        and (value.is_floating_point() or (value.dtype == torch.int64 and not value.dim()))  # batch norm's counter
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for key, value in content.items()
    )


def _empty(name):
    with torch.device("meta"):
        return models.build(name).state_dict()


def _shapes(weights):
    return {key: tuple(value.shape) for key, value in weights.items()}
