"""Classify pictures of one's own: what predict.py and demo.py share.

answers = classify(model, [("shirt.jpg", pixels)], temperature_of("best.pt"), info["classes"])
print(answers[0].answer, answers[0].ranking[:3])
"""

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import engine
import metrics
from runtime import cli
from runtime.errors import one_line, printable
from training import record

SURE = 0.7  # below this probability the answer is "not sure"
NOT_SURE = "not sure"
WIDEST = 60  # characters of the table's first column
FORMULA = re.compile(r"(^|;)\s*(?=[=+@＝＋－＠-])")  # a spreadsheet computes what follows; it may split at ";"


class Candidate(NamedTuple):
    """A model to classify with."""

    name: str
    model: torch.nn.Module
    temperature: float  # that calibrates its probabilities


class Classified(NamedTuple):
    """A picture with the classes that a model sees in it."""

    name: str
    pixels: np.ndarray  # uint8 (28, 28)
    ranking: list[tuple[str, float]]  # (class, probability), the most probable first

    @property
    def answer(self) -> str:
        """Return the most probable class, or "not sure" if its probability is below SURE."""
        best, probability = self.ranking[0]
        return best if probability >= SURE else NOT_SURE


def classify(
    model: torch.nn.Module, pictures: Sequence[tuple[str, np.ndarray]], temperature: float, classes: Sequence[str]
) -> list[Classified]:
    """Classify pictures (name, uint8 (28, 28)); the logits are divided by the temperature."""
    if not pictures:
        return []
    split = as_split(model, [pixels for _, pixels in pictures], classes)
    probabilities = metrics.probabilities(engine.predict_logits(model, split), temperature)
    return [
        Classified(name, pixels, sorted(zip(classes, map(float, row), strict=True), key=lambda pair: -pair[1]))
        for (name, pixels), row in zip(pictures, probabilities, strict=True)
    ]


def as_split(model: torch.nn.Module, images: Sequence[np.ndarray], classes: Sequence[str]) -> data.Split:
    """Make a Split of images, uint8 (28, 28), on the model's device; its labels are all 0 and mean nothing."""
    device = next(model.parameters()).device
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    return data.Split("pictures", torch.from_numpy(np.stack(images)).to(device), labels, "pictures", tuple(classes))


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
        self.answer_width = max(map(len, (NOT_SURE, *classes)))

    def head(self) -> str:
        """Return the line above the answers; "" for none."""
        return f"{'picture':<{self.name_width}}  {'answer':<{self.answer_width}}  probabilities"

    def line(self, row: Classified) -> str:
        """Return the line of one answer."""
        most_probable = ", ".join(f"{name} {probability:.1%}" for name, probability in row.ranking[: self.top])
        return f"{one_line(row.name):<{self.name_width}}  {row.answer:<{self.answer_width}}  {most_probable}"


class Json(Table):
    """Lay out each answer as a JSON object."""

    def head(self) -> str:
        return ""

    def line(self, row: Classified) -> str:
        probabilities = dict(row.ranking[: self.top])
        return json.dumps({"picture": row.name, "answer": row.answer, "probabilities": probabilities})


class Csv(Table):
    """Lay out answers as comma-separated values."""

    def head(self) -> str:
        numbers = range(1, self.top + 1)
        return _as_csv("picture", "answer", *(f"{kind} {k}" for k in numbers for kind in ("class", "probability")))

    def line(self, row: Classified) -> str:
        return _as_csv(row.name, row.answer, *(value for pair in row.ranking[: self.top] for value in pair))


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
