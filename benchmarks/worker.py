"""A program of peers.py in its own process.

worker = Worker(program="tutorial", model="mlp", threads=2, data_dir=None, torchvision_dir=".cache/bench")
seconds = worker.ask("epoch")["seconds"]
worker.close()
"""

import json
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

from runtime import cli


class Worker:
    """A process of peers.py. ask("epoch") and the like return its answer."""

    def __init__(self, **options: Any) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process; a pipe would fill up
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=cli.ROOT,
        )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.words, self.answers = self.process.stdin, self.process.stdout
        self.answer()

    def ask(self, word: str) -> dict[str, float]:
        """Have one thing done, a word of peers.py. Raises RuntimeError, with its messages, if the process has ended."""
        self.begin(word)
        return self.answer()

    def begin(self, word: str) -> None:
        """Have one thing done, without waiting for its answer."""
        self.words.write(word + "\n")
        self.words.flush()

    def answer(self) -> dict[str, float]:
        """Wait for the answer to the earliest word that has none yet."""
        line = self.answers.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"a worker of bench.py ended:\n{self.errors.read()}")
        return json.loads(line)

    def epoch_seconds(self) -> float:
        """Return the median of as many epochs as fill a second, since the first after a pause is slower."""
        seconds: list[float] = []
        while sum(seconds) < 1:
            seconds.append(self.ask("epoch")["seconds"])
        return median(seconds)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
