"""Classify pictures of one's own: what predict.py and demo.py share.

model, info = checkpoint.load("best.pt")
me = candidate(Path("best.pt"), model, info)
answers = classify(me, [("shirt.jpg", explain(read("shirt.jpg")))])
print(answers[0].answer, answers[0].ranking[:3], answers[0].conversion.notes)
"""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

import data
import engine
import metrics
import recipes
from runtime import cli
from runtime.errors import UserError, one_line, printable
from runtime.files import read_json
from runtime.schema import Number, Text, problem
from training import record

if TYPE_CHECKING:
    from pictures.convert import Conversion  # loads PIL

SURE = 0.7  # below this probability the answer is "not sure", where no rule has been fitted
NOT_SURE = "not sure"
UNLIKE = "unlike all ten kinds"  # something else, or an object that was not found
WIDEST = 60  # characters of the table's first column
FORMULA = re.compile(r"(^|;)\s*(?=[=+@＝＋－＠-])")  # a spreadsheet computes what follows; it may split at ";"
LARGEST_RULE = 2**16  # bytes of its file


class Rule(NamedTuple):
    """When a model's answer counts."""

    temperature: float = 1.0  # divides the logits before they become probabilities
    probability: float = SURE  # least probability of a sure answer
    energy: float = -math.inf  # least energy of a sure answer
    unlike: float = -math.inf  # below this energy a picture is unlike the images of all classes


RULE = {  # what the file of a rule holds, as kinds of runtime/schema.py; analysis/rule.py writes it
    "checkpoint_sha256": Text(64),
    "temperature": Number(0.01, 100),
    "probability": Number(0, 1),
    "energy": Number(-1e6, 1e6),
    "unlike": Number(-1e6, 1e6),
    "measured": dict,  # what the fit measured, for the reader
}


class Candidate(NamedTuple):
    """A model to classify with."""

    name: str
    model: torch.nn.Module
    classes: Sequence[str]
    rule: Rule
    mirrored: bool  # answer by the mean over the picture and its mirrored view


class Classified(NamedTuple):
    """A picture with the classes that a model sees in it."""

    name: str
    conversion: "Conversion"
    ranking: list[tuple[str, float]]  # (class, probability), the most probable first
    energy: float = math.inf
    rule: Rule = Rule()

    @property
    def is_sure(self) -> bool:
        """Say whether the answer is a class."""
        return self.energy >= self.rule.energy and self.ranking[0][1] >= self.rule.probability

    @property
    def answer(self) -> str:
        """Return the most probable class, or by the rule UNLIKE or NOT_SURE."""
        if self.is_sure:
            return self.ranking[0][0]
        return UNLIKE if self.energy < self.rule.unlike else NOT_SURE


def candidate(path: Path, model: torch.nn.Module, info: dict[str, Any], name: str | None = None) -> Candidate:
    """Make a candidate of what checkpoint.load returned for a path; name: by default the path as a user types it.

    Its answers are the mean over two views if it was trained with mirrored images.
    """
    return Candidate(name or cli.shown(path), model, info["classes"], rule_of(path, info), is_mirrored(info))


def is_mirrored(info: dict[str, Any]) -> bool:
    """Say whether a network was trained with mirrored images, by its dict of checkpoint.load: no letter may be."""
    return bool("flags" in info and recipes.upgrade(info["flags"])["augment"].get("flip"))


def classify(candidate: Candidate, pictures: Sequence[tuple[str, "Conversion"]]) -> list[Classified]:
    """Classify pictures (name, conversion)."""
    if not pictures:
        return []
    views = logits_of(candidate, [conversion.pixels for _, conversion in pictures])
    ranked = zip(*(each(views, candidate.rule.temperature) for each in (probabilities, energy)), strict=True)
    return [
        Classified(name, conversion, _ranking(candidate.classes, row), float(each), candidate.rule)
        for (name, conversion), (row, each) in zip(pictures, ranked, strict=True)
    ]


def _ranking(classes: Sequence[str], row: np.ndarray) -> list[tuple[str, float]]:
    return sorted(zip(classes, map(float, row), strict=True), key=lambda pair: -pair[1])


def logits_of(candidate: Candidate, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Compute the logits float32 (n, 10) of images, uint8 (28, 28), and of their mirrored view if it counts."""
    split = as_split(candidate.model, images, candidate.classes)
    views = [split, split._replace(images=split.images.flip(2))] if candidate.mirrored else [split]
    return [engine.predict_logits(candidate.model, view) for view in views]


def probabilities(views: Sequence[torch.Tensor], temperature: float) -> np.ndarray:
    """Compute the mean over views of the probabilities of logits / temperature, float64 (n, 10)."""
    return np.mean([metrics.probabilities(logits, temperature) for logits in views], axis=0)


def energy(views: Sequence[torch.Tensor], temperature: float) -> np.ndarray:
    """Compute the mean over views of the energy of the logits, float64 (n,): high where images are as in training.

    It is T log sum exp(logits / T): Liu et al. 2020, arXiv:2010.03759, equation 4, without the minus sign.
    """
    return np.mean([temperature * (each.double() / temperature).logsumexp(1).numpy() for each in views], axis=0)


def as_split(model: torch.nn.Module, images: Sequence[np.ndarray], classes: Sequence[str]) -> data.Split:
    """Make a Split of images, uint8 (28, 28), on the model's device; its labels are all 0 and mean nothing."""
    device = next(model.parameters()).device
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    return data.Split("pictures", torch.from_numpy(np.stack(images)).to(device), labels, "pictures", tuple(classes))


def rule_path(path: str | Path) -> Path:
    """Return where the rule of X.pt lies: X.pictures.json beside it."""
    return Path(path).with_suffix(".pictures.json")


def read_rule(place: Path) -> tuple[str, Rule]:
    """Read the file of a rule: the checkpoint's SHA-256, and the rule. Raises UserError where the file is damaged."""
    content = read_json(place, LARGEST_RULE)
    wrong = problem(content, RULE) or ("unlike is above energy" if content["unlike"] > content["energy"] else "")
    if wrong:
        raise UserError(f"{cli.shown(place)} is no rule for pictures: {wrong}; restore it, or move it away")
    return content["checkpoint_sha256"], Rule(**{name: content[name] for name in Rule._fields})


def rule_of(path: Path, info: dict[str, Any]) -> Rule:
    """Return the rule that was fitted for a checkpoint, whose dict of checkpoint.load is info.

    If there is none, or the file is of another checkpoint, SURE and the temperature of the training count, and a line
    on stderr says so. Raises UserError where the file is damaged.
    """
    place, why = rule_path(path), "has no rule fitted to pictures"
    if place.exists():
        digest, rule = read_rule(place)
        if digest == info["sha256"]:
            return rule
        why = f"is not the checkpoint that {place.name} was fitted for"
    print(
        f"checkpoint: {cli.shown(path)} {why}: its answers are sure from a probability of {SURE:.0%}; "
        "docs/pictures.md says how to fit a rule",
        file=sys.stderr,
    )
    return Rule(temperature_of(path))


def temperature_of(path: Path) -> float:
    """Return the temperature, from 0.01 to 100, that calibrates a checkpoint's probabilities: its training fitted it.

    If there is none, the result is 1 and a line on stderr says so. Raises UserError where the history is damaged.
    """
    temperature = (record.history_of(path) or {}).get("temperature")
    if temperature is None:
        print(
            f"checkpoint: the probabilities of {cli.shown(path)} are not calibrated: its training held no images out, "
            "or no history of it is beside it",
            file=sys.stderr,
        )
    return temperature or 1.0


class Table:
    """Lay out answers as a table; the other forms have the same methods."""

    def __init__(self, top: int, names: Sequence[str], classes: Sequence[str]):
        """Prepare for pictures of these names; the first `top` classes of each are shown."""
        self.top = top
        self.name_width = min(max(len(one_line(name)) for name in names), WIDEST)
        self.answer_width = max(map(len, (NOT_SURE, UNLIKE, *classes)))

    def head(self) -> str:
        """Return the line above the answers; "" for none."""
        return f"{'picture':<{self.name_width}}  {'answer':<{self.answer_width}}  probabilities"

    def line(self, row: Classified) -> str:
        """Return the line of one answer."""
        most_probable = ", ".join(f"{name} {probability:.1%}" for name, probability in row.ranking[: self.top])
        notes = "".join(f"; {note}" for note in row.conversion.notes)
        return f"{one_line(row.name):<{self.name_width}}  {row.answer:<{self.answer_width}}  {most_probable}{notes}"


class Json(Table):
    """Lay out each answer as a JSON object."""

    def head(self) -> str:
        return ""

    def line(self, row: Classified) -> str:
        probabilities = dict(row.ranking[: self.top])
        said = {"picture": row.name, "answer": row.answer, "probabilities": probabilities, "energy": row.energy}
        return json.dumps(said | {"notes": list(row.conversion.notes)})


class Csv(Table):
    """Lay out answers as comma-separated values."""

    def head(self) -> str:
        numbers = range(1, self.top + 1)
        shown = (f"{kind} {k}" for k in numbers for kind in ("class", "probability"))
        return _as_csv("picture", "answer", *shown, "notes")

    def line(self, row: Classified) -> str:
        most_probable = (value for pair in row.ranking[: self.top] for value in pair)
        return _as_csv(row.name, row.answer, *most_probable, "; ".join(row.conversion.notes))


def _as_csv(*values: object) -> str:
    """Write a line, with texts in quotes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_cell(value) if isinstance(value, str) else value for value in values)
    return text.getvalue()


def _cell(text: str) -> str:
    """Escape what is not printable, and put an apostrophe before a formula, which makes it a text in a spreadsheet."""
    return FORMULA.sub(r"\g<0>'", printable(text))


FORMS = {"table": Table, "json": Json, "csv": Csv}
