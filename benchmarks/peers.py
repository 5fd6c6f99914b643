"""The programs that bench.py times, each in its own process: this repository's loop and what people use instead.

A worker is started as `python -m benchmarks.peers '{"program": "tutorial", "model": "cnn", ...}'`. It reads one word
per line, does the work and answers with one line of JSON:

    epoch   trains one epoch                           -> {"seconds"}
    test    measures the model on the test set         -> {"seconds", "accuracy"}
    memory                                             -> {"seconds", "peak_mib"}

All train the published networks with Adam (1e-3) and batches of 128, except "ours" with another recipe.
"""

import contextlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from runtime import cli  # it keeps the libraries' caches inside the clone


class Program(Protocol):
    """What a worker can be asked for."""

    def train_epoch(self) -> None:
        """Train on all images once."""

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""


class Ours:
    """The loop of engine.py by any recipe, on `images` images: the first of the set, or the whole set repeated."""

    def __init__(
        self,
        model: str,
        recipe: str,
        data_dir: str | None,
        seed: int = 0,
        images: int = 60_000,
        epochs: int | None = None,
        precision: str | None = None,
        **_: Any,
    ) -> None:
        import torch

        import data
        import engine
        import models
        import recipes
        from runtime import device, kernels

        device.keep_freed_memory()
        plan = recipes.find(recipe, model)
        plan = plan._replace(epochs=epochs or plan.epochs, precision=precision or plan.precision)
        train, self.test = data.load("train+val", "test", data_dir=data_dir)
        index = torch.arange(images) % len(train.labels)
        train = train._replace(images=train.images[index], labels=train.labels[index])
        torch.manual_seed(*data.derive_seeds(seed))
        self.model = models.build(model)
        try:
            kernels.give(self.model, plan.fused)
        except kernels.KernelError:
            kernels.give(self.model, False)
        dtype = device.pick_precision(plan.precision, torch.device("cpu"))
        self.rows = engine.Training(self.model, train, None, plan, seed=seed, precision=dtype).run()

    def train_epoch(self) -> None:
        """Train on all images once."""
        next(self.rows)

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        import engine
        import metrics

        return metrics.accuracy(engine.predict_logits(self.model, self.test), self.test.labels)


class Tutorial:
    """The loop of PyTorch's tutorials: torchvision's data set and transforms, a DataLoader, nn.Sequential."""

    def __init__(self, model: str, torchvision_dir: str, workers: int = 0, seed: int = 0, **_: Any) -> None:
        import torch
        from torch import nn
        from torch.utils.data import DataLoader
        from torchvision import datasets, transforms

        torch.manual_seed(seed)
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
        train, test = (datasets.FashionMNIST(torchvision_dir, train, transform) for train in (True, False))
        self.train = DataLoader(train, batch_size=128, shuffle=True, num_workers=workers)
        self.test = DataLoader(test, batch_size=256, num_workers=workers)
        self.model = nn.Sequential(*self.layers(model))
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    @staticmethod
    def layers(model: str) -> list[Any]:
        """Build the layers of the published network."""
        from torch import nn

        if model == "mlp":
            return [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)]
        return [
            *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)],
        ]

    def train_epoch(self) -> None:
        """Train on all images once, with the running figures of the tutorials."""
        self.model.train()
        running_loss = correct = total = 0
        for images, labels in self.train:
            self.optimizer.zero_grad()
            outputs = self.model(images)
            loss = self.loss(outputs, labels)
            loss.backward()
            self.optimizer.step()
            running_loss += loss.item() * len(labels)
            correct += (outputs.argmax(1) == labels).sum().item()
            total += len(labels)

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        import torch

        self.model.eval()
        correct = total = 0
        with torch.no_grad():
            for images, labels in self.test:
                correct += (self.model(images).argmax(1) == labels).sum().item()
                total += len(labels)
        return correct / total


def in_memory(data_dir: str | None) -> list[tuple[Any, Any]]:
    """Load the training and the test set as NumPy arrays: images float32 (n, 28, 28) in [-1, 1], labels int64 (n,)."""
    import data

    splits = data.load("train+val", "test", data_dir=data_dir)
    return [(data.normalise(split.images).numpy()[:, 0], split.labels.numpy()) for split in splits]


class ScikitLearn:
    """MLPClassifier of the same shape. scikit-learn has no convolutions."""

    def __init__(self, data_dir: str | None, seed: int = 0, **_: Any) -> None:
        from sklearn.neural_network import MLPClassifier

        self.train, self.test = ((images.reshape(-1, 784), labels) for images, labels in in_memory(data_dir))
        self.model = MLPClassifier((128,), batch_size=128, learning_rate_init=1e-3, alpha=0.0, random_state=seed)

    def train_epoch(self) -> None:
        """Train on all images once."""
        self.model.partial_fit(*self.train, classes=range(10))

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        return self.model.score(*self.test)


class Keras:
    """Keras 3 on JAX, from arrays in memory."""

    def __init__(self, model: str, data_dir: str | None, seed: int = 0, **_: Any) -> None:
        import keras

        self.train, self.test = in_memory(data_dir)
        keras.utils.set_random_seed(seed)
        self.model = keras.Sequential([keras.Input((28, 28)), *self.layers(model)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])

    @staticmethod
    def layers(model: str) -> list[Any]:
        """Build the layers of the published network."""
        from keras import layers

        if model == "mlp":
            return [layers.Flatten(), layers.Dense(128, "relu"), layers.Dense(10)]
        return [
            *[layers.Reshape((28, 28, 1)), layers.Conv2D(32, 3, padding="same", activation="relu")],
            *[layers.MaxPooling2D(), layers.Conv2D(64, 3, padding="same", activation="relu")],
            *[layers.MaxPooling2D(), layers.Flatten(), layers.Dense(128, "relu"), layers.Dropout(0.3)],
            layers.Dense(10),
        ]

    def train_epoch(self) -> None:
        """Train on all images once."""
        self.model.fit(*self.train, batch_size=128, epochs=1, verbose=0)

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        return self.model.evaluate(*self.test, batch_size=256, verbose=0)[1]


PROGRAMS: dict[str, type] = {"ours": Ours, "tutorial": Tutorial, "scikit-learn": ScikitLearn, "keras": Keras}


def peak_mib() -> float:
    """Return the most memory this process has held, in MiB. Linux's getrusage would count what its parent held, too."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def answer(program: Program, word: str) -> dict[str, float]:
    """Do what one word asks for."""
    start, result = time.perf_counter(), {}
    match word:
        case "epoch":
            program.train_epoch()
        case "test":
            result["accuracy"] = program.accuracy()
        case "memory":
            result["peak_mib"] = peak_mib()
    return result | {"seconds": time.perf_counter() - start}


def main() -> None:
    """Build the program of the options in the first argument and answer the words on standard input."""
    options = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(options["threads"])  # the libraries read these when they are imported
    os.environ["KERAS_BACKEND"] = "jax"  # the fastest of Keras's three on a CPU
    os.environ["KERAS_HOME"] = str(cli.ROOT / ".cache" / "keras")  # by default it writes to the home
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    program = PROGRAMS[options["program"]](**options)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(program, line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
