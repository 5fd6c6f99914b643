"""Measure checkpoints, their views and their ensemble on one split, and compare them.

answers = evaluation.answer(evaluation.load([path], Bare()), split, tta=False, ensemble=False)
results = [evaluation.describe(each, split) for each in answers]
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import engine
import metrics
import recipes
from analysis import alike, comparison, excluded
from data import CLASSES, Split
from dataset import arrays
from runtime import cli
from runtime.errors import UserError, one_line


class Loaded(NamedTuple):
    """A checkpoint that is measured."""

    path: Path
    model: torch.nn.Module
    info: dict[str, Any]  # of checkpoint.load


def load(paths: Sequence[Path], bare: checkpoint.Bare) -> list[Loaded]:
    """Load checkpoints, for measuring. Raises CheckpointError."""
    return [Loaded(path, *each) for path, each in zip(paths, checkpoint.load_all(paths, bare), strict=True)]


def choose_images(
    args: Any, loaded: Sequence[Loaded]
) -> tuple[Split, excluded.Listed | None, dict[str, Any]]:  # fmt: skip
    """Return the split to measure on, which of its images a list excludes, and for the JSON the files of --images.

    args: the flags of evaluate.py. Raises UserError where a file does not fit.
    """
    if args.images:
        split, files_read = given(args.images, args.labels, loaded)
        return split, None, files_read
    name = args.split or "test"
    names = [name, excluded.WHOLE[name]] if args.exclude else [name]
    split, *whole = data.load(*names, data_dir=args.data_dir, other_data=args.other_data)
    return split, excluded.read(args.exclude, split, *whole) if args.exclude else None, {}


def given(images: Path, labels: Path, loaded: Sequence[Loaded]) -> tuple[Split, dict[str, Any]]:
    """Read the arrays of two .npy files as a split without a name, of the checkpoints' classes.

    Returns it and a dict for the JSON: the files and their SHA-256. Raises UserError, of dataset/arrays.py.
    """
    paths, found = {"images": images, "labels": labels}, arrays.read(images, labels)
    source = one_line(" and ".join(f"{kind} of {path.name}" for kind, path in paths.items()))
    split = Split(
        "", torch.from_numpy(found.images), torch.from_numpy(found.labels).long(), source, _classes(loaded, labels)
    )
    files = zip(paths.items(), found.sha256, strict=True)
    return split, {"files": {kind: {"file": cli.relative(path), "sha256": digest} for (kind, path), digest in files}}


def _classes(loaded: Sequence[Loaded], labels: Path) -> tuple[str, ...]:
    """Return the class names of the checkpoints. Raises UserError where two have others."""
    known = [each for each in loaded if not checkpoint.is_bare(each.info)]
    for each in known[1:]:
        if each.info["classes"] != known[0].info["classes"]:
            both = f"{cli.shown(known[0].path)} and {cli.shown(each.path)}"
            raise UserError(f"{both} were trained for different classes: {labels.name} can have the labels of one only")
    return tuple(known[0].info["classes"]) if known else CLASSES


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


def describe(answered: Answer, split: Split, listed: excluded.Listed | None = None) -> dict[str, Any]:
    """Describe one answer for the JSON: where it is from, and everything measured, also without the images listed."""
    members, figures = answered.members, metrics.evaluate(answered.logits, split.labels, split.classes)
    files = [_origin(each) for each in members]
    if len(members) == 1:
        keys = ("data", "epoch", "seed", "flags", "versions", "git")
        training = {key: members[0].info.get(key) for key in keys}
        training |= {key: value for key in checkpoint.NEWER if (value := members[0].info.get(key))}
        origin = files[0] | {"model": members[0].info["model"], "training": training}
    else:
        origin = {"ensemble": files, "model": "+".join(sorted({each.info["model"] for each in members}))}
    return {
        **origin,
        **{"views": answered.views, "split": split.name or None, "data": split.source},
        **figures,
        **({"without": excluded.measure(listed, answered.logits, split.labels)} if listed else {}),
        "caution": "; ".join(dict.fromkeys(cautions(answered, split, figures["accuracy"]))) or None,
    }


def _origin(loaded: Loaded) -> dict[str, Any]:
    """Name the file of a checkpoint, and of a bare state_dict how it was matched and how its input is normalised."""
    foreign = {key: loaded.info[key] for key in ("matched", "normalisation") if checkpoint.is_bare(loaded.info)}
    return {"checkpoint": cli.relative(loaded.path), "checkpoint_sha256": loaded.info["sha256"], **foreign}


def cautions(answered: Answer, split: Split, accuracy: float) -> list[str]:
    """List what a reader must know before believing the figures, as sentences."""
    infos = [each.info for each in answered.members]
    found = [each[1] for info in infos if (each := checkpoint.caution(info, split))]
    found += [said for info in infos if (said := checkpoint.changed(info))]
    augmentations = [recipes.upgrade(info.get("flags", {}))["augment"] for info in infos]
    if answered.views > 1 and not all(each.keys() >= {"flip", "shift"} for each in augmentations):
        found.append("not trained on mirrored and moved images: such views may harm it")
    if len(infos) == 1 and (suspicion := checkpoint.suspicion(infos[0], split, accuracy)):
        found.append(suspicion)
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


Group = dict[alike.Unit, list[dict[str, Any]]]  # the results of one way of training, by seed and fold


def alike_but_for_seed(results: list[dict[str, Any]]) -> list[Group]:
    """Group the results of checkpoints that were trained alike, where there are several.

    Bare state_dicts belong to no group, as their training is not known.
    """
    groups: dict[str, Group] = {}
    for result in results:
        if "ensemble" not in result and (flags := result["training"]["flags"]):
            unit = alike.unit(result["training"]["seed"], flags)
            groups.setdefault(alike.key(_facts(result)), {}).setdefault(unit, []).append(result)
    return [group for group in groups.values() if sum(map(len, group.values())) > 1]


def spread(groups: list[Group]) -> list[dict[str, Any]]:
    """Compute mean and standard deviation (n - 1) of the accuracy of each group.

    Another file of a seed is among the "repeats" of its group and does not count. "differs" says what sets apart groups
    of one model, recipe and selection.
    """
    return [_mean(group) | differs for group, differs in zip(groups, _apart(groups), strict=True)]


def pairs(groups: list[Group]) -> list[dict[str, Any]]:
    """Compare the other groups with the best one over common seeds, as compare.py does its rows.

    Groups with fewer than two seeds in common with it are left out.
    """
    groups = [group for group in groups if len(group) > 1]
    if len(groups) < 2:
        return []
    accuracies = [{unit: files[0]["accuracy"] for unit, files in group.items()} for group in groups]
    facts = [_facts(_first(group)) for group in groups]
    names, best = comparison.names(alike.flat(facts)), max(accuracies, key=lambda group: np.mean([*group.values()]))
    found = [
        {"name": name, "against": names[accuracies.index(best)]} | comparison.pair(each, best, fact.get("folds"))
        for name, each, fact in zip(names, accuracies, facts, strict=True)
        if each is not best
    ]
    comparison.correct(found)
    return [each for each in found if each["n"] > 1]


def _first(group: Group) -> dict[str, Any]:
    return next(iter(group.values()))[0]


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    training = result["training"]
    found = alike.facts(recipes.upgrade(training["flags"]), training)
    return found | {"model": result["model"], "views": result["views"]}


def _mean(group: Group) -> dict[str, Any]:
    """Compute the mean over the first result of each seed."""
    first, facts = _first(group), _facts(_first(group))
    repeats = [each["checkpoint"] for files in group.values() for each in files[1:]]
    overlap = alike.overlap(group.keys(), facts.get("folds"))
    figures = metrics.spread([files[0]["accuracy"] for files in group.values()], overlap)
    return {
        "model": first["model"],
        **{key: facts[key] for key in ("recipe", "select", "views")},
        **{"n": figures["n"], "mean_accuracy": figures["mean"]},
        **{key: figures.get(key) for key in ("sd", "ci95")},
        **({"repeats": repeats} if repeats else {}),
    }


def _apart(groups: list[Group]) -> list[dict[str, str]]:
    """Say what sets each group apart from others of its model, recipe, selection and views."""
    every = [_facts(_first(group)) for group in groups]
    kinds = [tuple(facts[key] for key in ("model", "recipe", "select", "views")) for facts in every]
    apart = []
    for facts, kind in zip(every, kinds, strict=True):
        others = [other for other, its in zip(every, kinds, strict=True) if its == kind]
        (differs,) = alike.differences([facts, *others])[:1]
        apart.append({"differs": differs} if differs else {})
    return apart
