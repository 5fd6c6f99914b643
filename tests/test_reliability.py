"""No fault costs a run: whatever cuts it off, --resume brings it to the very bits of a run that nothing has cut off."""

import ctypes
import gzip
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

import pytest
import torch
from conftest import SAMPLE, in_a_fork, start_training

import checkpoint
import record

TIMES = ("seconds", "images_per_second", "training_seconds", "resumed")  # all that an interruption may change
EPOCHS = {  # of runs that take about a second
    ("mlp", "published"): 12,
    ("cnn", "published"): 3,
    ("mlp", "fast"): 6,
    ("cnn", "fast"): 2,
    ("mlp", "best"): 6,
    ("cnn", "best"): 2,
}
ALWAYS = ("--save-every", "0.001")  # which is every 25 steps: several times an epoch
CNN, MLP = ("cnn", "published"), ("mlp", "published")


def flags(kind):
    model, recipe = kind
    return ["--model", model, "--recipe", recipe, "--epochs", EPOCHS[kind], "--batch-size", 16, "--data-dir", SAMPLE]


def start(folder, kind, *more, before=None):
    """Start a run of that kind in the folder; what it says goes to a file beside it."""
    return start_training(folder.with_suffix(".log"), *flags(kind), "--checkpoint-dir", folder, *more, before=before)


def said(folder):
    log = folder.with_suffix(".log")
    return log.read_text() if log.exists() else ""


def wait_for(pattern, folder, process):
    """Until a run has said that, or has ended."""
    while not re.search(pattern, said(folder), re.MULTILINE) and process.is_alive():
        time.sleep(0.01)


def run(folder, kind, *more, before=None):
    """The exit code of such a run at its end."""
    process = start(folder, kind, *more, before=before)
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode


def outcome(folder):
    """All that a run leaves, by file name, without the times."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in [name for name in files if name.endswith(".json")]:
        history = json.loads(files[name])
        for part in (history, *history["epochs"]):
            for key in TIMES:
                part.pop(key, None)
        files[name] = history
    return files


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """expected(kind) is the outcome of an uninterrupted run of that kind."""
    outcomes = {}
    in_a_fork(int)  # so that the first run is no slower than the others

    def of(kind):
        if kind not in outcomes:
            folder = tmp_path_factory.mktemp("expected") / "-".join(kind)
            begun = time.monotonic()
            assert run(folder, kind) == 0
            training = json.loads((folder / f"best_{kind[0]}_fmnist.json").read_text())["training_seconds"]
            of.seconds[kind] = time.monotonic() - begun, training
            outcomes[kind] = outcome(folder)
            assert outcomes[kind].keys() == {f"best_{kind[0]}_fmnist.pt", f"best_{kind[0]}_fmnist.json"}
        return outcomes[kind]

    of.seconds = {}  # by kind: of the whole run, and of its training
    return of


class Harm:
    """What resuming runs has shown: those that do not come to their end, and those that end otherwise than expected."""

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
    """Each kind of run, killed three times in a row; if it has come to its end before, another begins."""
    chance, resumed = random.Random(0), 0
    for kind in EPOCHS:
        expected(kind)
        kills, whole, runs = 0, expected.seconds[kind][0], 0
        while kills < 3 * tries:
            folder, runs = tmp_path / f"{'-'.join(kind)}-{runs}", runs + 1
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
    assert resumed > harm.tries / 3  # else the moments are ill chosen
    tally("SIGKILL at a random moment", harm.tries, harm.lost, harm.wrong)


def kill_at(number):
    """Let this process be killed at the number-th step of its writing: amid a file, at its fsync, before and after its
    renaming.
    """
    steps = iter(range(1, 1000))
    open_file, fsync, replace = open, os.fsync, os.replace

    def step():
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            step()
            self.file.write(content[len(content) // 2 :])

    def stepping_fsync(descriptor):
        step()
        fsync(descriptor)

    def stepping_replace(*names):
        step()
        replace(*names)
        step()

    checkpoint.open = lambda path, mode: Torn(open_file(path, mode))
    os.fsync, os.replace = stepping_fsync, stepping_replace


def test_killed_at_every_step_of_a_save(tmp_path, harm, tally):
    """Over the first epoch: three of the state, then the checkpoint and its history."""
    for number in range(1, 21):
        folder = tmp_path / str(number)
        assert run(folder, MLP, *ALWAYS, before=partial(kill_at, number)) == -signal.SIGKILL
        for path in folder.glob("[!.]*.pt"):
            checkpoint.read(path)  # is whole
        harm.resume(folder, MLP)
    tally("SIGKILL at every step of writing", 20, harm.lost, harm.wrong)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(tmp_path, harm, expected, tally, tries, number, code):
    chance = random.Random(1)
    for attempt in range(4 * tries):
        kind = chance.choice(list(EPOCHS))
        expected(kind)
        folder = tmp_path / str(attempt)
        process = start(folder, kind)
        wait_for("^epoch", folder, process)
        time.sleep(expected.seconds[kind][1] * chance.uniform(0, 0.5))
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == code, said(folder)
        assert "Traceback" not in said(folder)
        assert re.search(r"interrupted .*, and saved; .*train.py --model \w+ --resume", said(folder))
        assert (folder / f"unfinished_{kind[0]}_fmnist.pt").exists()
        harm.resume(folder, kind)
    tally(f"{number.name} at a random moment", 4 * tries, harm.lost, harm.wrong)


@pytest.mark.parametrize("name", ["best_cnn_fmnist.json", "best_cnn_fmnist.pt"])
def test_asked_to_stop_before_the_first_epoch_ends_leaves_what_was_there(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("an earlier one")
    assert run(folder, CNN, before=stop_at_the_first_look) == 143
    assert "Traceback" not in said(folder)
    assert {path.name for path in folder.iterdir()} == {name, "unfinished_cnn_fmnist.pt"}
    assert run(folder, CNN, "--resume") == 0
    assert b"an earlier one" in [path.read_bytes() for path in folder.iterdir()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_before_training_has_begun(tmp_path, number, code):
    folder = tmp_path / "run"
    process = start(folder, CNN, before=partial(stop_on_loading, number))
    process.join()
    assert process.exitcode == code
    assert "Traceback" not in said(folder)
    assert list(folder.iterdir()) == []


def stop_on_loading(number):
    import data

    data.load = lambda *_, **__: (signal.raise_signal(number), time.sleep(10))


def test_what_a_crash_may_cost_is_what_save_every_says(tmp_path):
    """By a clock that goes on for a second with each look at it."""
    folder, log = tmp_path / "run", tmp_path / "saves"
    assert run(folder, MLP, "--epochs", 20, "--save-every", 12, before=partial(tick, log)) == 0
    saves = [int(line) for line in log.read_text().split()]
    assert len(saves) > 3
    assert all(after - before <= 12 for before, after in pairwise(saves))


def tick(log):
    import train

    ticks = iter(range(10**6))
    train.time = record.time = SimpleNamespace(monotonic=lambda: next(ticks), time=lambda: 1_000_000 - next(ticks))
    save = record.Record.save

    def logged(*arguments):
        save(*arguments)
        with open(log, "a") as file:
            print(next(ticks), file=file)

    record.Record.save = logged


def go_backwards():
    seconds = iter(range(10**9, 0, -3600))
    time.time = lambda: float(next(seconds))


def test_a_clock_that_goes_backwards(tmp_path, harm, tally):
    """It saves none the less, for the crash that follows."""
    folder = tmp_path / "run"
    process = start(folder, CNN, *ALWAYS, before=go_backwards)
    wait_for("^    2", folder, process)
    process.kill()
    process.join()
    harm.resume(folder, CNN)
    assert "resumed in epoch" in said(folder)
    seconds = json.loads((folder / "best_cnn_fmnist.json").read_text())["training_seconds"]
    tally("clock going backwards", 1, harm.lost, harm.wrong + [seconds] * (not 0 < seconds < 100))


# --- what is resumed, and what is not --------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path):
    """The folder of a run of CNN that was stopped in an epoch, with its own copy of the data beside it."""
    shutil.copytree(SAMPLE, tmp_path / "sample")
    folder = tmp_path / "run"
    process = start(folder, CNN, "--data-dir", tmp_path / "sample")
    wait_for("^    1", folder, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert (folder / "unfinished_cnn_fmnist.pt").exists()
    return folder


def refused(folder, *more, because):
    """Whether train.py refuses in one line, and touches nothing."""
    before = outcome(folder)
    assert run(folder, CNN, *more) == 2
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


def test_an_unfinished_run_is_not_overwritten_and_needs_no_flags_to_go_on(unfinished, expected):
    why = r"unfinished_cnn_fmnist.pt holds an unfinished run \(recipe published, seed 0, in epoch \d of 3\): --resume"
    assert refused(unfinished, because=why)
    assert refused(unfinished, "--seed", 1, because=why)
    short = ["--model", "cnn", "--data-dir", SAMPLE, "--checkpoint-dir", unfinished, "--resume"]
    process = start_training(unfinished.with_suffix(".log"), *short)
    process.join()
    assert outcome(unfinished) == expected(CNN)

    process = start_training(unfinished.with_suffix(".log"), *short)
    process.join()
    assert process.exitcode == 0
    assert "has finished; without --resume, another begins" in said(unfinished)
    assert run(unfinished, CNN, "--resume", "--seed", 1) == 0
    assert "no run is unfinished in" in said(unfinished)
    assert expected(CNN)["best_cnn_fmnist.pt"] in outcome(unfinished).values()  # kept


def test_data_altered_between_runs(unfinished, harm, tally):
    folder = unfinished.parent / "sample"
    original = {path: path.read_bytes() for path in folder.iterdir()}
    wrong = []
    for name in ("train-labels-idx1-ubyte", "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        content = bytearray(gzip.decompress(original[folder / f"{name}.gz"]))
        content[-1] ^= 1
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        assert run(unfinished, CNN, "--resume", "--data-dir", folder) == 2
        assert "is altered" in said(unfinished)
        sums = (folder / "SHA256SUMS").read_text()
        old = hashlib.sha256(gzip.decompress(original[folder / f"{name}.gz"])).hexdigest()
        (folder / "SHA256SUMS").write_text(sums.replace(old, hashlib.sha256(content).hexdigest()))
        if run(unfinished, CNN, "--resume", "--data-dir", folder) != 2:
            wrong.append(name)
        assert "the images are not those" in said(unfinished)
        for path, before in original.items():
            path.write_bytes(before)
    harm.resume(unfinished, CNN)
    tally("data altered between runs", 6, harm.lost, harm.wrong + wrong)


def test_another_number_of_threads_is_told_and_put_on_record(unfinished):
    assert run(unfinished, CNN, "--resume", before=partial(torch.set_num_threads, 3)) == 0
    assert re.search(r"threads changed from \d+ to 3 since the run began: its last bits may not", said(unfinished))
    (resumed,) = json.loads((unfinished / "best_cnn_fmnist.json").read_text())["resumed"]
    assert resumed["threads"] == 3


def test_a_checkpoint_of_someone_else_is_kept_when_a_run_is_resumed(unfinished):
    (unfinished / "best_cnn_fmnist.pt").write_bytes(b"not a checkpoint, but the user's")
    assert run(unfinished, CNN, "--resume") == 0
    assert b"not a checkpoint, but the user's" in outcome(unfinished).values()


def stop_at_the_first_look():
    import engine

    count = engine.Training._count
    engine.Training._count = lambda *arguments: count(*arguments) or True


def test_a_resumed_run_goes_back_to_the_checkpoint_it_had(tmp_path):
    """Where a crash came long after the save, so that the checkpoint and the history beside it are of later epochs."""
    folder, kind = tmp_path / "run", ("cnn", "fast")
    path, state = folder / "best_cnn_fmnist.pt", folder / "unfinished_cnn_fmnist.pt"
    process = start(folder, kind)
    wait_for("^    1", folder, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
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
    lost, wrong = [], []
    for number in range(3 * tries):
        folder = tmp_path / str(number)
        processes = [start_training(tmp_path / f"{i}.log", *flags(CNN), "--checkpoint-dir", folder) for i in "ab"]
        for process in processes:
            process.join()
        if sorted(process.exitcode for process in processes) != [0, 2] or outcome(folder) != expected(CNN):
            wrong.append(number)
        told = "".join((tmp_path / f"{i}.log").read_text() for i in "ab")
        assert re.search(r"train.py: error: another training \(.*\) is writing .*: wait for its end, or", told)
    tally("two trainings at once", 3 * tries, lost, wrong)


def diverge():
    """From the 70th step on, in the second epoch."""
    import engine

    engine.rate = lambda recipe, step, steps: float("nan") if step > 70 else 1.0


def test_a_loss_that_turns_nan(tmp_path, expected, tally):
    """It costs neither the earlier checkpoint nor the next run, and leaves nothing to go on with."""
    lost, wrong = [], []
    for number, (more, before) in enumerate([(["--lr", "1e30"], None), ([], diverge)]):
        folder = tmp_path / str(number)
        assert run(folder, CNN) == 0
        assert run(folder, CNN, "--seed", 1, *ALWAYS, *more, before=before) == 2
        assert re.search(r"train.py: error: the loss became nan in epoch \d", said(folder))
        if not any(content == expected(CNN)["best_cnn_fmnist.pt"] for content in outcome(folder).values()):
            lost.append(number)
        assert run(folder, CNN) == 0
        if outcome(folder)["best_cnn_fmnist.pt"] != expected(CNN)["best_cnn_fmnist.pt"]:
            wrong.append(number)
    tally("loss turning NaN", 2, lost, wrong)


# --- the disk --------------------------------------------------------------------------------------------


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_up(tmp_path, harm, tally):
    """For the history, the checkpoint of 1.7 MB, the state without it and with it; then there is room again."""
    sizes = (1_000, 500_000, 3_000_000, 6_000_000)
    for size in sizes:
        folder = tmp_path / str(size)
        assert run(folder, CNN, *ALWAYS, before=partial(limit_files, size)) == 2
        assert re.search("^train.py: error: .*File too large", said(folder), re.MULTILINE)
        assert "Traceback" not in said(folder)
        assert not list(folder.glob(".*.tmp"))
        harm.resume(folder, CNN)
    tally("disk full while saving", len(sizes), harm.lost, harm.wrong)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_small_disk_that_fills_up(tmp_path, harm, tally):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        folder = disk / "run"  # its log is on the disk too
        assert run(folder, CNN, *ALWAYS) == 2
        assert "No space left on device" in said(folder)
        shutil.copytree(folder, tmp_path / "run")
        harm.resume(tmp_path / "run", CNN)
    finally:
        subprocess.run(["umount", disk], check=True)
    tally("disk of 9 MB full while saving", 1, harm.lost, harm.wrong)


def give_up_overriding_permissions():
    """So that root, too, is bound by a folder's mode: drop CAP_DAC_OVERRIDE (1) from the effective capabilities."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, sets) == 0
        for word in (0, 1, 2):
            sets[word] &= ~(1 << 1)
        assert libc.capset(header, sets) == 0


def test_a_folder_that_cannot_be_written(tmp_path, expected, tally):
    """From the start, and from amid a run: one line, and nothing in it is touched."""
    folder = tmp_path / "run"
    assert run(folder, CNN) == 0
    before, lost = outcome(folder), []
    folder.chmod(0o555)
    assert run(folder, CNN, "--seed", 1, before=give_up_overriding_permissions) == 2
    assert re.search("^train.py: error: .*Permission denied", said(folder), re.MULTILINE)
    folder.chmod(0o755)
    if outcome(folder) != before:
        lost.append(folder)
    tally("read-only folder", 1, lost, [])


def test_a_state_that_is_truncated_or_flipped_is_never_taken(tmp_path, tally, tries):
    """At every 4 KiB, and in 500 random bits: it is refused, or what is read is what was written."""
    folder = tmp_path / "run"
    assert run(folder, MLP) == 0
    process = start(folder, MLP, *ALWAYS, "--seed", 3)
    while not (folder / "unfinished_mlp_fmnist.pt").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
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
        for _ in range(500 * tries):
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
        tally(f"{path.stem.split('_')[0]} file with a bit flipped", 500 * tries, [], wrong)
    assert harmless < 20 * tries  # in the padding between its parts


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
