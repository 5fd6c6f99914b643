"""What mistakes are made of: wrong labels, near-duplicates, what every seed gets wrong, and the rest; and calibration.

Arrays in, plain numbers and arrays out; no files and no pictures.
"""

import numpy as np
import torch
from torch.nn import functional as F

import engine
from data import CLASSES

GROUPS = {  # of the mistakes, in the order in which a mistake is counted in one
    "label": "suspected label errors",
    "duplicate": "near-duplicates of training images",
    "consensus": "consensus mistakes",
    "unstable": "unstable mistakes",
}
CONSENSUS_SEEDS = 5  # trainings that must agree on a mistake, at least
PIXEL_LIMIT = 0.04  # RMS difference, of the grey range, below which two images are near-duplicates; and further apart,
FEATURE_LIMIT, LOOSE_PIXEL_LIMIT = 0.025, 0.075  # cosine distance of features, with a wider limit for the pixels
COVERAGES = 100  # steps of the curve of accuracy against coverage


def temperature(logits, labels):
    """The temperature that makes logits / temperature most likely (Guo et al. 2017, arXiv:1706.04599).

    logits: float (n, 10), labels: int64 (n,), both of images that the model was not trained on.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    found = minimize_scalar(
        lambda log: F.cross_entropy(logits / np.exp(log), labels).item(), bounds=(-3, 3), method="bounded"
    )
    return float(np.exp(found.x))


def calibration(probabilities, labels):
    """Expected calibration error of the answer and, classwise, of every probability, with the diagrams of both.

    probabilities: float64 (n, 10), labels: int (n,). Classwise as in Kull et al. 2019 (arXiv:1910.12656): the mean
    over the classes of the error of that class's probability, all n images counted for each.
    """
    predicted, rows = probabilities.argmax(1), np.arange(len(labels))
    answer = _reliability(probabilities[rows, predicted], predicted == labels)
    classes = [_reliability(probabilities[:, k], labels == k) for k in range(len(CLASSES))]
    return {
        "ece": answer["error"],
        "classwise_ece": float(np.mean([each["error"] for each in classes])),
        "log_loss": float(-np.log(np.maximum(probabilities[rows, labels], 1e-300)).mean()),
        "answer": answer,
        "classes": dict(zip(CLASSES, classes, strict=True)),
    }


def _reliability(scores, hits):
    """Counts, mean score and share of hits in bins of equal width, and their mean gap; None in an empty bin."""
    place = engine.calibration_bins(scores)
    counts, score, hit = (
        np.bincount(place, weights=weights, minlength=engine.ECE_BINS) for weights in (None, scores, hits)
    )
    return {
        "error": engine.calibration_error(scores, hits),
        "counts": counts.astype(int).tolist(),
        "confidence": [float(s / c) if c else None for s, c in zip(score, counts, strict=True)],
        "accuracy": [float(h / c) if c else None for h, c in zip(hit, counts, strict=True)],
    }


def coverage_curve(confidence, correct):
    """Accuracy of the most confident share of the images: dicts of coverage, n, accuracy, threshold (least confidence).

    Selective prediction (El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017, arXiv:1705.08500).
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


def label_issues(labels, out_of_fold):
    """Images whose label is suspect, the most suspect first: int64 indices.

    Confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab, pruned by noise rate. labels: int (n,);
    out_of_fold: float64 (n, 10), each row by a model that was not trained on the image.
    """
    from cleanlab.filter import find_label_issues

    return find_label_issues(labels, out_of_fold, return_indices_ranked_by="self_confidence", n_jobs=1)


def near_duplicates(pixel, feature, feature_pixel, scale=1.0):
    """Whether each test image is a near-duplicate of a training image: bool (n,).

    pixel: RMS difference, of the grey range, to the training image nearest in pixels; feature: cosine distance to the
    one nearest in features, and feature_pixel the RMS difference to that one; all float (n,). As in arXiv:1906.08255,
    both spaces count; the limits are ours, set by looking at pairs. scale multiplies all of them.
    """
    alike = (feature < FEATURE_LIMIT * scale) & (feature_pixel < LOOSE_PIXEL_LIMIT * scale)
    return (pixel < PIXEL_LIMIT * scale) | alike


def consensus(predicted, votes):
    """Whether all trainings answer as the model does: bool (n,), or None with fewer than CONSENSUS_SEEDS of them.

    predicted: int (n,), votes: int (trainings, n).
    """
    return (votes == predicted).all(0) if len(votes) >= CONSENSUS_SEEDS else None


def group(wrong, suspect, duplicate, agreed):
    """The group of each image, "" for those that are not mistakes: each mistake is in the first that it fits.

    wrong, suspect, duplicate, agreed: bool (n,), the second and the last None where they are not known; without
    agreed, what is left is "unknown".
    """
    groups = np.where(wrong, "unknown" if agreed is None else "unstable", "").astype(object)
    for name, fits in (("consensus", agreed), ("duplicate", duplicate), ("label", suspect)):
        if fits is not None:
            groups[wrong & fits] = name
    return groups


def ambiguity(votes):
    """Entropy, in bits, of all trainings' answers to each image: float64 (n,); votes: int (trainings, n)."""
    shares = np.stack([(votes == k).mean(0) for k in range(len(CLASSES))])
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(0)


def scaled(logits, temperature):
    """Probabilities float64 (n, 10) of logits / temperature."""
    return (torch.as_tensor(logits).double() / temperature).softmax(1).numpy()
