"""The recipes: every value that a training depends on, in one table. A new recipe is one row.

recipe = recipes.find("fast", "cnn")
"""

import json
from typing import Any, NamedTuple

from runtime.errors import UserError
from runtime.schema import Number, Text


class Recipe(NamedTuple):
    """How to train. The defaults are those of the published protocol."""

    epochs: int
    batch_size: int = 128
    optimizer: str = "adam"  # or "muon": Muon for the large matrices, Adam for everything else
    lr: float = 1e-3  # of Adam
    muon_lr: float = 0.0
    weight_decay: float = 0.0  # decoupled, of the large matrices only, as a share per step of Muon's learning rate
    warmup: float | None = None  # share of the steps in which the learning rates rise; they fall to 0 in the rest
    dropout: float | None = None  # None keeps the model's own
    # Unless 0, the first layer gets whitened images. For a convolution: what is added to the variances (models.whiten);
    # for a linear layer: the most variance that is left (optim.WhitenedInputs).
    whiten: float = 0.0
    loss: str = "cross_entropy"  # a function of engine.py
    label_smoothing: float = 0.0
    augment: dict = {}  # noqa: RUF012 - functions of data.py and their values; never changed in place
    prune: float = 0.0  # leave out, anew in each epoch, this share of the images with less than the mean loss
    distillation: float = 0.0  # share of the loss that is the distance from the teachers' answers
    temperature: float = 1.0  # of both answers in that distance
    select: str = "val"  # what chooses the epoch that is kept: a key of SELECTIONS
    precision: str = "float32"  # or "auto": bfloat16 where the processor multiplies it natively
    fused: bool = False  # use the compiled kernels of runtime/, whose rounding differs from PyTorch's


ROBUST = {  # the first value is a share of the images
    "flip": 0.5,
    "warp": [0.5, 30, 0.2, 4],
    "light": [0.3, 0.5],
    "clutter": [0.1, 6],
    "veil": [0.1, 0.3],
    "erase": [12, 0.3],
    "blur": [0.25, 2.0],
    "fade": [0.25, 0.2],
    "noise": [0.25, 0.26],
}
GENTLER = ROBUST | {  # the same changes of half as many images, which costs less accuracy
    "warp": [0.25, 30, 0.2, 4],
    "light": [0.15, 0.5],
    "clutter": [0.05, 6],
    "veil": [0.05, 0.3],
    "erase": [12, 0.15],
    "blur": [0.125, 2.0],
    "fade": [0.125, 0.2],
    "noise": [0.125, 0.26],
}

RECIPES: dict[str, dict[str, Recipe]] = {
    # The published protocol. Its values never change.
    "published": {
        "mlp": Recipe(epochs=5, fused=True),
        "cnn": Recipe(epochs=15, fused=True),
    },
    # The least time to the published test accuracy: 87.14% and 91.82%. Of the ResNet, five epochs.
    "fast": {
        "mlp": Recipe(
            epochs=1, batch_size=1280, optimizer="muon", lr=0.05, muon_lr=0.2, warmup=0.0, whiten=4.0, select="last",
            fused=True,
        ),
        "cnn": Recipe(
            epochs=1, batch_size=192, optimizer="muon", lr=3e-3, muon_lr=0.05, warmup=0.0, dropout=0.0, whiten=0.1,
            label_smoothing=0.1, select="last", fused=True,
        ),
        "resnet": Recipe(
            epochs=5, batch_size=256, optimizer="muon", lr=1e-2, muon_lr=0.06, warmup=0.2, label_smoothing=0.1,
            augment={"flip": 0.5, "shift": 1}, select="last", precision="auto",
        ),
    },
    # The highest accuracy within ten minutes on two cores. The ResNet takes half an hour, in float32 hours.
    "best": {
        "mlp": Recipe(
            epochs=900, batch_size=1024, optimizer="muon", lr=3e-3, muon_lr=0.05, warmup=0.3, label_smoothing=0.05,
            augment={"flip": 0.5, "shift": 1, "erase": 6}, select="last", precision="auto", fused=True,
        ),
        "cnn": Recipe(
            epochs=100, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.03, warmup=0.3, label_smoothing=0.1,
            augment={"flip": 0.5, "shift": 1}, select="last", precision="auto", fused=True,
        ),
        "resnet": Recipe(
            epochs=65, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.04, warmup=0.2, label_smoothing=0.1,
            augment={"flip": 0.5, "shift": 2, "erase": 12}, prune=0.7, select="last", precision="auto",
        ),
    },
    # The same networks, taught by others: --teacher.
    "distilled": {
        "mlp": Recipe(
            epochs=900, batch_size=1024, optimizer="muon", lr=3e-3, muon_lr=0.05, weight_decay=0.05, warmup=0.3,
            augment={"flip": 0.5, "shift": [1, 0.3]}, distillation=0.5, select="last", precision="auto", fused=True,
        ),
        "cnn": Recipe(
            epochs=100, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.03, warmup=0.3,
            augment={"flip": 0.5, "shift": 1}, distillation=0.5, select="last", precision="auto", fused=True,
        ),
    },
    # Trained for the world outside: what photos, their conversion and the corruptions of docs/mistakes.md do to images.
    "robust": {
        "cnn": Recipe(
            epochs=100, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.03, warmup=0.3, precision="auto",
            augment=ROBUST, fused=True,
        ),
        "resnet": Recipe(
            epochs=65, batch_size=256, optimizer="muon", lr=5e-3, muon_lr=0.04, warmup=0.2, precision="auto",
            augment=GENTLER, prune=0.7,
        ),
    },
}  # fmt: skip

PUBLISHED = {"mlp": 0.8714, "cnn": 0.9182}  # test accuracy of the published protocol, which selects on the test set
DEFAULTS = {"mlp": "published", "cnn": "published", "resnet": "best"}  # the recipe of a model where none is asked for
FALLBACK = "cnn"  # a model without its own row is trained by the row of this one


class Selection(NamedTuple):
    """What chooses the epoch that is kept, in words."""

    name: str  # of the figures that it makes, in a table of epochs
    images: str  # the split that chooses, "" where nothing does
    chosen: str  # on what, for a table
    rule: str  # for the first line of a run; {epochs}, such as "5 epochs", and {n} are to be filled in
    measured: str  # what this means for the test accuracy


SELECTIONS = {
    "val": Selection(
        "val",
        "validation",
        "5,000 validation images",
        "best of {epochs}, chosen on {n:,} validation images",
        "measured once, after training",
    ),
    "test": Selection(
        "test",
        "test",
        "the test set, as published",
        "best of {epochs}, chosen on {n:,} test images as published: an optimistic protocol",
        "the best epoch was chosen on these very images",
    ),
    "last": Selection(
        "",
        "",
        "nothing: the last",
        "the network after {epochs} is kept",
        "measured once, after training",
    ),
}
HELD_OUT = Selection(  # "test" in a fold run, whose held-out images take the place of the test set
    "held-out",
    "held-out",
    "the held-out images",
    "best of {epochs}, chosen on the {n:,} held-out images: an optimistic protocol",
    "the best epoch was chosen on these very images",
)

SHARE = Number(0, 1)
SETTING = (bool, Number(-1000, 1000), Text())  # of an augmentation
RANGES: dict[str, Any] = {  # of a recipe's values; a field without one here is of its type
    "epochs": Number(1, 10_000, whole=True),
    "batch_size": Number(1, 10**6, whole=True),
    "optimizer": Text(),
    **dict.fromkeys(("lr", "muon_lr", "weight_decay"), Number(0, 1e38)),  # as float32 holds
    **dict.fromkeys(("warmup", "dropout"), (SHARE, None)),
    "whiten": Number(0, 1e6),
    "loss": Text(),
    "label_smoothing": SHARE,
    "augment": {str: (*SETTING, [SETTING])},
    "prune": Number(0, 0.999),
    "distillation": SHARE,
    "temperature": Number(0.001, 1000),
    "select": tuple(SELECTIONS),
    "precision": ("auto", "float32", "bfloat16", "float16"),
}
TEACHER = {"checkpoint": Text(4096), "sha256": Text(), "model": Text(), "select": (*SELECTIONS, None)}
NORMALISED = {"mean": Number(), "std": Number(1e-30)}
FLAGS: dict[str, Any] = {  # what a run records of how it was trained: kinds of runtime/schema.py
    "recipe": Text(),
    **(Recipe.__annotations__ | RANGES),
    "deterministic": bool,
    "teachers": [(TEACHER | NORMALISED, TEACHER)],  # the latter of earlier versions
    "fold": (Text(20), None),  # the training images held out: "2/5", the second fold of five, or "val"; see fold_of
}


def default(model: str) -> str:
    """Return the name of the recipe for a model where none is asked for.

    It is that of DEFAULTS; for another model its only recipe, or the published one where it has none.
    Raises UserError where it has several, so that the user must choose.
    """
    own = [name for name, rows in RECIPES.items() if model in rows]
    if model in DEFAULTS or not own:
        return DEFAULTS.get(model, "published")
    if len(own) > 1:
        raise UserError(f"--recipe: {model} has the recipes {', '.join(own)}: choose one, or add {model} to DEFAULTS")
    return own[0]


def find(name: str, model: str) -> Recipe:
    """Return the row of a recipe for a model; a model that has none there gets that of FALLBACK, without whitening.

    Raises UserError where there is neither.
    """
    rows = RECIPES[name]
    if not has_row(name, model):
        raise UserError(f"recipe {name} has no row for {model}; it has {', '.join(rows)}")
    return rows.get(model) or rows[FALLBACK]._replace(whiten=0.0)  # its first layer may be anything


def has_row(name: str, model: str) -> bool:
    """Say whether find has a row for a model. A recipe that is not in the table has none."""
    return bool(RECIPES.get(name, {}).keys() & {model, FALLBACK})


def fold_of(name: str) -> tuple[int, int] | None:
    """Read the name of a fold: (2, 5) of "2/5", the second of five; None of "val", the validation images.

    Raises UserError for any other text.
    """
    if name == "val":
        return None
    words = name.split("/")
    if len(words) == 2 and all(word.isascii() and word.isdigit() and len(word) < 8 for word in words):
        number, count = map(int, words)
        if 1 <= number <= count and count > 1:
            return number, count
    raise UserError(f"--fold {name[:40]!r}: write K/N, fold K of N, such as 1/5 to 5/5, or val")


def selection(flags: dict[str, Any]) -> Selection:
    """Return what chose the epoch of a run, in words. flags: of upgrade."""
    return HELD_OUT if flags["fold"] and flags["select"] == "test" else SELECTIONS[flags["select"]]


def fold_name(fold: str) -> str:
    """Write a fold as a part of a file's name: "2of5"."""
    return fold.replace("/", "of")


def measured_on(flags: dict[str, Any]) -> str:
    """Name the images that a run was measured on: "test", or "held-out" for a fold. flags: of upgrade."""
    return "held-out" if flags["fold"] else "test"


def upgrade(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of a run, as any earlier version recorded them, in today's form.

    What was not recorded yet had the value that is the default today. Augmentations had keys of their own.
    """
    usual: dict[str, Any] = {"recipe": "published", "deterministic": False, "teachers": [], "fold": None}
    flags = Recipe._field_defaults | usual | flags
    flags["teachers"] = [{"mean": 0.5, "std": 0.5} | teacher for teacher in flags["teachers"]]
    flip, shift, still, erase = (flags.pop(key, 0) for key in ("flip", "shift", "still", "erase"))
    old = {"flip": 0.5 * bool(flip), "shift": [shift, still] if still else shift, "erase": erase}
    return flags | {"augment": flags["augment"] | {name: value for name, value in old.items() if value}}


def setting(flags: dict[str, Any]) -> str:
    """Write down what two runs of one setting have in common: every flag, and of the teachers what they answer by.

    flags: of upgrade. Runs of one setting may differ in their seed, and belong together if their data are equal too.
    """
    teachers = [[teacher[key] for key in ("sha256", "mean", "std")] for teacher in flags["teachers"]]
    return json.dumps(flags | {"teachers": teachers}, sort_keys=True)
