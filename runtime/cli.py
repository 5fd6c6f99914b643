"""What the scripts' command lines share. Standard library only, so that --help answers at once."""

import argparse
import contextlib
import gc
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from runtime import files
from runtime.errors import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"
FIGURES = ROOT / "figures"
RUNS = ROOT / "runs"
DEEP = RUNS / "deep"
DEFAULT_CHECKPOINT = CHECKPOINTS / "best_cnn_fmnist.pt"
PICTURES_CHECKPOINT = CHECKPOINTS / "robust" / "best_cnn_fmnist.pt"  # of predict.py and demo.py
# What steers a terminal or reorders a line. A carriage return moves a progress bar, at the start or the end of a write.
STEERING = re.compile(
    r"(?s)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]|(?<=.)\r(?=.)"
)
WIDTH = 80  # columns of a terminal
UP = "\x1b[A"  # by which tqdm moves between several bars
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal or the connection is lost; Windows has no such signal

# Nothing is written outside of the clone: these libraries keep a cache in the home or the temporary folder.
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".cache" / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "torchinductor"))

# How often a thread of PyTorch's looks whether the others have arrived, before it sleeps. By GNU's default it looks for
# milliseconds, and occupies a core. If another process wants one too, the thread waited for may get none.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


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


def add_pictures_checkpoint(parser: Parser) -> None:
    """Add --checkpoint: the network that answers to pictures."""
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        default=PICTURES_CHECKPOINT,
        help="default: checkpoints/robust/best_cnn_fmnist.pt",
    )


def add_data_dir(parser: Parser, other: bool = True) -> None:
    """Add --data-dir, and --other-data where the script can use images that are not Fashion-MNIST."""
    parser.add_argument(
        "--data-dir",
        metavar="PLACE",
        help="folder or file of the data: IDX, CSV, .npz, parquet, pictures or a zip; docs/data.md describes them "
        "(or the variable FMNIST_DIR; default: found or fetched)",
    )
    if not other:
        return
    parser.add_argument(
        "--other-data", action="store_true", help="accept images there that are not Fashion-MNIST; results name them"
    )


def add_bare(parser: Parser) -> None:
    """Add --model, --mean and --std: what a bare state_dict does not say of itself."""
    parser.add_argument(
        "--model", metavar="NAME", help="of a bare state_dict: its name in models.py (default: the one that fits)"
    )
    add_normalisation(parser, "a bare state_dict")


def add_normalisation(parser: Parser, whose: str) -> None:
    """Add --mean and --std."""
    parser.add_argument(
        "--mean", type=number, metavar="M", help=f"of {whose}: its input is (pixel / 255 - M) / S (default: 0.5)"
    )
    parser.add_argument("--std", type=positive_number, metavar="S", help="of the same (default: 0.5)")


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


def number(text: str) -> float:
    """Convert a flag's value to a finite number, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return value


def positive_number(text: str) -> float:
    """Convert a flag's value to a finite number above 0, as an argparse type."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0")
    return value


def file_to_write(suffix: str) -> Callable[[str], Path]:
    """Make an argparse type: a path with this suffix, so that a slip replaces no checkpoint and no history of a run.

    A place where no file can be written is refused too, before any work.
    """

    def convert(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is not a {suffix} file in a folder that exists")
        if _is_history(path):
            raise argparse.ArgumentTypeError(f"{text} would replace the history of a run; choose another name")
        try:
            files.check_file(path)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return path

    return convert


def _is_history(path: Path) -> bool:
    """Say whether a file is the history of a run, whatever its name."""
    with contextlib.suppress(OSError, UserError):
        return b'"best_epoch":' in files.read_bytes(path, 2**24)
    return False


def shown(path: str | Path) -> str:
    """Write a path in one line of printable characters: relative if it lies below the working directory."""
    return one_line(relative(path))


def counted(n: int, noun: str) -> str:
    """Write a number of things: "1 epoch", "2 epochs"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def wrapped(text: str) -> str:
    """Break a text into lines that fit into WIDTH, without cutting a path."""
    return textwrap.fill(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def relative(path: str | Path) -> str:
    """Return a path as a user would type it here: relative if it lies below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def python() -> str:
    """Return how a user types this Python here: "python" where that finds it, else a path as .venv/bin/python."""
    found = shutil.which("python")
    if found and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    return shlex.quote(relative(sys.executable))


def command(script: str, *words: object) -> str:
    """Write the command that runs a script of this repository, as a user would type it here."""
    return f"{python()} {shlex.join([relative(ROOT / script), *map(str, words)])}"


def install(requirements: str = "requirements-optional.txt") -> str:
    """Write the command that installs the packages of a requirements file."""
    return f"{python()} -m pip install -r {shlex.quote(relative(ROOT / requirements))}"


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(jobs: int) -> None:
    """Let each of several trainings use its share of the cores. To be called before PyTorch is loaded.

    OMP_NUM_THREADS stays as it is where the user has set it.
    """
    if jobs > (here := cores()):
        print(f"--jobs {jobs}: with {here} cores, trainings will wait for each other", file=sys.stderr)
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, here // jobs)))


def other_process() -> bool:
    """Say whether torchrun started this process and it is not the first, which speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def print_error(text: str) -> None:
    """Print an error that ends all processes, once: torchrun ends the others when the first process is gone."""
    if other_process():
        time.sleep(10)
    else:
        with contextlib.suppress(OSError):  # stderr may be full, too
            print(text, file=sys.stderr)


class StopSignals:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a request to stop.

    Within `with StopSignals() as signals` they only set signals.code, the exit code they ask for, so that the work
    in hand can be finished and saved. A line on stderr says so at once. A second Ctrl-C interrupts at once, except
    under torchrun, which may itself have sent the second one. A signal that is ignored, as under nohup, stays ignored.
    Outside of the main thread, which alone receives signals, nothing changes.
    """

    code: int | None = None

    def __enter__(self) -> "StopSignals":
        stops = {signal.SIGINT, signal.SIGTERM, HANGUP}
        if threading.current_thread() is not threading.main_thread():
            stops = set()
        heard = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.code = 128 + number
        again = ""
        if number == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            again = "; Ctrl-C again stops at once"
        if number == HANGUP:
            _leave_lost_terminal()
        if not other_process():
            with contextlib.suppress(OSError):  # not print(), which the signal may have interrupted
                os.write(2, f"\nstopping after this step and saving{again}\n".encode())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _leave_lost_terminal() -> None:
    """Discard what is printed to a terminal that is gone: every write to it would fail, and end the run unsaved."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            _discard(descriptor)


def _discard(descriptor: int) -> None:
    """Let a file descriptor lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.set_inheritable(descriptor, True)
    if nowhere != descriptor:
        os.close(nowhere)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    if number == HANGUP:
        _leave_lost_terminal()
    raise SystemExit(128 + number)


def _prepare_streams() -> None:
    """Let no text steer the terminal, and neither a text nor a stream that the caller closed end a script.

    Characters that the output's encoding lacks are written as escapes. A closed stdin, stdout or stderr leads
    nowhere; otherwise the next file that is opened would take its number, and be overwritten by what is printed.
    """
    os.environ["PYTHON_COLORS"] = "0"  # Python's own escapes, of newer versions, would be shown as text
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            _discard(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode))
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a notebook's stream has none, and needs none
            with contextlib.suppress(OSError):  # where the descriptor was replaced by one that cannot seek
                reconfigure(errors="backslashreplace")
        _neutralise(stream)


def _neutralise(stream: TextIO) -> None:
    """Have a stream write as escapes what steers a terminal: the name of a file or a field of it may hold anything."""
    write = stream.write
    if getattr(write, "__name__", "") == "neutral":  # of an earlier run() in this process
        return

    def neutral(text: str) -> int:
        return write(text if not text.strip(UP) else STEERING.sub(lambda found: ascii(found[0])[1:-1], text))

    stream.write = neutral  # type: ignore[method-assign]


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Import slow libraries in less time: Python neither searches what they hold for garbage now, nor as it ends.

    For PyTorch that is a quarter of the time between its import and the end of the process.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def run(main: Callable[[], int], name: str | None = None) -> NoReturn:
    """Run a script's main and exit; name: of the script, in messages.

    The exit code is what main returns; 2 after a UserError or OSError, which is printed in one line; 130 after Ctrl-C;
    143 after SIGTERM and 129 after SIGHUP. A bug keeps its traceback.
    """
    _prepare_streams()
    if "LOCAL_RANK" not in os.environ:  # a worker of torchrun may be waiting for others, deaf to Python's handlers
        for number in (signal.SIGTERM, HANGUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, _terminate)
    status = _status(main, name or Path(sys.argv[0]).name)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:  # else Python would try again while it ends, and print a traceback
            _discard(stream.fileno())
            status = status or (0 if isinstance(error, BrokenPipeError) else 2)
    sys.exit(status)


def _status(main: Callable[[], int], name: str) -> int:
    """Run main, print what ended it, and return the exit code."""
    try:
        try:
            status = main()
        except SystemExit as end:  # of argparse, or of a signal
            status = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, as in `| head`, has seen enough
        _discard(sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print_error(f"{name}: error: {_reason(error)}")
        return 2


def _reason(error: UserError | OSError) -> str:
    """Say in one line what went wrong; of a file, with its name first."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str | Path):
        return one_line(f"{shown(error.filename)}: {error.strerror}")
    return one_line(error)
