"""docs/extending.md: what it says to type works as it stands, in a copy of the clone."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE, assert_one_line_error, in_a_fork, run_script, start_fork
from PIL import Image

import data

WALKS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S))
KEEP_OUT = (".git", ".venv", ".*cache", ".pytest-tmp", "data", "runs", "figures", "__pycache__", "photos")
NAMES = [f"sort {letter}" for letter in "abcdefghij"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of this repository, which the walks change one after the other."""
    folder = tmp_path_factory.mktemp("extending") / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*KEEP_OUT))
    return folder


def in_a_shell(clone: Path, command: str) -> subprocess.CompletedProcess:
    """Run a command in the clone as a shell does, with the sample as its data."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "FMNIST_DIR": str(SAMPLE), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def run(clone: Path, command: str) -> subprocess.CompletedProcess:
    """Run a script in the clone from such a command, in a process that has loaded PyTorch but none of the modules."""
    python, *words = shlex.split(command.replace("python -m ", "python "))
    assert python == "python"
    return run_script(*words, before=functools.partial(move_to, clone))


def move_to(clone: Path) -> None:
    """Let the scripts and modules be those of the clone."""
    own = {path.stem for path in clone.iterdir()}
    for name in [name for name in sys.modules if name.split(".")[0] in own]:
        del sys.modules[name]
    sys.path.insert(0, str(clone))
    os.chdir(clone)
    os.environ |= {"FMNIST_DIR": str(SAMPLE), "CUDA_VISIBLE_DEVICES": ""}


def walk(clone: Path, title: str, run: Callable = run) -> str:
    """Type the code blocks of a walk into the files they name, run its commands, and return what they print."""
    for block in re.findall(r"^```python\n# (?=\S+\.py\n)(.*?)^```", WALKS[title], re.M | re.S):
        name, code = block.split("\n", 1)
        with open(clone / name, "a") as file:
            file.write(f"\n\n{code}")
    printed = ""
    (commands,) = re.findall(r"^```sh\n(.*?)^```", WALKS[title], re.M | re.S)
    for command in commands.splitlines():
        finished = run(clone, command)
        assert finished.returncode == 0, f"{command}\n{finished.stderr}"
        printed += finished.stdout + finished.stderr
    return printed


def history(clone: Path, model: str) -> dict:
    return json.loads((clone / "again" / f"best_{model}_fmnist.json").read_text())


def test_a_model_is_a_class_and_a_line(clone):
    printed = walk(clone, "A model", in_a_shell)
    assert "15,770 parameters" in printed
    assert "15,770 parameters" in WALKS["A model"]
    assert re.search(r"recipe published for tiny.*row for cnn", printed)
    assert re.search(r"best_tiny_fmnist\.pt: tiny\n(.*\n)+ 1 +\d+\.\d\d%", printed)
    assert history(clone, "tiny")["flags"]["recipe"] == "published"
    log = clone / "tests.log"
    tests = start_fork(log, run_tests_of_every_model, clone)
    tests.join()
    assert tests.exitcode == 0, log.read_text()


def run_tests_of_every_model(clone: Path) -> None:
    """Exit as pytest does after the clone's tests that look at every model."""
    move_to(clone)
    sys.modules.pop("conftest", None)
    plain = "tests/test_kernels.py::test_operations_in_another_order_give_the_bits_of_the_plain_model[tiny]"
    keys = "tests/test_composition.py::test_models_have_keys_of_16_digits_that_differ"
    sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", plain, keys]))


def test_a_recipe_is_a_row(clone):
    walk(clone, "A recipe")
    flags = history(clone, "mlp")["flags"]
    assert (flags["recipe"], flags["epochs"], flags["label_smoothing"]) == ("smooth", 10, 0.2)  # of --set
    assert flags["augment"] == {"shift": 1, "flip": 0.5}
    assert "smooth" in run(clone, "python train.py --help").stdout
    assert_one_line_error(run(clone, "python train.py --model cnn --recipe smooth"), "smooth", "cnn")
    assert_one_line_error(run(clone, "python train.py --model mlp --recipe smoth"), "smoth", "smooth")


def test_an_augmentation_is_a_function_and_its_value(clone):
    walk(clone, "An augmentation")
    assert history(clone, "mlp")["flags"]["augment"] == {"flip": 0.5, "contrast": 0.3}


@pytest.mark.parametrize("lost", ["misspelt", "unused"])
def test_an_augmentation_that_would_be_left_out_is_an_error(clone, lost):
    path = clone / "recipes.py"
    before = path.read_text()
    path.write_text(before.replace('"contrast": 0.3', '"contrst": 0.3' if lost == "misspelt" else ""))
    assert path.read_text() != before
    finished = run(clone, "python train.py --model mlp --recipe contrast")
    path.write_text(before)
    assert_one_line_error(finished, "contrst" if lost == "misspelt" else "contrast", "augmentation")


def test_a_loss_is_a_function_and_its_name(clone):
    printed = walk(clone, "A loss")
    assert "focal loss" in printed
    found = history(clone, "mlp")
    assert found["flags"]["loss"] == "focal"
    last = found["epochs"][-1]
    assert last["train_loss"] < 0.8 * last["select_loss"]  # one is the focal loss, the other the log loss
    assert any("focal loss" in label for label in in_a_fork(labels_of_curves, clone))


def labels_of_curves(clone: Path) -> list[str]:
    """Draw a history's curves in the clone, and return the labels of the axes."""
    move_to(clone)
    from analysis import plots

    return [axes.get_ylabel() for axes in plots.training_curves(history(clone, "mlp")).axes]


def test_a_metric_is_a_function(clone):
    printed = walk(clone, "A metric")
    assert re.search(r"top-2 accuracy +0?\.?\d", printed)
    measured = json.loads((clone / "again" / "measured.json").read_text())
    assert measured["accuracy"] < measured["top2"] < 1
    for row in history(clone, "mlp")["epochs"]:
        assert row["select_accuracy"] < row["select_top2"] <= 1


def test_ten_classes_are_a_folder(clone, sample):
    for split in ("train", "test"):
        images, labels = (values.numpy() for values in sample[split][1:3])
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = clone / "photos" / split / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:04}.png")
    printed = walk(clone, "Ten classes")
    for name in NAMES:
        assert re.search(rf"^{name} +\d+\.\d%", printed, re.M), printed
    assert not any(name in printed for name in data.CLASSES)
    assert history(clone, "mlp")["classes"] == NAMES


def test_ten_classes_are_arrays(tmp_path, sample, monkeypatch):
    (block,) = re.findall(r"^```python\n(import data.*?)^```", WALKS["Ten classes"], re.M | re.S)
    monkeypatch.chdir(tmp_path)
    images, labels = sample["train"][1:3]
    test_images, test_labels = sample["test"][1:3]
    exec(block, locals() | {"names": NAMES})
    (written,) = data.load("test", data_dir=tmp_path / "mine")
    assert written.classes == tuple(NAMES)
    assert (written.images == test_images).all()
    assert (written.labels == test_labels).all()
