"""The loops: the loss, training by a recipe, and predicting logits.

training = engine.Training(model, train, val, recipe, seed=0)
for row in training.run():
    print(row["epoch"], row["train_loss"], row["select_accuracy"])
logits = engine.predict_logits(model, test)

Nothing here knows of files or flags.
"""

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import metrics
import models
from data import CLASSES, Split, augment, batches, check_values, derive_seeds, normalise, places, share
from optim import FusedAdam, WhitenedInputs, build_optimizers, rate, set_rates
from recipes import Recipe
from runtime import adopt, distributed, kernels, mlp_step
from runtime.code_key import digest
from runtime.errors import UserError
from runtime.schema import Number, problem

EVALUATION_BATCH = 256  # as published
WITHOUT_KERNELS = "training continues with PyTorch's own operations, more slowly"
MANY = 1_000  # images for which the fused kernels of an evaluation are worth their compilation
VIEWS = tuple((mirrored, moved) for mirrored in (False, True) for moved in (0, 1, -1))  # of test-time augmentation: the
# image, and moved by a pixel towards two opposite corners, and these three mirrored, as in cifar10-airbench
CHECK_EVERY = 25  # steps between looks at the loss: each look waits for a GPU
COUNTERS = ("epoch", "step", "loss", "correct", "seconds")  # of a Training, kept in its state_dict
WHITENED = 1_000  # images, spread over the training set, that whitening is measured on; for a linear layer a fourth
PRUNED_EPOCHS = 0.875  # share of a run's epochs that may leave images out, as published with prune's method


class TrainingError(UserError):
    """The training cannot continue."""


class Stopped(Exception):
    """A prediction was asked to stop before its end."""


# --- the loss: a function here, named by a row of recipes.py ---------------------------------------------


class Loss(NamedTuple):
    """A function that training minimises."""

    title: str  # in curves and reports
    compute: Callable[..., torch.Tensor]


LOSSES: dict[str, Loss] = {}


def loss(title: str) -> Callable:
    """Register a function (logits float32 (b, 10), labels int64 (b,), recipe, reduction) -> the loss.

    reduction is "mean" over the images, "sum", or "none" for each image's own loss, float32 (b,); see reduced().
    """

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        LOSSES[function.__name__] = Loss(title, function)
        return function

    return register


@loss("cross-entropy")
def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe, reduction: str) -> torch.Tensor:
    """Compute the cross-entropy in nats, with the recipe's label smoothing."""
    return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction=reduction)


def reduced(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    """Reduce the losses of the images, float32 (b,), to their "mean" or "sum", or leave them with "none"."""
    return losses if reduction == "none" else getattr(losses, reduction)()


def find_loss(recipe: Recipe) -> Loss:
    """Return the loss that a recipe names. Raises UserError where engine.py does not have it."""
    if recipe.loss not in LOSSES:
        raise UserError(f"recipes.py: loss {recipe.loss!r} is not in engine.py, which has {', '.join(LOSSES)}")
    return LOSSES[recipe.loss]


def loss_name(recipe: Recipe) -> str:
    """Name the loss of a recipe for curves and reports. One that engine.py no longer has keeps its recorded name."""
    title = LOSSES[recipe.loss].title if recipe.loss in LOSSES else recipe.loss
    smooth = recipe.label_smoothing and recipe.loss == "cross_entropy"  # other losses may ignore it
    smoothing = f", label smoothing {recipe.label_smoothing:g}" if smooth else ""
    taught = f", {recipe.distillation:.0%} of it distillation" if recipe.distillation else ""
    return title + smoothing + taught


def loss_of(
    logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None, recipe: Recipe, reduction: str = "mean"
) -> torch.Tensor:
    """Compute the loss that a recipe minimises; teacher is its logits float32 (b, 10), or None.

    Distillation as by Hinton et al. 2015, arXiv:1503.02531: both answers at a temperature, whose square keeps the size
    of the gradients.
    """
    hard = find_loss(recipe).compute(logits, labels, recipe, reduction)
    if teacher is None:
        return hard
    part, t = recipe.distillation, recipe.temperature
    own, theirs = ((each / t).log_softmax(1) for each in (logits, teacher))
    distance = F.kl_div(own, theirs, log_target=True, reduction="none").sum(1) * t**2
    return (1 - part) * hard + part * reduced(distance, reduction)


# --- training --------------------------------------------------------------------------------------------


def give_kernels(model: nn.Module, fused: bool) -> kernels.KernelError | None:
    """Give a model on the CPU the faster operations of runtime/, before its training.

    Returns why the fused ones cannot be had; the model then computes by PyTorch's own.
    """
    try:
        kernels.give(model, fused)
        if fused:
            mlp_step.find(model, None, mlp_step.Team())  # compiles it
    except kernels.KernelError as error:
        kernels.give(model, fused=False)
        return error
    return None


class Training:
    """One run of a recipe. It can be saved whenever it reports progress, and then resumes to the same bits.

    It trains `model` on the split `train` and measures it after every epoch on the split `select`, if there is one.
    Among several processes (runtime/distributed.py) each takes its share of every batch; the figures are those of all.
    teacher, for a recipe that distils: logits for the training images, float32 (n, 10), of distill.answers.

    epoch, counted from 1, is the current one; step counts those of its `steps` that are done. loss (a sum, in nats),
    correct and seconds are those of this epoch so far. image_losses, float32 (n,), are the losses that the images last
    had. image_weights, float32 (n,), are what each image counts for in this epoch: 0 where it is left out.
    """

    def __init__(
        self, model: nn.Module, train: Split, select: Split | None, recipe: Recipe, *, seed: int,
        precision: torch.dtype = torch.float32, teacher: torch.Tensor | None = None,
    ):  # fmt: skip
        for module in model.modules():
            if isinstance(module, nn.Dropout) and recipe.dropout is not None:
                module.p = recipe.dropout
        self.model, self.train, self.select, self.recipe = model, train, select, recipe
        self.seed, self.precision, self.teacher = seed, precision, teacher
        find_loss(recipe)  # a misspelt name fails here and not in the first step
        check_values(recipe.augment)
        self.around_step: contextlib.AbstractContextManager = contextlib.nullcontext()  # or WhitenedInputs
        if recipe.whiten:
            self._whiten(normalise(train.images[:: -(-len(train.images) // WHITENED)]))
        self.optimizers = build_optimizers(model, recipe)
        self.team = mlp_step.Team()
        self.whole_step: mlp_step.Step | None = None
        self._agrees: bool | None = None  # whether it did what PyTorch does, once that was tried
        self.scaler = torch.amp.GradScaler(train.labels.device.type) if precision is torch.float16 else None
        self.network = distributed.wrap(model, normalise(train.images[:1]))
        self.image_losses = torch.full(train.labels.shape, torch.inf, device=train.labels.device)
        self._recent: list[tuple] = []  # what _step returned of steps not yet counted
        self.epoch = 1
        self._begin_epoch()

    def _whiten(self, images: torch.Tensor) -> None:
        """Let the first layer see whitened images: by its own weights, or where it is linear by how it is trained."""
        layer = models.first_layer(self.model)
        if models.is_linear_of(layer, images):
            if self.recipe.weight_decay:
                raise UserError("whiten and weight_decay do not go together where the first layer is linear")
            with _one_thread():  # with more, eigenvectors differ in their last bits
                self.around_step = WhitenedInputs(layer, images[::4].flatten(1), self.recipe.whiten)
        else:
            models.whiten(self.model, images, self.recipe.whiten)

    def _find_whole_step(self) -> mlp_step.Step | None:
        """Return a function for a whole step, for a training that needs only what it computes.

        It is used only if the code that it replaces, here, in data.py and in optim.py, has not been edited, and if it
        makes the same of a batch. This is tried once; whether the network allows it, before every epoch.
        """
        if not self._allows_whole_step():
            return None
        try:
            step = self._whole_step_of(self.model, self.optimizers)
            if step and self._agrees is None:
                self._agrees = self._code() == WRITTEN_FOR and _agree(self._tried(True), self._tried(False))
            return step if self._agrees else None
        except kernels.KernelError as error:
            warnings.warn(f"{error}; {WITHOUT_KERNELS}", stacklevel=2)
            return None

    def _allows_whole_step(self) -> bool:
        """Say whether the recipe, the data and this object need nothing but what a whole step computes."""
        recipe, device = self.recipe, self.train.labels.device.type
        other = recipe.label_smoothing or recipe.prune or recipe.distillation or recipe.augment
        other = other or (recipe.whiten and recipe.optimizer == "adam")  # a whole step of Adam's has no place for it
        alone = device == "cpu" and distributed.world() == 1 and self.precision is torch.float32
        images, labels, n = self.train.images, self.train.labels, len(self.train.labels)
        readable = images.is_contiguous() and images.dtype is torch.uint8 and images.shape == (n, 28, 28)
        if not (recipe.fused and alone and readable) or other:
            return False
        return labels.dtype is torch.int64 and n > 0 and labels.min().item() >= 0 and labels.max().item() < len(CLASSES)

    def _code(self) -> str | None:
        """Return the digest of the code that a whole step replaces; None where it lies in no file."""
        methods = (self._step, self._loss, self._update)
        return digest(find_loss(self.recipe).compute, normalise, *methods, *REPLACED)

    def _whole_step_of(self, model: nn.Module, optimizers: list) -> mlp_step.Step | None:
        return mlp_step.find(model, optimizers[0] if self.recipe.optimizer == "adam" else None, self.team)

    def _tried(self, whole: bool) -> list[torch.Tensor]:
        """Train a copy of the model on the first images; return the loss, the logits and what becomes of the weights.

        That is their change where Adam makes it, else their gradients.
        """
        trial = copy.copy(self)
        # Each image is given another class: where the classes are learnt by heart, losses and gradients are rounding.
        trial.train = self.train._replace(labels=(self.train.labels + 1) % len(CLASSES))
        trial.model = trial.network = copy.deepcopy(self.model)
        trial.optimizers = build_optimizers(trial.model, self.recipe)
        trial.around_step = contextlib.nullcontext()  # its layers are others
        trial.team = mlp_step.Team()  # what a trial takes counts for nothing
        trial.step, trial.whole_step = 0, trial._whole_step_of(trial.model, trial.optimizers) if whole else None
        first = torch.arange(min(self.recipe.batch_size, len(self.train.labels)))
        loss, _, logits, *_ = trial._step(first, self.seed, self.seed)
        pairs = zip(trial.model.parameters(), self.model.parameters(), strict=True)
        adam = self.recipe.optimizer == "adam"
        return [loss, logits, *((new - old).detach() if adam else new.grad for new, old in pairs)]

    def _begin_epoch(self) -> None:
        self.step = 0
        self.loss = self.correct = self.seconds = 0.0
        left_out = self.recipe.prune if self.epoch <= PRUNED_EPOCHS * self.recipe.epochs else 0.0
        self._weigh(prune(self.image_losses, left_out, derive_seeds(self.seed, 0, self.epoch)[0]))

    def _weigh(self, weights: torch.Tensor) -> None:
        self.image_weights, index = weights, weights.nonzero().squeeze(1)
        images = self.train.images if len(index) == len(weights) else self.train.images.index_select(0, index)
        self._numbered = self.train._replace(images=images, labels=index)
        self.steps = -(-len(index) // self.recipe.batch_size)

    @property
    def seen(self) -> int:
        """The number of the epoch's images that are done, with a part of those it leaves out."""
        return self.seen_at(self.step)

    def seen_at(self, step: int) -> int:
        """Return the number of images that are done after so many steps of the epoch."""
        chosen = len(self._numbered.labels)
        return min(step * self.recipe.batch_size, chosen) * len(self.train.labels) // chosen

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch > self.recipe.epochs

    def run(
        self, progress: Callable[[int, float, float], None] | None = None, stop: Callable[[], bool] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Train the rest; after each epoch yield its row.

        progress(images, loss, accuracy) is called every CHECK_EVERY steps and after an epoch's last one, with the
        number of images since its last call and the epoch's means so far. Once stop() is true, the run ends where it
        is: after any step, or between two batches of an evaluation; with several processes where progress is called,
        if it is true in any of them.
        Yields {"epoch", "train_loss", "train_accuracy", "select_loss", "select_accuracy", "select_..." (every other
        metric), "seconds", "images_per_second"}. Losses are in nats. Those of training are means over the epoch while
        the model changes, with dropout, augmentation and label smoothing. Seconds are of the whole epoch with its
        evaluation, images per second of the training alone. Without a `select` split there is no select figure.
        Raises TrainingError when a loss is not finite, or the weights after an epoch cannot be used.
        """
        while not self.finished:
            stopped = self._train_epoch(progress, stop)
            if self.step < self.steps:
                return
            try:
                row = self._row(stop)
            except Stopped:
                return
            self.epoch += 1
            self._begin_epoch()
            yield row
            if stopped:
                return

    def _row(self, stop: Callable[[], bool] | None) -> dict[str, Any]:
        """Measure the epoch that has just ended. Raises Stopped."""
        start, n = time.perf_counter(), len(self.train.labels)
        row: dict[str, Any] = {"epoch": self.epoch, "train_loss": self.loss / n, "train_accuracy": self.correct / n}
        if self.select:
            distributed.share_buffers(self.model)  # each process has its own running statistics of batch norm
            logits, labels = predict_logits(self.model, self.select, stop=stop), self.select.labels.cpu()
            _check_finite(metrics.log_loss(logits, labels), f"the evaluation after epoch {self.epoch}")
            figures = metrics.measure(logits, labels)
            row |= {"select_loss": figures.pop("log_loss"), "select_accuracy": figures.pop("accuracy")}
            row |= {f"select_{name}": figure for name, figure in figures.items()}
        row["seconds"] = self.seconds + time.perf_counter() - start
        row["images_per_second"] = len(self._numbered.labels) / self.seconds
        if fault := adopt.fault(self.model.eval()):  # such a checkpoint would be refused when it is read
            raise TrainingError(f"the network of epoch {self.epoch} cannot be used: {fault}: try a smaller --lr")
        return row

    def _train_epoch(self, progress: Callable | None, stop: Callable[[], bool] | None) -> bool:
        """Take the rest of the epoch's steps. Returns whether a stop was asked for, which cuts it short.

        Counting many steps at once keeps a step short. Those not yet counted at a stop are a part of the state, so that
        sums are rounded alike after it.
        """
        start = time.perf_counter()
        seeds = derive_seeds(self.seed, self.epoch, n=self.steps + 1)
        rank = distributed.rank()
        own_seeds = derive_seeds(self.seed, self.epoch, rank, n=self.steps + 1) if rank else seeds
        world = distributed.world()
        order = {"first": self.step, "rank": rank, "world": world}
        seen = self.seen_at(self.step - len(self._recent))
        self.model.train()
        self.whole_step = self._find_whole_step()  # for the network as it is now
        for place in places(self._numbered, self.recipe.batch_size, self.seed, self.epoch, **order):
            self._recent.append(self._step(place, seeds[self.step + 1], own_seeds[self.step + 1]))
            self.step += 1
            stopped = stop is not None and stop()
            if self.step % CHECK_EVERY and self.step < self.steps:
                if stopped and world == 1:
                    self.seconds += time.perf_counter() - start
                    return True
                continue
            stopped = self._count(stopped)
            before, seen = seen, self.seen
            now = time.perf_counter()
            self.seconds, start = self.seconds + now - start, now
            mean = self.loss / seen
            _check_finite(mean, f"epoch {self.epoch}, at or shortly before step {self.step} of {self.steps}")
            if progress:
                progress(seen - before, mean, self.correct / seen)
            if stopped:
                return True
        return False

    def _step(self, place: torch.Tensor, seed: int, own_seed: int) -> tuple:
        """Train on this process's share of a batch, the images at these places in the epoch's.

        Returns the loss, the number of images it is a mean of, logits, labels, index, and the images' own losses where
        the recipe prunes.
        """
        recipe, device, rank, world = self.recipe, place.device, distributed.rank(), distributed.world()
        batch = min(recipe.batch_size, len(self._numbered.labels) - self.step * recipe.batch_size)
        reseed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed  # 0.1 ms, seeds all
        reseed(seed)
        done = (self.epoch - 1) * self.steps + self.step
        set_rates(self.optimizers, rate(recipe, done, recipe.epochs * self.steps))
        index = self._numbered.labels.index_select(0, place)
        labels = self.train.labels.index_select(0, index)
        if self.whole_step:
            return *self._step_whole(index, labels), labels, index, None
        images = self._numbered.images.index_select(0, place)
        images = normalise(augment(images, recipe.augment, batch, share(batch, rank, world)), self.precision)
        if rank:
            reseed(own_seed)  # other images, other dropout
        autocast = self.precision is not torch.float32
        with torch.autocast(device.type, self.precision) if autocast else contextlib.nullcontext():
            logits = self.network(images)
        loss, losses = self._loss(logits, labels, index, batch)
        self._update(loss)
        return loss.detach(), batch / world, logits.detach(), labels, index, losses

    def _step_whole(self, index: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Train on a batch by self.whole_step. Returns the loss, the number of images it is a mean of, and logits."""
        assert self.whole_step
        loss, logits = self.whole_step(self.train.images, index, labels)
        if not self.whole_step.adam:
            with _one_thread(), self.around_step:
                for optimizer in self.optimizers:
                    optimizer.step()
        return loss, len(labels), logits

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the loss of a step, and the images' own losses where the recipe prunes.

        With several processes, its mean over them, whose gradient they all get, is the mean over the images of the
        whole batch, even where one process has an image more than another.
        """
        recipe, world, losses = self.recipe, distributed.world(), None
        answers = None if self.teacher is None else self.teacher[index]
        reduction = "mean" if world == 1 else "sum"
        if recipe.prune:
            losses = loss_of(logits.float(), labels, answers, recipe, "none")
            loss = reduced(losses * self.image_weights[index], reduction)
            losses = losses.detach()
        else:
            loss = loss_of(logits.float(), labels, answers, recipe, reduction)
        return loss * (world / batch) if world > 1 else loss, losses

    def _update(self, loss: torch.Tensor) -> None:
        """Take a step of the optimisers."""
        self.model.zero_grad()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        with self.around_step:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer) if self.scaler else optimizer.step()
        if self.scaler:
            self.scaler.update()

    def _count(self, stopped: bool) -> bool:
        """Add the recent steps of all processes to the sums. Returns whether any process is to stop."""
        means, sizes, logits, labels, indices, losses = zip(*self._recent, strict=True)
        self._recent = []
        index = torch.cat(indices)
        loss = (torch.stack(means).cpu().double() * torch.tensor(sizes, dtype=torch.double)).sum().item()
        hits = torch.cat(logits).argmax(1) == torch.cat(labels)
        correct = (hits * self.image_weights[index]).sum().item()
        loss, correct, asked = distributed.add_up(loss, correct, stopped)
        self.loss += loss
        self.correct += correct
        if self.recipe.prune:
            new = torch.zeros_like(self.image_losses)
            new[index] = torch.cat(losses).clamp(min=torch.finfo(new.dtype).tiny)  # so that 0 means none
            new = distributed.sum_tensor(new)
            self.image_losses = torch.where(new != 0, new, self.image_losses)
        return asked > 0

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain values and tensors, which are not copied."""
        return {
            "weights": self.model.state_dict(),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "scaler": self.scaler and self.scaler.state_dict(),
            "images": [self.image_losses, self.image_weights] if self.recipe.prune else None,
            "recent": [[loss, logits, index, losses] for loss, _, logits, _, index, losses in self._recent],
            **{key: getattr(self, key) for key in COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state_dict of the same model, recipe and data.

        Raises KeyError, TypeError, ValueError or RuntimeError when it belongs to others.
        """
        if any(tensor.dtype != state["weights"][name].dtype for name, tensor in self.model.state_dict().items()):
            raise ValueError("the weights have other dtypes")  # PyTorch compares names and shapes alone
        self.model.load_state_dict(state["weights"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            _load_optimizer(optimizer, own)
        if (state["scaler"] is None) != (self.scaler is None) or (state["images"] is None) != (not self.recipe.prune):
            raise ValueError("the run scales its gradients, or leaves images out, and its state does not")
        if self.scaler:
            _load_scaler(self.scaler, state["scaler"])
        if self.recipe.prune:
            self._load_images(*state["images"])
        for key in COUNTERS:
            setattr(self, key, type(getattr(self, key))(state[key]))
        in_the_run = 1 <= self.epoch <= self.recipe.epochs + 1 and 0 <= self.step <= self.steps and self.steps
        if not (in_the_run and np.isfinite([self.loss, self.seconds]).all()):
            raise ValueError("its place lies outside of the run")
        if len(state["recent"]) > self.step:
            raise ValueError("more steps are not yet counted than were done")
        self._recent = [] if distributed.rank() else [self._uncounted(*kept) for kept in state["recent"]]

    def _load_images(self, losses: torch.Tensor, weights: torch.Tensor) -> None:
        """Load what the images' losses and weights were, float32 (n,) each."""
        if not _layout(losses) == _layout(weights) == _layout(self.image_losses):
            raise ValueError("the images' losses have another layout")
        if not (losses > 0).all() or not (weights >= 0).all() or not torch.isfinite(weights).all():
            raise ValueError("the images' losses or weights are none")
        self.image_losses.copy_(losses)
        self._weigh(self.image_weights.copy_(weights))

    def _uncounted(
        self, loss: torch.Tensor, logits: torch.Tensor, index: torch.Tensor, losses: torch.Tensor | None
    ) -> tuple:
        """Return what _step returned in a single process, from what state_dict holds of it."""
        n, place, images = index.numel(), self.train.labels.device, len(self.train.labels)
        shapes = [tuple(loss.shape), tuple(logits.shape), tuple(index.shape)]
        fit = shapes == [(), (n, len(CLASSES)), (n,)] and (losses is None) == (not self.recipe.prune)
        if not fit or not loss.is_floating_point() or not logits.is_floating_point() or index.dtype != torch.int64:
            raise ValueError("the steps not yet counted have another layout")
        if not 0 < n <= self.recipe.batch_size or index.min() < 0 or index.max() >= images:
            raise ValueError("the steps not yet counted are of other images")
        index = index.to(place)
        kept = None if losses is None else losses.to(place).float().reshape(n)
        return loss.to(place), n, logits.to(place), self.train.labels[index], index, kept


def _agree(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Say whether these tensors are the same but for rounding, which Adam makes larger where a gradient is near 0."""
    return all(a.shape == b.shape and (a - b).norm() <= 0.02 * b.norm() for a, b in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute by one thread what is too small to share: two would wait for each other, and longer on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _load_optimizer(optimizer: Any, own: dict) -> None:
    """Load an optimiser's state, once its tensors have the expected layout: the fused kernels do not check it.

    A parameter that has never had a gradient has no state, so entries may be missing.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = {
        number: {name: _layout(torch.zeros(()) if name == "step" else parameter) for name in optimizer.STATE}
        for number, parameter in enumerate(parameters)
    }
    if any({name: _layout(t) for name, t in own[number].items()} != expected.get(number) for number in own):
        raise ValueError("the optimiser's tensors have another layout")
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


def _load_scaler(scaler: Any, own: dict[str, Any]) -> None:
    """Load the state of a GradScaler: a positive scale, and how long it has been kept."""
    usual = scaler.state_dict()
    moving = {"scale": Number(1e-30), "_growth_tracker": Number(0, usual["growth_interval"], whole=True)}
    if wrong := problem(own, {name: (value,) for name, value in usual.items()} | moving):
        raise ValueError(f"the scale of the gradients: {wrong}")
    scaler.load_state_dict(own)


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype


def _check_finite(loss: float, where: str) -> None:
    if not np.isfinite(loss):
        raise TrainingError(f"the loss became {loss} in {where}: try a smaller --lr")


def prune(losses: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Decide what each image counts for in an epoch, float32 (n,), from the losses float32 (n,) they last had.

    Of the images with less than the mean loss, this share, drawn by the seed, is left out, and the rest of them count
    for as much more. InfoBatch: Qin et al. 2024, arXiv:2303.04947.
    """
    drawn = torch.rand(len(losses), generator=torch.Generator().manual_seed(seed)).to(losses.device)
    easy = losses < losses.mean()
    return torch.where(easy, (drawn >= share) / (1 - share), 1.0)


# runtime/mlp_step.c replaces these, a loss, normalise and three methods. WRITTEN_FOR is the digest of their code as it
# was then. After an edit of it that the C code follows, or that changes no result, take the digest of test_kernels.py.
REPLACED = (loss_of, FusedAdam.step, FusedAdam.states, FusedAdam.options)
WRITTEN_FOR = "49957ee71e1e3846"


# --- predictions -----------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_logits(
    model: nn.Module, split: Split, batch_size: int = EVALUATION_BATCH, stop: Callable[[], bool] | None = None
) -> torch.Tensor:
    """Compute the logits float32 (n, 10), on the CPU, in the split's order, with the model in evaluation mode.

    Raises Stopped once stop() is true; not among several processes, none of which may leave the others waiting.
    """
    model.eval()
    rank, world = distributed.rank(), distributed.world()
    logits = torch.zeros(len(split.labels), len(CLASSES), device=split.labels.device)
    many = logits.device.type == "cpu" and len(logits) >= MANY
    with kernels.evaluating(model, fused=many):
        for number, (images, _) in enumerate(batches(split, batch_size)):
            if world == 1 and stop is not None and stop():
                raise Stopped
            if number % world == rank:
                start = number * batch_size
                logits[start : start + batch_size] = model(normalise(images))
    return distributed.sum_tensor(logits).cpu()


def average(answers: Iterable[torch.Tensor]) -> torch.Tensor:
    """Average several answers: the logarithm of the mean probabilities, float64 (n, 10), which serves as logits.

    answers: logits float (n, 10) of views of the same images, or of models.
    """
    probabilities = [torch.from_numpy(metrics.probabilities(logits)) for logits in answers]
    return torch.stack(probabilities).mean(0).clamp(min=torch.finfo(torch.double).tiny).log()


def predict_views(model: nn.Module, split: Split, progress: Callable[[], Any] | None = None) -> torch.Tensor:
    """Average the logits of the VIEWS of every image, float64 (n, 10). progress() is called after each view."""
    answers = []
    for mirrored, moved in VIEWS:
        images = F.pad(split.images.flip(2) if mirrored else split.images, (moved, -moved) * 2)
        answers.append(predict_logits(model, split._replace(images=images)))
        if progress:
            progress()
    return average(answers)
