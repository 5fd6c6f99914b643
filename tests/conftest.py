"""What the tests share: the sample, the scripts as a user runs them, and checkpoints that they trained."""

import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch: two tests run at a time, and start many processes
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait for one another must not keep the cores busy

import data
from dataset import fetch, published, sources
from runtime import cli

ROOT = cli.ROOT
SAMPLE = ROOT / "tests" / "sample"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def pytest_addoption(parser):
    parser.addoption("--tries", type=int, default=1, help="multiply the random tries in tests of faults by this number")
    parser.addoption("--report", type=lambda p: Path(p).resolve(), help="test this report.html, of the whole data set")


@pytest.fixture
def tries(request):
    """By what to multiply the usual number of random tries."""
    return request.config.getoption("--tries")


@pytest.fixture
def tally(record_property):
    """tally(fault, tries, lost, wrong) adds a row to the table after the tests, and fails if any is lost or wrong."""

    def count(fault, tries, lost, wrong):
        record_property("fault", (fault, tries, len(lost), len(wrong)))
        assert not lost
        assert not wrong

    return count


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    recorded = [report.user_properties for report in reports if getattr(report, "when", None) == "call"]
    faults = [value for properties in recorded for name, value in properties if name == "fault"]
    if faults:
        terminalreporter.section("faults")
        for row in [("fault", "tries", "lost", "wrong"), ("---",) * 4, *faults]:
            terminalreporter.line("| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in row) + " |")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """A failure that shows a name which is not Unicode must reach the process that prints it."""
    return _printable((yield))


def _printable(value):
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return type(value)(map(_printable, value)) if isinstance(value, list | tuple) else value


ALIKE = (6, 3, 4, 0, 2, 7, 0, 9, 0, 7)  # for each class another one that people and models confuse with it


def made_up_votes(labels):
    """Votes like people's on images with these labels, int (n, 10), 67 on each."""
    random, counts = np.random.default_rng(0), []
    for place, label in enumerate(labels):
        likely = np.full(10, 0.01)
        likely[label] += random.uniform(0.2, 1.2 if label < 8 else 6)
        likely[random.choice([ALIKE[label], (label + 3) % 10], p=[0.8, 0.2])] += random.uniform(0, 0.6)
        tied = np.bincount([*[label] * 33, *[ALIKE[label]] * 33, 3], minlength=10)
        counts.append(random.multinomial(67, likely / likely.sum()) if place % 12 else tied)
    return np.array(counts)


# --- processes -------------------------------------------------------------------------------------------

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.loaded"])  # found where pytest is started in the root; else forks are slower


def in_a_fork(function, *arguments):
    """Call a function of a test module in a new process, and return its result; the process must not die."""
    ours, theirs = _forks.Pipe(duplex=False)
    process = _forks.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the process died with exit code {process.exitcode}")


def _answer(connection, function, arguments):
    os.chdir(ROOT)
    connection.send(function(*arguments))


def start_fork(log, function, *arguments):
    """Start a function of a test module in a new process, which prints to the file `log`."""
    process = _forks.Process(target=_run, args=(function, arguments, log, log))
    process.start()
    return process


def start_training(log, *arguments, before=None):
    """Start train.py in a new process, which prints to the file `log`; before() is called there first."""
    return start_fork(log, _script, "train.py", [str(word) for word in arguments], before)


def _run(function, arguments, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
    os.chdir(ROOT)
    function(*arguments)


TIMES = ("seconds", "images_per_second", "training_seconds", "resumed")  # all that an interruption may change


def without_times(contents):
    """Files' contents by name, with histories read, and without all that an interruption may change in them."""
    for name in [name for name in contents if name.endswith(".json")]:
        history = json.loads(contents[name])
        for part in (history, *history["epochs"]):
            for key in TIMES:
                part.pop(key, None)
        contents[name] = history
    return contents


def _script(name, arguments, before):
    sys.argv = [name, *arguments]
    if before:
        before()
    script = importlib.import_module(name.removesuffix(".py"))
    importlib.import_module("runtime.cli").run(script.main)  # anew: before() may have unloaded the modules


def run_script(name, *arguments, before=None, **options):
    """Run a script of the repository in the root folder; returns the finished process with its text output.

    It runs in a fork, which need not load PyTorch and where before() is called first. With options of subprocess.run
    it starts from scratch instead.
    """
    if options:
        command = [sys.executable, ROOT / name, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, kind) for kind in ("out", "err")]
        words = [str(word) for word in arguments]
        process = _forks.Process(target=_run, args=(_script, (name, words, before), *files))
        process.start()
        process.join(300)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))


def stop_at_the_first_look():
    """As a run_script's before: ask every training to stop as soon as it looks whether to."""
    stop_training(lambda training: True)


def stop_in_the_second_epoch():
    """The same, as soon as it looks in its second epoch."""
    stop_training(lambda training: training.epoch == 2)


def stop_training(when):
    """Let every engine.Training of this process stop at its next look once when(training) is true."""
    import engine

    run = engine.Training.run
    engine.Training.run = lambda training, progress=None, stop=None: run(training, progress, lambda: when(training))


def assert_one_line_error(finished, *parts):
    """A user's mistake: exit code 2 and one line on stderr, with all the parts and no traceback."""
    errors = [line for line in finished.stderr.splitlines() if not line.startswith(("data:", "checkpoint:"))]
    assert finished.returncode == 2, finished.stderr
    assert len(errors) == 1, finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr
    for part in parts:
        assert re.search(part, errors[0]), errors[0]


# --- data and checkpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sample():
    """The sample's splits by name: real images, 920 train, 80 val, 500 test."""
    names = ("train", "val", "train+val", "test")
    return dict(zip(names, data.load(*names, data_dir=SAMPLE), strict=True))


def first(split, n):
    """The first n images of a split."""
    return split._replace(images=split.images[:n], labels=split.labels[:n])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with what `train.py` wrote for both models on the sample, and what it printed."""
    folder = once(tmp_path_factory, "trained", train_both)
    return folder / "checkpoints", json.loads((folder / "said.json").read_text())


def train_both(folder):
    flags = ["--epochs", 3, "--batch-size", 32, "--data-dir", SAMPLE, "--checkpoint-dir", folder / "checkpoints"]
    said = {}
    for model in ("mlp", "cnn"):
        finished = run_script("train.py", "--model", model, *flags)
        assert finished.returncode == 0, finished.stderr
        said[model] = finished.stdout
    (folder / "said.json").write_text(json.dumps(said))


def once(factory, name, make):
    """Call make(folder) for an empty folder once for all processes of pytest, and return the folder."""
    own = factory.getbasetemp()  # of this process, in a folder of all
    folder = (own.parent if own.name == f"popen-{os.environ.get('PYTEST_XDIST_WORKER')}" else own) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def order_of_the_sample(sample, tmp_path_factory):
    """A file as dataset/order.npz, made by the same function for the sample."""
    path = tmp_path_factory.mktemp("order") / "order.npz"
    parts = {"train": sample["train+val"], "t10k": sample["test"]}
    published.write_order(path, {part: (s.images.numpy(), s.labels.byte().numpy()) for part, s in parts.items()})
    return path


@pytest.fixture
def sample_as_published(monkeypatch, tmp_path, order_of_the_sample):
    """Make the sample pass as the published set, and move the places where that is looked for into an empty folder."""
    lines = (line.split() for line in (SAMPLE / "SHA256SUMS").read_text().splitlines())
    monkeypatch.setattr(published, "PUBLISHED", {name: digest for digest, name in lines})
    monkeypatch.setattr(published, "ORDER", order_of_the_sample)
    monkeypatch.setattr(fetch, "FETCHED", tmp_path / "fetched")
    monkeypatch.setattr(sources, "KERAS", tmp_path / "keras")
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(fetch, "MIRRORS", ())
    monkeypatch.delenv("FMNIST_DIR", raising=False)
    return tmp_path


def six_views(images):
    """Images uint8 (n, 28, 28) as test-time augmentation moves them along the diagonal, and all of it mirrored."""
    from torch.nn import functional as F

    padded = [F.pad(each, (1, 1, 1, 1)) for each in (images, images.flip(2))]
    return [each[:, start : start + 28, start : start + 28] for each in padded for start in (0, 1, 2)]


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()
