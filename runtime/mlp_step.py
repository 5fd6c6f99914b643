"""A whole training step of a network with one hidden layer, in one compiled function: runtime/mlp_step.c.

step = mlp_step.find(model, adam)                 # None, where the network is another
if step:
    loss, logits = step(images, index, labels)    # without Adam, the gradients are left in parameter.grad

A step of the MLP is so short that PyTorch's way through a dozen operations takes most of it, and the more, the busier
the machine: after each, the threads wait for one another. The results differ from PyTorch's by rounding. They do not
depend on the number of threads.
"""

import ctypes
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

from optim import FusedAdam
from runtime import kernels

LANES = 16  # as in mlp_step.c: hidden units come in multiples of it
INPUTS, CLASSES = 28 * 28, 10
CHAIN = (  # the operations of models.MLP, each on the result of the one before
    ("placeholder", None),
    ("call_method", "flatten"),
    ("call_module", nn.Linear),
    ("call_function", F.relu),
    ("call_module", nn.Linear),
    ("output", "output"),
)


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
    """The step of one model, and of Adam where it trains that. Both keep their tensors for as long."""

    def __init__(self, first: nn.Linear, second: nn.Linear, adam: FusedAdam | None):
        self.parameters, self.adam = [first.weight, first.bias, second.weight, second.bias], adam
        self.sizes = first.in_features, first.out_features, second.out_features
        self.gradients = [torch.empty_like(parameter) for parameter in self.parameters]
        self.library = kernels.library("mlp_step")
        self.library.room.restype = ctypes.c_size_t
        self.threads = torch.get_num_threads()
        self.room = torch.empty(self.library.room(*self.sizes[:2], self.threads))
        self.places: list[int] = []  # of the weights in memory, and with them all that self.tensors names
        self.tensors = self._tensors()
        self.team = Team()

    def __call__(
        self, images: torch.Tensor, index: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of a batch, and take Adam's step if it is there.

        images: uint8 (any, 28, 28); index int64 (n,): which of them; labels int64 (n,): theirs. All are contiguous.
        Returns the mean loss in nats, float32 (), and the logits, float32 (n, 10).
        """
        if self.places != [parameter.data_ptr() for parameter in self.parameters]:  # others have been put in
            self.tensors = self._tensors()
        n, threads = len(index), 1 if self.team.alone else self.threads
        loss, logits = torch.empty(()), torch.empty(n, self.sizes[2])
        options = (ctypes.c_double * 4)(*self.adam.options()) if self.adam else None
        start = time.perf_counter()
        self.library.mlp_step(
            *map(_pointer, (images, index, labels)),
            *(self.tensors, options),
            *map(_pointer, (self.room, loss, logits)),
            *(n, *self.sizes, threads),
        )
        self.team.took(time.perf_counter() - start)
        for parameter, gradient in () if self.adam else zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return loss, logits

    def _tensors(self) -> ctypes.Array:
        """Return where each weight, Adam's state of it, and its gradient are."""
        self.places = [parameter.data_ptr() for parameter in self.parameters]
        states = [[gradient] * 3 for gradient in self.gradients]  # without Adam; not used then
        if self.adam:
            states = [[state[name] for name in self.adam.STATE] for state in self.adam.states(self.parameters)]
        rows = zip(self.parameters, states, self.gradients, strict=True)
        pointers = [each.data_ptr() for weight, state, gradient in rows for each in (weight, *state, gradient)]
        return (ctypes.c_void_p * len(pointers))(*pointers)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def find(model: nn.Module, adam: FusedAdam | None) -> Step | None:
    """Return the step for a model on the CPU that computes what models.MLP does, in any sizes; None for any other.

    Raises KernelError where the step cannot be compiled.
    """
    parameters = list(model.parameters())
    hidden = len(parameters[0]) if parameters else 0
    shapes = [(hidden, INPUTS), (hidden,), (CLASSES, hidden), (CLASSES,)]
    fits = len(parameters) == len(shapes) and hidden % LANES == 0 and not any(True for _ in model.buffers())
    if not fits or not all(map(kernels.is_weight, parameters, shapes)) or not all(p.requires_grad for p in parameters):
        return None
    layers = None if any(map(kernels.is_hooked, model.modules())) else _layers(model)
    return Step(layers[0], layers[1], adam) if layers else None


def _layers(model: nn.Module) -> list[nn.Linear] | None:
    """Return the two layers where a model's operations, as torch.fx records them, are those of CHAIN."""
    from torch import fx

    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
        modules = [model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    except Exception:  # a forward that cannot be recorded is another one
        return None
    layers = [module for module in modules if type(module) is nn.Linear]
    if len(nodes) != len(CHAIN) or len(layers) != len(modules):
        return None
    arguments = [(), *((node,) for node in nodes[:-1])]
    arguments[1] += (1,)  # flatten from this dimension on
    for node, (kind, target), expected in zip(nodes, CHAIN, arguments, strict=True):
        same = node.op == kind and (kind in ("placeholder", "call_module") or node.target == target)
        if not same or node.args != expected or {**node.kwargs} not in ({}, {"inplace": False}):
            return None
    return layers
