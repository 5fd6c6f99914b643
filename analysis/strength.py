"""Train the CNN by recipe `robust` with its augmentation at several strengths, to show what that costs and brings.

python -m analysis.strength      # about 12 minutes on one core; a repeated command trains what is missing

It trains on 40,000 of the training images and measures on the other 20,000, never on the test set. The numbers go to
runs/strength.json and the curve to docs/figures/strength.png.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import data
import engine
import metrics
import models
import recipes
from analysis import corruptions, plots
from recipes import SHARE
from runtime import cli, files
from runtime.errors import UserError
from runtime.schema import Number, problem

PROGRAM = "python -m analysis.strength"
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
EPOCHS = 20
HELD_OUT = 20_000  # images that measure
CORRUPTED = 5_000  # of these, in each of the 30 versions of analysis/corruptions.py
RESULTS = cli.ROOT / "runs" / "strength.json"
ROW = {
    "strength": Number(0),
    "augment": dict,
    "epochs": Number(1),
    **dict.fromkeys(("plain", "mirrored", "corrupted"), SHARE),
}
FIGURE = cli.ROOT / "docs" / "figures" / "strength.png"


def scaled(augment: dict[str, Any], strength: float) -> dict[str, Any]:
    """Multiply the share of the images that each augmentation changes, up to all; mirroring stays as it is."""
    result = {}
    for name, value in augment.items():
        values = list(value) if isinstance(value, list) else [value]
        place = 1 if name == "erase" else 0  # of the share among the values
        values[place] = values[place] if name == "flip" else min(1.0, values[place] * strength)
        if values[place]:
            result[name] = values if isinstance(value, list) else values[0]
    return result


def measure(train: data.Split, recipe: recipes.Recipe) -> dict[str, float]:
    """Train on all images but HELD_OUT, and return the accuracies on these: as they are, mirrored and corrupted."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(train.labels)))
    held_out, used, few = order[:HELD_OUT], order[HELD_OUT:], order[:CORRUPTED]
    parts = [train._replace(images=train.images[index], labels=train.labels[index]) for index in (used, held_out, few)]
    torch.manual_seed(*data.derive_seeds(0))
    model = models.build("cnn")
    engine.give_kernels(model, recipe.fused)
    for _ in tqdm(engine.Training(model, parts[0], None, recipe, seed=0).run(), total=recipe.epochs, unit=" epochs"):
        pass
    mirrored = parts[1]._replace(images=parts[1].images.flip(2))
    plain, turned = (metrics.accuracy(engine.predict_logits(model, part), part.labels) for part in (parts[1], mirrored))
    harder = [accuracy for kind in corruptions.accuracies(model, parts[2]).values() for accuracy in kind]
    return {"plain": plain, "mirrored": turned, "corrupted": sum(harder) / len(harder)}


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, write the numbers and draw them."""
    parser = cli.Parser("Train recipe robust at several strengths, and draw what that costs and brings.")
    parser.prog = PROGRAM
    cli.add_data_dir(parser, other=False)
    args: argparse.Namespace = parser.parse_args(argv)
    (train,) = data.load("train+val", data_dir=args.data_dir)
    recipe = recipes.find("robust", "cnn")._replace(epochs=EPOCHS, select="last", precision="float32")
    rows = files.read_json(RESULTS, 2**20) if RESULTS.exists() else []
    if wrong := problem(rows, [ROW]):
        raise UserError(f"{cli.shown(RESULTS)}: {wrong}; restore it, or move it away")
    for strength in STRENGTHS:
        asked = recipe._replace(augment=scaled(recipe.augment, strength))
        found = next((row for row in rows if row["strength"] == strength), None)
        if not found or found["augment"] != asked.augment:
            row = {"strength": strength, "augment": asked.augment, "epochs": EPOCHS, **measure(train, asked)}
            rows = sorted([row, *(row for row in rows if row is not found)], key=lambda row: row["strength"])
            files.write_atomically(RESULTS, json.dumps(rows, indent=1).encode())
    for row in rows:
        print(
            "strength {strength}: plain {plain:.2%}, mirrored {mirrored:.2%}, corrupted {corrupted:.2%}".format(**row)
        )
    files.write_atomically(FIGURE, plots.png(plots.strength(rows)))
    return 0


if __name__ == "__main__":
    cli.run(main, PROGRAM)
