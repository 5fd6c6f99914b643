"""The recipes: every value that a training run hangs on, in one table.

recipe = recipes.find("fast", "cnn")
"""

from typing import NamedTuple


class Recipe(NamedTuple):
    """How to train. Defaults are those of the published protocol."""

    epochs: int
    batch_size: int = 128
    optimizer: str = "adam"  # or "muon": Muon for the large matrices, Adam for everything else
    lr: float = 1e-3  # of Adam
    muon_lr: float = 0.0
    weight_decay: float = 0.0  # decoupled, of the large matrices only, as a share per step of Muon's learning rate
    warmup: float | None = None  # share of the steps in which the learning rates rise, to fall to 0 in the rest
    dropout: float | None = None  # None leaves the model's own
    label_smoothing: float = 0.0
    flip: bool = False  # mirror half of the images, others each epoch
    shift: int = 0  # move by up to so many pixels, up or down and left or right
    still: float = 0.0  # share of the images that are not moved
    erase: int = 0  # blacken a square of so many pixels a side
    prune: float = 0.0  # leave out, anew in each epoch, this share of the images with less than the mean loss
    distillation: float = 0.0  # share of the loss that is the distance from the teachers' answers
    temperature: float = 1.0  # of both answers in that distance
    select: str = "val"  # what chooses the epoch that is kept: "val", "test", or "last" (train on all, keep the last)
    precision: str = "float32"  # or "auto": bfloat16 where the processor multiplies it natively
    fused: bool = False  # with the kernels of kernels.c, whose rounding differs from PyTorch's


RECIPES = {
    # The published protocol, in bits that never change.
    "published": {
        "mlp": Recipe(epochs=5),
        "cnn": Recipe(epochs=15),
    },
    # The least time to the published test accuracy: 87.14% and 91.82%.
    "fast": {
        "mlp": Recipe(
            epochs=3, batch_size=1024, optimizer="muon", lr=2e-2, muon_lr=0.1, warmup=0.1,
            select="last", precision="auto", fused=True,
        ),
        "cnn": Recipe(
            epochs=2, batch_size=384, optimizer="muon", lr=2e-2, muon_lr=0.07, warmup=0.15, dropout=0.0,
            label_smoothing=0.05, select="last", precision="auto", fused=True,
        ),
    },
    # The highest accuracy within ten minutes on two cores; the ResNet takes half an hour, or in float32 hours.
    "best": {
        "mlp": Recipe(
            epochs=900, batch_size=1024, optimizer="muon", lr=3e-3, muon_lr=0.05, warmup=0.3, label_smoothing=0.05,
            flip=True, shift=1, erase=6, select="last", precision="auto", fused=True,
        ),
        "cnn": Recipe(
            epochs=100, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.03, warmup=0.3, label_smoothing=0.1,
            flip=True, shift=1, select="last", precision="auto", fused=True,
        ),
        "resnet": Recipe(
            epochs=65, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.04, warmup=0.2, label_smoothing=0.1,
            flip=True, shift=2, erase=12, prune=0.7, select="last", precision="auto",
        ),
    },
    # The same networks taught by others: --teacher.
    "distilled": {
        "mlp": Recipe(
            epochs=900, batch_size=1024, optimizer="muon", lr=3e-3, muon_lr=0.05, weight_decay=0.05, warmup=0.3,
            flip=True, shift=1, still=0.3, distillation=0.5, select="last", precision="auto", fused=True,
        ),
        "cnn": Recipe(
            epochs=100, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.03, warmup=0.3,
            flip=True, shift=1, distillation=0.5, select="last", precision="auto", fused=True,
        ),
    },
}  # fmt: skip


def default(model):
    """The name of the recipe a model is trained by where none is asked for: its first, or else the published one."""
    return next((name for name, rows in RECIPES.items() if model in rows), "published")


def find(name, model):
    """The recipe of that name for the model; a model without one of its own is trained as the CNN."""
    return RECIPES[name].get(model, RECIPES[name]["cnn"])
