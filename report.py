"""The interactive report: what is known of checkpoints' mistakes, in one HTML file that needs no network.

page, numbers = report.assemble(checkpoints, train_features, train, test, results, embedding)   # of report.measure
html = report.render(page)

The page is templates/report.html.j2 with report.css and report.js; its data is JSON, its images are sprites.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import analysis
import corruptions
import engine
import errors
import explain
from data import CLASSES

TEMPLATES = Path(__file__).resolve().parent / "templates"
PROBABILITY = 10_000  # what a probability of 1 is in the page
MAP_LEVELS = 15  # of grey in a map
TEST_QUALITY, TRAIN_QUALITY = 70, 30  # of WebP, so that five checkpoints take less than 8 MB
NEIGHBOURS = 5  # pictured for what a reader looks at first: mistakes, suspects, near-duplicates
KEY_SHARES = ("shirt", "of_shirt_mistakes", "confident", "sneaker_and_ankle_boot")  # in errors.check_findings's order

METHODS = (
    "Calibration: expected calibration error over 15 bins of equal width, and temperature scaling (Guo et al. 2017, "
    "arXiv:1706.04599), fitted on the validation images alone; classwise error as in Kull et al. 2019, "
    "arXiv:1910.12656.",
    "Suspected label errors: confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab, on "
    "probabilities of five folds over training and test images together, each image judged by a model that never "
    "saw it. They are suspicions: nobody has relabelled anything.",
    f"Near-duplicates, in pixels and in features as in arXiv:1906.08255: an RMS difference under "
    f"{analysis.PIXEL_LIMIT:.1%} of the grey range to the training image nearest in pixels, or a cosine distance under "
    f"{analysis.FEATURE_LIMIT} to the one nearest in features, then with an RMS difference under "
    f"{analysis.LOOSE_PIXEL_LIMIT:.1%}. The limits are ours.",
    "Consensus mistakes: at least five trainings of the same model and recipe, which differ in their seed alone, all "
    "give the same wrong answer; unstable ones: not all of them do. A mistake is counted in the first group that "
    "it fits.",
    "Ambiguity: the entropy of the answers of all trainings to an image, in bits.",
    "Robustness: after ImageNet-C (arXiv:1903.12261) and MNIST-C (arXiv:1906.02337), with strengths of our own.",
    "Where a model looks: Grad-CAM (arXiv:1610.02391) at its last convolution, or gradient times input "
    "(arXiv:1605.01713) where it has none. Nearest training images: cosine distance of the last layer's input.",
    "Abstaining: selective prediction by the softmax confidence (arXiv:1705.08500). Shares of counts have Wilson's 95% "
    "interval (doi:10.1080/01621459.1927.10502953), means over trainings Student's.",
)


def measure(name, model, info, test, val, unfit):
    """All that a checkpoint alone tells of the test images: a dict of numbers and arrays.

    val: the validation split, to fit the temperature on; unfit: why that cannot be, or None.
    """
    logits, features = explain.features(model, test)
    labels = test.labels.cpu()
    probabilities = logits.double().softmax(1).numpy()
    result = {
        "name": name,
        "model": info["model"],
        "recipe": info.get("flags", {}).get("recipe", "published"),
        "seed": info.get("seed"),
        "metrics": engine.metrics(logits, labels),
        "probabilities": probabilities,
        "predicted": probabilities.argmax(1),
        "features": features,
        "before": analysis.calibration(probabilities, labels.numpy()),
        "after": None,
        "temperature": None,
        "temperature_note": f"No temperature was fitted: {unfit}.",
    }
    result["wrong"] = result["predicted"] != labels.numpy()
    result["coverage"] = analysis.coverage_curve(probabilities.max(1), ~result["wrong"])
    result["mistakes"] = errors.most_confident_mistakes(probabilities, labels.numpy())
    result["findings"] = errors.check_findings(result["mistakes"])
    result["maps"], result["map_method"] = explain.attention_maps(model, test, torch.as_tensor(result["predicted"]))
    if not unfit:
        val_logits = engine.predict_logits(model, val)
        result["temperature"] = analysis.temperature(val_logits, val.labels.cpu())
        scaled = analysis.scaled(logits, result["temperature"])
        result["after"] = analysis.calibration(scaled, labels.numpy())
        result["temperature_note"] = (
            f"Temperature {result['temperature']:.2f}, fitted on {len(val.labels):,} validation images; measured on "
            f"{len(labels):,} test images. Classwise error {result['before']['classwise_ece']:.4f} before, "
            f"{result['after']['classwise_ece']:.4f} after."
        )
    return result


def duplicates(features, train_features, train, test):
    """What near-duplicates are judged by, of each test image: pixel, feature and feature_pixel of near_duplicates(),
    the indices int64 (n, NEIGHBOURS) of the training images nearest in features, and (n,) of the nearest in pixels.
    """
    flat = [split.images.cpu().flatten(1).float() / 255 for split in (test, train)]
    pixel, near_in_pixels = explain.nearest(*flat, 1)
    distance, near = explain.nearest(F.normalize(features), F.normalize(train_features), NEIGHBOURS)
    size = flat[0].shape[1]
    return (
        {
            "pixel": (pixel[:, 0] / size**0.5).numpy(),
            "feature": (distance[:, 0] ** 2 / 2).numpy(),  # of unit vectors: half the squared distance is 1 - cosine
            "feature_pixel": (flat[0] - flat[1][near[:, 0]]).square().mean(1).sqrt().numpy(),
        },
        near.numpy(),
        near_in_pixels[:, 0].numpy(),
    )


def assemble(checkpoints, train_features, train, test, results, embedding):
    """What the page holds, and the numbers of it for analysis.json.

    checkpoints: of measure, the first being the one that neighbours and near-duplicates are of; train_features:
    float32 (n, d), its features of the training images; results: deep.Results; embedding: float (n, 2) or None.
    """
    first, labels, n = checkpoints[0], test.labels.cpu().numpy(), len(test.labels)
    train_labels = train.labels.cpu().numpy()
    judged, near, near_in_pixels = duplicates(first["features"], train_features, train, test)
    duplicate = analysis.near_duplicates(**judged)
    twin = np.where(judged["pixel"] < analysis.PIXEL_LIMIT, near_in_pixels, near[:, 0])
    every = np.concatenate([train_labels, labels])
    out_of_fold = results.out_of_fold(len(every))
    issues = None if out_of_fold is None else analysis.label_issues(every, out_of_fold)
    suspects = None if issues is None else [int(i) - len(train_labels) for i in issues if i >= len(train_labels)]
    suspect = None if suspects is None else np.isin(np.arange(n), suspects)
    seeds = results.seeds()
    trainings = by_training(seeds)
    dissected = [
        dissect(each, suspect, duplicate, trainings.get((each["model"], each["recipe"]), [])) for each in checkpoints
    ]
    answers = np.array([each["predicted"] for each in checkpoints])
    numbers = {
        "checkpoints": [in_json for in_json, _ in dissected],
        "label_issues": label_numbers(out_of_fold, issues, every, len(train_labels)),
        "near_duplicates": duplicate_numbers(judged, duplicate, ~first["wrong"])
        | {"of_another_label": int((labels != train_labels[twin])[duplicate].sum())},
        "robustness": robustness_rows(trainings),
        "disagreements": int((answers != answers[0]).any(0).sum()) if len(checkpoints) > 1 else None,
    }

    notable = first["wrong"] | duplicate | (suspect if suspect is not None else False)
    fewer = 2 if len(checkpoints) == 1 else 1  # for the rest: thousands of pictures
    neighbours = [row[: NEIGHBOURS if notable[i] else fewer] for i, row in enumerate(near)]
    pictured = np.unique(np.concatenate(neighbours))
    votes = np.array([digits(each["predicted"]) for each in seeds])
    page = {
        "n": n,
        "data": test.source,
        "classes": list(CLASSES),
        "groups": analysis.GROUPS | {"unknown": "not known without five trainings"},
        "labels": text(labels),
        "checkpoints": [in_page for _, in_page in dissected],
        "suspects": None if suspects is None else suspect_rows(suspects, out_of_fold[-n:], labels),
        "duplicates": np.flatnonzero(duplicate).tolist(),
        "distance": np.rint(np.minimum(judged["pixel"], judged["feature_pixel"]) * 10_000).astype(int).tolist(),
        "ambiguity": np.rint(100 * analysis.ambiguity(votes)).astype(int).tolist() if seeds else None,
        "neighbours": [np.searchsorted(pictured, row).tolist() for row in neighbours],
        "train": {"index": pictured.tolist(), "labels": text(train_labels[pictured])},
        "votes": vote_rows(trainings),
        "robustness": {"kinds": corruptions.KINDS, "rows": numbers["robustness"], "strengths": corruptions.STRENGTHS},
        "map": None if embedding is None else plane(embedding),
        "map_size": explain.MAP_SIZE,
        "sprites": {
            "test": sprite(test.images.cpu().numpy(), quality=TEST_QUALITY),
            "train": sprite(train.images.cpu().numpy()[pictured], quality=TRAIN_QUALITY),
        },
        "disagreements": numbers["disagreements"],
        "notes": notes(numbers),
        "findings": numbers["checkpoints"][0]["findings"],
        "methods": METHODS,
    }
    return page, numbers


def dissect(each, suspect, duplicate, own):
    """What one checkpoint's mistakes are made of, as (for analysis.json, for the page).

    each: of measure; suspect (or None) and duplicate: bool (n,); own: the results of trainings of its kind.
    """
    agreed = analysis.consensus(each["predicted"], np.array([digits(other["predicted"]) for other in own]))
    groups = analysis.group(each["wrong"], suspect, duplicate, agreed)
    names = [name for name in analysis.GROUPS if agreed is not None or name not in ("consensus", "unstable")]
    names = [name for name in names if suspect is not None or name != "label"] + ["unknown"] * (agreed is None)
    metrics, wrong = each["metrics"], int(each["wrong"].sum())
    both = {
        **{key: each[key] for key in ("name", "model", "temperature", "temperature_note", "coverage")},
        "groups": {name: errors.share_of((groups == name).sum(), wrong) for name in names},
        "accuracy": metrics["accuracy"],
    }
    in_json = both | {
        **{key: each[key] for key in ("recipe", "seed")},
        **{key: metrics[key] for key in ("n", "accuracy_ci95", "log_loss", "confusion_matrix")},
        "calibration_before": each["before"],
        "calibration_after": each["after"],
        "consensus_trainings": len(own),
        "findings": findings_rows(each["findings"], own),
    }
    levels = np.rint(each["maps"].numpy() * MAP_LEVELS) * (255 // MAP_LEVELS)  # few, so that the picture stays small
    in_page = both | {
        **{key: each[key] for key in ("before", "after", "map_method")},
        "ci": metrics["accuracy_ci95"],
        "told": f"{each['model']}, recipe {each['recipe']}",
        "mistakes": wrong,
        "group_of": {int(i): groups[i] for i in np.flatnonzero(each["wrong"])},
        "predicted": text(each["predicted"]),
        "probabilities": np.rint(each["probabilities"] * PROBABILITY).astype(int).flatten().tolist(),
        "maps": sprite(levels.astype(np.uint8), lossless=True, method=6),
    }
    return in_json, in_page


def render(page):
    """The bytes of the HTML file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    only_shown = ("notes", "findings", "methods", "disagreements")
    content = json.dumps({key: value for key, value in page.items() if key not in only_shown}, separators=(",", ":"))
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.j2").render(
        page=page,
        first=page["checkpoints"][0],
        pc=lambda share: f"{share:.2%}",
        json=Markup(content.replace("<", "\\u003c")),  # no name of a file can end the script
        css=Markup((TEMPLATES / "report.css").read_text()),
        js=Markup((TEMPLATES / "report.js").read_text()),
    )
    return html.encode()


def digits(line):
    return np.frombuffer(line.encode(), np.uint8) - ord("0")


def text(classes):
    """Class indices as one digit each."""
    return "".join(map(str, classes))


def label_numbers(out_of_fold, issues, labels, n_train):
    if issues is None:
        return None
    n_test = len(labels) - n_train
    return {
        "out_of_fold_accuracy": errors.share_of((out_of_fold.argmax(1) == labels).sum(), len(labels)),
        "train": errors.share_of((issues < n_train).sum(), n_train),
        "test": errors.share_of((issues >= n_train).sum(), n_test),
        "by_class": {name: int((labels[issues] == k).sum()) for k, name in enumerate(CLASSES)},
        "train_indices": [int(i) for i in issues if i < n_train],
        "test_indices": [int(i) - n_train for i in issues if i >= n_train],
    }


def duplicate_numbers(judged, duplicate, correct):
    """Counts, and the accuracy with and without them, at the limits and at half to twice the limits."""

    def at(scale):
        found = analysis.near_duplicates(**judged, scale=scale)
        return {"scale": scale, "count": int(found.sum())} | {"without": errors.share_of(*_sums(correct[~found]))}

    return {
        "test": errors.share_of(*_sums(duplicate)),
        "accuracy": errors.share_of(*_sums(correct)),
        "accuracy_of_them": errors.share_of(*_sums(correct[duplicate])),
        "accuracy_without": errors.share_of(*_sums(correct[~duplicate])),
        "other_limits": [at(scale) for scale in (0.5, 0.75, 1.0, 1.5, 2.0)],
    }


def _sums(truths):
    return int(truths.sum()), len(truths)


def suspect_rows(suspects, out_of_fold, labels):
    """By test image: its place among the suspects, what a model that never saw it says, and how sure that is."""
    return {
        i: {
            "rank": place,
            "given": int(out_of_fold[i].argmax()),
            "p": round(float(out_of_fold[i].max()), 4),
            "own": round(float(out_of_fold[i, labels[i]]), 4),
        }
        for place, i in enumerate(suspects)
    }


def by_training(seeds):
    """Results grouped by (model, recipe), in their order."""
    groups = {}
    for each in seeds:
        groups.setdefault((each["key"]["model"], each["key"]["recipe_name"]), []).append(each)
    return groups


def vote_rows(trainings):
    return [
        {"name": f"{model}, {recipe} (of {len(own)})", "predicted": [each["predicted"] for each in own]}
        for (model, recipe), own in trainings.items()
    ]


def robustness_rows(trainings):
    """For every model and recipe, mean accuracies over its trainings: clean, by kind and strength, and means."""
    rows = []
    for (model, recipe), own in trainings.items():
        curves = {kind: np.mean([each["robustness"][kind] for each in own], 0).tolist() for kind in corruptions.KINDS}
        rows.append(
            {
                "name": f"{model}, {recipe}",
                "n": len(own),
                "clean": float(np.mean([each["accuracy"] for each in own])),
                "curves": curves,
                "mean": {kind: float(np.mean(curve)) for kind, curve in curves.items()},
                "all": float(np.mean(list(curves.values()))),
            }
        )
    return rows


def findings_rows(findings, own):
    """The published findings on a checkpoint and on the trainings of its kind, with a verdict."""
    rows = []
    for place, (finding, key) in enumerate(zip(findings, KEY_SHARES, strict=True)):
        holds = [each["findings"][place]["holds"] for each in own]
        shares = [each["findings"][place]["measured"][key]["share"] for each in own]
        row = {name: finding[name] for name in ("finding", "criterion", "holds", "summary")}
        row |= {"trainings": len(own), "holds_in": sum(holds), "shares": shares}
        if len(own) > 1 and None not in shares:
            low, high = mean_interval(shares)
            row["seeds"] = (
                f"holds in {sum(holds)} of {len(own)}; mean share {np.mean(shares):.0%} "
                f"(95% interval {low:.0%} to {high:.0%})"
            )
            row["verdict"] = "confirmed" if all(holds) else "refined" if any(holds) else "refuted"
        else:
            row["seeds"] = "none are there yet: --deep trains them"
            row["verdict"] = "confirmed, on this one" if finding["holds"] else "not confirmed, on this one"
        rows.append(row)
    return rows


def mean_interval(values, confidence=0.95):
    """Student's interval of a mean, as (low, high)."""
    from scipy.stats import t

    half = t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values) - half, np.mean(values) + half


def notes(numbers):
    """Sentences under the bar of groups."""
    issues, double = numbers["label_issues"], numbers["near_duplicates"]
    lines = []
    if issues:
        lines.append(
            f"{issues['train']['count']:,} of {issues['train']['n']:,} training and {issues['test']['count']:,} of "
            f"{issues['test']['n']:,} test labels are suspect; the models of the folds are right on "
            f"{issues['out_of_fold_accuracy']['share']:.2%} of {issues['out_of_fold_accuracy']['n']:,} images."
        )
    else:
        lines.append("Suspected label errors are not known yet: python analyze_errors.py --deep trains the five folds.")
    if not numbers["checkpoints"][0]["consensus_trainings"] >= analysis.CONSENSUS_SEEDS:
        lines.append(
            "Consensus needs five trainings of this model and recipe: python analyze_errors.py --deep does them."
        )
    line = (
        f"{double['test']['count']:,} of {double['test']['n']:,} test images are near-duplicates of training images, "
        f"{double['of_another_label']} of them with another label"
    )
    if double["accuracy_of_them"]["n"] and double["accuracy_without"]["n"]:
        line += (
            f": accuracy {double['accuracy_of_them']['share']:.2%} on them, {double['accuracy_without']['share']:.2%} "
            f"without them, {double['accuracy']['share']:.2%} on all"
        )
    return [*lines, line + "."]


def plane(embedding):
    """A map's coordinates as whole numbers, 20 to 980, x and y in turns."""
    low, high = embedding.min(0), embedding.max(0)
    return np.rint(20 + 960 * (embedding - low) / np.maximum(high - low, 1e-12)).astype(int).flatten().tolist()


def sheet(images):
    """Images uint8 (n, s, s) in rows on one large picture, as many across as down."""
    n, size = images.shape[:2]
    across = int(np.ceil(np.sqrt(n)))
    padded = np.zeros((across * across, size, size), np.uint8)
    padded[:n] = images
    rows = padded.reshape(across, across, size, size).transpose(0, 2, 1, 3)
    return Image.fromarray(rows.reshape(across * size, across * size))


def sprite(images, **options):
    """All images uint8 (n, s, s) as one WebP, in a data URL; options are Pillow's."""
    buffer = io.BytesIO()
    sheet(images).save(buffer, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
