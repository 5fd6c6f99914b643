"""Train a model on Fashion-MNIST; the best epoch is kept as checkpoints/best_<model>_fmnist.pt.

python train.py --model cnn                 # 55,000 images, best epoch chosen on 5,000 validation images
python train.py --model cnn --select test   # the published protocol: all 60,000, best epoch on the test set
python train.py --model cnn --recipe best   # the same network, trained longer; recipes.py has the values
python train.py --model resnet              # a deeper network: half an hour, or hours without bfloat16
python train.py --model cnn --recipe distilled --teacher T.pt   # learn from another network's answers too
python train.py --model cnn --set muon_lr=0.05 optimizer=muon shift=2   # other values of the recipe
python train.py --model cnn --fold 2/5      # hold out the second fifth of the training images; no test set
python train.py --model cnn --resume        # continue a run that was cut off, to the same bits
torchrun --nproc-per-node=2 --max-restarts=3 train.py --model cnn   # in two processes, resumed when one fails
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes
from runtime import cli, files
from runtime.errors import UserError


def parse_args(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags; their names are the fields of training.run.Request."""
    parser = cli.Parser("Train a classifier on Fashion-MNIST.")
    parser.add_argument("--model", required=True, help="mlp, cnn, resnet, or any other name in models.py")
    add_recipe(parser)
    parser.add_argument("--seed", type=cli.whole_number(0, 2**32 - 1), help="decides every random draw (default: 0)")
    parser.add_argument(
        "--select",
        choices=recipes.SELECTIONS,
        help="what chooses the epoch that is kept: 5,000 held-out training images (val, the default of published and "
        "robust), the test set itself, as published (test), or nothing: it trains on all 60,000 images and keeps the "
        "last epoch (last, the default of the other recipes)",
    )
    parser.add_argument(
        "--fold",
        metavar="K/N",
        help="hold out the Kth of N parts of the training images, and measure on them: the test set is not used. "
        "1/5 to 5/5 are five stratified folds, the same every time; val is the 5,000 validation images. --select test "
        "means the held-out images then",
    )
    parser.add_argument("--deterministic", action="store_true", help="refuse GPU operations that vary from run to run")
    add_record(parser)
    cli.add_common(parser)
    return vars(parser.parse_args(argv))


def add_recipe(parser: cli.Parser) -> None:
    """Add the flags that choose or change a recipe."""
    parser.add_argument(
        "--recipe",
        choices=recipes.RECIPES,
        help="how to train, a row of recipes.py (default: published; of resnet: best). fast takes the least time. best "
        "reaches the highest accuracy, in minutes; of resnet in half an hour, or hours where the processor has no "
        "bfloat16. robust is for photos. distilled learns from the answers of a --teacher",
    )
    parser.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        nargs="+",
        type=Path,
        help="for --recipe distilled: whose answers to learn from; of several, their mean",
    )
    cli.add_normalisation(parser, "a bare state_dict as --teacher")
    parser.add_argument(
        "--epochs", type=cli.whole_number(1, 10_000), help="passes over the images (default: the recipe's)"
    )
    parser.add_argument(
        "--lr",
        type=cli.positive_number,
        help="learning rate of Adam, or of Muon where the recipe uses it (default: the recipe's)",
    )
    parser.add_argument(
        "--batch-size",
        type=cli.whole_number(1, 60_000),
        help="images a step, in all processes together (default: the recipe's)",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="other values of the recipe: any field of Recipe in recipes.py, or an augmentation of data.py: "
        "muon_lr=0.05 (Muon's rate; lr is Adam's), label_smoothing=0.1, shift=2, shift=[1,0.3], flip=false",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the matrix products: auto is bfloat16 where the processor multiplies it natively, else float32 "
        "(default: the recipe's: auto, but float32 for published and for fast of mlp and cnn); float16 is for GPUs",
    )


def add_record(parser: cli.Parser) -> None:
    """Add the flags that say what is written, and whether a run is resumed."""
    parser.add_argument(
        "--checkpoint-dir",
        metavar="DIR",
        type=Path,
        default=cli.CHECKPOINTS,
        help="where to write (default: checkpoints)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the unfinished run of this model there, with the flags it began with; if there is none, begin "
        "one",
    )
    parser.add_argument(
        "--save-every",
        metavar="SECONDS",
        type=cli.positive_number,
        default=30.0,
        help="the most work that a crash may cost (default: 30)",
    )
    parser.add_argument("--tensorboard", metavar="DIR", type=Path, help="write TensorBoard scalars below DIR")


def main(argv: Sequence[str] | None = None) -> int:
    """Train by the flags. Returns the exit code."""
    flags = parse_args(argv)
    if flags["tensorboard"] and not importlib.util.find_spec("tensorboard"):
        raise UserError(f"--tensorboard needs the package: {cli.install()}")
    if flags["tensorboard"]:
        files.check_folder(flags["tensorboard"])
    with cli.loading():  # only now: PyTorch takes seconds, and --help or a mistyped flag should not wait for it
        import data
        from training import run, settings

    data.check_augmentations(recipes.RECIPES)
    flags["settings"] = settings.parse(flags["settings"])
    return run.run(run.Request(**flags))


if __name__ == "__main__":
    cli.run(main)
