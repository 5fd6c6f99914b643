"""The record of a run: its best epoch's checkpoint and, beside it, a JSON history of all its epochs.

Both are written after every epoch, whole or not at all, so a run that is cut off leaves what it had.
"""

import json
import time
from pathlib import Path

import torch

import checkpoint


class Record:
    """Keeps the best epoch of one run at `path`, and an earlier run's checkpoint there under another name.

    best_weights is the state_dict of the best epoch so far, kept is where an earlier checkpoint went.
    """

    def __init__(self, path, *, model, seed, flags, data, train_images, select_images, device):
        self.path = Path(path)
        self.best_weights = self.kept = None
        self._started = time.perf_counter()
        self.history = {
            "model": model,
            "status": "running",  # then "finished", "interrupted" or "failed"
            "seed": seed,
            "flags": flags,
            "data": data,
            "train_images": train_images,
            "select_images": select_images,
            "device": device,
            "threads": torch.get_num_threads(),
            "versions": checkpoint.versions(),
            "git": checkpoint.git_revision(),
            "checkpoint": self.path.name,
            "checkpoint_sha256": None,  # of the file; tells whether the two still belong together
            "best_epoch": None,
            "epochs": [],
            "training_seconds": 0.0,
            "test": None,
        }

    @property
    def best_epoch(self):
        """The best epoch's row, or None before the first epoch has ended."""
        number = self.history["best_epoch"]
        return number and self.history["epochs"][number - 1]

    def add_epoch(self, model, row):
        """Take in a row of engine.fit; save the model if it is the best so far, of equals the earlier one.

        Where nothing selects, the last epoch is the best. Returns whether this one is.
        """
        self.history["epochs"].append(row)
        self.history["training_seconds"] = time.perf_counter() - self._started
        best = self.best_epoch
        is_best = not best or "select_accuracy" not in row or row["select_accuracy"] > best["select_accuracy"]
        if is_best:
            if not self.best_epoch:
                self.kept = keep_aside(self.path)
            self.best_weights = {key: value.clone() for key, value in model.state_dict().items()}
            self.history["checkpoint_sha256"] = checkpoint.save(
                self.path,
                model,
                name=self.history["model"],
                epoch=row["epoch"],
                metrics={key: value for key, value in row.items() if key.endswith(("loss", "accuracy"))},
                flags=self.history["flags"],
                seed=self.history["seed"],
                data=self.history["data"],
            )
            self.history["best_epoch"] = row["epoch"]
        self._write()
        return is_best

    def end(self, status, test=None):
        """Close the record. A checkpoint kept aside that turns out to be the same to the bit is not kept twice.

        Returns whether that was so.
        """
        self.history |= {"status": status, "test": test}
        if self.best_epoch:
            self._write()
        if self.kept and self.kept.exists() and self.kept.read_bytes() == self.path.read_bytes():
            self.kept.unlink()
            history_path(self.kept).unlink(missing_ok=True)
            return True
        return False

    def _write(self):
        checkpoint.write_json(history_path(self.path), self.history)


def history_path(path):
    """The JSON history of the run that wrote the checkpoint: beside it, of the same stem."""
    return Path(path).with_suffix(".json")


def keep_aside(path):
    """Copy a checkpoint and its history, where there are any, to a name with the first digits of the SHA-256.

    The name depends on the content alone: however often a run is repeated, a checkpoint is kept once. It is a copy,
    so that the file is at its own name too until the new one, complete, takes its place.
    Returns the new path of the checkpoint, of the history where that stood alone, or None with nothing to keep.
    """
    path = Path(path)
    present = [old for old in (path, history_path(path)) if old.exists()]
    if not present:
        return None
    digest = checkpoint.file_sha256(present[0])[:8]
    kept = [old.with_suffix(f".{digest}{old.suffix}") for old in present]
    for old, new in zip(present, kept, strict=True):
        checkpoint.write_atomically(new, old.read_bytes())
    return kept[0]


def history_of(path):
    """The history of the run that wrote this very checkpoint, or None: a file of another run does not count."""
    path = Path(path)
    try:
        history = json.loads(history_path(path).read_text())
        if history["checkpoint_sha256"] == checkpoint.file_sha256(path):
            return history
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
