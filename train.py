"""Train a model on Fashion-MNIST; the best epoch is kept as checkpoints/best_<model>_fmnist.pt.

python train.py --model cnn                 # 55,000 images, best epoch chosen on 5,000 validation images
python train.py --model cnn --select test   # the published protocol: all 60,000, best epoch on the test set
python train.py --model cnn --recipe best   # or fast: the same network, trained as recipes.py says
python train.py --model resnet              # a deeper network: half an hour, or hours without bfloat16
python train.py --model cnn --recipe distilled --teacher T.pt   # with what another network has learned
python train.py --model cnn --resume        # go on with a run that was cut off, to the same bits
torchrun --nproc-per-node=2 --max-restarts=3 train.py --model cnn   # in two processes, resumed when one fails
"""

import contextlib
import functools
import importlib.util
import os
import shlex
import signal
import sys
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
    parser.add_argument("--model", required=True, help="mlp, cnn, resnet, or any other name in models.py")
    parser.add_argument(
        "--recipe",
        choices=("published", "fast", "best", "distilled"),
        help="how to train, a row of recipes.py: as published (default of mlp and cnn), in the least time to the "
        "published accuracy (fast), to the highest accuracy (best, default of resnet: minutes, or half an "
        "hour of resnet, hours where the processor has no bfloat16), or from the answers of a --teacher (distilled)",
    )
    parser.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        nargs="+",
        type=Path,
        help="whose answers to learn from, of several their mean; for --recipe distilled",
    )
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
    parser.add_argument("--seed", type=cli.whole_number(0, 2**32 - 1), help="decides every random draw (default: 0)")
    parser.add_argument(
        "--select",
        choices=SELECTION,
        help="what chooses the epoch that is kept: 5,000 training images held out (val, the default of published), the "
        "test set itself, as published (test), or nothing: all 60,000 are trained on and the last epoch is kept (last, "
        "the default of the other recipes)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the matrix products: auto is bfloat16 where the processor multiplies it natively, else float32 "
        "(default: the recipe's: float32 as published, else auto); float16 is for GPUs",
    )
    parser.add_argument("--deterministic", action="store_true", help="refuse GPU operations that vary from run to run")
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
        help="go on with the unfinished run of this model there, whose flags need not be told again; if there is none, "
        "begin one",
    )
    parser.add_argument(
        "--save-every",
        metavar="SECONDS",
        type=cli.positive_number,
        default=30.0,
        help="the work that a crash may cost (default: 30)",
    )
    parser.add_argument("--tensorboard", metavar="DIR", type=Path, help="write TensorBoard scalars below DIR")
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    # Imported only now: PyTorch takes seconds, and --help or a mistyped flag should not wait for it.
    import data
    import distributed
    import engine
    import models

    if args.model not in models.MODELS:
        raise data.UserError(f"--model {args.model!r}: the models here are {', '.join(models.MODELS)}")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise data.UserError("--tensorboard needs the package: pip install -r requirements-optional.txt")
    device = engine.pick_device(args.device)
    path = args.checkpoint_dir / f"best_{args.model}_fmnist.pt"
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.joined(device))
        if distributed.rank():  # the first process speaks for all
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        plan = distributed.from_first(lambda: find_run(args, path, device, stack))
        if not plan:
            print(f"the run of {cli.shown(path)} has finished; without --resume, another begins")
            return 0
        return train(args, path, device, *plan)


def find_run(args, path, device, stack):
    """Claim the place of the checkpoint, and say what to do there: a run's flags, its seed, and its saved state.

    The state is None for a new run. Returns None where --resume finds the run finished.
    Raises UserError where a run is unfinished that is not to be resumed, or not with these flags.
    """
    import distill
    import distributed
    import engine
    import recipes
    from record import RunError, history_of, load_unfinished, sole_writer, unfinished_path

    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(sole_writer(path))  # which fails now, not after an epoch, where nothing can be written
    saved = load_unfinished(path)
    earlier = saved["history"] if saved else history_of(path)
    resume = args.resume or distributed.restarted()
    if saved and not resume:
        raise RunError(
            f"{cli.shown(unfinished_path(path))} holds an unfinished run (recipe {earlier['flags']['recipe']}, seed "
            f"{earlier['seed']}, in epoch {saved['training']['epoch']} of {earlier['flags']['epochs']}): --resume goes "
            "on with it; to give it up, delete that file"
        )

    name = earlier["flags"]["recipe"] if saved else args.recipe or recipes.default(args.model)
    recipe = recipes.find(name, args.model)
    asked = {
        "recipe": args.recipe,
        "epochs": args.epochs,
        "muon_lr" if recipe.optimizer == "muon" else "lr": args.lr,
        "batch_size": args.batch_size,
        "select": args.select,
        "precision": args.precision and cli.plain(engine.pick_precision(args.precision, device)),
        "deterministic": args.deterministic or None,
        "seed": args.seed,
        "teachers": args.teacher and distill.describe(args.teacher),
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    if saved or (resume and earlier and earlier["status"] == "finished"):
        begun = earlier["flags"] | {"seed": earlier["seed"]}
        other = [key for key in asked if asked[key] != begun.get(key)]
        if not other:
            return (earlier["flags"], earlier["seed"], saved) if saved else None
        if saved:
            flag = {"muon_lr": "--lr", "teachers": "--teacher"}.get(other[0], "--" + other[0].replace("_", "-"))
            before, now = (
                [each["checkpoint"] for each in value] if other[0] == "teachers" else value
                for value in (begun[other[0]], asked[other[0]])
            )
            raise RunError(
                f"--resume: {flag} was {before} when this run began, and {now} would make it another run: leave the "
                "flag out"
            )
    if args.resume:
        print(f"train.py: no run is unfinished in {cli.shown(args.checkpoint_dir)}: one begins", file=sys.stderr)
    seed = asked.pop("seed", 0)
    precision = cli.plain(engine.pick_precision(recipe.precision, device))
    flags = {"recipe": name, **recipe._asdict(), "precision": precision, "deterministic": False, "teachers": []} | asked
    if bool(flags["teachers"]) != bool(recipe.distillation):
        raise distill.TeacherError("--recipe distilled and --teacher CHECKPOINT go together")
    if flags["select"] == "val" and any(teacher["select"] != "val" for teacher in flags["teachers"]):
        raise distill.TeacherError("--select val: a teacher was trained on the validation images, and tells of them")
    return flags, seed, None


def train(args, path, device, flags, seed, saved):
    """Train, from the start or from the saved state, to the end or to a stop. Returns the exit code."""
    import torch
    from tqdm import tqdm

    import analysis
    import data
    import distill
    import distributed
    import engine
    import kernels
    import models
    import recipes
    from record import Record, environment, history_path

    recipe = recipes.Recipe(**{key: flags[key] for key in recipes.Recipe._fields})
    engine.keep_freed_memory()
    if flags["deterministic"]:
        engine.make_deterministic()
    fused = recipe.fused and device.type == "cpu"
    if fused and (reason := kernels.load()):
        fused = False
        print(f"train.py: {reason}; training goes on with PyTorch's own operations, more slowly", file=sys.stderr)

    names = ("train", "val", "test") if recipe.select == "val" else ("train+val", "test")
    train, *_, test = splits = [split.to(device) for split in data.load(*names, data_dir=args.data_dir)]
    select = None if recipe.select == "last" else splits[1]  # in the published protocol, the test set itself
    fingerprint = functools.cache(lambda: data.fingerprint(*splits))
    torch.manual_seed(*data.derive_seeds(seed))
    model = models.build(args.model).to(device)
    precision = engine.pick_precision(flags["precision"], device)
    teacher = distill.answers(flags["teachers"], train, precision) if flags["teachers"] else None
    training = engine.Training(model, train, select, recipe, seed=seed, precision=precision, teacher=teacher)
    is_first, processes = distributed.rank() == 0, distributed.world()
    chosen = SELECTION[recipe.select].format(epochs=recipe.epochs, n=len(splits[1].labels))
    print(
        f"{args.model}, recipe {flags['recipe']}: {models.count_parameters(model):,} parameters on {device} in "
        f"{flags['precision']}{f', {processes} processes' if processes > 1 else ''}, seed {seed}; "
        f"{len(train.labels):,} training images; {chosen}",
        flush=True,
    )
    record = Record(
        path,
        model=args.model,
        seed=seed,
        flags=flags,
        data=train.source,
        train_images=len(train.labels),
        select_images=len(select.labels) if select else 0,
        environment=environment(device, processes=processes, fused=fused),
    )
    if saved:
        resume(saved, training, record, fingerprint())
    elif is_first:
        record.begin()
    writer = open_tensorboard(args, record.history) if is_first else None
    bar = tqdm(
        total=recipe.epochs * len(train.labels),
        initial=(training.epoch - 1) * len(train.labels) + training.seen,
        disable=None,  # where stderr is no terminal
        dynamic_ncols=True,
        bar_format="{desc} |{bar}| {percentage:3.0f}%  {rate_fmt}  ETA {remaining}",
        unit=" images",
        unit_scale=True,
    )
    last_look = last_save = time.monotonic()
    longest = 0.0  # seconds between two looks

    def progress(images, loss, accuracy):
        nonlocal last_look, last_save, longest
        told = f"epoch {training.epoch}/{recipe.epochs}  loss {loss:.4f}  acc {accuracy:.2%}"
        bar.set_description_str(told, refresh=False)
        bar.update(images)
        now = time.monotonic()
        longest = max(longest, now - last_look)
        too_late = now - last_save + longest > args.save_every  # at the next look
        if too_late or (training.epoch == 1 and training.step == training.steps):  # before anything else is written
            save()
            last_save = time.monotonic()
        last_look = now

    def save():
        if is_first:
            record.save(training, fingerprint())

    def say(line):
        tqdm.write(line)  # above the bar
        sys.stdout.flush()

    status, unchanged = "interrupted", False
    with cli.StopSignals() as signals:
        try:
            if record.kept and not saved:
                say(f"the earlier {path.stem}{record.kept.suffix} is kept as {cli.shown(record.kept)}")
            say(header(recipe))
            for row in training.run(progress, stop=lambda: signals.code is not None):
                is_best = is_first and record.add_epoch(model, row)
                say(table_line(row, record.seconds, recipe.epochs) + " best" * (is_best and select is not None))
                if writer:
                    write_scalars(writer, row, recipe.select)
            if training.finished:
                model.load_state_dict(distributed.from_first(lambda: record.best_weights))
                logits = engine.predict_logits(model, test)
                loss, accuracy = engine.loss_and_accuracy(logits, test.labels.cpu())
                interval = engine.wilson_interval(round(accuracy * len(logits)), len(logits))
                record.history["test"] = {
                    "n": len(logits), "accuracy": accuracy, "accuracy_ci95": interval, "loss": loss
                }  # fmt: skip
                if recipe.select == "val":  # the others leave no image to measure it on
                    held_out = engine.predict_logits(model, select)
                    record.history["temperature"] = analysis.temperature(held_out, select.labels.cpu())
                status = "finished"
            else:
                save()
        except engine.TrainingError:
            status = "failed"
            raise
        finally:
            bar.close()
            if is_first:
                unchanged = record.end(status)
            if writer:
                writer.close()

    best, files = record.best_epoch, f"{cli.shown(path)}, the history in {cli.shown(history_path(path))}"
    if best and select:
        print(f"best epoch {best['epoch']} ({recipe.select} accuracy {best['select_accuracy']:.2%}) is in {files}")
    elif best:
        print(f"epoch {best['epoch']} is in {files}")
    if status == "interrupted":
        print(
            f"interrupted {place(training)}, and saved; to go on with it: {resume_command(args)}"
            + f"; to test what there is: python evaluate.py {cli.shown(path)}" * (best is not None),
            file=sys.stderr,
        )
        return signals.code or 128 + signal.SIGTERM  # where another process was told
    if unchanged:
        print("it is the same to the bit as the earlier one, which is therefore not kept twice")
    print(
        f"test accuracy {accuracy:.2%}, 95% interval {interval[0]:.2%} to {interval[1]:.2%}, n = {len(logits):,}; "
        f"{MEASURED[recipe.select]}"
    )
    return 0


def resume(saved, training, record, fingerprint):
    """Take training and record to where the saved run was, and tell so, and what may now keep it from the same bits.

    Raises UserError where the data are others, or where the state does not fit.
    """
    import distributed
    from record import RunError, unfinished_path

    unfinished = cli.shown(unfinished_path(record.path))
    if saved["fingerprint"] != fingerprint:
        raise RunError(
            f"the images are not those {unfinished} began with: give back its --data-dir, or delete it to start anew"
        )
    try:
        training.load_state_dict(saved["training"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{unfinished} does not fit the {record.history['model']}: {cli.one_line(error)}") from None
    if distributed.rank() == 0:
        for key, (before, now) in record.resume(saved).items():
            print(
                f"train.py: {key} changed from {before} to {now} since the run began: its last bits may not be those "
                "of an uninterrupted one",
                file=sys.stderr,
            )
    print(f"resumed {place(training)}", flush=True)


def place(training):
    if training.step:
        return f"in epoch {training.epoch}, after step {training.step} of {training.steps}"
    return f"after epoch {training.epoch - 1}"


def resume_command(args):
    """The command that goes on with this run, as a user would type it here."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # of torchrun, on this machine
    words = ["torchrun", f"--nproc-per-node={processes}"] if processes else ["python"]
    words += ["train.py", "--model", args.model, "--resume"]
    if args.checkpoint_dir != cli.CHECKPOINTS:
        words += ["--checkpoint-dir", cli.shown(args.checkpoint_dir)]
    if args.data_dir:
        words += ["--data-dir", args.data_dir]
    return shlex.join(words)


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


def open_tensorboard(args, history):
    """A SummaryWriter in a folder of its own below --tensorboard, with the epochs so far, or None."""
    if not args.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    name = f"{history['model']}-seed{history['seed']}-{time.strftime('%Y%m%d-%H%M%S')}"
    writer = SummaryWriter(args.tensorboard / name)
    for row in history["epochs"]:
        write_scalars(writer, row, history["flags"]["select"])
    return writer


def write_scalars(writer, row, select):
    for key in row.keys() - {"epoch"}:
        writer.add_scalar(key.replace("select", select), row[key], row["epoch"])


if __name__ == "__main__":
    cli.run(main)
