"""No fault costs a run: whatever cuts it off, --resume finishes it bit-identical to an uninterrupted run."""

import copy
import ctypes
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import (
    first,
    in_a_fork,
    start_training,
    stop_at_the_first_look,
    stop_in_the_second_epoch,
    stop_training,
    without_times,
)

import checkpoint
import data
import engine
import models
import recipes
from runtime import files
from runtime.errors import UserError
from training import plan, record
from training import run as training_run


class Kind(NamedTuple):
    """A kind of run."""

    model: str
    recipe: str
    epochs: int  # so many that it takes about a third of a second
    batch_size: int = 8


MLP, FAST_MLP, CNN = Kind("mlp", "published", 6), Kind("mlp", "fast", 3), Kind("cnn", "published", 2)
KINDS = (MLP, CNN, FAST_MLP, Kind("cnn", "fast", 2), Kind("mlp", "best", 3), Kind("cnn", "best", 2))
SHORT = Kind("mlp", "published", 3, 40)  # saved once an epoch, in a tenth of a second
STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]  # and the exit codes after them
ALWAYS = ("--save-every", "0.001")  # seconds: at every look, which is every 25 steps


@pytest.fixture(scope="module", autouse=True)
def few(sample, tmp_path_factory):
    """The folder of the images that all runs here use: 240 to train on and 60 to test, so that a run is short."""
    flags.folder = tmp_path_factory.mktemp("images") / "few"
    parts = {"train": first(sample["train+val"], 240), "t10k": first(sample["test"], 60)}
    data.write(flags.folder, {part: (split.images, split.labels) for part, split in parts.items()})
    return flags.folder


def flags(kind):
    values = {f"--{name.replace('_', '-')}": value for name, value in kind._asdict().items()}
    return [*(word for pair in values.items() for word in pair), "--data-dir", flags.folder]


def start(folder, kind, *more, before=None):
    """Start a run of that kind in the folder; it prints to a file beside it."""
    return start_training(folder.with_suffix(".log"), *flags(kind), "--checkpoint-dir", folder, *more, before=before)


def said(folder):
    log = folder.with_suffix(".log")
    return log.read_text() if log.exists() else ""


def wait_for(pattern, folder, process):
    """Wait until a run has printed that, or has ended."""
    while not re.search(pattern, said(folder), re.MULTILINE) and process.is_alive():
        time.sleep(0.01)


def run(folder, kind, *more, before=None):
    """The exit code of such a run at its end."""
    process = start(folder, kind, *more, before=before)
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode


def outcome(folder):
    """Everything that a run leaves, by file name, without the times."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    return without_times(contents)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """expected(kind) is the outcome of an uninterrupted run of that kind."""
    outcomes = {}
    in_a_fork(int)  # so that the first run is no slower than the others

    def of(kind):
        if kind not in outcomes:
            folder = of.folders[kind] = tmp_path_factory.mktemp("expected") / "run"
            begun = time.monotonic()
            assert run(folder, kind) == 0
            training = json.loads((folder / f"best_{kind.model}_fmnist.json").read_text())["training_seconds"]
            of.seconds[kind] = time.monotonic() - begun, training
            outcomes[kind] = outcome(folder)
            assert outcomes[kind].keys() == {f"best_{kind.model}_fmnist.pt", f"best_{kind.model}_fmnist.json"}
        return outcomes[kind]

    def put(kind, folder):
        of(kind)
        shutil.copytree(of.folders[kind], folder)

    of.put = put  # put(kind, folder) copies such a run's files
    of.folders, of.seconds = {}, {}  # by kind; seconds of the whole run, and of its training
    return of


class Harm:
    """What resuming has shown: runs that did not come to their end, and runs that ended otherwise than expected."""

    def __init__(self, expected):
        self.expected, self.tries, self.lost, self.wrong = expected, 0, [], []

    def resume(self, folder, kind):
        if run(folder, kind, "--resume"):
            self.lost.append((folder.name, said(folder)))
        elif outcome(folder) != self.expected(kind):
            self.wrong.append(folder.name)


@pytest.fixture
def harm(expected):
    return Harm(expected)


# --- killed ----------------------------------------------------------------------------------------------


def test_killed_at_random_moments(tmp_path, harm, expected, tally, tries):
    """Each kind of run is killed three times in a row; if one comes to its end before that, another begins."""
    chance, resumed = random.Random(0), 0
    for kind in KINDS:
        expected(kind)
        kills, whole, runs = 0, expected.seconds[kind][0], 0
        while kills < 3 * tries:
            folder, runs = tmp_path / f"{kind.model}-{kind.recipe}-{runs}", runs + 1
            for _ in range(3):
                process = start(folder, kind, *ALWAYS, "--resume")
                process.join(whole * chance.uniform(0.1, 0.9))
                process.kill()
                process.join()
                resumed += "resumed" in said(folder)
                if process.exitcode == 0:
                    break
                assert process.exitcode == -signal.SIGKILL, said(folder)
                kills += 1
            harm.resume(folder, kind)
        harm.tries += kills
    assert resumed > harm.tries / 3  # otherwise the moments are badly chosen
    tally("SIGKILL at a random moment", harm.tries, harm.lost, harm.wrong)


class Steps:
    """Kill this process at the number-th step of its writing: amid a file, at an fsync, before and after a renaming."""

    def __init__(self, number):
        self.left = number
        self.open, self.fsync, self.replace = open, os.fsync, os.replace
        files.open = lambda path, mode: Torn(self.open(path, mode), self)
        os.fsync, os.replace = self.stepping_fsync, self.stepping_replace

    def step(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping_fsync(self, descriptor):
        self.step()
        self.fsync(descriptor)

    def stepping_replace(self, *names):
        self.step()
        self.replace(*names)
        self.step()


class Torn:
    """A file that writes everything in two halves, with a step of Steps between them."""

    def __init__(self, file, steps):
        self.file, self.steps = file, steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.steps.step()
        self.file.write(content[len(content) // 2 :])


def test_killed_at_every_step_of_a_save(tmp_path, harm, tally):
    """Of the first state, checkpoint and history, and of a state in the place of an earlier one: five steps each."""
    for number in range(1, 21):
        folder = tmp_path / str(number)
        assert run(folder, SHORT, *ALWAYS, before=partial(Steps, number)) == -signal.SIGKILL
        for path in folder.glob("[!.]*.pt"):
            checkpoint.read(path)  # is whole
        harm.resume(folder, SHORT)
    tally("SIGKILL at every step of writing", 20, harm.lost, harm.wrong)


def kill_at_the_end(number):
    """From the last write of the history on: a run that repeats an earlier one then puts its files back."""
    end = record.Record.end
    record.Record.end = lambda *arguments: (Steps(number), end(*arguments))[1]


def test_killed_at_every_step_of_putting_an_earlier_checkpoint_back(tmp_path, expected, tally):
    lost, wrong = [], []
    for number in range(1, 11):
        folder = tmp_path / str(number)
        expected.put(SHORT, folder)
        ended = run(folder, SHORT, before=partial(kill_at_the_end, number))
        assert ended == (-signal.SIGKILL if number < 10 else 0), number  # there are nine steps
        if run(folder, SHORT, "--resume"):
            lost.append((number, said(folder)))
        path = folder / "best_mlp_fmnist.pt"
        history = record.history_of(path)
        if not history or history["status"] != "finished" or path.read_bytes() != expected(SHORT)[path.name]:
            wrong.append(number)
    tally("SIGKILL at every step of putting an earlier checkpoint back", 10, lost, wrong)


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_asked_to_stop(tmp_path, harm, expected, tally, tries, number, code):
    """Two of the six kinds of run by each signal."""
    chance = random.Random(1)
    kinds = KINDS[STOPS.index((number, code)) :: 3] * tries
    for attempt, kind in enumerate(kinds):
        expected(kind)
        folder = tmp_path / str(attempt)
        wait = expected.seconds[kind][1] * chance.uniform(0, 0.5)
        while True:
            process = start(folder, kind)
            wait_for("^epoch", folder, process)
            time.sleep(wait)
            if process.is_alive():
                break
            wait /= 2  # the machine was slower when the run was timed
            shutil.rmtree(folder)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == code, said(folder)
        assert "Traceback" not in said(folder)
        assert "\nstopping after this step and saving" in said(folder)
        assert re.search(r"interrupted .*, and saved; .*train.py --model \w+ --resume", said(folder))
        assert (folder / f"unfinished_{kind.model}_fmnist.pt").exists()
        harm.resume(folder, kind)
    tally(f"{number.name} at a random moment", len(kinds), harm.lost, harm.wrong)


@pytest.mark.parametrize("name", ["best_mlp_fmnist.json", "best_mlp_fmnist.pt"])
def test_asked_to_stop_before_the_first_epoch_ends_leaves_what_was_there(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("an earlier one")
    assert run(folder, SHORT, before=stop_at_the_first_look) == 143
    assert "Traceback" not in said(folder)
    assert {path.name for path in folder.iterdir()} == {name, "unfinished_mlp_fmnist.pt"}
    assert run(folder, SHORT, "--resume") == 0
    assert b"an earlier one" in [path.read_bytes() for path in folder.iterdir()]


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_asked_to_stop_before_training_has_begun(tmp_path, number, code):
    folder = tmp_path / "run"
    process = start(folder, SHORT, before=partial(stop_on_loading, number))
    process.join()
    assert process.exitcode == code
    assert "Traceback" not in said(folder)
    assert list(folder.iterdir()) == []


def stop_on_loading(number):
    data.load = lambda *_, **__: (signal.raise_signal(number), time.sleep(10))


def test_what_a_crash_may_cost_is_what_save_every_says(tmp_path):
    """By a clock that moves by a second with each look at it."""
    folder, log = tmp_path / "run", tmp_path / "saves"
    assert run(folder, MLP, "--epochs", 20, "--save-every", 12, before=partial(tick, log)) == 0
    saves = [int(line) for line in log.read_text().split()]
    assert len(saves) > 3
    assert all(after - before <= 12 for before, after in pairwise(saves))


def tick(log):
    ticks = iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: next(ticks), time=lambda: 1_000_000 - next(ticks))
    training_run.time = record.time = clock
    save = record.Record.save

    def logged(*arguments):
        save(*arguments)
        with open(log, "a") as file:
            print(next(ticks), file=file)

    record.Record.save = logged


def go_backwards_and_crash():
    seconds = iter(range(10**9, 0, -3600))
    time.time = lambda: float(next(seconds))
    stop_training(lambda training: training.epoch == 3 and os.kill(os.getpid(), signal.SIGKILL))


def test_a_clock_that_goes_backwards(tmp_path, harm, tally):
    """The run saves anyway, and survives the crash that follows."""
    folder = tmp_path / "run"
    assert run(folder, SHORT, *ALWAYS, before=go_backwards_and_crash) == -signal.SIGKILL
    harm.resume(folder, SHORT)
    assert "resumed in epoch 2" in said(folder)
    seconds = json.loads((folder / "best_mlp_fmnist.json").read_text())["training_seconds"]
    tally("clock going backwards", 1, harm.lost, harm.wrong + [seconds] * (not 0 < seconds < 100))


# --- what is resumed, and what is not --------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run of SHORT that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert run(folder, SHORT, before=stop_in_the_second_epoch) == 143
    assert (folder / "unfinished_mlp_fmnist.pt").exists()
    return folder


@pytest.fixture
def unfinished(stopped, tmp_path):
    """A copy of this folder."""
    return shutil.copytree(stopped, tmp_path / "run")


def refused(folder, *more, because):
    """Whether train.py refuses in one line, and touches nothing."""
    before = outcome(folder)
    assert run(folder, SHORT, *more) == 2
    errors = [line for line in said(folder).splitlines() if not line.startswith("data:")]
    assert len(errors) == 1, said(folder)
    assert re.search(f"train.py: error: .*{because}", errors[0])
    return outcome(folder) == before


@pytest.mark.parametrize(
    "other",
    [
        *["--recipe best", "--epochs 4", "--lr 0.002", "--batch-size 32", "--seed 1"],
        *["--select test", "--precision bfloat16", "--deterministic"],
    ],
)
def test_a_flag_that_makes_it_another_run_is_refused(unfinished, other):
    flag = other.split()[0]
    assert refused(unfinished, "--resume", *other.split(), because=f"{flag} was .* leave the flag out")


def test_an_unfinished_run_is_not_overwritten_and_needs_no_flags_to_resume(unfinished, expected, few):
    why = r"unfinished_mlp_fmnist.pt holds an unfinished run \(recipe published, seed 0, in epoch \d of 3\): --resume"
    assert refused(unfinished, because=why)
    assert refused(unfinished, "--seed", 1, because=why)
    short = ["--model", "mlp", "--data-dir", few, "--checkpoint-dir", unfinished, "--resume"]
    process = start_training(unfinished.with_suffix(".log"), *short)
    process.join()
    assert outcome(unfinished) == expected(SHORT)

    process = start_training(unfinished.with_suffix(".log"), *short)
    process.join()
    assert process.exitcode == 0
    assert "has finished; without --resume, another begins" in said(unfinished)
    assert run(unfinished, SHORT, "--resume", "--seed", 1) == 0
    assert "no run is unfinished in" in said(unfinished)
    assert expected(SHORT)["best_mlp_fmnist.pt"] in outcome(unfinished).values()  # kept


def test_data_altered_between_runs(unfinished, harm, tally, few):
    folder = shutil.copytree(few, unfinished.with_name(few.name))
    original = {path: path.read_bytes() for path in folder.iterdir()}
    wrong = []
    for name in ("train-labels-idx1-ubyte", "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        content = bytearray(original[folder / name])
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        assert run(unfinished, SHORT, "--resume", "--data-dir", folder) == 2
        assert "is altered" in said(unfinished)
        sums = (folder / "SHA256SUMS").read_text()
        old = hashlib.sha256(original[folder / name]).hexdigest()
        (folder / "SHA256SUMS").write_text(sums.replace(old, hashlib.sha256(content).hexdigest()))
        if run(unfinished, SHORT, "--resume", "--data-dir", folder) != 2:
            wrong.append(name)
        assert "the images are not those" in said(unfinished)
        for path, before in original.items():
            path.write_bytes(before)
    harm.resume(unfinished, SHORT)
    tally("data altered between runs", 6, harm.lost, harm.wrong + wrong)


def of_another_run(content, history):
    """Put in the best checkpoint of another run, with its digest."""
    other = checkpoint.serialise(
        models.build("mlp"),
        name="mlp",
        epoch=history["best_epoch"],
        metrics={},
        flags=history["flags"],
        seed=7,
        data="x",
    )
    content["best"] = torch.frombuffer(bytearray(other), dtype=torch.uint8)
    history["checkpoint_sha256"] = hashlib.sha256(other).hexdigest()


LIES = {  # what is done to a state and its history, and what the refusal says
    "own name": (lambda state, _: state.update(kept="best_mlp_fmnist.pt"), "is not the name of an earlier checkpoint"),
    "other folder": (lambda state, _: state.update(kept="../best_mlp_fmnist.01234567.pt"), "is not the name of an"),
    "other file": (lambda state, _: state.update(kept="thesis.pt"), "is not the name of an earlier checkpoint"),
    "other files as its own": (lambda state, _: state.update(made=["thesis.pt"]), "made names other files"),
    "another run's best": (of_another_run, "its best checkpoint is of another run"),
    "no best": (lambda state, _: state.update(best=None), "do not belong together"),
    "epoch": (lambda state, _: state["training"].update(epoch=3), "it is in epoch 3 with 1 epochs done"),
    "seconds": (lambda state, _: state["training"].update(seconds=-1.0), "training.seconds is -1.0, not"),
    "loss": (lambda state, _: state["training"].update(loss=float("nan")), "training.loss is nan, not"),
    "recent": (lambda state, _: state["training"].update(recent=[[torch.zeros(1)] * 3]), r"recent\[0\] is a list, not"),
    "flags": (lambda _, history: history["flags"].update(epochs=10**9), "flags.epochs is 1000000000, not"),
    "more flags": (lambda _, history: history["flags"].update(more=1), "flags has .more., which does not"),
    "fold": (lambda _, history: history["flags"].update(fold="6/5"), "--fold '6/5': write K/N"),
    "rate": (lambda _, history: history["flags"].update(lr=-1.0), "flags.lr is -1.0, not"),
    "row": (lambda _, history: history["epochs"][0].update(select_accuracy=7), "select_accuracy is 7, not"),
    "temperature": (lambda _, history: history.update(temperature=-1), "temperature is -1, not"),
    "recipe": (lambda _, history: history["flags"].update(recipe="gone"), "its recipe is not in recipes.py"),
}


def altered(folder, change):
    path = folder / "unfinished_mlp_fmnist.pt"
    content = checkpoint.from_bytes(path.read_bytes())
    history = json.loads(content["history"].numpy().tobytes())
    change(content, history)
    content["history"] = torch.frombuffer(bytearray(json.dumps(history).encode()), dtype=torch.uint8)
    path.write_bytes(checkpoint.to_bytes(content))


def test_a_state_that_lies_is_refused_in_one_line(unfinished, monkeypatch):
    monkeypatch.setitem(data.AUGMENTATIONS, "own", lambda images, draw, n: images + len(bytearray(n)))
    path = unfinished / "best_mlp_fmnist.pt"
    altered(unfinished, lambda _, history: history["flags"].pop("fold"))  # as an earlier version saved it
    assert record.load_unfinished(path)["history"]["flags"]["fold"] is None
    whole = (unfinished / "unfinished_mlp_fmnist.pt").read_bytes()
    for change, why in LIES.values():
        (unfinished / "unfinished_mlp_fmnist.pt").write_bytes(whole)
        altered(unfinished, change)
        with pytest.raises(checkpoint.CheckpointError, match=f"{why}.*; move it away to start anew"):
            record.load_unfinished(path)
    assert refused(unfinished, "--resume", because="recipe is not in recipes.py")
    for augment, why in (
        ({"shift": "x"}, 'pixels is "x", not a whole number from 0 to 28'),
        ({"shift": 1000}, "pixels is 1000, not"),
        ({"shift": [1, -5]}, "still is -5, not a number from 0 to 1"),
        ({"flip": 1000}, "share is 1000, not a number from 0 to 1"),
        ({"erase": 1.5}, "side is 1.5, not"),
        ({"flip": [1, 2, 3]}, "too many"),
        ({"own": "x"}, "augment is"),
        ({"own": 2**62}, "augment is"),  # more memory than there is
        ({"spin": 1}, "is not in data.py"),
    ):
        with pytest.raises(UserError, match=f"state.pt.*{why}"):
            plan._try_augmentations(augment, "state.pt")


def test_weights_and_sums_that_do_not_belong_to_a_training_are_refused(sample):
    recipe = recipes.find("published", "mlp")._replace(epochs=2, prune=0.5)
    training = engine.Training(models.build("mlp"), sample["train"], None, recipe, seed=0)
    for _ in training.run(stop=lambda: training.step == 2):
        pass
    state = copy.deepcopy(training.state_dict())
    training.load_state_dict(copy.deepcopy(state))
    name = next(iter(state["weights"]))
    loss, logits, index, losses = state["recent"][0]
    ones = torch.ones(len(sample["train"].labels))
    for lie in (
        {"weights": state["weights"] | {name: state["weights"][name].double()}},
        {"weights": {}},
        {"optimizers": []},
        {"optimizers": [{0: {"step": torch.tensor(1.0)}}]},
        {"scaler": {}},
        {"images": None},
        {"images": [torch.tensor(1.0), torch.tensor(1.0)]},
        {"images": [ones / 0, ones * 0]},
        {"images": [ones, -ones]},
        {"step": 10**6},
        {"step": 1},  # fewer than are not yet counted
        {"recent": [[loss, logits, index - 1000, losses]]},
        {"recent": [[loss, logits, index.double(), losses]]},
        {"recent": [[loss, logits, index.repeat(2), losses]]},
        {"recent": [[loss, logits, index, None]]},
    ):
        with pytest.raises((KeyError, RuntimeError, ValueError)):
            training.load_state_dict(copy.deepcopy(state | lie))


def test_links_in_the_folder_of_a_run_lead_to_no_other_file(unfinished, tmp_path):
    """The lock, the history, the state and what is kept: what a link leads to is neither written nor deleted."""
    other, names = tmp_path / "thesis.txt", ("best_mlp_fmnist.json", "unfinished_mlp_fmnist.pt")
    other.write_text("years of work")
    lock = unfinished / ".best_mlp_fmnist.lock"
    for link in (os.symlink, os.link):
        link(other, lock)
        with pytest.raises(record.RunError, match="is not the lock file of a training"):
            record.sole_writer(unfinished / "best_mlp_fmnist.pt").__enter__()
        lock.unlink()
    states = {name: (unfinished / name).rename(tmp_path / name) for name in names}
    (unfinished / names[0]).symlink_to(other)
    (unfinished / names[1]).symlink_to(states[names[1]])
    before = states[names[1]].read_bytes()
    assert run(unfinished, SHORT, "--resume") == 0, said(unfinished)
    assert (other.read_text(), states[names[1]].read_bytes()) == ("years of work", before)


@pytest.mark.parametrize("link", [os.symlink, os.link, shutil.copy])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_run_that_stops_in_its_first_epoch_removes_only_copies_that_it_has_made(link, earlier, tmp_path):
    """None that was there before it, and none that the name in use leads to."""
    files = {"best_cnn_fmnist.pt": b"weights", "best_cnn_fmnist.json": b"history"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    own = record.Record(tmp_path / "best_cnn_fmnist.pt")
    if earlier:
        record.keep_aside(own.path)
    else:
        own.begin()
    for kept in tmp_path.glob("*.????????.*"):
        place = tmp_path / f"best_cnn_fmnist{kept.suffix}"
        place.unlink()
        link(kept, place)
    if earlier:
        own.begin()
    own.end("interrupted")
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert len(list(tmp_path.iterdir())) == (2 if link is shutil.copy and not earlier else 4)


def test_a_run_that_repeats_one_of_which_there_is_a_copy_leaves_both(tmp_path, expected):
    folder = tmp_path / "run"
    expected.put(SHORT, folder)
    record.keep_aside(folder / "best_mlp_fmnist.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(folder, SHORT) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(before) == 4


def test_a_copy_that_is_a_link_is_no_copy(tmp_path):
    """It would show the new checkpoint as soon as that has taken the place of the old one."""
    path = tmp_path / "best_cnn_fmnist.pt"
    path.write_bytes(b"weights")
    link = path.with_suffix(f".{hashlib.sha256(b'weights').hexdigest()[:8]}.pt")
    link.symlink_to(path.name)
    kept = record.keep_aside(path)
    path.write_bytes(b"others")
    assert kept.read_bytes() == b"weights"


@pytest.mark.parametrize("threads", [None, 99])
def test_a_finished_run_of_the_same_flags_is_kept_where_another_is_resumed(threads, unfinished, tmp_path, expected):
    """As where a run was moved from another machine, whose last bits may be others."""
    folder, name = tmp_path / "finished", "best_mlp_fmnist"
    expected.put(SHORT, folder)
    finished = (folder / f"{name}.pt").read_bytes()
    if threads:
        history = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(history | {"threads": threads}))
    shutil.copy(unfinished / "unfinished_mlp_fmnist.pt", folder)
    assert run(folder, SHORT, "--resume") == 0, said(folder)
    assert [path.read_bytes() for path in folder.glob(f"{name}.*.pt")] == ([finished] if threads else [])


def test_a_kept_history_is_never_replaced_by_another(tmp_path):
    """A checkpoint may come again with another history, as that of a run that was interrupted."""
    path = tmp_path / "best_cnn_fmnist.pt"
    path.write_bytes(b"weights")
    for history in ("finished", "interrupted", "finished"):
        path.with_suffix(".json").write_text(history)
        kept = record.keep_aside(path)
        assert (kept.read_bytes(), kept.with_suffix(".json").read_text()) == (b"weights", history)
    assert len(list(tmp_path.iterdir())) == 6  # each pair once
    digest = hashlib.sha256(b"weightsinterrupted").hexdigest()[:16]
    path.with_suffix(".json").write_text("interrupted")
    (tmp_path / f"best_cnn_fmnist.{digest}.json").write_text("the user's")
    with pytest.raises(record.RunError, match="move that away"):
        record.keep_aside(path)


def test_a_recipe_whose_checkpoint_could_not_be_read_is_refused_before_it_trains():
    flags = recipes.upgrade({"recipe": "own", **recipes.find("published", "mlp")._asdict()})
    plan.check_flags(flags, "recipes.py")
    for values, why in (
        ({"label_smoothing": -1}, "label_smoothing is -1, not"),
        ({"select": "x"}, 'select is "x", not'),
    ):
        with pytest.raises(UserError, match=f"recipes.py: {why}"):
            plan.check_flags(flags | values, "recipes.py")


def test_another_number_of_threads_is_reported_and_recorded(unfinished):
    assert run(unfinished, SHORT, "--resume", before=partial(torch.set_num_threads, 3)) == 0
    assert re.search(r"threads changed from \d+ to 3 since the run began: its last bits may not", said(unfinished))
    (resumed,) = json.loads((unfinished / "best_mlp_fmnist.json").read_text())["resumed"]
    assert resumed["threads"] == 3


def test_a_checkpoint_of_someone_else_is_kept_when_a_run_is_resumed(unfinished):
    (unfinished / "best_mlp_fmnist.pt").write_bytes(b"not a checkpoint, but the user's")
    assert run(unfinished, SHORT, "--resume") == 0
    assert b"not a checkpoint, but the user's" in outcome(unfinished).values()


def test_a_resumed_run_goes_back_to_the_checkpoint_it_had(tmp_path):
    """A crash may come long after the save, so that the checkpoint and the history beside it are of later epochs."""
    folder, kind = tmp_path / "run", FAST_MLP
    path, state = folder / "best_mlp_fmnist.pt", folder / "unfinished_mlp_fmnist.pt"
    assert run(folder, kind, before=stop_in_the_second_epoch) == 143
    saved = state.read_bytes()
    assert run(folder, kind, "--resume") == 0
    later = record.history_of(path)
    state.write_bytes(saved)
    assert run(folder, kind, "--resume", before=stop_at_the_first_look) == 143
    history = record.history_of(path)  # None if the two did not belong together
    assert history["status"] == "interrupted"
    assert 0 < len(history["epochs"]) < len(later["epochs"])
    assert history["best_epoch"] == len(history["epochs"])


def test_two_trainings_at_once(tmp_path, expected, tally, tries):
    lost, wrong, kind = [], [], CNN._replace(epochs=3)
    expected(kind)
    for number in range(3 * tries):
        folder = tmp_path / str(number)
        processes = [start_training(tmp_path / f"{i}.log", *flags(kind), "--checkpoint-dir", folder) for i in "ab"]
        for process in processes:
            process.join()
        if sorted(process.exitcode for process in processes) != [0, 2] or outcome(folder) != expected(kind):
            wrong.append(number)
        printed = "".join((tmp_path / f"{i}.log").read_text() for i in "ab")
        assert re.search(r"train.py: error: another training \(.*\) is writing .*: wait for its end, or", printed)
    tally("two trainings at once", 3 * tries, lost, wrong)


def diverge():
    """Let the loss turn NaN in the second epoch."""
    engine.rate = lambda recipe, step, steps: float("nan") if step > steps / 2 else 1.0


def test_a_loss_that_turns_nan(tmp_path, expected, tally):
    """It costs neither the earlier checkpoint nor the next run, and leaves nothing to resume."""
    lost, wrong = [], []
    for number, (more, before) in enumerate([(["--lr", "1e30"], None), ([], diverge)]):
        folder = tmp_path / str(number)
        expected.put(SHORT, folder)
        assert run(folder, SHORT, "--seed", 1, *ALWAYS, *more, before=before) == 2
        error = rf"^train.py: error: the loss became nan in epoch {number + 1}, .* smaller --lr.*\n\Z"
        assert re.search(error, said(folder), re.MULTILINE)
        assert number or outcome(folder) == expected(SHORT)  # in the first epoch there is nothing to write yet
        if not any(content == expected(SHORT)["best_mlp_fmnist.pt"] for content in outcome(folder).values()):
            lost.append(number)
        assert run(folder, SHORT) == 0
        if outcome(folder)["best_mlp_fmnist.pt"] != expected(SHORT)["best_mlp_fmnist.pt"]:
            wrong.append(number)
    tally("loss turning NaN", 2, lost, wrong)


# --- the disk --------------------------------------------------------------------------------------------


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_up(tmp_path, harm, tally):
    """Too small for the first state of 1.2 MB, and for the next, with a checkpoint in it; then there is room again."""
    sizes = (1_000, 1_000_000, 1_400_000)
    for size in sizes:
        folder = tmp_path / str(size)
        assert run(folder, SHORT, *ALWAYS, before=partial(limit_files, size)) == 2
        assert re.search("^train.py: error: .*File too large", said(folder), re.MULTILINE)
        assert "Traceback" not in said(folder)
        assert not list(folder.glob(".*.tmp"))
        harm.resume(folder, SHORT)
    tally("disk full while saving", len(sizes), harm.lost, harm.wrong)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_small_disk_that_fills_up(tmp_path, harm, tally):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        folder = disk / "run"  # its log is on the disk too
        assert run(folder, SHORT, *ALWAYS) == 2
        assert "No space left on device" in said(folder)
        shutil.copytree(folder, tmp_path / "run")
        harm.resume(tmp_path / "run", SHORT)
    finally:
        subprocess.run(["umount", disk], check=True)
    tally("disk of 2 MB full while saving", 1, harm.lost, harm.wrong)


def give_up_overriding_permissions():
    """Bind root, too, by a folder's mode: drop CAP_DAC_OVERRIDE (1) from the effective capabilities."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, sets) == 0
        for word in (0, 1, 2):
            sets[word] &= ~(1 << 1)
        assert libc.capset(header, sets) == 0


def test_a_folder_that_cannot_be_written(tmp_path, expected, tally):
    """It costs one line, and nothing in it is touched."""
    folder = tmp_path / "run"
    expected.put(SHORT, folder)
    before, lost = outcome(folder), []
    folder.chmod(0o555)
    assert run(folder, SHORT, "--seed", 1, before=give_up_overriding_permissions) == 2
    assert re.search("^train.py: error: .*Permission denied", said(folder), re.MULTILINE)
    folder.chmod(0o755)
    if outcome(folder) != before:
        lost.append(folder)
    tally("read-only folder", 1, lost, [])


def test_a_state_that_is_truncated_or_flipped_is_never_used(tmp_path, expected, tally, tries):
    """Cut at every 4 KiB, and flipped in 200 random bits: it is refused, or what is read is what was written."""
    folder = tmp_path / "run"
    expected.put(SHORT, folder)
    assert run(folder, SHORT, "--seed", 3, before=stop_at_the_first_look) == 143
    chance, damaged, harmless = random.Random(2), tmp_path / "damaged.pt", 0
    for path in sorted(folder.glob("*.pt")):
        content, whole = path.read_bytes(), checkpoint.read(path)
        wrong = []
        cuts = range(0, len(content), 4096)
        for cut in cuts:
            damaged.write_bytes(content[:cut])
            try:
                checkpoint.read(damaged)
                wrong.append(cut)
            except checkpoint.CheckpointError:
                pass
        tally(f"{path.stem.split('_')[0]} file cut off at every 4 KiB", len(cuts), [], wrong)
        for _ in range(200 * tries):
            bit = chance.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.write_bytes(flipped)
            try:
                if not same(checkpoint.read(damaged), whole):
                    wrong.append(bit)
                harmless += 1
            except checkpoint.CheckpointError:
                pass
        tally(f"{path.stem.split('_')[0]} file with a bit flipped", 200 * tries, [], wrong)
    assert harmless < 8 * tries  # in the padding between its parts


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
