"""The measurements of bench.py: each program runs in its own process (peers.py), and the programs take turns.

report = measure.Report()
results = measure.run(common, picture, quick=True, report=report)    # plain values, fit for JSON

Turns spread a slow minute of the machine over all programs. Times are medians. neighbours.py measures what other busy
processes cost a training.
"""

import contextlib
import importlib.metadata
import importlib.util
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
from PIL import Image

import models
import recipes
from benchmarks import neighbours
from benchmarks.worker import Worker
from data import Split
from dataset import sources
from runtime import cli, device, kernels

TRAINING_IMAGES = 60_000
TEST_IMAGES = 10_000
GROWTH = (6_000, 60_000, 240_000)  # images of an epoch; the last is the set four times over
MATRIX_SIZES = (1024, 2048, 4096)
MATRIX_SECONDS = 1.5  # of each product
MAX_EPOCHS = 25  # of the tutorial loop on its way to the target
TUTORIAL_SEEDS = 3
PACKAGES = ("torch", "torchvision", "scikit-learn", "lightning", "keras", "jax")

# name in the table: options of peers.py
PEERS: dict[str, dict[str, Any]] = {
    "tutorial loop": {"program": "tutorial", "workers": 0},
    "tutorial loop, 2 workers": {"program": "tutorial", "workers": 2},
    "Lightning's Trainer": {"program": "lightning"},
    "PyTorch loop in memory": {"program": "in memory"},
    "scikit-learn MLPClassifier": {"program": "scikit-learn"},
    "Keras 3 on JAX": {"program": "keras"},
    "JAX, by hand": {"program": "jax"},
    "ours, published": {"program": "ours", "recipe": "published"},
    "ours, published in bfloat16": {"program": "ours", "recipe": "published", "precision": "bfloat16"},
    "ours, fast": {"program": "ours", "recipe": "fast"},
}
NEEDS = {"lightning": ["lightning"], "keras": ["keras", "jax"], "jax": ["jax"]}  # program: packages
ON_A_GPU = ("tutorial", "lightning", "in memory", "ours")  # programs that take a device


class Report:
    """Prints a line for each thing measured, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        """Print one line."""
        print(f"{timedelta(seconds=round(time.perf_counter() - self.start))}  {text}", flush=True)


def run(common: dict[str, Any], picture: torch.Tensor, quick: bool, report: Report) -> dict[str, Any]:
    """Measure everything, or with `quick` the MLP alone and no training of a peer to the end.

    common: options of every worker, "threads", "device", "data_dir" and "torchvision_dir"; picture: one to classify,
    uint8 (28, 28). On a GPU, what is about the processor is left out.
    """
    target = torch.device(common["device"])
    results: dict[str, Any] = {"machine": machine(target), "kernels": compiler(), "quick": quick}
    results["products"] = matrix_products(target, report)
    limits = results["limit_gflops"] = {dtype: max(rates.values()) for dtype, rates in results["products"].items()}
    measured = {"mlp": 2} if quick else {"mlp": 7, "cnn": 3}  # rounds
    results["epoch"] = {}
    for model, rounds in measured.items():
        rows = results["epoch"][model] = epochs(model, peers(target), common, rounds, report)
        add_limits(rows, models.count_flop(models.build(model), training=True) * TRAINING_IMAGES, limits)
    results["to_target"] = {model: to_target(model, common, quick, report) for model in measured}
    if target.type == "cpu":
        results["neighbours"] = neighbours.measure(peers(target), common, quick, report)
        results["start_up"] = start_up(picture, common["data_dir"], quick, report)
        results["growth"] = growth(list(measured), common, quick, report)
    results["minutes"] = (time.perf_counter() - report.start) / 60
    return results


def peers(target: torch.device) -> dict[str, dict[str, Any]]:
    """Return the rows of PEERS that can be measured here."""
    absent, on_cpu = missing(), target.type == "cpu"
    present = {
        name: options
        for name, options in PEERS.items()
        if name not in absent and (on_cpu or options["program"] in ON_A_GPU)
    }
    if not device.has_bfloat16(target):
        del present["ours, published in bfloat16"]
    return present


def missing() -> list[str]:
    """Name the rows of PEERS that need a package of requirements-bench.txt that is not installed."""
    return [
        name
        for name, options in PEERS.items()
        if not all(map(importlib.util.find_spec, NEEDS.get(options["program"], [])))
    ]


def compiler() -> str:
    """Compile the kernels, so that no timing includes it. Returns "compiled", or the reason why they cannot be."""
    try:
        for name in kernels.LIBRARIES:
            kernels.library(name)
    except kernels.KernelError as error:
        return str(error)
    return "compiled"


def write_for_torchvision(folder: Path, parts: Mapping[str, Split]) -> None:
    """Write the four IDX files where torchvision.datasets.FashionMNIST looks for them."""
    raw = folder / "FashionMNIST" / "raw"
    shutil.rmtree(raw, ignore_errors=True)  # of an earlier benchmark; write() replaces no other set
    sources.write(raw, {part: (split.images, split.labels) for part, split in parts.items()})


def machine(target: torch.device) -> dict[str, Any]:
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
        **({"gpu": torch.cuda.get_device_name(target)} if target.type == "cuda" else {}),
    }


def matrix_products(target: torch.device, report: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Measure the machine's limit: by dtype and library, the best rate of a product of square matrices, in GFLOP/s."""
    rates: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        emulated = dtype is torch.bfloat16 and not device.has_bfloat16(target)  # a larger one would take minutes
        sizes = MATRIX_SIZES[:1] if emulated else MATRIX_SIZES
        name = device.dtype_name(dtype)
        rates[name] = {}
        for library, multiply in products(target, dtype).items():
            best = max(2 * size**3 / product_seconds(size, dtype, target, multiply) / 1e9 for size in sizes)
            rates[name][library] = best
            report(f"matrix product, {name}, {library}: {best:,.0f} GFLOP/s")
    return rates


def products(target: torch.device, dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor, torch.Tensor], Any]]:
    """Return the functions that multiply two matrices here, by name. PyTorch's own choice is the first."""
    found: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {"PyTorch's a @ b": torch.matmul}
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # a part of PyTorch that may change
    if target.type == "cpu" and dtype is torch.float32 and torch.backends.mkldnn.is_available() and linear:
        found["oneDNN's linear"] = lambda a, b: linear(a, b, None, "none", [], "")
    return found


def product_seconds(
    size: int, dtype: torch.dtype, target: torch.device, multiply: Callable[[torch.Tensor, torch.Tensor], Any]
) -> float:
    """Return the median seconds of a product of two square matrices, over MATRIX_SECONDS."""
    a, b = (torch.randn(size, size, dtype=dtype, device=target) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MATRIX_SECONDS:
        begin = time.perf_counter()
        multiply(a, b)
        if target.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def epochs(
    model: str,
    programs: Mapping[str, dict[str, Any]],
    common: dict[str, Any],
    rounds: int,
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Measure an epoch of every program, in turns, after one to warm up; the test and the memory as well.

    The epoch to warm up, which may include compiling, is recorded as first_seconds.
    """
    workers = {
        name: Worker(model=model, epochs=1_000, **options, **common)
        for name, options in programs.items()
        if not (model == "cnn" and options["program"] == "scikit-learn")
    }
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    test_seconds: dict[str, list[float]] = {name: [] for name in workers}
    first: dict[str, float] = {}
    for name, worker in workers.items():
        if model == "cnn" and programs[name]["program"] in ("tutorial", "lightning"):
            continue  # it has nothing to warm up, and takes long
        first[name] = worker.ask("epoch")["seconds"]
        worker.ask("test")
        report(f"{model.upper()} epoch, {name}: {first[name]:.2f} s, to warm up")
    for number in range(1, rounds + 1):
        for name, worker in workers.items():
            seconds[name].append(worker.epoch_seconds())
            test_seconds[name].append(worker.ask("test")["seconds"])
            report(f"{model.upper()} epoch, {name}: {seconds[name][-1]:.2f} s, round {number} of {rounds}")
    rows = {
        name: {
            "seconds": median(seconds[name]),
            "all_seconds": seconds[name],
            "test_images_per_second": TEST_IMAGES / median(test_seconds[name]),
            "peak_mib": worker.ask("memory")["peak_mib"],
            **({"first_seconds": first[name]} if name in first else {}),
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


def start_up(
    picture: torch.Tensor, data_dir: str | None, quick: bool, report: Callable[[str], None]
) -> dict[str, float]:
    """Measure whole commands, from the shell's prompt back to it: the least seconds of three, with files in memory.

    They run like a user's. What they write goes to a temporary folder.
    """
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(picture.numpy()).save(Path(folder, "picture.png"))
        for name, arguments in commands(Path(folder), data_dir, quick).items():
            seconds = []
            for number in map(str, range(3)):
                begin = time.perf_counter()
                command = [sys.executable, *(word.replace("{number}", number) for word in arguments)]
                subprocess.run(command, cwd=cli.ROOT, capture_output=True, check=True)
                seconds.append(time.perf_counter() - begin)
            result[name] = min(seconds)
            report(f"start to end of {name}: {result[name]:.2f} s")
    return result


def commands(folder: Path, data_dir: str | None, quick: bool) -> dict[str, list[str]]:
    """Return the arguments of Python by the name of a command; {number} is to be that of the try."""
    where = ["--data-dir", str(data_dir)] if data_dir else []
    found = {
        "import torch": ["-c", "import torch"],
        "train.py --help": ["train.py", "--help"],
        "train.py --model mlp --recipe fast": [
            *["train.py", "--model", "mlp", "--recipe", "fast"],
            *["--checkpoint-dir", str(folder / "{number}"), *where],
        ],
        "evaluate.py": ["evaluate.py", *where],
        "predict.py PICTURE": ["predict.py", str(folder / "picture.png")],
    }
    if not quick:
        found["analyze_errors.py"] = ["analyze_errors.py", "--figures-dir", str(folder / "figures"), *where]
    return found


def growth(
    names: Sequence[str], common: dict[str, Any], quick: bool, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure seconds and peak memory of an epoch of recipe "fast", by number of images and threads."""
    rows = []
    for model in names:
        for threads in (2,) if quick else (1, 2):
            for images in GROWTH[:2] if quick else GROWTH:
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
