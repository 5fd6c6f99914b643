"""Train a model on Fashion-MNIST; the best epoch is kept as checkpoints/best_<model>_fmnist.pt.

python train.py --model cnn                 # 55,000 images, best epoch chosen on 5,000 validation images
python train.py --model cnn --select test   # the published protocol: all 60,000, best epoch on the test set
python train.py --model cnn --recipe best   # or fast: the same network, trained as recipes.py says
"""

import importlib.util
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import cli

SELECTION = {
    "val": "best of {epochs} epochs chosen on {n:,} validation images",
    "test": "best of {epochs} epochs chosen on {n:,} test images, as published: an optimistic protocol",
    "last": "the last of {epochs} epochs is kept",
}
MEASURED = {
    "val": "measured once, after training",
    "test": "the best epoch was chosen on these very images",
    "last": "measured once, after training",
}


def parse_args(argv=None):
    parser = cli.Parser("Train a classifier on Fashion-MNIST.")
    parser.add_argument("--model", required=True, help="mlp, cnn, or any other name in models.py")
    parser.add_argument(
        "--recipe",
        choices=("published", "fast", "best"),
        default="published",
        help="how to train, a row of recipes.py: as published (default), in the least time to the published accuracy "
        "(fast), or to the highest accuracy in ten minutes (best)",
    )
    parser.add_argument(
        "--epochs", type=cli.whole_number(1, 10_000), help="passes over the images (default: the recipe's)"
    )
    parser.add_argument(
        "--lr",
        type=cli.positive_number,
        help="learning rate of Adam, or of Muon with fast and best (default: the recipe's)",
    )
    parser.add_argument("--batch-size", type=cli.whole_number(1, 60_000), help="images a step (default: the recipe's)")
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0, 2**32 - 1),
        default=0,
        help="decides every random draw (default: %(default)s)",
    )
    parser.add_argument(
        "--select",
        choices=SELECTION,
        help="what chooses the epoch that is kept: 5,000 training images held out (val, the default of published), the "
        "test set itself, as published (test), or nothing: all 60,000 are trained on and the last epoch is kept (last, "
        "the default of fast and best)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the matrix products: auto is bfloat16 where the processor multiplies it natively, else float32 "
        "(default: the recipe's: float32 as published, else auto); float16 is for GPUs",
    )
    parser.add_argument(
        "--checkpoint-dir",
        metavar="DIR",
        type=Path,
        default=cli.CHECKPOINTS,
        help="where to write (default: checkpoints)",
    )
    parser.add_argument("--tensorboard", metavar="DIR", type=Path, help="write TensorBoard scalars below DIR")
    parser.add_argument("--deterministic", action="store_true", help="refuse GPU operations that vary from run to run")
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    # Imported only now: PyTorch takes seconds, and --help or a mistyped flag should not wait for it.
    import torch
    from tqdm import tqdm

    import data
    import engine
    import kernels
    import models
    from record import Record, history_path

    if args.model not in models.MODELS:
        raise data.UserError(f"--model {args.model}: the models here are {', '.join(models.MODELS)}")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise data.UserError("--tensorboard needs the package: pip install -r requirements-optional.txt")
    recipe = chosen_recipe(args)
    device = engine.pick_device(args.device)
    precision = engine.pick_precision(recipe.precision, device)
    engine.keep_freed_memory()
    if args.deterministic:
        engine.make_deterministic()
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.checkpoint_dir).close()  # now, not after an epoch, if it cannot be written
    if recipe.fused and device.type == "cpu" and (reason := kernels.load()):
        print(f"train.py: {reason}; training goes on with PyTorch's own operations, more slowly", file=sys.stderr)

    names = ("train", "val", "test") if recipe.select == "val" else ("train+val", "test")
    train, *_, test = splits = [split.to(device) for split in data.load(*names, data_dir=args.data_dir)]
    select = None if recipe.select == "last" else splits[1]  # in the published protocol, the test set itself
    torch.manual_seed(*data.derive_seeds(args.seed))
    model = models.build(args.model).to(device)
    chosen = SELECTION[recipe.select].format(epochs=recipe.epochs, n=len(splits[1].labels))
    print(
        f"{args.model}, recipe {args.recipe}: {models.count_parameters(model):,} parameters on {device} in "
        f"{cli.plain(precision)}, seed {args.seed}; {len(train.labels):,} training images; {chosen}",
        flush=True,
    )
    record = Record(
        args.checkpoint_dir / f"best_{args.model}_fmnist.pt",
        model=args.model,
        seed=args.seed,
        flags={
            "recipe": args.recipe,
            **recipe._asdict(),
            "precision": cli.plain(precision),
            "deterministic": args.deterministic,
        },
        data=train.source,
        train_images=len(train.labels),
        select_images=len(select.labels) if select else 0,
        device=str(device),
    )
    writer = open_tensorboard(args)
    bar = tqdm(
        total=recipe.epochs * len(train.labels),
        disable=None,  # where stderr is no terminal
        dynamic_ncols=True,
        bar_format="{desc} |{bar}| {percentage:3.0f}%  {rate_fmt}  ETA {remaining}",
        unit=" images",
        unit_scale=True,
    )

    def progress(epoch, images, loss, accuracy):
        bar.set_description_str(f"epoch {epoch}/{recipe.epochs}  loss {loss:.4f}  acc {accuracy:.2%}", refresh=False)
        bar.update(images)

    def say(line):
        tqdm.write(line)  # above the bar
        sys.stdout.flush()

    status = "failed"
    try:
        say(header(recipe))
        for row in engine.fit(model, train, select, recipe, seed=args.seed, precision=precision, progress=progress):
            is_best = record.add_epoch(model, row)
            if row["epoch"] == 1 and record.kept:
                say(f"      the earlier {record.path.stem}{record.kept.suffix} is kept as {cli.shown(record.kept)}")
            say(
                table_line(row, record.history["training_seconds"], recipe.epochs)
                + " best" * (is_best and select is not None)
            )
            if writer:
                for key in row.keys() - {"epoch"}:
                    writer.add_scalar(key.replace("select", recipe.select), row[key], row["epoch"])
        model.load_state_dict(record.best_weights)
        logits = engine.predict_logits(model, test)
        loss, accuracy = engine.loss_and_accuracy(logits, test.labels.cpu())
        interval = engine.wilson_interval(round(accuracy * len(logits)), len(logits))
        status = "finished"
        unchanged = record.end(
            status, {"n": len(logits), "accuracy": accuracy, "accuracy_ci95": interval, "loss": loss}
        )
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        bar.close()
        if status != "finished":
            record.end(status)
        if writer:
            writer.close()

    best = record.best_epoch
    if not best:
        print("interrupted before the first epoch ended: nothing was written", file=sys.stderr)
        return 130
    kept = (
        f"best epoch {best['epoch']} ({recipe.select} accuracy {best['select_accuracy']:.2%})"
        if select
        else f"epoch {best['epoch']}"
    )
    print(f"{kept} is in {cli.shown(record.path)}, the history in {cli.shown(history_path(record.path))}")
    if status == "interrupted":
        print(
            f"interrupted in epoch {len(record.history['epochs']) + 1}; to test what there is: "
            f"python evaluate.py {cli.shown(record.path)}",
            file=sys.stderr,
        )
        return 130
    if unchanged:
        print("it is the same to the bit as the earlier one, which is therefore not kept twice")
    print(
        f"test accuracy {accuracy:.2%}, 95% interval {interval[0]:.2%} to {interval[1]:.2%}, n = {len(logits):,}; "
        f"{MEASURED[recipe.select]}"
    )
    return 0


def chosen_recipe(args):
    """The recipe named by --recipe, with what other flags change of it."""
    import recipes

    recipe = recipes.find(args.recipe, args.model)
    rate = "muon_lr" if recipe.optimizer == "muon" else "lr"
    asked = {
        "epochs": args.epochs,
        rate: args.lr,
        "batch_size": args.batch_size,
        "select": args.select,
        "precision": args.precision,
    }
    return recipe._replace(**{key: value for key, value in asked.items() if value is not None})


def header(recipe):
    selection = "" if recipe.select == "last" else f" {recipe.select:>4} loss {recipe.select:>4} acc"
    return f"epoch train loss train acc{selection}   sec images/s     ETA"


def table_line(row, elapsed, epochs):
    eta = timedelta(seconds=round(elapsed / row["epoch"] * (epochs - row["epoch"])))
    selection = f" {row['select_loss']:>9.4f} {row['select_accuracy']:>8.2%}" if "select_loss" in row else ""
    return (
        f"{row['epoch']:>5} {row['train_loss']:>10.4f} {row['train_accuracy']:>9.2%}{selection} "
        f"{row['seconds']:>5.1f} {row['images_per_second']:>8,.0f} {eta!s:>7}"
    )


def open_tensorboard(args):
    """A SummaryWriter in a folder of the run's own below --tensorboard, or None."""
    if not args.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(args.tensorboard / f"{args.model}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}")


if __name__ == "__main__":
    cli.run(main)
