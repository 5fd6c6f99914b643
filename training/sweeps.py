"""Many runs, each in its own folder: the values of a grid times the seeds.

jobs = sweeps.grid(Request("cnn", recipe="fast"), Path("sweeps"), ["muon_lr=0.03,0.07"], seeds=range(5))
code = pool.carry_out(sweeps.Grid(jobs), jobs=2)

    sweeps/cnn-fast-muon_lr=0.03-seed=0/best_cnn_fmnist.json   what the run has done so far, and how it ended
                                        log.txt                what it printed
                                        failed.txt             why it cannot be trained, in one line
                                        .claim                 the process that trains it now
"""

import contextlib
import functools
import hashlib
import io
import itertools
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import data
import models
import recipes
from recipes import Recipe
from runtime import cli, files
from runtime.code_key import code_key
from runtime.errors import UserError, one_line
from training import plan, record, run, settings
from training.plan import Request

LONGEST = 40  # characters of a value in the name of a folder
LONGEST_NAME = 150  # of all values there; most file systems allow 255 bytes of a name
OTHER = {"code": "other model code", "data_sha256": "other images", "data": "other data"}


@dataclass(frozen=True)
class Job:
    """One run: its name among the others, what is asked for, and how many epochs it has."""

    name: str
    request: Request
    epochs: int

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.request.checkpoint_dir

    @property
    def failure(self) -> str | None:
        """Why the run cannot be trained, or None."""
        with contextlib.suppress(FileNotFoundError):
            return one_line(files.read_bytes(self.folder / "failed.txt", 10_000).decode(errors="replace"))
        return None

    def fail(self, why: str) -> None:
        """Note why the run cannot be trained. No process tries it again while the note is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self.folder / "failed.txt", f"{one_line(why)}\n".encode())

    def history(self) -> dict[str, Any] | None:
        """Read what the run has recorded so far, or None where it has not recorded an epoch."""
        with contextlib.suppress(FileNotFoundError):
            history: dict[str, Any] = files.read_json(record.history_path(self.request.path), record.LARGEST_HISTORY)
            return history
        return None


class State(NamedTuple):
    """How far a run is."""

    epochs: int = 0  # that have ended
    settled: bool = False  # finished or failed: there is nothing left to do
    failure: str | None = None
    accuracy: float | None = None  # of a finished run, on the test or the held-out images
    seconds: float | None = None  # of training
    note: str = ""


class Grid:
    """A list of runs that do not depend on each other, as training/pool.py wants them."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = list(jobs)
        self._seen: dict[str, tuple[Any, State]] = {}  # by name: the stamp of the history that was read, and its state

    def state(self, job: Job) -> State:
        """Return how far a run is, by the files in its folder. A settled run is not looked at again."""
        stamp, state = self._seen.get(job.name, (None, State()))
        if state.settled:
            return state
        if (now := _stamp(job.request.path)) != stamp:
            state = _read(job)
        if not state.settled and (failure := job.failure):
            state = state._replace(settled=True, failure=failure)
        self._seen[job.name] = now, state
        return state

    def states(self) -> dict[str, State]:
        """Return how far each run is, by its name."""
        return {job.name: self.state(job) for job in self.jobs}

    def epochs(self) -> tuple[int, int]:
        """Count the epochs that have been trained, or need not be any more, and those of all runs."""
        done = [job.epochs if self.state(job).settled else self.state(job).epochs for job in self.jobs]
        return sum(done), sum(job.epochs for job in self.jobs)

    def settled(self) -> bool:
        """Say whether every run has finished or failed."""
        return all(self.state(job).settled for job in self.jobs)

    def open(self) -> Iterator[Job]:
        """Yield the runs that somebody still has to train."""
        return (job for job in self.jobs if not self.state(job).settled)

    def is_open(self, job: Job) -> bool:
        """Say whether a run that has just been claimed still has to be trained."""
        return not self.state(job).settled

    def carry_out(self, job: Job) -> int:
        """Train a run. Returns 0 at its end, else the exit code after a signal."""
        return run.run(job.request, load=load)


def _stamp(path: Path) -> tuple[int, int, bool] | None:
    """Return what changes with the history of the run of a checkpoint, and with its end."""
    unfinished = record.unfinished_path(path).exists()  # asked first: it goes after the history's last change
    with contextlib.suppress(OSError):
        found = record.history_path(path).stat()
        return found.st_mtime_ns, found.st_size, unfinished
    return None


def _read(job: Job) -> State:
    """Read the state of a run from its history. It has finished once its saved state is gone too."""
    if not (history := job.history()):
        return State()
    finished = history["status"] == "finished" and not record.unfinished_path(job.request.path).exists()
    accuracy = history["test"]["accuracy"] if finished else None
    return State(len(history["epochs"]), finished, None, accuracy, history["training_seconds"])


@functools.lru_cache(maxsize=2)
def load(*splits: str, **where: Any) -> list[data.Split]:
    """Load images as data.load does, and keep them for the next run of this process."""
    return data.load(*splits, **where)


# --- the plan --------------------------------------------------------------------------------------------


def recipe_of(request: Request) -> tuple[str, Recipe]:
    """Return the name of the recipe of a request, and its row with the settings. Raises UserError."""
    if request.model not in models.MODELS:
        raise UserError(f"--model {request.model!r}: the models here are {', '.join(models.MODELS)}")
    name = request.recipe or recipes.default(request.model)
    return name, settings.change(recipes.find(name, request.model), request.settings)


def remark(request: Request, names: Collection[str]) -> None:
    """Say on stderr what lr is, where it is not the rate of the large matrices."""
    if said := settings.remark(names, recipe_of(request)[1]):
        print(f"sweep.py: {said}", file=sys.stderr)


def grid(base: Request, folder: Path, words: Sequence[str], seeds: Sequence[int], folds: int = 0) -> list[Job]:
    """Plan the runs of every combination of values, seeds and folds, each in a folder below `folder`.

    words: name=value,value of settings.parse_grid; base: everything else. folds: 0, or how many; each is trained.
    The runs of one seed come before those of the next, so that a part of a sweep compares all values.
    Raises UserError for values that the recipe cannot have.
    """
    _, recipe = recipe_of(base)
    values = settings.parse_grid(words, recipe)
    places: list[str | None] = [f"{number}/{folds}" for number in range(1, folds + 1)]
    combinations = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    trained = [settings.change(recipe, {**base.settings, **each}) for each in combinations]
    for this, one in zip(combinations, trained, strict=True):
        if trained.count(one) > 1:
            words = " ".join(settings.written(*each) for each in this.items())
            raise UserError(f"--set: two combinations are the same training, one of them {words}: leave one out")
    return [
        job(replace(base, seed=seed, fold=fold, settings={**base.settings, **chosen}), folder)
        for seed in seeds
        for fold in places or [base.fold]
        for chosen in combinations
    ]


def job(request: Request, folder: Path, name: str | None = None) -> Job:
    """Plan the run of a request, in a folder of that name or of a name that tells what was set."""
    _, recipe = recipe_of(request)
    name = name or name_of(request)
    return Job(name, replace(request, checkpoint_dir=folder / name, resume=True), recipe.epochs)


def name_of(request: Request) -> str:
    """Name a run by all that was set, such as "cnn-fast-muon_lr=0.03-flip=false-seed=2"."""
    name, _ = recipe_of(request)
    order = [*Recipe._fields, *data.AUGMENTATIONS].index
    given = sorted(request.settings.items(), key=lambda each: order(each[0]))
    words = [f"{key}={_short(settings.written(key, value), len(key) + 1)}" for key, value in given]
    values = "-".join(words)
    values = values if len(values) <= LONGEST_NAME else f"{len(words)}-values-{_digest(values)}"
    fold = f"fold={recipes.fold_name(request.fold)}" if request.fold else ""
    return "-".join(filter(None, [request.model, name, values, fold, f"seed={request.seed}"]))


def _short(written: str, start: int) -> str:
    """Return the value of a setting as a part of a file's name; of a long or odd one its SHA-256."""
    text = written[start:]
    plain = text.removeprefix("[").removesuffix("]") if "," in text else text
    return plain if re.fullmatch(rf"[\w.,+-]{{1,{LONGEST}}}", plain) else _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- checks before any work ------------------------------------------------------------------------------


class Facts:
    """What runs will record, known before any work. Images are loaded once for each way to split them."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(self, request: Request) -> dict[str, Any]:
        """Return the flags, seed, code and images of a run. Raises UserError where it cannot be trained as asked."""
        with contextlib.redirect_stderr(io.StringIO()) if self._images else contextlib.nullcontext():  # said once
            planned = plan.new(request)
        names = plan.splits_of(planned.flags)
        if names not in self._images:
            splits = load(*names, data_dir=request.data_dir, other_data=request.other_data)
            self._images[names] = {"data": splits[0].source, "data_sha256": data.fingerprint(*splits)}
        origin = {"model": request.model, "seed": planned.seed, "code": code_key(request.model)}
        return {**planned.flags, **origin, **self._images[names]}


def check(jobs: Sequence[Job]) -> None:
    """Raise UserError where a run cannot be trained as asked, or where its folder holds another run."""
    facts = Facts()
    for folder in {each.folder.parent for each in jobs}:
        files.check_folder(folder)
    for each in jobs:
        wanted, begun = facts.of(each.request), _begun(each)
        if not begun:
            continue
        found = begun | recipes.upgrade(begun["flags"])
        if other := [key for key in wanted if found.get(key) != wanted[key]]:
            raise UserError(
                f"{cli.shown(each.folder)} holds a run of {different(other[0])}: give this sweep another --dir, or "
                "move that folder away"
            )


def different(key: str) -> str:
    """Say in words that this fact of a run is different."""
    return OTHER.get(key, f"another {key}")


def _begun(job: Job) -> dict[str, Any] | None:
    """Return the history of the run that a folder holds, finished or not. Raises UserError where it is damaged."""
    if saved := record.load_unfinished(job.request.path):
        history: dict[str, Any] = saved["history"]
        return history
    path = record.history_path(job.request.path)
    return record.read_history(path) if path.exists() else None
