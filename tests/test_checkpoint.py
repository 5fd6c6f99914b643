"""checkpoint.py: what is written is read back; what is no checkpoint is refused in one line, and nothing in it runs."""

import hashlib
import io
import json
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
from runtime import cli, device, weights
from runtime.code_key import code_key
from training import run, trial

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
    assert (info["code"], info["data_sha256"]) == (None, None)
    assert info["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    content = checkpoint.serialise(model, **DETAILS, code="1a2b", data_sha256="3c4d")
    again, info = checkpoint.from_content(path, content)
    assert_same_weights(model, again)
    assert (info["code"], info["data_sha256"]) == ("1a2b", "3c4d")
    earlier = {key: value for key, value in checkpoint.read(path).items() if key not in checkpoint.NEWER}
    torch.save(earlier, path)
    assert checkpoint.load(path)[1]["code"] is None
    with pytest.raises(checkpoint.CheckpointError, match=r"a\.pt: damaged: the checksum"):
        checkpoint.from_content(path, content.replace(b"1a2b", b"1a2c"))


def everything():
    """Values of all the kinds that a training saves, among them tensors of each dtype, form and way to share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    base, number = torch.arange(60.0).reshape(3, 4, 5), {"number": 3}
    views = [base, base[1:], base.mT, base[:, 1::2, -1], base[0, 0, 0], base.flatten()[7:], base[:0]]
    return {
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "parameters": dict(model.named_parameters()),
        "dtypes": [torch.rand(3, 2).mul(9).to(dtype) for dtype in weights.DTYPES.values()],
        "views": [*views, base[:1, :1, :1].expand(7, 4, 5), torch.zeros(0, 3), torch.tensor(True)],
        "plain": [None, True, False, 0, -1, 2**40, -(2**63), 2.5, float("inf"), "", "é☃", (), (1,), (1, (2, "x")), {}],
        "shared": [number, number],
        "long": list(range(3_000)),
        7: {1.5: "a", None: "b", True: "c"},
    }


def assert_same(a, b):
    """The same types and values, and tensors with the same bits, strides, offsets, and storages."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())
        assert (a.requires_grad, a.is_leaf) == (b.requires_grad, b.is_leaf)
        assert [*a.untyped_storage()] == [*b.untyped_storage()]
    elif isinstance(a, dict | list | tuple):
        assert len(a) == len(b)
        parts = zip(a.items(), b.items(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        for x, y in parts:
            assert_same(x, y)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
    else:
        assert a == b


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"_use_new_zipfile_serialization": False},
        {"_use_new_zipfile_serialization": False, "pickle_protocol": 3},
        {"_use_new_zipfile_serialization": False, "pickle_protocol": 5},
        {"pickle_protocol": 4},
        {"pickle_protocol": 5},
    ],
)
def test_whatever_torch_save_writes_is_read_to_the_bit(options):
    content = io.BytesIO()
    torch.save(everything(), content, **options)
    read = weights.parse(Path("a.pt"), content.getvalue())
    assert_same(read, torch.load(io.BytesIO(content.getvalue()), weights_only="pickle_protocol" not in options))
    first, second = read["views"][:2]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() % 64 == 0 for tensor in read["model"].values())
    assert read["shared"][0] is read["shared"][1]


class Buffers(nn.Module):
    """A network with buffers as positions and masks have them, one parameter in another dtype, and tied weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("position_ids", torch.arange(28))
        self.register_buffer("mask", torch.full((28, 28), float("-inf")).triu(1))
        self.register_buffer("seen", torch.zeros(28, dtype=torch.bool))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.first = nn.Linear(784, 10, bias=False)
        self.second = nn.Linear(784, 10, bias=False)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.second(images.flatten(1)) * self.scale.float()


def test_what_a_model_of_ones_own_saves_is_read_back_whatever_its_buffers_hold(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "buffers", Buffers)
    model = models.build("buffers")
    model.seen[3] = True
    torch.manual_seed(5)
    following = torch.rand(1)
    torch.manual_seed(5)
    checkpoint.save(tmp_path / "a.pt", model, **DETAILS | {"name": "buffers"})
    loaded, _ = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(torch.rand(1), following)  # building it draws no random number of the caller's
    assert_same_weights(model, loaded)
    monkeypatch.setattr(Buffers, "get_extra_state", lambda _: {"note": "no tensor"}, raising=False)
    with pytest.raises(checkpoint.CheckpointError, match="_extra_state, which is no tensor"):
        checkpoint.serialise(model, **DETAILS | {"name": "buffers"})


def test_a_loss_of_any_size_is_read_back(tmp_path):
    checkpoint.save(
        tmp_path / "a.pt", models.build("mlp"), **DETAILS | {"name": "mlp", "metrics": {"train_loss": 1.9e26}}
    )
    assert checkpoint.load(tmp_path / "a.pt")[1]["metrics"] == {"train_loss": 1.9e26}


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


class Shuffled(nn.Module):
    """A model that keeps random values where its state_dict does not have them."""

    def __init__(self):
        super().__init__()
        self.order, self.fc = torch.randperm(784), nn.Linear(784, 10)
        self.register_buffer("sign", torch.randn(784).sign(), persistent=False)

    def forward(self, images):
        return self.fc(images.flatten(1)[:, self.order] * self.sign)


def test_a_model_that_answers_otherwise_once_it_is_read_back_is_one_line(sample, tmp_path, monkeypatch):
    """Before the training; and where only training shows it, at its end, before its test accuracy is announced."""
    monkeypatch.setitem(models.MODELS, "shuffled", Shuffled)
    line = r"models\.py: shuffled answers otherwise once it is saved and read back: .*register_buffer"
    with pytest.raises(trial.TrialError, match=line):
        trial.check("shuffled", recipes.find("published", "mlp"), sample["train"], torch.float32)
    monkeypatch.setattr(trial, "check", lambda *_: None)
    with pytest.raises(trial.TrialError, match=line):
        run.run(run.Request("shuffled", epochs=1, data_dir=SAMPLE, checkpoint_dir=tmp_path, device="cpu"))
    assert (tmp_path / "best_shuffled_fmnist.pt").exists()
    assert json.loads((tmp_path / "best_shuffled_fmnist.json").read_text())["test"] is None


def test_a_checkpoint_of_changed_code_is_measured_with_a_caution(saved, tmp_path):
    path, said = tmp_path / "mine.pt", []
    for code in (None, code_key("cnn"), "0123456789abcdef"):
        checkpoint.save(path, saved[1], **DETAILS, code=code)
        said.append(checkpoint.changed(checkpoint.load(path)[1]))
    assert said[:2] == [None, None]
    assert "the code of cnn in models.py has changed since it was trained" in said[2]
    finished = run_script("evaluate.py", path, "--data-dir", SAMPLE, "--json", tmp_path / "a.json")
    assert said[2] in " ".join(finished.stdout.split())
    assert said[2] in json.loads((tmp_path / "a.json").read_text())["caution"]


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
    rest = {"deterministic": False, "teachers": [], "fold": None}
    today = {"recipe": "distilled", **recipes.find("distilled", "mlp")._asdict(), **rest}
    old = {key: value for key, value in today.items() if key not in ("augment", "loss")}
    old |= {"flip": True, "shift": 1, "still": 0.3, "erase": 0}
    assert recipes.upgrade(old) == today == recipes.upgrade(today)
    assert old["flip"] is True  # the caller's dict is not changed
    earliest = recipes.upgrade({"epochs": 5, "batch_size": 128, "lr": 1e-3, "select": "val"})
    assert earliest == {"recipe": "published", **recipes.find("published", "mlp")._asdict(), **rest, "fused": False}
    best = recipes.upgrade({"epochs": 65, "flip": True, "shift": 2, "still": 0.0, "erase": 12})
    assert best["augment"] == recipes.find("best", "resnet").augment


@pytest.mark.parametrize("path", sorted(ROOT.glob("checkpoints/**/*.pt")), ids=lambda path: path.stem)
def test_every_checkpoint_that_is_shipped_can_be_read(path):
    _, info = checkpoint.load(path)
    flags = recipes.upgrade(info["flags"])
    assert {*recipes.Recipe._fields} <= flags.keys()
    assert not {"flip", "shift", "still", "erase"} & flags.keys()
    data.check_values(flags["augment"])


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
    elif kind == "ours, other dtypes":
        torch.save(ours | {"weights": {key: value.half() for key, value in ours["weights"].items()}}, path)
    elif kind == "ours, not finite":
        torch.save(ours | {"weights": ours["weights"] | {"fc2.bias": torch.full((10,), float("inf"))}}, path)
    elif kind == "ours, a field too long":  # a few bytes of lists within lists, which repeat one list
        part = [0.5] * 100
        torch.save(ours | {"metrics": {"loss": [part] * 200}}, path)
    elif kind == "ours, no figure":
        torch.save(ours | {"metrics": {"loss": float("nan")}}, path)
    elif kind == "ours, a key that is no name":
        torch.save(ours | {"versions": {3: "3"}}, path)
    elif kind == "ours, other flags of earlier versions":
        torch.save(ours | {"flags": {"shift": ["x" * 1000]}}, path)
    elif kind == "ours, an odd code":
        torch.save(ours | {"code": 7}, path)
    elif kind == "ours, lacking":
        torch.save({key: value for key, value in ours.items() if key != "seed"}, path)
    elif kind == "ours, newer":
        torch.save(ours | {"format": "fmnist-checkpoint-99"}, path)
    elif kind == "ours, a run":
        torch.save(ours | {"format": "fmnist-unfinished-3"}, path)
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
    "empty": "an empty file",
    "text": "an HTML page: download the file itself",
    "truncated1": "damaged, truncated or not a PyTorch checkpoint",
    "truncated50": "damaged, truncated or not a PyTorch checkpoint",
    "truncated99": "damaged, truncated or not a PyTorch checkpoint",
    "bit flip": "damaged: the checksum of .* is wrong",
    "other zip": "a zip archive, but not one of torch.save",
    "folder": "not a file: name one in this folder",
    "malicious": "refused, nothing was run",
    "malicious, old format": "refused, nothing was run",
    "malicious, plain pickle": "refused, nothing was run",
    "whole model": "refused, nothing was run",
    "wrong shape": r"its tensors \(weight 10x784, bias 10\) are not those of mlp, cnn, .*: add its class to models.py",
    "a list": "holds a list, not a model's state_dict",
    "no tensors": "holds a dict, not a model's state_dict",
    "integers": r"has the names of cnn, but has conv1.weight 32x1x3x3 int64 instead of 32x1x3x3, .* as it is",
    "not finite": "weights that are not finite",
    "sparse": "refused, nothing was run",
    "ours, other shapes": r"shapes and dtypes of mlp in models.py: 'fc1.weight' and \d+ more; .* git revision",
    "ours, other dtypes": "do not have the names, shapes and dtypes of cnn in models.py: 'conv1.weight' and",
    "ours, not finite": "weights that are not finite",
    "ours, a field too long": "its metrics is not what a checkpoint holds there",
    "ours, no figure": "its metrics is not what a checkpoint holds there",
    "ours, a key that is no name": "its versions is not what a checkpoint holds there",
    "ours, other flags of earlier versions": "its flags are not what",
    "ours, an odd code": "its code is not what a checkpoint holds there",
    "ours, lacking": "lacks seed",
    "ours, newer": "written in fmnist-checkpoint-99",
    "ours, a run": "an unfinished run, for train.py --resume",
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


def test_what_is_no_name_of_a_file_is_said():
    for name, said in (
        ("https://x.org/a.pt", "an address: download"),
        ("checkpoints/*.pth", "leave a pattern to the shell"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=said):
            checkpoint.load(name)


@pytest.mark.parametrize("script", ["evaluate.py", "analyze_errors.py"])
def test_the_scripts_say_it_in_one_line_too(saved, tmp_path, script):
    write_bad("malicious", tmp_path / "bad.pt", saved[0])
    assert_one_line_error(run_script(script, tmp_path / "bad.pt", "--data-dir", SAMPLE), "bad.pt: .* refused")
    assert not (tmp_path / "ran").exists()
    assert_one_line_error(run_script(script, tmp_path / "none.pt"), "none.pt: no such file; .*train.py --model cnn")
