"""The CNN's first convolution, its poolings and their gradients, fused in C: half of a training step is theirs.

relu_pool(x)                # F.relu(F.max_pool2d(x, 2))
conv_relu_pool(x, conv)     # relu_pool(conv(x)), for images of one channel

They are those lines of PyTorch until load() has compiled kernels.c with the system's C compiler (under a second, once,
into .cache) and while training on the CPU; so float32 results of PyTorch are to be had to the bit, and nothing is
lost without a compiler. PyTorch's own max-pooling keeps an eight-byte index of every pixel, reads a convolution's
output four times from memory, and scatters its gradient; the fused ones write a quarter of it, once.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SOURCE = Path(__file__).resolve().with_name("kernels.c")
CACHE = SOURCE.parent / ".cache" / "kernels"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
LANES = 32  # as in kernels.c: channels come in multiples of it
SIZE = 28

_libraries = {}  # by dtype of the activations; empty until load()


def load():
    """Compile kernels.c, or find it compiled, and use it from now on. Returns None, or why that cannot be."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not compiler:
        return "no C compiler (cc, gcc or clang) was found"
    processor = repr((platform.machine(), sorted(torch.cpu.get_capabilities().items())))  # for -march=native
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {FLAGS} {processor}".encode()).hexdigest()[:16]
    libraries = {}
    try:
        for dtype, options in ((torch.bfloat16, []), (torch.float32, ["-DFLOAT"])):
            path = CACHE / f"{str(dtype).removeprefix('torch.')}-{digest}.so"
            if not path.exists():
                CACHE.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                    built = Path(folder, path.name)
                    command = [compiler, *FLAGS, *options, str(SOURCE), "-o", str(built)]
                    subprocess.run(
                        command, check=True, capture_output=True, text=True, env=os.environ | {"TMPDIR": folder}
                    )
                    built.replace(path)
            libraries[dtype] = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not compile {SOURCE.name}: {(error.stderr.strip() or 'no message').splitlines()[0]}"
    except OSError as error:
        return str(error)
    _libraries.update(libraries)
    return None


def unload():
    """Go back to PyTorch's own operations."""
    _libraries.clear()


def relu_pool(x):
    """ReLU and 2x2 max-pooling: (n, channels, height, width) -> (n, channels, height // 2, width // 2)."""
    # Both are monotone, so they commute: outputs and gradients are the same to the bit, and ReLU after pooling
    # touches a quarter of the values.
    if not _usable(x.dtype, x, x.shape[1]) or x.shape[2] % 2 or x.shape[3] % 2:
        return F.relu(F.max_pool2d(x, 2))
    return _ReluPool.apply(x)


def conv_relu_pool(x, conv):
    """relu_pool(conv(x)), of a 3x3 convolution with padding 1.

    On images (n, 1, 28, 28) that need no gradient it is fused, in float32 within, whatever the activations' dtype.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    fits = x.shape[1:] == (1, SIZE, SIZE) and not x.requires_grad
    if not (fits and _usable(dtype, x, conv.out_channels)):
        return relu_pool(conv(x))
    return _ConvReluPool.apply(x, conv.weight, conv.bias, dtype)


def _usable(dtype, x, channels):
    return dtype in _libraries and torch.is_grad_enabled() and x.device.type == "cpu" and channels % LANES == 0


def _call(name, dtype, *arguments):
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(_libraries[dtype], name)(*pointers, torch.get_num_threads())


def _channels_last(x):
    return x.permute(0, 2, 3, 1).contiguous()  # no copy where it is so in memory already


class _ReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        n, channels, height, width = x.shape
        output = torch.empty(n, height // 2, width // 2, channels, dtype=x.dtype)
        place = torch.empty(output.shape, dtype=torch.uint8)
        _call("pool_relu", x.dtype, _channels_last(x), output, place, n, height // 2, width // 2, channels)
        ctx.save_for_backward(place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (place,) = ctx.saved_tensors
        n, height, width, channels = place.shape
        result = torch.empty(n, 2 * height, 2 * width, channels, dtype=gradient.dtype)
        _call("pool_relu_backward", gradient.dtype, _channels_last(gradient), place, result, n, height, width, channels)
        return result.permute(0, 3, 1, 2)


class _ConvReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, dtype):
        images, channels = images.float().contiguous(), len(weight)
        taps = weight.reshape(channels, 9).t().contiguous()
        output = torch.empty(len(images), SIZE // 2, SIZE // 2, channels, dtype=dtype)
        place = torch.empty(output.shape, dtype=torch.uint8)
        _call("conv_pool_relu", dtype, images, taps, bias, output, place, len(images), channels)
        ctx.save_for_backward(images, place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, place = ctx.saved_tensors
        channels = place.shape[-1]
        sums = torch.zeros(torch.get_num_threads(), 10, channels)
        arguments = (images, _channels_last(gradient), place, sums, len(images), channels)
        _call("conv_pool_relu_backward", gradient.dtype, *arguments)
        sums = sums.sum(0)
        return None, sums[:9].t().reshape(channels, 1, 3, 3), sums[9], None
