"""What busy neighbours cost a training: its epochs alone, beside processes that never rest, and beside its like.

rows = neighbours.measure(measure.peers(target), common, quick=True, report=print)

A neighbour computes without a pause on one core. It ends by itself after LONGEST seconds, or when bench.py ends.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.worker import Worker
from runtime import cli

COUNTS = (1, 3)  # neighbours
LONGEST = 300  # seconds
SECONDS, QUICK_SECONDS = 2.5, 0.5  # of each measurement, at least
EPOCHS = 2  # of each measurement, at least
NEVER_RESTS = """
import os, sys, threading, time
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # the pipe's end is bench.py's
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end: pass
"""

# model: images of an epoch, so few that the table takes minutes, and rows of measure.PEERS
IN_MEMORY = ["ours, published", "ours, fast", "PyTorch loop in memory", "Keras 3 on JAX", "JAX, by hand"]
TABLE: dict[str, tuple[int, list[str]]] = {
    "mlp": (60_000, IN_MEMORY),
    "cnn": (6_000, IN_MEMORY),
    "resnet": (1_024, ["ours, best"]),
}
QUICK = {"mlp": (60_000, ["ours, published", "ours, fast", "JAX, by hand"])}
BEST = {"ours, best": {"program": "ours", "recipe": "best"}}


def measure(
    programs: Mapping[str, dict[str, Any]], common: dict[str, Any], quick: bool, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure the rows of TABLE that are among the programs, or with `quick` those of QUICK, shortly.

    Returns dicts with model, program, images, quiet (median seconds of an epoch alone), beside (number of neighbours:
    mean seconds), two (mean seconds of each of two such trainings at once) and fair (number of neighbours: the ratio
    to quiet by fair sharing of the cores, and of "two").
    """
    rows, least = [], QUICK_SECONDS if quick else SECONDS
    programs = {**programs, **BEST}
    for model, (images, names) in (QUICK if quick else TABLE).items():
        for name in filter(programs.__contains__, names):
            options = {"model": model, "images": images, "epochs": 100_000, **programs[name], **common}
            row: dict[str, Any] = {"model": model, "program": name, "images": images, "fair": fair()}
            row |= training(options, least)
            rows.append(row)
            beside = ", ".join(f"beside {count} {taken / row['quiet']:.1f}" for count, taken in row["beside"].items())
            two = f"two at once {max(row['two']) / row['quiet']:.1f} times that"
            report(f"{model.upper()}, {name}: {row['quiet']:.2f} s an epoch; {beside}, {two}")
    return rows


def fair() -> dict[str, float]:
    """Return the ratio of an epoch beside so many neighbours, by fair sharing of the cores, and of "two" at once."""
    cores = cli.cores()
    return {str(count): (count + cores) / cores for count in COUNTS} | {"two": 2.0}


def training(options: dict[str, Any], least: float) -> dict[str, Any]:
    """Measure one training: quiet, beside and two, as measure returns them."""
    workers = [Worker(**options)]
    warm_up(workers[0])
    quiet, beside = median(*epochs(workers, least)), {}
    for count in COUNTS:
        with busy(count):
            beside[str(count)] = mean(*epochs(workers, least))
    workers.append(Worker(**options))
    warm_up(workers[1])
    two = [mean(seconds) for seconds in epochs(workers, least)]
    for worker in workers:
        worker.close()
    return {"quiet": quiet, "beside": beside, "two": two}


def warm_up(worker: Worker) -> None:
    """Train two epochs: the first may compile."""
    for _ in range(2):
        worker.ask("epoch")


def epochs(workers: Sequence[Worker], least: float) -> list[list[float]]:
    """Have all workers train at once, for EPOCHS and `least` seconds. Returns the seconds of each one's epochs."""
    seconds: list[list[float]] = [[] for _ in workers]
    while len(seconds[0]) < EPOCHS or sum(seconds[0]) < least:
        for worker in workers:
            worker.begin("epoch")
        for worker, own in zip(workers, seconds, strict=True):
            own.append(worker.answer()["seconds"])
    return seconds


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile."""
    command = [sys.executable, "-c", NEVER_RESTS, str(LONGEST)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
    try:
        time.sleep(0.3)  # they have started
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()
