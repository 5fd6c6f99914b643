"""The machine: its devices and number formats, and what a history records of it."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from optim import NATIVE_BFLOAT16
from runtime import cli, distributed
from runtime.errors import UserError

DEVICES = ("cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
MALLOPT = {  # of <malloc.h>: option, value in bytes
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
    "M_MMAP_THRESHOLD": (-3, 2**30),
}
FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")  # instruction sets that decide the speed


class DeviceError(UserError):
    """A device or a number format that this machine does not have."""


def pick_device(name: str) -> torch.device:
    """Return the torch.device of "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" or "mps".

    Of several processes on one machine, each gets its own GPU.
    Raises DeviceError when PyTorch does not know the device or this machine lacks it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "cuda" and processes > 1:
        if processes > (gpus := torch.cuda.device_count()):
            raise DeviceError(f"{processes} processes on this machine need as many GPUs; it has {gpus}")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise RuntimeError("another kind")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = available()
        why = f": {str(error).splitlines()[0]}" if name in here else ""
        raise DeviceError(f"device {name!r} cannot be used{why}; this machine has {', '.join(here)}") from None
    return device


def available() -> list[str]:
    """List the devices of this machine that can be named."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of "float32", "bfloat16", "float16" (GPU only) or "auto", the fastest that the device has.

    Raises DeviceError for float16 on a CPU, whose range it leaves, and for any other name.
    """
    if name not in PRECISIONS:
        raise DeviceError(f"{name!r} is not a precision")
    if name == "auto":
        slower = "float16" if device.type == "cuda" else "float32"
        name = "bfloat16" if has_bfloat16(device) else slower
    if name == "float16" and device.type == "cpu":
        raise DeviceError("--precision float16 needs a GPU; on a CPU there is bfloat16")
    return getattr(torch, name)


def has_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and NATIVE_BFLOAT16


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype: torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def make_deterministic() -> None:
    """Refuse operations whose result varies from run to run. Only GPUs have them; the CPU's repeat anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, for one training in this process.

    By default glibc returns every large tensor to the system and takes its pages anew in the next step, with a page
    fault each: a twentieth of the CNN's step. Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for option, value in MALLOPT.values():
            libc.mallopt(option, value)


def processor() -> str:
    """Name the processor with its family, model and the instruction sets that decide the speed."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, KeyError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    capabilities = torch.cpu.get_capabilities()
    features = [feature for feature in FEATURES if capabilities.get(feature) is True]
    return f"{name} with {', '.join(features)}" if features else name


def versions() -> dict[str, str]:
    """Return the versions of what shapes the numbers of a run."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("torch", "numpy")
    }


@functools.cache  # the code that runs is the code that was loaded, so one look is enough
def git_revision() -> str | None:
    """Return the commit of this clone, with "+changes" when its code differs from it; None outside of a clone."""
    git = ["git", "-C", str(cli.ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        code = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "*.c"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if code.returncode else "")
