"""The flags of train.py that repeat a run.

command.command("cnn", history["flags"])   # "--model cnn --recipe fast --set flip=false"
"""

import shlex
from collections.abc import Mapping
from typing import Any

import data
import engine
import recipes
from runtime.errors import UserError
from training import settings

OWN = ("select", "epochs", "batch_size")  # values of a recipe that have flags of their own, beside --lr and --precision


def command(model: str, flags: Mapping[str, Any]) -> str:
    """Return the flags of train.py that repeat a run, but for the seed and the data. flags: of recipes.upgrade."""
    words = ["--model", model]
    words += ["--recipe", flags["recipe"]] if flags["recipe"] != _default(model) else []
    values = differences(model, flags)
    for name in (*OWN, rate(flags), "precision"):
        flag = "--lr" if name == rate(flags) else "--" + name.replace("_", "-")
        words += [flag, str(values.pop(name))] if values.get(name) else []
    words += ["--set", *(settings.written(*each) for each in values.items())] if values else []
    words += ["--fold", flags["fold"]] if flags["fold"] else []
    words += ["--deterministic"] if flags["deterministic"] else []
    teachers = [teacher["checkpoint"] for teacher in flags["teachers"]]
    return shlex.join([*words, *(["--teacher", *teachers] if teachers else [])])


def differences(model: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that make a run's recipe of the row in recipes.py, as settings.change takes them.

    precision is that of the processors of the shipped runs, where "auto" is bfloat16.
    """
    row = recipes.find(flags["recipe"], model)
    row = row._replace(precision="bfloat16" if row.precision == "auto" else row.precision)
    return settings.differences(row, recipes.Recipe(**{name: flags[name] for name in recipes.Recipe._fields}))


def changed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a run that no flag of train.py can repeat, because the code no longer has them."""
    gone = {name: value for name, value in flags.items() if name not in recipes.FLAGS}
    gone |= {name: value for name, value in flags["augment"].items() if name not in data.AUGMENTATIONS}
    return gone | ({"loss": flags["loss"]} if flags["loss"] not in engine.LOSSES else {})


def rate(flags: Mapping[str, Any]) -> str:
    """Name the value that --lr sets."""
    return "muon_lr" if flags["optimizer"] == "muon" else "lr"


def _default(model: str) -> str | None:
    try:
        return recipes.default(model)
    except UserError:  # the model has several recipes, so that one must be named
        return None
