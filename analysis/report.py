"""What analyze_errors.py writes of checkpoints' mistakes: analysis.json, *.png, and an interactive report.

summary = report.summary(path, info["sha256"], measured[0], numbers, test)   # measured etc. of analysis.composition
pictures = report.figures(measured[0], test, history)
page = report.page(measured, evidence, numbers, train, test, embedding)
html = report.render(page)

The report is one HTML file that works without a network: it is templates/report.html.j2 with report.css and report.js,
its data are JSON, its images are sprites.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from analysis import composition, corruptions, explain, humans, mistakes, plots
from analysis.composition import Evidence, Measured
from data import Split

TEMPLATES = Path(__file__).resolve().parent / "templates"
SHOWN_MISTAKES = 25  # in a figure, and in analysis.json
SHOWN_PAIRS = 10
PROBABILITY = 10_000  # stands for a probability of 1 in the page
AMBIGUITY, DISTANCE = 100, 10_000  # likewise for a bit, and for the whole grey range
VOTES_ZERO = 35  # of the character that stands for no vote; the next one stands for one, which takes little space
MAP_LEVELS = 15  # of grey in a map
TEST_QUALITY, TRAIN_QUALITY = 70, 28  # of WebP, so that five checkpoints take less than 8 MB
ONLY_SHOWN = ("notes", "findings", "methods", "disagreements", "verdicts")  # by the template, not by the script
SHARED = (
    "name",
    "title",
    "model",
    "temperature",
    "temperature_note",
    "coverage",
    "groups",
    "accuracy",
)  # with the JSON

METHODS = (
    "Calibration: expected calibration error over 15 bins of equal width, and temperature scaling (Guo et al. 2017, "
    "arXiv:1706.04599), fitted on the validation images alone; classwise error as in Kull et al. 2019, "
    "arXiv:1910.12656.",
    "Suspected label errors: confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab, on "
    "probabilities of five folds over training and test images together; each image is judged by a model that was not "
    "trained on it. They are suspicions: nobody has labelled the images again.",
    f"Near-duplicates, in pixels and in features as in arXiv:1906.08255: an RMS difference under "
    f"{composition.PIXEL_LIMIT:.1%} of the grey range to the training image nearest in pixels, or a cosine distance "
    f"under {composition.FEATURE_LIMIT} to the one nearest in features with an RMS difference under "
    f"{composition.LOOSE_PIXEL_LIMIT:.1%}. The limits are ours.",
    "Consensus mistakes: all trainings of the same model and recipe, five seeds or three of the ResNet, give the same "
    "wrong answer; unstable ones: not all of them do. A mistake counts in the first group that it fits.",
    "Ambiguity: the entropy of the answers of all trainings to an image, in bits.",
    "People: an image's most frequent vote in Fashion-MNIST-H (Ishida et al. 2023, arXiv:2202.00395). By chance: how "
    "often people make that choice on all images of the same label. Cross-entropy to the votes as in Peterson et al. "
    "2019, arXiv:1908.07086.",
    "Robustness: after ImageNet-C (arXiv:1903.12261) and MNIST-C (arXiv:1906.02337), with our own strengths.",
    "Where a model looks: Grad-CAM (arXiv:1610.02391) at its last convolution, or gradient times input "
    "(arXiv:1605.01713) where it has none. Nearest training images: cosine distance of the last layer's input.",
    "Abstaining: selective prediction by the softmax confidence (arXiv:1705.08500). Shares of counts have Wilson's 95% "
    "interval (doi:10.1080/01621459.1927.10502953), means over trainings Student's.",
)


def summary(path: Path, sha256: str, first: Measured, numbers: dict[str, Any], test: Split) -> dict[str, Any]:
    """Collect what analysis.json holds, of the first checkpoint but for "report"; sha256: of the bytes that were read.

    "findings" is None and "shirt_mistakes" is missing where the classes are not Fashion-MNIST's.
    """
    content = {
        "checkpoint": path.name,
        "checkpoint_sha256": sha256,
        "model": first.model,
        "split": test.name,
        "data": test.source,
        "classes": list(test.classes),
        **{key: first.metrics[key] for key in ("n", "accuracy", "accuracy_ci95", "confusion_matrix")},
        "mistakes": len(first.records),
        "findings": None,
        "report": numbers,
        "confused_pairs": mistakes.confused_pairs(first.records, test.classes),
        "confident_mistakes": first.records[:SHOWN_MISTAKES],
    }
    if first.findings:
        judged = numbers["checkpoints"][0]["findings"]
        verdicts = [{key: each[key] for key in ("seeds", "verdict")} for each in judged]
        content["findings"] = [each | verdict for each, verdict in zip(first.findings, verdicts, strict=True)]
        content["shirt_mistakes"] = _of_shirt(first)
    return content


def _of_shirt(first: Measured) -> list[mistakes.Record]:
    return [record for record in first.records if mistakes.in_shirt_group(record)][:SHOWN_MISTAKES]


def figures(
    first: Measured, test: Split, history: dict[str, Any] | None, people: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """Draw the figures of a checkpoint, PNG by file name.

    history: of its run, for the training curves; people: of composition.people.
    """
    n, pairs = len(first.records), mistakes.confused_pairs(first.records, test.classes)
    title = f"{first.model}: {n:,} mistakes in {len(test.labels):,} test images"
    drawn = {
        "confusion_matrix.png": plots.confusion_matrix(first.metrics["confusion_matrix"], title, test.classes),
        "confused_pairs.png": plots.confused_pairs(pairs[:SHOWN_PAIRS], n),
        "confident_mistakes.png": _grid(first.records[:SHOWN_MISTAKES], test, "The most confident mistakes"),
    }
    if first.findings:
        title = "Shirt against T-shirt/top, Pullover and Coat: the most confident mistakes"
        drawn["shirt_mistakes.png"] = _grid(_of_shirt(first), test, title)
    if history:
        drawn["training_curves.png"] = plots.training_curves(history)
    if people:
        own = people["checkpoints"][0]
        drawn |= {
            "people_sides.png": plots.people_sides(own, composition.GROUPS | composition.UNKNOWN),
            "people_entropy.png": plots.people_entropy(own["confidence"], people["ambiguity"]),
            "people_trainings.png": plots.people_trainings(people["trainings"]),
        }
    return {name: plots.png(figure) for name, figure in drawn.items()}


def _grid(records: Sequence[mistakes.Record], test: Split, title: str) -> Figure:
    return plots.mistakes([test.images[record["index"]] for record in records], records, title)


# --- the interactive report ------------------------------------------------------------------------------


def page(
    measured: Sequence[Measured],
    evidence: Evidence,
    numbers: dict[str, Any],
    train: Split,
    test: Split,
    embedding: np.ndarray | None,
    votes: humans.Votes | None = None,
) -> dict[str, Any]:
    """Collect what the page shows and its script reads.

    numbers: of composition.numbers; embedding: a map of the first checkpoint's features, float (n, 2), if there is one;
    votes: people's, if they were given.
    """
    checkpoints = [_checkpoint(each, row, evidence) for each, row in zip(measured, numbers["checkpoints"], strict=True)]
    findings = numbers["checkpoints"][0]["findings"]
    return {
        "n": len(evidence.labels),
        "data": test.source,
        "classes": list(test.classes),
        "groups": composition.GROUPS | composition.UNKNOWN,
        "labels": as_text(evidence.labels),
        "checkpoints": checkpoints,
        "suspects": _suspects(evidence),
        "duplicates": np.flatnonzero(evidence.duplicate).tolist(),
        "distance": _whole(np.minimum(evidence.distances.pixel, evidence.distances.feature_pixel), DISTANCE),
        **_answers_of_trainings(evidence),
        **_pictures(measured, evidence, train, test),
        "robustness": {
            "kinds": corruptions.KINDS,
            "rows": numbers["robustness"],
            "strengths": corruptions.STRENGTHS,
        },
        "map": None if embedding is None else plane(embedding),
        "map_size": explain.MAP_SIZE,
        "disagreements": numbers["disagreements"],
        "people": numbers["people"],
        "human": None if votes is None else "".join(chr(VOTES_ZERO + count) for count in votes.counts.flatten()),
        "human_zero": VOTES_ZERO,
        "notes": composition.notes(numbers),
        "findings": findings,
        "verdicts": _verdicts(findings or []),
        "methods": METHODS,
    }


def render(page: dict[str, Any]) -> bytes:
    """Return the HTML file."""
    shared = {key: value for key, value in page.items() if key not in ONLY_SHOWN}
    content = json.dumps(shared, separators=(",", ":"), allow_nan=False)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.j2").render(
        page=page,
        first=page["checkpoints"][0],
        pc=lambda share, digits=2: f"{share:.{digits}%}",
        json=Markup(content.replace("<", "\\u003c")),  # no file name can end the script
        css=Markup((TEMPLATES / "report.css").read_text()),
        js=Markup((TEMPLATES / "report.js").read_text()),
        sha256=_source_hash,
    )
    return html.encode(errors="backslashreplace")  # the name of a file need not be Unicode


def _source_hash(text: str) -> str:
    """Name an inline script or style as the page's Content-Security-Policy does, which allows no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _verdicts(findings: Sequence[mistakes.Finding]) -> dict[str, str] | None:
    """Return what the verdicts mean, or None if the findings have no verdict from other trainings."""
    return mistakes.VERDICTS if any(each["verdict"] in mistakes.VERDICTS for each in findings) else None


def _checkpoint(each: Measured, numbers: dict[str, Any], evidence: Evidence) -> dict[str, Any]:
    """Describe one checkpoint; numbers: its own of composition.numbers."""
    groups = composition.group_of(each, evidence)
    levels = np.rint(each.maps.numpy() * MAP_LEVELS) * (255 // MAP_LEVELS)  # few, so that the picture stays small
    return {
        **{key: numbers[key] for key in SHARED},
        **{key: getattr(each, key) for key in ("before", "after", "map_method")},
        "ci": numbers["accuracy_ci95"],
        "mistakes": int(each.wrong.sum()),
        "group_of": {int(i): groups[i] for i in np.flatnonzero(each.wrong)},
        "predicted": as_text(each.predicted),
        "probabilities": _whole(each.probabilities.flatten(), PROBABILITY),
        "maps": sprite(levels.astype(np.uint8), lossless=True, method=6),
    }


def _suspects(evidence: Evidence) -> dict[int, dict[str, Any]] | None:
    """Describe each suspect test image: its rank, and the answer of a model that was not trained on it."""
    if evidence.suspects is None or evidence.out_of_fold is None:
        return None
    out_of_fold = evidence.out_of_fold[len(evidence.train_labels) :]
    return {
        i: {
            "rank": rank,
            "given": int(out_of_fold[i].argmax()),
            "p": round(float(out_of_fold[i].max()), 4),
            "own": round(float(out_of_fold[i, evidence.labels[i]]), 4),  # of the label
        }
        for rank, i in enumerate(evidence.suspects)
    }


def _answers_of_trainings(evidence: Evidence) -> dict[str, Any]:
    """List the answers of other trainings, and compute how much they differ."""
    rows = [
        {"name": f"{', '.join(kind)} (of {len(own)})", "predicted": [each["predicted"] for each in own]}
        for kind, own in evidence.trainings.items()
    ]
    votes = [evidence.votes(kind) for kind in evidence.trainings]
    bits = composition.ambiguity(np.concatenate(votes)) if votes else None
    return {"votes": rows, "ambiguity": None if bits is None else _whole(bits, AMBIGUITY)}


def _pictures(measured: Sequence[Measured], evidence: Evidence, train: Split, test: Split) -> dict[str, Any]:
    """Draw the test images and the training images nearest to them.

    Mistakes, suspects and near-duplicates get NEIGHBOURS of these, the rest fewer: they are thousands.
    """
    notable = measured[0].wrong | evidence.duplicate | (False if evidence.suspect is None else evidence.suspect)
    fewer = 2 if len(measured) == 1 else 1
    rows = [row if each else row[:fewer] for row, each in zip(evidence.neighbours, notable, strict=True)]
    pictured = np.unique(np.concatenate(rows))
    return {
        "neighbours": [np.searchsorted(pictured, row).tolist() for row in rows],
        "train": {"index": pictured.tolist(), "labels": as_text(evidence.train_labels[pictured])},
        "sprites": {
            "test": sprite(test.images.cpu().numpy(), quality=TEST_QUALITY),
            "train": sprite(train.images.cpu().numpy()[pictured], quality=TRAIN_QUALITY),
        },
    }


def plane(embedding: np.ndarray) -> list[int]:
    """Write a map's coordinates, float (n, 2), as whole numbers from 20 to 980: x, y, x, y ..."""
    low, high = embedding.min(0), embedding.max(0)
    return _whole((20 + 960 * (embedding - low) / np.maximum(high - low, 1e-12)).flatten(), 1)


def _whole(values: np.ndarray, unit: int) -> list[int]:
    """Round numbers to whole units, float (n,)."""
    return np.rint(values * unit).astype(int).tolist()


def as_text(classes: Iterable[int]) -> str:
    """Write class indices as one digit each."""
    return "".join(map(str, classes))


def sheet(images: np.ndarray) -> Image.Image:
    """Put images uint8 (n, s, s) in rows on one large picture, as many across as down."""
    n, size = images.shape[:2]
    across = int(np.ceil(np.sqrt(n)))
    padded = np.zeros((across * across, size, size), np.uint8)
    padded[:n] = images
    rows = padded.reshape(across, across, size, size).transpose(0, 2, 1, 3)
    return Image.fromarray(rows.reshape(across * size, across * size))


def sprite(images: np.ndarray, **options: Any) -> str:
    """Write images uint8 (n, s, s) as one WebP in a data URL; options are Pillow's."""
    buffer = io.BytesIO()
    sheet(images).save(buffer, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
