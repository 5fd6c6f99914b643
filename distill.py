"""Knowledge distillation: what teachers answer to the training images, computed once and kept.

teachers = distill.describe(["checkpoints/best_resnet_fmnist.pt"])
logits = distill.answers(teachers, train)              # float32 (n, 10), for engine.Training

An answer is the mean over a few views of an image, mirrored and moved: one target for every view the student sees.
"""

import hashlib
import io
import json

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import cli
import data
import distributed
import engine

CACHE = cli.HERE / ".cache" / "teachers"
FORMAT = 2  # of the cached files


class TeacherError(data.UserError):
    """A teacher that cannot teach this run."""


def describe(paths):
    """What a run records of its teachers: dicts of checkpoint, sha256, model, and what selected its epoch."""
    described = []
    for path in paths:
        _, info = checkpoint.load(path)
        flags = info.get("flags", {})
        described.append(
            {
                "checkpoint": cli.shown(path),
                "sha256": checkpoint.file_sha256(path),
                "model": info["model"],
                "select": flags.get("select"),
            }
        )
    return described


def answers(teachers, split, precision=torch.float32):
    """The logarithms of the mean probabilities of all teachers and engine.VIEWS, float32 (n, 10) on the split's device.

    teachers: of describe. Read from the cache where they are there; else computed, with a bar.
    Raises TeacherError where a checkpoint has changed since it was described.
    """
    for teacher in teachers:
        if checkpoint.file_sha256(teacher["checkpoint"]) != teacher["sha256"]:
            raise TeacherError(f"{teacher['checkpoint']} is no longer the teacher this run began with")
    key = [FORMAT, [teacher["sha256"] for teacher in teachers], data.fingerprint(split)]
    path = CACHE / f"{hashlib.sha256(json.dumps([*key, cli.plain(precision)]).encode()).hexdigest()[:16]}.npy"
    logits = distributed.from_first(lambda: _read(path))
    if logits is None:
        logits = _compute(teachers, split, precision)
        if distributed.rank() == 0:
            _write(path, logits)
    return torch.from_numpy(logits).to(split.labels.device)


def _compute(teachers, split, precision):
    networks = [checkpoint.load(teacher["checkpoint"])[0].to(split.labels.device) for teacher in teachers]
    with (
        tqdm(total=len(networks) * len(engine.VIEWS), desc="teachers", unit=" views", disable=None) as bar,
        torch.autocast(split.labels.device.type, precision, enabled=precision is not torch.float32),
    ):
        answers = [engine.predict_views(network, split, bar.update) for network in networks]
    return engine.average(answers).float().numpy()


def _read(path):
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _write(path, logits):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, logits)
    checkpoint.write_atomically(path, buffer.getvalue())
