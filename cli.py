"""What the scripts' command lines share. Standard library only, so that --help answers at once."""

import argparse
import math
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "checkpoints"
FIGURES = HERE / "figures"
DEFAULT_CHECKPOINT = CHECKPOINTS / "best_cnn_fmnist.pt"

# Nothing is written outside the clone: these two libraries keep a cache in the home and the temporary folder.
os.environ.setdefault("MPLCONFIGDIR", str(HERE / ".cache" / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HERE / ".cache" / "torchinductor"))


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and tells a mistake in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def add_common(parser):
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the four IDX files, raw or .gz (or the variable FMNIST_DIR; default: found or fetched)",
    )
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


def json_file(text):
    """An argparse type: a path to write, ending in .json so that no checkpoint is replaced by a slip."""
    path = Path(text)
    if path.suffix != ".json" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a .json file in a folder that exists")
    return path


def shown(path):
    """A path as a user would type it here: relative below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def plain(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def run(main):
    """Run a script: a user's mistake ends in one line and exit code 2, Ctrl-C in 130, a bug in its traceback."""
    name = Path(sys.argv[0]).name
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
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
