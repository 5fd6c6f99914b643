"""analysis/humans.py: reading people's votes, and comparing models with them, on the sample's labels."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import ALIKE, ROOT, SAMPLE, assert_one_line_error, made_up_votes, run_script
from scipy.stats import spearmanr

import data
from analysis import humans
from runtime.errors import UserError
from runtime.schema import problem

REAL = ROOT.parent / "shared" / "human_votes" / "fmh_counts.csv"  # not part of the repository


@pytest.fixture(scope="module")
def labels(sample):
    return sample["test"].labels.numpy()


@pytest.fixture
def file(labels, tmp_path):
    """A file of votes as people give them, and its counts."""
    counts = made_up_votes(labels)
    path = tmp_path / "votes.csv"
    np.savetxt(path, counts, "%d", ",")
    return path, counts


def write(path, counts):
    np.savetxt(path, counts, "%d", ",")
    return path


def test_votes_are_read_as_they_are(file, labels, capsys):
    path, counts = file
    votes = humans.read_votes(path, labels)
    assert f"is not the published fmh_counts.csv: its SHA-256 is {votes.sha256}" in capsys.readouterr().err
    assert np.array_equal(votes.counts, counts)
    text = path.read_bytes()
    assert votes.sha256 == hashlib.sha256(text).hexdigest()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert np.array_equal(humans.read_votes(path, labels).counts, counts)
    most = counts.max(1, keepdims=True)
    assert ((votes.choice == -1) == ((counts == most).sum(1) > 1)).all()
    chosen = votes.choice >= 0
    assert np.array_equal(votes.choice[chosen], counts.argmax(1)[chosen])
    even = humans.Votes(np.full((1, 10), 6))
    assert even.entropy == pytest.approx(np.log2(10))
    assert even.choice.tolist() == [-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda counts: counts[:-1], "499 rows, not one for each of 500"),
        (lambda counts: counts[:, :9], "row 1: it has 9 columns, not ten"),
        (lambda counts: counts.astype(object) - 70, "is no count of votes"),
        (lambda counts: counts * (np.arange(500) != 7)[:, None], "row 8 has 0 votes, where others have about 67"),
        (lambda counts: counts * (1 + 2 * (np.arange(500) == 9))[:, None], "row 10 has 201 votes"),
        (lambda counts: np.roll(counts, 1, 0), "from row 1 on, the label has the most votes on"),
        (lambda counts: np.concatenate([counts[:300], counts[399:299:-1], counts[400:]]), "from row 251 on"),
        (lambda counts: counts * 1000, "is no count of votes"),
        (lambda counts: counts[:, [0, 1, 2, 3, 6, 5, 4, 7, 8, 9]], "the columns are in another order"),
    ],
)
def test_a_fault_in_the_votes_is_named(change, said, file, labels):
    path, counts = file
    with pytest.raises(UserError, match=said):
        humans.read_votes(write(path, change(counts)), labels)


def test_a_fault_in_the_votes_is_one_line(file, trained, tmp_path):
    path, _ = file
    checkpoint = trained[0] / "best_mlp_fmnist.pt"
    for content, said in (
        (b"a,b\n", "it has 1 rows"),
        (b"\xff\xfe", "not a text in UTF-8"),
        (b'"' + b"0," * 200_000, "no CSV file of votes"),
        (b"1,2\r3,4\r", "it has 2 rows"),
        (None, "No such file"),
        (b"class,votes\n" * 500, "row 1: it has 2 columns"),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        words = (checkpoint, "--human-votes", path, "--data-dir", SAMPLE, "--figures-dir", tmp_path / "out")
        assert_one_line_error(run_script("analyze_errors.py", *words), said)
    assert not (tmp_path / "out").exists()


def test_sides_are_counted_and_chance_is_that_of_the_label(file, labels):
    votes = humans.Votes(file[1])
    answers = np.where(np.arange(500) % 5 == 0, np.array(ALIKE)[labels], labels)
    wrong = answers != labels
    found = humans.sides(votes, answers, labels, wrong)
    expected = {"model": 0, "label": 0, "other": 0, "tied": 0}
    chances = {"model": [], "label": []}
    for i in np.flatnonzero(wrong):
        row = file[1][i]
        best = [k for k in range(10) if row[k] == row.max()]
        name = {labels[i]: "label", answers[i]: "model"}.get(best[0], "other") if len(best) == 1 else "tied"
        expected[name] += 1
        alike = votes.choice[labels == labels[i]]
        for side, own in (("model", answers[i]), ("label", labels[i])):
            chances[side].append((alike == own).mean())
    assert {name: found[name]["count"] for name in expected} == expected
    assert sum(expected.values()) == found["n"] == wrong.sum()
    assert all(expected.values())  # each of them occurs in this sample
    for side, values in chances.items():
        assert found["expected"][side] == pytest.approx(np.mean(values))
    nothing = humans.sides(votes, labels, labels, wrong & ~wrong)
    assert nothing["n"] == 0
    assert nothing["model"]["share"] is nothing["expected"]["model"] is None


def test_accuracy_is_measured_where_many_people_agree(file, labels):
    votes = humans.Votes(file[1])
    answers = (labels + (np.arange(500) % 7 == 0)) % 10
    found = humans.accuracies(votes, answers, labels)
    assert found["label_accuracy"]["share"] == (answers == labels).mean()
    assert found["people_accuracy"]["share"] == (answers == votes.choice).mean()
    for each in found["agreeing"]:
        agreed = file[1].max(1) >= each["at_least"] * file[1].sum(1)
        assert each["label"]["n"] == agreed.sum() > 0
        assert each["label"]["share"] == pytest.approx((answers == labels)[agreed].mean())
        assert each["people"]["share"] == pytest.approx((answers == votes.choice)[agreed].mean())


def test_the_cross_entropy_to_the_votes_is_least_at_its_temperature(file):
    votes = humans.Votes(file[1])
    logits = torch.from_numpy(8 * np.log(votes.shares + 0.01))
    found = humans.cross_entropies(votes, logits)
    assert found["votes_temperature"] == pytest.approx(8, rel=0.2)

    def loss(temperature):
        likely = np.exp(logits.numpy() / temperature)
        likely /= likely.sum(1, keepdims=True)
        return -(votes.shares * np.log(likely)).sum(1).mean()

    assert found["cross_entropy"] == pytest.approx(loss(1))
    assert found["cross_entropy_scaled"] == pytest.approx(loss(found["votes_temperature"]))
    assert found["cross_entropy_scaled"] < min(loss(1), loss(4), loss(16))


def test_disagreement_is_related_to_confidence(file, labels, sample):
    votes = humans.Votes(file[1])
    probabilities = (file[1] + 1.0) / (file[1] + 1.0).sum(1, keepdims=True)
    subject = humans.Subject("a.pt", probabilities, np.where(probabilities.argmax(1) != labels, "unstable", ""))
    trainings = [humans.Trainings("own, best", np.stack([labels, probabilities.argmax(1)]), [])]
    images = humans.Labelled(labels, data.CLASSES, np.arange(500) % 9 == 0)
    found = humans.compare(votes, images, [subject], trainings, votes.entropy)
    json.dumps(found, allow_nan=False)
    (own,), (row,) = found["checkpoints"], found["trainings"]
    assert own["confidence"]["spearman"] == pytest.approx(spearmanr(votes.entropy, probabilities.max(1)).statistic)
    assert own["confidence"]["spearman"] < own["confidence"]["ci95"][1] < -0.5
    entropies = [each["entropy"] for each in own["confidence"]["tenths"]]
    assert entropies[0] > 2 * entropies[-1]
    assert np.mean(entropies) == pytest.approx(votes.entropy.mean())
    assert found["ambiguity"]["spearman"] == pytest.approx(1)
    assert row["people_accuracy"]["mean"] == pytest.approx(((labels == votes.choice).mean() + own_share(own)) / 2)
    against = (votes.choice >= 0) & (votes.choice != labels)
    suspects = found["suspects"]
    assert suspects["outvoted"]["share"] == against[images.suspect].mean()
    assert suspects["others_outvoted"]["share"] == against[~images.suspect].mean()
    by_class = np.array([against[labels == k].mean() for k in range(10)])
    assert suspects["expected"] == pytest.approx(by_class[labels[images.suspect]].mean())
    wrong = probabilities.argmax(1) != labels
    assert own["groups"]["unstable"] == own["mistakes"]
    for k, name in enumerate(data.CLASSES):
        assert own["classes"][name]["n"] == (wrong & (labels == k)).sum()
        assert found["by_class"][name]["share"] == (votes.choice == labels)[labels == k].mean()
    often = np.array([(votes.choice == k)[labels == k].mean() >= 0.5 for k in range(10)])[labels]
    assert own["often_chosen"]["yes"]["n"] == (wrong & often).sum()
    assert own["often_chosen"]["no"]["n"] == (wrong & ~often).sum()
    assert found["entropy"] == pytest.approx(votes.entropy.mean())
    assert problem(found, humans.PEOPLE) is None


def test_what_has_no_order_has_no_correlation(file, labels):
    votes = humans.Votes(file[1])
    constant = np.full((500, 10), 0.1)
    images = humans.Labelled(labels, data.CLASSES, None)
    subject = humans.Subject("a.pt", constant, np.where(labels != 0, "unstable", ""))
    trainings = [humans.Trainings("own, best", np.stack([labels, labels]), [])]
    found = humans.compare(votes, images, [subject], trainings, np.zeros(500))
    assert found["ambiguity"]["spearman"] is found["checkpoints"][0]["confidence"]["spearman"] is None
    entropies = [each["entropy"] for each in found["ambiguity"]["tenths"]]
    assert entropies == pytest.approx([votes.entropy.mean()] * 10)
    assert problem(json.loads(json.dumps(found, allow_nan=False)), humans.PEOPLE) is None


def own_share(own):
    return own["people_accuracy"]["share"]


@pytest.mark.skipif(not REAL.exists(), reason="the votes of Fashion-MNIST-H are not here")
def test_the_shipped_numbers_are_those_of_the_votes():
    """Recomputed without analysis/humans.py, from what ships: the labels, the report's answers and groups."""
    shipped = json.loads((ROOT / "docs" / "figures" / "analysis.json").read_text())["report"]["people"]
    (test,) = data.load("test")
    labels, counts = test.labels.numpy(), np.loadtxt(REAL, delimiter=",", dtype=int)
    votes = humans.read_votes(REAL, labels)
    assert votes.sha256 == shipped["sha256"] == humans.PUBLISHED
    assert np.array_equal(votes.counts, counts)
    assert shipped["votes"] == counts.sum() == 667_020
    top = np.sort(counts, 1)[:, -2:]
    clear = top[:, 1] > top[:, 0]
    assert shipped["tied"] == (~clear).sum()
    assert shipped["label_chosen"]["count"] == (clear & (counts.argmax(1) == labels)).sum()
    for row in shipped["trainings"]:
        files = [*ROOT.glob(f"runs/deep/*/{row['name'].replace(', ', '-')}-[0-9].json")]
        answers = np.array([[int(digit) for digit in json.loads(file.read_text())["predicted"]] for file in files])
        agreed = (answers == counts.argmax(1)) & clear
        assert row["n"] == len(files)
        assert row["people_accuracy"]["mean"] == pytest.approx(agreed.mean())
        wrong = answers != labels
        assert row["mistakes_model"]["mean"] == pytest.approx(np.mean((agreed & wrong).sum(1) / wrong.sum(1)))
