"""train.py as a user runs it, on the real sample."""

import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script

import checkpoint
import cli
import data
import engine
import recipes
from record import history_of


def train(folder, *arguments, model="mlp", before=None):
    flags = ["--model", model, "--data-dir", SAMPLE, "--checkpoint-dir", folder]
    return run_script("train.py", *flags, *arguments, before=before)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_what_a_run_says_and_leaves(trained, sample, model):
    folder, said = trained
    history = json.loads((folder / f"best_{model}_fmnist.json").read_text())
    assert history["status"] == "finished"
    assert history["checkpoint_sha256"] == hashlib.sha256((folder / history["checkpoint"]).read_bytes()).hexdigest()
    assert [row["epoch"] for row in history["epochs"]] == [1, 2, 3]
    assert len(re.findall(r"^ +\d+ +\d\.\d{4} .*\d:\d\d:\d\d( best)?$", said[model], re.MULTILINE)) == 3
    best = max(history["epochs"], key=lambda row: row["select_accuracy"])
    assert best["epoch"] == history["best_epoch"]

    network, info = checkpoint.load(folder / history["checkpoint"])
    assert info["epoch"] == history["best_epoch"]
    recipe = recipes.find("published", model)._replace(epochs=3, batch_size=32)
    assert info["flags"] == {"recipe": "published", **recipe._asdict(), "deterministic": False, "teachers": []}
    logits = engine.predict_logits(network, sample["val"])
    assert engine.loss_and_accuracy(logits, sample["val"].labels)[1] == best["select_accuracy"]
    logits = engine.predict_logits(network, sample["test"])
    accuracy = engine.loss_and_accuracy(logits, sample["test"].labels)[1]
    assert history["test"]["accuracy"] == accuracy
    low, high = history["test"]["accuracy_ci95"]
    assert f"test accuracy {accuracy:.2%}, 95% interval {low:.2%} to {high:.2%}, n = 500" in said[model]
    assert "measured once, after training" in said[model]


def test_plain_lines_when_the_output_is_no_terminal(tmp_path):
    finished = train(tmp_path)
    assert "\r" not in finished.stdout + finished.stderr
    assert finished.stderr == ""


def test_a_bar_with_loss_accuracy_speed_and_eta_in_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # 24 lines of 120 characters
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--model", "mlp", "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path],
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        seen += chunk
    assert process.wait() == 0
    assert re.search(r"epoch 5/5  loss \d\.\d{4}  acc \d\d\.\d\d% \|.*\|.*images/s  ETA 00:00", seen.decode())


def test_selection_on_the_test_set_is_explicit_and_labelled(tmp_path):
    finished = train(tmp_path, "--select", "test")
    history = json.loads((tmp_path / "best_mlp_fmnist.json").read_text())
    assert "1,000 training images" in finished.stdout
    assert "the best epoch was chosen on these very images" in finished.stdout
    assert history["train_images"] == 1000
    assert history["test"]["accuracy"] == max(row["select_accuracy"] for row in history["epochs"])


@pytest.mark.parametrize("recipe", ["fast", "best"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_recipe_trains_on_all_images_and_keeps_the_last_epoch(tmp_path, recipe, model):
    finished = train(tmp_path, "--recipe", recipe, "--epochs", "2", "--batch-size", "100", model=model)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    path = tmp_path / f"best_{model}_fmnist.pt"
    history, (_, info) = history_of(path), checkpoint.load(path)
    assert history["train_images"] == 1000
    assert history["best_epoch"] == info["epoch"] == 2
    assert not any(key.startswith("select") for row in history["epochs"] for key in row)
    assert history["flags"]["recipe"] == recipe
    assert history["flags"]["precision"] in ("bfloat16", "float32")  # what "auto" came to
    assert "1,000 training images; the last of 2 epochs is kept" in finished.stdout
    assert "measured once, after training" in finished.stdout
    again = train(tmp_path / "again", "--recipe", recipe, "--epochs", "2", "--batch-size", "100", model=model)
    assert again.returncode == 0
    a, b = (torch.load(folder / path.name, weights_only=True)["weights"] for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_flags_change_what_a_recipe_says(tmp_path):
    flags = ["--recipe", "fast", "--epochs", "1", "--lr", "0.03", "--select", "val", "--precision", "float32"]
    assert train(tmp_path, *flags).returncode == 0
    expected = recipes.find("fast", "mlp")._replace(epochs=1, muon_lr=0.03, select="val", precision="float32")
    history = history_of(tmp_path / "best_mlp_fmnist.pt")
    assert history["flags"] == {"recipe": "fast", **expected._asdict(), "deterministic": False, "teachers": []}
    assert history["epochs"][0]["select_accuracy"] > 0.1


# --- nothing is lost -------------------------------------------------------------------------------------


def test_an_earlier_checkpoint_is_kept_under_another_name_and_an_equal_one_is_not_doubled(tmp_path):
    train(tmp_path, "--seed", 1)
    path = tmp_path / "best_mlp_fmnist.pt"
    first, first_history = path.read_bytes(), history_of(path)
    kept = tmp_path / f"best_mlp_fmnist.{hashlib.sha256(first).hexdigest()[:8]}.pt"

    again = train(tmp_path, "--seed", 1)
    assert path.read_bytes() == first  # the same seed, the same bits, to the file
    assert not kept.exists()
    assert "the same to the bit" in again.stdout

    finished = train(tmp_path, "--seed", 2)
    assert f"the earlier best_mlp_fmnist.pt is kept as {cli.shown(kept)}" in finished.stdout
    assert kept.read_bytes() == first
    assert history_of(kept)["test"] == first_history["test"]
    assert history_of(path)["seed"] == 2

    path.write_bytes(b"not a checkpoint, but the user's")
    train(tmp_path, "--seed", 3)
    assert b"not a checkpoint, but the user's" in [file.read_bytes() for file in tmp_path.glob("*.pt")]


def test_a_history_that_stands_alone_is_kept_and_told_as_what_it_is(tmp_path):
    (tmp_path / "best_mlp_fmnist.json").write_text("{}")
    said = train(tmp_path, "--epochs", "1").stdout
    kept = tmp_path / f"best_mlp_fmnist.{hashlib.sha256(b'{}').hexdigest()[:8]}.json"
    assert kept.read_text() == "{}"
    assert f"the earlier best_mlp_fmnist.json is kept as {cli.shown(kept)}" in said


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_where_it_was(tmp_path):
    train(tmp_path)
    path = tmp_path / "best_mlp_fmnist.pt"
    before, history = path.read_bytes(), history_of(path)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"  # bytes; the checkpoint has 400,000
    code = f"import resource, cli, train; {limit}; cli.run(train.main)"
    arguments = ["--model", "mlp", "--seed", "1", "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path]
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert_one_line_error(finished, "File too large")
    assert path.read_bytes() == before
    assert history_of(path) == history


def test_ctrl_c_keeps_the_best_epoch_so_far(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--model", "mlp", "--epochs", "10000", "--data-dir", SAMPLE,
         "--checkpoint-dir", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = tmp_path / "best_mlp_fmnist.pt"
    while not path.with_suffix(".json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert re.search(r"interrupted after epoch \d+, and saved; .* --resume .*python evaluate.py", err)
    history = history_of(path)
    assert history["status"] == "interrupted"
    assert history["best_epoch"] == checkpoint.load(path)[1]["epoch"]
    assert f"best epoch {history['best_epoch']} " in out


def test_a_loss_that_turns_nan_is_one_clear_line_and_costs_no_earlier_checkpoint(tmp_path):
    train(tmp_path)
    before = (tmp_path / "best_mlp_fmnist.pt").read_bytes()
    assert_one_line_error(train(tmp_path, "--lr", "1e30"), "the loss became nan in epoch 1", "smaller --lr")
    assert (tmp_path / "best_mlp_fmnist.pt").read_bytes() == before


# --- flags -----------------------------------------------------------------------------------------------


def test_tensorboard_scalars_are_those_of_the_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--tensorboard", tmp_path / "board")
    (run,) = (tmp_path / "board").iterdir()
    events = EventAccumulator(str(run)).Reload()
    rows = history_of(tmp_path / "best_mlp_fmnist.pt")["epochs"]
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_second"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("val_accuracy")] == [1, 2, 3, 4, 5]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx([row["select_loss"] for row in rows])


def test_tensorboard_without_its_package_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['tensorboard'] = None; import cli, train; cli.run(train.main)"
    arguments = ["--model", "mlp", "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path, "--tensorboard", tmp_path]
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert_one_line_error(finished, "pip install -r requirements-optional.txt")


def test_deterministic_gives_the_same_result_on_the_cpu(tmp_path):
    train(tmp_path / "a", "--epochs", 1)
    train(tmp_path / "b", "--epochs", 1, "--deterministic")
    a, b = (torch.load(tmp_path / x / "best_mlp_fmnist.pt", weights_only=True)["weights"] for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


BAD_FLAGS = {
    (): "required: --model",
    ("--model", "vit"): "--model 'vit': the models here are mlp, cnn",
    ("--model",): "--model: expected one argument",
    ("--model", "mlp", "--epochs", "0"): "--epochs: '0' is not a whole number from 1",
    ("--model", "mlp", "--epochs", "-3"): "--epochs: '-3' is not a whole number|--epochs: expected one argument",
    ("--model", "mlp", "--epochs", "1.5"): "--epochs: '1.5' is not a whole number",
    ("--model", "mlp", "--epochs", "9" * 5000): "--epochs: '9999",
    ("--model", "mlp", "--lr", "0"): "--lr: '0' is not a number above 0",
    ("--model", "mlp", "--lr", "nan"): "--lr: 'nan' is not a number above 0",
    ("--model", "mlp", "--lr", "inf"): "--lr: 'inf' is not a number above 0",
    ("--model", "mlp", "--lr", "fast"): "--lr: 'fast' is not a number above 0",
    ("--model", "mlp", "--batch-size", "0"): "--batch-size: '0' is not a whole number",
    ("--model", "mlp", "--seed", "-1"): "--seed",
    ("--model", "mlp", "--seed", "4294967296"): "--seed: '4294967296' is not a whole number from 0 to 4294967295",
    ("--model", "mlp", "--select", "train"): "--select: invalid choice",
    ("--model", "mlp", "--recipe", "best-ever"): "--recipe: invalid choice: 'best-ever'",
    ("--model", "mlp", "--precision", "int8"): "--precision: invalid choice: 'int8'",
    ("--model", "mlp", "--precision", "float16", "--device", "cpu"): "float16 needs a GPU; on a CPU there is bfloat16",
    ("--model", "mlp", "--device", "warp"): "device 'warp' cannot be used",
    ("--model", "mlp", "--epoch", "3"): "unrecognized arguments: --epoch 3",
    ("--model", "mlp", "extra"): "unrecognized arguments: extra",
    ("--model", "mlp", "--checkpoint-dir", "/proc/nothing"): "/proc/nothing",
    ("--model", "mlp", "--checkpoint-dir", str(ROOT / "README.md")): "README.md",
}


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=lambda flags: " ".join(flags)[:40])
def test_a_mistaken_flag_gets_one_clear_line(flags):
    assert_one_line_error(run_script("train.py", *flags), BAD_FLAGS[flags])


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "analyze_errors.py", "bench.py"])
def test_help_does_not_wait_for_pytorch(script):
    code = (
        "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = [{script!r}, '--help']\n{code}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "usage:" in finished.stdout
    assert finished.stdout.endswith("[]\n")


CACHE_VARIABLES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")  # PyTorch sets its own for children


def test_nothing_is_written_outside_the_clone(tmp_path):
    """Run from a clone, with a home of its own, as on a bare machine."""
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    keep_out = shutil.ignore_patterns(".git", ".venv", ".cache", ".pytest-tmp", "data", "runs", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=keep_out)
    environment = {key: value for key, value in os.environ.items() if key not in CACHE_VARIABLES}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    for command in (["train.py", "--model", "cnn", "--recipe", "fast"], ["evaluate.py"], ["analyze_errors.py"]):
        subprocess.run(
            [sys.executable, *command, "--data-dir", SAMPLE],
            cwd=clone, env=environment, check=True, capture_output=True,
        )  # fmt: skip
    assert list(home.iterdir()) == []
    assert data.load("test", data_dir=clone / "tests" / "sample")[0].source == "sample"


def test_a_run_that_leaves_images_out_goes_on_to_the_same_bits(tmp_path):
    flags = ["--recipe", "best", "--epochs", 3, "--batch-size", 16]
    assert train(tmp_path / "whole", *flags, before=leave_out).returncode == 0
    stopped = train(tmp_path / "cut", *flags, before=stop_in_the_second_epoch)
    assert stopped.returncode == 143, stopped.stderr
    resumed = train(tmp_path / "cut", "--resume", before=leave_out)
    assert "resumed in epoch 2, after step 25 of" in resumed.stdout
    whole, cut = ((tmp_path / folder / "best_mlp_fmnist.pt").read_bytes() for folder in ("whole", "cut"))
    assert whole == cut


def leave_out():
    recipes.RECIPES["best"]["mlp"] = recipes.find("best", "mlp")._replace(prune=0.5)


def stop_in_the_second_epoch():
    leave_out()
    count = engine.Training._count
    engine.Training._count = lambda training, *arguments: count(training, *arguments) or training.epoch == 2
