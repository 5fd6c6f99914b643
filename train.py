"""Train a model on Fashion-MNIST; the best epoch is kept as checkpoints/best_<model>_fmnist.pt.

python train.py --model cnn                 # 55,000 images, best epoch chosen on 5,000 validation images
python train.py --model cnn --select test   # the published protocol: all 60,000, best epoch on the test set
"""

import importlib.util
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import cli

EPOCHS = {"mlp": 5, "cnn": 15}  # as published
SELECTION = {"val": "validation images", "test": "test images, as published: an optimistic protocol"}


def parse_args(argv=None):
    parser = cli.Parser("Train a classifier on Fashion-MNIST.")
    parser.add_argument("--model", required=True, help="mlp, cnn, or any other name in models.py")
    parser.add_argument(
        "--epochs", type=cli.whole_number(1, 10_000), help="passes over the images (default: mlp 5, cnn 15)"
    )
    parser.add_argument(
        "--lr", type=cli.positive_number, default=1e-3, help="learning rate of Adam (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=cli.whole_number(1, 60_000), default=128, help="images a step (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0, 2**32 - 1),
        default=0,
        help="decides every random draw (default: %(default)s)",
    )
    parser.add_argument(
        "--select",
        choices=SELECTION,
        default="val",
        help="what chooses the best epoch: 5,000 training images held out (val, the default), or the test set itself, "
        "as published (test)",
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
    import models
    from record import Record, history_path

    if args.model not in models.MODELS:
        raise data.UserError(f"--model {args.model}: the models here are {', '.join(models.MODELS)}")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise data.UserError("--tensorboard needs the package: pip install -r requirements-optional.txt")
    epochs = args.epochs or EPOCHS.get(args.model, EPOCHS["cnn"])
    device = engine.pick_device(args.device)
    if args.deterministic:
        engine.make_deterministic()
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.checkpoint_dir).close()  # now, not after an epoch, if it cannot be written

    names = ("train", "val", "test") if args.select == "val" else ("train+val", "test")
    train, *_, test = splits = [split.to(device) for split in data.load(*names, data_dir=args.data_dir)]
    select = splits[1]  # which is the test set itself in the published protocol
    torch.manual_seed(*data.derive_seeds(args.seed))
    model = models.build(args.model).to(device)
    print(
        f"{args.model}: {models.count_parameters(model):,} parameters on {device}, seed {args.seed}; "
        f"{len(train.labels):,} training images; best epoch of {epochs} chosen on "
        f"{len(select.labels):,} {SELECTION[args.select]}",
        flush=True,
    )
    record = Record(
        args.checkpoint_dir / f"best_{args.model}_fmnist.pt",
        model=args.model,
        seed=args.seed,
        flags={
            "epochs": epochs,
            "lr": args.lr,
            "batch_size": args.batch_size,
            "select": args.select,
            "deterministic": args.deterministic,
        },
        data=train.source,
        train_images=len(train.labels),
        select_images=len(select.labels),
        device=str(device),
    )
    writer = open_tensorboard(args)
    bar = tqdm(
        total=epochs * len(train.labels),
        disable=None,  # where stderr is no terminal
        dynamic_ncols=True,
        bar_format="{desc} |{bar}| {percentage:3.0f}%  {rate_fmt}  ETA {remaining}",
        unit=" images",
        unit_scale=True,
    )

    def progress(epoch, images, loss, accuracy):
        bar.set_description_str(f"epoch {epoch}/{epochs}  loss {loss:.4f}  acc {accuracy:.2%}", refresh=False)
        bar.update(images)

    def say(line):
        tqdm.write(line)  # above the bar
        sys.stdout.flush()

    status = "failed"
    try:
        say(f"epoch train loss train acc {args.select:>4} loss {args.select:>4} acc   sec images/s     ETA")
        for row in engine.fit(
            model,
            train,
            select,
            epochs=epochs,
            lr=args.lr,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=progress,
        ):
            is_best = record.add_epoch(model, row)
            if row["epoch"] == 1 and record.kept:
                say(f"      the earlier {record.path.stem}{record.kept.suffix} is kept as {cli.shown(record.kept)}")
            say(table_line(row, record.history["training_seconds"], epochs) + " best" * is_best)
            if writer:
                for key in row.keys() - {"epoch"}:
                    writer.add_scalar(key.replace("select", args.select), row[key], row["epoch"])
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
    print(
        f"best epoch {best['epoch']} ({args.select} accuracy {best['select_accuracy']:.2%}) is in "
        f"{cli.shown(record.path)}, the history in {cli.shown(history_path(record.path))}"
    )
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
        + (
            "measured once, after training"
            if args.select == "val"
            else "the best epoch was chosen on these very images"
        )
    )
    return 0


def table_line(row, elapsed, epochs):
    eta = timedelta(seconds=round(elapsed / row["epoch"] * (epochs - row["epoch"])))
    return (
        f"{row['epoch']:>5} {row['train_loss']:>10.4f} {row['train_accuracy']:>9.2%} {row['select_loss']:>9.4f} "
        f"{row['select_accuracy']:>8.2%} {row['seconds']:>5.1f} {row['images_per_second']:>8,.0f} {eta!s:>7}"
    )


def open_tensorboard(args):
    """A SummaryWriter in a folder of the run's own below --tensorboard, or None."""
    if not args.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(args.tensorboard / f"{args.model}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}")


if __name__ == "__main__":
    cli.run(main)
