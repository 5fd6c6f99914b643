"""The architectures, in plain PyTorch. A new model is one class and one line in MODELS.

model = models.build("cnn")
logits = model(images)          # float32 (n, 1, 28, 28) -> (n, 10)
"""

from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from runtime.errors import UserError


class MLP(nn.Module):
    """784 - 128 - 10 with ReLU: 101,770 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, 10) of images (n, 1, 28, 28)."""
        return self.fc2(F.relu(self.fc1(images.flatten(1))))


def conv_relu_pool(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution, ReLU and 2x2 max-pooling: (n, c, h, w) -> (n, channels, h // 2, w // 2)."""
    return F.max_pool2d(F.relu(conv(x)), 2)


class CNN(nn.Module):
    """Two 3x3 convolutions with ReLU and 2x2 max-pooling, 128 hidden units, dropout 0.3: 421,642 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)  # 28x28
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)  # 14x14
        self.conv_relu_pool = conv_relu_pool  # a training may put a faster one here: runtime/kernels.py
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.dropout = nn.Dropout(0.3)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, 10) of images (n, 1, 28, 28)."""
        x = self.conv_relu_pool(self.conv1, images)
        x = self.conv_relu_pool(self.conv2, x)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(self.dropout(x))


class ResNet(nn.Module):
    """A 3x3 convolution, then three stages: a convolution with pooling and batch normalisation, and a residual block.

    Ten convolutions and one linear layer, 1,940,938 parameters. A narrow version of the residual networks that David
    Page trained in seconds (2018, https://myrtle.ai/learn/how-to-train-your-resnet/).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)  # 28x28
        self.stages = nn.Sequential(
            Convolution(32, 64, pool=True),  # 28x28, to 14x14
            Residual(64),
            Convolution(64, 128, pool=True),  # 14x14, to 7x7
            Residual(128),
            Convolution(128, 256, pool=True),  # 7x7, to 3x3
            Residual(256),
        )
        self.fc = nn.Linear(256, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, 10) of images (n, 1, 28, 28)."""
        return self.fc(self.stages(F.relu(self.conv1(images))).amax((2, 3)))


class Convolution(nn.Module):
    """A 3x3 convolution, max-pooling if wanted, batch normalisation, ReLU: (n, inputs, h, w) -> (n, outputs, ...)."""

    def __init__(self, inputs: int, outputs: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers in the order above."""
        x = self.conv(x)
        if self.pool:
            x = F.max_pool2d(x, 2 + x.shape[-1] % 2, 2)  # 3x3 where the side is odd, so that no row or column is lost
        return F.relu(self.norm(x))


class Residual(nn.Module):
    """Two convolutions with a shortcut around them. In training, a tenth of the images take the shortcut alone.

    Stochastic depth: Huang et al. 2016, arXiv:1603.09382.
    """

    SKIPPED = 0.1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(Convolution(channels, channels), Convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the convolutions' output to the input."""
        y = self.convolutions(x)
        if self.training:
            taken = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.SKIPPED
            y = y * (taken / (1 - self.SKIPPED)).to(y.dtype)
        return x + y


MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
}


def build(name: str) -> nn.Module:
    """Build a freshly initialised model, in channels_last, which the kernels of CPUs and GPUs prefer.

    Lazy layers get their shapes and weights here, from an image.
    """
    model = MODELS[name]()
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        with torch.no_grad():
            model.eval()(torch.zeros(1, 1, 28, 28))
        model.train()
    return model.to(memory_format=torch.channels_last)


def first_layer(model: nn.Module) -> nn.Module | None:
    """Return the first module with weights, as a model lists them; None where there is none."""
    return next((module for module in model.modules() if hasattr(module, "weight")), None)


def is_linear_of(layer: nn.Module | None, images: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Say whether a layer is linear with a bias, all of it trained, and takes as many values as each image has."""
    return (
        type(layer) is nn.Linear
        and layer.in_features == images[0].numel()
        and layer.bias is not None
        and isinstance(layer.weight, nn.Parameter)  # not computed from others
        and all(parameter.requires_grad for parameter in layer.parameters())
    )


def whiten(model: nn.Module, images: torch.Tensor, added: float) -> None:
    """Let the first layer, a convolution, whiten the patches of images float32 (n, channels, h, w), and freeze it.

    Its filters are the directions of most variance, each scaled to variance 1, and their negatives, as ReLU follows;
    then mixtures of the directions, as random as other initial weights. The biases bring their means to 0. `added` is
    added to the variances, so that directions that hardly vary stay small. As in cifar10-airbench: Jordan 2024,
    arXiv:2404.00498.
    Raises UserError where the first layer with weights, as the model lists them, is no such convolution.
    """
    first = first_layer(model)
    if (
        type(first) is not nn.Conv2d
        or (first.in_channels, first.groups, first.dilation) != (images.shape[1], 1, (1, 1))
        or max(first.kernel_size) > min(images.shape[2:])
    ):
        raise UserError(
            "whiten needs a model whose first layer is a usual convolution, or a usual linear layer with a bias and an "
            "input for each pixel, all of it trained: set whiten=0"
        )
    patches = F.unfold(images.cpu(), first.kernel_size).transpose(1, 2).flatten(0, 1)  # (all, values of a patch)
    variances, directions = torch.linalg.eigh(patches.T.cov())
    scaled = (directions / (variances.clamp(min=1e-12) + added).sqrt()).T.flip(0)  # the most variance first
    mixtures = F.normalize(torch.randn(first.out_channels, len(scaled)), dim=1) @ scaled
    filters = torch.cat([scaled, -scaled, mixtures])[: first.out_channels]
    with torch.no_grad():
        first.weight.copy_(filters.view_as(first.weight))
        if first.bias is not None:
            first.bias.copy_(-filters @ patches.mean(0))
    first.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("whiten would leave nothing to train: set whiten=0")


def count_parameters(model: nn.Module) -> int:
    """Count the weights of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flop(model: nn.Module, training: bool = False) -> int:
    """Count the floating-point operations of the matrix products and convolutions for one image.

    To classify it, or with `training` for a step: forward, and the gradients of all parameters.
    """
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        if training:
            model(image).sum().backward()
        else:
            with torch.inference_mode():
                model.eval()(image)
    return counter.get_total_flops()
