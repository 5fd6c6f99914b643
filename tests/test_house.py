"""The house keeps its order: imports run downwards, functions stay short, public functions are annotated."""

import ast
import json
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"train", "evaluate", "analyze_errors", "predict", "compare", "demo", "export", "bench", "hubconf", "sweep"}
LAYERS = (  # a module imports from the layers below it, and within its own room
    SCRIPTS,
    {"analysis", "benchmarks"},
    {"training"},
    {"engine"},
    {"metrics", "checkpoint"},
    {"data", "pictures"},
    {"dataset"},
    {"runtime"},
    {"models", "optim"},
    {"recipes"},
    {"runtime.errors", "runtime.schema"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
ROOMS = sorted(path.parent.name for path in ROOT.glob("[a-z]*/__init__.py"))
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])
TREES = {path: ast.parse(path.read_text()) for path in FILES}
LONGEST_FUNCTION = 50
MOST_FILES_IN_THE_ROOT = 17
DIALECT = re.compile(
    r"\b(told|tells of|hangs? on|lest|ground|at will|is had|are had|such as is|that very|of its own|gives? back"
    r"|goes? on with|passed over|taken for|none the less|in the form|whatever it)\b",
    re.IGNORECASE,
)
TEXTS = ("*.md", "docs/*.md", "docs/*.ipynb", "[a-z]*/*.c", "[a-z]*/templates/*", ".ci/run", "Makefile")


def module_name(path: Path) -> str:
    """runtime/cli.py -> runtime.cli, runtime/__init__.py -> runtime."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of this repository that a file imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def layer(module: str) -> int:
    """A module's layer, or its room's; 0 is the top."""
    return LAYER[module if module in LAYER else module.split(".")[0]]


def test_every_module_has_a_layer():
    rooms = {module.split(".")[0] for module in MODULES}
    assert rooms == {name.split(".")[0] for name in LAYER}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downwards(path):
    importer = module_name(path)
    for imported in imports(TREES[path]):
        same_room = importer.split(".")[0] == imported.split(".")[0]
        assert layer(imported) > layer(importer) or same_room, f"{importer} imports {imported}"


def test_there_is_no_circle():
    graph = {module_name(path): set(imports(tree)) - {module_name(path)} for path, tree in TREES.items()}
    assert set(TopologicalSorter(graph).static_order()) == MODULES  # raises CycleError, which names the circle


def test_the_root_shows_only_what_people_type_or_edit():
    assert len(list(ROOT.glob("*.py"))) <= MOST_FILES_IN_THE_ROOT


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_are_short(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{path.name}:{node.lineno} {node.name}"


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public functions of a module, and the public methods of its public classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == "__init__" or not node.name.startswith("_"):
                yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_public_functions_are_annotated(path):
    for function in public_functions(TREES[path].body):
        place = f"{path.name}:{function.lineno} {function.name}"
        own = function.args
        arguments = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, [own.vararg, own.kwarg])]
        for argument in arguments:
            assert argument.annotation or argument.arg in ("self", "cls"), f"{place}: {argument.arg}"
        assert function.returns or function.name == "__init__", f"{place}: its return"


def text_of(path: Path) -> str:
    """A file's text; of a notebook what somebody wrote, without the outputs."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        return "".join(line for cell in json.loads(text)["cells"] for line in cell["source"])
    return text


def test_the_language_is_plain():
    found = []
    for path in [*FILES, *(path for pattern in TEXTS for path in sorted(ROOT.glob(pattern)))]:
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in DIALECT.finditer(text_of(path))]
    assert not found


def test_the_locked_packages_are_those_required():
    required = re.findall(r"^\S+==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    lock = (ROOT / "requirements.lock").read_text()
    hashed = re.findall(r"^(\S+==\S+).* \\\n    --hash=sha256:[0-9a-f]{64}\b", lock, re.MULTILINE)
    assert set(required) <= set(hashed)
    assert len(hashed) == len(re.findall(r"^[^#\s]", lock, re.MULTILINE))  # and nothing else, such as an address


def test_ruff_has_one_version():
    (pinned,) = re.findall(r"^ruff==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    hooks = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == {pinned}


COMMANDS = {"cli": "pip install", "tables": "python train.py"}  # the latter in the tables of README.md and docs


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_messages_take_their_commands_from_cli(path):
    statements = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Expr)]
    documentation = {id(node.value) for node in statements}
    texts = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for text in texts:
        written = re.search(r"\bpython3? \w+\.py|\bpip install", text.value)
        allowed = id(text) in documentation or not written or written.group() == COMMANDS.get(path.stem)
        assert allowed, f"{path.name}:{text.lineno}: use cli.command or cli.install"
