"""Every figure that is reported of a model, computed in one place. A new metric is one function with @metric.

figures = metrics.measure(logits, labels)                      # {"accuracy": 0.92, "log_loss": 0.25, "ece": 0.03}
everything = metrics.evaluate(logits, labels, data.CLASSES)    # with intervals, by class, and the confusion matrix

Logits are float (n, 10) and labels int64 (n,), tensors on the CPU; probabilities are float64 arrays (n, 10).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from runtime.errors import UserError

ECE_BINS = 15  # of equal width, as in Guo et al. 2017, arXiv:1706.04599
COVERAGES = 100  # steps of the curve of accuracy against coverage
ROUNDING = 1e-9  # differences of accuracies that are smaller are errors of floating point
Z95 = 1.959963984540054  # 97.5% of a standard normal distribution lie below it


class Metric(NamedTuple):
    """A figure of a model on labelled images."""

    title: str  # in tables
    unit: str
    compute: Callable[[torch.Tensor, torch.Tensor], float]


METRICS: dict[str, Metric] = {}
RESERVED = ("loss", "n", "accuracy_ci95", "per_class", "confusion_matrix")  # other names in histories and in JSON


class MetricError(UserError):
    """A metric whose name is in use, or a metric or an answer that is not a finite number."""


def metric(title: str, unit: str = "") -> Callable:
    """Register a function (logits, labels) -> float. evaluate.py prints it, and every history holds it."""

    def register(function: Callable[[torch.Tensor, torch.Tensor], float]) -> Callable:
        if function.__name__ in {*METRICS, *RESERVED}:
            raise MetricError(f"metrics.py: the name {function.__name__!r} is already in use; choose another")
        METRICS[function.__name__] = Metric(title, unit, function)
        return function

    return register


@metric("accuracy")
def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the share of right answers."""
    return (logits.argmax(1) == labels).double().mean().item()


@metric("log loss", unit="nats")
def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the mean cross-entropy, in nats."""
    return F.cross_entropy(logits.double(), labels).item()


@metric("expected calibration error", unit=f"({ECE_BINS} bins)")
def ece(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the calibration error of the answers' probabilities."""
    chances = probabilities(logits)
    return calibration_error(chances.max(1), chances.argmax(1) == labels.numpy())


def measure(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compute every metric, by name. Raises MetricError where one, or an answer, is not a finite number."""
    figures = {name: float(each.compute(logits, labels)) for name, each in METRICS.items()}
    for name, figure in figures.items():
        if not np.isfinite(figure):
            raise MetricError(f"the metric {name} of metrics.py is {figure}, which JSON cannot hold")
    return figures


def evaluate(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Compute all figures of one model on one split, as plain numbers and lists.

    Returns n, every metric, accuracy_ci95 (Wilson), per_class (precision, recall, f1, support by class name) and
    confusion_matrix (rows true, columns predicted).
    """
    truth, predicted, k = labels.numpy(), logits.argmax(1).numpy(), len(classes)
    matrix = np.bincount(truth * k + predicted, minlength=k * k).reshape(k, k)
    return {
        "n": len(labels),
        **measure(logits, labels),
        "accuracy_ci95": wilson_interval(int(matrix.trace()), len(labels)),
        "per_class": dict(zip(classes, _by_class(matrix), strict=True)),
        "confusion_matrix": matrix.tolist(),
    }


def _by_class(matrix: np.ndarray) -> list[dict[str, Any]]:
    """Compute the figures of each class from a confusion matrix; 0 where there is nothing to divide by.

    By hand, as scikit-learn takes a second to import.
    """
    rows = zip(matrix.diagonal().tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist(), strict=True)
    return [
        {
            "precision": right / answered if answered else 0.0,
            "recall": right / true if true else 0.0,
            "f1": 2 * right / (true + answered) if true + answered else 0.0,
            "support": true,
        }
        for right, answered, true in rows
    ]


# --- intervals and tests ---------------------------------------------------------------------------------


def wilson_interval(correct: int, n: int) -> list[float]:
    """Compute the 95% score interval [low, high] of a proportion.

    Wilson 1927, doi:10.1080/01621459.1927.10502953. By hand, as scipy.stats takes a second to import.
    """
    p, twice = correct / n, 2 * (n + Z95**2)
    centre = (2 * n * p + Z95**2) / twice
    half = Z95 / twice * math.sqrt(4 * n * p * (1 - p) + Z95**2)
    return [centre - half if correct else 0.0, centre + half if correct < n else 1.0]


def share(count: int, n: int) -> dict[str, Any]:
    """Describe a count as a share of n: {"count", "n", "share", "ci95"} with Wilson's interval; None where n is 0."""
    count, n = int(count), int(n)
    described = {"share": count / n, "ci95": wilson_interval(count, n)} if n else {"share": None, "ci95": None}
    return {"count": count, "n": n, **described}


def mean_interval(values: Sequence[float], confidence: float = 0.95, overlap: float = 0.0) -> list[float]:
    """Compute the interval [low, high] of a mean by Student's t distribution; it takes two values or more.

    overlap: of corrected_error.
    """
    from scipy.special import stdtrit  # Student's quantile; scipy.stats takes a second to import

    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * corrected_error(values, overlap)
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def corrected_error(values: Sequence[float], overlap: float) -> float:
    """Compute the standard error of a mean of values that may be of overlapping training images.

    overlap: for values of several folds of k, 1 / (k - 1), the ratio of held-out to training images; else 0. The folds
    share training images, so that their values scatter too little: Nadeau and Bengio 2003,
    doi:10.1023/A:1024068626366; with several seeds Bouckaert and Frank 2004, doi:10.1007/978-3-540-24775-3_3.
    """
    return float(np.std(values, ddof=1)) * math.sqrt(1 / len(values) + overlap)


def spread(values: Sequence[float], overlap: float = 0.0) -> dict[str, Any]:
    """Describe values by {"n", "mean"}, and several also by {"sd", "ci95"}: by n - 1, and the interval of the mean."""
    found: dict[str, Any] = {"n": len(values), "mean": statistics.mean(values)}
    if len(values) > 1:
        found |= {"sd": float(np.std(values, ddof=1)), "ci95": mean_interval(values, overlap=overlap)}
    return found


def paired(a: Sequence[float], b: Sequence[float], overlap: float = 0.0) -> dict[str, Any]:
    """Compare two ways of training by the paired t test: a[i] and b[i] are of one seed, two or more (Student 1908).

    overlap: of corrected_error. Returns {"n", "difference", "sd", "ci95", "p_value"} of a - b. Where all differences
    are equal, their SD says nothing, and interval and p-value are None.
    """
    from scipy.special import stdtr  # takes less time to import than scipy.stats

    differences = np.subtract(a, b)
    n, mean, sd = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    if sd < ROUNDING:
        return {"n": n, "difference": mean, "sd": 0.0, "ci95": None, "p_value": None}
    error = corrected_error(differences.tolist(), overlap)
    p_value = 2 * float(stdtr(n - 1, -abs(mean) / error))
    interval = mean_interval(differences.tolist(), overlap=overlap)
    return {"n": n, "difference": mean, "sd": sd, "ci95": interval, "p_value": p_value}


def power(n: int, difference: float, sd: float, alpha: float = 0.05) -> float:
    """Compute the chance that a two-sided paired t test over n seeds shows a true difference.

    sd: of the paired differences. By the noncentral t distribution (Cohen 1988, Statistical Power Analysis, chapter 2).
    """
    from scipy.special import nctdtr, stdtrit

    limit, shift = float(stdtrit(n - 1, 1 - alpha / 2)), abs(difference) / sd * math.sqrt(n)
    tails = np.nan_to_num(nctdtr(n - 1, shift, [limit, -limit]))  # SciPy returns NaN for one that is all but 0
    return float(1 - tails[0] + tails[1])


def seeds_needed(difference: float, sd: float, alpha: float = 0.05, least: float = 0.8) -> int | None:
    """Find how many seeds a paired t test needs to show a true difference with a power of at least so much.

    Returns None above 1,000 seeds.
    """
    return next((n for n in range(2, 1001) if power(n, difference, sd, alpha) >= least), None)


def entropy(shares: np.ndarray, axis: int) -> np.ndarray:
    """Compute the entropy, in bits, of shares that add up to 1 along an axis: float64, without that axis."""
    return np.asarray(-(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis))


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> dict[str, Any]:
    """Compare two models on the same images by McNemar's exact test (McNemar 1947, doi:10.1007/BF02295996).

    correct_a, correct_b: bool (n,). Returns {"only_a", "only_b", "p_value"}: how many images only one of the two got
    right, and the two-sided binomial p-value of that split.
    """
    from scipy.stats import binomtest  # takes a second to import

    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p_value": float(p_value)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests, in their order (Holm 1979, https://www.jstor.org/stable/4615733)."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values, float)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


# --- calibration -----------------------------------------------------------------------------------------


def calibration_error(scores: np.ndarray, hits: np.ndarray) -> float:
    """Compute the mean gap between score and share of hits over equal-width bins, weighted by their counts.

    scores: float (n,) in [0, 1]; hits: bool (n,). Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    gaps = np.bincount(_bins(scores), weights=hits - scores, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def _bins(scores: np.ndarray) -> np.ndarray:
    """Return the bin of each score: bin m, counted from 0, is (m / ECE_BINS, (m + 1) / ECE_BINS]."""
    return np.clip(np.ceil(scores * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)


def calibration(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Compute the calibration error of the answers and of every class, with the reliability diagrams of both.

    probabilities: float64 (n, 10), labels: int (n,). Classwise as in Kull et al. 2019 (arXiv:1910.12656): the mean
    over the classes of the error of that class's probability, where all n images count for each.
    """
    predicted, rows = probabilities.argmax(1), np.arange(len(labels))
    answer = _reliability(probabilities[rows, predicted], predicted == labels)
    every = [_reliability(probabilities[:, k], labels == k) for k in range(len(classes))]
    return {
        "ece": answer["error"],
        "classwise_ece": float(np.mean([each["error"] for each in every])),
        "log_loss": float(-np.log(np.maximum(probabilities[rows, labels], 1e-300)).mean()),
        "answer": answer,
        "classes": dict(zip(classes, every, strict=True)),
    }


def _reliability(scores: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """Compute counts, mean score and share of hits by bin, and their mean gap; None stands for an empty bin."""
    place = _bins(scores)
    counts, score, hit = (np.bincount(place, weights=weights, minlength=ECE_BINS) for weights in (None, scores, hits))
    return {
        "error": calibration_error(scores, hits),
        "counts": counts.astype(int).tolist(),
        "confidence": [float(s / c) if c else None for s, c in zip(score, counts, strict=True)],
        "accuracy": [float(h / c) if c else None for h, c in zip(hit, counts, strict=True)],
    }


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Find the temperature that makes the labels most likely (Guo et al. 2017, arXiv:1706.04599).

    The images must be new to the model.
    """
    from scipy.optimize import minimize_scalar  # takes a second to import

    logits = logits.double()
    found = minimize_scalar(
        lambda log: F.cross_entropy(logits / np.exp(log), labels).item(), bounds=(-3, 3), method="bounded"
    )
    return float(np.exp(found.x))


def probabilities(logits: torch.Tensor | np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Compute the probabilities float64 (n, 10) of logits / temperature. Raises MetricError unless all are finite."""
    scaled = torch.as_tensor(logits).double() / temperature
    if odd := int((~scaled.isfinite().all(1)).sum()):
        raise MetricError(
            f"the network's answers to {odd:,} of {len(scaled):,} images are not finite numbers: its weights are too "
            "large, or damaged"
        )
    return scaled.softmax(1).numpy()


def coverage_curve(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """Compute the accuracy on the most confident share of the images.

    confidence: float (n,), correct: bool (n,). Returns dicts of coverage, n, accuracy and threshold, the lowest
    confidence. Selective prediction: El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017, arXiv:1705.08500.
    """
    order = np.argsort(-confidence, kind="stable")
    right = np.cumsum(correct[order])
    sizes = sorted({max(1, round(len(order) * step / COVERAGES)) for step in range(1, COVERAGES + 1)})
    return [
        {
            "coverage": n / len(order),
            "n": n,
            "accuracy": float(right[n - 1] / n),
            "threshold": float(confidence[order[n - 1]]),
        }
        for n in sizes
    ]
