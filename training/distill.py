"""Knowledge distillation: what teachers answer to the training images, computed once and cached.

teachers = distill.describe(["checkpoints/best_resnet_fmnist.pt"])
logits = distill.answers(teachers, train)              # float32 (n, 10), for engine.Training

An answer is the mean over a few views of an image, mirrored and moved: one target for every view the student sees.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import engine
from checkpoint import Bare
from data import Split
from recipes import upgrade
from runtime import cli, distributed
from runtime.device import dtype_name
from runtime.errors import UserError, one_line
from runtime.files import read_bytes, write_atomically
from runtime.weights import AmbiguousError

CACHE = cli.ROOT / ".cache" / "teachers"
FORMAT = 4  # of the cached files


class TeacherError(UserError):
    """A teacher that cannot teach this run."""


def describe(
    paths: Iterable[str | Path], mean: float | None = None, std: float | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Describe teachers for a run's record: dicts of checkpoint, sha256, model, what selected its epoch, mean and std.

    mean and std: by which the input of bare state_dicts among them is normalised.
    """
    files = [Path(path) for path in paths]
    described = []
    try:
        loaded = checkpoint.load_all(files, Bare(None, mean, std))
    except AmbiguousError as error:  # whose advice is --model, which here names the student
        teacher, _, _ = str(error).partition(": choose")
        raise TeacherError(
            f"{teacher}; a teacher must fit one model: give its tensors the names that its model alone has here, or "
            "take the others out of MODELS in models.py"
        ) from None
    for path, (_, info) in zip(files, loaded, strict=True):
        select = upgrade(info["flags"])["select"] if "flags" in info else None
        if not (name := cli.relative(path)).isprintable():
            raise TeacherError(f"{name}: a checkpoint cannot record this name: rename the teacher's file or its folder")
        names = {"checkpoint": name, "sha256": info["sha256"], "model": info["model"], "select": select}
        values = info.get("normalisation", info)
        described.append(names | {"mean": values["mean"], "std": values["std"]})
    return described


def named(teacher: dict[str, Any]) -> str:
    """Name a teacher of describe in a message, with its normalisation where that is not the usual one."""
    mean, std = teacher["mean"], teacher["std"]
    return teacher["checkpoint"] + ("" if [mean, std] == [data.MEAN, data.STD] else f" (mean {mean:g}, std {std:g})")


def _load(teacher: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Load a teacher as it was described, which was said then; earlier versions recorded no mean and std."""
    bare = Bare(teacher["model"], teacher.get("mean"), teacher.get("std"))
    return checkpoint.load(teacher["checkpoint"], bare, quiet=True)


def check_folds(flags: dict[str, Any]) -> None:
    """Raise TeacherError where a teacher was trained on images that this run holds out, or that choose its epoch.

    flags: of the run.
    """
    if not flags["fold"] and flags["select"] != "val":
        return
    for teacher in flags["teachers"]:
        _, info = _load(teacher)
        theirs = upgrade(info["flags"])["fold"] if "flags" in info else None
        if theirs != flags["fold"]:
            held = f"fold {flags['fold']}" if flags["fold"] else "the validation images"
            own = f"--fold {flags['fold']}" if flags["fold"] else "no --fold"
            raise TeacherError(
                f"{teacher['checkpoint']} was not trained without {held}, and would reveal their labels: take a "
                f"teacher that was trained with {own}"
            )
        if flags["fold"] and teacher["select"] == "test":
            raise TeacherError(
                f"{teacher['checkpoint']}: its epoch was chosen on the images that fold {flags['fold']} holds out"
            )


def answers(teachers: list[dict[str, Any]], split: Split, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute the logarithm of the mean probabilities over all teachers and engine.VIEWS.

    teachers: of describe. Returns float32 (n, 10) on the split's device, from the cache or, with a bar, anew.
    Raises TeacherError where a checkpoint has changed since it was described, CheckpointError where its classes are
    others.
    """
    for teacher in teachers:
        _, info = _load(teacher)
        if info["sha256"] != teacher["sha256"]:
            raise TeacherError(f"{teacher['checkpoint']} is no longer the teacher this run began with")
        checkpoint.check_classes(teacher["checkpoint"], info, split)
    networks = [[each["sha256"], each["model"], each.get("mean"), each.get("std")] for each in teachers]
    key = json.dumps([FORMAT, networks, data.fingerprint(split), dtype_name(precision)])
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.answers"
    logits = distributed.from_first(lambda: _read(path, key, len(split.labels)))
    if logits is None:
        logits = _compute(teachers, split, precision)
        if not np.isfinite(logits).all():
            raise TeacherError("the teachers' answers to some images are no numbers: take other teachers")
        if distributed.rank() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, _sealed(key, logits.tobytes()))
            except OSError as error:  # the run does not need it
                print(f"the teachers' answers are not cached: {one_line(error)}", file=sys.stderr)
    return torch.from_numpy(logits).to(split.labels.device)


def _compute(teachers: list[dict[str, Any]], split: Split, precision: torch.dtype) -> np.ndarray:
    networks = [_load(teacher)[0].to(split.labels.device) for teacher in teachers]
    with (
        tqdm(total=len(networks) * len(engine.VIEWS), desc="teachers", unit=" views", disable=None) as bar,
        torch.autocast(split.labels.device.type, precision, enabled=precision is not torch.float32),
    ):
        found = [engine.predict_views(network, split, bar.update) for network in networks]
    return engine.average(found).float().numpy()


def _sealed(key: str, answers: bytes) -> bytes:
    """Return what the cache holds: the SHA-256 of the key and the answers, and the answers."""
    return hashlib.sha256(key.encode() + answers).digest() + answers


def _read(path: Path, key: str, n: int) -> np.ndarray | None:
    """Read the answers float32 (n, 10) that were cached for a key, or return None where these are not there, whole."""
    if not path.exists():
        return None
    with contextlib.suppress(UserError, OSError):
        content = read_bytes(path, 32 + n * len(data.CLASSES) * 4)
        answers = content[32:]
        if len(answers) == n * len(data.CLASSES) * 4 and content == _sealed(key, answers):
            logits = np.frombuffer(answers, np.float32).reshape(n, -1).copy()
            if np.isfinite(logits).all():
                return logits
    print(f"{cli.shown(path)} is damaged: the teachers' answers are computed anew", file=sys.stderr)
    return None
