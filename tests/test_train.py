"""train.py as a user runs it, on the real sample."""

import fcntl
import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    assert_one_line_error,
    in_a_fork,
    run_script,
    start_training,
    stop_in_the_second_epoch,
)

import checkpoint
import data
import engine
import metrics
import models
import recipes
from runtime import cli, device
from runtime.errors import UserError
from training import record
from training import run as training_run
from training.record import history_of


def train(folder, *arguments, model="mlp", before=None):
    flags = ["--model", model, "--data-dir", SAMPLE, "--checkpoint-dir", folder]
    return run_script("train.py", *flags, *arguments, before=before)


def same_weights(folder, other):
    a, b = (torch.load(each / "best_mlp_fmnist.pt", weights_only=True)["weights"] for each in (folder, other))
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_what_a_run_says_and_leaves(trained, sample, model):
    folder, said = trained
    text = (folder / f"best_{model}_fmnist.json").read_text()
    history = json.loads(text)
    assert history["status"] == "finished"
    assert history["checkpoint_sha256"] == hashlib.sha256((folder / history["checkpoint"]).read_bytes()).hexdigest()
    assert [row["epoch"] for row in history["epochs"]] == [1, 2, 3]
    assert len(re.findall(r"^ +\{\"epoch\": \d.*\},?$", text, re.MULTILINE)) == 3  # a line for each
    assert len(re.findall(r"^ +\d+ +\d\.\d{4} .*\d:\d\d:\d\d( best)?$", said[model], re.MULTILINE)) == 3
    best = max(history["epochs"], key=lambda row: row["select_accuracy"])
    assert best["epoch"] == history["best_epoch"]
    assert history["processor"] == device.processor()

    network, info = checkpoint.load(folder / history["checkpoint"])
    assert info["epoch"] == history["best_epoch"]
    assert info["classes"] == history["classes"] == list(data.CLASSES)
    recipe = recipes.find("published", model)._replace(epochs=3, batch_size=32)
    assert info["flags"] == {
        "recipe": "published",
        **recipe._asdict(),
        "deterministic": False,
        "teachers": [],
        "fold": None,
    }
    assert "loss: cross-entropy; augmentation: none" in said[model]
    selected = metrics.measure(engine.predict_logits(network, sample["val"]), sample["val"].labels)
    assert (selected["accuracy"], selected["ece"]) == (best["select_accuracy"], best["select_ece"])
    measured = metrics.measure(engine.predict_logits(network, sample["test"]), sample["test"].labels)
    measured["loss"] = measured.pop("log_loss")
    assert history["test"] == {"n": 500, "accuracy_ci95": history["test"]["accuracy_ci95"], **measured}
    low, high = history["test"]["accuracy_ci95"]
    interval = f"95% interval {low:.2%} to {high:.2%}, n = 500"
    assert f"test accuracy {measured['accuracy']:.2%}, {interval}; measured once, after training" in said[model]


def test_plain_lines_when_the_output_is_no_terminal(tmp_path):
    finished = train(tmp_path)
    assert "\r" not in finished.stdout + finished.stderr
    assert finished.stderr == ""


def test_a_bar_with_loss_accuracy_speed_and_eta_in_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # 24 lines of 120 characters
    flags = ["--model", "mlp", "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path]
    process = start_training(os.ttyname(theirs), *flags)
    seen = b""
    while not seen.rstrip().endswith(b"training"):  # the last line's last word
        seen += os.read(ours, 65536)
    process.join()
    os.close(theirs)
    os.close(ours)
    assert process.exitcode == 0
    assert re.search(r"epoch 5/5  loss \d\.\d{4}  acc \d\d\.\d\d% \|.*\|.*images/s  ETA 0:00:00", seen.decode())


def test_bar_and_table_share_one_estimate_of_the_time_that_is_left(sample, monkeypatch):
    """Of all seconds of the run, its evaluations and earlier processes too: 2 of 8 epochs took a minute."""
    recipe = recipes.find("published", "mlp")._replace(epochs=8)
    training = engine.Training(models.build("mlp"), sample["train"], None, recipe, seed=0)
    monkeypatch.setattr(training_run.tqdm, "refresh", lambda *_: None)
    progress = training_run.Progress(training, SimpleNamespace(seconds=60.0), lambda: None, 30)
    training.epoch, training.step = 2, training.steps
    progress(0, 1.0, 0.5)
    left = training_run.remaining(60.0, 2, 8)
    row = {"epoch": 2, "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 9.0, "images_per_second": 9.0}
    assert left == "0:03:00"
    assert progress.bar.bar_format.endswith("ETA 0:03:00")
    assert training_run.table_line(row, left).endswith(" 0:03:00")
    training.step //= 2
    progress(0, 1.0, 0.5)
    assert progress.bar.bar_format.endswith("ETA 0:04:08")  # 512 of its 920 images
    progress.close()


def test_selection_on_the_test_set_is_explicit_and_labelled(tmp_path):
    finished = train(tmp_path, "--select", "test")
    history = json.loads((tmp_path / "best_mlp_fmnist.json").read_text())
    assert "1,000 training images" in finished.stdout
    assert "chosen on 500 test images as published: an optimistic protocol" in finished.stdout
    assert "the best epoch was chosen on these very images" in finished.stdout
    assert history["train_images"] == 1000
    assert history["test"]["accuracy"] == max(row["select_accuracy"] for row in history["epochs"])


@pytest.mark.parametrize("recipe", ["fast", "best"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_recipe_trains_on_all_images_and_keeps_the_last_epoch(tmp_path, recipe, model):
    flags = ["--recipe", recipe, "--epochs", "2", "--batch-size", "100"]
    finished = train(tmp_path, *flags, model=model)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    path = tmp_path / f"best_{model}_fmnist.pt"
    history, (_, info) = history_of(path), checkpoint.load(path)
    assert history["train_images"] == 1000
    assert history["best_epoch"] == info["epoch"] == 2
    assert not any(key.startswith("select") for row in history["epochs"] for key in row)
    assert history["flags"]["recipe"] == recipe
    assert history["flags"]["precision"] in ("bfloat16", "float32")  # what "auto" came to
    assert "1,000 training images; the network after 2 epochs is kept" in finished.stdout
    assert "measured once, after training" in finished.stdout


def test_flags_change_what_a_recipe_says(tmp_path):
    flags = ["--recipe", "fast", "--epochs", "1", "--lr", "0.03", "--select", "val", "--precision", "float32"]
    assert train(tmp_path, *flags).returncode == 0
    expected = recipes.find("fast", "mlp")._replace(epochs=1, muon_lr=0.03, select="val", precision="float32")
    history = history_of(tmp_path / "best_mlp_fmnist.pt")
    assert history["flags"] == recipes.upgrade({"recipe": "fast", **expected._asdict()})
    assert history["epochs"][0]["select_accuracy"] > 0.1


# --- which recipe ----------------------------------------------------------------------------------------


def test_the_default_recipe_does_not_depend_on_the_order_of_the_table(monkeypatch):
    defaults = {"mlp": "published", "cnn": "published", "resnet": "best"}
    row = recipes.Recipe(epochs=1)
    more = {"smooth": dict.fromkeys(defaults, row)}  # a recipe that someone adds changes no default
    for table in (recipes.RECIPES, dict(reversed(recipes.RECIPES.items())), more | recipes.RECIPES):
        monkeypatch.setattr(recipes, "RECIPES", table)
        assert {model: recipes.default(model) for model in defaults} == defaults
        assert recipes.default("none of these") == "published"
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "own": {"mine": row}})
    assert recipes.default("mine") == "own"  # the only one it has
    assert recipes.find("own", "mine") == row
    with pytest.raises(UserError, match="recipe own has no row for mlp; it has mine"):
        recipes.find("own", "mlp")
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "second": {"mine": row}})
    with pytest.raises(UserError, match="--recipe: mine has the recipes own, second: choose one"):
        recipes.default("mine")


def add_a_model():
    models.MODELS["mine"] = models.MLP


def test_a_model_without_a_row_is_trained_by_the_cnns_and_this_is_printed(tmp_path):
    for recipe, flags in (("published", []), ("fast", ["--recipe", "fast"])):
        finished = train(tmp_path / recipe, *flags, "--epochs", "1", model="mine", before=add_a_model)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr == (
            f"train.py: recipes.py has no row of recipe {recipe} for mine; it is trained by the row for cnn\n"
        )
        said = json.loads((tmp_path / recipe / "best_mine_fmnist.json").read_text())["flags"]
        row = recipes.find(recipe, "cnn")._replace(epochs=1, whiten=0.0, precision=said["precision"])
        assert said == {"recipe": recipe, **row._asdict(), "deterministic": False, "teachers": [], "fold": None}
    assert train(tmp_path / "x", "--epochs", "1").stderr == ""  # and not of models that have one


# --- nothing is lost -------------------------------------------------------------------------------------


def test_an_earlier_checkpoint_is_kept_under_another_name(tmp_path):
    train(tmp_path, "--seed", 1)
    path = tmp_path / "best_mlp_fmnist.pt"
    first, first_history = path.read_bytes(), history_of(path)
    kept = tmp_path / f"best_mlp_fmnist.{hashlib.sha256(first).hexdigest()[:8]}.pt"

    finished = train(tmp_path, "--seed", 2)
    assert f"the earlier best_mlp_fmnist.pt will be kept as {cli.shown(kept)}" in finished.stdout
    assert kept.read_bytes() == first
    assert history_of(kept)["test"] == first_history["test"]
    assert history_of(path)["seed"] == 2

    path.write_bytes(b"not a checkpoint, but the user's")
    train(tmp_path, "--seed", 3)
    assert b"not a checkpoint, but the user's" in [file.read_bytes() for file in tmp_path.glob("*.pt")]


def test_a_run_that_repeats_an_earlier_one_changes_no_file(tmp_path):
    """Also one of an earlier version, made at another commit, as the checkpoints in git are: so a clone stays clean."""
    train(tmp_path, "--seed", 1)
    path = tmp_path / "best_mlp_fmnist.pt"
    repeated(tmp_path)

    content, history = checkpoint.from_bytes(path.read_bytes()), history_of(path)
    flags = {key: value for key, value in content["flags"].items() if key not in ("loss", "augment")}
    before = {"git": "another commit", "flags": flags | {"flip": False, "shift": 0, "still": 0.0, "erase": 0}}
    path.write_bytes(checkpoint.to_bytes(content | before))
    history |= {"checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **before}
    path.with_suffix(".json").write_text(json.dumps(history))
    repeated(tmp_path)

    path.with_suffix(".json").unlink()  # a checkpoint without its history is of no finished run, and gets one
    earlier = path.read_bytes()
    assert train(tmp_path, "--seed", 1).returncode == 0
    assert history_of(path)["status"] == "finished"
    assert earlier in [file.read_bytes() for file in tmp_path.glob("*.pt")]


def repeated(folder):
    """Train with seed 1 again: that must leave the folder as it was, to the byte."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    again = train(folder, "--seed", 1)
    assert again.returncode == 0, again.stderr
    assert "the same to the bit" in again.stdout
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_history_that_stands_alone_is_kept_under_its_own_name(tmp_path):
    (tmp_path / "best_mlp_fmnist.json").write_text("{}")
    said = train(tmp_path, "--epochs", "1").stdout
    kept = tmp_path / f"best_mlp_fmnist.{hashlib.sha256(b'{}').hexdigest()[:8]}.json"
    assert kept.read_text() == "{}"
    assert f"the earlier best_mlp_fmnist.json will be kept as {cli.shown(kept)}" in said


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes; the checkpoint has 400,000


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_where_it_was(tmp_path):
    train(tmp_path)
    path = tmp_path / "best_mlp_fmnist.pt"
    before, history = path.read_bytes(), history_of(path)
    assert_one_line_error(train(tmp_path, "--seed", "1", before=limit_files), "File too large")
    assert path.read_bytes() == before
    assert history_of(path) == history


def test_ctrl_c_keeps_the_best_epoch_so_far(tmp_path):
    path, log = tmp_path / "run" / "best_mlp_fmnist.pt", tmp_path / "log"
    flags = ["--model", "mlp", "--epochs", "10000", "--data-dir", SAMPLE, "--checkpoint-dir", path.parent]
    process = start_training(log, *flags)
    while not path.with_suffix(".json").exists() and process.is_alive():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    said = log.read_text()
    assert process.exitcode == 130
    assert "Traceback" not in said
    assert re.search(r"interrupted (in|after) epoch \d+.*, and saved; .* --resume .*python evaluate.py", said)
    history = history_of(path)
    assert history["status"] == "interrupted"
    assert history["best_epoch"] == checkpoint.load(path)[1]["epoch"]
    assert f"best epoch {history['best_epoch']} " in said


def test_a_run_that_leaves_images_out_resumes_to_the_same_bits(tmp_path):
    flags = ["--recipe", "best", "--epochs", 3, "--batch-size", 64]
    assert train(tmp_path / "whole", *flags, before=leave_out).returncode == 0
    stopped = train(tmp_path / "cut", *flags, before=leave_out_and_stop)
    assert stopped.returncode == 143, stopped.stderr
    resumed = train(tmp_path / "cut", "--resume", before=leave_out)
    assert "resumed in epoch 2, after step 1 of" in resumed.stdout
    whole, cut = ((tmp_path / folder / "best_mlp_fmnist.pt").read_bytes() for folder in ("whole", "cut"))
    assert whole == cut


def leave_out():
    recipes.RECIPES["best"]["mlp"] = recipes.find("best", "mlp")._replace(prune=0.5)


def leave_out_and_stop():
    leave_out()
    stop_in_the_second_epoch()


def slow_steps(seconds):
    step = engine.Training._step
    engine.Training._step = lambda *arguments: (time.sleep(seconds), step(*arguments))[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_one_step_and_not_for_many(tmp_path, number):
    log, flags = tmp_path / "log", ["--model", "mlp", "--batch-size", 16, "--data-dir", SAMPLE]
    folder = tmp_path / "run"
    process = start_training(log, *flags, "--checkpoint-dir", folder, before=partial(slow_steps, 0.3))
    while process.is_alive() and not (log.exists() and "epoch train" in log.read_text()):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, number)
    process.join(60)
    said = log.read_text()
    assert process.exitcode == 128 + number
    assert int(re.search(r"interrupted in epoch 1, after step (\d+) of 58, and saved", said).group(1)) < 20, said


def train_in_a_thread(folder):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(training_run.run(request_of(folder))))
    thread.start()
    thread.join()
    return codes


def request_of(folder):
    return training_run.Request("mlp", data_dir=SAMPLE, checkpoint_dir=folder, epochs=1)


def test_a_training_runs_in_any_thread(tmp_path, capfd):
    assert in_a_fork(train_in_a_thread, tmp_path) == [0]
    assert history_of(tmp_path / "best_mlp_fmnist.pt")["status"] == "finished"


def spoil(folder, content):
    """Replace the checkpoint as soon as the last epoch has been written."""
    add = record.Record.add_epoch

    def add_and_spoil(*arguments):
        best = add(*arguments)
        (folder / "best_mlp_fmnist.pt").write_bytes(content)
        return best

    record.Record.add_epoch = add_and_spoil


def test_what_was_written_is_read_back_before_it_is_announced(tmp_path, trained):
    other = (trained[0] / "best_mlp_fmnist.pt").read_bytes()
    for name, content, because in (
        ("damaged", other[:-999], "damaged"),
        ("other", other, "was replaced during the run"),
    ):
        folder = tmp_path / name
        finished = train(folder, "--epochs", 1, before=partial(spoil, folder, content))
        assert_one_line_error(finished, because)
        assert "is in" not in finished.stdout
        resumed = train(folder, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert "best epoch 1 " in resumed.stdout
        assert history_of(folder / "best_mlp_fmnist.pt")["test"]["n"] == 500
        assert content in [path.read_bytes() for path in folder.glob("*.pt")]  # nothing of anybody's is lost


def emulate():
    device.NATIVE_BFLOAT16 = False


def test_emulated_bfloat16_works_and_is_said_to_be_slow(tmp_path):
    finished = train(tmp_path, "--epochs", 1, "--precision", "bfloat16", before=emulate)
    assert finished.returncode == 0
    assert finished.stderr == "train.py: cpu emulates bfloat16: --precision float32 is faster here\n"
    assert train(tmp_path / "auto", "--epochs", 1, "--recipe", "fast", before=emulate).stderr == ""


# --- flags -----------------------------------------------------------------------------------------------


def hide_tensorboard():
    sys.modules["tensorboard"] = None


def test_tensorboard_without_its_package_says_what_to_install(tmp_path):
    finished = train(tmp_path, "--tensorboard", tmp_path, before=hide_tensorboard)
    assert_one_line_error(finished, "pip install -r requirements-optional.txt")


def test_deterministic_gives_the_same_result_on_the_cpu(tmp_path):
    train(tmp_path / "a", "--epochs", 1)
    train(tmp_path / "b", "--epochs", 1, "--deterministic")
    assert same_weights(tmp_path / "a", tmp_path / "b")


BAD_FLAGS = {
    (): "required: --model",
    ("--model", "vit"): "--model 'vit': the models here are mlp, cnn",
    ("--model",): "--model: expected one argument",
    ("--model", "mlp", "--epochs", "0"): "--epochs: '0' is not a whole number from 1",
    ("--model", "mlp", "--epochs", "-3"): "--epochs: '-3' is not a whole number|--epochs: expected one argument",
    ("--model", "mlp", "--epochs", "1.5"): "--epochs: '1.5' is not a whole number",
    ("--model", "mlp", "--epochs", "9" * 5000): "--epochs: '9999",
    ("--model", "mlp", "--lr", "0"): "--lr: '0' is not a number above 0",
    ("--model", "mlp", "--lr", "nan"): "--lr: 'nan' is not a number",
    ("--model", "mlp", "--lr", "inf"): "--lr: 'inf' is not a number",
    ("--model", "mlp", "--lr", "fast"): "--lr: 'fast' is not a number",
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


def misspell(table):
    change = {"augment": {"filp": 0.5}} if table == "augmentation" else {"loss": "cross-entropy"}
    recipes.RECIPES["best"]["cnn"] = recipes.find("best", "cnn")._replace(**change)


@pytest.mark.parametrize("table", ["augmentation", "loss"])
def test_a_misspelt_name_in_a_recipe_gets_one_clear_line(table, tmp_path):
    finished = train(tmp_path, "--recipe", "best", model="cnn", before=partial(misspell, table))
    assert_one_line_error(finished, f"recipes.py.*{table} '.*' is not in .*, which has ")
    assert not list(tmp_path.glob("*.pt"))


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "cli.run(main)" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
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


def test_every_script_is_asked_for_its_help():
    assert {"train.py", "evaluate.py", "analyze_errors.py", "predict.py", "bench.py"} <= set(SCRIPTS)


CACHE_VARIABLES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")  # PyTorch sets its own for children
COMMANDS = "train.py --model cnn --recipe fast --epochs 1", "evaluate.py", "analyze_errors.py"
RUN = """try: runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as end: assert not end.code"""
LOADED = """import gc, analysis.classify
print(sorted({'sklearn', 'scipy', 'pandas', 'matplotlib', 'PIL'} & set(sys.modules)))
print(gc.isenabled(), gc.get_freeze_count() > 0)"""


def test_a_clone_writes_nothing_outside_itself_and_loads_only_what_it_needs(tmp_path):
    """With an empty home folder, as on a bare machine; in one process, which loads PyTorch once."""
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    keep_out = shutil.ignore_patterns(".*", "data", "runs", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=keep_out)
    environment = {key: value for key, value in os.environ.items() if key not in CACHE_VARIABLES}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    code = ["import runpy, sys"]
    for command in COMMANDS:
        code += [f"sys.argv = {[*command.split(), '--data-dir', str(SAMPLE)]}", RUN]
        code += [LOADED] if command == "evaluate.py" else []
    finished = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=clone, env=environment, check=True, capture_output=True, text=True
    )  # fmt: skip
    assert "\n[]\nTrue True\n" in finished.stdout
    assert list(home.iterdir()) == []
    assert data.load("test", data_dir=clone / "tests" / "sample")[0].source == "sample"
