"""What the scripts' command lines share. Standard library only, so that --help answers at once."""

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "checkpoints"
FIGURES = HERE / "figures"
DEEP = HERE / "runs" / "deep"
DEFAULT_CHECKPOINT = CHECKPOINTS / "best_cnn_fmnist.pt"
OTHER_PROCESS = os.environ.get("LOCAL_RANK", "0") != "0"  # of torchrun: what all would say, the first one says

# Nothing is written outside the clone: these two libraries keep a cache in the home and the temporary folder.
os.environ.setdefault("MPLCONFIGDIR", str(HERE / ".cache" / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HERE / ".cache" / "torchinductor"))


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and tells a mistake in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        tell(f"{self.prog}: error: {one_line(message)} (--help lists the flags)")
        self.exit(2)


def add_common(parser):
    add_data_dir(parser)
    add_device(parser)


def add_data_dir(parser):
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the four IDX files, raw or .gz (or the variable FMNIST_DIR; default: found or fetched)",
    )


def add_device(parser):
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")


def whole_number(low, high):
    """An argparse type: a whole number from low to high."""

    def convert(text):
        number = int(text) if len(text) <= 20 and text.isascii() and text.isdigit() else -1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {low} to {high}")
        return number

    return convert


def positive_number(text):
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0")
    return value


def file_to_write(suffix):
    """An argparse type: a path to write, of that suffix, so that no checkpoint is replaced by a slip."""

    def convert(text):
        path = Path(text)
        if path.suffix != suffix or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is not a {suffix} file in a folder that exists")
        return path

    return convert


def shown(path):
    """A path as a user would type it here: relative below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def one_line(message):
    """An error or a text as one line of what a terminal can show."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(message).split()))


def tell(error):
    """Print an error that ends all processes, once: torchrun ends the first one too when another is gone before it."""
    if OTHER_PROCESS:
        time.sleep(10)
    else:
        print(error, file=sys.stderr)


def plain(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


class StopSignals:
    """Within `with StopSignals() as signals`, Ctrl-C and SIGTERM only set signals.code, the exit code they ask for.

    So what is under way can be brought to a good end. A second Ctrl-C is raised at once, unless torchrun, which
    passes them on, may have sent it.
    """

    code = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, _):
        self.code = 128 + number
        if number == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _terminate(*_):
    raise SystemExit(128 + signal.SIGTERM)


def run(main):
    """Run a script: a user's mistake ends in one line and exit code 2, Ctrl-C in 130, SIGTERM in 143, a bug in its
    traceback.
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
    except BrokenPipeError:  # the reader, as in `| head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        from data import UserError

        if not isinstance(error, UserError | OSError):
            raise
        tell(f"{name}: error: {one_line(error)}")
        status = 2
    sys.exit(status)
