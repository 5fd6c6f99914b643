"""The measurements of bench.py: each program runs in its own process (peers.py), and the programs take turns.

report = measure.Report()
results = measure.run(common, quick=True, report=report)    # plain values, fit for JSON

Turns spread a slow minute of the machine over all programs. Times are medians.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import models
import recipes
from data import Split
from dataset import sources
from optim import NATIVE_BFLOAT16
from runtime import cli, device, kernels

TRAINING_IMAGES = 60_000
TEST_IMAGES = 10_000
GROWTH = (6_000, 12_000, 30_000, 60_000, 240_000)  # images of an epoch; the last is the set four times over
MATRIX_SIZES = (1024, 2048, 4096)
MAX_EPOCHS = 25  # of the tutorial loop on its way to the target
TUTORIAL_SEEDS = 3
PACKAGES = ("torch", "torchvision", "scikit-learn", "keras", "jax")

# name in the table: options of peers.py
PEERS: dict[str, dict[str, Any]] = {
    "tutorial loop": {"program": "tutorial", "workers": 0},
    "tutorial loop, 2 workers": {"program": "tutorial", "workers": 2},
    "scikit-learn MLPClassifier": {"program": "scikit-learn"},
    "Keras 3 on JAX": {"program": "keras"},
    "ours, published": {"program": "ours", "recipe": "published"},
    "ours, published in bfloat16": {"program": "ours", "recipe": "published", "precision": "bfloat16"},
    "ours, fast": {"program": "ours", "recipe": "fast"},
}
COMMANDS = {
    "train.py --help": ["train.py", "--help"],
    "evaluate.py": ["evaluate.py"],
    "import torch": ["-c", "import torch"],
}


class Report:
    """Prints a line for each thing measured, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        """Print one line."""
        print(f"{timedelta(seconds=round(time.perf_counter() - self.start))}  {text}", flush=True)


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
        self._answer()

    def ask(self, word: str) -> dict[str, float]:
        """Have one thing done, a word of peers.py. Raises RuntimeError, with its messages, if the process has ended."""
        self.words.write(word + "\n")
        self.words.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
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


def run(common: dict[str, Any], quick: bool, report: Report) -> dict[str, Any]:
    """Measure everything, or with `quick` the MLP alone and no training of a peer to the end.

    common: options of every worker, "threads", "data_dir" and "torchvision_dir".
    """
    results: dict[str, Any] = {"machine": machine(), "kernels": compiler(), "quick": quick}
    limits = results["limit_gflops"] = matrix_products(report)
    measured = {"mlp": 2} if quick else {"mlp": 7, "cnn": 3}  # rounds
    results["epoch"] = {}
    for model, rounds in measured.items():
        rows = results["epoch"][model] = epochs(model, peers(), common, rounds, report)
        add_limits(rows, models.count_flop(models.build(model), training=True) * TRAINING_IMAGES, limits)
    results["to_target"] = {model: to_target(model, common, quick, report) for model in measured}
    results["start_up"] = start_up(report)
    results["growth"] = growth(list(measured), common, quick, report)
    results["minutes"] = (time.perf_counter() - report.start) / 60
    return results


def peers() -> dict[str, dict[str, Any]]:
    """Return the rows of PEERS that can be measured here."""
    present = dict(PEERS)
    if not NATIVE_BFLOAT16:
        del present["ours, published in bfloat16"]
    if not has_keras():
        del present["Keras 3 on JAX"]
    return present


def has_keras() -> bool:
    """Say whether requirements-bench.txt is installed."""
    return all(importlib.util.find_spec(package) for package in ("keras", "jax"))


def compiler() -> str:
    """Compile kernels.c, so that no timing includes it. Returns "compiled", or the reason why it cannot be."""
    try:
        kernels.compiled()
    except kernels.KernelError as error:
        return str(error)
    return "compiled"


def write_for_torchvision(folder: Path, parts: Mapping[str, Split]) -> None:
    """Write the four IDX files where torchvision.datasets.FashionMNIST looks for them."""
    raw = folder / "FashionMNIST" / "raw"
    shutil.rmtree(raw, ignore_errors=True)  # of an earlier benchmark; write() replaces no other set
    sources.write(raw, {part: (split.images, split.labels) for part, split in parts.items()})


def machine() -> dict[str, Any]:
    """Describe what the numbers are measured on."""
    features = [feature for feature in device.FEATURES if torch.cpu.get_capabilities().get(feature) is True]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "processor": device.processor().removesuffix(f" with {', '.join(features)}"),
        "features": features,
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": versions,
    }


def matrix_products(report: Callable[[str], None]) -> dict[str, float]:
    """Measure the machine's limit: the best rate of a square matrix product, in GFLOP/s by dtype."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        emulated = dtype is torch.bfloat16 and not NATIVE_BFLOAT16  # a larger one would take minutes
        sizes = MATRIX_SIZES[:1] if emulated else MATRIX_SIZES
        name = device.dtype_name(dtype)
        rates[name] = max(2 * size**3 / product_seconds(size, dtype) / 1e9 for size in sizes)
        report(f"matrix product, {name}: {rates[name]:,.0f} GFLOP/s")
    return rates


def product_seconds(size: int, dtype: torch.dtype) -> float:
    """Return the median seconds of a product of two square matrices, over a second and a half."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 1.5:
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def epochs(
    model: str,
    programs: Mapping[str, dict[str, Any]],
    common: dict[str, Any],
    rounds: int,
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Measure an epoch of every program, in turns, after one to warm up; the test and the memory as well."""
    workers = {
        name: Worker(model=model, epochs=1_000, **options, **common)
        for name, options in programs.items()
        if not (model == "cnn" and options["program"] == "scikit-learn")
    }
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    test_seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name, worker in workers.items():
            if number == 0 and name.startswith("tutorial") and model == "cnn":
                continue  # it has nothing to warm up, and takes long
            taken, test_taken = worker.epoch_seconds(), worker.ask("test")["seconds"]
            if number:
                seconds[name].append(taken)
                test_seconds[name].append(test_taken)
            turn = f"round {number} of {rounds}" if number else "to warm up"
            report(f"{model.upper()} epoch, {name}: {taken:.2f} s, {turn}")
    rows = {
        name: {
            "seconds": median(seconds[name]),
            "all_seconds": seconds[name],
            "test_images_per_second": TEST_IMAGES / median(test_seconds[name]),
            "peak_mib": worker.ask("memory")["peak_mib"],
        }
        for name, worker in workers.items()
    }
    for worker in workers.values():
        worker.close()
    return rows


def add_limits(rows: Mapping[str, dict[str, Any]], flop: float, limits: Mapping[str, float]) -> None:
    """Add to every program its arithmetic rate, and that as a share of the machine's limits. flop: of an epoch."""
    for row in rows.values():
        row["gflops"] = flop / row["seconds"] / 1e9
        for dtype, limit in limits.items():
            row[f"share_of_{dtype}"] = row["gflops"] / limit


def to_target(model: str, common: dict[str, Any], quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure the training time until the mean test accuracy over seeds reaches the published one.

    The tutorial loop is measured to the first epoch whose mean over 3 seeds reaches it, which flatters the loop. The
    recipe "fast" is measured as a whole, for 5 seeds or more: one run takes its turn after each of those epochs.
    """
    target = recipes.PUBLISHED[model]
    ours: list[dict[str, float]] = []
    curve: list[float] = []
    seconds: list[float] = []
    for epoch_seconds, accuracy in tutorial_epochs(model, common, report) if not quick else ():
        seconds += epoch_seconds
        curve.append(accuracy)
        ours.append(run_fast(model, len(ours), common, report))
    while len(ours) < (2 if quick else 5):
        ours.append(run_fast(model, len(ours), common, report))
    accuracies = [run["accuracy"] for run in ours]
    result: dict[str, Any] = {
        "target": target,
        "ours": {
            "seconds": median(run["seconds"] for run in ours),
            "mean_accuracy": mean(accuracies),
            "sd": stdev(accuracies),
            "seeds": len(ours),
            "reached": mean(accuracies) >= target,
        },
    }
    if curve:
        result["tutorial"] = {
            "seconds": len(curve) * median(seconds),
            "epochs": len(curve),
            "mean_accuracies": curve,
            "seeds": TUTORIAL_SEEDS,
            "reached": curve[-1] >= target,
        }
        result["ratio"] = result["tutorial"]["seconds"] / result["ours"]["seconds"]
    return result


def tutorial_epochs(
    model: str, common: dict[str, Any], report: Callable[[str], None]
) -> Iterator[tuple[list[float], float]]:
    """Train the tutorial loop until its mean accuracy reaches the target: seconds of each seed, and that mean."""
    workers = [Worker(model=model, program="tutorial", seed=seed, **common) for seed in range(TUTORIAL_SEEDS)]
    target = recipes.PUBLISHED[model]
    for epoch in range(1, MAX_EPOCHS + 1):
        seconds = [worker.ask("epoch")["seconds"] for worker in workers]
        accuracy = mean(worker.ask("test")["accuracy"] for worker in workers)
        reached = f"mean of {len(workers)} seeds {accuracy:.2%}, target {target:.2%}"
        report(f"{model.upper()} by the tutorial loop, epoch {epoch}: {reached}")
        yield seconds, accuracy
        if accuracy >= target:
            break
    for worker in workers:
        worker.close()


def run_fast(model: str, seed: int, common: dict[str, Any], report: Callable[[str], None]) -> dict[str, float]:
    """Train one model by recipe "fast" to the end: its seconds and its test accuracy."""
    worker = Worker(model=model, program="ours", recipe="fast", seed=seed, **common)
    seconds = sum(worker.ask("epoch")["seconds"] for _ in range(recipes.find("fast", model).epochs))
    accuracy = worker.ask("test")["accuracy"]
    worker.close()
    report(f"{model.upper()} by recipe fast, seed {seed}: {accuracy:.2%} in {seconds:.2f} s")
    return {"seconds": seconds, "accuracy": accuracy}


def start_up(report: Callable[[str], None]) -> dict[str, float]:
    """Measure whole commands, from the shell's prompt back to it: the median seconds of three."""
    result = {}
    for name, arguments in COMMANDS.items():
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=cli.ROOT, capture_output=True, check=True)
            seconds.append(time.perf_counter() - begin)
        result[name] = median(seconds)
        report(f"start to end of {name}: {result[name]:.2f} s")
    return result


def growth(
    names: Sequence[str], common: dict[str, Any], quick: bool, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure seconds and peak memory of an epoch of recipe "fast", by number of images and threads."""
    rows = []
    for model in names:
        for threads in (2,) if quick else (1, 2):
            for images in GROWTH[:4] if quick else GROWTH:
                options = common | {"threads": threads}
                worker = Worker(model=model, program="ours", recipe="fast", images=images, epochs=1_000, **options)
                worker.ask("epoch")  # to warm up
                seconds, memory = worker.epoch_seconds(), worker.ask("memory")["peak_mib"]
                worker.close()
                row = {"model": model, "threads": threads, "images": images, "seconds": seconds, "peak_mib": memory}
                rows.append(row)
                threads_used = f"{threads} thread{'s' * (threads > 1)}"
                report(f"{model.upper()}, {images:,} images, {threads_used}: {seconds:.2f} s an epoch")
    return rows
