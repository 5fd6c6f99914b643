"""What a value that was read from a file must be, and the first place where it is something else.

problem(history, {"seed": Number(0, 9, whole=True), "temperature": (Number(0.01, 100), None), str: object})

A kind is
- a type, or a union of types: a whole number is as good as a float, a float is finite, True is no number;
- Number or Text, within their limits;
- a tuple: one of these kinds;
- [kind]: a list of any length, and [kind, kind]: one of just these two;
- {"a": kind, "b": Maybe(kind)}: a dict with just these keys, b of which may be missing; the kind of str is that of
  every other key;
- anything else: this very constant.
"""

import json
import math
import sys
from types import UnionType
from typing import Any, NamedTuple, get_args

LONGEST = 60  # characters of a value in a message
NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


class Number(NamedTuple):
    """A finite number, from low to high."""

    low: float = -sys.float_info.max
    high: float = sys.float_info.max
    whole: bool = False


class Text(NamedTuple):
    """A text of printable characters, so that it can be shown in a line of a terminal or a table."""

    most: int = 300


class Maybe(NamedTuple):
    """The kind of a key that may be missing from a dict."""

    kind: Any


def problem(value: Any, kind: Any, name: str = "it") -> str | None:
    """Say in one line where a value is not of a kind, such as "epochs[2].seconds is -1, not ...", or return None.

    name: what the message calls the value.
    """
    if isinstance(kind, dict) and isinstance(value, dict):
        return _dict_problem(value, kind, name)
    if isinstance(kind, list) and isinstance(value, list) and len(kind) in (1, len(value)):
        kinds = kind * len(value) if len(kind) == 1 else kind
        for place, (part, each) in enumerate(zip(value, kinds, strict=True)):
            if problem(part, each):
                return problem(part, each, f"{name}[{place}]")
        return None
    if type(kind) is tuple:
        if any(problem(value, each) is None for each in kind):
            return None
        alike = [each for each in kind if type(each) is type(value) and isinstance(each, dict | list)]
        if alike:  # says more than that it is none of these kinds
            return problem(value, alike[0], name)
    elif _is(value, kind):
        return None
    return f"{name} is {_shown(value)}, not {_described(kind)}"


def _dict_problem(value: dict[Any, Any], kind: dict[Any, Any], name: str) -> str | None:
    for key, each in kind.items():
        if key is not str and key not in value and not isinstance(each, Maybe):
            return f"{name} lacks {key}"
    for key, part in value.items():
        if not isinstance(key, str) or (key not in kind and (str not in kind or not _is(key, Text()))):
            return f"{name} has {_shown(key)}, which does not belong there"
        each = kind.get(key, kind.get(str))
        place = key if name == "it" else f"{name}.{key}"
        if found := problem(part, each.kind if isinstance(each, Maybe) else each, place):
            return found
    return None


def _is(value: Any, kind: Any) -> bool:
    """Say whether a value is of a kind that has no parts."""
    if isinstance(kind, Number):
        right = isinstance(value, int if kind.whole else int | float) and not isinstance(value, bool)
        return right and kind.low <= value <= kind.high
    if isinstance(kind, Text):
        return isinstance(value, str) and len(value) <= kind.most and value.isprintable()
    if isinstance(kind, type | UnionType):
        types = get_args(kind) or (kind,)
        if isinstance(value, int | float) and object not in types:  # True is an int to Python
            fine = type(value) in types or (type(value) is int and float in types)
            return fine and not (isinstance(value, float) and not math.isfinite(value))
        return isinstance(value, kind)
    return not isinstance(kind, dict | list) and type(value) is type(kind) and bool(value == kind)


def _shown(value: Any) -> str:
    """Write a value for a message: a number, text, truth or null as in JSON, of other things the type."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a huge number"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        text = json.dumps(value[: LONGEST + 1] if isinstance(value, str) else value)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return NAMES.get(type(value), f"a {type(value).__name__}")


def _described(kind: Any) -> str:
    """Describe a kind in a message."""
    if type(kind) is tuple:
        return " or ".join(dict.fromkeys(map(_described, kind)))
    if isinstance(kind, Number):
        low, high = Number._field_defaults["low"], Number._field_defaults["high"]
        limits = [f"from {kind.low:,.10g}"] * (kind.low > low) + [f"to {kind.high:,.10g}"] * (kind.high < high)
        return " ".join(["a whole number" if kind.whole else "a number" if limits else "a finite number", *limits])
    if isinstance(kind, Text):
        return f"a text of at most {kind.most} printable characters"
    if isinstance(kind, list):
        return "a list" if len(kind) == 1 else f"a list of {len(kind)}"
    if isinstance(kind, UnionType):
        return " or ".join(_described(each) for each in get_args(kind))
    if isinstance(kind, type):
        return "null" if kind is type(None) else NAMES.get(kind, f"a {kind.__name__}")
    return "an object" if isinstance(kind, dict) else json.dumps(kind)
