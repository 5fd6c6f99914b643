"""What a training is to do: the flags that were asked for, and the run that they begin or continue.

plan = plan.find(plan.Request(model="cnn", recipe="best", seed=1), target, stack)
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data
import recipes
from runtime import cli, device, distributed
from runtime.errors import UserError, one_line
from runtime.schema import problem
from training import distill, record, settings
from training.record import RunError, unfinished_path

FLAG_OF = {"muon_lr": "--lr", "teachers": "--teacher"}  # where a flag's name differs from the recorded one


@dataclass(frozen=True)
class Request:
    """What is asked for: the flags of train.py. None leaves a value to the recipe, or to the run that is resumed."""

    model: str
    recipe: str | None = None
    teacher: tuple[Path, ...] | list[Path] | None = None
    mean: float | None = None  # of bare state_dicts among the teachers, with std
    std: float | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    seed: int | None = None
    select: str | None = None
    precision: str | None = None
    deterministic: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # other values of the recipe, of training.settings
    fold: str | None = None  # "2/5" or "val": the training images held out in place of the test set
    checkpoint_dir: Path = cli.CHECKPOINTS
    resume: bool = False
    save_every: float = 30.0  # seconds
    tensorboard: Path | None = None
    data_dir: str | Path | None = None
    other_data: bool = False
    device: str = "auto"

    @property
    def path(self) -> Path:
        """Where the best epoch's checkpoint goes."""
        return self.checkpoint_dir / f"best_{self.model}_fmnist.pt"


class Plan(NamedTuple):
    """What is to be done: the flags of the run as they are recorded, its seed, and its saved state if it is resumed."""

    flags: dict[str, Any]
    seed: int
    saved: dict[str, Any] | None


def find(request: Request, target: torch.device, stack: contextlib.ExitStack) -> Plan | None:
    """Reserve the place of the checkpoint until the stack ends, and plan the run.

    Returns None where --resume finds the run finished.
    Raises UserError where an unfinished run is not to be resumed, or not with these flags.
    """
    request.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(record.sole_writer(request.path))  # where nothing can be written, this fails now
    saved = record.load_unfinished(request.path)
    resume = request.resume or distributed.restarted()
    if saved and not resume:
        raise RunError(_unfinished(request.path, saved))
    if saved and saved["history"]["model"] != request.model:
        raise RunError(f"{cli.shown(unfinished_path(request.path))} holds a run of another model: move it away")
    earlier = saved["history"] if saved else record.history_of(request.path) if resume else None
    if earlier and (saved or earlier["status"] == "finished"):
        begun = recipes.upgrade(earlier["flags"]) | {"seed": earlier["seed"]}
        asked = _asked_for(request, target, recipes.Recipe(**{key: begun[key] for key in recipes.Recipe._fields}))
        other = [key for key in asked if asked[key] != begun.get(key)]
        if not other and saved:
            check_flags(earlier["flags"], unfinished := cli.shown(unfinished_path(request.path)))
            _try_augmentations(earlier["flags"]["augment"], unfinished)
            return Plan(earlier["flags"], earlier["seed"], saved)
        if not other:
            return None
        if saved:
            raise RunError(_another_run(other[0], begun, asked, request.settings))
    if request.resume:
        print(
            f"train.py: no run is unfinished in {cli.shown(request.checkpoint_dir)}: a new one begins", file=sys.stderr
        )
    return _new_run(request, target)


def new(request: Request) -> Plan:
    """Plan a run from its beginning, whatever its folder holds. Raises UserError where it cannot be trained so."""
    plan = _new_run(request, device.pick_device(request.device))
    _try_augmentations(plan.flags["augment"], "--set")
    return plan


def splits_of(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the splits of data.load that a run of these flags reads. A fold run does not read the test set."""
    if flags["fold"]:
        return ("train+val",)
    return ("train", "val", "test") if flags["select"] == "val" else ("train+val", "test")


def _asked_for(request: Request, target: torch.device, own: recipes.Recipe) -> dict[str, Any]:
    """Collect the flags that were given, by the names under which a run records them. own: the recipe they change."""
    recipe = settings.change(own, request.settings)
    given: dict[str, Any] = {
        "recipe": request.recipe,
        "epochs": request.epochs,
        "muon_lr" if recipe.optimizer == "muon" else "lr": request.lr,
        "batch_size": request.batch_size,
        "select": request.select,
        "precision": request.precision,
        "deterministic": request.deterministic or None,
        "seed": request.seed,
        "teachers": distill.describe(request.teacher or (), request.mean, request.std) or None,
        "fold": request.fold,
    }
    asked = {key: value for key, value in given.items() if value is not None}
    if twice := [key for key in asked if key in request.settings]:
        raise RunError(f"{_flag(twice[0])} and --set {twice[0]} are the same value: leave one of them out")
    asked |= settings.named(request.settings, own, recipe)
    if "precision" in asked:
        asked["precision"] = device.dtype_name(device.pick_precision(asked["precision"], target))
    if request.fold:
        recipes.fold_of(request.fold)
    return asked


def _new_run(request: Request, target: torch.device) -> Plan:
    """Plan a run from its beginning: a recipe's values, changed by the flags."""
    name = request.recipe or recipes.default(request.model)
    recipe = recipes.find(name, request.model)
    if request.model not in recipes.RECIPES[name]:
        print(
            f"train.py: recipes.py has no row of recipe {name} for {request.model}; it is trained by the row for "
            f"{recipes.FALLBACK}",
            file=sys.stderr,
        )
    asked: dict[str, Any] = {"precision": device.dtype_name(device.pick_precision(recipe.precision, target))}
    asked |= _asked_for(request, target, recipe)
    seed = asked.pop("seed", 0)
    usual = {"recipe": name, **recipe._asdict(), "deterministic": False, "teachers": [], "fold": None}
    flags = json.loads(json.dumps(usual | asked))  # as they are read back
    check_flags(flags, "recipes.py")
    distill.check_folds(flags)
    return Plan(flags, seed, None)


def check_flags(flags: dict[str, Any], place: str) -> None:
    """Raise UserError for flags by which no run can be trained and read back; place: what the error names."""
    if wrong := problem(flags, recipes.FLAGS):
        raise UserError(f"{place}: {wrong}")
    if bool(flags["teachers"]) != bool(flags["distillation"]):
        raise distill.TeacherError("--recipe distilled and --teacher CHECKPOINT go together")
    if flags["select"] == "val" and any(teacher["select"] != "val" for teacher in flags["teachers"]):
        raise distill.TeacherError("--select val: a teacher was trained on the validation images and would reveal them")


def _try_augmentations(values: dict[str, Any], place: str) -> None:
    """Raise UserError where the augmentations that a file records cannot be applied; place: what the error names."""
    data.check_values(values, f"{place}: ")
    try:
        data.augment(torch.zeros(1, 28, 28, dtype=torch.uint8), values)
    except (IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{place}: augment is {json.dumps(values)[:100]}: {one_line(error)}") from None


def _unfinished(path: Path, saved: dict[str, Any]) -> str:
    history = saved["history"]
    return (
        f"{cli.shown(unfinished_path(path))} holds an unfinished run (recipe {history['flags']['recipe']}, seed "
        f"{history['seed']}, in epoch {saved['training']['epoch']} of {history['flags']['epochs']}): --resume "
        "continues it; to give it up, delete that file"
    )


def _another_run(key: str, begun: dict[str, Any], asked: dict[str, Any], given: Mapping[str, Any]) -> str:
    before, now = (
        [distill.named(each) for each in flags[key]] if key == "teachers" else flags[key] for flags in (begun, asked)
    )
    flag = f"--set {key}" if key in given or key == "augment" else _flag(key)
    return (
        f"--resume: {flag} was {'not given' if before is None else before} when this run began, and {now} would "
        "make it another run: leave the flag out"
    )


def _flag(key: str) -> str:
    """Name the flag that sets a recorded value."""
    return FLAG_OF.get(key, "--" + key.replace("_", "-"))
