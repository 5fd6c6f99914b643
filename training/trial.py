"""A trial before a training: a model that cannot be trained, or not be read back, is one line before the work.

trial.check("cnn", recipe, train, precision)
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint
import data
import engine
import models
import optim
from recipes import Recipe
from runtime import cli, distributed
from runtime.errors import UserError, one_line

ROUNDING = 1e-3  # of logits, by the faster operations of runtime/kernels.py and by other devices
FAULTS = (RuntimeError, ValueError, AssertionError)  # what PyTorch raises for shapes; others are bugs
LONGEST = 300  # characters of what PyTorch says
WANTED = "it must turn images float32 (n, 1, 28, 28) into logits (n, 10)"


class TrialError(UserError):
    """A model that cannot be trained, or whose checkpoint could not be read back."""


def check(name: str, recipe: Recipe, train: data.Split, precision: torch.dtype) -> None:
    """Take steps with a model of that name, built for this alone, and read back what a checkpoint would hold of it.

    It gets two training images, and as few as the smallest batch of an epoch has. Consumes random numbers.
    Raises TrialError where PyTorch refuses; a bug in the model keeps its traceback.
    """
    with _explained(f"{name} cannot be built"):
        model = models.build(name).to(train.labels.device)
    if any(parameter.is_complex() or parameter.is_sparse for parameter in model.parameters()):
        raise TrialError(f"models.py: {name} has complex or sparse parameters, which optim.py cannot train")
    few = _fewest(recipe, len(train.labels))
    for n in dict.fromkeys((min(2, recipe.batch_size), *([few] if few < 2 else []))):
        hint = f", the smallest batch: another --batch-size may help; else {WANTED}" if n == few < 2 else f"; {WANTED}"
        with _explained(f"{name} cannot be trained on a batch of {cli.counted(n, 'image')}{hint}"):
            _step(name, model, recipe, train._replace(images=train.images[:n], labels=train.labels[:n]), precision)
    _read_back(name, model, train)


def _fewest(recipe: Recipe, n: int) -> int:
    """Return the least number of images that this process gets of a batch of an epoch of n images."""
    last = 1 if recipe.prune else n % recipe.batch_size or recipe.batch_size
    part = data.share(last, distributed.rank(), distributed.world())
    return part.stop - part.start


def _step(name: str, model: nn.Module, recipe: Recipe, few: data.Split, precision: torch.dtype) -> None:
    """Take a step of a recipe with a few images, and classify them."""
    n, device = len(few.labels), few.labels.device
    autocast = precision is not torch.float32
    with torch.autocast(device.type, precision) if autocast else contextlib.nullcontext():
        logits = model.train()(data.normalise(few.images, precision))
    _check_logits(name, logits, n)
    if not logits.requires_grad:
        raise TrialError(
            f"models.py: {name} has no parameter to train: its logits depend on none that needs a gradient"
        )
    answers = torch.zeros(n, len(data.CLASSES), device=device) if recipe.distillation else None
    engine.loss_of(logits.float(), few.labels, answers, recipe, "sum").backward()
    for optimizer in optim.build_optimizers(model, recipe):
        optimizer.step()
    with torch.no_grad():
        _check_logits(name, model.eval()(data.normalise(few.images)), n)


def _check_logits(name: str, logits: Any, n: int) -> None:
    if not isinstance(logits, torch.Tensor):
        raise TrialError(f"models.py: {name} returns a {type(logits).__name__}; {WANTED}")
    if logits.shape != (n, len(data.CLASSES)) or not logits.is_floating_point():
        found = f"{str(logits.dtype).removeprefix('torch.')} {tuple(logits.shape)}"
        raise TrialError(f"models.py: {name} returns {found} for {cli.counted(n, 'image')}; {WANTED}")


def _read_back(name: str, model: nn.Module, train: data.Split) -> None:
    """Read back what a checkpoint of a model holds."""
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TrialError(
                f"models.py: {name} keeps {key!r}, a {type(value).__name__}; a checkpoint holds tensors alone"
            )
    if not torch.isfinite(_logits(model, train)).all():
        return  # too high a learning rate, say: the training stops at it and says so
    with _explained(f"{name} cannot be saved and read back"):
        content = checkpoint.serialise(model, name=name, epoch=1, metrics={}, flags={}, seed=0, data=train.source)
        try:
            loaded, _ = checkpoint.from_content(Path(f"best_{name}_fmnist.pt"), content)
        except checkpoint.CheckpointError as error:
            _, _, why = str(error).partition(": ")  # the path before it is of no file
            raise TrialError(f"models.py: {name} cannot be saved and read back: {why}") from None
        compare(name, model, loaded, train)


def _logits(model: nn.Module, split: data.Split) -> torch.Tensor:
    torch.manual_seed(0)  # for a model that draws random numbers in its forward
    with torch.no_grad():
        return model.eval()(data.normalise(split.images[:4])).float()


def compare(name: str, model: nn.Module, loaded: nn.Module, split: data.Split) -> None:
    """Compare the logits of a model and of what was read back of it, for a few images of a split on its device.

    Sets both to evaluation mode, and the random numbers. Raises TrialError where they differ by more than rounding.
    """
    ours, theirs = (_logits(each, split) for each in (model, loaded.to(split.labels.device)))
    if not torch.allclose(ours, theirs, rtol=ROUNDING, atol=ROUNDING):
        raise TrialError(
            f"models.py: {name} answers otherwise once it is saved and read back: it uses values that its state_dict "
            "does not hold; keep them there with register_buffer(..., persistent=True)"
        )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what PyTorch raises into a TrialError that says what failed, why, and in which line of the user's code."""
    try:
        yield
    except RecursionError:
        raise
    except FAULTS as error:
        torchs = Path(torch.__file__).parent
        frames = [
            each for each in traceback.extract_tb(error.__traceback__) if torchs not in Path(each.filename).parents
        ]
        own = frames[-1].filename != __file__
        place = f" ({cli.shown(frames[-1].filename)}, line {frames[-1].lineno})" if own else ""
        why = one_line(error)[:LONGEST] or type(error).__name__
        raise TrialError(f"models.py: {what}: {why}{place}") from None
