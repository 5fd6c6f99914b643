"""One training run: find what to do, set it up, begin or resume it, train, measure, and say how it ended.

code = run.run(run.Request(model="cnn", recipe="best", seed=1))

train.py does just this with its flags; other modules do it many times.
"""

import contextlib
import functools
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm

import checkpoint
import data
import engine
import metrics
import models
import recipes
from runtime import cli, device, distributed
from runtime.errors import UserError, one_line
from training import distill, held_out, record, trial
from training.board import Board
from training.plan import Plan, Request, find, splits_of
from training.record import Record, RunError, history_path, unfinished_path

GIVEN_UP = 3  # what run() returns where its caller gave the run up

Watch = Callable[[Mapping[str, Any]], bool | None]
Load = Callable[..., list[data.Split]]


def run(request: Request, watch: Watch | None = None, load: Load | None = None) -> int:
    """Begin or resume a run, to its end or to a stop. Returns the exit code.

    watch(row) is called with the row of each epoch, once that is recorded. Where it returns True, the run is given up:
    its status stays "interrupted", it cannot be resumed, and GIVEN_UP is returned.
    load: instead of data.load, one that keeps the images for the next run.
    Raises UserError for a request that cannot be met.
    """
    if request.model not in models.MODELS:
        raise UserError(f"--model {request.model!r}: the models here are {', '.join(models.MODELS)}")
    target = device.pick_device(request.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.joined(target))
        if distributed.rank():  # the first process speaks for all
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        plan = distributed.from_first(lambda: find(request, target, stack))
        if not plan:
            print(f"the run of {cli.shown(request.path)} has finished; without --resume, another begins")
            return 0
        return Run(request, target, plan, watch, load or data.load).carry_out()


class Run:
    """A planned run, set up: carry_out() trains, measures and summarises it."""

    def __init__(self, request: Request, target: torch.device, plan: Plan, watch: Watch | None, load: Load):
        self.request, self.device, self.plan, self.watch = request, target, plan, watch
        self.given_up = False
        self.recipe = recipes.Recipe(**{key: plan.flags[key] for key in recipes.Recipe._fields})
        self.selection, self.measured = recipes.selection(plan.flags), recipes.measured_on(plan.flags)
        self.is_first = distributed.rank() == 0
        self.signals = cli.StopSignals()
        device.keep_freed_memory()
        if plan.flags["deterministic"]:
            device.make_deterministic()
        self._load_data(load)
        self._build()

    def _load_data(self, load: Load) -> None:
        """Load the splits; in a fold run, the held-out images take the place of the test set, which is not read."""
        fold, select = self.plan.flags["fold"], self.recipe.select
        found = load(*splits_of(self.plan.flags), data_dir=self.request.data_dir, other_data=self.request.other_data)
        self.fingerprint = functools.cache(functools.partial(data.fingerprint, *found))
        if fold:
            found, self.held_out = data.hold_out(found[0], fold, select)
        splits = [split.to(self.device) for split in found]
        self.train, self.test = splits[0], splits[-1]
        # In the published protocol, the test set itself selects.
        self.select = None if select == "last" else splits[1]

    def _build(self) -> None:
        """Build the model, the training and the record, and print what they are."""
        flags, seed = self.plan.flags, self.plan.seed
        precision = device.pick_precision(flags["precision"], self.device)
        if precision is torch.bfloat16 and not device.has_bfloat16(self.device):
            print(f"train.py: {self.device} emulates bfloat16: --precision float32 is faster here", file=sys.stderr)
        distributed.from_first(lambda: trial.check(self.request.model, self.recipe, self.train, precision))
        torch.manual_seed(*data.derive_seeds(seed))
        self.model = models.build(self.request.model).to(self.device)
        fused = self.device.type == "cpu" and _give_kernels(self.model, self.recipe.fused)
        self.recipe = self.recipe._replace(fused=fused)
        teacher = distill.answers(flags["teachers"], self.train, precision) if flags["teachers"] else None
        self.training = engine.Training(
            self.model, self.train, self.select, self.recipe, seed=seed, precision=precision, teacher=teacher
        )
        self.record = Record(
            self.request.path,
            model=self.request.model,
            seed=seed,
            flags=flags,
            data=self.train.source,
            data_sha256=self.fingerprint(),
            classes=list(self.train.classes),
            train_images=len(self.train.labels),
            select_images=len(self.select.labels) if self.select else 0,
            **record.environment(self.request.model, self.device, processes=distributed.world(), fused=fused),
        )
        print(self._description(), flush=True)

    def _description(self) -> str:
        flags, processes = self.plan.flags, distributed.world()
        fold = f"fold {flags['fold']} holds out {len(self.test.labels):,}; " if flags["fold"] else ""
        epochs, n = cli.counted(self.recipe.epochs, "epoch"), len((self.select or self.test).labels)
        rule = self.selection.rule.format(epochs=epochs, n=n)
        augmentation = ", ".join(f"{name} {value}" for name, value in self.recipe.augment.items()) or "none"
        return (
            f"{self.request.model}, recipe {flags['recipe']}: {models.count_parameters(self.model):,} parameters on "
            f"{self.device} in {flags['precision']}{f', {processes} processes' if processes > 1 else ''}, seed "
            f"{self.plan.seed}; {len(self.train.labels):,} training images; {fold}{rule}\n"
            f"loss: {engine.loss_name(self.recipe)}; augmentation: {augmentation}"
        )

    def carry_out(self) -> int:
        """Train from the start or from the saved state, to the end or to a stop. Returns the exit code."""
        self._resume_or_begin()
        board = Board(self.request.tensorboard, self.record.history) if self.is_first else None
        progress = Progress(self.training, self.record, self.save, self.request.save_every)
        status, repeated = "interrupted", False
        with self.signals:
            try:
                self._train(progress, board)
                if self.given_up:
                    pass
                elif self.training.finished and self._measure():
                    status = "finished"
                else:
                    self.save()
            except engine.TrainingError:
                status = "failed"
                raise
            finally:
                progress.close()
                if self.is_first:
                    repeated = self.record.end(status, self.given_up)
                if board:
                    board.close(self.record.history)
        self._print_best()
        if self.given_up:
            return GIVEN_UP
        if status == "interrupted":
            print(self._interruption(), file=sys.stderr)
            return self.signals.code or 128 + signal.SIGTERM  # where the signal reached another process
        self._print_result(repeated)
        return 0

    def _resume_or_begin(self) -> None:
        if self.plan.saved:
            resume(self.plan.saved, self.training, self.record, self.fingerprint())
        elif self.is_first:
            self.record.begin()
            if kept := self.record.kept:
                name = f"{self.request.path.stem}{kept.suffix}"
                print(f"the earlier {name} will be kept as {cli.shown(kept)}")

    def _stopped(self) -> bool:
        """Say whether a signal has asked to stop."""
        return self.signals.code is not None

    def _train(self, progress: "Progress", board: "Board | None") -> None:
        """Train epoch by epoch, with a line for each."""
        progress.write(header(self.selection.name))
        for row in self.training.run(progress, self._stopped):
            is_best = self.is_first and self.record.add_epoch(self.model, row)
            best = " best" if is_best and self.select else ""
            left = remaining(self.record.seconds, row["epoch"], self.recipe.epochs)
            progress.write(table_line(row, left) + best)
            if board:
                board.write(row)
            if self.watch and distributed.from_first(functools.partial(self.watch, row)) and not self._stopped():
                self.given_up = True
                return

    def _measure(self) -> bool:
        """Measure the best epoch's checkpoint on the test set or the held-out images, and fit the temperature.

        Returns False where a signal stopped it; the run can be resumed, and measures again.
        """
        self.model.load_state_dict(distributed.from_first(self._read_back))
        calibrated = self.select if self.recipe.select == "val" else None  # else no image is left to fit it on
        try:
            logits = engine.predict_logits(self.model, self.test, stop=self._stopped)
            others = engine.predict_logits(self.model, calibrated, stop=self._stopped) if calibrated else None
        except engine.Stopped:
            return False
        labels = self.test.labels.cpu()
        figures = metrics.measure(logits, labels)
        interval = metrics.wilson_interval(round(figures["accuracy"] * len(logits)), len(logits))
        self.record.history["test"] = {
            "n": len(logits),
            "accuracy": figures.pop("accuracy"),
            "accuracy_ci95": interval,
            "loss": figures.pop("log_loss"),
            **figures,
        }
        if calibrated and others is not None:
            self.record.history["temperature"] = metrics.temperature(others, calibrated.labels.cpu())
        if self.plan.flags["fold"] and self.is_first:
            held_out.write(self.request.path, self.held_out, labels, logits)
        return True

    def _read_back(self) -> dict[str, torch.Tensor]:
        """Load the weights that this run has written. Where they are gone, it saves itself first: nothing is lost."""
        path = self.request.path
        try:
            model, info = checkpoint.load(path)
            if info["sha256"] != self.record.history["checkpoint_sha256"]:
                raise RunError(f"{cli.shown(path)} was replaced during the run; --resume writes and measures it again")
            self.model.load_state_dict(model.state_dict())
            trial.compare(self.request.model, self.model, model, self.test)
        except (UserError, OSError):
            self.save()
            raise
        return model.state_dict()

    def save(self) -> None:
        """Save the run so that it can be resumed from here."""
        if self.is_first:
            self.record.save(self.training, self.fingerprint())

    def _print_best(self) -> None:
        path, best = self.request.path, self.record.best_epoch
        files = f"{cli.shown(path)}, the history in {cli.shown(history_path(path))}"
        if best and self.select:
            accuracy = f"{self.selection.name} accuracy {best['select_accuracy']:.2%}"
            print(f"best epoch {best['epoch']} ({accuracy}) is in {files}")
        elif best:
            print(f"epoch {best['epoch']} is in {files}")

    def _interruption(self) -> str:
        test = f"; to test what there is: {cli.command('evaluate.py', cli.relative(self.request.path))}"
        return (
            f"interrupted {place(self.training)}, and saved; to continue: {resume_command(self.request)}"
            f"{test if self.record.best_epoch else ''}"
        )

    def _print_result(self, repeated: bool) -> None:
        if repeated:
            print("it is the same to the bit as the earlier one, which stays as it was")
        test = self.record.history["test"] or {}
        if test:
            low, high = test["accuracy_ci95"]
            print(
                f"{self.measured} accuracy {test['accuracy']:.2%}, 95% interval {low:.2%} to {high:.2%}, "
                f"n = {test['n']:,}; {self.selection.measured}"
            )


def _give_kernels(model: torch.nn.Module, fused: bool) -> bool:
    """Give the model the faster operations of runtime/. Returns whether they are the fused ones; prints why not."""
    if error := engine.give_kernels(model, fused):
        print(f"train.py: {error}; {engine.WITHOUT_KERNELS}", file=sys.stderr)
    return fused and not error


class Progress:
    """A bar in a terminal, and a save whenever the next look might come too late for --save-every."""

    BAR = "{desc} |{bar}| {percentage:3.0f}%  {rate_fmt}  ETA "

    def __init__(self, training: engine.Training, kept: Record, save: Any, save_every: float):
        self.training, self.record, self.save, self.save_every = training, kept, save, save_every
        n = len(training.train.labels)
        self.bar = tqdm(
            total=training.recipe.epochs * n,
            initial=(training.epoch - 1) * n + training.seen,
            disable=None,  # where stderr is no terminal
            dynamic_ncols=True,
            bar_format=self.BAR + "?",
            unit=" images",
            unit_scale=True,
        )
        self.last_look = self.last_save = time.monotonic()
        self.longest = 0.0  # seconds between two looks

    def __call__(self, images: int, loss: float, accuracy: float) -> None:
        """Show the epoch's figures so far after this many more images, and save if it is time."""
        training = self.training
        epochs, done = training.recipe.epochs, training.epoch - 1 + training.seen / len(training.train.labels)
        description = f"epoch {training.epoch}/{epochs}  loss {loss:.4f}  acc {accuracy:.2%}"
        self.bar.bar_format = self.BAR + remaining(self.record.seconds, done, epochs)
        self.bar.set_description_str(description, refresh=False)
        self.bar.update(images)
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last_look)
        is_due = now - self.last_save + self.longest > self.save_every
        if is_due or (training.epoch == 1 and training.step == training.steps):  # before anything else is written
            self.save()
            self.last_save = time.monotonic()
        self.last_look = now

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


def resume(saved: dict[str, Any], training: engine.Training, kept: Record, fingerprint: str) -> None:
    """Bring training and record (kept) to where the saved run was. Print that, and what may now change the last bits.

    Raises RunError where the data are others, or where the state does not fit.
    """
    unfinished = cli.shown(unfinished_path(kept.path))
    same = all(saved["history"][key] == kept.history[key] for key in ("classes", "train_images", "select_images"))
    if saved["fingerprint"] != fingerprint or not same:
        raise RunError(
            f"the images are not those {unfinished} began with: use its --data-dir again, or delete it to start anew"
        )
    try:
        training.load_state_dict(saved["training"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{unfinished} does not fit the {kept.history['model']}: {one_line(error)}") from None
    if distributed.rank() == 0:
        for key, (before, now) in kept.resume(saved).items():
            print(
                f"train.py: {key} changed from {before} to {now} since the run began: its last bits may not be those "
                "of an uninterrupted run",
                file=sys.stderr,
            )
    print(f"resumed {place(training)}", flush=True)


def place(training: engine.Training) -> str:
    """Say where in its run a training is."""
    if training.step:
        return f"in epoch {training.epoch}, after step {training.step} of {training.steps}"
    return f"after epoch {training.epoch - 1}"


def resume_command(request: Request) -> str:
    """Return the command that resumes this run, as a user would type it here."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # of torchrun, on this machine
    words = ["--model", request.model, "--resume"]
    if request.checkpoint_dir != cli.CHECKPOINTS:
        words += ["--checkpoint-dir", cli.relative(request.checkpoint_dir)]
    if request.data_dir:
        words += ["--data-dir", str(request.data_dir)]
    if request.other_data:
        words += ["--other-data"]
    if not processes:
        return cli.command("train.py", *words)
    torchrun = "torchrun" if cli.python() == "python" else f"{cli.python()} -m torch.distributed.run"
    return f"{torchrun} {shlex.join([f'--nproc-per-node={processes}', cli.relative(cli.ROOT / 'train.py'), *words])}"


def header(selection: str) -> str:
    """Return the head of the table of epochs; selection: the name of recipes.Selection."""
    name = f"{selection[:4]:>4}"
    selection = selection and f" {name} loss {name} acc"
    return f"epoch train loss train acc{selection}   sec images/s     ETA"


def remaining(elapsed: float, done: float, epochs: int) -> str:
    """Estimate how long a run still takes, as hours:minutes:seconds, after so many seconds and epochs of it."""
    return str(timedelta(seconds=round(elapsed / done * (epochs - done))))


def table_line(row: dict[str, Any], eta: str) -> str:
    """Return an epoch's line of the table."""
    selection = f" {row['select_loss']:>9.4f} {row['select_accuracy']:>8.2%}" if "select_loss" in row else ""
    return (
        f"{row['epoch']:>5} {row['train_loss']:>10.4f} {row['train_accuracy']:>9.2%}{selection} "
        f"{row['seconds']:>5.1f} {row['images_per_second']:>8,.0f} {eta:>7}"
    )
