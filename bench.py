"""Measure how fast this repository trains, against the machine's own limit and what people would use instead.

python bench.py           # everything, at most 45 minutes; writes figures/bench.json and figures/bench.png
python bench.py --quick   # 2 minutes, the MLP alone, no training of a peer to the end: figures/bench_quick.*

Each program runs in a process of its own (peers.py) and they take turns, so that a slow minute of the machine hits all
alike. Times are medians. Keras is measured where `pip install -r requirements-bench.txt` has put it.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import cli

TARGETS = {"mlp": 0.8714, "cnn": 0.9182}  # published test accuracy
TRAINING_IMAGES = 60_000
GROWTH = (6_000, 12_000, 30_000, 60_000, 240_000)  # images of an epoch; the last is the set four times over
MATRIX_SIZES = (1024, 2048, 4096)
MAX_EPOCHS = 25  # of the tutorial loop on its way to the target

# name in the table: options of peers.py
PEERS = {
    "tutorial loop": {"program": "tutorial", "workers": 0},
    "tutorial loop, 2 workers": {"program": "tutorial", "workers": 2},
    "scikit-learn MLPClassifier": {"program": "scikit-learn"},
    "Keras 3 on JAX": {"program": "keras"},
    "ours, published": {"program": "ours", "recipe": "published"},
    "ours, published in bfloat16": {"program": "ours", "recipe": "published", "precision": "bfloat16"},
    "ours, fast": {"program": "ours", "recipe": "fast"},
}


def parse_args(argv=None):
    parser = cli.Parser("Measure the speed of training and evaluation against their alternatives.")
    parser.add_argument(
        "--quick", action="store_true", help="2 minutes: the MLP alone, no training of a peer to the end"
    )
    parser.add_argument("--figures-dir", metavar="DIR", type=Path, default=cli.FIGURES, help="default: figures")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the four IDX files (or the variable FMNIST_DIR; default: found or fetched)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import torch

    import checkpoint
    import data
    import kernels
    import optim
    import plots

    start = time.perf_counter()
    train, test = data.load("train+val", "test", data_dir=args.data_dir)
    if len(train.labels) != TRAINING_IMAGES:
        raise data.UserError("bench.py needs the whole of Fashion-MNIST")
    args.figures_dir.mkdir(parents=True, exist_ok=True)
    torchvision_dir = cli.HERE / ".cache" / "bench"
    write_for_torchvision(torchvision_dir, {"train": train, "t10k": test})
    common = {"threads": torch.get_num_threads(), "data_dir": args.data_dir, "torchvision_dir": str(torchvision_dir)}
    peers = dict(PEERS)
    if not optim.NATIVE_BFLOAT16:
        del peers["ours, published in bfloat16"]
    if not importlib.util.find_spec("keras") or not importlib.util.find_spec("jax"):
        del peers["Keras 3 on JAX"]
        print("Keras is not installed and left out: pip install -r requirements-bench.txt")
    reason = kernels.load()
    kernels.unload()

    print(
        f"this takes about {2 if args.quick else 30} minutes on two cores; use the machine for nothing else meanwhile"
    )
    results = {"machine": machine(), "kernels": reason or "compiled", "quick": args.quick}
    report = Reporter(start)
    results["limit_gflops"] = matrix_products(report)
    results["epoch"] = {}
    results["to_target"] = {}
    measured = ("mlp",) if args.quick else ("mlp", "cnn")
    for model in measured:
        rounds = 2 if args.quick else {"mlp": 7, "cnn": 3}[model]
        results["epoch"][model] = epochs(model, peers, common, rounds, report)
        add_limits(results["epoch"][model], flops_of_training(model) * TRAINING_IMAGES, results["limit_gflops"])
    for model in measured:
        results["to_target"][model] = to_target(model, common, args.quick, report)
    results["start_up"] = start_up(report)
    results["growth"] = growth(measured, common, args.quick, report)
    results["minutes"] = (time.perf_counter() - start) / 60

    stem = "bench_quick" if args.quick else "bench"
    checkpoint.write_json(args.figures_dir / f"{stem}.json", results)
    checkpoint.write_atomically(args.figures_dir / f"{stem}.png", plots.bench(results))
    print("\n" + markdown(results))
    print(f"\n{results['minutes']:.0f} minutes; written to {cli.shown(args.figures_dir)}/{stem}.json and {stem}.png")
    return 0


class Reporter:
    """One line for each thing measured, with the time since the start."""

    def __init__(self, start):
        self.start = start

    def __call__(self, text):
        print(f"{timedelta(seconds=round(time.perf_counter() - self.start))}  {text}", flush=True)


class Worker:
    """A process of peers.py; ask("epoch") and the like give its answer."""

    def __init__(self, **options):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - of the process; a pipe that nobody reads would fill
        self.process = subprocess.Popen(
            [sys.executable, cli.HERE / "peers.py", json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=cli.HERE,
        )  # fmt: skip
        self.answer()

    def ask(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"a worker of bench.py ended:\n{self.errors.read()}")
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()


def write_for_torchvision(folder, splits):
    """The four IDX files where torchvision.datasets.FashionMNIST looks for them."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, split in splits.items():
        n = len(split.labels)
        images = struct.pack(">4I", 2051, n, 28, 28) + split.images.numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2I", 2049, n) + split.labels.byte().numpy().tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def machine():
    """What the numbers were measured on, as a dict."""
    import torch

    name = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    present = {key for key, value in torch.cpu.get_capabilities().items() if value is True}
    packages = ("torch", "torchvision", "scikit-learn", "keras", "jax")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "processor": name,
        "features": sorted(present & {"avx2", "avx512_f", "avx512_bf16", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **versions},
    }


def matrix_products(report):
    """The machine's limit: the best rate of a square matrix product, in GFLOP/s by dtype."""
    import torch

    import optim

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        best = 0.0
        emulated = dtype is torch.bfloat16 and not optim.NATIVE_BFLOAT16  # a larger one would take minutes
        for size in MATRIX_SIZES[:1] if emulated else MATRIX_SIZES:
            a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
            seconds = []
            while len(seconds) < 3 or sum(seconds) < 1.5:
                begin = time.perf_counter()
                a @ b
                seconds.append(time.perf_counter() - begin)
            best = max(best, 2 * size**3 / statistics.median(seconds) / 1e9)
        rates[cli.plain(dtype)] = best
        report(f"matrix product, {cli.plain(dtype)}: {best:,.0f} GFLOP/s")
    return rates


def flops_of_training(model):
    """Floating-point operations of a training step of one image: forward, and gradients of all parameters."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import models

    network = models.build(model)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 28, 28)).sum().backward()
    return counter.get_total_flops()


def epochs(model, peers, common, rounds, report):
    """Seconds of an epoch of every program, in turns, after one epoch to warm up; evaluation and memory as well."""
    workers = {
        name: Worker(model=model, epochs=1_000, **options, **common)
        for name, options in peers.items()
        if not (model == "cnn" and options["program"] == "scikit-learn")
    }
    seconds, test_seconds = ({name: [] for name in workers} for _ in range(2))
    for number in range(rounds + 1):
        for name, worker in workers.items():
            if number == 0 and name.startswith("tutorial") and model == "cnn":
                continue  # it has nothing to warm up, and takes long
            taken = seconds_of_epoch(worker)
            test_taken = worker.ask("test")["seconds"]
            if number:
                seconds[name].append(taken)
                test_seconds[name].append(test_taken)
            report(
                f"{model.upper()} epoch, {name}: {taken:.2f} s"
                + (f", round {number} of {rounds}" if number else ", to warm up")
            )
    result = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "test_images_per_second": 10_000 / statistics.median(test_seconds[name]),
            "peak_mib": worker.ask("memory")["peak_mib"],
        }
        for name, worker in workers.items()
    }
    for worker in workers.values():
        worker.close()
    return result


def seconds_of_epoch(worker):
    """The median of as many epochs as fill a second, since the first after a pause is slower."""
    seconds = []
    while sum(seconds) < 1:
        seconds.append(worker.ask("epoch")["seconds"])
    return statistics.median(seconds)


def add_limits(rows, flops, limits):
    """To every program its arithmetic rate, and that as a share of the machine's limits."""
    for row in rows.values():
        row["gflops"] = flops / row["seconds"] / 1e9
        for dtype, limit in limits.items():
            row[f"share_of_{dtype}"] = row["gflops"] / limit


def to_target(model, common, quick, report):
    """Training time until the mean test accuracy over seeds reaches the published one: recipe fast, tutorial loop.

    For the tutorial loop, of 3 seeds, the first epoch whose mean reaches it, which flatters it; for the recipe, of 5
    seeds or more, the whole of it. After each epoch of the tutorial's seeds, one run of the recipe takes its turn.
    """
    target, seeds = TARGETS[model], range(3)
    ours, curve, epoch_seconds = [], [], []

    def run_ours():
        worker = Worker(model=model, program="ours", recipe="fast", seed=len(ours), **common)
        epochs = recipe_epochs(model)
        ours.append(
            {
                "seconds": sum(worker.ask("epoch")["seconds"] for _ in range(epochs)),
                "accuracy": worker.ask("test")["accuracy"],
            }
        )
        worker.close()
        told = f"{ours[-1]['accuracy']:.2%} in {ours[-1]['seconds']:.2f} s"
        report(f"{model.upper()} by recipe fast, seed {len(ours) - 1}: {told}")

    if not quick:
        tutorial = [Worker(model=model, program="tutorial", seed=seed, **common) for seed in seeds]
        while len(curve) < MAX_EPOCHS and (not curve or curve[-1] < target):
            epoch_seconds += [worker.ask("epoch")["seconds"] for worker in tutorial]
            curve.append(statistics.mean(worker.ask("test")["accuracy"] for worker in tutorial))
            told = f"mean of {len(seeds)} seeds {curve[-1]:.2%}, target {target:.2%}"
            report(f"{model.upper()} by the tutorial loop, epoch {len(curve)}: {told}")
            run_ours()
        for worker in tutorial:
            worker.close()
    while len(ours) < (2 if quick else 5):
        run_ours()
    accuracies = [run["accuracy"] for run in ours]
    result = {
        "target": target,
        "ours": {
            "seconds": statistics.median(run["seconds"] for run in ours),
            "mean_accuracy": statistics.mean(accuracies),
            "sd": statistics.stdev(accuracies),
            "seeds": len(ours),
            "reached": statistics.mean(accuracies) >= target,
        },
    }
    if curve:
        result["tutorial"] = {
            "seconds": len(curve) * statistics.median(epoch_seconds),
            "epochs": len(curve),
            "mean_accuracies": curve,
            "seeds": len(seeds),
            "reached": curve[-1] >= target,
        }
        result["ratio"] = result["tutorial"]["seconds"] / result["ours"]["seconds"]
    return result


def recipe_epochs(model):
    import recipes

    return recipes.find("fast", model).epochs


def start_up(report):
    """Seconds of whole commands, from the shell's prompt back to it."""
    commands = {
        "train.py --help": ["train.py", "--help"],
        "evaluate.py": ["evaluate.py"],
        "import torch": ["-c", "import torch"],
    }
    result = {}
    for name, arguments in commands.items():
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=cli.HERE, capture_output=True, check=True)
            seconds.append(time.perf_counter() - begin)
        result[name] = statistics.median(seconds)
        report(f"start to end of {name}: {result[name]:.2f} s")
    return result


def growth(models, common, quick, report):
    """Seconds and peak memory of an epoch of recipe fast, by number of images and threads."""
    rows = []
    for model in models:
        for threads in (2,) if quick else (1, 2):
            for images in GROWTH[:4] if quick else GROWTH:
                options = common | {"threads": threads}
                worker = Worker(model=model, program="ours", recipe="fast", images=images, epochs=1_000, **options)
                worker.ask("epoch")  # to warm up
                seconds = seconds_of_epoch(worker)
                rows.append(
                    {
                        "model": model,
                        "threads": threads,
                        "images": images,
                        "seconds": seconds,
                        "peak_mib": worker.ask("memory")["peak_mib"],
                    }
                )
                worker.close()
                told = f"{images:,} images, {threads} thread{'s' * (threads > 1)}: {seconds:.2f} s an epoch"
                report(f"{model.upper()}, {told}")
    return rows


def markdown(results):
    """The tables of the README."""
    parts = [machine_line(results)]
    parts += [epoch_table(model, rows) for model, rows in results["epoch"].items()]
    parts += [target_table(results["to_target"]), growth_table(results["growth"])]
    parts.append("; ".join(f"`{name}` {seconds:.2f} s" for name, seconds in results["start_up"].items()))
    return "\n\n".join(parts)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def machine_line(results):
    machine, limits = results["machine"], results["limit_gflops"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['threads']} cores of {machine['processor']} with {', '.join(machine['features'])}; {versions}. "
        f"Matrix product: {limits['float32']:,.0f} GFLOP/s in float32, {limits['bfloat16']:,.0f} in bfloat16."
    )


def epoch_table(model, rows):
    head = [
        f"{model.upper()}, an epoch",
        "seconds",
        "times as fast",
        "of the bfloat16 limit",
        "tests images/s",
        "peak MiB",
    ]
    slowest = rows["tutorial loop"]["seconds"]
    return table(
        head,
        [
            [
                name,
                f"{row['seconds']:.2f}",
                f"{slowest / row['seconds']:.1f}",
                f"{row['share_of_bfloat16']:.1%}",
                f"{row['test_images_per_second']:,.0f}",
                f"{row['peak_mib']:,.0f}",
            ]
            for name, row in rows.items()
        ],
    )


def target_table(goals):
    rows = []
    for model, goal in goals.items():
        ours, theirs = goal["ours"], goal.get("tutorial")
        rows.append(
            [
                f"{model.upper()}, {goal['target']:.2%}",
                f"{theirs['seconds']:.1f} s ({theirs['epochs']} epochs, {theirs['seeds']} seeds)"
                if theirs
                else "not run",
                f"{ours['seconds']:.2f} s ({ours['mean_accuracy']:.2%} ± {ours['sd']:.2%}, {ours['seeds']} seeds)",
                f"{goal['ratio']:.0f}" if theirs else "",
            ]
        )
    return table(["training to a mean test accuracy of", "tutorial loop", "ours, fast", "times as fast"], rows)


def growth_table(rows):
    columns = list(dict.fromkeys((row["model"], row["threads"]) for row in rows))
    cells = {
        (row["images"], row["model"], row["threads"]): f"{row['seconds']:.2f} s, {row['peak_mib']:,.0f} MiB"
        for row in rows
    }
    head = ["ours, fast: images an epoch"]
    head += [f"{model.upper()}, {threads} thread{'s' * (threads > 1)}" for model, threads in columns]
    sizes = dict.fromkeys(row["images"] for row in rows)
    return table(head, [[f"{images:,}", *(cells[images, *column] for column in columns)] for images in sizes])


if __name__ == "__main__":
    cli.run(main)
