"""The finished runs of train.py, a row for each way of training: accuracy over seeds, cost, and the command.

rows = runs.collect([Path("runs")])    # plain values, fit for JSON
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from torch.nn.modules.batchnorm import _BatchNorm

import metrics
import models
import recipes
from analysis import alike
from dataset import published
from runtime import cli
from runtime.errors import UserError
from training.command import changed, command
from training.record import read_history

HISTORIES = "best_*_fmnist.json"


class Run(NamedTuple):
    """What the comparison needs of one history."""

    path: Path
    model: str
    seed: int
    flags: dict[str, Any]  # in today's form
    data: str  # name of the data set
    facts: dict[str, Any]  # all that must be equal for two runs to share a row
    accuracy: float  # on the test set
    seconds: float  # of training
    cores: int


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row for each way of training, from the finished runs in the folders and one level below.

    Runs share a row if everything but the seed is equal: model and its code, flags, teachers, data, and the number of
    processes where it matters. The rows are in the order of models, recipes and selections; those of one model, recipe
    and selection have "differs". Runs that cannot be compared are skipped, with a notice.
    Raises UserError where a folder has no finished run, where no run can be compared, or where a file is no history.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in _known(_finished(folders)):
        seeds = groups.setdefault(alike.key(run.facts), {})
        if run.seed in seeds:
            first = cli.shown(seeds[run.seed].path)
            _notice(f"{cli.shown(run.path)} skipped: {first} is a run of the same flags and seed")
        else:
            seeds[run.seed] = run
    rows = [list(seeds.values()) for seeds in sorted(groups.values(), key=_place)]
    return [describe(row, differs) for row, differs in zip(rows, _differences(rows), strict=True)]


def _differences(rows: Sequence[Sequence[Run]]) -> list[str]:
    """Say in what each row differs from the others of its model, recipe and selection, beside what a row always shows.

    A row always shows its epochs, its data's name, and what changed() finds.
    """
    names = [""] * len(rows)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, (run, *_) in enumerate(rows):
        kinds.setdefault((run.model, run.flags["recipe"], run.flags["select"]), []).append(number)
    for numbers in kinds.values():
        firsts = [rows[number][0] for number in numbers]
        shown = {"epochs", "data", *(key for run in firsts for key in changed(run.flags))}
        for number, differs in zip(numbers, alike.differences([run.facts for run in firsts], shown), strict=True):
            names[number] = differs
    return names


def _finished(folders: Sequence[Path]) -> list[Run]:
    found: dict[Path, Run] = {}
    for folder in folders:
        paths = sorted([*folder.glob(HISTORIES), *folder.glob(f"*/{HISTORIES}")])
        runs = {path.resolve(): run for path in paths if (run := _read(path))}
        if not runs:
            raise UserError(f"{cli.shown(folder)} has no finished run, as {HISTORIES} or */{HISTORIES} of train.py")
        found |= {path: run for path, run in runs.items() if path not in found}
    return list(found.values())


def _read(path: Path) -> Run | None:
    """Read one history; return None for a run that has not finished. Raises UserError for any other file."""
    history = read_history(path)
    if history["status"] != "finished":
        return None
    return Run(
        path=path,
        model=history["model"],
        seed=history["seed"],
        flags=history["flags"],
        data=published.named(history["data"], history.get("data_sha256")),
        facts=_facts(history),
        accuracy=float(history["test"]["accuracy"]),
        seconds=max(0.001, sum(float(epoch["seconds"]) for epoch in history["epochs"])),  # for a logarithmic axis
        # a resumed run may have had more cores, or fewer
        cores=max(part.get("threads", 0) for part in (history, *history["resumed"])),
    )


def _facts(history: dict[str, Any]) -> dict[str, Any]:
    """Collect all that two runs of one row have in common."""
    codes = [history["code"], *(each["code"] for each in history["resumed"] if "code" in each)]
    names = ("model", "classes", "train_images", "select_images", "processes")
    return alike.facts(history["flags"], history) | {
        "code": codes if len(codes) > 1 else codes[0],  # it was edited while the run was interrupted
        **{name: history[name] for name in names},
    }


def _known(runs: Iterable[Run]) -> list[Run]:
    """Keep the runs whose model and recipe are still in models.py and recipes.py; name the others in one notice."""
    known, missing = [], set()
    normalises = functools.cache(_has_batch_norm)
    for run in runs:
        name = run.flags["recipe"]
        rows = recipes.RECIPES.get(name, {})
        if run.model in models.MODELS and (run.model in rows or recipes.FALLBACK in rows):
            processes = run.facts["processes"] if normalises(run.model) else None
            known.append(run._replace(facts=run.facts | {"processes": processes}))
        else:
            missing.add(f"{run.model} by {name}")
    names = ", ".join(sorted(missing))
    if missing and not known:
        raise UserError(f"models.py and recipes.py do not have the model and recipe of any run: {names}")
    if missing:
        _notice(f"skipped runs whose model or recipe models.py and recipes.py do not have: {names}")
    return known


def _has_batch_norm(model: str) -> bool:
    """Say whether a model normalises over a batch: then the result depends on how many processes shared it."""
    return any(isinstance(module, _BatchNorm) for module in models.build(model).modules())


def _place(seeds: dict[int, Run]) -> list[int]:
    """Return the place of a row in the order of models.py and recipes.py."""
    run = next(iter(seeds.values()))
    orders = (list(models.MODELS), list(recipes.RECIPES), list(recipes.SELECTIONS))
    names = (run.model, run.flags["recipe"], run.flags["select"])
    return [order.index(name) for order, name in zip(orders, names, strict=True)]


def describe(runs: Sequence[Run], differs: str = "") -> dict[str, Any]:
    """Describe runs that differ in their seed alone as one row; differs: from other rows of its kind, in words.

    Seconds are the median of the runs with the most cores, since runs that were trained side by side had fewer each.
    Several runs have "sd" and "ci95", the interval of the mean. "published" is the published accuracy, where the row
    repeats the published protocol; "changed" holds values that the code no longer has.
    """
    model, flags, data = runs[0].model, runs[0].flags, runs[0].data
    accuracies = [run.accuracy for run in runs]
    cores = max(run.cores for run in runs)
    network = models.build(model)
    row = {
        "model": model,
        "recipe": flags["recipe"],
        "select": flags["select"],
        "teachers": [teacher["checkpoint"] for teacher in flags["teachers"]],
        "epochs": flags["epochs"],
        "data": data,
        "seeds": sorted(run.seed for run in runs),
        "accuracy": mean(accuracies),
        "published": recipes.PUBLISHED.get(model) if _is_published(model, flags, data) else None,
        "seconds": median(run.seconds for run in runs if run.cores == cores),
        "cores": cores,
        "precision": flags["precision"],
        "parameters": models.count_parameters(network),
        "mflop": models.count_flop(network) / 1e6,
        "command": command(model, flags),
        "changed": changed(flags),
    }
    row |= {"differs": differs} if differs else {}
    return row | ({"sd": stdev(accuracies), "ci95": metrics.mean_interval(accuracies)} if len(runs) > 1 else {})


def _is_published(model: str, flags: dict[str, Any], data: str) -> bool:
    """Say whether a run follows the published protocol, which chooses the best epoch on the test set."""
    if flags["recipe"] != "published" or data != published.NAME:
        return False
    protocol = recipes.find("published", model)._replace(select="test")
    return flags == recipes.upgrade(protocol._asdict())


def _notice(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr)
