"""The optimisers and the schedule of their learning rates.

optimizers = optim.build_optimizers(model, recipe)
optim.set_rates(optimizers, optim.rate(recipe, step, steps))
"""

import torch
from torch.optim.adam import adam

MATRIX_SIDE = 32  # Muon takes the weights whose matrix has at least so many rows and columns: not the first 3x3
# convolution, whose rows have 9 values, nor the last layer, of 10 rows

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c, tuned in that post for the steepest rise from 0
NEWTON_SCHULZ_STEPS = 3  # enough here, as in cifar10-airbench; the post takes 5
NATIVE_BFLOAT16 = bool(  # does this processor multiply it natively? Else PyTorch emulates it, slowly
    {("avx512_bf16", True), ("amx_bf16", True)} & torch.cpu.get_capabilities().items()
)
NORM_EPS = 1e-14  # of a gradient that is zero


class Optimizer(torch.optim.Optimizer):
    """PyTorch's, without the wrappers that load its compiler on their first call: a second or two of every start."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__


class FusedAdam(Optimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) on PyTorch's fused kernel, called without detours.

    The checks that torch.optim.Adam makes around each step are a tenth of the MLP's epoch; its numbers and its state
    are the same. One group of parameters, and no option but the learning rate.
    """

    STATE = ("step", "exp_avg", "exp_avg_sq")  # what it keeps for each parameter

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "fused": True})  # load_state_dict then takes `step` to the device

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adam(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            lr=group["lr"],
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum, made orthogonal, is the update.

    Every direction of a weight matrix then moves alike, however small its gradient. A convolution's weight is the
    matrix with a row for each output channel. torch.optim.Muon takes no convolutions, and iterates on the whole
    matrix in bfloat16, which most processors emulate.
    """

    STATE = ("momentum",)

    def __init__(self, weights, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(state["momentum"], momentum).flatten(1)  # as Nesterov's
                rows, columns = update.shape
                if decay:
                    weight.mul_(1 - lr * decay)
                weight.add_(orthogonalise(update).view_as(weight), alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonalise(matrix):
    """The matrix float32 (rows, columns) with its singular values brought near 1: U V^T, roughly, of its U S V^T.

    By Jordan's Newton-Schulz iterations X <- (a + b G + c G^2) X, where G = X X^T. As only the product of those
    polynomials is needed, and X at no point between, they run on G alone, of the shorter side squared, in float32.
    Only the two products with the whole matrix take bfloat16 factors, where the processor has them.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.t()).t()
    gram = _product(matrix, matrix.t())
    squared_norm = gram.diagonal().sum() + NORM_EPS
    gram, product = gram / squared_norm, None
    for iteration in range(NEWTON_SCHULZ_STEPS):
        polynomial = torch.addmm(gram, gram, gram, beta=NEWTON_SCHULZ[1], alpha=NEWTON_SCHULZ[2])
        polynomial.diagonal().add_(NEWTON_SCHULZ[0])
        product = polynomial if product is None else polynomial @ product
        if iteration < NEWTON_SCHULZ_STEPS - 1:
            gram = polynomial @ (polynomial @ gram)  # of polynomial @ X, as the factors commute
    return _product(product * squared_norm.rsqrt(), matrix)


def _product(a, b):
    """a @ b of float32 matrices, the factors rounded to bfloat16 where that is faster, the sums in float32."""
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16" if NATIVE_BFLOAT16 else "ieee"
    try:
        return a @ b
    finally:
        settings.fp32_precision = before


def build_optimizers(model, recipe):
    """The optimisers of a recipe, a list; each parameter of the model is in one of them."""
    if recipe.optimizer == "adam":
        return [FusedAdam(model.parameters(), recipe.lr)]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1 and _smaller_side(weight) >= MATRIX_SIDE]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    return [Muon(matrices, recipe.muon_lr, recipe.weight_decay), FusedAdam(others, recipe.lr)]


def _smaller_side(weight):
    return min(len(weight), weight[0].numel())


def rate(recipe, step, steps):
    """The learning rate of step 0 to steps - 1 as a share of the recipe's: constant, or a triangle."""
    if recipe.warmup is None:
        return 1.0
    done, peak = step / steps, recipe.warmup
    return done / peak if done < peak else (1 - done) / (1 - peak)


def set_rates(optimizers, share):
    """Give every group of parameters that share of the learning rate it began with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])
