"""What bench.py times, each in a process of its own: this repository's loop and what people would use instead.

A worker is started as `python peers.py '{"program": "tutorial", "model": "cnn", ...}'`, reads one word a line, does it,
and answers with one line of JSON:

    epoch   trains one epoch                           -> {"seconds"}
    test    measures the model on the test set         -> {"accuracy", "seconds"}
    memory                                             -> {"peak_mib"}

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

options = json.loads(sys.argv[1]) if __name__ == "__main__" else {"threads": 2}
os.environ["OMP_NUM_THREADS"] = str(options["threads"])  # read by the libraries when they are imported
os.environ["KERAS_BACKEND"] = "jax"  # the fastest of its three on a CPU
os.environ["KERAS_HOME"] = str(Path(__file__).resolve().parent / ".cache" / "keras")  # else it writes to the home

import cli  # noqa: E402, F401 - keeps the libraries' caches inside the clone


class Ours:
    """The loop of engine.py by any recipe, on `images` images: the first of the set, or the whole repeated."""

    def __init__(self, model, recipe, seed=0, images=60_000, epochs=None, precision=None, **_):
        import torch

        import data
        import engine
        import kernels
        import models
        import recipes

        engine.keep_freed_memory()
        self.engine = engine
        recipe = recipes.find(recipe, model)
        changes = {"epochs": epochs, "precision": precision}
        recipe = recipe._replace(**{key: value for key, value in changes.items() if value})
        if recipe.fused:
            kernels.load()
        train, self.test = data.load("train+val", "test", data_dir=options["data_dir"])
        index = torch.arange(images) % len(train.labels)
        train = train._replace(images=train.images[index], labels=train.labels[index])
        torch.manual_seed(*data.derive_seeds(seed))
        self.model = models.build(model)
        precision = engine.pick_precision(recipe.precision, torch.device("cpu"))
        self.rows = engine.Training(self.model, train, None, recipe, seed=seed, precision=precision).run()

    def train_epoch(self):
        next(self.rows)

    def accuracy(self):
        return self.engine.loss_and_accuracy(self.engine.predict_logits(self.model, self.test), self.test.labels)[1]


class Tutorial:
    """The loop of PyTorch's tutorials: torchvision's data set and transforms, a DataLoader, nn.Sequential."""

    def __init__(self, model, workers=0, seed=0, **_):
        import torch
        from torch import nn
        from torch.utils.data import DataLoader
        from torchvision import datasets, transforms

        torch.manual_seed(seed)
        self.torch, self.nn = torch, nn
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
        train, test = (datasets.FashionMNIST(options["torchvision_dir"], train, transform) for train in (True, False))
        self.train = DataLoader(train, batch_size=128, shuffle=True, num_workers=workers)
        self.test = DataLoader(test, batch_size=256, num_workers=workers)
        layers = {
            "mlp": lambda: [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)],
            "cnn": lambda: [
                *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
                *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
                *[nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)],
            ],
        }
        self.model = nn.Sequential(*layers[model]())
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def train_epoch(self):
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

    def accuracy(self):
        self.model.eval()
        correct = 0
        with self.torch.no_grad():
            for images, labels in self.test:
                correct += (self.model(images).argmax(1) == labels).sum().item()
        return correct / len(self.test.dataset)


class _InMemory:
    """Images float32 (n, 28, 28) in [-1, 1] and labels, as NumPy arrays."""

    def __init__(self):
        import data

        train, test = data.load("train+val", "test", data_dir=options["data_dir"])
        self.train, self.test = (
            (data.normalise(split.images).numpy()[:, 0], split.labels.numpy()) for split in (train, test)
        )


class ScikitLearn(_InMemory):
    """MLPClassifier of the same shape; it has no convolutions."""

    def __init__(self, seed=0, **_):
        from sklearn.neural_network import MLPClassifier

        super().__init__()
        self.train, self.test = ((images.reshape(-1, 784), labels) for images, labels in (self.train, self.test))
        self.model = MLPClassifier((128,), batch_size=128, learning_rate_init=1e-3, alpha=0.0, random_state=seed)

    def train_epoch(self):
        self.model.partial_fit(*self.train, classes=range(10))

    def accuracy(self):
        return self.model.score(*self.test)


class Keras(_InMemory):
    """Keras 3 on JAX, from arrays in memory."""

    def __init__(self, model, seed=0, **_):
        import keras

        super().__init__()
        keras.utils.set_random_seed(seed)
        layers = keras.layers
        stack = {
            "mlp": lambda: [layers.Flatten(), layers.Dense(128, "relu"), layers.Dense(10)],
            "cnn": lambda: [
                *[layers.Reshape((28, 28, 1)), layers.Conv2D(32, 3, padding="same", activation="relu")],
                *[layers.MaxPooling2D(), layers.Conv2D(64, 3, padding="same", activation="relu")],
                *[layers.MaxPooling2D(), layers.Flatten(), layers.Dense(128, "relu"), layers.Dropout(0.3)],
                layers.Dense(10),
            ],
        }
        self.model = keras.Sequential([keras.Input((28, 28)), *stack[model]()])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])

    def train_epoch(self):
        self.model.fit(*self.train, batch_size=128, epochs=1, verbose=0)

    def accuracy(self):
        return self.model.evaluate(*self.test, batch_size=256, verbose=0)[1]


PROGRAMS = {"ours": Ours, "tutorial": Tutorial, "scikit-learn": ScikitLearn, "keras": Keras}


def peak_mib():
    """The most memory this process has held. Linux's getrusage would count what its parent held, too."""
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    program = PROGRAMS[options["program"]](**{key: value for key, value in options.items() if key != "program"})
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        match line.strip():
            case "epoch":
                program.train_epoch()
                answer = {}
            case "test":
                answer = {"accuracy": program.accuracy()}
            case "memory":
                answer = {"peak_mib": peak_mib()}
        print(json.dumps(answer | {"seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
