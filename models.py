"""The architectures. A new model is one class and one line in MODELS.

model = models.build("cnn")
logits = model(images)          # float32 (n, 1, 28, 28) -> (n, 10)
"""

import torch
from torch import nn
from torch.nn import functional as F

from kernels import conv_relu_pool, relu_pool


class MLP(nn.Module):
    """784 - 128 - 10 with ReLU: 101,770 parameters."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images):
        return self.fc2(F.relu(self.fc1(images.flatten(1))))


class CNN(nn.Module):
    """Two 3x3 convolutions with ReLU and 2x2 max-pooling, 128 hidden units, dropout 0.3: 421,642 parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)  # 28x28
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)  # 14x14
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.dropout = nn.Dropout(0.3)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images):
        x = conv_relu_pool(images, self.conv1)
        x = relu_pool(self.conv2(x))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(self.dropout(x))


class ResNet(nn.Module):
    """A 3x3 convolution, then three stages of another, pooled and batch-normalised, and a residual block of two.

    Ten convolutions and one linear layer, 1,940,938 parameters; a narrow one of the residual networks that David Page
    trained in seconds (2018, https://myrtle.ai/learn/how-to-train-your-resnet/).
    """

    def __init__(self):
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

    def forward(self, images):
        return self.fc(self.stages(F.relu(self.conv1(images))).amax((2, 3)))


class Convolution(nn.Module):
    """A 3x3 convolution, max-pooled if asked for, batch-normalised, ReLU: (n, inputs, h, w) -> (n, outputs, ...)."""

    def __init__(self, inputs, outputs, pool=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, x):
        x = self.conv(x)
        if self.pool:
            x = F.max_pool2d(x, 2 + x.shape[-1] % 2, 2)  # 3x3 where the side is odd, lest a row and a column be lost
        return F.relu(self.norm(x))


class Residual(nn.Module):
    """Two convolutions and a way around them, in training the only one for a tenth of the images.

    Stochastic depth: Huang et al. 2016, arXiv:1603.09382.
    """

    SKIPPED = 0.1

    def __init__(self, channels):
        super().__init__()
        self.convolutions = nn.Sequential(Convolution(channels, channels), Convolution(channels, channels))

    def forward(self, x):
        y = self.convolutions(x)
        if self.training:
            taken = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.SKIPPED
            y = y * (taken / (1 - self.SKIPPED)).to(y.dtype)
        return x + y


MODELS = {"mlp": MLP, "cnn": CNN, "resnet": ResNet}


def build(name):
    """A freshly initialised model, its convolutions in channels_last, which CPU and GPU kernels prefer."""
    return MODELS[name]().to(memory_format=torch.channels_last)


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def count_flop(model):
    """Floating-point operations to classify one image: those of its matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 1, 28, 28))
    return counter.get_total_flops()
