"""engine.py: the loops learn and repeat to the bit; the metrics are those of the textbooks and of scikit-learn."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import log_loss

import data
import engine
import models
import recipes

EVERYTHING = {
    "optimizer": "muon", "lr": 1e-2, "muon_lr": 0.05, "weight_decay": 0.01, "warmup": 0.3, "label_smoothing": 0.1,
    "flip": True, "shift": 1, "erase": 8, "dropout": 0.1, "prune": 0.5,
}  # fmt: skip


def train(sample, name="cnn", seed=0, epochs=3, **changes):
    torch.manual_seed(*data.derive_seeds(seed))
    model = models.build(name)
    recipe = recipes.find("published", name)._replace(**{"epochs": epochs, "batch_size": 32} | changes)
    return model, list(engine.Training(model, sample["train"], sample["val"], recipe, seed=seed).run())


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["published", "everything"])
def test_training_learns(sample, name, changes):
    _, rows = train(sample, name, epochs=5, **changes)
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]
    assert rows[-1]["select_accuracy"] > 0.6
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["published", "everything"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(sample, changes, fused):
    (first, _), (second, _), (other, _) = (train(sample, seed=seed, **changes) for seed in (0, 0, 1))
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_residual_network_learns_and_goes_on_to_the_same_bits(sample, fused):
    recipe = recipes.find("best", "resnet")._replace(epochs=1, batch_size=16)

    def begin(seed):
        torch.manual_seed(seed)
        return engine.Training(models.build("resnet"), sample["train"], None, recipe, seed=0)

    whole, stopped, resumed = begin(0), begin(0), begin(1)  # of other initial weights, which are to be of no matter
    list(whole.run())
    list(stopped.run(stop=lambda: True))
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert 0 < resumed.step < resumed.steps
    list(resumed.run())
    ends = [training.model.state_dict() for training in (whole, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    logits = engine.predict_logits(resumed.model, sample["val"])
    assert engine.loss_and_accuracy(logits, sample["val"].labels)[1] > 0.5


def test_easy_images_are_left_out_and_the_others_count_for_them():
    losses = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) ** 4  # 0.2 in the mean, most of them below
    easy = losses < losses.mean()
    weights = engine.prune(losses, 0.75, seed=1)
    assert (weights[~easy] == 1).all()
    assert set(weights[easy].tolist()) == {0, 4}
    assert weights[easy].mean() == pytest.approx(1, abs=0.06)
    assert not torch.equal(weights, engine.prune(losses, 0.75, seed=2))
    assert (engine.prune(losses, 0.0, seed=0) == 1).all()
    assert (engine.prune(torch.full((3,), torch.inf), 0.5, seed=0) == 1).all()  # of images not seen so far


def test_a_run_leaves_images_out_but_in_its_first_epoch_and_its_last(sample):
    torch.manual_seed(0)
    recipe = recipes.find("published", "cnn")._replace(epochs=8, batch_size=32, prune=0.5)
    training = engine.Training(models.build("cnn"), sample["train"], None, recipe, seed=0)
    n, trained, told = len(sample["train"].labels), [], []
    for row in training.run(progress=lambda images, *_: told.append(images)):
        trained.append(round(row["images_per_second"] * row["seconds"]))
        assert sum(told) == n * row["epoch"]
    assert trained[0] == trained[7] == n
    assert all(0.5 * n < images < 0.8 * n for images in trained[1:7])
    logits = engine.predict_logits(training.model, sample["train"])
    losses = torch.nn.functional.cross_entropy(logits, sample["train"].labels, reduction="none")
    assert np.corrcoef(losses.argsort().argsort(), training.image_losses.argsort().argsort())[0, 1] > 0.8


def test_the_reported_training_figures_are_those_of_the_steps(sample):
    """With a learning rate of almost nothing the epoch's means are those of the fixed model."""
    torch.manual_seed(0)
    model = models.build("mlp")
    told = []
    training = engine.Training(model, sample["train"], None, recipes.Recipe(epochs=1, batch_size=7), seed=0)
    training.optimizers = [torch.optim.SGD(model.parameters(), lr=1e-30)]
    row = next(training.run(progress=lambda *now: told.append(now)))
    logits = engine.predict_logits(model, sample["train"])
    loss, accuracy = engine.loss_and_accuracy(logits, sample["train"].labels)
    assert row["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["train_accuracy"] == accuracy
    assert sum(images for images, _, _ in told) == len(logits)
    assert told[-1][1:] == (row["train_loss"], row["train_accuracy"])


def test_a_loss_that_is_not_finite_stops_the_run(sample):
    with pytest.raises(engine.TrainingError, match=r"the loss became nan in epoch 1.*smaller --lr"):
        train(sample, lr=1e30)


def test_bfloat16_is_close_to_float32_and_quicker_recipes_learn_in_it(sample, fused):
    recipe = recipes.find("fast", "cnn")._replace(epochs=3, batch_size=32)
    losses = {}
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = models.build("cnn")
        rows = list(engine.Training(model, sample["train"], None, recipe, seed=0, precision=precision).run())
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


def test_precision_is_the_fastest_the_device_has_unless_told():
    cpu = torch.device("cpu")
    assert engine.pick_precision("float32", cpu) is torch.float32
    assert engine.pick_precision("bfloat16", cpu) is torch.bfloat16
    expected = torch.bfloat16 if "bf16" in Path("/proc/cpuinfo").read_text() else torch.float32
    assert engine.pick_precision("auto", cpu) is expected
    with pytest.raises(engine.TrainingError, match="float16 needs a GPU"):
        engine.pick_precision("float16", cpu)


def test_weights_that_the_last_step_ruins_are_noticed_too(sample):
    with pytest.raises(engine.TrainingError, match=r"the loss became \w+ in the evaluation after epoch 1"):
        train(sample, "mlp", lr=1e38, batch_size=920)  # the only step's own loss is still finite


def test_predictions_do_not_depend_on_the_batch_size(sample):
    model = models.build("cnn")
    whole = engine.predict_logits(model, sample["test"], 500)
    torch.testing.assert_close(engine.predict_logits(model, sample["test"], 33), whole)
    assert whole.shape == (500, 10)
    assert whole.dtype == torch.float32


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta:cpu"])
def test_a_device_that_cannot_be_used_is_told(name):
    with pytest.raises(engine.TrainingError, match=f"device '{name}' cannot be used"):
        engine.pick_device(name)


def test_wilson_interval_is_the_closed_form():
    correct, n, z = 9_182, 10_000, norm.ppf(0.975)
    p = correct / n
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
    assert engine.wilson_interval(correct, n) == pytest.approx(expected, rel=1e-9)


def test_expected_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.55])
    probabilities = np.zeros((4, 10))
    probabilities[:, 0], probabilities[:, 1] = confidence, 1 - confidence
    labels = np.array([0, 0, 1, 0])  # two of three right in the bin of 0.95, one of one in that of 0.55
    expected = 3 / 4 * abs(2 / 3 - 0.95) + 1 / 4 * abs(1 - 0.55)
    assert engine.expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_mcnemar_is_the_exact_binomial():
    a = np.array([True] * 8 + [False] * 2 + [True] * 5)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5)
    result = engine.mcnemar(a, b)
    assert (result["only_a"], result["only_b"]) == (8, 2)
    assert result["p_value"] == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert engine.mcnemar(a, a)["p_value"] == 1


def test_metrics_agree_with_one_another_and_with_scikit_learn(sample):
    model, _ = train(sample, "mlp")
    labels = sample["test"].labels
    logits = engine.predict_logits(model, sample["test"])
    result = engine.metrics(logits, labels)
    matrix = np.array(result["confusion_matrix"])
    assert result["n"] == matrix.sum() == 500
    assert result["accuracy"] == pytest.approx(np.trace(matrix) / 500)
    assert result["accuracy_ci95"][0] < result["accuracy"] < result["accuracy_ci95"][1]
    assert result["log_loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1)), rel=1e-9)
    for index, name in enumerate(data.CLASSES):
        row = result["per_class"][name]
        assert row["support"] == 50
        assert row["recall"] == pytest.approx(matrix[index, index] / 50)
        assert row["precision"] == pytest.approx(matrix[index, index] / max(1, matrix[:, index].sum()))
