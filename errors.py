"""What a model's mistakes are made of: plain records from probabilities and labels, no files and no plots."""

from collections import Counter
from itertools import combinations

import numpy as np

from data import CLASSES
from engine import wilson_interval

CONFIDENT = 0.99  # softmax probability from which the published finding calls a mistake confident
SHIRT, SHIRT_LIKE = "Shirt", ("T-shirt/top", "Pullover", "Coat")


def most_confident_mistakes(probabilities, labels):
    """All mistakes, the most confident first: dicts of index, true, predicted (names), confidence.

    probabilities: float64 (n, 10); labels: int (n,).
    """
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    return [
        {
            "index": int(i),
            "true": CLASSES[labels[i]],
            "predicted": CLASSES[predicted[i]],
            "confidence": float(confidence[i]),
        }
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")]
    ]


def in_shirt_group(mistake):
    """Whether a mistake is between Shirt and T-shirt/top, Pullover or Coat, in either direction."""
    pair = {mistake["true"], mistake["predicted"]}
    return SHIRT in pair and not pair.isdisjoint(SHIRT_LIKE)


def confused_pairs(mistakes):
    """Pairs of classes by how often they are taken for one another, most often first.

    Returns dicts of a, b (names), a_as_b, b_as_a, total, and share of the mistakes given.
    """
    directed = Counter((mistake["true"], mistake["predicted"]) for mistake in mistakes)
    pairs = [
        {"a": a, "b": b, "a_as_b": directed[a, b], "b_as_a": directed[b, a], "total": directed[a, b] + directed[b, a]}
        for a, b in combinations(CLASSES, 2)
    ]
    pairs = [pair | {"share": pair["total"] / len(mistakes)} for pair in pairs if pair["total"]]
    return sorted(pairs, key=lambda pair: -pair["total"])


def check_findings(mistakes):
    """The published findings one by one: what was claimed, what makes it hold, what was measured.

    mistakes: of most_confident_mistakes. Returns dicts of finding, criterion, holds, summary (a sentence) and
    measured; shares come with their 95% Wilson interval.
    """
    confident = [mistake for mistake in mistakes if mistake["confidence"] >= CONFIDENT]
    return [
        _shirt_share(mistakes),
        _shirt_partners(mistakes),
        _confident_share(mistakes, confident),
        _sneaker_and_ankle_boot(confident),
    ]


def _shirt_share(mistakes):
    involved = Counter(name for mistake in mistakes for name in (mistake["true"], mistake["predicted"]))
    share = share_of(involved[SHIRT], len(mistakes))
    return {
        "finding": "Most mistakes involve Shirt",
        "criterion": "no class is part of more mistakes than Shirt, as the true or as the predicted one",
        "holds": bool(mistakes) and involved[SHIRT] == max(involved.values()),
        "summary": f"{told(share)} of all mistakes involve Shirt",
        "measured": {"shirt": share, "mistakes_involving": dict(involved.most_common())},
    }


def _shirt_partners(mistakes):
    of_shirt = [pair for pair in confused_pairs(mistakes) if SHIRT in (pair["a"], pair["b"])]
    total = sum(pair["total"] for pair in of_shirt)
    partners, measured = [], {}
    for pair in of_shirt:
        shirt_first = pair["a"] == SHIRT
        partner = pair["b"] if shirt_first else pair["a"]
        partners.append(partner)
        if partner in SHIRT_LIKE:
            shirt_as, as_shirt = ("a_as_b", "b_as_a") if shirt_first else ("b_as_a", "a_as_b")
            share = share_of(pair["total"], len(mistakes))
            measured[partner] = {"shirt_as_it": pair[shirt_as], "it_as_shirt": pair[as_shirt]} | share
    group = share_of(sum(share["count"] for share in measured.values()), total)
    listed = ", ".join(f"{name} {share['count']}" for name, share in measured.items())
    return {
        "finding": "Shirt is confused with T-shirt/top, Pullover and Coat",
        "criterion": "these three are the classes it is confused with most, both directions counted",
        "holds": set(partners[:3]) == set(SHIRT_LIKE),
        "summary": f"{told(group)} of Shirt's mistakes are with these three: {listed or 'none'}",
        "measured": {"of_all_mistakes": measured, "of_shirt_mistakes": group},
    }


def _confident_share(mistakes, confident):
    share = share_of(len(confident), len(mistakes))
    pairs = confused_pairs(confident)
    listed = ", ".join(f"{pair['a']} and {pair['b']} {pair['total']}" for pair in pairs[:4])
    return {
        "finding": "There are mistakes made with a confidence of 0.99 to 1.00",
        "criterion": f"at least one mistake has a softmax confidence of {CONFIDENT} or more",
        "holds": bool(confident),
        "summary": f"{told(share)} of all mistakes have it; most often {listed or 'none'}",
        "measured": {"confident": share, "pairs": pairs},
    }


def _sneaker_and_ankle_boot(confident):
    pairs = confused_pairs(confident)
    counts = {(pair["a"], pair["b"]): pair["total"] for pair in pairs}
    count = counts.get(("Sneaker", "Ankle boot"), 0)
    rank = 1 + sum(other > count for other in counts.values())
    share = share_of(count, len(confident))
    return {
        "finding": "Many of these confident mistakes are Sneaker against Ankle boot",
        "criterion": "no pair is more common among them",
        "holds": bool(count) and rank == 1,
        "summary": f"{told(share)} of them are, in rank {rank} of {len(pairs)} pairs",
        "measured": {"sneaker_and_ankle_boot": share, "rank": rank},
    }


def share_of(count, n):
    """A count and its share of n with the 95% Wilson interval; share and interval are None when n is 0."""
    count, n = int(count), int(n)
    share = {"share": count / n, "ci95": wilson_interval(count, n)} if n else {"share": None, "ci95": None}
    return {"count": count, "n": n, **share}


def told(share):
    """A count, its n, share and interval, of share_of(), in words."""
    if not share["n"]:
        return "none"
    low, high = share["ci95"]
    return f"{share['count']} of {share['n']} ({share['share']:.0%}, interval {low:.0%} to {high:.0%})"
