"""What a model's mistakes are made of: wrong labels, near-duplicates, what every seed gets wrong, and the rest.

measured = composition.measure_all([("best.pt", model, info)], test, val)             # model, info of checkpoint.load
evidence = composition.gather(measured[0], train_features, train, test, results)      # trainings.Results
numbers = composition.numbers(measured, evidence)                                     # for analysis.json

No files and no figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint
import engine
import metrics
import recipes
from analysis import corruptions, explain, humans, mistakes
from analysis.trainings import Result, Results, seed_jobs, seeds_of
from data import Split
from metrics import share
from runtime import cli

GROUPS = {  # of the mistakes; each mistake counts in the first group that it fits
    "label": "suspected label errors",
    "duplicate": "near-duplicates of training images",
    "consensus": "consensus mistakes",
    "unstable": "unstable mistakes",
}
UNKNOWN = {"unknown": "not known without other trainings"}  # in place of the last two
PIXEL_LIMIT = 0.04  # RMS difference, of the grey range, below which two images are near-duplicates; and further apart,
FEATURE_LIMIT, LOOSE_PIXEL_LIMIT = 0.025, 0.075  # cosine distance of features, with a wider limit for the pixels
OTHER_LIMITS = (0.5, 0.75, 1.0, 1.5, 2.0)  # factors of all three, to see what depends on them
NEIGHBOURS = 5  # nearest training images of each test image
UNFIT = ("unknown", "other data", "trained")  # kinds of checkpoint.caution that rule out fitting a temperature


# --- one checkpoint --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a checkpoint shows on the test images."""

    name: str  # its path as shown
    title: str  # "cnn, recipe published, seed 0"
    model: str
    recipe: str
    seed: int | None
    metrics: dict[str, Any]  # of metrics.evaluate
    probabilities: np.ndarray  # float64 (n, 10)
    wrong: np.ndarray  # bool (n,)
    features: torch.Tensor  # float32 (n, d)
    maps: torch.Tensor  # float32 (n, MAP_SIZE, MAP_SIZE)
    map_method: str
    records: list[mistakes.Record]  # its mistakes, the most confident first
    findings: list[mistakes.Finding] | None  # None where the classes are not Fashion-MNIST's
    coverage: list[dict[str, Any]]
    before: dict[str, Any]  # calibration as it is
    after: dict[str, Any] | None  # with the temperature
    temperature: float | None
    temperature_note: str
    foreign: dict[str, Any]  # of a bare state_dict its normalisation; of any checkpoint a caution if there is one

    @property
    def predicted(self) -> np.ndarray:
        """The answers, int64 (n,)."""
        return self.probabilities.argmax(1)

    @property
    def kind(self) -> tuple[str, str]:
        """Model and recipe, which trainings must share to be compared with it."""
        return self.model, self.recipe


def measure_all(loaded: Sequence[tuple[Path, nn.Module, dict[str, Any]]], test: Split, val: Split) -> list[Measured]:
    """Measure checkpoints, each as (path, model, info), with a progress bar. The splits are on the device to use."""
    target = test.labels.device
    return [
        measure(cli.shown(path), model.to(target), info, test, val)
        for path, model, info in tqdm(loaded, desc="checkpoints", disable=None)
    ]


def measure(name: str, model: nn.Module, info: dict[str, Any], test: Split, val: Split) -> Measured:
    """Measure a checkpoint on the test images; val, the validation images, are for fitting the temperature.

    model and both splits are on one device; info: from checkpoint.load.
    """
    logits, features = explain.features(model, test)
    probabilities, labels = metrics.probabilities(logits), test.labels.cpu().numpy()
    predicted = probabilities.argmax(1)
    records = mistakes.most_confident(probabilities, labels, test.classes)
    maps, map_method = explain.attention_maps(model, test, torch.as_tensor(predicted))
    return Measured(
        name=name,
        **_identity(info),
        metrics=metrics.evaluate(logits, test.labels.cpu(), test.classes),
        probabilities=probabilities,
        wrong=predicted != labels,
        features=features,
        maps=maps,
        map_method=map_method,
        records=records,
        findings=mistakes.check_findings(records, test.classes),
        coverage=metrics.coverage_curve(probabilities.max(1), predicted == labels),
        **_calibrate(model, info, logits, test, val),
        foreign=_foreign(info, test, float((predicted == labels).mean())),
    )


def _identity(info: dict[str, Any]) -> dict[str, Any]:
    """Name model, recipe and seed of a checkpoint. One of unknown training counts as trained as published."""
    model, seed = info["model"], info.get("seed")
    if "flags" not in info:
        title = f"{model}, training unknown, normalised by {checkpoint.normalisation(info)}"
        return {"title": title, "model": model, "recipe": "published", "seed": seed}
    recipe = _recipe(model, recipes.upgrade(info["flags"]))
    return {"title": f"{model}, recipe {recipe}, seed {seed}", "model": model, "recipe": recipe, "seed": seed}


def _recipe(model: str, flags: dict[str, Any]) -> str:
    """Name the recipe of a run, with the values that were changed: only runs of equal names are compared."""
    name = flags["recipe"]
    usual = recipes.find(name, model) if recipes.has_row(name, model) else None
    names = [each for each in recipes.Recipe._fields if each != "precision"]  # "auto" is recorded as what it was
    known = [each for each in names if usual and each in flags]
    changed = [f"{each.replace('_', ' ')} {flags[each]}" for each in known if flags[each] != getattr(usual, each)]
    return f"{name} with {', '.join(changed)}" if changed else name


def _foreign(info: dict[str, Any], test: Split, accuracy: float) -> dict[str, Any]:
    """Describe how a bare state_dict is used, or that the code of a checkpoint of ours has changed."""
    if not checkpoint.is_bare(info):
        return {"caution": caution} if (caution := checkpoint.changed(info)) else {}
    return {
        **{key: info[key] for key in ("matched", "normalisation")},
        "caution": checkpoint.suspicion(info, test, accuracy),
    }


def _calibrate(
    model: nn.Module, info: dict[str, Any], logits: torch.Tensor, test: Split, val: Split
) -> dict[str, Any]:  # fmt: skip
    """Measure the calibration on the test images before and after scaling by the temperature of the validation images.

    There is no temperature where the validation images may have been trained on.
    """
    labels = test.labels.cpu().numpy()
    before = metrics.calibration(metrics.probabilities(logits), labels, test.classes)
    kind, sentence = checkpoint.caution(info, val) or ("", "")
    unfit = sentence if kind in UNFIT else "" if len(val.labels) else "no class has enough for any"
    if unfit:
        note = f"No temperature was fitted on the validation images: {unfit}."
        return {"before": before, "after": None, "temperature": None, "temperature_note": note}
    temperature = metrics.temperature(engine.predict_logits(model, val), val.labels.cpu())
    after = metrics.calibration(metrics.probabilities(logits, temperature), labels, test.classes)
    note = (
        f"Temperature {temperature:.2f}, fitted on {len(val.labels):,} validation images; measured on {len(labels):,} "
        f"test images. Classwise error {before['classwise_ece']:.4f} before, {after['classwise_ece']:.4f} after."
    )
    return {"before": before, "after": after, "temperature": temperature, "temperature_note": note}


# --- what is known beside a checkpoint's answers ---------------------------------------------------------


class Distances(NamedTuple):
    """How near each test image is to the training images; float (n,)."""

    pixel: np.ndarray  # RMS difference, of the grey range, to the image nearest in pixels
    feature: np.ndarray  # cosine distance to the image nearest in features
    feature_pixel: np.ndarray  # RMS difference to that image


class Evidence(NamedTuple):
    """What tells where mistakes come from. N training images, n test images."""

    train_labels: np.ndarray  # int64 (N,)
    labels: np.ndarray  # int64 (n,)
    classes: tuple[str, ...]
    distances: Distances
    neighbours: np.ndarray  # int64 (n, NEIGHBOURS), the training images nearest in features
    twins: np.ndarray  # int64 (n,), the one training image that each test image may be a near-duplicate of
    duplicate: np.ndarray  # bool (n,)
    out_of_fold: np.ndarray | None  # float64 (N + n, 10)
    issues: np.ndarray | None  # int64, images of suspect label, the most suspect first, test images from N on
    trainings: dict[tuple[str, str], list[Result]]  # by model and recipe

    @property
    def suspects(self) -> list[int] | None:
        """The test images of suspect label, the most suspect first; None without the folds."""
        first = len(self.train_labels)
        return None if self.issues is None else [int(i) - first for i in self.issues if i >= first]

    @property
    def suspect(self) -> np.ndarray | None:
        """Whether each test image has a suspect label: bool (n,); None without the folds."""
        return None if self.suspects is None else np.isin(np.arange(len(self.labels)), self.suspects)

    @property
    def answers_sha256(self) -> str:
        """The SHA-256 of the answers of all trainings."""
        return humans.digest(self.votes(kind) for kind in self.trainings)

    def votes(self, kind: tuple[str, str]) -> np.ndarray:
        """Return the answers of the trainings of a kind: int (trainings, n)."""
        return np.array([as_digits(each["predicted"]) for each in self.trainings.get(kind, [])])


def gather(first: Measured, train_features: torch.Tensor, train: Split, test: Split, results: Results) -> Evidence:
    """Gather the evidence. Near-duplicates are judged by the features of the first checkpoint.

    train_features: float32 (N, d), its features of the training images.
    """
    distances, neighbours, nearest_in_pixels = _distances(first.features, train_features, train, test)
    train_labels, labels = train.labels.cpu().numpy(), test.labels.cpu().numpy()
    every = np.concatenate([train_labels, labels])
    out_of_fold = results.out_of_fold(every)
    return Evidence(
        train_labels=train_labels,
        labels=labels,
        classes=test.classes,
        distances=distances,
        neighbours=neighbours,
        twins=np.where(distances.pixel < PIXEL_LIMIT, nearest_in_pixels, neighbours[:, 0]),
        duplicate=near_duplicates(*distances),
        out_of_fold=out_of_fold,
        issues=None if out_of_fold is None else label_issues(every, out_of_fold),
        trainings=_by_kind(results.seeds(len(labels))),
    )


def _distances(
    features: torch.Tensor, train_features: torch.Tensor, train: Split, test: Split
) -> tuple[Distances, np.ndarray, np.ndarray]:
    """Compare each test image with the training images.

    Returns the distances, the indices int64 (n, NEIGHBOURS) of the images nearest in features, and (n,) in pixels.
    """
    pixels, train_pixels = (split.images.cpu().flatten(1).float() / 255 for split in (test, train))
    pixel, nearest_in_pixels = explain.nearest(pixels, train_pixels, 1)
    distance, nearest = explain.nearest(F.normalize(features), F.normalize(train_features), NEIGHBOURS)
    distances = Distances(
        pixel=(pixel[:, 0] / pixels.shape[1] ** 0.5).numpy(),
        feature=(distance[:, 0] ** 2 / 2).numpy(),  # of unit vectors: half the squared distance is 1 - cosine
        feature_pixel=(pixels - train_pixels[nearest[:, 0]]).square().mean(1).sqrt().numpy(),
    )
    return distances, nearest.numpy(), nearest_in_pixels[:, 0].numpy()


def near_duplicates(
    pixel: np.ndarray, feature: np.ndarray, feature_pixel: np.ndarray, scale: float = 1.0
) -> np.ndarray:  # fmt: skip
    """Judge whether each test image is a near-duplicate of a training image, from its Distances: bool (n,).

    As in arXiv:1906.08255, both spaces count; the limits are ours, set by looking at pairs. scale multiplies them.
    """
    alike = (feature < FEATURE_LIMIT * scale) & (feature_pixel < LOOSE_PIXEL_LIMIT * scale)
    return (pixel < PIXEL_LIMIT * scale) | alike


def label_issues(labels: np.ndarray, out_of_fold: np.ndarray) -> np.ndarray:
    """Find the images whose label is suspect, the most suspect first, ties by index: int64 indices.

    Confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab, pruned by noise rate. labels: int (n,);
    out_of_fold: float64 (n, 10), each row by a model that was not trained on the image.
    """
    with cli.loading():  # cleanlab takes a second or two
        from cleanlab.filter import find_label_issues

    suspect = find_label_issues(labels, out_of_fold, n_jobs=1).nonzero()[0]
    return suspect[np.argsort(out_of_fold[suspect, labels[suspect]], kind="stable")]  # the same on every processor


def consensus(predicted: np.ndarray, votes: np.ndarray, needed: int) -> np.ndarray | None:
    """Judge whether all trainings answer as the model does: bool (n,); None with fewer than needed.

    predicted: int (n,), votes: int (trainings, n).
    """
    return (votes == predicted).all(0) if len(votes) >= needed else None


def agreed(each: Measured, evidence: Evidence) -> np.ndarray | None:
    """Judge whether all trainings of a checkpoint's kind answer as it does: bool (n,), None where some are missing."""
    return consensus(each.predicted, evidence.votes(each.kind), seeds_of(each.model))


def group(
    wrong: np.ndarray, suspect: np.ndarray | None, duplicate: np.ndarray | None, agreed: np.ndarray | None
) -> np.ndarray:  # fmt: skip
    """Name the group of each image, "" for a right answer. Each mistake is in the first group that it fits.

    All arguments: bool (n,), None where it is not known. Without `agreed`, the rest of the mistakes is "unknown".
    """
    groups = np.where(wrong, "unknown" if agreed is None else "unstable", "").astype(object)
    for name, fits in (("consensus", agreed), ("duplicate", duplicate), ("label", suspect)):
        if fits is not None:
            groups[wrong & fits] = name
    return groups


def group_of(each: Measured, evidence: Evidence) -> np.ndarray:
    """Name the group of each test image, "" where the checkpoint is right: str (n,)."""
    return group(each.wrong, evidence.suspect, evidence.duplicate, agreed(each, evidence))


def ambiguity(votes: np.ndarray, classes: int = 10) -> np.ndarray:
    """Compute the entropy, in bits, of the answers to each image: float64 (n,). votes: int (trainings, n)."""
    shares = np.stack([(votes == k).mean(0) for k in range(classes)])
    return metrics.entropy(shares, 0)


def as_digits(line: str) -> np.ndarray:
    """Turn answers written as one digit each into an array uint8 (n,)."""
    return np.frombuffer(line.encode(), np.uint8) - ord("0")


def _by_kind(seeds: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Group trainings by model and recipe, in their order."""
    kinds: dict[tuple[str, str], list[Result]] = {}
    for each in seeds:
        kinds.setdefault((each["key"]["model"], each["key"]["recipe_name"]), []).append(each)
    return kinds


# --- in numbers ------------------------------------------------------------------------------------------


def numbers(
    measured: Sequence[Measured], evidence: Evidence, people: dict[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Describe the mistakes in plain numbers, as they are in analysis.json under "report"; people: of people()."""
    answers = np.array([each.predicted for each in measured])
    return {
        "checkpoints": [_checkpoint_numbers(each, evidence) for each in measured],
        "label_issues": _label_numbers(evidence),
        "near_duplicates": _duplicate_numbers(evidence, ~measured[0].wrong),
        "robustness": [_robustness(kind, own) for kind, own in evidence.trainings.items()],
        "people": people,
        "disagreements": int((answers != answers[0]).any(0).sum()) if len(measured) > 1 else None,
    }


def people(measured: Sequence[Measured], evidence: Evidence, votes: humans.Votes) -> dict[str, Any]:
    """Compare the checkpoints and the other trainings with people's votes, in plain numbers."""
    subjects = [humans.Subject(each.name, each.probabilities, group_of(each, evidence)) for each in measured]
    trainings = [
        humans.Trainings(", ".join(kind), evidence.votes(kind), _entropies(own, votes.sha256))
        for kind, own in evidence.trainings.items()
    ]
    bits = ambiguity(np.concatenate([each.answers for each in trainings])) if trainings else None
    images = humans.Labelled(evidence.labels, evidence.classes, evidence.suspect)
    return humans.compare(votes, images, subjects, trainings, bits)


def _entropies(own: Sequence[Result], sha256: str) -> list[dict[str, float]]:
    """List humans.cross_entropies of the trainings that were measured with the votes of this SHA-256."""
    found = [each["people"] for each in own if each.get("people", {}).get("sha256") == sha256]
    return [{name: each[name] for name in humans.ENTROPIES} for each in found]


def _checkpoint_numbers(each: Measured, evidence: Evidence) -> dict[str, Any]:
    own = evidence.trainings.get(each.kind, [])
    judged = [other["findings"] for other in own if other["findings"]]
    return {
        **{key: getattr(each, key) for key in ("name", "title", "model", "recipe", "seed")},
        **{key: getattr(each, key) for key in ("temperature", "temperature_note", "coverage")},
        "groups": _group_shares(each, evidence),
        **{key: each.metrics[key] for key in ("accuracy", "n", "accuracy_ci95", "log_loss", "confusion_matrix")},
        "calibration_before": each.before,
        "calibration_after": each.after,
        "consensus_trainings": len(own),
        **each.foreign,
        "findings": None if each.findings is None else mistakes.judge(each.findings, judged),
    }


def _group_shares(each: Measured, evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Count the mistakes in every group for which there is evidence."""
    known = len(evidence.trainings.get(each.kind, [])) >= seeds_of(each.model)
    names = ["duplicate", *(("consensus", "unstable") if known else UNKNOWN)]
    groups = group_of(each, evidence)
    if evidence.suspects is not None:
        names.insert(0, "label")
    return {name: share((groups == name).sum(), each.wrong.sum()) for name in names}


def _label_numbers(evidence: Evidence) -> dict[str, Any] | None:
    issues, out_of_fold = evidence.issues, evidence.out_of_fold
    if issues is None or out_of_fold is None:
        return None
    n_train, n_test = len(evidence.train_labels), len(evidence.labels)
    labels = np.concatenate([evidence.train_labels, evidence.labels])
    return {
        "out_of_fold_accuracy": share((out_of_fold.argmax(1) == labels).sum(), len(labels)),
        "train": share((issues < n_train).sum(), n_train),
        "test": share((issues >= n_train).sum(), n_test),
        "by_class": {name: int((labels[issues] == k).sum()) for k, name in enumerate(evidence.classes)},
        "train_indices": [int(i) for i in issues if i < n_train],
        "test_indices": evidence.suspects,
    }


def _duplicate_numbers(evidence: Evidence, correct: np.ndarray) -> dict[str, Any]:
    """Count the near-duplicates, with the accuracy on them and without them, at several limits."""
    duplicate = evidence.duplicate
    other_label = evidence.labels != evidence.train_labels[evidence.twins]
    found = {scale: near_duplicates(*evidence.distances, scale=scale) for scale in OTHER_LIMITS}
    return {
        "test": _share_of(duplicate),
        "accuracy": _share_of(correct),
        "accuracy_of_them": _share_of(correct[duplicate]),
        "accuracy_without": _share_of(correct[~duplicate]),
        "other_limits": [
            {"scale": scale, "count": int(each.sum()), "without": _share_of(correct[~each])}
            for scale, each in found.items()
        ],
        "of_another_label": int(other_label[duplicate].sum()),
    }


def _share_of(truths: np.ndarray) -> dict[str, Any]:
    """Describe how many of some bools are true."""
    return share(truths.sum(), len(truths))


def _robustness(kind: tuple[str, str], own: Sequence[Result]) -> dict[str, Any]:
    """Average the accuracies of trainings of a kind: plain, mirrored, by corruption and strength, over the latter."""
    curves = {name: np.mean([each["robustness"][name] for each in own], 0).tolist() for name in corruptions.KINDS}
    mirrored = [each["mirrored"] for each in own if "mirrored" in each]
    return {
        "name": ", ".join(kind),
        "n": len(own),
        "clean": float(np.mean([each["accuracy"] for each in own])),
        "mirrored": float(np.mean(mirrored)) if mirrored else None,
        "mirrored_n": len(mirrored),
        "curves": curves,
        "mean": {name: float(np.mean(curve)) for name, curve in curves.items()},
        "all": float(np.mean(list(curves.values()))),
    }


# --- in words --------------------------------------------------------------------------------------------


def notes(numbers: dict[str, Any]) -> list[str]:
    """Write the sentences that belong under the groups; numbers: of numbers()."""
    cautions = [f"{each['name']}: {each['caution']}." for each in numbers["checkpoints"] if each.get("caution")]
    suspects = [_label_note(numbers["label_issues"])] if numbers["label_issues"] else []
    return cautions + suspects + missing(numbers) + [_duplicate_note(numbers["near_duplicates"])]


def missing(numbers: dict[str, Any]) -> list[str]:
    """Say which long trainings the first checkpoint's groups lack, and what runs them; numbers: of numbers()."""
    first, command = numbers["checkpoints"][0], cli.command("analyze_errors.py", "--deep")
    lines = []
    if not numbers["label_issues"]:
        lines.append(f"Suspected label errors are not known yet: {command} trains the five folds.")
    needed = seeds_of(first["model"])
    if first["consensus_trainings"] < needed:
        planned = {(key["model"], key["recipe_name"]) for key in seed_jobs(is_taught=True).values()}
        how = f"{command} runs them" if (first["model"], first["recipe"]) in planned else "--deep does not run them"
        lines.append(f"Consensus needs {needed} trainings of {first['model']}, {first['recipe']}: {how}.")
    return lines


def _label_note(issues: dict[str, Any]) -> str:
    train, test, right = (issues[key] for key in ("train", "test", "out_of_fold_accuracy"))
    return (
        f"{train['count']:,} of {train['n']:,} training and {test['count']:,} of {test['n']:,} test labels are "
        f"suspect; the models of the folds are right on {right['share']:.2%} of {right['n']:,} images."
    )


def _duplicate_note(double: dict[str, Any]) -> str:
    found, on_them, without = double["test"], double["accuracy_of_them"], double["accuracy_without"]
    line = (
        f"{found['count']:,} of {found['n']:,} test images are near-duplicates of training images, by pixels or by "
        f"this checkpoint's features, {double['of_another_label']} of them with another label"
    )
    if on_them["n"] and without["n"]:
        line += (
            f": accuracy {on_them['share']:.2%} on them, {without['share']:.2%} without them, "
            f"{double['accuracy']['share']:.2%} on all"
        )
    return line + "."
