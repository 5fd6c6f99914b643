"""Check a GPU and time it, in at most 8 minutes.

python -m benchmarks.gpu                                          # every check, then the times
python -m benchmarks.gpu --device cpu --images 600 --data-dir D   # the same on few images, to try the script itself

It prints a line for each check. The exit code is 1 if one has failed.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime import cli

STEPS, SEEDS = 4, 5  # of an epoch of the curves; of the CNN that is timed
# How far losses may be from the CPU's in float32. In float16, the first steps may only find the scale of the gradients.
TOLERANCES = {"float32": 0.02, "bfloat16": 0.05, "float16": 0.3}


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """Read the flags."""
    parser = cli.Parser("Check that all computes on a GPU as on the CPU, and time it.")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu to try this script")
    parser.add_argument("--images", type=cli.whole_number(1, 60_000), default=60_000, help="of an epoch that is timed")
    cli.add_data_dir(parser, other=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time and print. Returns the exit code."""
    args = parse_args(argv)
    import data
    from runtime import device  # they load PyTorch

    target = device.pick_device(args.device)
    (train,) = data.load("train+val", data_dir=args.data_dir, other_data=None)
    failed = 0
    for name, wrong in itertools.chain(curves(target, train), processes(target, train, args.data_dir)):
        print(f"{'FAILED' if wrong else 'ok'}  {name}{f': {wrong}' if wrong else ''}", flush=True)
        failed += bool(wrong)
    for line in times(str(target), args.images, args.data_dir):
        print(line, flush=True)
    print(f"{failed} checks failed" if failed else f"all checks passed on {target}")
    return min(failed, 1)


def curves(target: Any, train: Any) -> Iterator[tuple[str, str]]:
    """Compare the losses of every model, recipe and precision with the CPU's in float32: name, and what is wrong or "".

    Dropout and augmentation draw other numbers on other devices, and are left out; processes() has them.
    """
    import recipes

    for name, models in recipes.RECIPES.items():
        for model, recipe in models.items():
            few = recipe._replace(epochs=2, batch_size=min(recipe.batch_size, 256), dropout=0.0, augment={})
            expected = curve(model, few, "cpu", "float32", train)
            for precision, tolerance in TOLERANCES.items():
                if target.type == "cpu" and precision == "float16":
                    continue  # its range is too small for a CPU's training
                losses = curve(model, few, target, precision, train)
                apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
                wrong = "" if apart <= tolerance else f"losses {losses}, on the CPU in float32 {expected}"
                yield f"{model}, {name}, {precision}: losses within {tolerance:.0%} of the CPU's ({apart:.2%})", wrong


def curve(model: str, recipe: Any, target: Any, precision: str, train: Any) -> list[float]:
    """Return the mean losses of two short epochs. The initial weights and a teacher's answers are the CPU's."""
    import torch

    import engine
    import models

    n = recipe.batch_size * STEPS
    few = train._replace(images=train.images[:n], labels=train.labels[:n]).to(target)
    torch.manual_seed(0)
    teacher = torch.randn(len(few.labels), 10).to(target) if recipe.distillation else None
    network = models.build(model).to(target)
    kind = {"precision": getattr(torch, precision), "teacher": teacher}
    return [row["train_loss"] for row in engine.Training(network, few, None, recipe, seed=0, **kind).run()]


def processes(target: Any, train: Any, data_dir: str | None) -> Iterator[tuple[str, str]]:
    """Stop a training of the CNN and resume it to the same bits; then evaluate.py and predict.py use its checkpoint."""
    from PIL import Image

    from training.record import unfinished_path

    data, on = ["--data-dir", data_dir] if data_dir else [], ["--device", target]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, resumed = (folder / part / "best_cnn_fmnist.pt" for part in ("whole", "parts"))
        shape = ["--model", "cnn", "--recipe", "best", "--epochs", 3]
        flags = [*shape, "--deterministic", "--save-every", 0.01, *on, *data]
        yield "train.py", script("train.py", *flags, "--checkpoint-dir", path.parent)
        flags += ["--checkpoint-dir", resumed.parent]
        said = script("train.py", *flags, stop=unfinished_path(resumed).exists)
        saved = said and unfinished_path(resumed).exists()
        yield "train.py stops and saves", "" if saved else said or "it ended before the signal"
        yield "train.py --resume", script("train.py", *flags, "--resume")
        same = path.read_bytes() == resumed.read_bytes()
        yield "its checkpoint has the same bits", "" if same else "they differ"
        for device in ("cpu", target):
            flags = ["--device", device, *data, "--json", folder / f"{device}.json"]
            yield f"evaluate.py on {device}", script("evaluate.py", path, *flags)
        a, b = (json.loads((folder / f"{device}.json").read_text())["accuracy"] for device in ("cpu", target))
        yield "evaluate.py, the same accuracy within 0.2%", "" if abs(a - b) <= 0.002 else f"{a:.2%}, {b:.2%}"
        Image.fromarray(train.images[0].numpy()).save(folder / "picture.png")
        yield "predict.py", script("predict.py", folder / "picture.png", "--checkpoint", path, *on)


def script(*words: object, stop: Callable[[], bool] | None = None) -> str:
    """Run a script of this repository, until stop() if that is given. Returns "", or what it says where it fails."""
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=cli.ROOT, **streams)
    while stop and process.poll() is None:
        time.sleep(0.01)
        if stop():
            process.terminate()
            break
    said = process.communicate(timeout=300)[1]
    return f"exit code {process.returncode}: {said}" if process.returncode else ""


def times(target: str, images: int, data_dir: str | None) -> Iterator[str]:
    """Time the CNN's fast to its end, and an epoch of the ResNet, after a run or an epoch that warms up."""
    from statistics import mean, median

    import recipes
    from benchmarks.peers import Ours, answer

    epochs, runs = recipes.find("fast", "cnn").epochs, []
    for seed in range(SEEDS + 1):
        cnn = Ours("cnn", "fast", data_dir, seed=seed, images=images, device=target)
        seconds = sum(answer(cnn, "epoch")["seconds"] for _ in range(epochs))
        runs.append((seconds, answer(cnn, "test")["accuracy"]))
    taken, reached = zip(*runs[1:], strict=True)
    yield f"the CNN's fast: {median(taken):.2f} s to {mean(reached):.2%}, {SEEDS} seeds"
    resnet = Ours("resnet", "best", data_dir, images=images, device=target)
    first, second, memory = (answer(resnet, word) for word in ("epoch", "epoch", "memory"))
    both = f"{second['seconds']:.2f} s, the first {first['seconds']:.2f} s"
    yield f"the ResNet's epoch: {both}; {memory['peak_mib']:,.0f} MiB"


if __name__ == "__main__":
    cli.run(main, "benchmarks.gpu")
