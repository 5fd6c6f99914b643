"""What the scripts' command lines share. Standard library only, so that --help answers at once."""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from runtime.errors import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"
FIGURES = ROOT / "figures"
RUNS = ROOT / "runs"
DEEP = RUNS / "deep"
DEFAULT_CHECKPOINT = CHECKPOINTS / "best_cnn_fmnist.pt"
OTHER_PROCESS = os.environ.get("LOCAL_RANK", "0") != "0"  # of torchrun: the first process speaks for all

# Nothing is written outside of the clone: these libraries keep a cache in the home or the temporary folder.
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".cache" / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "torchinductor"))


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and reports a mistake in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with code 2."""
        print_error(f"{self.prog}: error: {one_line(message)} (--help lists the flags)")
        self.exit(2)
        raise SystemExit(2)


def add_common(parser: Parser) -> None:
    """Add --data-dir and --device."""
    add_data_dir(parser)
    add_device(parser)


def add_data_dir(parser: Parser) -> None:
    """Add --data-dir."""
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the four IDX files, raw or .gz (or the variable FMNIST_DIR; default: found or fetched)",
    )


def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Make an argparse type: a whole number from low to high."""

    def convert(text: str) -> int:
        number = int(text) if len(text) <= 20 and text.isascii() and text.isdigit() else -1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {low} to {high}")
        return number

    return convert


def positive_number(text: str) -> float:
    """Convert a flag's value to a finite number above 0, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0")
    return value


def file_to_write(suffix: str) -> Callable[[str], Path]:
    """Make an argparse type: a path with this suffix, so that a typing slip replaces no checkpoint."""

    def convert(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is not a {suffix} file in a folder that exists")
        return path

    return convert


def shown(path: str | Path) -> str:
    """Write a path as a user would type it here: relative if it lies below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def print_error(text: str) -> None:
    """Print an error that ends all processes, once: torchrun ends the others when the first process is gone."""
    if OTHER_PROCESS:
        time.sleep(10)
    else:
        print(text, file=sys.stderr)


class StopSignals:
    """Turn Ctrl-C and SIGTERM into a request to stop.

    Within `with StopSignals() as signals` they only set signals.code, the exit code they ask for, so that the work
    in hand can be finished and saved. A second Ctrl-C interrupts at once, except under torchrun, which may itself
    have sent the second one.
    """

    code: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.code = 128 + number
        if number == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script's main and exit.

    The exit code is what main returns; 2 after a UserError or OSError, which is printed in one line; 130 after Ctrl-C;
    143 after SIGTERM. A bug keeps its traceback.
    """
    name = Path(sys.argv[0]).name
    if "LOCAL_RANK" not in os.environ:  # a worker of torchrun may be waiting for others, deaf to Python's handlers
        signal.signal(signal.SIGTERM, _terminate)
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader, as in `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (UserError, OSError) as error:
        print_error(f"{name}: error: {one_line(error)}")
        status = 2
    sys.exit(status)
