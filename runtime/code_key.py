"""A hash of the code that a model's results depend on, so that an edit of this code makes old results stale.

It covers the model's class, models.build, and everything in their files that these use: base classes, layers,
functions, constants, imports. Comments, docstrings, type hints of functions, and other models do not change it.
"""

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable
from typing import Any

import models

TABLE = "MODELS"  # names every model, so it is not followed


def code_key(model: str) -> str | None:
    """Compute 16 hexadecimal digits for a model of models.MODELS, the same in every version of Python.

    Returns None where the code lies in no file, as that of a class typed into a notebook.
    """
    built = models.MODELS[model]
    module = inspect.getmodule(built) or models
    try:
        sources = inspect.getsource(models), inspect.getsource(module)
    except (OSError, TypeError):
        return None
    code = [reachable(sources[0], "build"), reachable(sources[1], getattr(built, "__name__", ""))]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


@functools.cache  # analyze_errors.py asks for 71 keys
def reachable(source: str, start: str) -> str:
    """Write the statements of a file that define `start` and everything it uses, as JSON, in the file's order.

    If the file does not define `start` (say, a lambda in the table), all of its statements count.
    """
    left = _without_hints(ast.parse(source)).body
    names, reached = {start, "*"}, []
    if not any(start in _defined(statement) for statement in left):
        reached, left = left, []
    while found := [statement for statement in left if names & _defined(statement)]:
        reached += found
        left = [statement for statement in left if statement not in found]
        names |= {name for statement in found for name in _names(statement)} - {TABLE}
    return json.dumps([_plain(statement) for statement in sorted(reached, key=lambda node: node.lineno)])


def digest(*functions: Callable) -> str | None:
    """Compute 16 hexadecimal digits for the code of functions; None where the code of one lies in no file.

    Comments, docstrings, type hints and the version of Python do not change it.
    """
    try:
        sources = [textwrap.dedent(inspect.getsource(function)) for function in functions]
        plain = [[_plain(each) for each in _without_hints(ast.parse(source)).body] for source in sources]
    except (OSError, TypeError, SyntaxError):
        return None
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _without_hints(tree: ast.Module) -> ast.Module:
    """Remove docstrings and functions' type hints, in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            del node.body[0]
    return tree


def _defined(statement: ast.stmt) -> set[str]:
    """Return the names that a statement of a module defines or changes."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {name for target in statement.targets for name in _names(target)}
    if isinstance(statement, ast.AnnAssign | ast.AugAssign):
        return _names(statement.target)
    return _names(statement)  # an import; of an if, a loop or a call every name, to be on the safe side


def _names(node: ast.AST) -> set[str]:
    """Return all names that occur in a piece of code."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            found.add(each.id)
        elif isinstance(each, ast.alias):
            found.add(each.asname or each.name.split(".")[0])
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(each.name)
    return found


def _plain(node: Any) -> Any:
    """Turn a syntax tree into lists and texts without places and empty fields, which vary between Python versions."""
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, {name: _plain(value) for name, value in fields.items()}]
    return [_plain(each) for each in node] if isinstance(node, list) else repr(node)
