"""Faster convolution, ReLU and max-pooling for training on the CPU, given to one model by an explicit call.

kernels.give(model, fused=False)    # ReLU after pooling: the same bits, a quarter of the work
kernels.give(model, fused=True)     # kernels.c: the first convolution, the poolings and their gradients, fused

A model that has a `conv_relu_pool` function (see models.CNN) gets a faster one in its place; other models stay as they
are. The fused kernels are compiled by the system's C compiler: under a second, once, into .cache. They run in training
alone; evaluation, other devices and other shapes use PyTorch's operations. PyTorch's own max-pooling keeps an
eight-byte index of every pixel, reads a convolution's output four times from memory, and scatters its gradient. The
fused one writes a quarter of the values, once. The first convolution's results differ from PyTorch's by rounding.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from runtime import cli
from runtime.errors import UserError

SOURCE = Path(__file__).resolve().with_name("kernels.c")
CACHE = cli.ROOT / ".cache" / "kernels"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
DTYPES = {torch.bfloat16: [], torch.float32: ["-DFLOAT"]}  # of the activations: options of the compiler
LANES = 32  # as in kernels.c: channels come in multiples of it
SIZE = 28


class KernelError(UserError):
    """The fused kernels cannot be compiled here."""


def give(model: nn.Module, fused: bool) -> None:
    """Put faster operations into one model that uses models.conv_relu_pool. No other model changes.

    Raises KernelError where the fused kernels cannot be compiled; the model then stays as it was.
    """
    if fused:
        compiled()
    if hasattr(model, "conv_relu_pool"):
        setattr(model, "conv_relu_pool", fused_conv_relu_pool if fused else conv_pool_relu)  # noqa: B010 - for mypy


def conv_pool_relu(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Compute models.conv_relu_pool with ReLU last. Both are monotone, so outputs and gradients keep their bits."""
    return pool_relu(conv(x))


def pool_relu(x: torch.Tensor) -> torch.Tensor:
    """Apply 2x2 max-pooling, then ReLU to the quarter of the values that is left."""
    return F.relu(F.max_pool2d(x, 2))


def fused_conv_relu_pool(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Compute models.conv_relu_pool by the fused kernels, where they fit.

    A 3x3 convolution with padding 1 of images (n, 1, 28, 28) that need no gradient is fused as a whole, in float32
    within, whatever the activations' dtype. Of others the pooling is fused.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    fits = x.shape[1:] == (1, SIZE, SIZE) and not x.requires_grad
    if not (fits and _usable(dtype, x, conv.out_channels)):
        return fused_pool_relu(conv(x))
    return _ConvReluPool.apply(x, conv.weight, conv.bias, dtype)


def fused_pool_relu(x: torch.Tensor) -> torch.Tensor:
    """Compute pool_relu by the fused kernel, where it fits: the same bits."""
    if not _usable(x.dtype, x, x.shape[1]) or x.shape[2] % 2 or x.shape[3] % 2:
        return pool_relu(x)
    return _ReluPool.apply(x)


@functools.cache
def compiled() -> dict[torch.dtype, ctypes.CDLL]:
    """Compile kernels.c, or find it compiled: a library for each dtype of the activations. Raises KernelError."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not compiler:
        raise KernelError("no C compiler (cc, gcc or clang) was found")
    processor = repr((platform.machine(), sorted(torch.cpu.get_capabilities().items())))  # for -march=native
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {FLAGS} {processor}".encode()).hexdigest()[:16]
    try:
        return {dtype: _compile(compiler, digest, dtype) for dtype in DTYPES}
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or "no message").splitlines()[0]
        raise KernelError(f"{compiler} could not compile {SOURCE.name}: {reason}") from None
    except OSError as error:
        raise KernelError(str(error)) from None


def _compile(compiler: str, digest: str, dtype: torch.dtype) -> ctypes.CDLL:
    path = CACHE / f"{str(dtype).removeprefix('torch.')}-{digest}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            built = Path(folder, path.name)
            command = [compiler, *FLAGS, *DTYPES[dtype], str(SOURCE), "-o", str(built)]
            environment = os.environ | {"TMPDIR": folder}
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            built.replace(path)
    return ctypes.CDLL(str(path))


def _usable(dtype: torch.dtype, x: torch.Tensor, channels: int) -> bool:
    return dtype in DTYPES and torch.is_grad_enabled() and x.device.type == "cpu" and channels % LANES == 0


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(compiled()[dtype], name)(*pointers, torch.get_num_threads())


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # no copy where memory is already in this order


class _ReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        output = torch.empty(n, height // 2, width // 2, channels, dtype=x.dtype)
        place = torch.empty(output.shape, dtype=torch.uint8)
        _call("pool_relu", x.dtype, _channels_last(x), output, place, n, height // 2, width // 2, channels)
        ctx.save_for_backward(place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (place,) = ctx.saved_tensors
        n, height, width, channels = place.shape
        result = torch.empty(n, 2 * height, 2 * width, channels, dtype=gradient.dtype)
        _call("pool_relu_backward", gradient.dtype, _channels_last(gradient), place, result, n, height, width, channels)
        return result.permute(0, 3, 1, 2)


class _ConvReluPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        images, channels = images.float().contiguous(), len(weight)
        taps = weight.reshape(channels, 9).t().contiguous()
        output = torch.empty(len(images), SIZE // 2, SIZE // 2, channels, dtype=dtype)
        place = torch.empty(output.shape, dtype=torch.uint8)
        _call("conv_pool_relu", dtype, images, taps, bias, output, place, len(images), channels)
        ctx.save_for_backward(images, place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, place = ctx.saved_tensors
        channels = place.shape[-1]
        sums = torch.zeros(torch.get_num_threads(), 10, channels)
        arguments = (images, _channels_last(gradient), place, sums, len(images), channels)
        _call("conv_pool_relu_backward", gradient.dtype, *arguments)
        sums = sums.sum(0)
        return None, sums[:9].t().reshape(channels, 1, 3, 3), sums[9], None
