"""metrics.py: every figure is that of the textbooks, of scikit-learn, or of a sum by hand."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, t
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

import data
import metrics


@pytest.fixture(scope="module")
def logits():
    """Logits that are right more often than not, and labels, of 500 images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(500) % 10
    return torch.randn(500, 10, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 10), labels


def test_the_figures_agree_with_one_another_and_with_scikit_learn(logits):
    logits, labels = logits
    result = metrics.evaluate(logits, labels, data.CLASSES)
    matrix = np.array(result["confusion_matrix"])
    assert result["n"] == matrix.sum() == 500
    assert result["accuracy"] == pytest.approx(np.trace(matrix) / 500)
    assert result["accuracy_ci95"][0] < result["accuracy"] < result["accuracy_ci95"][1]
    assert result["log_loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1)), rel=1e-9)
    assert {row["support"] for row in result["per_class"].values()} == {50}
    assert json.loads(json.dumps(result)) == result  # plain numbers and lists


@pytest.mark.parametrize("without", [[], [3], [3, 7]], ids=["all classes", "no images", "no images, no answers"])
def test_the_figures_of_each_class_are_scikit_learns_to_the_bit(without, logits):
    logits, labels = logits[0].clone(), logits[1].clone()
    for label in without:
        labels[labels == label] = 5
    logits[:, without[1:]] = -99
    result, predicted = metrics.evaluate(logits, labels, data.CLASSES), logits.argmax(1)
    columns = precision_recall_fscore_support(labels, predicted, labels=range(10), zero_division=0)
    assert [tuple(row.values()) for row in result["per_class"].values()] == list(zip(*columns, strict=True))
    assert result["confusion_matrix"] == confusion_matrix(labels, predicted, labels=range(10)).tolist()


def test_answers_that_are_not_finite_have_no_figures(logits):
    logits, labels = logits
    spoilt = logits.clone()
    spoilt[[3, 5], 0] = torch.tensor([torch.nan, torch.inf])
    for compute in (lambda: metrics.probabilities(spoilt), lambda: metrics.evaluate(spoilt, labels, data.CLASSES)):
        with pytest.raises(metrics.MetricError, match="answers to 2 of 500 images are not finite numbers"):
            compute()


def test_measure_covers_every_registered_metric_and_evaluate_too(logits, monkeypatch):
    before = list(metrics.METRICS)
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))

    @metrics.metric("share of the first class", unit="of 1")
    def firsts(logits, labels):
        return (logits.argmax(1) == 0).double().mean()  # a tensor, as a user may return

    measured = metrics.measure(*logits)
    assert list(measured) == [*before, "firsts"] == list(metrics.METRICS)
    assert before[:3] == ["accuracy", "log_loss", "ece"]
    assert all(type(value) is float for value in measured.values())
    assert measured["firsts"] == (logits[0].argmax(1) == 0).double().mean().item()
    assert metrics.evaluate(*logits, data.CLASSES).items() >= measured.items()
    assert measured["accuracy"] == metrics.accuracy(*logits)
    assert measured["log_loss"] == metrics.log_loss(*logits)
    assert measured["ece"] == metrics.ece(*logits)


def test_the_classes_are_named_as_asked(logits):
    names = [f"class {number}" for number in range(10)]
    assert list(metrics.evaluate(*logits, names)["per_class"]) == names
    assert list(metrics.calibration(metrics.probabilities(logits[0]), logits[1].numpy(), names)["classes"]) == names


# --- intervals and tests ---------------------------------------------------------------------------------


def test_wilson_interval_is_scipys_to_the_bit():
    for correct, n in ((0, 1), (1, 1), (0, 50), (1, 3), (50, 50), (9_182, 10_000), (54_321, 60_000)):
        assert metrics.wilson_interval(correct, n) == list(binomtest(correct, n).proportion_ci(method="wilson"))


def test_a_share_has_its_interval():
    correct, n, p = 9_182, 10_000, 0.9182
    assert metrics.share(correct, n) == {
        "count": correct, "n": n, "share": p, "ci95": metrics.wilson_interval(correct, n)
    }  # fmt: skip
    assert metrics.share(0, 0) == {"count": 0, "n": 0, "share": None, "ci95": None}


def test_the_interval_of_a_mean_is_students():
    values = [0.9201, 0.9187, 0.9233, 0.9210, 0.9195]
    expected = t.interval(0.95, 4, np.mean(values), np.std(values, ddof=1) / 5**0.5)
    assert metrics.mean_interval(values) == pytest.approx(expected, rel=1e-12)
    narrow = t.interval(0.5, 4, np.mean(values), np.std(values, ddof=1) / 5**0.5)
    assert metrics.mean_interval(values, 0.5) == pytest.approx(narrow, rel=1e-12)


def test_mcnemar_is_the_exact_binomial():
    a = np.array([True] * 8 + [False] * 2 + [True] * 5)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5)
    result = metrics.mcnemar(a, b)
    assert (result["only_a"], result["only_b"]) == (8, 2)
    assert result["p_value"] == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert metrics.mcnemar(a, a)["p_value"] == 1


def test_holms_correction_is_that_by_hand():
    # Sorted: 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; none may be below the one before it.
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.5, 0.9, 0.4]) == pytest.approx([1, 1, 1])  # no more than 1
    assert metrics.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert metrics.holm([0.03]) == [0.03]
    assert metrics.holm([]) == []


# --- calibration -----------------------------------------------------------------------------------------


def test_expected_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.55])
    probabilities = np.zeros((4, 10))
    probabilities[:, 0], probabilities[:, 1] = confidence, 1 - confidence
    labels = torch.tensor([0, 0, 1, 0])  # two of three right in the bin of 0.95, one of one in that of 0.55
    expected = 3 / 4 * abs(2 / 3 - 0.95) + 1 / 4 * abs(1 - 0.55)
    assert metrics.ece(torch.tensor(probabilities).clamp(min=1e-300).log(), labels) == pytest.approx(expected)
    assert metrics.calibration_error(confidence, np.array([1, 1, 0, 1], bool)) == pytest.approx(expected)


def test_the_temperature_that_was_put_in_is_found():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20_000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert metrics.temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    before, after = (
        metrics.calibration(metrics.probabilities(3 * logits, t), labels.numpy(), data.CLASSES) for t in (1, 3)
    )
    assert after["ece"] < 0.02 < 0.15 < before["ece"]
    assert after["classwise_ece"] < before["classwise_ece"]
    assert after["log_loss"] < before["log_loss"]


def test_calibration_counts_every_image_in_each_diagram():
    probabilities = np.full((4, 10), 0.02)
    probabilities[:, 3] = 0.82
    result = metrics.calibration(probabilities, np.array([3, 3, 3, 1]), data.CLASSES)
    assert result["ece"] == pytest.approx(0.82 - 0.75)
    assert all(sum(each["counts"]) == 4 for each in (result["answer"], *result["classes"].values()))
    gaps = [0.02] * 10  # a probability of 0.02 for each class that never comes
    gaps[3], gaps[1] = 0.07, 0.25 - 0.02
    assert result["classwise_ece"] == pytest.approx(np.mean(gaps))


def test_coverage_answers_the_most_confident():
    curve = metrics.coverage_curve(np.array([0.9, 0.5, 0.7, 0.6]), np.array([True, False, True, True]))
    assert [(point["n"], point["accuracy"], point["threshold"]) for point in curve] == [
        (1, 1.0, 0.9), (2, 1.0, 0.7), (3, 1.0, 0.6), (4, 0.75, 0.5),
    ]  # fmt: skip
