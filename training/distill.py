"""Knowledge distillation: what teachers answer to the training images, computed once and cached.

teachers = distill.describe(["checkpoints/best_resnet_fmnist.pt"])
logits = distill.answers(teachers, train)              # float32 (n, 10), for engine.Training

An answer is the mean over a few views of an image, mirrored and moved: one target for every view the student sees.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import engine
from data import Split
from recipes import upgrade
from runtime import cli, distributed
from runtime.device import dtype_name
from runtime.errors import UserError
from runtime.files import file_sha256, write_atomically

CACHE = cli.ROOT / ".cache" / "teachers"
FORMAT = 2  # of the cached files


class TeacherError(UserError):
    """A teacher that cannot teach this run."""


def describe(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Describe teachers for a run's record: dicts of checkpoint, sha256, model, and what selected its epoch."""
    described = []
    for path in paths:
        _, info = checkpoint.load(path)
        select = upgrade(info["flags"])["select"] if "flags" in info else None
        teacher = {"checkpoint": cli.shown(path), "sha256": file_sha256(path), "model": info["model"], "select": select}
        described.append(teacher)
    return described


def answers(teachers: list[dict[str, Any]], split: Split, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute the logarithm of the mean probabilities over all teachers and engine.VIEWS.

    teachers: of describe. Returns float32 (n, 10) on the split's device, from the cache or, with a bar, anew.
    Raises TeacherError where a checkpoint has changed since it was described, CheckpointError where its classes are
    others.
    """
    for teacher in teachers:
        if file_sha256(teacher["checkpoint"]) != teacher["sha256"]:
            raise TeacherError(f"{teacher['checkpoint']} is no longer the teacher this run began with")
        checkpoint.check_classes(teacher["checkpoint"], checkpoint.load(teacher["checkpoint"])[1], split)
    key = [FORMAT, [teacher["sha256"] for teacher in teachers], data.fingerprint(split), dtype_name(precision)]
    path = CACHE / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npy"
    logits = distributed.from_first(lambda: _read(path))
    if logits is None:
        logits = _compute(teachers, split, precision)
        if distributed.rank() == 0:
            _write(path, logits)
    return torch.from_numpy(logits).to(split.labels.device)


def _compute(teachers: list[dict[str, Any]], split: Split, precision: torch.dtype) -> np.ndarray:
    networks = [checkpoint.load(teacher["checkpoint"])[0].to(split.labels.device) for teacher in teachers]
    with (
        tqdm(total=len(networks) * len(engine.VIEWS), desc="teachers", unit=" views", disable=None) as bar,
        torch.autocast(split.labels.device.type, precision, enabled=precision is not torch.float32),
    ):
        found = [engine.predict_views(network, split, bar.update) for network in networks]
    return engine.average(found).float().numpy()


def _read(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, logits: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, logits)
    write_atomically(path, buffer.getvalue())
