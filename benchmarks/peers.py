"""The programs that bench.py times, each in its own process: this repository's loop and what people use instead.

A worker is started as `python -m benchmarks.peers '{"program": "tutorial", "model": "cnn", ...}'`. It reads one word
per line, does the work and answers with one line of JSON:

    epoch   trains one epoch                           -> {"seconds"}
    test    measures the model on the test set         -> {"seconds", "accuracy"}
    memory                                             -> {"seconds", "peak_mib"}

All train the published networks with Adam (1e-3) and batches of 128, except "ours" with another recipe. Those that hold
the set in memory take a number of `images`: the first ones of the set. "ours" repeats the set for more. "ours" and the
programs of PyTorch take a `device`, such as "cuda"; peak_mib is then of its memory.
"""

import contextlib
import functools
import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from runtime import cli  # it keeps the libraries' caches inside the clone

BATCH, TEST_BATCH, RATE, DROPOUT = 128, 256, 1e-3, 0.3  # as published


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
        device: str = "cpu",
        **_: Any,
    ) -> None:
        import torch

        import data
        import engine
        import models
        import recipes
        from runtime.device import keep_freed_memory, pick_precision

        keep_freed_memory()
        plan = recipes.find(recipe, model)
        plan = plan._replace(epochs=epochs or plan.epochs, precision=precision or plan.precision)
        train, test = data.load("train+val", "test", data_dir=data_dir)
        index = torch.arange(images) % len(train.labels)
        train = train._replace(images=train.images[index], labels=train.labels[index]).to(device)
        self.test = test.to(device)
        torch.manual_seed(*data.derive_seeds(seed))
        self.model = models.build(model).to(device)
        if device == "cpu":
            error = engine.give_kernels(self.model, plan.fused)
            plan = plan._replace(fused=plan.fused and not error)
        dtype = pick_precision(plan.precision, torch.device(device))
        self.rows = engine.Training(self.model, train, None, plan, seed=seed, precision=dtype).run()

    def train_epoch(self) -> None:
        """Train on all images once."""
        next(self.rows)

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        import engine
        import metrics

        return metrics.accuracy(engine.predict_logits(self.model, self.test), self.test.labels.cpu())


def pytorch_network(model: str) -> Any:
    """Build the published network as nn.Sequential."""
    from torch import nn

    if model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(
        *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(128, 10)],
    )


def loaders(torchvision_dir: str, workers: int = 0) -> list[Any]:
    """Build the DataLoaders of the training and the test set, from torchvision's data set and transforms."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    train, test = (datasets.FashionMNIST(torchvision_dir, train, transform) for train in (True, False))
    return [
        DataLoader(train, batch_size=BATCH, shuffle=True, num_workers=workers),
        DataLoader(test, batch_size=TEST_BATCH, num_workers=workers),
    ]


class Tutorial:
    """The loop of PyTorch's tutorials: torchvision's data set and transforms, a DataLoader, nn.Sequential."""

    def __init__(
        self, model: str, torchvision_dir: str, workers: int = 0, seed: int = 0, device: str = "cpu", **_: Any
    ) -> None:
        import torch
        from torch import nn

        torch.manual_seed(seed)
        self.device = device
        self.train, self.test = loaders(torchvision_dir, workers)
        self.model = pytorch_network(model).to(device)
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)

    def train_epoch(self) -> None:
        """Train on all images once, with the running figures of the tutorials."""
        self.model.train()
        running_loss = correct = total = 0
        for images, labels in self.train:
            images, labels = images.to(self.device), labels.to(self.device)
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
                images, labels = images.to(self.device), labels.to(self.device)
                correct += (self.model(images).argmax(1) == labels).sum().item()
                total += len(labels)
        return correct / total


class Lightning:
    """Lightning's Trainer on the tutorial's data. It writes no files; all else is its default."""

    def __init__(self, model: str, torchvision_dir: str, seed: int = 0, device: str = "cpu", **_: Any) -> None:
        import lightning

        lightning.seed_everything(seed, verbose=False)
        self.train, self.test = loaders(torchvision_dir)
        self.module = lightning_module(model)
        silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        accelerator = "cpu" if device == "cpu" else "gpu"
        self.trainer = lightning.Trainer(max_epochs=0, accelerator=accelerator, devices=1, **silent)

    def train_epoch(self) -> None:
        """Train on all images once."""
        self.trainer.fit_loop.max_epochs = self.trainer.current_epoch + 1
        self.trainer.fit(self.module, self.train)

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        (result,) = self.trainer.test(self.module, self.test, verbose=False)
        return result["accuracy"]


def lightning_module(model: str) -> Any:
    """Build the published network as a LightningModule, which here alone needs Lightning to be installed."""
    import lightning
    import torch
    from torch.nn import functional as F

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = pytorch_network(model)
            self.adam = torch.optim.Adam(self.network.parameters(), lr=RATE)

        def training_step(self, batch: Any) -> Any:
            images, labels = batch
            loss = F.cross_entropy(self.network(images), labels)
            self.log("train_loss", loss)
            return loss

        def test_step(self, batch: Any) -> None:
            images, labels = batch
            self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

        def configure_optimizers(self) -> Any:
            return self.adam  # the same in each call of fit, so that an epoch continues the last one

    return Module()


class InMemory:
    """The short loop of somebody who knows PyTorch: all images as one float tensor, shuffled by an index."""

    def __init__(
        self, model: str, data_dir: str | None, seed: int = 0, images: int = 60_000, device: str = "cpu", **_: Any
    ) -> None:
        import torch

        torch.manual_seed(seed)
        (x, y), test = [
            (torch.from_numpy(images).unsqueeze(1).to(device), torch.from_numpy(labels).to(device))
            for images, labels in in_memory(data_dir)
        ]
        self.train, self.test = (x[:images], y[:images]), test
        self.model = pytorch_network(model).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE, fused=True)

    def train_epoch(self) -> None:
        """Train on all images once; the loss is read at the end alone."""
        import torch
        from torch.nn import functional as F

        self.model.train()
        images, labels = self.train
        total = torch.zeros((), device=images.device)
        for index in torch.randperm(len(labels), device=images.device).split(BATCH):
            loss = F.cross_entropy(self.model(images.index_select(0, index)), labels.index_select(0, index))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(index)
        (total / len(labels)).item()

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        import torch

        self.model.eval()
        images, labels = self.test
        with torch.inference_mode():
            answers = [self.model(batch).argmax(1) for batch in images.split(TEST_BATCH)]
        return (torch.cat(answers) == labels).float().mean().item()


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

    def __init__(self, model: str, data_dir: str | None, seed: int = 0, images: int = 60_000, **_: Any) -> None:
        os.environ["KERAS_BACKEND"] = "jax"  # the fastest of Keras's three on a CPU
        os.environ["KERAS_HOME"] = str(cli.ROOT / ".cache" / "keras")  # by default it writes to the home
        import keras

        (x, y), self.test = in_memory(data_dir)
        self.train = x[:images], y[:images]
        keras.utils.set_random_seed(seed)
        self.model = keras.Sequential([keras.Input((28, 28)), *self.layers(model)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(RATE), loss, metrics=["accuracy"])

    @staticmethod
    def layers(model: str) -> list[Any]:
        """Build the layers of the published network."""
        from keras import layers

        if model == "mlp":
            return [layers.Flatten(), layers.Dense(128, "relu"), layers.Dense(10)]
        return [
            *[layers.Reshape((28, 28, 1)), layers.Conv2D(32, 3, padding="same", activation="relu")],
            *[layers.MaxPooling2D(), layers.Conv2D(64, 3, padding="same", activation="relu")],
            *[layers.MaxPooling2D(), layers.Flatten(), layers.Dense(128, "relu"), layers.Dropout(DROPOUT)],
            layers.Dense(10),
        ]

    def train_epoch(self) -> None:
        """Train on all images once."""
        self.model.fit(*self.train, batch_size=BATCH, epochs=1, verbose=0)

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        return self.model.evaluate(*self.test, batch_size=TEST_BATCH, verbose=0)[1]


class Jax:
    """A loop by hand in JAX: the images stay on the device as bytes; of the MLP, an epoch is one compiled scan.

    Of the CNN a step is compiled, since a convolution within a scan takes JAX more than ten times as long on a CPU.
    """

    def __init__(self, model: str, data_dir: str | None, seed: int = 0, images: int = 60_000, **_: Any) -> None:
        import jax
        import jax.numpy as jnp

        import data

        (x, y), self.test = (
            (jnp.asarray(split.images.numpy()), jnp.asarray(split.labels.numpy().astype("int32")))
            for split in data.load("train+val", "test", data_dir=data_dir)
        )
        self.train = x[:images], y[:images]
        self.key = jax.random.key(seed)
        layers = jax_layers(model, self.key)
        zeros = jax.tree.map(jnp.zeros_like, layers)
        self.state = (layers, zeros, zeros, jnp.zeros(()))  # with Adam's two moments, and the number of steps
        self.epoch = jax.jit(jax_epoch) if model == "mlp" else functools.partial(jax_steps, jax.jit(jax_step))
        self.answer = jax.jit(lambda layers, images: jax_logits(layers, images).argmax(1))

    def train_epoch(self) -> None:
        """Train on all images once."""
        import jax

        self.key, key = jax.random.split(self.key)
        self.state, loss = self.epoch(self.state, *self.train, key)
        loss.block_until_ready()

    def accuracy(self) -> float:
        """Measure the accuracy on the test set."""
        import jax.numpy as jnp

        images, labels = self.test
        starts = range(0, len(labels), TEST_BATCH)
        answers = [self.answer(self.state[0], images[start : start + TEST_BATCH]) for start in starts]
        return float((jnp.concatenate(answers) == labels).mean())


def jax_layers(model: str, key: Any) -> list[tuple[Any, Any]]:
    """Draw the weights and biases of the published network's layers, from the ranges that PyTorch takes."""
    import jax

    convolutions = [(3, 3, 1, 32), (3, 3, 32, 64)] if model == "cnn" else []
    layers = []
    for shape in [*convolutions, (3136 if convolutions else 784, 128), (128, 10)]:
        key, *own = jax.random.split(key, 3)
        limit = math.prod(shape[:-1]) ** -0.5
        weight, bias = (
            jax.random.uniform(each, size, minval=-limit, maxval=limit)
            for each, size in zip(own, (shape, shape[-1:]), strict=True)
        )
        layers.append((weight, bias))
    return layers


def jax_logits(layers: list[tuple[Any, Any]], images: Any, key: Any = None) -> Any:
    """Compute the logits (b, 10) of images uint8 (b, 28, 28). A key is for the dropout, in training."""
    import jax
    import jax.numpy as jnp

    *convolutions, (weight, bias), last = layers
    x = (images.astype(jnp.float32) / 127.5 - 1)[..., None]
    for kernel, shift in convolutions:
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout) + shift
        b, height, width, channels = x.shape  # the next line pools: twice as fast here as jax.lax.reduce_window
        x = jax.nn.relu(x.reshape(b, height // 2, 2, width // 2, 2, channels).max((2, 4)))
    x = jax.nn.relu(x.reshape(len(x), -1) @ weight + bias)
    if convolutions and key is not None:
        x = jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0)
    return x @ last[0] + last[1]


def jax_loss(layers: list[tuple[Any, Any]], images: Any, labels: Any, key: Any) -> Any:
    """Compute the mean cross-entropy of a batch."""
    import jax
    import jax.numpy as jnp

    logs = jax.nn.log_softmax(jax_logits(layers, images, key))
    return -jnp.take_along_axis(logs, labels[:, None], 1).mean()


def jax_step(state: tuple, images: Any, labels: Any, key: Any, index: Any) -> tuple[tuple, Any]:
    """Take a step of Adam on the images of that index. Returns the new state, and the loss summed over the images."""
    import jax
    import jax.numpy as jnp

    layers, m, v, step = state
    dropout = jax.random.fold_in(key, step.astype(jnp.int32))
    loss, gradient = jax.value_and_grad(jax_loss)(layers, images[index], labels[index], dropout)
    step += 1
    m = jax.tree.map(lambda mean, g: 0.9 * mean + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda mean, g: 0.999 * mean + 0.001 * g * g, v, gradient)
    size, root = RATE / (1 - 0.9**step), jnp.sqrt(1 - 0.999**step)
    layers = jax.tree.map(lambda p, m, v: p - size * m / (jnp.sqrt(v) / root + 1e-8), layers, m, v)
    return (layers, m, v, step), loss * len(index)


def jax_epoch(state: tuple, images: Any, labels: Any, key: Any) -> tuple[tuple, Any]:
    """Train on all images once, in one scan; the last batch, which may be smaller, comes after it."""
    import jax

    order, whole = jax.random.permutation(key, len(labels)), len(labels) // BATCH * BATCH
    step = functools.partial(jax_step, images=images, labels=labels, key=key)
    state, losses = jax.lax.scan(lambda state, index: step(state, index=index), state, order[:whole].reshape(-1, BATCH))
    loss = losses.sum()
    if whole < len(labels):
        state, last = step(state, index=order[whole:])
        loss += last
    return state, loss / len(labels)


def jax_steps(step: Any, state: tuple, images: Any, labels: Any, key: Any) -> tuple[tuple, Any]:
    """Train on all images once, by calls of a compiled jax_step; no call waits for the one before."""
    import jax

    order, loss = jax.random.permutation(key, len(labels)), 0.0
    for start in range(0, len(labels), BATCH):
        state, one = step(state, images, labels, key, order[start : start + BATCH])
        loss += one
    return state, loss / len(labels)


PROGRAMS: dict[str, type] = {
    "ours": Ours,
    "tutorial": Tutorial,
    "lightning": Lightning,
    "in memory": InMemory,
    "scikit-learn": ScikitLearn,
    "keras": Keras,
    "jax": Jax,
}


def gpu() -> Any:
    """Return torch.cuda where this process computes on it, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def peak_mib() -> float:
    """Return the most memory this process has held, in MiB; of the GPU's where it computes there.

    Linux's getrusage would count what the parent held, too.
    """
    if cuda := gpu():
        return cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def answer(program: Program, word: str) -> dict[str, float]:
    """Do what one word asks for. A GPU has finished before the clock is read."""
    start, result = time.perf_counter(), {}
    match word:
        case "epoch":
            program.train_epoch()
        case "test":
            result["accuracy"] = program.accuracy()
        case "memory":
            result["peak_mib"] = peak_mib()
    if cuda := gpu():
        cuda.synchronize()
    return result | {"seconds": time.perf_counter() - start}


def limit_threads(threads: int) -> None:
    """Let the libraries that are imported after this compute with so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads == 1:  # XLA counts the cores that it may use
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        with contextlib.suppress(AttributeError):  # macOS has no such call
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])


def main() -> None:
    """Build the program of the options in the first argument and answer the words on standard input."""
    options = json.loads(sys.argv[1])
    limit_threads(options["threads"])
    if options["program"] != "ours":
        os.environ.pop("GOMP_SPINCOUNT", None)  # runtime/cli.py sets it for this repository alone
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    program = PROGRAMS[options["program"]](**options)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(program, line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
