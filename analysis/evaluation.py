"""Measure checkpoints, their views and their ensemble on one split, and compare them.

answers = evaluation.answer([evaluation.load(path)], split, tta=False, ensemble=False)
results = [evaluation.describe(each, split) for each in answers]
"""

from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import engine
import metrics
import recipes
from data import Split
from runtime import cli
from runtime.files import file_sha256


class Loaded(NamedTuple):
    """A checkpoint that is measured."""

    path: Path
    model: torch.nn.Module
    info: dict[str, Any]
    sha256: str


def load(path: Path) -> Loaded:
    """Load a checkpoint, for measuring. Raises CheckpointError."""
    return Loaded(path, *checkpoint.load(path), file_sha256(path))


class Answer(NamedTuple):
    """What one checkpoint, or several together, answer to the images."""

    views: int  # of each image
    members: list[Loaded]
    logits: torch.Tensor  # float (n, 10)


def answer(loaded: list[Loaded], split: Split, tta: bool, ensemble: bool) -> list[Answer]:
    """Compute all that is to be measured: each checkpoint, then all together, by one view and then by six."""

    many = len(engine.VIEWS)
    answers = []
    with tqdm(total=len(loaded) * (1 + tta * many), unit=" views", disable=None, leave=False) as bar:
        for views in (1, many) if tta else (1,):
            found = []
            for each in loaded:
                each.model.to(split.labels.device)
                if views == 1:
                    found.append(engine.predict_logits(each.model, split))
                    bar.update()
                else:
                    found.append(engine.predict_views(each.model, split, bar.update))
            answers += [Answer(views, [each], logits) for each, logits in zip(loaded, found, strict=True)]
            if ensemble:
                answers.append(Answer(views, loaded, engine.average(found)))
    return answers


def describe(answered: Answer, split: Split) -> dict[str, Any]:
    """Describe one answer for the JSON: where it is from, and everything measured."""
    members, figures = answered.members, metrics.evaluate(answered.logits, split.labels, split.classes)
    files = [{"checkpoint": cli.shown(each.path), "checkpoint_sha256": each.sha256} for each in members]
    if len(members) == 1:
        keys = ("data", "epoch", "seed", "flags", "versions", "git")
        training = {key: members[0].info.get(key) for key in keys}
        origin = files[0] | {"model": members[0].info["model"], "training": training}
    else:
        origin = {"ensemble": files, "model": "+".join(sorted({each.info["model"] for each in members}))}
    return {
        **origin,
        **{"views": answered.views, "split": split.name, "data": split.source},
        **figures,
        "caution": "; ".join(dict.fromkeys(cautions(answered, split))) or None,
    }


def cautions(answered: Answer, split: Split) -> list[str]:
    """List what a reader must know before believing the figures, as sentences."""
    infos = [each.info for each in answered.members]
    found = [each[1] for info in infos if (each := checkpoint.caution(info, split))]
    augmentations = [recipes.upgrade(info.get("flags", {}))["augment"] for info in infos]
    if answered.views > 1 and not all(each.keys() >= {"flip", "shift"} for each in augmentations):
        found.append("not trained on mirrored and moved images: such views may harm it")
    return found


def compare(results: list[dict[str, Any]], correct: list[np.ndarray]) -> list[dict[str, Any]]:
    """Compare each pair by McNemar's exact test, and adjust the p-values by Holm's method."""
    pairs = [
        {"a": name(results[i]), "b": name(results[j]), **metrics.mcnemar(correct[i], correct[j])}
        for i, j in combinations(range(len(results)), 2)
    ]
    adjusted = metrics.holm([pair["p_value"] for pair in pairs])
    return [pair | {"p_holm": p} for pair, p in zip(pairs, adjusted, strict=True)]


def name(result: dict[str, Any]) -> str:
    """Name a result where it is one of several."""
    own = result.get("checkpoint") or f"all {len(result['ensemble'])} together"
    return own if result["views"] == 1 else f"{own}, {result['views']} views"


def spread(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute mean and standard deviation (n - 1) of the accuracy over checkpoints that were trained alike."""
    groups: dict[tuple, list[float]] = {}
    for result in results:
        if "ensemble" not in result:
            flags = recipes.upgrade(result["training"]["flags"] or {"select": None})
            key = (result["model"], flags["recipe"], flags["select"], result["views"])
            alike = (*key, result["training"]["data"], recipes.setting(flags))
            groups.setdefault(alike, []).append(result["accuracy"])
    return [
        dict(zip(("model", "recipe", "select", "views"), key, strict=False))
        | {"n": len(values), "mean_accuracy": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        for key, values in groups.items()
        if len(values) > 1
    ]
