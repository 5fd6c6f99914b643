"""The process that decodes pictures, because a picture of one megabyte can take minutes and gigabytes.

image = worker.decode(content)      # in a process that is kept for the next picture
python -m pictures.worker           # what that process runs

A question is a length, a limit of time and a picture's bytes. An answer is a width, a height and RGB pixels, or the
length of a text and that.
"""

import atexit
import contextlib
import gc
import os
import signal
import struct
import subprocess
import sys
import threading

from PIL import Image

from pictures.decode import WORKING
from pictures.decode import decode as decode_here
from runtime import cli
from runtime.errors import UserError, one_line

SECONDS = 4  # of the processor for decoding a picture; with all else it takes less than 5
PATIENCE = 10 if hasattr(signal, "setitimer") else SECONDS  # by the clock, twice; the machine may be busy
MOST_MEMORY = 2**30  # bytes
MOST_WORDS = 1_000  # bytes of an answer that is no picture
READY = b"R"
QUESTION = struct.Struct("<Qd")  # length, and the most seconds of the processor
ANSWER = struct.Struct("<3I")  # width, height; or 0, 0 and the length of a text
INHERITED = ("PATH", "HOME", "APPDATA", "SYSTEMROOT", "PYTHON", "LD_", "DYLD_")  # beginnings; others can be secrets
ALONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Worker:
    """A process that decodes one picture after another."""

    def __init__(self) -> None:
        self._late = self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pictures.worker"],
            cwd=cli.ROOT,
            env=ALONE | {name: value for name, value in os.environ.items() if name.upper().startswith(INHERITED)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what decoders say of a damaged file
        )

    def ask(self, content: bytes) -> Image.Image | str:
        """Send a picture's bytes; return the picture, or what is wrong with it.

        Raises UserError if the process ended, and TimeoutError if it took too long by the clock; it is of no use then.
        """
        self._wait_until_ready()
        timer = threading.Timer(PATIENCE, self._stop)
        timer.daemon = True
        timer.start()
        try:
            return self._answer(content)
        except (EOFError, OSError):  # OSError: a broken pipe
            self.end()
            if self._late:
                raise TimeoutError from None
            if self._process.returncode == -getattr(signal, "SIGPROF", 0):
                raise UserError(f"takes more than {SECONDS} s to decode: save it anew as JPEG") from None
            raise UserError("damaged, or takes more than 1 GB of memory to decode: its decoder ended") from None
        finally:
            timer.cancel()
            timer.join()

    def _wait_until_ready(self) -> None:
        """Wait for the process to start, however long that takes: it says nothing about the picture."""
        assert self._process.stdout
        if not self._ready and self._process.stdout.read(len(READY)) != READY:
            raise RuntimeError("`python -m pictures.worker` does not start")
        self._ready = True

    def _answer(self, content: bytes) -> Image.Image | str:
        assert self._process.stdin
        self._process.stdin.write(QUESTION.pack(len(content), SECONDS))
        self._process.stdin.write(content)
        self._process.stdin.flush()
        width, height, length = ANSWER.unpack(self._read(ANSWER.size))
        if max(width, height) > 2 * WORKING or length > MOST_WORDS:
            raise EOFError
        if not width:
            return one_line(self._read(length).decode(errors="replace"))
        return Image.frombytes("RGB", (width, height), self._read(3 * width * height))

    def _read(self, count: int) -> bytes:
        assert self._process.stdout
        content = self._process.stdout.read(count)
        if len(content) < count:
            raise EOFError
        return content

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def is_alive(self) -> bool:
        """Say whether the process can be asked."""
        return self._process.poll() is None and not self._late

    def end(self) -> None:
        """End the process, if it has not ended itself, and free what it holds."""
        with contextlib.suppress(OSError):  # an ended process has a broken pipe
            if self._process.stdin:
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


_idle: list[Worker] = []  # ready for a next picture; more than one where threads ask at the same time


def start() -> None:
    """Start a process for the first picture, so that it is ready by then."""
    _idle.append(Worker())


def decode(content: bytes) -> Image.Image:
    """Decode a picture's bytes as pictures.decode.decode does, within SECONDS of the processor and MOST_MEMORY.

    Raises UserError if it is damaged or too large; without words if no decoder knows it.
    """
    for _ in range(2):  # the machine may be busy, or Ctrl-Z may have stopped all processes of the terminal
        with contextlib.suppress(TimeoutError):
            return _decode(content)
    raise UserError(f"takes more than {PATIENCE} s to decode: try again later, or save it anew as JPEG")


def _decode(content: bytes) -> Image.Image:
    """Have a process decode a picture. Raises UserError, and TimeoutError if it takes too long by the clock."""
    try:
        worker = _idle.pop()
    except IndexError:  # another thread may have taken the last one at this moment
        worker = Worker()
    if not worker.is_alive():
        worker = Worker()
    try:
        answer = worker.ask(content)
    except BaseException:  # Ctrl-C, too, comes before the answer
        worker.end()
        raise
    _idle.append(worker)
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # two processes must not ask the same one


# --- in the process itself -------------------------------------------------------------------------------


def serve() -> None:
    """Answer questions until there are no more."""
    _limit()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a decoder prints is no answer
    gc.freeze()
    answers.write(READY)
    answers.flush()
    while head := questions.read(QUESTION.size):
        length, seconds = QUESTION.unpack(head)
        content = questions.read(length)
        _set_timer(seconds)
        answers.write(_answer(content))
        answers.flush()
        _set_timer(0)
        gc.collect()  # a picture that is left in a circle of references takes memory from the next one


def _answer(content: bytes) -> bytes:
    try:
        image = decode_here(content)
        return ANSWER.pack(*image.size, 0) + image.tobytes()
    except MemoryError:  # the process ends: there is no knowing what is left
        raise
    except UserError as error:
        words = str(error)
    except Exception as error:  # a malformed file can make a decoder raise anything
        words = f"damaged: {error}"
    text = words.encode(errors="replace")[:MOST_WORDS]
    return ANSWER.pack(0, 0, len(text)) + text


def _set_timer(seconds: float) -> None:
    """Let the system end this process after so many seconds of the processor; 0: never."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit() -> None:
    """Limit this process's memory, where the system can, and have it leave no core dump."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such module; macOS may refuse
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


if __name__ == "__main__":
    serve()
