"""The finished runs of train.py, a row for each way of training: accuracy over seeds, cost, and the command.

rows = runs.collect([Path("runs")])             # plain values, fit for JSON
groups = runs.group(runs.read([Path("runs")]))  # the runs of each row
"""

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
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
NAMES = re.compile(r"best_.+_fmnist(\.[0-9a-f]{8,16})?\.json")  # with digits: of an earlier run that was kept aside


class Run(NamedTuple):
    """What the comparison needs of one history."""

    path: Path
    model: str
    unit: alike.Unit
    flags: dict[str, Any]  # in today's form
    data: str  # name of the data set
    facts: dict[str, Any]  # all that must be equal for two runs to share a row
    images: tuple[str, ...]  # what it is measured on; accuracies on other images do not compare
    accuracy: float  # on the test set, or on the images that it holds out
    seconds: float  # of training
    cores: int
    epochs: list[dict[str, Any]]  # of the history


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of group() for the runs of read(), described by describe().

    Those of one model, recipe and selection have "differs".
    """
    rows = group(read(folders))
    return [describe(row, differs) for row, differs in zip(rows, _differences(rows), strict=True)]


def group(runs: Iterable[Run]) -> list[list[Run]]:
    """Return the runs of each way of training, in the order of models, recipes and selections.

    Runs share a row if everything but the seed is equal: model and its code, flags, teachers, data, and the number of
    processes where it matters; of runs by folds also all but the fold. A seed counts once: of another run of it there
    is a notice, unless that is the same run, or one equal to the last bit.
    """
    groups: dict[str, dict[alike.Unit, Run]] = {}
    for run in runs:
        units = groups.setdefault(alike.key(run.facts), {})
        first = units.setdefault(run.unit, run)
        if _outcome(first) != _outcome(run):
            _notice(f"{cli.shown(run.path)} skipped: {cli.shown(first.path)} is a run of the same flags and seed")
    return [[units[unit] for unit in sorted(units)] for units in sorted(groups.values(), key=_place)]


def _outcome(run: Run) -> tuple[Any, ...]:
    """Return what two runs of one seed have in common if they are one run, or equal to the last bit."""
    timed = ("seconds", "images_per_second")
    return run.accuracy, [{key: value for key, value in row.items() if key not in timed} for row in run.epochs]


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


def find(folder: Path) -> Iterator[Path]:
    """Yield the histories of runs in a folder and below it, of earlier runs last.

    It leaves out hidden folders, and the trainings of analyze_errors.py --deep unless they are asked for.
    """
    found, seen = [], set()
    for name, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        entered = [each for each in folders if not each.startswith(".") and Path(name, each) != cli.DEEP]
        folders[:] = [] if real in seen else entered
        found += [] if real in seen else [Path(name, each) for each in names if NAMES.fullmatch(each)]
        seen.add(real)
    yield from sorted(found, key=lambda path: (path.parent, path.stem.count("."), path.name))


def read(folders: Sequence[Path]) -> list[Run]:
    """Read the finished runs of the folders, each file once. Prints a notice where others are left out.

    Raises UserError where a folder has no finished run, where no run can be compared, or where a file is no history.
    """
    found: dict[str, Run] = {}
    left_out: Counter[str] = Counter()
    for folder in folders:
        histories = {os.path.realpath(path): (path, read_history(path)) for path in find(folder)}
        finished = {name: each for name, each in histories.items() if each[1]["status"] == "finished"}
        if not finished:
            raise UserError(f"{cli.shown(folder)} has no finished run of train.py: no {HISTORIES}, here or below")
        left_out.update(history["status"] for name, (_, history) in histories.items() if name not in finished)
        found |= {name: _run(*each) for name, each in finished.items() if name not in found}
    if left_out:
        _notice("left out runs that have not finished: " + ", ".join(f"{n} {status}" for status, n in left_out.items()))
    return _known(list(found.values()))


def _run(path: Path, history: dict[str, Any]) -> Run:
    """Take from a history what the comparison needs."""
    data = published.named(history["data"], history.get("data_sha256"))
    own = () if data == published.NAME else (str(history.get("data_sha256")),)
    n = () if alike.unit(0, history["flags"]).fold else (f"{history['test']['n']:,}",)
    return Run(
        path=path,
        model=history["model"],
        unit=alike.unit(history["seed"], history["flags"]),
        flags=history["flags"],
        data=data,
        facts=_facts(history),
        images=(alike.folds(history["flags"]) or "test", data, *n, *own),
        accuracy=float(history["test"]["accuracy"]),
        seconds=max(0.001, sum(float(epoch["seconds"]) for epoch in history["epochs"])),  # for a logarithmic axis
        # a resumed run may have had more cores, or fewer
        cores=max(part.get("threads", 0) for part in (history, *history["resumed"])),
        epochs=history["epochs"],
    )


def _facts(history: dict[str, Any]) -> dict[str, Any]:
    """Collect all that two runs of one row have in common."""
    codes = [history["code"], *(each["code"] for each in history["resumed"] if "code" in each)]
    names = ["model", "classes", "processes"]
    names += [] if alike.unit(0, history["flags"]).fold else ["train_images", "select_images"]  # of a fold or another
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
        if run.model in models.MODELS and recipes.has_row(name, run.model):
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


def _place(units: dict[alike.Unit, Run]) -> list[int]:
    """Return the place of a row in the order of models.py and recipes.py."""
    run = next(iter(units.values()))
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
    units, of = [run.unit for run in runs], alike.folds(flags)
    figures = metrics.spread([run.accuracy for run in runs], alike.overlap(units, of))
    cores = max(run.cores for run in runs)
    row = {
        "model": model,
        "recipe": flags["recipe"],
        "select": flags["select"],
        "teachers": [teacher["checkpoint"] for teacher in flags["teachers"]],
        "epochs": flags["epochs"],
        "data": data,
        **({"folds": of} if of else {}),
        "seeds": sorted({unit.seed for unit in units}),
        "n": figures["n"],
        "accuracy": figures["mean"],
        "published": recipes.PUBLISHED.get(model) if _is_published(model, flags, data) else None,
        "seconds": median(run.seconds for run in runs if run.cores == cores),
        "cores": cores,
        "precision": flags["precision"],
        "parameters": models.count_parameters(models.build(model)),
        "command": command(model, flags | ({"fold": f"K/{of}"} if alike.unit(0, flags).fold else {})),
        "changed": changed(flags),
    }
    row |= {"differs": differs} if differs else {}
    return row | {key: figures[key] for key in ("sd", "ci95") if key in figures}


@functools.cache
def mflop(model: str) -> float:
    """Count the MFLOP to classify one image. It loads a part of PyTorch that takes seconds."""
    return models.count_flop(models.build(model)) / 1e6


def _is_published(model: str, flags: dict[str, Any], data: str) -> bool:
    """Say whether a run follows the published protocol, which chooses the best epoch on the test set."""
    if flags["recipe"] != "published" or data != published.NAME:
        return False
    protocol = recipes.find("published", model)._replace(select="test")
    return flags == recipes.upgrade(protocol._asdict())


def _notice(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr)
