"""Values of a recipe from text, as train.py --set takes them, and back to text.

values = settings.parse(["muon_lr=0.03", "flip=false"])
recipe = settings.change(recipes.find("fast", "cnn"), values)
grid = settings.parse_grid(["muon_lr=0.03,0.07"], recipe)      # {"muon_lr": [0.03, 0.07]}

A name is a field of recipes.Recipe or an augmentation of data.py. An augmentation has its value or a list of its
values, false to leave it out, or true: the recipe's own value, else the default of its function.
"""

import contextlib
import difflib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import data
import engine
import recipes
from recipes import Recipe
from runtime.errors import UserError
from runtime.schema import Text, problem

WORDS = {"true": True, "false": False, "none": None, "null": None}
FLAGS = {  # no values of a recipe, and the flags to use
    "seed": "--seed (of sweep.py: --seeds N)",
    "fold": "--fold (of sweep.py: --folds K)",
    "recipe": "--recipe",
    "model": "--model",
    "teacher": "--teacher",
    "deterministic": "--deterministic of train.py",
}
OPEN, CLOSE = "[{", "]}"


def parse(words: Sequence[str], recipe: Recipe | None = None) -> dict[str, Any]:
    """Read name=value, one value each. With a recipe, check also that the values go with it.

    Raises UserError for another name, and for a value of the wrong type or range.
    """
    pairs = _split(words)
    for name, text in pairs:
        if len(_parts(text)) > 1:
            several = "sweep.py trains each of several values in its --set, but not in a search"
            hint = f"a list needs brackets, as {name}=[{text}]" if name in data.AUGMENTATIONS else several
            raise UserError(f"--set {name}={text}: one value is wanted; {hint}")
    values = {name: _value(name, text) for name, text in pairs}
    if recipe:
        change(recipe, values)
    return values


def parse_grid(words: Sequence[str], recipe: Recipe | None = None) -> dict[str, list[Any]]:
    """Read name=value,value ...: commas outside of brackets separate values.

    Raises UserError as parse does, and for a value that stands there twice.
    """
    grid = {name: [_value(name, part) for part in _parts(text)] for name, text in _split(words)}
    for name, values in grid.items():
        texts = [written(name, value) for value in values]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise UserError(f"--set {name}: {twice[0]} stands there twice")
        if recipe and name in data.AUGMENTATIONS:
            for value in values:
                change(recipe, {name: value})
    return grid


def change(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with values of parse. A value equal to the recipe's own keeps the recipe's type.

    Raises UserError where an augmentation has no value to take for true, and where the values do not go together.
    """
    fields = {name: value for name, value in values.items() if name not in data.AUGMENTATIONS}
    augment = dict(fields.pop("augment", recipe.augment))
    for name in [name for name in values if name in data.AUGMENTATIONS]:
        augment[name] = _resolved(name, values[name], recipe.augment)
    augment = {name: value for name, value in augment.items() if value is not False}
    fields["augment"] = {name: augment[name] for name in sorted(augment, key=_place(recipe.augment))}
    own = recipe._asdict()
    if values.get("optimizer") == "adam":  # which has neither of these
        fields = {"muon_lr": 0.0, "weight_decay": 0.0} | fields
    changed = recipe._replace(**{name: own[name] if own[name] == value else value for name, value in fields.items()})
    _check(changed, values)
    return changed


def _check(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Raise UserError where a value has no effect in a recipe, or names a loss that engine.py lacks."""
    for name in ("muon_lr", "weight_decay"):
        if recipe.optimizer == "adam" and values.get(name):
            raise UserError(f"--set {name} needs optimizer=muon: this recipe uses adam")
    if "optimizer" in values and recipe.optimizer == "muon" and not recipe.muon_lr:
        raise UserError("--set optimizer=muon needs its learning rate: add muon_lr, such as muon_lr=0.05")
    if "loss" in values and recipe.loss not in engine.LOSSES:
        raise UserError(f"--set loss={recipe.loss}: engine.py has no such loss; it has {', '.join(engine.LOSSES)}")


def differences(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """Return the values by which change makes another recipe of this one."""
    before, after = recipe._asdict(), other._asdict()
    values = {name: after[name] for name in after if name != "augment" and after[name] != before[name]}
    ours, theirs = recipe.augment, other.augment
    changed = {name: theirs.get(name, False) for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)}
    return values | changed


def named(values: Mapping[str, Any], before: Recipe, after: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe that values name or have changed, as they are after change."""
    names = {"augment"} if values.keys() & data.AUGMENTATIONS.keys() else set()
    names |= {name for name in Recipe._fields if name in values or getattr(after, name) != getattr(before, name)}
    return {name: value for name, value in after._asdict().items() if name in names}


def remark(names: Collection[str], recipe: Recipe) -> str | None:
    """Say what lr is in a recipe that uses Muon, where names hold lr and not muon_lr; else return None."""
    if recipe.optimizer != "muon" or "lr" not in names or "muon_lr" in names:
        return None
    return "lr is Adam's rate, for what Muon does not train; Muon's rate, for the large matrices, is muon_lr"


def written(name: str, value: Any) -> str:
    """Write a value as the text that parse reads, such as "shift=[1,0.3]"."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"{name}={text}"


def _place(augment: Mapping[str, Any]) -> Any:
    """Return the key by which a row's augmentations stay in its order; others follow in that of data.py."""
    order = [*augment, *data.AUGMENTATIONS]
    return order.index


def _split(words: Sequence[str]) -> list[tuple[str, str]]:
    """Split each name=text. Raises UserError for a word without "=", and for a name that is unknown or comes twice."""
    pairs = [(name, text.strip()) for name, equals, text in (word.partition("=") for word in words)]
    for word, (name, text) in zip(words, pairs, strict=True):
        if word.strip() != word.strip(" ,"):
            raise UserError(f"--set {word}: write the values without a space beside the comma, as {name}=1,2")
        _check_name(name)
        if not text:
            raise UserError(f"--set {word}: write name=value, such as {name}=1")
        if [each for each, _ in pairs].count(name) > 1:
            raise UserError(f"--set {name} stands there twice")
    return pairs


def _check_name(name: str) -> None:
    names = [*Recipe._fields, *data.AUGMENTATIONS]
    if name in names:
        return
    if name in FLAGS:
        raise UserError(f"--set {name}: this is not a value of a recipe; use {FLAGS[name]}")
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"the names are {', '.join(names)}"
    raise UserError(f"--set: a recipe has no {name[:40]!r}; {hint}")


def _parts(text: str) -> list[str]:
    """Split a text at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in OPEN) - (character in CLOSE)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _value(name: str, text: str) -> Any:
    """Read the value of a field or an augmentation, and check it. Raises UserError."""
    if name in data.AUGMENTATIONS:
        value = _plain(_read(text))
        if value is True or value in (None, False):
            return bool(value)
        data.check_values({name: value}, "--set: ")
        return value
    kind = recipes.FLAGS[name]
    is_text = isinstance(kind, Text) or (isinstance(kind, tuple) and all(isinstance(each, str) for each in kind))
    value = text if is_text else _read(text)
    if name == "augment":
        value = _plain(value or {})
        data.check_values(value if isinstance(value, dict) else {}, "--set augment: ")
    whole = Recipe.__annotations__[name] is int
    if whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    if wrong := problem(value, kind, f"--set: {name}"):
        raise UserError(wrong)
    return float(value) if type(value) is int and not whole else value


def _read(text: str) -> Any:
    """Read a word, a number, a list or an object; return any other text as it is."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for read in (json.loads, float):
        with contextlib.suppress(ValueError, RecursionError):
            return read(text)
    return text


def _plain(value: Any) -> Any:
    """Write whole numbers without a point, so that equal values are equal texts in a history."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _resolved(name: str, value: Any, own: Mapping[str, Any]) -> Any:
    """Return the value of an augmentation: for true the recipe's own, else its function's default."""
    if value is not True:
        return own[name] if name in own and own[name] == value else value
    if name in own:
        return own[name]
    parameters = list(inspect.signature(data.AUGMENTATIONS[name]).parameters.values())[2:]
    values = [each.default for each in parameters]
    if inspect.Parameter.empty in values:
        names = ",".join(each.name.upper() for each in parameters)
        form = f"[{names}]" if len(parameters) > 1 else names
        raise UserError(f"--set {name}=true: the recipe has no value of {name}: write {name}={form}")
    return values[0] if len(values) == 1 else values
