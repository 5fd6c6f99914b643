"""TensorBoard: the figures of each epoch, the hyperparameters, and what the run came to.

runs = board.Board(Path("boards"), record.history)
runs.write(row)       # after each epoch
runs.close(history)   # with the result, if there is one
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data
import recipes
from training import command, settings

LONGEST = 180  # characters of a run's name, before the time; a folder's name may have 255
SPEED = ("seconds", "images_per_second")


class Board:
    """Scalars in a new folder below --tensorboard, from the first epoch on; without a folder, nothing.

    TensorBoard sorts tags by name: loss comes first.
    """

    def __init__(self, folder: Path | None, history: Mapping[str, Any]):
        self.writer: Any = None
        if not folder:
            return
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        flags = recipes.upgrade(history["flags"])
        self.selection, self.measured = recipes.selection(flags).name, recipes.measured_on(flags)
        self.writer = SummaryWriter(folder / f"{name(history)}-{time.strftime('%Y%m%d-%H%M%S')}")
        self._write_parameters(flags | {"model": history["model"], "seed": history["seed"]})
        for row in history["epochs"]:
            self.write(row)

    def _write_parameters(self, flags: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        results = {self._result(kind): 0.0 for kind in ("loss", "accuracy")}
        experiment, start, self.end = hparams(flat(flags), results)
        for summary in (experiment, start):
            self.writer.file_writer.add_summary(summary)

    def _result(self, kind: str) -> str:
        return f"result/{kind}_{self.measured}"

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the figures of an epoch."""
        if not self.writer:
            return
        for key in row.keys() - {"epoch"}:
            side, _, kind = key.partition("_")
            side = self.selection if side == "select" else side
            tag = f"speed/{key}" if key in SPEED else f"loss/{side}" if kind == "loss" else f"metrics/{kind}_{side}"
            self.writer.add_scalar(tag, row[key], row["epoch"])

    def close(self, history: Mapping[str, Any]) -> None:
        """Write the result, if the run has one, and what is left."""
        if not self.writer:
            return
        if test := history["test"]:
            for kind in ("loss", "accuracy"):
                self.writer.add_scalar(self._result(kind), test[kind], len(history["epochs"]))
            self.writer.file_writer.add_summary(self.end)
        self.writer.close()


def name(history: Mapping[str, Any]) -> str:
    """Name a run by its model, its recipe, what differs from the recipe's row, and its seed."""
    flags = recipes.upgrade(history["flags"])
    words = [history["model"], flags["recipe"]]
    words += [settings.written(*each) for each in command.differences(history["model"], flags).items()]
    words += [f"fold={recipes.fold_name(flags['fold'])}"] if flags["fold"] else []
    words += ["taught"] if flags["teachers"] else []
    return "-".join([*words, f"seed={history['seed']}"]).replace("/", "_")[:LONGEST]


def flat(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Write flags as TensorBoard takes hyperparameters: numbers, texts and truths, each augmentation by its name."""
    values = {key: value for key, value in flags.items() if key not in ("augment", "teachers")}
    augment = dict.fromkeys(data.AUGMENTATIONS, False) | flags["augment"]
    values |= {name: str(value) if isinstance(value, list) else value for name, value in augment.items()}
    values["teachers"] = ", ".join(teacher["checkpoint"] for teacher in flags["teachers"]) or None
    return {key: "none" if value is None else value for key, value in values.items()}
