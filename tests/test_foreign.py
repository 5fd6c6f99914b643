"""Weights that others saved: what fits is used, as it is said; what does not is refused with the line that helps."""

import argparse
import copy
import io
import json
import pathlib
import pickle
import re
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, run_script
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import engine
import models
import recipes
from analysis import explain, onnx
from checkpoint import Bare
from runtime import cli
from training import distill

SHIPPED = cli.CHECKPOINTS / "best_mlp_fmnist.pt"


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


class Lit(nn.Module):
    """What a module of Lightning registers beside the network: a loss with weights, and a metric that counts."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))
        self.train_accuracy = nn.Module()
        self.train_accuracy.register_buffer("tp", torch.zeros(10, dtype=torch.int64))


def trained_a_step(model, optimizer):
    """Take one step, so that the optimiser has a state."""
    F.cross_entropy(model(torch.randn(4, 1, 28, 28)), torch.arange(4)).backward()
    optimizer.step()
    return optimizer.state_dict()


def lightning(model):
    optimizer = trained_a_step(model, torch.optim.Adam(model.parameters()))
    best = {"/logs/epoch=1.ckpt": torch.tensor(0.87)}
    callback = {"monitor": "val_acc", "best_model_score": torch.tensor(0.87), "best_k_models": best}
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": Lit(model).state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_acc'}": callback},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3},
    }


def with_logs(model):
    """State of everything, as a plain loop saves it, with the loss of 100,000 steps."""
    optimizer = trained_a_step(model, torch.optim.Adam(model.parameters()))
    log = [{"loss": k / 7, "lr": 1e-3} for k in range(1_000)]
    losses = torch.arange(100_000).div(7).tolist()
    return {"model": model.state_dict(), "optimizer": optimizer, "log": log, "losses": losses, "best": 0.9}


def swa(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.state_dict()


# For each kind of file: what is saved of a CNN, and what is said of it.
FILES = {
    "plain": (lambda model: model.state_dict(), "matched to cnn by name: its activations are assumed to be those of"),
    "parameters": (lambda model: dict(model.named_parameters()), "by name"),
    "any order": (lambda model: dict(reversed(model.state_dict().items())), "by name"),
    "DataParallel": (lambda model: nn.DataParallel(model).state_dict(), "by name"),
    "torch.compile": (lambda model: torch.compile(model).state_dict(), "by name"),
    "both": (lambda model: nn.DataParallel(torch.compile(model)).state_dict(), "by name"),
    "SWA": (swa, "ignored, as no part of the network: n_averaged"),
    "Lightning": (lightning, "found under state_dict; ignored, .*criterion.weight"),
    "a plain loop": (with_logs, "found under model"),
    "params": (lambda model: {"params": model.state_dict()}, "found under params"),
    "model_weights": (lambda model: {"model_weights": model.state_dict(), "epoch": 3}, "found under model_weights"),
    "nested": (lambda model: {"checkpoint": {"state_dict": model.state_dict()}}, "found under checkpoint.state_dict"),
    "half": (lambda model: model.half().state_dict(), "converted from float16 to float32"),
    "bfloat16": (lambda model: model.bfloat16().state_dict(), "converted from bfloat16 to float32"),
    "double": (lambda model: model.double().state_dict(), "converted from float64 to float32"),
    "strides": (lambda model: {k: v.mT.contiguous().mT for k, v in model.state_dict().items() if v.dim() > 1}
                | {k: v for k, v in model.state_dict().items() if v.dim() < 2}, "by name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_the_files_that_people_have_are_read(kind, tmp_path, capsys):
    torch.manual_seed(0)
    model, images = models.build("cnn"), torch.rand(4, 1, 28, 28)
    save, said = FILES[kind]
    torch.save(save(model), tmp_path / "theirs.pt")
    loaded, info = checkpoint.load(tmp_path / "theirs.pt")
    line = capsys.readouterr().err
    assert re.search(said, line), line
    assert line.count("\n") == 1
    assert line.endswith("; normalised by mean 0.5 and std 0.5 (assumed)\n")
    assert (info["model"], info["matched"]) == ("cnn", "by name")
    assert info["normalisation"] == {"mean": 0.5, "std": 0.5, "assumed": True}
    assert torch.equal(loaded(images), model.float().eval()(images))
    assert not loaded._forward_pre_hooks


@pytest.mark.parametrize("wrap", [dict, nn.DataParallel.__name__])
@pytest.mark.parametrize("old", [False, True])
def test_other_names_are_matched_by_order_and_shape_and_what_this_assumes_is_said(tmp_path, capsys, wrap, old):
    theirs, images = TheirNet().eval(), torch.rand(4, 1, 28, 28)
    state = theirs.state_dict() if wrap is dict else nn.DataParallel(theirs).state_dict()
    torch.save(state, tmp_path / "theirs.pt", _use_new_zipfile_serialization=not old)
    model, info = checkpoint.load(tmp_path / "theirs.pt")
    said = capsys.readouterr().err
    assert "matched to cnn by order: " in said
    assert "classifier.4.bias as fc2.bias" in said
    assert "its activations and the order of its layers are assumed to be those of cnn" in said
    assert info["matched"] == "by order"
    torch.testing.assert_close(model(images), theirs(images))


def test_batch_norms_counters_may_be_missing_or_too_many(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet").eval()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    for named in (state, {f"layer{k}": value for k, value in enumerate(state.values())}):
        torch.save(named, tmp_path / "old.pt")
        loaded, info = checkpoint.load(tmp_path / "old.pt")
        assert info["model"] == "resnet"
        images = torch.rand(2, 1, 28, 28)
        assert torch.equal(loaded(images), model(images))


# --- which model it is -----------------------------------------------------------------------------------


class Later(nn.Module):
    """A network with the shapes of mlp, other names, and another activation."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(784, 128)
        self.out = nn.Linear(128, 10)

    def forward(self, images):
        return self.out(torch.tanh(self.hidden(images.flatten(1))))


def saved_as(path, state):
    torch.save(state, path)
    return path


def refused(path, *bare):
    """The line that refuses a file."""
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path, *bare)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_exact_names_of_any_model_come_before_the_order_of_another(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "later", Later)
    theirs, images = models.build("later"), torch.randn(4, 1, 28, 28)
    path = saved_as(tmp_path / "a.pt", theirs.state_dict())
    for bare in (Bare(), Bare("later")):
        model, info = checkpoint.load(path, bare)
        assert (info["model"], info["matched"]) == ("later", "by name")
        assert torch.equal(model(images), theirs(images))
    assert checkpoint.load(path, Bare("mlp"))[1]["matched"] == "by order"  # as it was asked for
    unnamed = saved_as(tmp_path / "b.pt", dict(enumerate_names(theirs.state_dict())))
    assert re.search(r"b\.pt: fits mlp, later by order: choose one with --model NAME$", refused(unnamed))
    assert checkpoint.load(unnamed, Bare("later"))[1]["model"] == "later"
    assert "its tensors (0 128x784, 1 128, 2 10x128, 3 10) are not those of cnn:" in refused(unnamed, Bare("cnn"))
    assert "--model 'vit': the models here are mlp, cnn" in refused(unnamed, Bare("vit"))
    monkeypatch.setitem(models.MODELS, "twin", Later)
    assert "fits later, twin by name: choose one with --model NAME" in refused(path)
    with pytest.raises(distill.TeacherError, match="fits later, twin by name; a teacher must fit one model: give its"):
        distill.describe([path])


def enumerate_names(state):
    return ((str(k), value) for k, value in enumerate(state.values()))


def test_another_network_is_not_taken_for_one_whose_names_it_has_too(tmp_path):
    """Two batch norms more are another network, however its other layers are called."""
    state = models.build("cnn").state_dict() | nn.ModuleDict({"bn1": nn.BatchNorm2d(32)}).state_dict()
    line = refused(saved_as(tmp_path / "a.pt", state))
    assert re.search(r"has the tensors of cnn and others \(.*bn1\.running_var 32", line)
    assert re.search(r"add its class to models\.py \(docs/extending\.md\); if not, save it without them$", line)
    head = nn.ModuleDict({"model": models.build("cnn"), "head": nn.Linear(10, 10)}).state_dict()
    assert "others (head." in refused(saved_as(tmp_path / "a.pt", head))


def test_of_several_networks_in_a_file_none_is_chosen(tmp_path, monkeypatch):
    cnn, other = (models.build("cnn").state_dict() for _ in range(2))
    path = saved_as(tmp_path / "a.pt", {"state_dict": cnn, "state_dict_ema": other, "epoch": 3})
    line = refused(path)
    assert "holds the weights of several networks (state_dict, state_dict_ema): save the one you mean alone" in line
    assert_the_line_helps(line, tmp_path, monkeypatch, cnn)


def test_by_order_a_tensor_is_not_taken_for_one_of_another_kind(tmp_path):
    """Sorted names put a batch norm's bias, running_mean, running_var and weight, all of one shape, in this order."""
    named = {f"layer{k:02}.{key}": value for k, (key, value) in enumerate(ordered_kinds(models.build("resnet")))}
    assert "are not those of mlp, cnn, resnet" in refused(saved_as(tmp_path / "a.pt", named))


def ordered_kinds(model):
    """The tensors of a model under the last part of their names, these sorted within each layer."""
    layers = {}
    for key, value in model.state_dict().items():
        layers.setdefault(key.rpartition(".")[0], []).append((key.rpartition(".")[2], value))
    for tensors in layers.values():
        yield from sorted(tensors, key=lambda pair: (pair[1].dim() < 2, pair[0]))


def test_what_others_save_beside_a_network_is_ignored_by_order_too(tmp_path, capsys):
    theirs, images = TheirNet().eval(), torch.rand(4, 1, 28, 28)
    for state, said in ((swa(theirs), "n_averaged"), (Lit(theirs).state_dict(), "criterion.weight, .*accuracy.tp")):
        model, info = checkpoint.load(saved_as(tmp_path / "a.pt", state))
        assert (info["model"], info["matched"]) == ("cnn", "by order")
        assert re.search(f"ignored, as no part of the network: {said}", capsys.readouterr().err)
        torch.testing.assert_close(model(images), theirs(images))


def test_where_the_usual_place_holds_another_network_no_other_place_is_taken(tmp_path):
    student, teacher = nn.Linear(784, 10).state_dict(), models.build("cnn").state_dict()
    line = refused(saved_as(tmp_path / "a.pt", {"state_dict": student, "teacher": teacher}))
    assert re.search(
        r"its tensors under state_dict \(weight 10x784, bias 10\) are not .*; those under teacher fit", line
    )


class Tied(nn.Module):
    """One matrix under two names, and ids."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(784, 784), nn.Linear(784, 784), nn.Linear(784, 10)
        self.second.weight = self.first.weight
        self.register_buffer("ids", torch.arange(784))

    def forward(self, images):
        return self.out(F.relu(self.second(F.relu(self.first(images.flatten(1)[:, self.ids])))))


def test_what_a_file_lacks_or_has_otherwise_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tied", Tied)
    state = models.build("tied").state_dict()
    path = saved_as(tmp_path / "a.pt", state | {"ids": state["ids"].int()})
    assert "converted from int32 to int64" in checkpoint.load(path)[1]["notes"]
    for missing in ("second.weight", "ids"):
        line = refused(saved_as(path, {key: value for key, value in state.items() if key != missing}))
        assert f"has the names of tied, but lacks {missing}: if it is another network, add its class" in line
    line = refused(saved_as(path, state | {"ids": state["ids"].float(), "out.bias": torch.zeros(11)}))
    assert "but has ids 784 instead of 784 int64, out.bias 11 instead of 10: if it is another network" in line
    line = refused(saved_as(path, state | {"second.weight": state["first.weight"] + 1}))
    assert "its first.weight and second.weight differ, but the model here keeps both as one tensor" in line
    assert refused(saved_as(path, models.build("mlp").state_dict()), Bare("cnn")).endswith("; it fits mlp")


@pytest.mark.parametrize(("buffer", "value"), [("running_mean", torch.nan), ("running_var", -1.0)])
def test_a_network_whose_logits_are_not_finite_is_refused(buffer, value, tmp_path):
    state = models.build("resnet").state_dict()
    name = next(key for key in state if key.endswith(buffer))
    line = refused(saved_as(tmp_path / "a.pt", state | {name: torch.full_like(state[name], value)}))
    assert "a.pt: its logits are not finite numbers" in line


# --- how its input is normalised -------------------------------------------------------------------------


class Quickstart(nn.Module):
    """The network of PyTorch's quickstart (https://docs.pytorch.org/tutorials/beginner/basics/quickstart_tutorial)."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            *[nn.Linear(28 * 28, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
        )

    def forward(self, x):
        return self.linear_relu_stack(self.flatten(x))


def pixels(split):
    """Images as ToTensor() makes them: float32 (n, 1, 28, 28) in [0, 1]."""
    return split.images.unsqueeze(1) / 255


@pytest.fixture(scope="module")
def quickstart(sample, tmp_path_factory):
    """The quickstart's network after an epoch of plain PyTorch on pixels in [0, 1], and the file of its weights."""
    torch.manual_seed(0)
    theirs, train = Quickstart(), sample["train"]
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for images, labels in zip(pixels(train).split(32), train.labels.split(32), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(theirs(images), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("quickstart") / "model.pth"
    torch.save(theirs.state_dict(), path)
    return theirs.eval(), path


def test_the_network_of_pytorchs_quickstart_answers_here_as_there(quickstart, sample, monkeypatch):
    theirs, path = quickstart
    assert "(linear_relu_stack.0.weight 512x784, " in refused(path)
    page = (cli.ROOT / "docs" / "checkpoints.md").read_text()
    (code,) = re.findall(r"```python\n# models\.py\n(.*?)```", page, re.DOTALL)
    exec(code, {"torch": torch, "nn": nn, "MODELS": (added := {})})
    monkeypatch.setitem(models.MODELS, "quickstart", added["quickstart"])
    model, info = checkpoint.load(path, Bare(mean=0.0, std=1.0))
    assert info["normalisation"] == {"mean": 0.0, "std": 1.0, "assumed": False}
    test = sample["test"]
    with torch.no_grad():
        expected = theirs(pixels(test))
    for network in (model, copy.deepcopy(model)):
        torch.testing.assert_close(engine.predict_logits(network, test), expected, atol=2e-6, rtol=1e-6)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assumed = (engine.predict_logits(checkpoint.load(path)[0], test).argmax(1) == test.labels).double().mean()
    assert (expected.argmax(1) == test.labels).double().mean() > assumed + 0.02


def test_maps_and_onnx_see_the_same_renormalised_input(tmp_path, sample):
    torch.manual_seed(0)
    theirs, test = TheirNet().eval(), sample["test"]
    test = test._replace(images=test.images[:100], labels=test.labels[:100])
    bare = Bare("cnn", 0.2860, 0.3530)
    model, info = checkpoint.load(saved_as(tmp_path / "theirs.pt", theirs.state_dict()), bare)
    given = (pixels(test) - 0.2860) / 0.3530
    with torch.no_grad():
        expected = theirs(given)
        torch.testing.assert_close(model(data.normalise(test.images)), expected, atol=1e-5, rtol=1e-5)
    content = onnx.to_onnx(model, info)
    session = onnx.session_of(content)
    (exported,) = session.run(None, {"pixels": test.images.numpy()})
    np.testing.assert_allclose(exported, expected, atol=1e-4)
    (tmp_path / "theirs.onnx").write_bytes(content)
    assert "an ONNX model: only a PyTorch state_dict can be read" in refused(tmp_path / "theirs.onnx")

    features = theirs.classifier[:4](theirs.features(given)).detach()
    torch.testing.assert_close(explain.features(model, test)[1], features, atol=1e-5, rtol=1e-5)
    maps, method = explain.attention_maps(model, test, expected.argmax(1))
    assert (maps.shape, method) == ((100, 7, 7), "Grad-CAM")
    assert (maps.amax((1, 2)) > 0).double().mean() > 0.9


@pytest.mark.parametrize("script", ["evaluate.py", "predict.py", "export.py", "demo.py", "analyze_errors.py"])
def test_flags_of_a_bare_state_dict_are_never_ignored(script, tmp_path):
    own = SHIPPED
    command = [script, *(["photo.png", "--checkpoint"] if script == "predict.py" else []), own]
    (tmp_path / "photo.png").touch()
    if script == "predict.py":
        command[1] = tmp_path / "photo.png"
    for flags in (["--mean", 0, "--std", 1], ["--model", "cnn"], ["--model", "mlp"]):
        names = flags[0].replace("--mean", "--mean, --std")
        line = rf"{names}: only for a bare state_dict, unlike .*best_mlp_fmnist.pt \(mlp\), which says itself"
        assert_one_line_error(run_script(*command, *flags), line)


def pixel_mlp(sample, path):
    """Train an MLP on pixels in [0, 1], by plain PyTorch, and save its state_dict. Returns its test accuracy."""
    torch.manual_seed(0)
    network, train = models.build("mlp"), sample["train"]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(8):
        for images, labels in zip(pixels(train).split(32), train.labels.split(32), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    torch.save(network.state_dict(), path)
    with torch.no_grad():
        return (network(pixels(sample["test"])).argmax(1) == sample["test"].labels).double().mean().item()


def test_what_was_assumed_stands_in_every_result(sample, tmp_path):
    path = tmp_path / "theirs.pt"
    right = pixel_mlp(sample, path)
    flags = ["--data-dir", SAMPLE, "--json", tmp_path / "a.json"]

    def evaluated(*arguments):
        finished = run_script("evaluate.py", *arguments, *flags)
        assert finished.returncode == 0, finished.stderr
        return json.loads((tmp_path / "a.json").read_text()), " ".join(finished.stdout.split())

    result, said = evaluated(path, "--mean", 0, "--std", 1)
    assert result["accuracy"] == pytest.approx(right)
    assert (result["normalisation"], result["matched"]) == ({"mean": 0.0, "std": 1.0, "assumed": False}, "by name")
    assert "its input is normalised by mean 0 and std 1 (as given)" in said
    assumed, said = evaluated(path)
    assert assumed["normalisation"] == {"mean": 0.5, "std": 0.5, "assumed": True}
    assert "its input is normalised by mean 0.5 and std 0.5 (assumed)" in said
    assert assumed["accuracy"] < right - 0.1
    assert "--mean 0 --std 1 is for pixels / 255" in assumed["caution"]
    both, said = evaluated(SHIPPED, path, "--mean", 0, "--std", 1)
    own, theirs = both["checkpoints"]
    assert "normalisation" not in own
    assert theirs["normalisation"] == result["normalisation"]
    assert "theirs.pt: mlp its input is normalised by mean 0 and std 1 (as given)" in said
    assert_one_line_error(run_script("evaluate.py", path, "--mean", 0), "--mean and --std go together")


def test_a_network_far_below_its_kind_gets_a_hint(sample):
    info = {"model": "mlp", "normalisation": {"mean": 0.5, "std": 0.5, "assumed": True}}
    hint = checkpoint.suspicion(info, sample["test"], 0.70)
    assert "accuracy is far below the 87% of its kind" in hint
    assert "than mean 0.5 and std 0.5 (assumed); --mean 0 --std 1 is for pixels / 255" in hint
    assert checkpoint.suspicion(info, sample["test"], 0.78) is None
    assert "the 87% of" in checkpoint.suspicion(info | {"model": "mine"}, sample["test"], 0.1)
    assert checkpoint.suspicion({"model": "mlp"}, sample["test"], 0.1) is None  # one of ours
    names = tuple(f"class {k}" for k in range(10))
    assert checkpoint.suspicion(info, sample["test"]._replace(classes=names), 0.1) is None


def test_the_report_says_it_too(sample, tmp_path):
    path = tmp_path / "theirs.pt"
    torch.save({key: -value for key, value in models.build("mlp").state_dict().items()}, path)
    folder = tmp_path / "figures"
    finished = run_script("analyze_errors.py", path, "--data-dir", SAMPLE, "--figures-dir", folder)
    assert finished.returncode == 0, finished.stderr
    (described,) = json.loads((folder / "analysis.json").read_text())["report"]["checkpoints"]
    assert described["normalisation"] == {"mean": 0.5, "std": 0.5, "assumed": True}
    assert "accuracy is far below" in described["caution"]
    page = (folder / "report.html").read_text()
    assert "mlp, training unknown, normalised by mean 0.5 and std 0.5 (assumed)" in page
    assert "theirs.pt: accuracy is far below" in page
    assert "theirs.pt: accuracy is far below" in finished.stdout


def test_a_bare_teacher_answers_by_its_own_normalisation(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "CACHE", tmp_path / "cache")
    path = saved_as(tmp_path / "teacher.pt", models.build("mlp").state_dict())
    usual, other = distill.describe([path]), distill.describe([path], 0.0, 1.0)
    assert [(each[0]["mean"], each[0]["std"]) for each in (usual, other)] == [(0.5, 0.5), (0.0, 1.0)]
    train = sample["train"]
    first, second = (distill.answers(each, train) for each in (usual, other))
    assert not torch.allclose(first, second)
    said = re.findall("normalised by .*", capsys.readouterr().err)  # once for each, as it was given
    assert said == [
        "normalised by mean 0.5 and std 0.5 (assumed)",
        "normalised by mean 0 and std 1 (as given)",
    ]
    network, _ = checkpoint.load(path, Bare("mlp", 0.0, 1.0))
    assert torch.equal(second, engine.average([engine.predict_views(network, train)]).float())
    earlier = [{key: value for key, value in usual[0].items() if key not in ("mean", "std")}]
    torch.testing.assert_close(distill.answers(earlier, train), first)
    with pytest.raises(checkpoint.CheckpointError, match="--mean, --std: only for a bare state_dict: leave the flags"):
        distill.describe([], 0.0, 1.0)
    flags = {"recipe": "distilled"}
    settings = {recipes.setting(recipes.upgrade(flags | {"teachers": each})) for each in (usual, earlier, other)}
    assert len(settings) == 2  # runs of one setting have teachers that answer alike
    assert distill.named(other[0]).endswith("teacher.pt (mean 0, std 1)")


# --- files that are refused, with the line that helps ----------------------------------------------------


def assert_the_line_helps(line, folder, monkeypatch, state):
    """Run the Python that a refusal ends with; what it saves must be read, as the weights."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"(?:keep = .*; )?torch\.save\(.*'weights\.pt'\)", line)
    exec(code, {"torch": torch, "pickle": pickle, "numpy": np})
    saved, _ = checkpoint.load(folder / "weights.pt")
    assert all(torch.equal(saved.state_dict()[key], value) for key, value in state.items())


def write_refused(kind, path, model):
    state = model.state_dict()
    match kind:
        case "numpy scalar":
            torch.save({"epoch": 3, "state_dict": state, "best_acc": np.float64(0.9)}, path)
        case "namespace":
            args = argparse.Namespace(lr=0.1)
            torch.save({"args": args, "model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 3}, path)
        case "another key":
            torch.save({"model": "mlp", "args": argparse.Namespace(lr=0.1), "run": {"final": state}}, path)
        case "beside the weights":
            torch.save({**state, "best_acc": np.float32(0.9)}, path)
        case "deep in settings":
            torch.save({"weights": state, "settings": {"out": pathlib.PurePosixPath("x")}}, path)
        case "arrays":
            torch.save({key: value.numpy() for key, value in state.items()}, path)
        case "whole model in a dict":
            torch.save({"model": model, "epoch": 3}, path)
        case "whole model":
            torch.save(model, path)
        case "whole model, old format":
            with warnings.catch_warnings(action="ignore"):
                torch.save(model, path, _use_new_zipfile_serialization=False)
        case "pickle":
            path.write_bytes(pickle.dumps(state))
        case "TorchScript":
            with warnings.catch_warnings(action="ignore"):
                torch.jit.save(torch.jit.trace(model.eval(), torch.zeros(1, 1, 28, 28)), path)
        case "npz":
            with path.open("wb") as file:
                np.savez(file, **{key: value.numpy() for key, value in state.items()})


REFUSED = {
    "numpy scalar": r"holds numpy\._core\.multiarray\.scalar, not only weights: refused, nothing was run\. If you",
    "namespace": r"holds argparse\.Namespace, not only weights",
    "another key": r"holds argparse\.Namespace, not only weights",
    "beside the weights": r"holds numpy\._core\.multiarray\.scalar, not only weights",
    "deep in settings": r"holds pathlib\.PurePosixPath, not only weights",
    "arrays": r"holds numpy\._core\.multiarray\._reconstruct, not only weights",
    "whole model in a dict": r"holds models\.MLP, not only weights",
    "whole model": r"holds models\.MLP, not only weights",
    "whole model, old format": r"holds models\.MLP, not only weights",
    "pickle": r"a pickle with collections\.OrderedDict, not a file of torch\.save",
    "TorchScript": "TorchScript: ",
    "npz": "arrays of NumPy: ",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_ends_with_the_line_that_saves_the_weights_alone(kind, tmp_path, monkeypatch):
    model, path = models.build("mlp"), tmp_path / "theirs.pt"
    write_refused(kind, path, model)
    line = refused(path)
    assert re.match(f"{re.escape(str(path))}: {REFUSED[kind]}", line), line
    assert_the_line_helps(line, tmp_path, monkeypatch, model.state_dict())


def test_no_line_is_promised_where_none_can_help(tmp_path):
    state = models.build("mlp").state_dict()
    unusual = (lambda value: value.to_sparse(), lambda value: value.to("meta"), nn.Buffer)
    for change in (*unusual, lambda value: value.to(torch.float8_e4m3fn)):
        line = refused(saved_as(tmp_path / "a.pt", {key: change(value) for key, value in state.items()}))
        assert line.endswith("Only plain dense tensors of the usual dtypes can be read: torch.save such a state_dict")
    line = refused(saved_as(tmp_path / "a.pt", [argparse.Namespace(weights=state)]))
    assert line.endswith("weights_only=False), and torch.save the state_dict in it alone")


def packed(write):
    content = io.BytesIO()
    write(content)
    return content.getvalue()


def tar(content):
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(SAMPLE / "SHA256SUMS", "model.pt")


def keras(content):
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model.weights.h5", "x")


def other_zip(content):
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(SAMPLE / "SHA256SUMS", "model.pt")


def many_values(content):
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02](" + b"N" * 600_000 + b"e.")


def safetensors(content):
    header = json.dumps({"fc2.bias": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}).encode()
    content.write(len(header).to_bytes(8, "little") + header + bytes(40))


KNOWN = {  # first bytes, as such files have them, and what is said
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer.*lfs pull",
    ),
    "HTML": (b"\n<!DOCTYPE html>\n<html lang=en>", "an HTML page: download the file itself"),
    "page": (b"<html><body>404", "an HTML page: download the file itself"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "weights of Keras: write the network in PyTorch"),
    "keras": (keras, "weights of Keras: write the network in PyTorch"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x051.3.0", "an ONNX model: only a PyTorch state_dict"),  # of early versions
    "safetensors": (safetensors, r"safetensors: torch\.save\(safetensors\.torch\.load_file\('.*'\), 'weights\.pt'\)"),
    "npy": (lambda content: np.save(content, np.zeros(3)), "an array of NumPy"),
    "gzip": ((SAMPLE / "t10k-labels-idx1-ubyte.gz").read_bytes(), "a compressed archive: unpack it"),
    "tar": (tar, "a compressed archive: unpack it"),
    "zip": (other_zip, "a zip archive, but not one of torch.save: unpack it, and give the file inside"),
    "empty": (b"", "an empty file: copy or download it again"),
    "too many values": (many_values, "holds more than weights and some logs"),
    "too long a text": (lambda content: torch.save("x" * 2**23, content), "holds more than weights and some logs"),
    "a tuple as key": (lambda content: torch.save({(1, 2): 3}, content), "its dicts have keys that are no names"),
    "harm": (
        b"cos\nsystem\n(S'touch ran'\ntR.",
        r"a pickle with os\.system, not a file of torch\.save: refused, nothing was run$",
    ),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_other_files_are_known_and_named(kind, tmp_path):
    content, said = KNOWN[kind]
    path = tmp_path / "theirs.pt"
    path.write_bytes(content if isinstance(content, bytes) else packed(content))
    assert re.match(f"{re.escape(str(path))}: {said}", refused(path)), refused(path)
