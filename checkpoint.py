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
import platform
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import torch

import models
from data import CLASSES, MEAN, STD, UserError

FORMAT = "fmnist-checkpoint-1"
FIELDS = ("model", "weights", "classes", "mean", "std", "epoch", "metrics", "flags", "seed", "data", "versions", "git")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys others keep a state_dict under


class CheckpointError(UserError):
    """A file that is no usable checkpoint."""


def save(path, model, *, name, epoch, metrics, flags, seed, data):
    """Write a checkpoint atomically; the same run gives the same bytes, so nothing here depends on the clock.

    metrics: dict of floats of that epoch; flags: dict of the flags that shape the training; data: the name of
    the data set. Returns the SHA-256 of the file.
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
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_atomically(path, buffer.getvalue())


def load(path):
    """The model of a checkpoint, in evaluation mode on the CPU, and a dict of what the checkpoint says of it.

    A bare state_dict of a known architecture is taken too, its tensors matched by name or else by order and
    shape, and that is told on stderr; its dict then holds only "model".
    Raises CheckpointError when the file is missing, damaged, foreign, or holds more than plain weights.
    """
    path = Path(path)
    content = _unpickle(path)
    if isinstance(content, dict) and str(content.get("format", "")).startswith("fmnist-checkpoint-"):
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


def _unpickle(path):
    """Content of a file of torch.save, checked for damage, with nothing in it executed."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; `python train.py --model cnn` writes checkpoints")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    try:
        if zipfile.is_zipfile(path):  # what torch.save writes; torch.load itself does not check the sums
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise CheckpointError(f"{path}: a zip archive, but not one of torch.save")
                if damaged := archive.testzip():
                    raise CheckpointError(f"{path}: damaged: the checksum of {damaged} inside it is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a hostile file can make the unpickler raise anything
        if "GLOBAL " in str(error):  # the pickle asks for a function or class by name
            raise CheckpointError(f"{path}: holds Python objects, not only weights: refused, nothing was run") from None
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch checkpoint") from None


def _check(path, content):
    """Model name and weights of a checkpoint of ours, every field looked at before it is believed."""
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in {content['format']}, this version reads {FORMAT}")
    if missing := [key for key in FIELDS if key not in content]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
    name = content["model"]
    if not isinstance(name, str) or name not in models.MODELS:
        raise CheckpointError(f"{path}: holds a {name!r}; the models here are {', '.join(models.MODELS)}")
    if repr([content["classes"], content["mean"], content["std"]]) != repr([list(CLASSES), MEAN, STD]):
        raise CheckpointError(f"{path}: trained for other classes or another normalisation")
    if not _is_state_dict(content["weights"]) or _shapes(content["weights"]) != _shapes(_empty(name)):
        raise CheckpointError(f"{path}: its weights do not have the shapes of {name}")
    return name, content["weights"]


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
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for value in content.values()
    )


def _empty(name):
    with torch.device("meta"):
        return models.build(name).state_dict()


def _shapes(weights):
    return {key: tuple(value.shape) for key, value in weights.items()}
