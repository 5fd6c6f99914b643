"""What a model gets wrong, as plain records, and the published findings about it. No files, no figures.

records = mistakes.most_confident(probabilities, labels, test.classes)
pairs = mistakes.confused_pairs(records, test.classes)
findings = mistakes.check_findings(records, test.classes)     # None unless the classes are Fashion-MNIST's

A record is a dict of index, true, predicted (class names) and confidence.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from data import CLASSES
from metrics import mean_interval, share

Record = dict[str, Any]
Finding = dict[str, Any]

CONFIDENT = 0.99  # softmax probability from which the published finding calls a mistake confident
SHIRT, SHIRT_LIKE = "Shirt", ("T-shirt/top", "Pullover", "Coat")
VERDICTS = {  # of other trainings about a finding
    "confirmed": "holds in all trainings of the same model and recipe",
    "refined": "holds in some of them",
    "refuted": "holds in none of them",
}


def most_confident(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[Record]:
    """List all mistakes, the most confident first. probabilities: float64 (n, 10); labels: int (n,)."""
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    return [
        {
            "index": int(i),
            "true": classes[labels[i]],
            "predicted": classes[predicted[i]],
            "confidence": float(confidence[i]),
        }
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")]
    ]


def in_shirt_group(record: Record) -> bool:
    """Check whether a mistake is between Shirt and T-shirt/top, Pullover or Coat, in either direction."""
    pair = {record["true"], record["predicted"]}
    return SHIRT in pair and not pair.isdisjoint(SHIRT_LIKE)


def confused_pairs(records: Sequence[Record], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Count how often two classes are confused with each other, the most confused pair first.

    Returns dicts of a, b (names), a_as_b, b_as_a, total, and share of all records.
    """
    directed = Counter((record["true"], record["predicted"]) for record in records)
    pairs: list[dict[str, Any]] = [
        {"a": a, "b": b, "a_as_b": directed[a, b], "b_as_a": directed[b, a], "total": directed[a, b] + directed[b, a]}
        for a, b in combinations(classes, 2)
    ]
    pairs = [pair | {"share": pair["total"] / len(records)} for pair in pairs if pair["total"]]
    return sorted(pairs, key=lambda pair: -pair["total"])


# --- the published findings ------------------------------------------------------------------------------


def check_findings(records: Sequence[Record], classes: Sequence[str]) -> list[Finding] | None:
    """Check the published findings one by one; return None where the classes are not Fashion-MNIST's.

    records: from most_confident. Returns dicts of finding (the claim), criterion (when it holds), holds, summary (a
    sentence) and measured; shares have a 95% Wilson interval.
    """
    if tuple(classes) != CLASSES:
        return None
    confident = [record for record in records if record["confidence"] >= CONFIDENT]
    return [
        _shirt_share(records),
        _shirt_partners(records),
        _confident_share(records, confident),
        _sneaker_and_ankle_boot(confident),
    ]


def _shirt_share(records: Sequence[Record]) -> Finding:
    involved = Counter(name for record in records for name in (record["true"], record["predicted"]))
    shirt = share(involved[SHIRT], len(records))
    return {
        "finding": "Most mistakes involve Shirt",
        "criterion": "no class is part of more mistakes than Shirt, as the true or as the predicted one",
        "holds": bool(records) and involved[SHIRT] == max(involved.values()),
        "summary": f"{in_words(shirt)} of all mistakes involve Shirt",
        "measured": {"shirt": shirt, "mistakes_involving": dict(involved.most_common())},
    }


def _shirt_partners(records: Sequence[Record]) -> Finding:
    pairs = [pair for pair in confused_pairs(records, CLASSES) if SHIRT in (pair["a"], pair["b"])]
    by_partner = {pair["b"] if pair["a"] == SHIRT else pair["a"]: pair for pair in pairs}
    measured = {name: _with_shirt(pair, len(records)) for name, pair in by_partner.items() if name in SHIRT_LIKE}
    group = share(sum(each["count"] for each in measured.values()), sum(pair["total"] for pair in pairs))
    listed = ", ".join(f"{name} {each['count']}" for name, each in measured.items())
    return {
        "finding": "Shirt is confused with T-shirt/top, Pullover and Coat",
        "criterion": "these three are the classes it is confused with most, both directions counted",
        "holds": set(list(by_partner)[:3]) == set(SHIRT_LIKE),
        "summary": f"{in_words(group)} of Shirt's mistakes are with these three: {listed or 'none'}",
        "measured": {"of_all_mistakes": measured, "of_shirt_mistakes": group},
    }


def _with_shirt(pair: dict[str, Any], n: int) -> dict[str, Any]:
    """Describe a pair of Shirt and another class among n mistakes."""
    shirt_as, as_shirt = ("a_as_b", "b_as_a") if pair["a"] == SHIRT else ("b_as_a", "a_as_b")
    return {"shirt_as_it": pair[shirt_as], "it_as_shirt": pair[as_shirt], **share(pair["total"], n)}


def _confident_share(records: Sequence[Record], confident: Sequence[Record]) -> Finding:
    found, pairs = share(len(confident), len(records)), confused_pairs(confident, CLASSES)
    listed = ", ".join(f"{pair['a']} and {pair['b']} {pair['total']}" for pair in pairs[:4])
    return {
        "finding": "There are mistakes made with a confidence of 0.99 to 1.00",
        "criterion": f"at least one mistake has a softmax confidence of {CONFIDENT} or more",
        "holds": bool(confident),
        "summary": f"{in_words(found)} of all mistakes have it; most often {listed or 'none'}",
        "measured": {"confident": found, "pairs": pairs},
    }


def _sneaker_and_ankle_boot(confident: Sequence[Record]) -> Finding:
    counts = {(pair["a"], pair["b"]): pair["total"] for pair in confused_pairs(confident, CLASSES)}
    count = counts.get(("Sneaker", "Ankle boot"), 0)
    rank = 1 + sum(other > count for other in counts.values())
    found = share(count, len(confident))
    return {
        "finding": "Many of these confident mistakes are Sneaker against Ankle boot",
        "criterion": "no pair is more common among them",
        "holds": bool(count) and rank == 1,
        "summary": f"{in_words(found)} of them are, in rank {rank} of {len(counts)} pairs",
        "measured": {"sneaker_and_ankle_boot": found, "rank": rank},
    }


KEY_SHARES = ("shirt", "of_shirt_mistakes", "confident", "sneaker_and_ankle_boot")  # as measured by these four


def judge(findings: Sequence[Finding], others: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Give each finding about a checkpoint its verdict. others: the findings of the trainings of its kind.

    With two trainings or more, the verdict is theirs, a key of VERDICTS; else it is the checkpoint's alone. Returns
    dicts of finding, criterion, holds, summary, trainings, holds_in, shares, seeds (a sentence) and verdict.
    """
    rows = []
    for place, (finding, key) in enumerate(zip(findings, KEY_SHARES, strict=True)):
        holds = [each[place]["holds"] for each in others]
        shares = [each[place]["measured"][key]["share"] for each in others]
        row = {name: finding[name] for name in ("finding", "criterion", "holds", "summary")}
        row |= {"trainings": len(others), "holds_in": sum(holds), "shares": shares}
        rows.append(row | {"seeds": _in_trainings(holds, shares), "verdict": _verdict(finding["holds"], holds)})
    return rows


def _verdict(holds: bool, in_trainings: Sequence[bool]) -> str:
    if len(in_trainings) > 1:
        return "confirmed" if all(in_trainings) else "refined" if any(in_trainings) else "refuted"
    return f"{'confirmed' if holds else 'not confirmed'} on this checkpoint alone"


def _in_trainings(holds: Sequence[bool], shares: Sequence[float | None]) -> str:
    """Describe in how many trainings a finding holds, and the mean of its shares."""
    if len(holds) < 2:
        return "none of this model and recipe yet"
    line, known = f"holds in {sum(holds)} of {len(holds)}", [each for each in shares if each is not None]
    if len(known) < len(shares):
        return line
    low, high = mean_interval(known)
    return f"{line}; mean share {np.mean(known):.0%} (95% interval {low:.0%} to {high:.0%})"


def in_words(counted: dict[str, Any]) -> str:
    """Write a count, its n, share and interval, from metrics.share, in words."""
    if not counted["n"]:
        return "none"
    low, high = counted["ci95"]
    return f"{counted['count']} of {counted['n']} ({counted['share']:.0%}, interval {low:.0%} to {high:.0%})"
