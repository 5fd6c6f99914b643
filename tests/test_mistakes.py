"""analysis/mistakes.py: the records and findings, on mistakes made by hand."""

import numpy as np
import pytest

from analysis import mistakes
from data import CLASSES


def mistake(true, predicted, confidence=0.5, index=0):
    return {"index": index, "true": true, "predicted": predicted, "confidence": confidence}


HAND_MADE = [
    *[mistake("Shirt", "T-shirt/top", 0.999)] * 4,
    *[mistake("T-shirt/top", "Shirt")] * 3,
    *[mistake("Coat", "Shirt")] * 3,
    *[mistake("Shirt", "Pullover")] * 2,
    *[mistake("Shirt", "Bag")] * 1,
    *[mistake("Sneaker", "Ankle boot", 0.995)] * 5,
    *[mistake("Ankle boot", "Sneaker", 0.99)] * 2,
]


def test_mistakes_come_the_most_confident_first_with_names():
    probabilities = np.full((4, 10), 0.01)
    for row, (predicted, confidence) in enumerate([(0, 0.6), (1, 0.9), (2, 0.95), (3, 0.8)]):
        probabilities[row, predicted] = confidence
    labels = np.array([6, 1, 4, 9])  # the second is right
    assert mistakes.most_confident(probabilities, labels, CLASSES) == [
        mistake("Coat", "Pullover", 0.95, 2),
        mistake("Ankle boot", "Dress", 0.8, 3),
        mistake("Shirt", "T-shirt/top", 0.6, 0),
    ]


def test_pairs_count_both_directions():
    pairs = mistakes.confused_pairs(HAND_MADE, CLASSES)
    assert [(pair["a"], pair["b"], pair["a_as_b"], pair["b_as_a"]) for pair in pairs[:3]] == [
        ("T-shirt/top", "Shirt", 3, 4),
        ("Sneaker", "Ankle boot", 5, 2),
        ("Coat", "Shirt", 3, 0),
    ]
    assert sum(pair["total"] for pair in pairs) == len(HAND_MADE) == 20
    assert sum(pair["share"] for pair in pairs) == pytest.approx(1)


def test_the_shirt_group():
    assert [mistakes.in_shirt_group(m) for m in HAND_MADE] == [True] * 12 + [False] * 8
    assert not mistakes.in_shirt_group(mistake("Coat", "Pullover"))


def test_findings_are_counted_and_judged():
    share, partners, confident, boots = mistakes.check_findings(HAND_MADE, CLASSES)
    assert share["holds"]
    assert share["measured"]["shirt"]["count"] == 13
    assert share["measured"]["shirt"]["share"] == 0.65
    assert partners["holds"]
    assert partners["measured"]["of_all_mistakes"]["T-shirt/top"]["shirt_as_it"] == 4
    assert partners["measured"]["of_all_mistakes"]["Coat"]["it_as_shirt"] == 3
    assert partners["measured"]["of_shirt_mistakes"] | {"ci95": 0} == {
        "count": 12,
        "n": 13,
        "share": 12 / 13,
        "ci95": 0,
    }
    assert confident["measured"]["confident"]["count"] == 11
    assert boots["holds"]
    assert boots["measured"]["sneaker_and_ankle_boot"]["count"] == 7


def test_findings_can_be_refuted():
    others = [mistake("Bag", "Dress", 0.999)] * 3 + [mistake("Shirt", "Bag", 0.2)] * 2
    assert [finding["holds"] for finding in mistakes.check_findings(others, CLASSES)] == [False, False, True, False]


def test_a_model_without_mistakes_has_findings_too():
    assert [finding["holds"] for finding in mistakes.check_findings([], CLASSES)] == [False] * 4
    assert mistakes.confused_pairs([], CLASSES) == []


def test_names_are_those_of_the_data_set():
    assert {mistakes.SHIRT, *mistakes.SHIRT_LIKE, "Sneaker", "Ankle boot"} <= set(CLASSES)


def test_findings_are_of_fashion_mnist_alone():
    assert mistakes.check_findings(HAND_MADE, CLASSES[::-1]) is None


def test_other_trainings_decide_the_verdict_once_there_are_two():
    own, none = mistakes.check_findings(HAND_MADE, CLASSES), mistakes.check_findings([], CLASSES)
    assert {row["verdict"] for row in mistakes.judge(own, [own] * 5)} == {"confirmed"}
    assert {row["verdict"] for row in mistakes.judge(own, [own, none])} == {"refined"}
    assert {row["verdict"] for row in mistakes.judge(own, [none] * 2)} == {"refuted"}
    assert {row["verdict"] for row in mistakes.judge(own, [none])} == {"confirmed on this checkpoint alone"}
    assert {row["verdict"] for row in mistakes.judge(none, [])} == {"not confirmed on this checkpoint alone"}
    row = mistakes.judge(own, [own, none])[0]
    assert (row["trainings"], row["holds_in"]) == (2, 1)
    assert row["seeds"] == "holds in 1 of 2"  # a training without mistakes has no share
    assert mistakes.judge(own, [own] * 5)[0]["seeds"].startswith("holds in 5 of 5; mean share 65% (95% interval ")
