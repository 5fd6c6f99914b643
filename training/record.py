"""The record of a run: its best checkpoint, a JSON history of its epochs, and what it takes to resume it.

    checkpoints/best_cnn_fmnist.pt         the best epoch so far   \\ written after every epoch
    checkpoints/best_cnn_fmnist.json       the history             /
    checkpoints/unfinished_cnn_fmnist.pt   the whole run, written every so many seconds; gone when it has finished

Each file is written whole or not at all, so a run that is cut off at any moment leaves what it had.
"""

import contextlib
import filecmp
import hashlib
import json
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import checkpoint
import recipes
from data import CLASSES
from dataset.sources import check_classes
from engine import Training
from runtime import cli
from runtime import device as machine
from runtime.code_key import code_key
from runtime.errors import UserError, one_line
from runtime.files import file_sha256, parse_json, read_bytes, read_json, write_atomically, write_json
from runtime.schema import Maybe, Number, Text, problem

FORMAT = "fmnist-unfinished-3"
LARGEST = 2**32  # bytes of a checkpoint
LARGEST_HISTORY = 2**24  # bytes: 10,000 epochs have a seventh of it
COUNT, SECONDS = Number(0, 10**12, whole=True), Number(0, 1e12)
ENVIRONMENT = {  # what the last bits depend on beside flags and data; kinds of runtime/schema.py, as everywhere here
    "device": Text(),
    "processes": Number(1, 10**6, whole=True),
    "threads": Number(1, 10**6, whole=True),
    "processor": Text(1000),
    "kernels": Text(),
    "versions": {str: Text()},
    "git": (Text(), None),
    "code": (Text(), None),  # a key of the model's code, of runtime/code_key.py
}
ORIGIN: dict[str, Any] = {  # what is known of a run when it begins
    "model": Text(),
    "status": ("running", "finished", "interrupted", "failed"),
    "seed": Number(0, 2**32 - 1, whole=True),
    "flags": recipes.FLAGS,
    "data": Text(),
    "data_sha256": (Text(), None),  # of the images and labels, of data.fingerprint
    "classes": [str],  # of dataset.sources.check_classes
    "train_images": COUNT,
    "select_images": COUNT,
    **ENVIRONMENT,
}
ROW = {  # an epoch
    "epoch": COUNT,
    "train_loss": Number(),
    "train_accuracy": Number(0),  # where images are left out, the others count for more: it may exceed 1
    "select_loss": Maybe(Number()),
    "select_accuracy": Maybe(recipes.SHARE),
    "seconds": SECONDS,
    "images_per_second": Number(0),
    str: Number(),  # other metrics
}
TEST = {
    "n": Number(1, 10**12, whole=True),
    "accuracy": recipes.SHARE,
    "accuracy_ci95": [recipes.SHARE, recipes.SHARE],
    "loss": Number(),
    str: Number(),
}
RESUMED = {"epoch": COUNT, "step": COUNT} | {key: Maybe(kind) for key, kind in ENVIRONMENT.items()}
RESULTS: dict[str, tuple[Any, Any]] = {  # what the run adds: kinds, and the values at its beginning
    "resumed": ([RESUMED], []),  # for each time, the epoch and step, and what of the environment had changed
    "checkpoint": (Text(), ""),
    "checkpoint_sha256": ((Text(64), None), None),  # of the file; it says whether the two still belong together
    "best_epoch": ((COUNT, None), None),
    "epochs": ([ROW], []),
    "training_seconds": (SECONDS, 0.0),
    "test": ((TEST, None), None),
    "temperature": ((Number(0.01, 100), None), None),  # calibrates; fitted on the images that chose the epoch
}
HISTORY = ORIGIN | {name: kind for name, (kind, _) in RESULTS.items()}
REMOVED = {str: (bool, Number(), Text(), None)}  # flags that a recipe no longer has
EARLIER: dict[str, Any] = {  # what the histories of earlier versions lack, where it is not in RESULTS
    **dict.fromkeys(checkpoint.NEWER),
    "classes": list(CLASSES),
    "processor": "",
    "processes": 1,
    "kernels": "PyTorch",
}
STATE = {  # what Record.save writes, where the history is its JSON
    "format": FORMAT,
    "history": HISTORY,
    "best": torch.Tensor | None,
    "kept": (Text(), None),
    "made": Maybe([Text()]),  # of the names of what is kept, those that this run has made
    "fingerprint": str,
    "training": {
        "weights": dict,
        "optimizers": [dict],
        "scaler": dict | None,
        "epoch": COUNT,
        "step": COUNT,
        "images": ([torch.Tensor, torch.Tensor], None),
        "recent": [[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]],
        "correct": Number(0),
        "loss": Number(),
        "seconds": SECONDS,
    },
}


class RunError(UserError):
    """A run that cannot be begun or resumed."""


class Held(RunError):
    """A place that another training writes to."""


class Record:
    """Keeps the best epoch of one run at `path`, and an earlier run's checkpoint under another name.

    kept is where an earlier checkpoint went. The figures in the history do not depend on interruptions; only the times
    do, and the list "resumed".
    """

    def __init__(self, path: str | Path, **origin: Any):
        self.path = Path(path)
        self.kept: Path | None = None
        self._made: list[str] = []  # names of its files that were not there before: only these may go again
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
        before = set(os.listdir(self.path.parent))
        self.kept = keep_aside(self.path)
        if self.kept:
            self._made = [each.name for each in (self.kept, history_path(self.kept)) if each.name not in before]

    def add_epoch(self, model: torch.nn.Module, row: dict[str, Any]) -> bool:
        """Add a row of Training.run; save the model if it is the best so far, of equals the earlier one.

        Where nothing selects, the last epoch is the best. Returns whether this one is.
        """
        self.history["epochs"].append(row)
        is_best = _best(self.history["epochs"]) == row["epoch"]
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
            "made": self._made,
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
        own = {key: now[key] for key in ("status", "data_sha256", "checkpoint")}
        self.history = before | {"resumed": resumed, **own}
        self._seconds, self._started = before["training_seconds"], time.monotonic()
        self.kept = self.path.with_name(saved["kept"]) if saved["kept"] else None
        self._made = saved.get("made", [])
        if not self._is_own():
            keep_aside(self.path)
        if saved["best"] is not None:
            self._best_content = _from_tensor(saved["best"])
            write_atomically(self.path, self._best_content)
            self._write()
        return changed

    def end(self, status: str, given_up: bool = False) -> bool:
        """Close the record. Returns whether the run has ended where the earlier checkpoint was.

        Of a run that is given up, nothing is left to resume.
        Where it has repeated an earlier, finished run to the bit, the earlier checkpoint and history are put back: so a
        repeated run changes no file. A copy of what is still in place is removed, if this run has made it.
        """
        self.history["status"] = status
        if self.best_epoch:
            self._write()
        if status != "interrupted" or given_up:
            unfinished_path(self.path).unlink(missing_ok=True)
        if not self.kept or not self.kept.exists() or self.kept.is_symlink():
            return False
        places = {self.kept: self.path.with_suffix(self.kept.suffix), history_path(self.kept): history_path(self.path)}
        copies = {copy: place for copy, place in places.items() if copy.exists()}
        if status == "finished" and self._repeats(self.kept):
            for copy, place in copies.items():
                if copy.name in self._made:
                    os.replace(copy, place)
                else:
                    write_atomically(place, read_bytes(copy, LARGEST))
            return True
        if not all(place.exists() and filecmp.cmp(copy, place, shallow=False) for copy, place in copies.items()):
            return False
        for copy, place in copies.items():
            if copy.name in self._made and not os.path.samefile(copy, place):  # else the file would be gone
                copy.unlink()
        return True

    def _repeats(self, other: Path) -> bool:
        """Say whether another checkpoint is of a finished run with the flags and the very weights of this one."""
        with contextlib.suppress(UserError, OSError):
            history = history_of(other)
            model, info = checkpoint.load(other)
            if history and history["status"] == "finished" and _is_best_of(info, self.history):
                weights = self.best_weights
                return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        return False

    def _write(self) -> None:
        self.history["training_seconds"] = self.seconds
        write_json(history_path(self.path), self.history)

    def _is_own(self) -> bool:
        """Say whether the checkpoint at the path is of this run, or of one that is the same to the bit."""
        with contextlib.suppress(UserError, OSError):
            other = history_of(self.path)
            return _is_of(checkpoint.load(self.path)[1], self.history) and (not other or _agree(other, self.history))
        return False


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether two histories agree in what the last bits depend on, and in the figures of epochs that both have."""
    rows = [[_figures(row) for row in history["epochs"]] for history in (one, other)]
    same = all(a == b for a, b in zip(*rows, strict=False))
    return same and all(one.get(key) == other.get(key) for key in ENVIRONMENT.keys() - {"git"})


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}


def _best(rows: list[dict[str, Any]]) -> int | None:
    """Return the number of the epoch that is kept: the most accurate one, or the last where nothing selects."""
    if not rows or "select_accuracy" not in rows[-1]:
        return len(rows) or None
    return max(rows, key=lambda row: row["select_accuracy"])["epoch"]


def _is_of(info: dict[str, Any], history: dict[str, Any]) -> bool:
    """Say whether a checkpoint's description is that of a run."""
    if "flags" not in info:
        return False
    info = info | {"flags": recipes.upgrade(info["flags"])}
    same_data = None in (info["data_sha256"], history["data_sha256"]) or info["data_sha256"] == history["data_sha256"]
    return same_data and all(info[key] == history[key] for key in ("model", "seed", "flags", "data", "classes"))


def _is_best_of(info: dict[str, Any], history: dict[str, Any]) -> bool:
    """Say whether a checkpoint's description is that of a run's best epoch."""
    return _is_of(info, history) and info["epoch"] == history["best_epoch"]


def _to_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _from_tensor(tensor: torch.Tensor) -> bytes:
    if not tensor.is_contiguous() or tensor.dtype != torch.uint8:
        raise ValueError("not bytes")
    return tensor.numpy().tobytes()


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

    Raises Held when another training holds it.
    """
    path = Path(path)
    file = path.with_name(f".{path.stem}.lock")
    if os.path.lexists(file) and not (stat.S_ISREG((found := file.lstat()).st_mode) and found.st_nlink == 1):
        raise RunError(f"{cli.shown(file)} is not the lock file of a training, but a link, say: remove it")
    try:
        lock = FileLock(file).acquire(blocking=False)
    except Timeout:
        raise Held(
            f"another training ({_holder(file)}) is writing {path}: wait for its end, or give this one another "
            "--checkpoint-dir"
        ) from None
    with lock:
        file.write_text(f"process {os.getpid()} on {platform.node()}")
        for name in (path.name, history_path(path).name, unfinished_path(path).name, held_out_path(path).name):
            for left_behind in path.parent.glob(f".{name}.*.tmp"):
                left_behind.unlink()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _holder(file: Path) -> str:
    with contextlib.suppress(UserError, OSError):
        return one_line(read_bytes(file, 1000).decode(errors="replace")) or "just begun"
    return "not known"


def unfinished_path(path: str | Path) -> Path:
    """Return where the run that writes best_X.pt saves itself while it is unfinished: unfinished_X.pt."""
    path = Path(path)
    return path.with_name("unfinished_" + path.name.removeprefix("best_"))


def held_out_path(path: str | Path) -> Path:
    """Return where a fold run that writes best_X.pt puts its answers to the held-out images: held_out_X.npz."""
    path = Path(path)
    return path.with_name("held_out_" + path.name.removeprefix("best_")).with_suffix(".npz")


def load_unfinished(path: str | Path) -> dict[str, Any] | None:
    """Load what Record.save wrote of the run that writes this checkpoint, or None where no run is unfinished.

    Raises checkpoint.CheckpointError when the file is damaged or something else.
    """
    path, place = Path(path), unfinished_path(path)
    if not place.exists():
        return None
    saved = checkpoint.read(place)
    try:
        return _state(path, saved)
    except (RuntimeError, TypeError, UserError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{cli.shown(place)}: not an unfinished run of this version: {one_line(error)}; move it away to start anew"
        ) from None


def _state(path: Path, saved: Any) -> dict[str, Any]:
    """Return the state of an unfinished run in today's form, checked. Raises UserError, ValueError, TypeError."""
    if wrong := problem(saved, {"format": FORMAT, "history": torch.Tensor, str: object}):
        raise ValueError(wrong)
    history = parse_json(_from_tensor(saved["history"]))
    _upgraded(history)  # a check alone: with its keys in another order, the run would write other bytes
    history = dict.fromkeys(checkpoint.NEWER) | history
    for name, value in (("fold", None), ("whiten", 0.0)):  # which earlier versions lack
        history["flags"].setdefault(name, value)
    if isinstance(saved.get("training"), dict):
        saved = saved | {"history": history, "training": {"recent": []} | saved["training"]}
    if wrong := problem(saved, STATE):  # which has just the flags of today
        raise ValueError(wrong)
    if history["flags"]["recipe"] not in recipes.RECIPES:
        raise ValueError("its recipe is not in recipes.py")
    if len(history["epochs"]) != saved["training"]["epoch"] - 1:
        raise ValueError(f"it is in epoch {saved['training']['epoch']} with {len(history['epochs'])} epochs done")
    copy = rf"{re.escape(path.stem)}\.[0-9a-f]{{8,16}}\.(pt|json)"  # of keep_aside: no other file is this run's to move
    if saved["kept"] and not re.fullmatch(copy, saved["kept"]):
        raise ValueError(f"{saved['kept']!r} is not the name of an earlier checkpoint")
    if not {*saved.get("made", [])} <= {saved["kept"], history_path(saved["kept"] or path).name}:
        raise ValueError("made names other files than those of the earlier checkpoint")
    if (saved["best"] is None) != (history["best_epoch"] is None):
        raise ValueError("its best checkpoint and its epochs do not belong together")
    if saved["best"] is not None:
        content = _from_tensor(saved["best"])
        _, info = checkpoint.from_content(path, content)
        if hashlib.sha256(content).hexdigest() != history["checkpoint_sha256"] or not _is_best_of(info, history):
            raise ValueError("its best checkpoint is of another run")
    return saved


def history_path(path: str | Path) -> Path:
    """Return where the JSON history of the run that wrote a checkpoint is: beside it, with the same stem."""
    return Path(path).with_suffix(".json")


def keep_aside(path: str | Path) -> Path | None:
    """Copy a checkpoint and its history, where there are any, to a name with the first digits of the SHA-256.

    The name depends on the contents alone: a checkpoint is kept once with each history, however often it is repeated.
    It is a copy, so that the file stays at its name too, until the new one, complete, takes its place.
    Returns the new path of the checkpoint, or of the history where that stood alone, or None where there is nothing.
    Raises RunError where every name for it is another file's.
    """
    path = Path(path)
    present = [old for old in (path, history_path(path)) if old.exists()]
    contents = [read_bytes(old, LARGEST) for old in present]
    if not present:
        return None
    for digits in (_digest(contents[0])[:8], _digest(b"".join(contents))[:16]):
        kept = [old.with_suffix(f".{digits}{old.suffix}") for old in present]
        if all(_can_hold(new, content) for new, content in zip(kept, contents, strict=True)):
            for new, content in zip(kept, contents, strict=True):
                if not os.path.lexists(new):
                    write_atomically(new, content)
            return kept[0]
    raise RunError(f"{cli.shown(path)} cannot be kept as {cli.shown(kept[0])}, where another file is: move that away")


def _can_hold(path: Path, content: bytes) -> bool:
    """Say whether a path is free, or holds this content itself: a link may lead to what is about to be replaced."""
    return not os.path.lexists(path) or (not path.is_symlink() and read_bytes(path, LARGEST) == content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- histories -------------------------------------------------------------------------------------------


def history_of(path: str | Path) -> dict[str, Any] | None:
    """Return the history of the run that wrote this checkpoint, as it stands beside it, or None.

    The history of another run does not count, nor does a file that is no history: one without the plain SHA-256.
    Raises UserError where the file says that it is of this checkpoint and is damaged, or where one cannot be read.
    """
    place = history_path(path)
    if not place.exists() or not Path(path).is_file():
        return None
    content, digest = read_bytes(place, LARGEST_HISTORY), file_sha256(path, LARGEST)
    if digest.encode() not in content:
        return None
    try:
        history = parse_json(content)
        own = isinstance(history, dict) and history.get("checkpoint_sha256") == digest
        return history if own and _upgraded(history) else None
    except ValueError as error:
        raise _damaged(place, error) from None


def read_history(path: Path) -> dict[str, Any]:
    """Read a history in today's form, with all that earlier versions lack. Raises UserError where it is none."""
    content = read_json(path, LARGEST_HISTORY)
    try:
        return _upgraded(content)
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: ValueError) -> UserError:
    return UserError(f"{cli.shown(path)} is no history of a run of train.py: {error}; restore it, or move it away")


def _upgraded(history: Any) -> dict[str, Any]:
    """Return a history in today's form, checked. Raises ValueError, in one line."""
    if not isinstance(history, dict) or not isinstance(history.get("flags"), dict):
        raise ValueError("it has no flags")
    try:
        flags = recipes.upgrade(history["flags"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("its flags are those of no version") from None
    beginning = {name: value for name, (_, value) in RESULTS.items() if name in ("resumed", "temperature")}
    history = EARLIER | beginning | history | {"flags": flags}
    if wrong := problem(history, HISTORY | {"flags": recipes.FLAGS | REMOVED}) or _contradiction(history):
        raise ValueError(wrong)
    return history


def _contradiction(history: dict[str, Any]) -> str | None:
    """Say what in a history of the right form contradicts the rest of it, or return None."""
    rows, finished = history["epochs"], history["status"] == "finished"
    try:
        if list(check_classes(history["classes"])) != history["classes"]:
            return "its classes are not names"
        if history["flags"]["fold"]:
            recipes.fold_of(history["flags"]["fold"])
    except UserError as error:
        return str(error)
    if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        return "its epochs are not 1, 2, 3 and so on"
    if len(rows) > history["flags"]["epochs"] or (finished and len(rows) < history["flags"]["epochs"]):
        return f"it has {len(rows)} of {history['flags']['epochs']} epochs, and is {history['status']}"
    if len({key in row for row in rows for key in ("select_loss", "select_accuracy")}) > 1:
        return "some of its epochs have a select_loss and a select_accuracy, others not"
    if history["best_epoch"] != _best(rows):
        return f"best_epoch is {history['best_epoch']}, and by its epochs it is {_best(rows)}"
    if test := history["test"]:
        low, high = test["accuracy_ci95"]
        if not low - 1e-9 <= test["accuracy"] <= high + 1e-9:  # but for rounding
            return "test.accuracy is outside of test.accuracy_ci95"
    if (history["checkpoint_sha256"] is None) != (not rows) or (finished and not history["test"]):
        return "it lacks a checkpoint_sha256 or its test"
    return None
