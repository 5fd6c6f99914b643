"""engine.py: training learns and repeats to the bit, and its figures are those of its steps."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import first
from sklearn.metrics import log_loss
from torch.nn import functional as F

import data
import engine
import metrics
import models
import recipes
from runtime import device, kernels
from runtime.errors import UserError

EVERYTHING = {
    "optimizer": "muon", "lr": 1e-2, "muon_lr": 0.05, "weight_decay": 0.01, "warmup": 0.3, "label_smoothing": 0.1,
    "augment": {"flip": 0.5, "shift": [1, 0.1], "erase": 8}, "dropout": 0.1, "prune": 0.5,
}  # fmt: skip


def train(sample, name="cnn", seed=0, fused=False, **changes):
    """Train by the published recipe with these changes; returns the model and the rows of its epochs."""
    torch.manual_seed(*data.derive_seeds(seed))
    model = models.build(name)
    if fused:
        kernels.give(model, fused=True)
    recipe = recipes.find("published", name)._replace(**{"epochs": 3, "batch_size": 32} | changes)
    return model, list(engine.Training(model, sample["train"], sample["val"], recipe, seed=seed).run())


def assert_same_bits(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("name", "epochs"), [("mlp", 5), ("cnn", 3)])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["published", "everything"])
def test_training_learns(sample, name, epochs, changes):
    _, rows = train(sample, name, epochs=epochs, **changes)
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]
    assert rows[-1]["select_accuracy"] > 0.6
    assert [row["epoch"] for row in rows] == [*range(1, epochs + 1)]


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["published", "everything"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(sample, changes):
    few = sample | {"train": first(sample["train"], 150)}
    (one, _), (same, _), (other, _) = (train(few, seed=seed, fused=True, **changes) for seed in (0, 0, 1))
    assert_same_bits(one, same)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_a_residual_network_learns_and_resumes_to_the_same_bits(sample):
    recipe = recipes.find("best", "resnet")._replace(epochs=1, batch_size=16)
    part = first(sample["train"], 800)

    def begin(seed):
        torch.manual_seed(seed)
        return engine.Training(models.build("resnet"), part, None, recipe, seed=0)

    whole, resumed, states = begin(0), begin(1), []  # the second one's initial weights must not matter
    list(whole.run(progress=lambda *_: states.append(copy.deepcopy(whole.state_dict()))))
    resumed.load_state_dict(states[0])
    assert 0 < resumed.step < resumed.steps
    list(resumed.run())
    assert_same_bits(whole.model, resumed.model)
    logits = engine.predict_logits(resumed.model, sample["val"])
    assert metrics.accuracy(logits, sample["val"].labels) > 0.5


@pytest.mark.parametrize(
    "changes",
    [{}, {"prune": 0.5}, {"whiten": 4.0}, {"whiten": 4.0, "optimizer": "muon", "muon_lr": 0.05}],
    ids=["published", "pruned", "whitened", "whitened, muon"],
)
def test_a_run_can_be_stopped_after_any_step_and_in_an_evaluation_and_resumes_to_the_same_bits(sample, changes):
    recipe = recipes.find("published", "mlp")._replace(epochs=3, batch_size=16, **changes)

    def begin():
        torch.manual_seed(0)
        return engine.Training(models.build("mlp"), sample["train"], sample["train+val"], recipe, seed=0)

    def without_times(rows):
        return [{key: value for key, value in row.items() if "second" not in key} for row in rows]

    whole, rows, states, places = begin(), [], [], []
    expected = list(whole.run())
    for looks in (1, 24, 30, 1, 5, 9, 1000):  # how often each process is not yet asked to stop
        resumed, left = begin(), iter(range(looks))
        if states:
            resumed.load_state_dict(states[-1])
        rows += resumed.run(stop=lambda left=left: next(left, None) is None)
        states.append(copy.deepcopy(resumed.state_dict()))
        places.append((resumed.epoch, resumed.step))
    assert places == [(1, 2), (1, 27), (1, 58), (1, 58), (2, 2), (2, 12), (4, 0)]  # twice in the evaluation
    assert_same_bits(whole.model, resumed.model)
    assert without_times(rows) == without_times(expected)


def test_a_whitened_layer_stays_as_it_is_and_a_run_resumes_with_it(sample):
    recipe = recipes.find("fast", "cnn")._replace(batch_size=32)

    def begin(seed):
        torch.manual_seed(seed)
        training = engine.Training(models.build("cnn"), sample["train"], None, recipe, seed=0)
        return training, training.model.conv1.weight.clone()

    (whole, layer), (_, same), (resumed, other), states = begin(0), begin(0), begin(1), []
    assert torch.equal(layer, same)
    assert not torch.equal(layer, other)
    list(whole.run(progress=lambda *_: states.append(copy.deepcopy(whole.state_dict()))))
    resumed.load_state_dict(states[0])
    assert 0 < resumed.step < resumed.steps
    list(resumed.run())
    assert_same_bits(whole.model, resumed.model)
    assert torch.equal(resumed.model.conv1.weight, layer)
    assert metrics.accuracy(engine.predict_logits(resumed.model, sample["val"]), sample["val"].labels) > 0.6


class Unused(models.MLP):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(784, 3)
        self.used = torch.nn.Linear(784, 128)

    def forward(self, images):
        return self.fc2(self.used(images.flatten(1)))


def test_whitening_a_linear_layer_is_never_left_out_and_never_half_done(sample):
    recipe = recipes.find("published", "mlp")._replace(epochs=1, whiten=4.0)
    results = []
    for changes in ({}, {"fused": False}, {"whiten": 0.0}):
        torch.manual_seed(0)
        training = engine.Training(models.build("mlp"), sample["train"], None, recipe._replace(**changes), seed=0)
        results.append(next(training.run())["train_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-3)  # not by the step that has no place for it
    assert abs(results[0] - results[2]) > 0.01
    unused = Unused()
    before = unused.fc1.weight.clone()
    next(engine.Training(unused, sample["train"], None, recipe, seed=0).run())
    assert torch.equal(unused.fc1.weight, before)
    with pytest.raises(UserError, match="whiten and weight_decay"):
        train(sample, "mlp", whiten=4.0, weight_decay=0.05, optimizer="muon", muon_lr=0.05)


def test_easy_images_are_left_out_and_the_others_count_for_them():
    losses = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) ** 4  # 0.2 in the mean, most of them below
    easy = losses < losses.mean()
    weights = engine.prune(losses, 0.75, seed=1)
    assert (weights[~easy] == 1).all()
    assert set(weights[easy].tolist()) == {0, 4}
    assert weights[easy].mean() == pytest.approx(1, abs=0.06)
    assert not torch.equal(weights, engine.prune(losses, 0.75, seed=2))
    assert (engine.prune(losses, 0.0, seed=0) == 1).all()
    assert (engine.prune(torch.full((3,), torch.inf), 0.5, seed=0) == 1).all()  # images that were not seen yet


def test_a_run_leaves_images_out_but_in_its_first_epoch_and_its_last(sample):
    torch.manual_seed(0)
    recipe = recipes.find("published", "mlp")._replace(epochs=8, batch_size=32, prune=0.5)
    training = engine.Training(models.build("mlp"), sample["train"], None, recipe, seed=0)
    n, trained, reported = len(sample["train"].labels), [], []
    for row in training.run(progress=lambda images, *_: reported.append(images)):
        trained.append(round(row["images_per_second"] * row["seconds"]))
        assert sum(reported) == n * row["epoch"]
    assert trained[0] == trained[7] == n
    assert all(0.5 * n < images < 0.8 * n for images in trained[1:7])
    logits = engine.predict_logits(training.model, sample["train"])
    losses = F.cross_entropy(logits, sample["train"].labels, reduction="none")
    assert np.corrcoef(losses.argsort().argsort(), training.image_losses.argsort().argsort())[0, 1] > 0.8


def test_the_reported_training_figures_are_those_of_the_steps(sample):
    """With a learning rate of almost nothing, the epoch's means are those of the fixed model."""
    torch.manual_seed(0)
    model = models.build("mlp")
    reported = []
    training = engine.Training(model, sample["train"], None, recipes.Recipe(epochs=1, batch_size=7), seed=0)
    training.optimizers = [torch.optim.SGD(model.parameters(), lr=1e-30)]
    row = next(training.run(progress=lambda *now: reported.append(now)))
    figures = metrics.measure(engine.predict_logits(model, sample["train"]), sample["train"].labels)
    assert row["train_loss"] == pytest.approx(figures["log_loss"], rel=1e-5)
    assert row["train_accuracy"] == figures["accuracy"]
    assert sum(images for images, _, _ in reported) == len(sample["train"].labels)
    assert reported[-1][1:] == (row["train_loss"], row["train_accuracy"])


def test_the_figures_of_an_epoch_are_every_metric_of_the_images_that_select(sample):
    model, (row,) = train(sample, "mlp", epochs=1)
    figures = metrics.measure(engine.predict_logits(model, sample["val"]), sample["val"].labels)
    names = {"log_loss": "select_loss"}
    assert {names.get(name, f"select_{name}"): figure for name, figure in figures.items()} == {
        name: figure for name, figure in row.items() if name.startswith("select_")
    }


def test_a_loss_that_is_not_finite_stops_the_run(sample):
    with pytest.raises(engine.TrainingError, match=r"the loss became nan in epoch 1.*smaller --lr"):
        train(sample, lr=1e30)


@pytest.mark.filterwarnings("error")
def test_weights_that_the_last_step_ruins_are_noticed_too(sample, monkeypatch):
    refuses = metrics.Metric("one that refuses NaN", "", lambda logits, labels: log_loss(labels, logits.softmax(1)))
    monkeypatch.setitem(metrics.METRICS, "refuses", refuses)
    with pytest.raises(engine.TrainingError, match=r"the loss became \w+ in the evaluation after epoch 1"):
        train(sample, "mlp", lr=1e38, batch_size=920)  # the only step's own loss is still finite
    recipe = recipes.find("published", "mlp")._replace(lr=1e38, batch_size=920)
    unselected = engine.Training(models.build("mlp"), sample["train"], None, recipe, seed=0)
    with pytest.raises(engine.TrainingError, match=r"the network of epoch 1 cannot be used: .* not finite.*--lr"):
        next(unselected.run())


def test_a_recipe_names_its_loss_and_a_name_that_is_not_there_is_one_clear_line(sample, monkeypatch):
    def confident(logits, labels, recipe, reduction):
        return engine.reduced(F.nll_loss(F.log_softmax(2 * logits, 1), labels, reduction="none"), reduction)

    monkeypatch.setitem(engine.LOSSES, "confident", engine.Loss("confident cross-entropy", confident))
    logits, labels = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    recipe = recipes.Recipe(epochs=1, loss="confident")
    assert engine.loss_of(logits, labels, None, recipe) == confident(logits, labels, recipe, "mean")
    assert engine.loss_name(recipe) == "confident cross-entropy"
    (_, usual), (_, ours) = train(sample, "mlp", epochs=1), train(sample, "mlp", epochs=1, loss="confident")
    assert usual[0]["train_loss"] != ours[0]["train_loss"]
    for misspelt in ({"loss": "confidant"}, {"augment": {"filp": 0.5}}):  # at once, and not in the first step
        with pytest.raises(UserError, match=r"'(confidant|filp)' is not in (engine|data)\.py, which has "):
            train(sample, "mlp", **misspelt)


def test_the_loss_is_named_with_all_that_it_is():
    assert engine.loss_name(recipes.find("published", "cnn")) == "cross-entropy"
    assert engine.loss_name(recipes.find("best", "cnn")) == "cross-entropy, label smoothing 0.1"
    assert "50% of it distillation" in engine.loss_name(recipes.find("distilled", "cnn"))


def test_bfloat16_is_close_to_float32_and_quicker_recipes_learn_in_it(sample):
    recipe = recipes.find("fast", "cnn")._replace(epochs=2, batch_size=32)
    part = first(sample["train"], 250)
    losses = {}
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = models.build("cnn")
        kernels.give(model, fused=True)
        rows = list(engine.Training(model, part, None, recipe, seed=0, precision=precision).run())
        assert "select_accuracy" not in rows[-1]
        losses[precision] = [row["train_loss"] for row in rows]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses[torch.bfloat16] != losses[torch.float32]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


def test_dropout_is_the_recipes_or_else_the_models_own(sample):
    model = models.build("cnn")
    engine.Training(model, sample["train"], None, recipes.Recipe(epochs=1), seed=0)
    assert model.dropout.p == 0.3
    engine.Training(model, sample["train"], None, recipes.Recipe(epochs=1, dropout=0.0), seed=0)
    assert model.dropout.p == 0.0


def test_predictions_do_not_depend_on_the_batch_size(sample):
    model = models.build("cnn")
    whole = engine.predict_logits(model, sample["test"], 500)
    torch.testing.assert_close(engine.predict_logits(model, sample["test"], 33), whole)
    assert whole.shape == (500, 10)
    assert whole.dtype == torch.float32


# --- runtime/device.py -----------------------------------------------------------------------------------


def test_precision_is_the_fastest_the_device_has_unless_one_is_asked_for():
    cpu = torch.device("cpu")
    assert device.pick_precision("float32", cpu) is torch.float32
    assert device.pick_precision("bfloat16", cpu) is torch.bfloat16
    expected = torch.bfloat16 if "bf16" in Path("/proc/cpuinfo").read_text() else torch.float32
    assert device.pick_precision("auto", cpu) is expected
    with pytest.raises(device.DeviceError, match="float16 needs a GPU"):
        device.pick_precision("float16", cpu)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta:cpu"])
def test_a_device_that_cannot_be_used_is_one_clear_line(name):
    with pytest.raises(device.DeviceError, match=f"device '{name}' cannot be used"):
        device.pick_device(name)


def test_the_processor_is_named_with_what_decides_its_speed():
    name, capabilities = device.processor(), torch.cpu.get_capabilities()
    assert name.isprintable()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "cpu family", "model"):
            assert value in name
    assert ("avx512_bf16" in name) == (capabilities.get("avx512_bf16") is True)
