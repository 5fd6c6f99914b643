"""Whatever the terminal, the disk and the caller are like: no traceback, nothing lost, and no work for nothing."""

import contextlib
import csv
import ctypes
import hashlib
import importlib
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE, assert_one_line_error, in_a_fork, run_script, start_training
from PIL import Image
from test_reliability import give_up_overriding_permissions
from tqdm import tqdm

import checkpoint
import data
from runtime import cli
from training import distill

CNN, MLP = (ROOT / "checkpoints" / f"best_{name}_fmnist.pt" for name in ("cnn", "mlp"))
NAMES = ("服.png", "bad\udcff.png")  # outside of most encodings and of the figures' font; not Unicode at all
FULL = Path("/dev/full")


# --- what is printed, and where --------------------------------------------------------------------------


def print_as(encoding):
    """Let this process print as a system of that encoding does: cp1252 is Windows', where output is redirected."""
    sys.stdout.reconfigure(encoding=encoding, errors="strict")


@pytest.fixture
def named(sample, tmp_path):
    """A folder of two pictures and a checkpoint, with names that are hard to print."""
    for name in NAMES:
        Image.fromarray(sample["test"].images[0].numpy()).save(tmp_path / name)
    return tmp_path, shutil.copy(MLP, tmp_path / "bad\udcff\x1b[2J\nworse.pt")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_no_name_ends_a_run_or_loses_a_row(named, encoding):
    folder, path = named
    pictures, before = [folder / name for name in NAMES], partial(print_as, encoding)
    finished = run_script("predict.py", *pictures, "--csv", "--show", folder / "seen.png", before=before)
    assert (finished.returncode, finished.stderr.count("\n")) == (0, 2), finished.stderr  # no warning either
    _, *rows = csv.reader(finished.stdout.splitlines())
    garment = "服" if encoding == "utf-8" else "\\u670d"
    assert [Path(row[0]).name for row in rows] == [f"{garment}.png", "bad\\udcff.png"]
    result = folder / "服\udcff\x1b[2J\nworse.json"
    finished = run_script("evaluate.py", path, "--data-dir", SAMPLE, "--json", result, before=before)
    assert finished.returncode == 0, finished.stderr
    assert not re.search(r"\x1b|^worse", finished.stdout, re.MULTILINE)
    assert json.loads(result.read_text())["checkpoint"].endswith(f"/{path.name}")


def test_a_name_that_a_checkpoint_could_not_hold_is_refused_before_the_training(named):
    finished = run_script("train.py", "--model", "mlp", "--recipe", "distilled", "--teacher", named[1])
    assert_one_line_error(finished, "a checkpoint cannot record this name")


def replace_what_was_read(path):
    """Have another file take the place of a checkpoint as soon as it has been read."""
    print_as("ascii")
    load, other = checkpoint.load_all, CNN.read_bytes()
    checkpoint.load_all = lambda *given: (load(*given), Path(path).write_bytes(other))[0]


def test_the_report_of_a_checkpoint_whose_name_is_not_unicode_and_that_is_replaced(named):
    folder, path = named
    flags = ["--data-dir", SAMPLE, "--figures-dir", folder]
    finished = run_script("analyze_errors.py", path, *flags, before=partial(replace_what_was_read, path))
    assert finished.returncode == 0, finished.stderr
    assert "bad\\udcff\\x1b[2J worse.pt" in (folder / "report.html").read_text()
    digest = json.loads((folder / "analysis.json").read_text())["checkpoint_sha256"]
    assert digest == hashlib.sha256(MLP.read_bytes()).hexdigest()  # of what was measured


def test_no_text_steers_the_terminal_but_a_progress_bar():
    stream = io.StringIO()
    cli._neutralise(stream)
    print("a\x1b[2Jb\x9b1mc\u202ed\re\u2067\a 服\u202f|", file=stream)
    assert stream.getvalue() == "a\\x1b[2Jb\\x9b1mc\\u202ed\\re\\u2067\\x07 服\u202f|\n"
    for _ in tqdm(tqdm([1], "outer", file=stream), "\x1b[2Jinner", file=stream, ascii=True, leave=False):
        pass
    assert "\router: 100%" in stream.getvalue()
    assert "\r\\x1b[2Jinner:   0%" in stream.getvalue()
    assert stream.getvalue().count("\x1b") == stream.getvalue().count("\x1b[A")


def close_streams():
    """Leave this process like a new one of Python whose caller has closed the three streams."""
    os.closerange(0, 3)
    sys.stdin = sys.stdout = sys.stderr = None


def test_closed_streams_cost_nothing(tmp_path):
    """The files that a script opens must not get the numbers of the streams, which it prints to."""
    flags = ["--model", "mlp", "--epochs", 1, "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path]
    assert run_script("train.py", *flags, before=close_streams).returncode == 0
    checkpoint.load(tmp_path / "best_mlp_fmnist.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_mlp_fmnist.json", "best_mlp_fmnist.pt"]
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "evaluate.py", MLP, "--data-dir", SAMPLE]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0  # also while it loads PyTorch


def fill_stdout():
    os.dup2(os.open(FULL, os.O_WRONLY), 1)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
def test_a_full_disk_behind_stdout_is_a_one_line_error():
    assert_one_line_error(run_script("evaluate.py", MLP, "--data-dir", SAMPLE, before=fill_stdout), "No space left")
    command = f"PYTHONUNBUFFERED= {sys.executable} {ROOT / 'evaluate.py'} --help > {FULL}"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert_one_line_error(finished, "No space left")  # and nothing of Python's own


# --- signals ---------------------------------------------------------------------------------------------


def take_terminal(name):
    """Let this process have a terminal of its own, as after a login: the first one that a new session opens."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for stream in range(3):
        os.dup2(terminal, stream)


def test_a_lost_terminal_costs_nothing(tmp_path):
    """The terminal of an SSH session goes: SIGHUP comes, and from then on nothing can be printed."""
    ours, theirs = pty.openpty()
    flags = ["--model", "mlp", "--epochs", 9999, "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path]
    process = start_training(os.devnull, *flags, before=partial(take_terminal, os.ttyname(theirs)))
    said = b""
    while not re.search(rb"^ +1 ", said, re.MULTILINE):
        assert select.select([ours], [], [], 60)[0], "it says nothing more"
        said += os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    process.join(60)
    assert process.exitcode == 129
    saved = checkpoint.read(tmp_path / "unfinished_mlp_fmnist.pt")
    assert saved["training"]["epoch"] > 1


def hang_up_on_loading():
    data.load = lambda *_, **__: (signal.raise_signal(signal.SIGHUP), time.sleep(10))


@pytest.mark.parametrize("script", ["evaluate.py", "analyze_errors.py", "export.py", "demo.py"])
def test_other_scripts_end_at_once(script, tmp_path):
    flags = {"analyze_errors.py": ["--figures-dir", tmp_path], "export.py": ["--output", tmp_path / "a.onnx"]}
    given = cli.PICTURES_CHECKPOINT if script == "demo.py" else CNN  # which has a rule for pictures
    finished = run_script(script, given, *flags.get(script, []), before=hang_up_on_loading)
    assert finished.returncode == 129
    assert finished.stderr == ""


def raise_within(number, before):
    signal.signal(number, before)
    with cli.StopSignals() as signals:
        signal.raise_signal(number)
    return signals.code, signal.getsignal(number) == before


def test_a_signal_is_a_request_to_stop_unless_it_is_ignored():
    assert in_a_fork(raise_within, signal.SIGHUP, signal.SIG_DFL) == (129, True)
    assert in_a_fork(raise_within, signal.SIGHUP, signal.SIG_IGN) == (None, True)  # as under nohup


def test_training_may_run_outside_of_the_main_thread():
    entered = []

    def enter():
        with cli.StopSignals() as signals:
            entered.append(signals.code)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [None]


# --- places that cannot be written -----------------------------------------------------------------------


def run_where_permissions_count(commands):
    """Run scripts one after the other in this process; loading the data would be work for nothing."""
    give_up_overriding_permissions()
    data.load = lambda *_, **__: pytest.fail("the data are loaded although the result cannot be written")
    ended = []
    for script, *arguments in commands:
        sys.argv = [script, *map(str, arguments)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.run(importlib.import_module(script.removesuffix(".py")).main)
        ended.append(subprocess.CompletedProcess(sys.argv, end.value.code, out.getvalue(), err.getvalue()))
    return ended


def cases(locked):
    """Yield commands whose result goes into a folder that cannot be written, or to a folder's name."""
    yield "evaluate.py", "--json", locked / "a.json"
    yield "evaluate.py", "--json", locked.parent / "folder.json"
    yield "analyze_errors.py", "--figures-dir", locked
    yield "analyze_errors.py", "--figures-dir", locked.parent, "--deep", "--deep-dir", locked / "new"
    yield "analyze_errors.py", "--figures-dir", locked.parent, "--export", locked / "new"
    yield "compare.py", "--figures-dir", locked / "new"
    yield "compare.py", "--json", locked / "a.json"
    yield "compare.py", "--markdown", locked / "a.md"
    yield "bench.py", "--figures-dir", locked
    yield "export.py", locked / CNN.name
    yield "export.py", CNN, "--output", locked / "a.onnx"
    yield "predict.py", SAMPLE, "--show", locked / "a.png"
    yield "train.py", "--model", "mlp", "--tensorboard", locked / "new", "--checkpoint-dir", locked.parent
    yield "train.py", "--model", "mlp", "--checkpoint-dir", locked
    yield "pictures.folder", locked, locked / "new"


def test_what_cannot_be_written_is_noticed_before_the_work(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    (tmp_path / "folder.json").mkdir()
    shutil.copy(CNN, locked)
    locked.chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    for finished in in_a_fork(run_where_permissions_count, [*cases(locked)]):
        assert_one_line_error(finished, "locked.*: Permission|folder.json is a folder")
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix != ".lock"] == before


def test_a_cache_that_cannot_be_written_is_done_without(sample, monkeypatch, capsys):
    monkeypatch.setattr(distill, "CACHE", SAMPLE / "SHA256SUMS" / "below a file")
    teachers = distill.describe([MLP])
    assert len(distill.answers(teachers, sample["test"])) == 500
    assert "the teachers' answers are not cached: " in capsys.readouterr().err


def mount_read_only():
    """Let this process, and no other, see the clone on a read-only disk; exit with 77 where that is not allowed."""
    separate = ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS: mounts of its own
    root = shlex.quote(str(ROOT))
    commands = f"mount --make-rprivate / && mount --bind {root} {root} && mount -o remount,ro,bind {root}"
    if not separate or subprocess.run(commands, shell=True, capture_output=True).returncode:
        sys.exit(77)
    os.chdir(ROOT)
    with pytest.raises(OSError, match="Read-only"):
        Path("new").touch()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_clone_on_a_read_only_disk_answers():
    finished = run_script("evaluate.py", MLP, "--data-dir", SAMPLE, before=mount_read_only)
    if finished.returncode == 77:
        pytest.skip("mounting is not allowed here")
    assert finished.returncode == 0, finished.stderr
    assert "  accuracy  " in finished.stdout


@pytest.mark.parametrize("name", ["CPU", "cuda:99", "meta", "xpu", "warp", ""])
def test_a_device_that_is_not_here(name):
    finished = run_script("evaluate.py", "--device", name)
    assert_one_line_error(finished, f"device '{name}' cannot be used; this machine has cpu")


# --- commands in messages --------------------------------------------------------------------------------


def test_commands_are_those_that_work_here(tmp_path, monkeypatch):
    scripts = tmp_path / "my venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(scripts))  # as activated
    assert cli.command("train.py", "--data-dir", "a b") == "python train.py --data-dir 'a b'"
    assert cli.install() == "python -m pip install -r requirements-optional.txt"
    monkeypatch.setenv("PATH", os.defpath)
    assert cli.python() == f"'{cli.shown(scripts)}/python'"
    monkeypatch.chdir(tmp_path)
    assert cli.command("train.py") == f"'my venv/bin/python' {ROOT}/train.py"
