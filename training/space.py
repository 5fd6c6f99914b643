"""The values among which a search looks for the best: what --search asks for.

space = space.parse(["lr=log:1e-4..1e-1", "batch_size=128,256,512"], recipe)
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import data
from recipes import Recipe
from runtime.errors import UserError
from training import settings

DIGITS = 3  # significant ones of a number that is drawn


class Range(NamedTuple):
    """Numbers from low to high."""

    low: float
    high: float
    log: bool
    whole: bool


Space = dict[str, Range | list[Any]]  # by name: a range, or the values to choose from


def parse(words: Sequence[str], recipe: Recipe) -> Space:
    """Read name=low..high, name=log:low..high or name=value,value for each value to search.

    Raises UserError for what is no range, and for values that the recipe cannot have.
    """
    space: Space = {}
    for word in (part for each in words for part in each.split()):
        name, _, text = word.partition("=")
        if name in space:
            raise UserError(f"--search {name} stands there twice")
        if ".." in text:
            space[name] = _range(name, text, recipe)
        else:
            space.update(settings.parse_grid([word], recipe))
            if len(space[name]) == 1:
                raise UserError(f"--search {word}: one value is no search: use --set {word}")
    if not space:
        raise UserError("--search names no value: write name=LOW..HIGH")
    return space


def _range(name: str, text: str, recipe: Recipe) -> Range:
    """Read a range of numbers. Raises UserError."""
    log = text.startswith("log:")
    ends = text.removeprefix("log:").split("..")
    if len(ends) != 2:
        raise UserError(f"--search {name}={text}: write {name}=LOW..HIGH or {name}=log:LOW..HIGH")
    values = [settings.parse([f"{name}={end}"], recipe)[name] for end in ends]
    low, high = (0 if value is False else value for value in values)  # an augmentation of strength 0 is left out
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
        raise UserError(f"--search {name}={text}: a range is of numbers; write other values as {name}=A,B,C")
    if not low < high:
        raise UserError(f"--search {name}={text}: {ends[0]} is not below {ends[1]}")
    if log and low <= 0:
        raise UserError(f"--search {name}={text}: a log range begins above 0")
    return Range(low, high, log, _is_whole(name))


def _is_whole(name: str) -> bool:
    """Say whether a value of that name is a whole number: by recipes.py, or by the signature in data.py."""
    if name not in data.AUGMENTATIONS:
        return Recipe.__annotations__[name] is int
    _, _, first, *_ = inspect.signature(data.AUGMENTATIONS[name]).parameters.values()
    return getattr(first.annotation, "__origin__", first.annotation) is int


def combinations(space: Space) -> int | None:
    """Count the settings in a space, or return None where there is no end of them."""
    if any(isinstance(among, Range) and not among.whole for among in space.values()):
        return None
    return math.prod(
        len(among) if isinstance(among, list) else int(among.high - among.low) + 1 for among in space.values()
    )


def own(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's own values as Optuna holds them, or {} where one of them is outside of the space."""
    values = {}
    for name, among in space.items():
        value = _of(recipe, name)
        if isinstance(among, Range):
            value = 0 if value is False else value  # an augmentation that is left out
            same = [value] if not isinstance(value, bool | str | None) and among.low <= value <= among.high else []
        else:
            same = [_text(name, each) for each in among if settings.change(recipe, {name: each}) == recipe]
        if not same:
            return {}
        values[name] = same[0]
    return values


def suggest(space: Space, trial: Any, sampler: Callable[[str], Any]) -> Any:
    """Let a trial of Optuna have a value for each name, drawn by the sampler of that name. Returns the trial.

    Values that the trial has already stay.
    """
    for name, among in space.items():
        trial.study.sampler = sampler(name)
        if isinstance(among, list):
            trial.suggest_categorical(name, [_text(name, value) for value in among])
        elif among.whole:
            trial.suggest_int(name, among.low, among.high, log=among.log)
        else:
            trial.suggest_float(name, among.low, among.high, log=among.log)
    return trial


def values(space: Space, params: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return what Optuna has drawn as values of settings.parse. Numbers are rounded, but for the recipe's own."""
    found = {}
    for name, among in space.items():
        drawn = params[name]
        if isinstance(among, list):
            found[name] = next(value for value in among if _text(name, value) == drawn)
        else:
            found[name] = drawn if drawn == _of(recipe, name) else _rounded(drawn, among)
            if name in data.AUGMENTATIONS and not found[name]:
                found[name] = False  # of strength 0: left out
    return found


def _of(recipe: Recipe, name: str) -> Any:
    """Return a recipe's own value of a name; of an augmentation that it does not have, False."""
    return recipe.augment.get(name, False) if name in data.AUGMENTATIONS else getattr(recipe, name)


def _text(name: str, value: Any) -> str:
    """Write one of several values as Optuna holds it: in a recipe it may be a list."""
    return settings.written(name, value).partition("=")[2]


def _rounded(value: float, among: Range) -> float:
    """Round a number that was drawn to a few digits, within its range, so that a user can read and type it."""
    return value if among.whole else min(max(float(f"{value:.{DIGITS}g}"), among.low), among.high)
