"""The loops and the metrics: training an epoch, predicting logits, and what they are worth.

Nothing here knows of files or flags.
"""

import contextlib
import ctypes
import os
import time
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from data import CLASSES, UserError, augment, batches, derive_seeds, normalise
from optim import NATIVE_BFLOAT16, build_optimizers, rate, set_rates

ECE_BINS = 15  # of equal width, as in Guo et al. 2017, arXiv:1706.04599
EVALUATION_BATCH = 256  # as published
MALLOPT = {  # of <malloc.h>: option, value in bytes
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
    "M_MMAP_THRESHOLD": (-3, 2**30),
}
CHECK_EVERY = 25  # steps between looks at the loss: each look waits for a GPU


class TrainingError(UserError):
    """The training cannot go on."""


def pick_device(name):
    """torch.device of "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".

    Raises TrainingError when PyTorch does not know the device or this machine lacks it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
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

    Raises TrainingError for float16 on a CPU, whose range it leaves.
    """
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


def prepare(model, recipe):
    """Set the model's dropout and return the optimisers, as the recipe says."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and recipe.dropout is not None:
            module.p = recipe.dropout
    return build_optimizers(model, recipe)


def train_one_epoch(
    model, split, optimizers, recipe, *, seed, epoch, precision=torch.float32, scaler=None, progress=None
):
    """One pass over the split, in the order of (seed, epoch), minimising the cross-entropy.

    precision is the dtype of autocast, scaler the GradScaler that float16 needs, which lives through all epochs.
    progress(images, loss, accuracy) is called every CHECK_EVERY steps and after the last with the number of
    images since its last call and the epoch's means so far.
    Returns {"loss" in nats, "accuracy", "images_per_second"}, means over the epoch as it went along, dropout,
    augmentation and label smoothing on.
    Raises TrainingError when the loss is not finite.
    """
    model.train()
    start = time.perf_counter()
    device = split.labels.device
    steps = -(-len(split.labels) // recipe.batch_size)
    total_loss = correct = seen = 0
    recent = []  # (loss, logits, labels) of steps not yet counted: counting many at once keeps a step short
    reseed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed  # 0.1 ms, seeds all
    seeds = derive_seeds(seed, epoch, n=steps + 1)
    for step, (images, labels) in enumerate(batches(split, recipe.batch_size, seed, epoch), 1):
        reseed(seeds[step])  # for augmentation and dropout
        images = normalise(augment(images, flip=recipe.flip, shift=recipe.shift, erase=recipe.erase), precision)
        set_rates(optimizers, rate(recipe, (epoch - 1) * steps + step - 1, recipe.epochs * steps))
        with contextlib.nullcontext() if precision is torch.float32 else torch.autocast(device.type, precision):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        model.zero_grad()
        (scaler.scale(loss) if scaler else loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        recent.append((loss.detach(), logits.detach(), labels))
        if step % CHECK_EVERY == 0 or step == steps:
            losses, recent_logits, recent_labels = zip(*recent, strict=True)
            sizes = torch.tensor([len(batch) for batch in recent_labels])
            total_loss += (torch.stack(losses).cpu().double() * sizes).sum().item()
            correct += (torch.cat(recent_logits).argmax(1) == torch.cat(recent_labels)).sum().item()
            counted = int(sizes.sum())
            seen += counted
            recent.clear()
            mean_loss, accuracy = total_loss / seen, correct / seen
            _check_finite(mean_loss, f"epoch {epoch}, at or shortly before step {step} of {steps}")
            if progress:
                progress(counted, mean_loss, accuracy)
    return {"loss": mean_loss, "accuracy": accuracy, "images_per_second": seen / (time.perf_counter() - start)}


def _check_finite(loss, where):
    if not np.isfinite(loss):
        raise TrainingError(f"the loss became {loss} in {where}: try a smaller --lr")


def fit(model, train, select, recipe, *, seed, precision=torch.float32, progress=None):
    """Train by a recipe; after each epoch, yield what it gave on the split `select`, where there is one.

    Yields {"epoch", "train_loss", "train_accuracy", "select_loss", "select_accuracy", "seconds",
    "images_per_second"}: losses in nats, seconds of the whole epoch with its evaluation, images per second of
    the training alone; without the second pair where select is None. progress is that of train_one_epoch, with
    the epoch put first.
    """
    optimizers = prepare(model, recipe)
    scaler = torch.amp.GradScaler(train.labels.device.type) if precision is torch.float16 else None
    for epoch in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        trained = train_one_epoch(
            model,
            train,
            optimizers,
            recipe,
            seed=seed,
            epoch=epoch,
            precision=precision,
            scaler=scaler,
            progress=partial(progress, epoch) if progress else None,
        )
        row = {"epoch": epoch, "train_loss": trained["loss"], "train_accuracy": trained["accuracy"]}
        if select:
            loss, accuracy = loss_and_accuracy(predict_logits(model, select), select.labels.cpu())
            _check_finite(loss, f"the evaluation after epoch {epoch}")
            row |= {"select_loss": loss, "select_accuracy": accuracy}
        yield row | {
            "seconds": time.perf_counter() - start,
            "images_per_second": trained["images_per_second"],
        }


@torch.inference_mode()
def predict_logits(model, split, batch_size=EVALUATION_BATCH):
    """Logits float32 (n, 10) on the CPU, in the split's order, with the model in evaluation mode."""
    model.eval()
    return torch.cat([model(normalise(images)) for images, _ in batches(split, batch_size)]).float().cpu()


def loss_and_accuracy(logits, labels):
    """Mean cross-entropy in nats and accuracy, as floats; logits (n, 10), labels (n,), both on the CPU."""
    return F.cross_entropy(logits.double(), labels).item(), (logits.argmax(1) == labels).double().mean().item()


def wilson_interval(correct, n, confidence=0.95):
    """Wilson score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953), as [low, high]."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return [float(interval.low), float(interval.high)]


def expected_calibration_error(probabilities, labels, bins=ECE_BINS):
    """Mean gap between confidence and accuracy over equal-width bins of confidence, weighted by their counts.

    probabilities: float (n, 10); labels: int (n,). Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bin m is ((m-1)/bins, m/bins]
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


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
