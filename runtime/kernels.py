"""Faster convolution, ReLU and max-pooling for training on the CPU, given to one model by an explicit call.

kernels.give(model, fused=False)    # ReLU after pooling: the same bits, a quarter of the work
kernels.give(model, fused=True)     # kernels.c: the first convolution, the poolings and their gradients, fused

A model that has a `conv_relu_pool` function (see models.CNN) gets a faster one in its place; other models stay as they
are. The fused kernels are compiled by the system's C compiler: under a second, once, into .cache. They run in training
alone; evaluation, other devices and other layers use PyTorch's operations. PyTorch's own max-pooling keeps an
eight-byte index of every pixel, reads a convolution's output four times from memory, and scatters its gradient. The
fused one writes a quarter of the values, once. The first convolution's results differ from PyTorch's by rounding.

A library in .cache is loaded again only if its content has the SHA-256 in its name, and if only this user, the owner of
this code or root can write to it and to its folder. So no half-written file and no other user's is loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from runtime import cli, files
from runtime.errors import UserError, one_line

SOURCE = Path(__file__).resolve().with_name("kernels.c")
CACHE = cli.ROOT / ".cache" / "kernels"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
DTYPES = {torch.bfloat16: [], torch.float32: ["-DFLOAT"]}  # of the activations: options of the compiler
LANES = 32  # as in kernels.c: channels come in multiples of it
SIZE = 28
TIMEOUT = 120  # seconds for the compiler, which takes one
MOST = 2**24  # bytes of a library, which has 20,000

# Where PyTorch keeps the functions that it calls around a module's own, in the module and for all modules.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class KernelError(UserError):
    """The fused kernels cannot be compiled here, or not loaded."""


class _Large(Exception):
    """The fused convolution refuses these numbers: NaN, infinity, or such that a sum may overflow."""


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

    A plain 3x3 convolution with padding 1 of images (n, 1, 28, 28) that need no gradient is fused as a whole, in
    float32 within. Images are float32, or of the activations' dtype. Of others the pooling is fused.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if _is_training() and _of_images(x, dtype) and _is_plain(conv) and dtype in DTYPES:
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        with contextlib.suppress(_Large):
            return _ConvReluPool.apply(x, conv.weight, bias, dtype)
    return fused_pool_relu(conv(x))


def fused_pool_relu(x: torch.Tensor) -> torch.Tensor:
    """Compute pool_relu by the fused kernel, where it fits: the same bits."""
    fits = x.dim() == 4 and not (x.shape[1] % LANES or x.shape[2] % 2 or x.shape[3] % 2) and x.numel() > 0
    if _is_training() and fits and any(_is_on_cpu(x, dtype) for dtype in DTYPES):
        return _ReluPool.apply(x)
    return pool_relu(x)


def _is_training() -> bool:
    """Say whether gradients are wanted, and no tool of PyTorch records the operations: it would not see the kernels."""
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() and not recorded


def _of_images(x: torch.Tensor, dtype: torch.dtype) -> bool:
    usable = any(_is_on_cpu(x, each) for each in (torch.float32, dtype))
    return usable and x.shape[1:] == (1, SIZE, SIZE) and not x.requires_grad


def _is_plain(conv: nn.Module) -> bool:
    """Say whether a module computes what kernels.c does: no other class, layer, hook or function in its place."""
    if type(conv) is not nn.Conv2d or {"forward", "_conv_forward"} & vars(conv).keys() or conv._compiled_call_impl:
        return False
    if any(getattr(conv, name) or getattr(hooks, f"_global{name}") for name in HOOKS):  # of pruning, say
        return False
    channels, geometry = conv.out_channels, (conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    return (
        channels % LANES == 0
        and geometry == ((1, 1), (1, 1), 1, "zeros")
        and conv.padding in ((1, 1), "same")
        and _is_weight(conv.weight, (channels, 1, 3, 3))
        and (conv.bias is None or _is_weight(conv.bias, (channels,)))
    )


def _is_weight(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return type(tensor) is nn.Parameter and tensor.shape == shape and _is_on_cpu(tensor, torch.float32)


def _is_on_cpu(x: torch.Tensor, dtype: torch.dtype) -> bool:
    plain = type(x) in (torch.Tensor, nn.Parameter)  # others may hold no memory of that shape
    return plain and x.dtype == dtype and x.device.type == "cpu" and x.layout == torch.strided and not x.is_neg()


# --- the library -----------------------------------------------------------------------------------------


@functools.cache
def compiled() -> dict[torch.dtype, ctypes.CDLL]:
    """Compile kernels.c, or find it compiled: a library for each dtype of the activations. Raises KernelError."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    try:
        words = shlex.split(compiler)  # such as "ccache gcc"
    except ValueError as error:
        raise KernelError(f"the variable CC, {compiler!r}, is no command: {error}") from None
    if not words:
        raise KernelError("no C compiler (cc, gcc or clang) was found")
    if not shutil.which(words[0]):
        raise KernelError(f"the C compiler of the variable CC, {words[0]}, was not found")
    processor = repr((platform.machine(), sorted(torch.cpu.get_capabilities().items())))  # for -march=native
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {FLAGS} {processor}".encode()).hexdigest()[:16]
    try:
        return {dtype: _library(words, digest, dtype) for dtype in DTYPES}
    except OSError as error:
        raise KernelError(one_line(error)) from None


def _library(compiler: list[str], digest: str, dtype: torch.dtype) -> ctypes.CDLL:
    """Load a library that an earlier process compiled, if one can be trusted and loaded; else compile it."""
    stem = f"{str(dtype).removeprefix('torch.')}-{digest}"
    CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = CACHE.resolve()
    if os.name == "posix" and folder.stat().st_uid == os.geteuid():
        folder.chmod(0o755)  # a generous umask lets a group write to it
    if not _is_ours(folder):
        raise KernelError(f"others can write to {folder}, and its files are executed: remove it")
    for path in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError, UserError):
            content = files.read_bytes(path, MOST)
            if _is_ours(path) and path.name == _name(stem, content):
                return ctypes.CDLL(str(path))
    content = _compile([*compiler, *FLAGS, *DTYPES[dtype], str(SOURCE)], folder)
    path = folder / _name(stem, content)
    files.write_atomically(path, content)
    path.chmod(0o755)
    return ctypes.CDLL(str(path))


def _name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()}.so"


def _is_ours(path: Path) -> bool:
    """Say whether only this user, root and the owner of this code, whom we trust anyway, can write to this path."""
    if os.name != "posix":
        return True
    status = path.lstat()
    owners = (os.geteuid(), 0, SOURCE.stat().st_uid)
    return status.st_uid in owners and not status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)


def _compile(command: list[str], cache: Path) -> bytes:
    """Run the compiler; return the library that it writes. Raises KernelError, OSError."""
    compiler = shlex.join(command[: command.index(FLAGS[0])])
    with tempfile.TemporaryDirectory(dir=cache) as folder, open(Path(folder, "said"), "w+", errors="replace") as said:
        built, environment = Path(folder, "built.so"), os.environ | {"TMPDIR": folder}
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, "env": environment}
        try:
            subprocess.run([*command, "-o", str(built)], check=True, timeout=TIMEOUT, **options)
            return built.read_bytes()
        except subprocess.TimeoutExpired:
            raise KernelError(f"{compiler} did not compile {SOURCE.name} within {TIMEOUT} s") from None
        except (subprocess.CalledProcessError, FileNotFoundError):
            said.seek(0)
            lines = [*said, "no message"]
            reason = one_line(next((line for line in lines if "error" in line), lines[0]))
            raise KernelError(f"{compiler} could not compile {SOURCE.name}: {reason}") from None


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> int:
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    return getattr(compiled()[dtype], name)(*pointers, torch.get_num_threads())


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.resolve_neg().permute(0, 2, 3, 1).contiguous()  # no copy where memory is already in this order


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
        images, bias, channels = images.float().contiguous(), bias.contiguous(), len(weight)
        taps = weight.reshape(channels, 9).t().contiguous()
        output = torch.empty(len(images), SIZE // 2, SIZE // 2, channels, dtype=dtype)
        place = torch.empty(output.shape, dtype=torch.uint8)
        if not _call("conv_pool_relu", dtype, images, taps, bias, output, place, len(images), channels):
            raise _Large
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
