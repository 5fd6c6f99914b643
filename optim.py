"""The optimisers, and the schedule of their learning rates.

optimizers = optim.build_optimizers(model, recipe)
optim.set_rates(optimizers, optim.rate(recipe, step, steps))
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.adam import adam

from recipes import Recipe
from runtime.errors import UserError

# Muon takes the weights whose matrix has at least so many rows and columns: not the first 3x3 convolution, whose rows
# have 9 values, nor the last layer, which has 10 rows.
MATRIX_SIDE = 32

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c, tuned by Jordan for the steepest rise from 0
NEWTON_SCHULZ_STEPS = 3  # enough here, as in cifar10-airbench; Jordan takes 5
WITHOUT_BFLOAT16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")  # of oneDNN
NORM_EPS = 1e-14  # of a gradient that is zero
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


def multiplies_bfloat16(capabilities: Mapping[str, Any], environment: Mapping[str, str], onednn: bool) -> bool:
    """Say whether PyTorch multiplies bfloat16 natively on a processor; if not, it emulates it slowly.

    capabilities: of torch.cpu.get_capabilities. onednn: whether PyTorch uses oneDNN, which does the multiplication.
    ONEDNN_MAX_CPU_ISA, or its older name, can forbid oneDNN the instructions that the processor has; oneDNN ignores
    values that it does not know. ATEN_CPU_CAPABILITY does not concern it.
    """
    highest = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    has = any(capabilities.get(name) is True for name in ("avx512_bf16", "amx_bf16"))
    return onednn and has and highest.lower() not in WITHOUT_BFLOAT16


NATIVE_BFLOAT16 = multiplies_bfloat16(
    torch.cpu.get_capabilities(),
    os.environ,
    torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled),
)


class Optimizer(torch.optim.Optimizer):
    """PyTorch's, without the wrappers that load its compiler on their first call: a second or two of every start."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__  # type: ignore[attr-defined]


class FusedAdam(Optimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) by PyTorch's fused kernel, called directly.

    The checks that torch.optim.Adam makes around each step take a tenth of the MLP's epoch. Numbers and state are the
    same. It has one group of parameters, and no option but the learning rate.
    """

    STATE = ("step", "exp_avg", "exp_avg_sq")  # what it keeps for each parameter

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float):
        super().__init__(parameters, {"lr": lr, "fused": True})  # load_state_dict then takes `step` to the device

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:  # all are frozen or unused in this step
            return
        states = self.states(parameters)
        adam(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            lr=group["lr"],
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )

    def states(self, parameters: Iterable[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Return the state of each of these parameters; it begins with zeros."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return [self.state[parameter] for parameter in parameters]

    def options(self) -> tuple[float, ...]:
        """Return learning rate, beta1, beta2 and epsilon, for a kernel that takes a step in this one's place."""
        (group,) = self.param_groups
        return group["lr"], *BETAS, EPS


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): the update is the orthogonalised momentum.

    So every direction of a weight matrix moves by the same amount, however small its gradient. A convolution's weight
    is a matrix with a row for each output channel. torch.optim.Muon does not accept convolutions, and it iterates on
    the whole matrix in bfloat16, which most processors emulate.
    """

    STATE = ("momentum",)

    def __init__(self, weights: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(state["momentum"], momentum).flatten(1)  # as Nesterov's
                rows, columns = update.shape
                if decay:
                    weight.mul_(1 - lr * decay)
                weight.add_(orthogonalise(update).view_as(weight), alpha=-lr * max(1, rows / columns) ** 0.5)


class WhitenedInputs:
    """Lets the optimisers train a linear layer as if its inputs were whitened. The layer itself stays as it is.

    For the inputs x of the layer W x + b, they train V and c of V z + c, which is the same for z = P (x - mean),
    W = V P and b = c - W mean. P shrinks the directions of more variance than `limit` to it, and leaves the others.
    Then no direction dominates the gradient, so fewer and larger steps suffice. Natural neural networks (Desjardins et
    al. 2015, arXiv:1507.00210) scale all directions.
    If the layer gets other inputs than those measured, this still trains it, but without that gain.
    """

    def __init__(self, layer: torch.nn.Linear, inputs: torch.Tensor, limit: float):
        """Measure the inputs float32 (n, features). Some 200 are enough; the time grows with n cubed."""
        device, inputs = layer.weight.device, inputs.cpu()
        mean = inputs.mean(0)
        centred = inputs - mean
        variances, mixtures = torch.linalg.eigh(centred @ centred.T / max(1, len(inputs) - 1))
        large = variances > max(limit, 1e-5 * variances[-1].item())  # smaller ones are rounding
        directions = torch.nn.functional.normalize(centred.T @ mixtures[:, large], dim=0)
        shrunk = 1 - (limit / variances[large]).sqrt()
        self.layer, self.mean, self.directions, self.shrunk = layer, *(x.to(device) for x in (mean, directions, shrunk))
        self.before = torch.empty_like(layer.weight)

    def _shrink(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix - (matrix @ self.directions * self.shrunk) @ self.directions.T  # matrix P

    @torch.no_grad()
    def __enter__(self) -> None:
        """Turn the layer's gradient into that of V, before the optimisers step."""
        self.before.copy_(self.layer.weight)
        gradient, of_bias = self.layer.weight.grad, self.layer.bias.grad
        if gradient is not None and of_bias is not None:  # it is used in this step
            gradient.copy_(self._shrink(gradient.addr(of_bias, self.mean, alpha=-1)))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        """Turn the step that they took with V and c into one with W and b."""
        weight, bias = self.layer.weight, self.layer.bias
        change = self._shrink(weight - self.before)
        weight.copy_(self.before + change)
        bias.sub_(change @ self.mean)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a matrix float32 (rows, columns) near 1: from U S V^T to about U V^T.

    These are Jordan's Newton-Schulz iterations X <- (a + b G + c G^2) X with G = X X^T. Only the product of the
    polynomials is needed, so they run on G alone, whose side is the shorter one, in float32. The two products with the
    whole matrix take bfloat16 factors where the processor multiplies them natively.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.t()).t()
    gram = _product(matrix, matrix.t())
    squared_norm = gram.diagonal().sum() + NORM_EPS
    gram = gram / squared_norm
    product: torch.Tensor | None = None
    for iteration in range(NEWTON_SCHULZ_STEPS):
        polynomial = torch.addmm(gram, gram, gram, beta=NEWTON_SCHULZ[1], alpha=NEWTON_SCHULZ[2])
        polynomial.diagonal().add_(NEWTON_SCHULZ[0])
        product = polynomial if product is None else polynomial @ product
        if iteration < NEWTON_SCHULZ_STEPS - 1:
            gram = polynomial @ (polynomial @ gram)  # of polynomial @ X, as the factors commute
    assert product is not None
    return _product(product * squared_norm.rsqrt(), matrix)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply float32 matrices, with factors rounded to bfloat16 where that is faster and sums in float32."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16" if NATIVE_BFLOAT16 else "ieee"
    try:
        return a @ b
    finally:
        settings.fp32_precision = before


def build_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[Any]:
    """Build the optimisers of a recipe: FusedAdam, or Muon and FusedAdam. Each parameter is in one of them.

    One that would have no parameter is left out.

    Raises UserError for another optimiser, and for values that Adam does not use.
    """
    if recipe.optimizer == "adam":
        if recipe.weight_decay or recipe.muon_lr:
            raise UserError('recipes.py: weight_decay and muon_lr need optimizer="muon"')
        return [FusedAdam(model.parameters(), recipe.lr)]
    if recipe.optimizer != "muon":
        raise UserError(f"recipes.py: optimizer {recipe.optimizer!r} is not in optim.py, which has adam and muon")
    matrices = [weight for weight in model.parameters() if weight.ndim > 1 and _smaller_side(weight) >= MATRIX_SIDE]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    muon = [Muon(matrices, recipe.muon_lr, recipe.weight_decay)] if matrices else []
    return muon + ([FusedAdam(others, recipe.lr)] if others else [])


def _smaller_side(weight: torch.Tensor) -> int:
    return min(weight.flatten(1).shape)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate at a step (0 to steps - 1) as a share of the recipe's: constant, or a triangle."""
    if recipe.warmup is None:
        return 1.0
    done, peak = step / steps, recipe.warmup
    return done / peak if done < peak else (1 - done) / (1 - peak)


def set_rates(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set the learning rate of every group of parameters to a share of its initial one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])
