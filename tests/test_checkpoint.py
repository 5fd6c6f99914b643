"""checkpoint.py: what is written comes back; what is not a checkpoint is refused in one line, and nothing runs."""

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from torch import nn

import checkpoint
import models
from data import CLASSES

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


# --- what is written comes back --------------------------------------------------------------------------


def test_a_checkpoint_comes_back_whole(saved):
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
@pytest.mark.parametrize("changed", ["models.py", "kernels.c"])
def test_the_git_revision_tells_changed_code_but_not_what_the_scripts_write(changed, tmp_path):
    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def revision():
        return run(sys.executable, "-c", "import checkpoint; print(checkpoint.git_revision())")

    for module in ("checkpoint.py", "data.py", "kernels.c", "kernels.py", "models.py"):
        shutil.copy(ROOT / module, tmp_path)
    (tmp_path / "best.pt").write_text("old")
    run("git", "init", "--quiet")
    run("git", "add", ".")
    run("git", "-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "--quiet", "-m", "all")
    (tmp_path / "best.pt").write_text("new")
    assert revision() == run("git", "rev-parse", "HEAD")
    with open(tmp_path / changed, "a") as file:
        file.write("\n")
    assert revision() == run("git", "rev-parse", "HEAD") + "+changes"


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    path, model = saved
    digest = checkpoint.save(tmp_path / "b.pt", model, **DETAILS)
    assert path.read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


# --- atomic ----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(saved):
    path, _ = saved
    before = path.read_bytes()
    code = (
        "import resource, models, checkpoint; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"checkpoint.save({str(path)!r}, models.build('cnn'), **{DETAILS!r})"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "File too large" in finished.stderr
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


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(saved):
    path, _ = saved
    code = (
        f"import models, checkpoint; print('ready', flush=True); [checkpoint.save({str(path)!r}, "
        f"models.build('cnn'), **{DETAILS!r}) for _ in range(10**6)]"
    )
    for delay in (0.03, 0.05, 0.08):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert checkpoint.load(path)[1]["epoch"] == 3


# --- someone else's weights ------------------------------------------------------------------------------


class TheirNet(nn.Module):
    """The published CNN as others write it, with layer names of their own."""

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
def test_a_foreign_state_dict_is_matched_by_order_and_shape_and_said_so(tmp_path, capsys, wrap):
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
    assert info == {"model": "cnn"}
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
def test_the_scripts_tell_it_in_one_line_too(saved, tmp_path, script):
    write_bad("malicious", tmp_path / "bad.pt", saved[0])
    assert_one_line_error(run_script(script, tmp_path / "bad.pt", "--data-dir", SAMPLE), "bad.pt: .* refused")
    assert not (tmp_path / "ran").exists()
    assert_one_line_error(run_script(script, tmp_path / "none.pt"), "none.pt: no such file; .*train.py --model cnn")
