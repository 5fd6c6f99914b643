"""A whole training step of a network with one hidden layer, in one compiled function: runtime/mlp_step.c.

step = mlp_step.find(model, adam, team)           # None, where the network is another
if step:
    loss, logits = step(images, index, labels)    # without Adam, the gradients are left in parameter.grad

A step of the MLP is so short that PyTorch's way through a dozen operations takes most of it, and the more, the busier
the machine: after each, the threads wait for one another. The results differ from PyTorch's by rounding. They do not
depend on the number of threads.
"""

import copy
import ctypes
import math
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optim import FusedAdam
from runtime import kernels

LANES = 16  # hidden units come in multiples of it: a multiple of WIDE in mlp_step.c, on any processor
INPUTS, CLASSES = 28 * 28, 10


class Team:
    """Chooses between all threads and one, by what calls have lately taken; the results are the same.

    Beside a busy process a thread often waits for another that does not run, and then one alone is faster.
    """

    TRIAL = 16  # calls that are timed together
    SHORTEST, LONGEST = 8, 64  # such trials between two looks at the other choice

    def __init__(self) -> None:
        self.alone = False
        self.seconds: list[float] = []  # of this trial's calls
        self.usual = math.inf  # mean of the present choice when it was made
        self.looking = False  # whether this trial is of the other choice
        self.trials, self.patience = 0, self.SHORTEST  # since the last look, and until the next one

    def took(self, seconds: float) -> None:
        """Note what a call took, and choose for the next one."""
        self.seconds.append(seconds)
        if len(self.seconds) < self.TRIAL:
            return
        mean, self.seconds, self.trials = sum(self.seconds) / self.TRIAL, [], self.trials + 1
        if self.looking:
            better, self.looking, self.trials = mean < self.usual, False, 0
            self.patience = self.SHORTEST if better else min(2 * self.patience, self.LONGEST)
            self.alone = self.alone if better else not self.alone
            self.usual = min(self.usual, mean)
        elif self.trials >= self.patience or mean > 1.5 * self.usual:
            self.usual, self.looking, self.alone = mean, True, not self.alone


class Step:
    """The step of one model, and of Adam where it trains that."""

    def __init__(self, parameters: list[nn.Parameter], adam: FusedAdam | None, team: Team):
        self.parameters, self.adam, self.team = parameters, adam, team
        self.gradients = [torch.empty_like(parameter) for parameter in parameters]
        self.tensors = self._tensors()
        self.library = kernels.library("mlp_step")
        self.library.room.restype = ctypes.c_size_t
        self.hidden, self.room = len(parameters[0]), torch.empty(0)

    def __deepcopy__(self, memo: dict) -> "Step":
        return Step(*copy.deepcopy((self.parameters, self.adam, self.team), memo))

    def __call__(
        self, images: torch.Tensor, index: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of a batch, and take Adam's step if it is there.

        images: uint8 (any, 28, 28); index int64 (n,): which of them; labels int64 (n,): theirs, from 0 to 9. All are
        contiguous. Returns the mean loss in nats, float32 (), and the logits, float32 (n, 10).
        """
        n, threads = len(index), 1 if self.team.alone else torch.get_num_threads()
        if len(self.room) < (room := self.library.room(INPUTS, self.hidden, threads)):
            self.room = torch.empty(room, dtype=torch.float32)
        loss, logits = torch.empty((), dtype=torch.float32), torch.empty(n, CLASSES, dtype=torch.float32)
        options = (ctypes.c_double * 4)(*self.adam.options()) if self.adam else None
        places = (ctypes.c_void_p * len(self.tensors))(*[each.data_ptr() for each in self.tensors])
        start = time.perf_counter()
        self.library.mlp_step(
            *(*map(_pointer, (images, index, labels)), places, options),
            *map(_pointer, (self.room, loss, logits)),
            *(n, INPUTS, self.hidden, CLASSES, threads),
        )
        self.team.took(time.perf_counter() - start)
        for parameter, gradient in () if self.adam else zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return loss, logits

    def _tensors(self) -> list[torch.Tensor]:
        """Return each weight, Adam's state of it, and its gradient."""
        states = [[gradient] * 3 for gradient in self.gradients]  # without Adam; not used then
        if self.adam:
            states = [[state[name] for name in self.adam.STATE] for state in self.adam.states(self.parameters)]
        rows = zip(self.parameters, states, self.gradients, strict=True)
        return [each for weight, state, gradient in rows for each in (weight, *state, gradient)]


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def find(model: nn.Module, adam: FusedAdam | None, team: Team) -> Step | None:
    """Return the step for a model on the CPU that computes what models.MLP does, in any size; None for any other.

    Ask again after anything of the model has changed. What this does not see, such as an edit of PyTorch's functions,
    only a trial shows: engine.py makes one. Raises KernelError where the step cannot be compiled.
    """
    parameters, hidden = list(model.parameters()), getattr(getattr(model, "fc1", None), "out_features", 0)
    if not _is_mlp(model) or hidden % LANES or torch.is_autocast_enabled("cpu"):
        return None
    shapes = [(hidden, INPUTS), (hidden,), (CLASSES, hidden), (CLASSES,)]
    fit = len(parameters) == len(shapes) and all(map(kernels.is_weight, parameters, shapes))
    if not fit or not all(map(_is_plain, parameters)) or (adam and not _is_even(adam, parameters)):
        return None
    kernels.library("mlp_step")
    return Step(parameters, adam, team)


class _Plain(nn.Module):
    """A network that computes what models.MLP does; only its code is used."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self: Any, images: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, 10)."""
        return self.fc2(F.relu(self.fc1(images.flatten(1))))


def _is_mlp(model: nn.Module) -> bool:
    """Say whether a model calls two linear layers as _Plain does, and does nothing else with a method or a hook."""
    kinds = type(model).__mro__[: type(model).__mro__.index(nn.Module)]
    if any(vars(kind).keys() - vars(_Plain).keys() for kind in kinds) or vars(model).keys() != vars(_Plain()).keys():
        return False
    forward, expected = getattr(type(model).forward, "__code__", None), _Plain.forward.__code__
    if forward is None or any(map(kernels.is_hooked, model.modules())):
        return False
    same = all(getattr(forward, part) == getattr(expected, part) for part in ("co_code", "co_names"))
    same = same and forward.co_consts[1:] == expected.co_consts[1:]  # the first is the docstring
    names = type(model).forward.__globals__
    layers = dict(model.named_children())
    linear = layers.keys() == {"fc1", "fc2"} and all(map(_is_linear, layers.values()))
    return same and names.get("F") is F and linear and not any(True for _ in model.buffers())


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and vars(layer).keys() == vars(nn.Linear(1, 1)).keys()


def _is_plain(parameter: nn.Parameter) -> bool:
    """Say whether a parameter is trained, lies in memory in its order, and has no hook."""
    hooked = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.requires_grad and parameter.is_contiguous() and not hooked


def _is_even(adam: FusedAdam, parameters: list[nn.Parameter]) -> bool:
    """Say whether Adam has counted the same steps for all parameters, and nothing is put around its step."""
    if type(adam) is not FusedAdam or "step" in vars(adam):
        return False
    steps = {state["step"].item() for state in adam.states(parameters)}
    return len(steps) == 1 and not adam._optimizer_step_pre_hooks and not adam._optimizer_step_post_hooks
