"""The record of a run: its best checkpoint, a JSON history of its epochs, and what it takes to resume it.

    checkpoints/best_cnn_fmnist.pt         the best epoch so far   \\ written after every epoch
    checkpoints/best_cnn_fmnist.json       the history             /
    checkpoints/unfinished_cnn_fmnist.pt   the whole run, written every so many seconds; gone when it has finished

Each file is written whole or not at all, so a run that is cut off at any moment leaves what it had.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout

import checkpoint
import recipes
from data import DataError
from dataset.sources import check_classes
from engine import Training
from runtime import device as machine
from runtime.code_key import code_key
from runtime.errors import UserError
from runtime.files import file_sha256, write_atomically, write_json

FORMAT = "fmnist-unfinished-3"
ENVIRONMENT = {  # what the last bits depend on beside flags and data, and of which types
    "device": str,
    "processes": int,
    "threads": int,
    "processor": str,
    "kernels": str,
    "versions": dict,
    "git": str | None,
    "code": str | None,  # a key of the model's code, of runtime/code_key.py
}
ORIGIN = {  # what is known of a run when it begins
    "model": str,
    "status": str,  # "running", then "finished", "interrupted" or "failed"
    "seed": int,
    "flags": recipes.FLAGS,
    "data": str,
    "data_sha256": str | None,  # of the images and labels, of data.fingerprint
    "classes": list,
    "train_images": int,
    "select_images": int,
    **ENVIRONMENT,
}
RESULTS: dict[str, tuple[Any, Any]] = {  # what the run adds: types, and the values at its beginning
    "resumed": ([dict], []),  # for each time, the epoch and step, and what of the environment had changed
    "checkpoint": (str, ""),
    "checkpoint_sha256": (str | None, None),  # of the file; it says whether the two still belong together
    "best_epoch": (int | None, None),
    "epochs": ([dict], []),
    "training_seconds": (float, 0.0),
    "test": (None | dict, None),
    "temperature": (None | float, None),  # calibrates the probabilities; fitted on the images that chose the epoch
}
STATE = {  # what Record.save writes, where the history is its JSON
    "format": str,
    "history": ORIGIN | {name: kind for name, (kind, _) in RESULTS.items()},
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
        "recent": [list],
        "correct": float,
        "loss": float,
        "seconds": float,
    },
}


class RunError(UserError):
    """A run that cannot be begun or resumed."""


class Record:
    """Keeps the best epoch of one run at `path`, and an earlier run's checkpoint under another name.

    kept is where an earlier checkpoint went. The figures in the history do not depend on interruptions; only the times
    do, and the list "resumed".
    """

    def __init__(self, path: str | Path, **origin: Any):
        self.path = Path(path)
        self.kept: Path | None = None
        self._best_content: bytes | None = None  # the bytes of the best checkpoint
        self._seconds, self._started = 0.0, time.monotonic()
        beginning = {name: list(value) if value == [] else value for name, (_, value) in RESULTS.items()}
        origin = {name: origin.get(name, "running") for name in ORIGIN}
        # From JSON, as that of a resumed run: a text that occurs twice is then pickled alike in both checkpoints.
        self.history: dict[str, Any] = json.loads(json.dumps(origin | beginning | {"checkpoint": self.path.name}))

    @property
    def best_epoch(self) -> dict[str, Any] | None:
        """The best epoch's row, or None before the first epoch has ended."""
        number = self.history["best_epoch"]
        return number and self.history["epochs"][number - 1]

    @property
    def best_weights(self) -> dict[str, torch.Tensor]:
        """The state_dict of the best epoch so far."""
        return checkpoint.from_bytes(self._best_content or b"")["weights"]

    @property
    def seconds(self) -> float:
        """Seconds of training so far, in this process and earlier ones, by a clock that only runs forwards."""
        return self._seconds + time.monotonic() - self._started

    def begin(self) -> None:
        """Keep an earlier run's checkpoint, so that this run can write in its place."""
        self.kept = keep_aside(self.path)

    def add_epoch(self, model: torch.nn.Module, row: dict[str, Any]) -> bool:
        """Add a row of Training.run; save the model if it is the best so far, of equals the earlier one.

        Where nothing selects, the last epoch is the best. Returns whether this one is.
        """
        self.history["epochs"].append(row)
        best = self.best_epoch
        is_best = not best or "select_accuracy" not in row or row["select_accuracy"] > best["select_accuracy"]
        if is_best:
            history = self.history
            self._best_content = checkpoint.serialise(
                model,
                name=history["model"],
                epoch=row["epoch"],
                metrics={key: value for key, value in row.items() if key.endswith(("loss", "accuracy"))},
                **{key: history[key] for key in ("flags", "seed", "data", "classes", *checkpoint.NEWER)},
            )
            history["checkpoint_sha256"] = write_atomically(self.path, self._best_content)
            history["best_epoch"] = row["epoch"]
        self._write()
        return is_best

    def save(self, training: Training, fingerprint: str) -> None:
        """Write all that resume() needs: the training, this record, and the data's fingerprint."""
        self.history["training_seconds"] = self.seconds
        content = {
            "format": FORMAT,
            "history": _to_tensor(json.dumps(self.history).encode()),
            "best": self._best_content and _to_tensor(self._best_content),
            "kept": self.kept and self.kept.name,
            "fingerprint": fingerprint,
            "training": training.state_dict(),
        }
        write_atomically(unfinished_path(self.path), checkpoint.to_bytes(content))

    def resume(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Restore the history and the best checkpoint's file of `saved`, of load_unfinished.

        Returns what has changed since of the environment, as {name: (before, now)}.
        """
        before, now = saved["history"], self.history
        known = [key for key in ENVIRONMENT if key not in checkpoint.NEWER or before[key]]
        changed = {key: (before[key], now[key]) for key in known if before[key] != now[key]}
        place = {key: saved["training"][key] for key in ("epoch", "step")}
        resumed = [*before["resumed"], place | {key: new for key, (_, new) in changed.items()}]
        self.history = before | {"status": "running", "resumed": resumed, "data_sha256": now["data_sha256"]}
        self._seconds, self._started = before["training_seconds"], time.monotonic()
        self.kept = self.path.with_name(saved["kept"]) if saved["kept"] else None
        if not self._is_own():
            keep_aside(self.path)
        if saved["best"] is not None:
            self._best_content = _from_tensor(saved["best"])
            write_atomically(self.path, self._best_content)
            self._write()
        return changed

    def end(self, status: str) -> bool:
        """Close the record. Returns whether the run has ended where the earlier checkpoint was.

        Where it has repeated an earlier, finished run to the bit, the earlier checkpoint and history are put back: so a
        repeated run changes no file. A copy of what is still in place is removed.
        """
        self.history["status"] = status
        if self.best_epoch:
            self._write()
        if status != "interrupted":
            unfinished_path(self.path).unlink(missing_ok=True)
        if not self.kept or not self.kept.exists():
            return False
        place, history = self.path.with_suffix(self.kept.suffix), history_of(self.kept)
        if status == "finished" and history and history["status"] == "finished" and self._repeats(self.kept):
            os.replace(self.kept, self.path)
            os.replace(history_path(self.kept), history_path(self.path))
            return True
        if place.exists() and self.kept.read_bytes() == place.read_bytes():
            self.kept.unlink()
            history_path(self.kept).unlink(missing_ok=True)
            return True
        return False

    def _repeats(self, other: Path) -> bool:
        """Say whether another checkpoint has the flags and, to the bit, the weights of this run's best one."""
        with contextlib.suppress(UserError, OSError):
            model, info = checkpoint.load(other)
            if self._is_of(info) and info["epoch"] == self.history["best_epoch"]:
                weights = self.best_weights
                return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        return False

    def _write(self) -> None:
        self.history["training_seconds"] = self.seconds
        write_json(history_path(self.path), self.history)

    def _is_own(self) -> bool:
        """Say whether the checkpoint at the path is of this run, or of one that is the same to the bit."""
        with contextlib.suppress(UserError, OSError):
            return self._is_of(checkpoint.load(self.path)[1])
        return False

    def _is_of(self, info: dict[str, Any]) -> bool:
        """Say whether a checkpoint's description is that of this run."""
        if "flags" not in info:
            return False
        own = self.history
        info = info | {"flags": recipes.upgrade(info["flags"])}
        same_data = None in (info["data_sha256"], own["data_sha256"]) or info["data_sha256"] == own["data_sha256"]
        return same_data and all(info[key] == own[key] for key in ("model", "seed", "flags", "data", "classes"))


def _to_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _from_tensor(tensor: torch.Tensor) -> bytes:
    if not tensor.is_contiguous() or tensor.dtype != torch.uint8:
        raise ValueError("not bytes")
    return tensor.numpy().tobytes()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} in the history")


def environment(model: str, device: torch.device, *, processes: int, fused: bool) -> dict[str, Any]:
    """Describe what the last bits of a run of a model depend on, beside its flags and its data."""
    return {
        "device": str(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "processor": machine.processor(),
        "kernels": "fused" if fused else "PyTorch",
        "versions": machine.versions(),
        "git": machine.git_revision(),
        "code": code_key(model),
    }


@contextlib.contextmanager
def sole_writer(path: str | Path) -> Iterator[None]:
    """Reserve the place of this checkpoint for one training, and remove what a killed one left half-written.

    Raises RunError when another training holds it.
    """
    path = Path(path)
    file = path.with_name(f".{path.stem}.lock")
    try:
        lock = FileLock(file).acquire(blocking=False)
    except Timeout:
        raise RunError(
            f"another training ({file.read_text() or 'just begun'}) is writing {path}: wait for its end, or give this "
            "one another --checkpoint-dir"
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


def unfinished_path(path: str | Path) -> Path:
    """Return where the run that writes best_X.pt saves itself while it is unfinished: unfinished_X.pt."""
    path = Path(path)
    return path.with_name("unfinished_" + path.name.removeprefix("best_"))


def load_unfinished(path: str | Path) -> dict[str, Any] | None:
    """Load what Record.save wrote of the run that writes this checkpoint, or None where no run is unfinished.

    Raises checkpoint.CheckpointError when the file is damaged or something else.
    """
    path = unfinished_path(path)
    if not path.exists():
        return None
    saved = checkpoint.read(path)
    try:
        history = dict.fromkeys(checkpoint.NEWER) | json.loads(_from_tensor(saved["history"]), parse_constant=_refuse)
        saved = saved | {"history": history, "training": {"recent": []} | saved["training"]}
        best, digest = saved["best"], saved["history"]["checkpoint_sha256"]
        whole = hashlib.sha256(_from_tensor(best)).hexdigest() == digest if digest else best is None
        known = saved["history"]["flags"]["recipe"] in recipes.RECIPES
        check_classes(saved["history"]["classes"])
        if saved["format"] == FORMAT and whole and known and checkpoint.fits(saved, STATE):
            return saved
    except (AttributeError, DataError, KeyError, RuntimeError, TypeError, ValueError):
        pass
    raise checkpoint.CheckpointError(f"{path}: not an unfinished run of this version; move it away to start anew")


def history_path(path: str | Path) -> Path:
    """Return where the JSON history of the run that wrote a checkpoint is: beside it, with the same stem."""
    return Path(path).with_suffix(".json")


def keep_aside(path: str | Path) -> Path | None:
    """Copy a checkpoint and its history, where there are any, to a name with the first digits of the SHA-256.

    The name depends on the content alone: however often a run is repeated, a checkpoint is kept once. It is a copy, so
    that the file stays at its name too, until the new one, complete, takes its place.
    Returns the new path of the checkpoint, or of the history where that stood alone, or None where there is nothing.
    """
    path = Path(path)
    present = [old for old in (path, history_path(path)) if old.exists()]
    if not present:
        return None
    digest = file_sha256(present[0])[:8]
    kept = [old.with_suffix(f".{digest}{old.suffix}") for old in present]
    for old, new in zip(present, kept, strict=True):
        write_atomically(new, old.read_bytes())
    return kept[0]


def history_of(path: str | Path) -> dict[str, Any] | None:
    """Return the history of the run that wrote this checkpoint, or None; the history of another run does not count."""
    path = Path(path)
    try:
        history = json.loads(history_path(path).read_text())
        if history["checkpoint_sha256"] == file_sha256(path):
            return history
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
