"""Measure a model's answers on a folder of labelled pictures: predict.py --evaluate.

labelled = read_labels(Path("labels.csv"), candidate.classes)
found = figures([judge(*pair) for pair in zip(labelled, answers(candidate, labelled))], candidate.classes)
print(text(found))

The labels are a CSV file: `file` (relative to it), and `label`, or `strict` and `lenient`. `strict` is
the class; `lenient` holds all classes that would be a fair answer. Both may hold several, separated by |. "none", or
nothing, is for what the classes lack. Every other column of only 0 and 1 divides the pictures in two, such as `person`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from analysis.classify import Candidate, Classified, classify
from metrics import share
from pictures.convert import Conversion, explain_all
from pictures.read import PictureError
from runtime import cli, tables
from runtime.errors import UserError, one_line
from runtime.files import read_bytes

BATCH = 64  # pictures that are in memory at the same time
NOTHING = ("", "none")  # of the classes


class Labelled(NamedTuple):
    """A picture with what it shows."""

    file: str  # as in the CSV file
    path: Path
    strict: frozenset[str]  # the class; several where the label does not say which; none where it is of no class
    fair: frozenset[str]  # the classes that would be a fair answer: those of strict, and others
    marks: dict[str, bool]  # the columns of 0 and 1


def read_labels(path: Path, classes: Sequence[str]) -> list[Labelled]:
    """Read a CSV file of labels. Raises UserError for the first fault, with its line."""
    found = list(tables.rows(path, read_bytes(path, tables.MOST_BYTES), partial(_check_header, path)))
    if not found:
        raise UserError(f"{cli.shown(path)}: it has a header, but names no picture")
    others = [name for name in found[0][1] if name and name not in ("file", "label", "strict", "lenient")]
    marks = [name for name in others if all(row[name].strip() in ("0", "1") for _, row in found)]
    labelled: dict[Path, Labelled] = {}
    for line, row in found:
        try:
            each = _labelled(path.parent, row, classes, marks)
            if each.path in labelled:
                raise UserError(f"{each.file} is there twice")
        except UserError as error:
            raise UserError(f"{cli.shown(path)}, line {line}: {one_line(error)}") from None
        labelled[each.path] = each
    return list(labelled.values())


def _check_header(path: Path, header: list[str]) -> None:
    if "file" not in header or not {"label", "strict"} & {*header}:
        lacking = "file" if "file" not in header else "label or strict"
        raise UserError(
            f"{cli.shown(path)}: its first line lacks the column {lacking}: it must be file,label or "
            "file,strict,lenient, with commas; other columns may follow"
        )


def _labelled(folder: Path, row: dict[str, Any], classes: Sequence[str], marks: Sequence[str]) -> Labelled:
    """Check a row of the CSV file. Raises UserError."""
    file = row["file"].strip()
    try:
        path = (folder / file).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a zero byte, a link to itself
        raise UserError(f"{file[:60]!r} is no name of a file: {error}") from None
    if not file or not is_file:
        raise UserError(f"{file or 'the name of the file'} is missing" + (f": no such file in {folder}" * bool(file)))
    label = row["strict" if "strict" in row else "label"]
    strict, fair = _classes(label, classes), _classes(row.get("lenient", label), classes)
    if not strict <= fair:
        raise UserError(f"strict is {label}, but lenient is {row['lenient'] or 'empty'}: it must hold what strict says")
    return Labelled(file, path, strict, fair, {name: row[name].strip() == "1" for name in marks})


def _classes(listed: str, classes: Sequence[str]) -> frozenset[str]:
    """Return the classes of a list such as Coat|Pullover; none for "none". Raises UserError for an unknown one."""
    names = frozenset() if listed.strip() in NOTHING else frozenset(name.strip() for name in listed.split("|"))
    if unknown := sorted(names - {*classes}):
        raise UserError(f"{unknown[0]!r} is no class; they are {', '.join(classes)}, and none for other things")
    return names


def conversions(labelled: Sequence[Labelled], progress: Callable[[], Any]) -> Iterator[tuple[str, Conversion]]:
    """Read and convert the pictures, (file, conversion) of each. Raises UserError where one cannot be read."""
    for each, result in zip(labelled, explain_all(each.path for each in labelled), strict=True):
        if isinstance(result, PictureError):
            raise UserError(f"{cli.shown(each.path)}: {result}")
        yield each.file, result
        progress()


def answers(
    candidate: Candidate, labelled: Sequence[Labelled], progress: Callable[[], Any] = lambda: None
) -> Iterator[Classified]:
    """Answer for the pictures, in order. progress() is called after each; raises UserError like conversions."""
    for start in range(0, len(labelled), BATCH):
        yield from classify(candidate, list(conversions(labelled[start : start + BATCH], progress)))


class Judged(NamedTuple):
    """A picture, and whether its answer is right. It does not keep the picture itself."""

    labelled: Labelled
    answer: str  # of Classified.answer
    best: str  # the most probable class
    probability: float
    energy: float
    is_sure: bool
    notes: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Say whether the most probable class is a fair answer."""
        return self.best in self.labelled.fair


def judge(labelled: Labelled, row: Classified) -> Judged:
    """Compare an answer with the label."""
    best, probability = row.ranking[0]
    return Judged(labelled, row.answer, best, probability, row.energy, row.is_sure, row.conversion.notes)


def figures(judged: Sequence[Judged], classes: Sequence[str]) -> dict[str, Any]:
    """Compute all figures as plain numbers and lists; each share has its count, n and 95% interval.

    `strict` and `lenient` are of all best answers, sure or not, to pictures of the classes.
    """
    own = [each for each in judged if each.labelled.fair]
    others = [each for each in judged if not each.labelled.fair]
    named = [each for each in own if each.labelled.strict]
    kinds = ["|".join(name for name in classes if name in each.labelled.strict) for each in named]
    marks = judged[0].labelled.marks if judged else {}
    return {
        "n": len(judged),
        "lenient": _right(own),
        "strict": share(sum(each.best in each.labelled.strict for each in named), len(named)),
        "coverage": _sure(own),
        "precision": _right([each for each in own if each.is_sure]),
        "others_sure": _sure(others),
        "classes": {
            kind: _right([each for each, own_kind in zip(named, kinds, strict=True) if own_kind == kind])
            for kind in sorted(set(kinds), key=lambda kind: classes.index(kind.split("|")[0]))
        },
        "columns": {
            name: {str(int(value)): _right([e for e in own if e.labelled.marks[name] == value]) for value in (0, 1)}
            for name in marks
        },
        "pictures": [_described(each) for each in judged],
    }


def _right(judged: Sequence[Judged]) -> dict[str, Any]:
    return share(sum(each.is_right for each in judged), len(judged))


def _sure(judged: Sequence[Judged]) -> dict[str, Any]:
    return share(sum(each.is_sure for each in judged), len(judged))


def _described(each: Judged) -> dict[str, Any]:
    said = {name: getattr(each, name) for name in ("answer", "best", "probability", "energy")}
    right = {"fair": sorted(each.labelled.fair), "right": each.is_right}
    return {"picture": each.labelled.file, **said, **right, "notes": list(each.notes)}


def text(found: dict[str, Any]) -> str:
    """Lay out figures as a table."""
    lines = [
        f"{found['n']:,} pictures: {found['lenient']['n']:,} of the classes, {found['others_sure']['n']:,} of none",
        _line("best answer fair (lenient)", found["lenient"]),
        _line("best answer is the class (strict)", found["strict"]),
        _line("sure answers: coverage", found["coverage"]),
        _line("sure answers: fair", found["precision"]),
        _line("sure answers where it is of no class", found["others_sure"]),
        "best answer fair, by class",
        *(_line(f"  {name}", each) for name, each in found["classes"].items() if each["n"]),
    ]
    for name, sides in found["columns"].items():
        lines += [f"best answer fair, by {one_line(name)}", *(_line(f"  {side}", each) for side, each in sides.items())]
    return "\n".join(lines)


def _line(name: str, each: dict[str, Any]) -> str:
    if not each["n"]:
        return f"{name:<38}  none"
    low, high = each["ci95"]
    counted = f"{each['count']:,} of {each['n']:,}"
    return f"{name:<38}  {each['share']:6.1%}  [{low:.1%}, {high:.1%}]  {counted}"
