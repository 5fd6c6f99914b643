"""Faster convolution, ReLU and max-pooling on the CPU, given to one model by an explicit call.

kernels.give(model, fused=False)    # ReLU after pooling: the same bits, a quarter of the work
kernels.give(model, fused=True)     # the convolutions, the poolings and their gradients, fused
with kernels.evaluating(model, fused):  # with or without them, and then with its own again

A model that has a `conv_relu_pool` function (see models.CNN) gets a faster one in its place; other models stay as they
are. The fused kernels are compiled by the system's C compiler: a second each, once, into .cache. Other devices and
other layers use PyTorch's operations. The results of fused convolutions differ from PyTorch's by rounding.

kernels.c: PyTorch's own max-pooling keeps an eight-byte index of every pixel, reads a convolution's output four times
from memory, and scatters its gradient. The fused one writes a quarter of the values, once.
convolution.c: forward, Winograd's algorithm takes 16 products instead of 36; its rounding is relative to the largest
numbers. The gradient of a pooled convolution is 0 at three pixels of four or more. It leaves those out.

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
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from models import conv_relu_pool
from runtime import cli, files
from runtime.errors import UserError, one_line

FOLDER = Path(__file__).resolve().parent
CACHE = cli.ROOT / ".cache" / "kernels"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
LIBRARIES = {  # source, options of the compiler
    "bfloat16": ("kernels.c", []),  # by the dtype of the activations
    "float32": ("kernels.c", ["-DFLOAT"]),
    "convolution": ("convolution.c", []),
    "mlp_step": ("mlp_step.c", []),
}
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
LANES = 32  # channels come in multiples of it: a multiple of LANES in the sources, on any processor
SIZE = 28  # of an image's side
HALF = SIZE // 2
MOST_CHANNELS = 512  # of a fused convolution: a thread keeps lists of each on its stack
WINOGRAD = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]  # transforms 3x3 weights, from each side
SHARES = 16  # of a batch, whose gradients of the second convolution are added up one by one
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
    if not hasattr(model, "conv_relu_pool"):
        return
    if fused:
        for name in ("float32", "convolution"):  # and the one for bfloat16 with the first activation of that dtype
            library(name)
    setattr(model, "conv_relu_pool", fused_conv_relu_pool if fused else conv_pool_relu)  # noqa: B010 - for mypy


@contextlib.contextmanager
def evaluating(model: nn.Module, fused: bool) -> Iterator[None]:
    """Let a model compute with fused operations if wanted and to be had, else with PyTorch's; then with its own again.

    So it does not matter for an evaluation which ones the model itself was given. One thread at a time does this.
    """
    if getattr(model, "conv_relu_pool", None) not in (conv_relu_pool, conv_pool_relu, fused_conv_relu_pool):
        yield  # it has none, or one of another's making
        return
    with _evaluation:
        own = model.conv_relu_pool
        try:
            give(model, fused=False)
            with contextlib.suppress(KernelError):
                give(model, fused)
            yield
        finally:
            setattr(model, "conv_relu_pool", own)  # noqa: B010 - for mypy


_evaluation = threading.RLock()


def conv_pool_relu(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Compute models.conv_relu_pool with ReLU last. Both are monotone, so outputs and gradients keep their bits."""
    return pool_relu(conv(x))


def pool_relu(x: torch.Tensor) -> torch.Tensor:
    """Apply 2x2 max-pooling, then ReLU to the quarter of the values that is left."""
    return F.relu(F.max_pool2d(x, 2))


def fused_conv_relu_pool(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Compute models.conv_relu_pool by the fused kernels, where they fit.

    Plain 3x3 convolutions with padding 1 are fused as a whole: of images (n, 1, 28, 28) that need no gradient, in
    float32 within, where images are float32 or of the activations' dtype; and of (n, 32, 14, 14) in float32. Of others
    the pooling is fused.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    function: Any = None
    if dtype in DTYPES and _of_images(x, dtype):
        function = _ConvReluPool
    elif dtype is torch.float32 and x.shape[1:] == (LANES, HALF, HALF) and _is_on_cpu(x, dtype):
        function = _SecondConvReluPool
    if function and not _is_recorded() and _is_plain(conv, x.shape[1]):
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        with contextlib.suppress(_Large):
            return function.apply(x, conv.weight, bias, dtype)
    return fused_pool_relu(conv(x))


def fused_pool_relu(x: torch.Tensor) -> torch.Tensor:
    """Compute pool_relu by the fused kernel, where it fits: the same bits."""
    fits = x.dim() == 4 and not (x.shape[1] % LANES or x.shape[2] % 2 or x.shape[3] % 2) and x.numel() > 0
    if fits and not _is_recorded() and any(_is_on_cpu(x, dtype) for dtype in DTYPES):
        return _ReluPool.apply(x)
    return pool_relu(x)


def _is_recorded() -> bool:
    """Say whether a tool of PyTorch records the operations: it would not see the kernels."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _of_images(x: torch.Tensor, dtype: torch.dtype) -> bool:
    usable = any(_is_on_cpu(x, each) for each in (torch.float32, dtype))
    return usable and x.shape[1:] == (1, SIZE, SIZE) and not x.requires_grad


def is_hooked(module: nn.Module) -> bool:
    """Say whether calling a module does other things than its class: a hook, of pruning say, or a function put in."""
    replaced = {"forward", "_conv_forward"} & vars(module).keys() or module._compiled_call_impl
    return bool(replaced) or any(getattr(module, name) or getattr(hooks, f"_global{name}") for name in HOOKS)


def _is_plain(conv: nn.Module, inputs: int) -> bool:
    """Say whether a module computes what the kernels do: no other class, layer, hook or function in its place."""
    if type(conv) is not nn.Conv2d or is_hooked(conv):
        return False
    channels, geometry = conv.out_channels, (conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    return (
        channels % LANES == 0
        and channels <= MOST_CHANNELS
        and geometry == ((1, 1), (1, 1), 1, "zeros")
        and conv.padding in ((1, 1), "same")
        and is_weight(conv.weight, (channels, inputs, 3, 3))
        and (conv.bias is None or is_weight(conv.bias, (channels,)))
    )


def is_weight(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Say whether this is a parameter float32 of that shape, in memory as the kernels can read it."""
    return type(tensor) is nn.Parameter and tensor.shape == shape and _is_on_cpu(tensor, torch.float32)


def _is_on_cpu(x: torch.Tensor, dtype: torch.dtype) -> bool:
    plain = type(x) in (torch.Tensor, nn.Parameter)  # others may hold no memory of that shape
    return plain and x.dtype == dtype and x.device.type == "cpu" and x.layout == torch.strided and not x.is_neg()


# --- the library -----------------------------------------------------------------------------------------


def library(name: str) -> ctypes.CDLL:
    """Compile one of LIBRARIES, or find it compiled: tried once a process. Raises KernelError."""
    result = _try(name)
    if isinstance(result, KernelError):
        raise result
    return result


@functools.cache
def _try(name: str) -> ctypes.CDLL | KernelError:
    try:
        return _find(name)
    except KernelError as error:
        return error
    except OSError as error:
        return KernelError(one_line(error))


def _find(name: str) -> ctypes.CDLL:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    try:
        words = shlex.split(compiler)  # such as "ccache gcc"
    except ValueError as error:
        raise KernelError(f"the variable CC, {compiler!r}, is no command: {error}") from None
    if not words:
        raise KernelError("no C compiler (cc, gcc or clang) was found")
    if not shutil.which(words[0]):
        raise KernelError(f"the C compiler of the variable CC, {words[0]}, was not found")
    file, options = LIBRARIES[name]
    processor = repr((platform.machine(), sorted(torch.cpu.get_capabilities().items())))  # for -march=native
    sources = (FOLDER / file).read_bytes() + (FOLDER / "vectors.h").read_bytes()
    digest = hashlib.sha256(sources + f"{compiler} {FLAGS} {processor}".encode()).hexdigest()[:16]
    return _library([*words, *FLAGS, *options, str(FOLDER / file)], f"{name}-{digest}")


def _library(command: list[str], stem: str) -> ctypes.CDLL:
    """Load a library that an earlier process compiled, if one can be trusted and loaded; else compile it."""
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
    content = _compile(command, folder)
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
    owners = (os.geteuid(), 0, FOLDER.stat().st_uid)
    return status.st_uid in owners and not status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)


def _compile(command: list[str], cache: Path) -> bytes:
    """Run the compiler; return the library that it writes. Raises KernelError, OSError."""
    compiler, source = shlex.join(command[: command.index(FLAGS[0])]), Path(command[-1]).name
    with tempfile.TemporaryDirectory(dir=cache) as folder, open(Path(folder, "said"), "w+", errors="replace") as said:
        built, environment = Path(folder, "built.so"), os.environ | {"TMPDIR": folder}
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, "env": environment}
        try:
            subprocess.run([*command, "-o", str(built)], check=True, timeout=TIMEOUT, **options)
            return built.read_bytes()
        except subprocess.TimeoutExpired:
            raise KernelError(f"{compiler} did not compile {source} within {TIMEOUT} s") from None
        except (subprocess.CalledProcessError, FileNotFoundError):
            said.seek(0)
            lines = [*said, "no message"]
            reason = one_line(next((line for line in lines if "error" in line), lines[0]))
            raise KernelError(f"{compiler} could not compile {source}: {reason}") from None


def _call(name: str, function: str, *arguments: Any) -> int:
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    return getattr(library(name), function)(*pointers, torch.get_num_threads())


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.resolve_neg().permute(0, 2, 3, 1).contiguous()  # no copy where memory is already in this order


class _ReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        output = torch.empty(n, height // 2, width // 2, channels, dtype=x.dtype)
        place = torch.empty(output.shape, dtype=torch.uint8)
        _call(DTYPES[x.dtype], "pool_relu", _channels_last(x), output, place, n, height // 2, width // 2, channels)
        ctx.save_for_backward(place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (place,) = ctx.saved_tensors
        n, height, width, channels = place.shape
        result = torch.empty(n, 2 * height, 2 * width, channels, dtype=gradient.dtype)
        arguments = (_channels_last(gradient), place, result, n, height, width, channels)
        _call(DTYPES[gradient.dtype], "pool_relu_backward", *arguments)
        return result.permute(0, 3, 1, 2)


class _ConvReluPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        images, bias, channels = images.float().contiguous(), bias.contiguous(), len(weight)
        taps = weight.reshape(channels, 9).t().contiguous()
        output = torch.empty(len(images), HALF, HALF, channels, dtype=dtype)
        place = torch.empty(output.shape, dtype=torch.uint8)
        if not _call(DTYPES[dtype], "conv_pool_relu", images, taps, bias, output, place, len(images), channels):
            raise _Large
        ctx.save_for_backward(images, place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, place = ctx.saved_tensors
        channels = place.shape[-1]
        sums = images.new_zeros(torch.get_num_threads(), 10, channels)
        arguments = (images, _channels_last(gradient), place, sums, len(images), channels)
        _call(DTYPES[gradient.dtype], "conv_pool_relu_backward", *arguments)
        sums = sums.sum(0)
        return None, sums[:9].t().reshape(channels, 1, 3, 3), sums[9], None


class _SecondConvReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: torch.dtype) -> torch.Tensor:
        images, bias = _channels_last(x), bias.contiguous()
        winograd = weight.new_tensor(WINOGRAD)
        taps = (winograd @ weight @ winograd.T).permute(2, 3, 1, 0).contiguous()
        output = images.new_empty(len(x), HALF // 2, HALF // 2, len(weight))
        place = torch.empty(output.shape, dtype=torch.uint8)
        if not _call("convolution", "forward", images, taps, bias, output, place, len(x), len(weight)):
            raise _Large
        ctx.save_for_backward(images, weight, place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight, place = ctx.saved_tensors
        result, channels = torch.empty_like(images) if ctx.needs_input_grad[0] else None, len(weight)
        weights, biases = images.new_zeros(SHARES, channels, 3, 3, LANES), images.new_zeros(SHARES, channels)
        arguments = (images, _channels_last(weight), _channels_last(gradient), place, result, weights, biases)
        _call("convolution", "backward", *arguments, len(images), channels, SHARES)
        image = None if result is None else result.permute(0, 3, 1, 2)
        return image, weights.sum(0).permute(0, 3, 1, 2), biases.sum(0), None
