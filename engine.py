"""The loops and the metrics: training an epoch, predicting logits, and what they are worth.

Nothing here knows of files or flags.
"""

import contextlib
import ctypes
import os
import time

import numpy as np
import torch
from torch.nn import functional as F

import distributed
from data import CLASSES, UserError, augment, batches, derive_seeds, normalise, share
from optim import NATIVE_BFLOAT16, build_optimizers, rate, set_rates

ECE_BINS = 15  # of equal width, as in Guo et al. 2017, arXiv:1706.04599
EVALUATION_BATCH = 256  # as published
VIEWS = tuple((mirrored, moved) for mirrored in (False, True) for moved in (0, 1, -1))  # of test-time augmentation: the
# image itself, and moved by a pixel to two opposite corners, and all three mirrored, as in cifar10-airbench
MALLOPT = {  # of <malloc.h>: option, value in bytes
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
    "M_MMAP_THRESHOLD": (-3, 2**30),
}
DEVICES = ("cpu", "cuda", "mps")
CHECK_EVERY = 25  # steps between looks at the loss: each look waits for a GPU
COUNTERS = ("epoch", "step", "loss", "correct", "seconds")  # of a Training, kept in its state_dict
PRUNED_EPOCHS = 0.875  # share of a run's epochs that may leave images out, as published with prune's method


class TrainingError(UserError):
    """The training cannot go on."""


def pick_device(name):
    """torch.device of "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".

    Of several processes on a machine each gets a GPU of its own.
    Raises TrainingError when PyTorch does not know the device or this machine lacks it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "cuda" and processes > 1:
        if processes > (gpus := torch.cuda.device_count()):
            raise TrainingError(f"{processes} processes on this machine need as many GPUs; it has {gpus}")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise TrainingError(f"device {name!r} cannot be used: the kinds are {', '.join(DEVICES)}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def make_deterministic():
    """Refuse operations whose result varies from run to run; of use on a GPU, the CPU's are repeatable already."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def pick_precision(name, device):
    """torch.dtype of "float32", "bfloat16", "float16" (on a GPU), or "auto": the fastest the device has.

    Raises TrainingError for float16 on a CPU, whose range it leaves, and for any other name.
    """
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise TrainingError(f"{name!r} is no precision")
    if name == "auto":
        if device.type == "cuda":
            name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            name = "bfloat16" if device.type == "cpu" and NATIVE_BFLOAT16 else "float32"
    if name == "float16" and device.type == "cpu":
        raise TrainingError("--precision float16 needs a GPU; on a CPU there is bfloat16")
    return getattr(torch, name)


def keep_freed_memory():
    """Let the C library keep freed memory instead of returning it to the system, for one training in this process.

    glibc returns every large tensor, and takes its pages anew in the next step, one page fault each: a twentieth of
    the CNN's step. Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for option, value in MALLOPT.values():
            libc.mallopt(option, value)


class Training:
    """One run of a recipe, which can be saved whenever it tells its progress and then goes on to the same bits.

    Trains `model` on the split `train` and measures it after every epoch on the split `select`, where there is one.
    Among several processes (distributed.py) each takes its share of every batch, and the figures are those of all.
    teacher, where the recipe distils: logits for the training images, float32 (n, 10), of distill.answers.
    epoch, counted from 1, is the one under way, and step how many of its `steps` are done; loss (a sum, in nats),
    correct and seconds are this epoch's so far.
    image_losses, float32 (n,), are those that the images last had, and image_weights, float32 (n,), what each counts
    for in this epoch: 0 where it is left out.
    """

    def __init__(self, model, train, select, recipe, *, seed, precision=torch.float32, teacher=None):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and recipe.dropout is not None:
                module.p = recipe.dropout
        self.model, self.train, self.select, self.recipe = model, train, select, recipe
        self.seed, self.precision, self.teacher = seed, precision, teacher
        self.optimizers = build_optimizers(model, recipe)
        self.scaler = torch.amp.GradScaler(train.labels.device.type) if precision is torch.float16 else None
        self.network = distributed.wrap(model, normalise(train.images[:1]))
        self.image_losses = torch.full(train.labels.shape, torch.inf, device=train.labels.device)
        self.epoch = 1
        self._begin_epoch()

    def _begin_epoch(self):
        self.step = 0
        self.loss = self.correct = self.seconds = 0.0
        left_out = self.recipe.prune if self.epoch <= PRUNED_EPOCHS * self.recipe.epochs else 0.0
        self._weigh(prune(self.image_losses, left_out, derive_seeds(self.seed, 0, self.epoch)[0]))

    def _weigh(self, weights):
        self.image_weights, index = weights, weights.nonzero().squeeze(1)
        images = self.train.images if len(index) == len(weights) else self.train.images.index_select(0, index)
        self._numbered = self.train._replace(images=images, labels=index)
        self.steps = -(-len(index) // self.recipe.batch_size)

    @property
    def seen(self):
        """How many of the epoch's images are done with, counting a part of those it leaves out."""
        chosen = len(self._numbered.labels)
        return min(self.step * self.recipe.batch_size, chosen) * len(self.train.labels) // chosen

    @property
    def finished(self):
        return self.epoch > self.recipe.epochs

    def run(self, progress=None, stop=None):
        """Train what is left; after each epoch yield its row.

        progress(images, loss, accuracy) is called every CHECK_EVERY steps and after an epoch's last, with the number
        of images since its last call and the epoch's means so far. stop() is asked then too: once it is true, in any
        of the processes, the run ends, as far as it has come.
        Yields {"epoch", "train_loss", "train_accuracy", "select_loss", "select_accuracy", "seconds",
        "images_per_second"}: losses in nats, those of training as means over the epoch as it went along, dropout,
        augmentation and label smoothing on; seconds of the whole epoch with its evaluation, images per second of the
        training alone; without the select pair where nothing selects.
        Raises TrainingError when a loss is not finite.
        """
        while not self.finished:
            stopped = self._train_epoch(progress, stop)
            if self.step < self.steps:
                return
            start, n = time.perf_counter(), len(self.train.labels)
            row = {"epoch": self.epoch, "train_loss": self.loss / n, "train_accuracy": self.correct / n}
            if self.select:
                loss, accuracy = loss_and_accuracy(predict_logits(self.model, self.select), self.select.labels.cpu())
                _check_finite(loss, f"the evaluation after epoch {self.epoch}")
                row |= {"select_loss": loss, "select_accuracy": accuracy}
            row["seconds"] = self.seconds + time.perf_counter() - start
            row["images_per_second"] = len(self._numbered.labels) / self.seconds
            self.epoch += 1
            self._begin_epoch()
            yield row
            if stopped:
                return

    def _train_epoch(self, progress, stop):
        """Take the epoch's steps from where it stands. Returns whether a stop was asked for, which cuts it short."""
        start = time.perf_counter()
        seeds = derive_seeds(self.seed, self.epoch, n=self.steps + 1)
        rank = distributed.rank()
        own_seeds = derive_seeds(self.seed, self.epoch, rank, n=self.steps + 1) if rank else seeds
        order = {"first": self.step, "rank": rank, "world": distributed.world()}
        recent = []  # of steps not yet counted: counting many at once keeps a step short
        seen = self.seen
        self.model.train()
        for images, index in batches(self._numbered, self.recipe.batch_size, self.seed, self.epoch, **order):
            recent.append(self._step(images, index, seeds[self.step + 1], own_seeds[self.step + 1]))
            self.step += 1
            if self.step % CHECK_EVERY and self.step < self.steps:
                continue
            stopped = self._count(recent, stop)
            recent.clear()
            before, seen = seen, self.seen
            now = time.perf_counter()
            self.seconds, start = self.seconds + now - start, now
            loss, accuracy = self.loss / seen, self.correct / seen
            _check_finite(loss, f"epoch {self.epoch}, at or shortly before step {self.step} of {self.steps}")
            if progress:
                progress(seen - before, loss, accuracy)
            if stopped:
                return True
        return False

    def _step(self, images, index, seed, own_seed):
        """Train on this process's share of a batch, the images of that index.

        Returns loss, the number of images it is a mean of, logits, labels, index, and where the recipe prunes the
        images' own losses.

        With several processes the loss is such that its mean over them, whose gradient they all get, is the mean over
        the images of the whole batch, whoever has more of them.
        """
        recipe, device, rank, world = self.recipe, index.device, distributed.rank(), distributed.world()
        batch = min(recipe.batch_size, len(self._numbered.labels) - self.step * recipe.batch_size)
        reseed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed  # 0.1 ms, seeds all
        reseed(seed)
        part = share(batch, rank, world)
        labels = self.train.labels.index_select(0, index)
        alterations = {name: getattr(recipe, name) for name in ("flip", "shift", "still", "erase")}
        images = normalise(augment(images, **alterations, n=batch, part=part), self.precision)
        if rank:
            reseed(own_seed)  # other images, other dropout
        done = (self.epoch - 1) * self.steps + self.step
        set_rates(self.optimizers, rate(recipe, done, recipe.epochs * self.steps))
        autocast = self.precision is not torch.float32
        with torch.autocast(device.type, self.precision) if autocast else contextlib.nullcontext():
            logits = self.network(images)
        answers = None if self.teacher is None else self.teacher[index]
        losses, reduction = None, "mean" if world == 1 else "sum"
        if recipe.prune:
            losses = loss_of(logits.float(), labels, answers, recipe, "none")
            loss = getattr(losses * self.image_weights[index], reduction)()
            losses = losses.detach()
        else:
            loss = loss_of(logits.float(), labels, answers, recipe, reduction)
        if world > 1:
            loss = loss * (world / batch)
        self.model.zero_grad()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer) if self.scaler else optimizer.step()
        if self.scaler:
            self.scaler.update()
        return loss.detach(), batch / world, logits.detach(), labels, index, losses

    def _count(self, recent, stop):
        """Add what _step returned, of several steps and all processes, to the sums. Returns whether any is to stop."""
        means, sizes, logits, labels, index, losses = zip(*recent, strict=True)
        index = torch.cat(index)
        loss = (torch.stack(means).cpu().double() * torch.tensor(sizes, dtype=torch.double)).sum().item()
        hits = torch.cat(logits).argmax(1) == torch.cat(labels)
        correct = (hits * self.image_weights[index]).sum().item()
        loss, correct, asked = distributed.add_up(loss, correct, stop is not None and stop())
        self.loss += loss
        self.correct += correct
        if self.recipe.prune:
            new = torch.zeros_like(self.image_losses)
            new[index] = torch.cat(losses).clamp(min=torch.finfo(new.dtype).tiny)  # so that 0 is none
            new = distributed.sum_tensor(new)
            self.image_losses = torch.where(new != 0, new, self.image_losses)
        return asked > 0

    def state_dict(self):
        """What the run hangs on at this point, its own tensors: plain values and tensors for torch.save."""
        return {
            "weights": self.model.state_dict(),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "scaler": self.scaler and self.scaler.state_dict(),
            "images": [self.image_losses, self.image_weights] if self.recipe.prune else None,
            **{key: getattr(self, key) for key in COUNTERS},
        }

    def load_state_dict(self, state):
        """Go on from a state_dict of the same model, recipe and data.

        Raises KeyError, TypeError, ValueError or RuntimeError when it is of others.
        """
        self.model.load_state_dict(state["weights"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            expected = [  # the fused kernels believe what they are given
                {name: _layout(torch.zeros(()) if name == "step" else parameter) for name in optimizer.STATE}
                for parameter in parameters
            ]
            if {n: {k: _layout(t) for k, t in own[n].items()} for n in own} != dict(enumerate(expected)):
                raise ValueError("the optimiser's tensors have another layout")
            optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        if self.recipe.prune:
            losses, weights = state["images"]
            self.image_losses.copy_(losses)
            self._weigh(self.image_weights.copy_(weights))
        for key in COUNTERS:
            setattr(self, key, type(getattr(self, key))(state[key]))
        in_the_run = 1 <= self.epoch <= self.recipe.epochs + 1 and 0 <= self.step <= self.steps and self.steps
        if not (in_the_run and np.isfinite([self.loss, self.seconds]).all()):
            raise ValueError("its place lies outside of the run")


def prune(losses, share, seed):
    """What each image is to count for in an epoch, float32 (n,), from the losses float32 (n,) they had.

    That share of the images with less than the mean loss, drawn by the seed, counts for nothing, and the rest of them
    for as much more. InfoBatch: Qin et al. 2024, arXiv:2303.04947.
    """
    drawn = torch.rand(len(losses), generator=torch.Generator().manual_seed(seed)).to(losses.device)
    easy = losses < losses.mean()
    return torch.where(easy, (drawn >= share) / (1 - share), 1.0)


def loss_of(logits, labels, teacher, recipe, reduction="mean"):
    """The loss that a recipe minimises, in nats; logits and the teacher's (or None): float32 (b, 10), labels: int64.

    reduction: "mean" over the images, "sum", or "none".

    Distillation as by Hinton et al. 2015, arXiv:1503.02531: both answers at a temperature, whose square keeps the
    gradients' size.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction=reduction)
    if teacher is None:
        return loss
    share, t = recipe.distillation, recipe.temperature
    answers = [(each / t).log_softmax(1) for each in (logits, teacher)]
    distance = F.kl_div(*answers, log_target=True, reduction="none").sum(1) * t**2
    if reduction != "none":
        distance = getattr(distance, reduction)()
    return (1 - share) * loss + share * distance


def _layout(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype


def _check_finite(loss, where):
    if not np.isfinite(loss):
        raise TrainingError(f"the loss became {loss} in {where}: try a smaller --lr")


@torch.inference_mode()
def predict_logits(model, split, batch_size=EVALUATION_BATCH):
    """Logits float32 (n, 10) on the CPU, in the split's order, with the model in evaluation mode."""
    model.eval()
    rank, world = distributed.rank(), distributed.world()
    logits = torch.zeros(len(split.labels), len(CLASSES), device=split.labels.device)
    for number, (images, _) in enumerate(batches(split, batch_size)):
        if number % world == rank:
            start = number * batch_size
            logits[start : start + batch_size] = model(normalise(images))
    return distributed.sum_tensor(logits).cpu()


def average(answers):
    """Logarithm of the mean probabilities, float64 (n, 10): logits, as good as any, of several answers taken together.

    answers: logits float (n, 10) of views of the same images, or of models, any iterable.
    """
    probabilities = [logits.double().softmax(1) for logits in answers]
    return torch.stack(probabilities).mean(0).clamp(min=torch.finfo(torch.double).tiny).log()


def predict_views(model, split, progress=None):
    """The average of what predict_logits says of the VIEWS of every image, float64 (n, 10).

    progress() is called after each view.
    """
    answers = []
    for mirrored, moved in VIEWS:
        images = F.pad(split.images.flip(2) if mirrored else split.images, (moved, -moved) * 2)
        answers.append(predict_logits(model, split._replace(images=images)))
        if progress:
            progress()
    return average(answers)


def loss_and_accuracy(logits, labels):
    """Mean cross-entropy in nats and accuracy, as floats; logits (n, 10), labels (n,), both on the CPU."""
    return F.cross_entropy(logits.double(), labels).item(), (logits.argmax(1) == labels).double().mean().item()


def wilson_interval(correct, n, confidence=0.95):
    """Wilson score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953), as [low, high]."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return [float(interval.low), float(interval.high)]


def expected_calibration_error(probabilities, labels):
    """Calibration error of the answers: probabilities float (n, 10), labels int (n,)."""
    return calibration_error(probabilities.max(1), probabilities.argmax(1) == labels)


def calibration_error(scores, hits):
    """Mean gap between score and share of hits over equal-width bins of the score, weighted by their counts.

    scores: float (n,) in [0, 1]; hits: bool (n,). Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    gaps = np.bincount(calibration_bins(scores), weights=hits - scores, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def calibration_bins(scores):
    """The bin of each score, int (n,): bin m, counted from 0, is (m / ECE_BINS, (m + 1) / ECE_BINS]."""
    return np.clip(np.ceil(scores * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)


def metrics(logits, labels):
    """All figures of one model on one split: logits float (n, 10) and labels int64 (n,), both on the CPU.

    Returns a dict of plain numbers and lists: n, accuracy, accuracy_ci95, log_loss (nats), ece, per_class
    (precision, recall, f1, support by class name) and confusion_matrix (rows true, columns predicted).
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    log_loss, accuracy = loss_and_accuracy(logits, labels)
    probabilities, labels = logits.double().softmax(1).numpy(), labels.numpy()
    predicted, every = probabilities.argmax(1), np.arange(len(CLASSES))
    columns = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    per_class = [
        dict(zip(("precision", "recall", "f1", "support"), (float(p), float(r), float(f), int(n)), strict=True))
        for p, r, f, n in zip(*columns, strict=True)
    ]
    return {
        "n": len(labels),
        "accuracy": accuracy,
        "accuracy_ci95": wilson_interval(int((predicted == labels).sum()), len(labels)),
        "log_loss": log_loss,
        "ece": expected_calibration_error(probabilities, labels),
        "per_class": dict(zip(CLASSES, per_class, strict=True)),
        "confusion_matrix": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


def mcnemar(correct_a, correct_b):
    """McNemar's exact test of two models on the same images (McNemar 1947, doi:10.1007/BF02295996).

    correct_a, correct_b: bool (n,). Returns {"only_a", "only_b", "p_value"}: how many images only one of the
    two got right, and the two-sided binomial p-value of that split.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p_value": float(p_value)}
