"""checkpoint.py: what is written is read back; what is no checkpoint is refused in one line, and nothing in it runs."""

import hashlib
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script, start_fork
from torch import nn

import checkpoint
import data
import models
import recipes
from data import CLASSES
from runtime import cli, device

DETAILS = {
    "name": "cnn",
    "epoch": 3,
    "metrics": {"select_accuracy": 0.5},
    "flags": {"lr": 1e-3},
    "seed": 7,
    "data": "x",
}


@pytest.fixture
def saved(tmp_path):
    model = models.build("cnn")
    checkpoint.save(tmp_path / "a.pt", model, **DETAILS)
    return tmp_path / "a.pt", model


def assert_same_weights(a, b):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


# --- what is written is read back ------------------------------------------------------------------------


def test_a_checkpoint_is_read_back_whole(saved):
    path, model = saved
    loaded, info = checkpoint.load(path)
    assert_same_weights(model, loaded)
    assert not loaded.training
    assert (info["model"], info["epoch"], info["seed"]) == ("cnn", 3, 7)
    assert info["classes"] == list(CLASSES)
    assert (info["mean"], info["std"]) == (0.5, 0.5)
    assert info["metrics"] == DETAILS["metrics"]
    assert info["flags"] == DETAILS["flags"]
    assert info["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_the_git_revision_shows_changed_code_but_not_what_the_scripts_write(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@localhost", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def revision():
        device.git_revision.cache_clear()
        return device.git_revision()

    assert Path(__file__).parent.parent == cli.ROOT
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "models.py", tmp_path)
    (tmp_path / "best.pt").write_text("old")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    try:
        assert revision() is None  # no repository yet
        git("init", "--quiet")
        git("add", ".")
        git("commit", "--quiet", "-m", "all")
        (tmp_path / "best.pt").write_text("new")
        assert revision() == git("rev-parse", "HEAD")
        for changed in (tmp_path / "models.py", tmp_path / "runtime" / "kernels.c"):
            before = changed.read_bytes()
            changed.write_bytes(before + b"\n")
            assert revision() == git("rev-parse", "HEAD") + "+changes"
            changed.write_bytes(before)
    finally:
        device.git_revision.cache_clear()


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    path, model = saved
    digest = checkpoint.save(tmp_path / "b.pt", model, **DETAILS)
    assert path.read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


# --- atomic ----------------------------------------------------------------------------------------------


def save_where_files_are_short(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoint.save(path, models.build("cnn"), **DETAILS)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(saved, tmp_path_factory):
    path, _ = saved
    before, log = path.read_bytes(), tmp_path_factory.mktemp("log") / "log"
    start_fork(log, save_where_files_are_short, path).join()
    assert "File too large" in log.read_text()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_is_written_reaches_the_disk_before_it_takes_its_name_and_the_name_after(saved, monkeypatch):
    """The order that a loss of power asks for, which no test can cut off."""
    path, model = saved
    done, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(("fsync", "folder" if os.path.isdir(name) else os.path.getsize(name)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    checkpoint.save(path, model, **DETAILS)
    assert done == [("fsync", path.stat().st_size), "replace", ("fsync", "folder")]


def save_for_ever(path):
    model = models.build("cnn")
    print("ready", flush=True)
    while True:
        checkpoint.save(path, model, **DETAILS)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(saved, tmp_path_factory):
    path, _ = saved
    log = tmp_path_factory.mktemp("log") / "log"
    for delay in (0.03, 0.05, 0.08):
        log.unlink(missing_ok=True)
        process = start_fork(log, save_for_ever, path)
        while not (log.exists() and log.read_text()) and process.is_alive():
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert checkpoint.load(path)[1]["epoch"] == 3


# --- what a checkpoint says of itself --------------------------------------------------------------------

NAMES = tuple(f"class {number}" for number in range(10))


def test_class_names_are_kept_and_those_of_other_data_refused(saved, sample, tmp_path):
    checkpoint.save(tmp_path / "mine.pt", saved[1], **DETAILS, classes=NAMES)
    info = checkpoint.load(tmp_path / "mine.pt")[1]
    assert info["classes"] == list(NAMES)
    test = sample["test"]
    checkpoint.check_classes("mine.pt", info, test._replace(classes=NAMES))
    with pytest.raises(checkpoint.CheckpointError, match=r"^mine\.pt: .*class 0, .*; those of sample are T-shirt"):
        checkpoint.check_classes("mine.pt", info, test)
    for other in (NAMES[::-1], CLASSES):
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.check_classes("mine.pt", info, test._replace(classes=other))


TEACHER = {"checkpoint": "t.pt", "sha256": "0", "model": "cnn"}
CAUTIONS = [  # flags, split, kind
    ({"select": "val"}, "test", None),
    ({"select": "val"}, "val", "chosen"),
    ({"select": "val"}, "train", "trained"),
    ({"select": "test"}, "test", "chosen"),
    ({"select": "test"}, "val", "trained"),
    ({"select": "last"}, "test", None),
    ({"select": "last"}, "val", "trained"),
    ({"select": "last", "teachers": [TEACHER | {"select": "test"}]}, "test", "teacher"),
    ({"select": "last", "teachers": [TEACHER | {"select": "val"}]}, "test", None),
    ({}, "val", "chosen"),  # of an early version, which recorded less
]


@pytest.mark.parametrize(("flags", "split", "kind"), CAUTIONS)
def test_what_keeps_images_from_being_new_is_said(flags, split, kind, sample):
    info = {"flags": flags, "data": "sample"}
    said = checkpoint.caution(info, sample[split])
    assert (said and said[0]) == kind
    assert checkpoint.caution(info | {"data": "other"}, sample[split])[0] == "other data"
    assert checkpoint.caution({}, sample[split])[0] == "unknown"


def test_flags_of_earlier_versions_are_read_as_todays():
    rest = {"deterministic": False, "teachers": []}
    today = {"recipe": "distilled", **recipes.find("distilled", "mlp")._asdict(), **rest}
    old = {key: value for key, value in today.items() if key not in ("augment", "loss")}
    old |= {"flip": True, "shift": 1, "still": 0.3, "erase": 0}
    assert recipes.upgrade(old) == today == recipes.upgrade(today)
    assert old["flip"] is True  # the caller's dict is not changed
    earliest = recipes.upgrade({"epochs": 5, "batch_size": 128, "lr": 1e-3, "select": "val"})
    assert earliest == {"recipe": "published", **recipes.find("published", "mlp")._asdict(), **rest}
    best = recipes.upgrade({"epochs": 65, "flip": True, "shift": 2, "still": 0.0, "erase": 12})
    assert best["augment"] == recipes.find("best", "resnet").augment


@pytest.mark.parametrize("path", sorted(ROOT.glob("checkpoints/**/*.pt")), ids=lambda path: path.stem)
def test_every_checkpoint_that_is_shipped_can_be_read(path):
    _, info = checkpoint.load(path)
    flags = recipes.upgrade(info["flags"])
    assert {*recipes.Recipe._fields} <= flags.keys()
    assert not {"flip", "shift", "still", "erase"} & flags.keys()
    data.check_values(flags["augment"])


# --- someone else's weights ------------------------------------------------------------------------------


class TheirNet(nn.Module):
    """The published CNN as others write it, with other layer names."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        )
        self.classifier = nn.Sequential(
            *[nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)]
        )

    def forward(self, images):
        return self.classifier(self.features(images))


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model_state_dict", "data_parallel", "half"])
def test_a_foreign_state_dict_is_matched_by_order_and_shape_with_a_notice(tmp_path, capsys, wrap):
    theirs = TheirNet().eval()
    state = theirs.state_dict()
    if wrap == "data_parallel":
        state = {f"module.{key}": value for key, value in state.items()}
    elif wrap == "half":
        state = {key: value.half() for key, value in state.items()}
        theirs = theirs.half().float()
    elif wrap != "plain":
        state = {"epoch": 4, wrap: state}
    torch.save(state, tmp_path / "theirs.pt")
    model, info = checkpoint.load(tmp_path / "theirs.pt")
    said = capsys.readouterr().err
    assert "matched to cnn by order and shape" in said
    assert "classifier.4.bias as fc2.bias" in said
    assert said.count("\n") == 1
    assert info == {"model": "cnn", "classes": list(CLASSES)}
    images = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(model(images), theirs(images))


def test_a_bare_state_dict_of_ours_is_matched_by_name_whatever_its_order(tmp_path, capsys):
    model = models.build("mlp")
    state = model.state_dict()
    torch.save({key: state[key] for key in reversed(state)}, tmp_path / "bare.pt", _use_new_zipfile_serialization=False)
    assert_same_weights(model, checkpoint.load(tmp_path / "bare.pt")[0])
    assert "matched to mlp by name" in capsys.readouterr().err


# --- files that are no checkpoints -----------------------------------------------------------------------


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write_bad(kind, path, saved_path):
    content = saved_path.read_bytes()
    ours = torch.load(saved_path, weights_only=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    elif kind.startswith("truncated"):
        path.write_bytes(content[: len(content) * int(kind[9:]) // 100])
    elif kind == "bit flip":  # in the middle of the weights, which torch.load alone does not notice
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("word/document.xml", "x" * 100_000)
    elif kind == "folder":
        path.mkdir()
    elif kind == "malicious":
        torch.save({"format": checkpoint.FORMAT, "weights": Malicious(path.with_name("ran"))}, path)
    elif kind == "malicious, old format":
        torch.save({"fc1.weight": Malicious(path.with_name("ran"))}, path, _use_new_zipfile_serialization=False)
    elif kind == "malicious, plain pickle":
        path.write_bytes(pickle.dumps(Malicious(path.with_name("ran"))))
    elif kind == "whole model":
        torch.save(models.build("cnn"), path)
    elif kind == "wrong shape":
        torch.save(nn.Linear(784, 10).state_dict(), path)
    elif kind == "a list":
        torch.save([1, 2, 3], path)
    elif kind == "no tensors":
        torch.save({"fc1.weight": 3}, path)
    elif kind == "integers":
        torch.save({key: value.long() for key, value in ours["weights"].items()}, path)
    elif kind == "not finite":
        torch.save({key: value * float("nan") for key, value in ours["weights"].items()}, path)
    elif kind == "sparse":
        torch.save(ours | {"weights": {k: v.to_sparse() for k, v in ours["weights"].items()}}, path)
    elif kind == "ours, other shapes":
        torch.save(ours | {"model": "mlp"}, path)
    elif kind == "ours, lacking":
        torch.save({key: value for key, value in ours.items() if key != "seed"}, path)
    elif kind == "ours, newer":
        torch.save(ours | {"format": "fmnist-checkpoint-99"}, path)
    elif kind == "ours, unknown model":
        torch.save(ours | {"model": "vit"}, path)
    elif kind == "ours, odd model":
        torch.save(ours | {"model": [torch.zeros(2)]}, path)
    elif kind == "ours, other classes":
        torch.save(ours | {"classes": torch.zeros(10)}, path)
    elif kind == "ours, nine classes":
        torch.save(ours | {"classes": ours["classes"][:9]}, path)
    elif kind == "ours, a long class":
        torch.save(ours | {"classes": [*ours["classes"][:9], "x" * 41]}, path)
    elif kind == "ours, other flags":
        torch.save(ours | {"flags": {"augment": 3, "teachers": 7}}, path)
    elif kind == "ours, another normalisation":
        torch.save(ours | {"mean": 0.2860}, path)


BAD = {
    "empty": "damaged, truncated or not a PyTorch checkpoint",
    "text": "damaged, truncated or not a PyTorch checkpoint",
    "truncated1": "damaged, truncated or not a PyTorch checkpoint",
    "truncated50": "damaged, truncated or not a PyTorch checkpoint",
    "truncated99": "damaged, truncated or not a PyTorch checkpoint",
    "bit flip": "damaged: the checksum of .* is wrong",
    "other zip": "a zip archive, but not one of torch.save",
    "folder": "not a file",
    "malicious": "refused, nothing was run",
    "malicious, old format": "refused, nothing was run",
    "malicious, plain pickle": "refused, nothing was run",
    "whole model": "refused, nothing was run",
    "wrong shape": r"its tensors \(10x784, 10\) are not those of mlp or cnn",
    "a list": "holds a list, not a model's state_dict",
    "no tensors": "holds a dict, not a model's state_dict",
    "integers": "holds a dict, not a model's state_dict",
    "not finite": "weights that are not finite",
    "sparse": "refused, nothing was run",
    "ours, other shapes": "its weights do not have the shapes of mlp",
    "ours, lacking": "lacks seed",
    "ours, newer": "written in fmnist-checkpoint-99",
    "ours, unknown model": "holds a 'vit'; the models here are mlp, cnn",
    "ours, odd model": "its model is not what a checkpoint holds there",
    "ours, other classes": "its classes is not what",
    "ours, nine classes": "there must be 10 different class names",
    "ours, a long class": "is not 1 to 40 printable characters",
    "ours, other flags": "its flags (is|are) not what",
    "ours, another normalisation": "another normalisation",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_gets_one_clear_line_and_nothing_in_it_runs(saved, tmp_path, kind):
    path = tmp_path / "bad.pt"
    write_bad(kind, path, saved[0])
    with pytest.raises(checkpoint.CheckpointError, match=BAD[kind]) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not path.with_name("ran").exists()


@pytest.mark.parametrize("script", ["evaluate.py", "analyze_errors.py"])
def test_the_scripts_say_it_in_one_line_too(saved, tmp_path, script):
    write_bad("malicious", tmp_path / "bad.pt", saved[0])
    assert_one_line_error(run_script(script, tmp_path / "bad.pt", "--data-dir", SAMPLE), "bad.pt: .* refused")
    assert not (tmp_path / "ran").exists()
    assert_one_line_error(run_script(script, tmp_path / "none.pt"), "none.pt: no such file; .*train.py --model cnn")
