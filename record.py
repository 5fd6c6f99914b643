"""The record of a run: its best epoch's checkpoint, a JSON history of its epochs, and what it takes to go on with it.

    checkpoints/best_cnn_fmnist.pt         the best epoch so far   \\ written after every epoch
    checkpoints/best_cnn_fmnist.json       the history             /
    checkpoints/unfinished_cnn_fmnist.pt   all of the run, written every so many seconds; gone when it has finished

Each is written whole or not at all, so a run that is cut off at any moment leaves what it had.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import checkpoint
import recipes
from data import UserError

FORMAT = "fmnist-unfinished-2"
ENVIRONMENT = ("device", "processes", "threads", "kernels", "versions", "git")  # what else the last bits hang on
STATE = {  # what Record.save writes, the history being its JSON
    "format": str,
    "history": {
        "model": str,
        "status": str,
        "seed": int,
        "flags": {"recipe": str, **recipes.Recipe.__annotations__, "deterministic": bool, "teachers": [dict]},
        "data": str,
        "train_images": int,
        "select_images": int,
        "device": str,
        "processes": int,
        "threads": int,
        "kernels": str,
        "versions": dict,
        "git": str | None,
        "resumed": [dict],
        "checkpoint": str,
        "checkpoint_sha256": str | None,
        "best_epoch": int | None,
        "epochs": [dict],
        "training_seconds": float,
        "test": None | dict,
        "temperature": None | float,
    },
    "best": torch.Tensor | None,
    "kept": str | None,
    "fingerprint": str,
    "training": {
        "weights": dict,
        "optimizers": [dict],
        "scaler": dict | None,
        "epoch": int,
        "step": int,
        "images": list | None,
        "correct": float,
        "loss": float,
        "seconds": float,
    },
}


class RunError(UserError):
    """A run that cannot be begun or gone on with."""


class Record:
    """Keeps the best epoch of one run at `path`, and an earlier run's checkpoint there under another name.

    kept is where an earlier checkpoint went. The figures in the history are those of the run however often it was
    interrupted; only the times tell, and "resumed", a list.
    """

    def __init__(self, path, *, model, seed, flags, data, train_images, select_images, environment):
        self.path = Path(path)
        self.kept = self._best_content = None  # the latter, the bytes of the best checkpoint
        self._seconds, self._started = 0.0, time.monotonic()
        self.history = {
            "model": model,
            "status": "running",  # then "finished", "interrupted" or "failed"
            "seed": seed,
            "flags": flags,
            "data": data,
            "train_images": train_images,
            "select_images": select_images,
            **environment,
            "resumed": [],  # for each time, the epoch and step it went on from and what of the environment had changed
            "checkpoint": self.path.name,
            "checkpoint_sha256": None,  # of the file; tells whether the two still belong together
            "best_epoch": None,
            "epochs": [],
            "training_seconds": 0.0,
            "test": None,
            "temperature": None,  # that calibrates the probabilities, of the images that chose the epoch
        }

    @property
    def best_epoch(self):
        """The best epoch's row, or None before the first epoch has ended."""
        number = self.history["best_epoch"]
        return number and self.history["epochs"][number - 1]

    @property
    def best_weights(self):
        """The state_dict of the best epoch so far."""
        return checkpoint.from_bytes(self._best_content)["weights"]

    @property
    def seconds(self):
        """Seconds of training so far, in this process and those before it, whatever becomes of the clock."""
        return self._seconds + time.monotonic() - self._started

    def begin(self):
        """Keep an earlier run's checkpoint, for this one to write in its place."""
        self.kept = keep_aside(self.path)

    def add_epoch(self, model, row):
        """Take in a row of Training.run; save the model if it is the best so far, of equals the earlier one.

        Where nothing selects, the last epoch is the best. Returns whether this one is.
        """
        self.history["epochs"].append(row)
        best = self.best_epoch
        is_best = not best or "select_accuracy" not in row or row["select_accuracy"] > best["select_accuracy"]
        if is_best:
            self._best_content = checkpoint.serialise(
                model,
                name=self.history["model"],
                epoch=row["epoch"],
                metrics={key: value for key, value in row.items() if key.endswith(("loss", "accuracy"))},
                flags=self.history["flags"],
                seed=self.history["seed"],
                data=self.history["data"],
            )
            self.history["checkpoint_sha256"] = checkpoint.write_atomically(self.path, self._best_content)
            self.history["best_epoch"] = row["epoch"]
        self._write()
        return is_best

    def save(self, training, fingerprint):
        """Write all that resume() needs: of an engine.Training, this record, and the data's fingerprint."""
        self.history["training_seconds"] = self.seconds
        content = {
            "format": FORMAT,
            "history": _to_tensor(json.dumps(self.history).encode()),
            "best": self._best_content and _to_tensor(self._best_content),
            "kept": self.kept and self.kept.name,
            "fingerprint": fingerprint,
            "training": training.state_dict(),
        }
        checkpoint.write_atomically(unfinished_path(self.path), checkpoint.to_bytes(content))

    def resume(self, saved):
        """Go back to where `saved`, of load_unfinished, was: the history, the best checkpoint's file and all.

        Returns what has changed since of the environment, as {name: (before, now)}.
        """
        before, now = saved["history"], self.history
        changed = {key: (before[key], now[key]) for key in ENVIRONMENT if before[key] != now[key]}
        place = {key: saved["training"][key] for key in ("epoch", "step")}
        resumed = [*before["resumed"], place | {key: new for key, (_, new) in changed.items()}]
        self.history = before | {"status": "running", "resumed": resumed}
        self._seconds, self._started = before["training_seconds"], time.monotonic()
        self.kept = saved["kept"] and self.path.with_name(saved["kept"])
        if not self._is_own():
            keep_aside(self.path)
        if saved["best"] is not None:
            self._best_content = _from_tensor(saved["best"])
            checkpoint.write_atomically(self.path, self._best_content)
            self._write()
        return changed

    def end(self, status):
        """Close the record. A checkpoint kept aside that turns out to be the same to the bit is not kept twice.

        Returns whether that was so.
        """
        self.history["status"] = status
        if self.best_epoch:
            self._write()
        if status != "interrupted":
            unfinished_path(self.path).unlink(missing_ok=True)
        place = self.kept and self.path.with_suffix(self.kept.suffix)
        if self.kept and self.kept.exists() and place.exists() and self.kept.read_bytes() == place.read_bytes():
            self.kept.unlink()
            history_path(self.kept).unlink(missing_ok=True)
            return True
        return False

    def _write(self):
        self.history["training_seconds"] = self.seconds
        checkpoint.write_json(history_path(self.path), self.history)

    def _is_own(self):
        """Whether the checkpoint at the path is this run's, or of one that is the same to the bit."""
        with contextlib.suppress(UserError, OSError):
            info = checkpoint.load(self.path)[1]
            return all(info.get(key) == self.history[key] for key in ("model", "seed", "flags", "data"))
        return False


def _to_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _refuse(constant):
    raise ValueError(f"{constant} in the history")


def _from_tensor(tensor):
    if not tensor.is_contiguous() or tensor.dtype != torch.uint8:
        raise ValueError("not bytes")
    return tensor.numpy().tobytes()


def environment(device, *, processes, fused):
    """What the bits of a run hang on beside its flags and its data."""
    return {
        "device": str(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "kernels": "fused" if fused else "PyTorch",
        "versions": checkpoint.versions(),
        "git": checkpoint.git_revision(),
    }


@contextlib.contextmanager
def sole_writer(path):
    """Hold the place of this checkpoint for one training, and clear away what a killed one left half-written.

    Raises RunError when another training holds it.
    """
    path = Path(path)
    file = path.with_name(f".{path.stem}.lock")
    try:
        lock = FileLock(file).acquire(blocking=False)
    except Timeout:
        raise RunError(
            f"another training ({file.read_text() or 'just begun'}) is writing {path}: wait for its end, or give this "
            "one a --checkpoint-dir of its own"
        ) from None
    with lock:
        file.write_text(f"process {os.getpid()} on {platform.node()}")
        for name in (path.name, history_path(path).name, unfinished_path(path).name):
            for left_behind in path.parent.glob(f".{name}.*.tmp"):
                left_behind.unlink()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def unfinished_path(path):
    """Where the run that writes the checkpoint best_X.pt saves itself while it is unfinished: unfinished_X.pt."""
    path = Path(path)
    return path.with_name("unfinished_" + path.name.removeprefix("best_"))


def load_unfinished(path):
    """What Record.save wrote of the run that writes this checkpoint, or None where no run is unfinished.

    Raises checkpoint.CheckpointError when the file is damaged or something else.
    """
    path = unfinished_path(path)
    if not path.exists():
        return None
    saved = checkpoint.read(path)
    try:
        saved = saved | {"history": json.loads(_from_tensor(saved["history"]), parse_constant=_refuse)}
        best, digest = saved["best"], saved["history"]["checkpoint_sha256"]
        whole = hashlib.sha256(_from_tensor(best)).hexdigest() == digest if digest else best is None
        known = saved["history"]["flags"]["recipe"] in recipes.RECIPES
        if saved["format"] == FORMAT and whole and known and _fits(saved, STATE):
            return saved
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        pass
    raise checkpoint.CheckpointError(f"{path}: not an unfinished run of this version; move it away to start anew")


def _fits(value, kind):
    """Whether a value is of that type, or a dict of just these keys whose values are of these types."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and value.keys() == kind.keys() and all(_fits(value[k], kind[k]) for k in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(part, kind[0]) for part in value)
    return isinstance(value, kind)


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
