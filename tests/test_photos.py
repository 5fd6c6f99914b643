"""Labelled pictures: what predict.py --evaluate measures, and the rule that analysis/rule.py fits to them."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from PIL import Image

import checkpoint
import engine
from analysis import classify, photos, rule
from data import CLASSES
from metrics import wilson_interval
from runtime.errors import UserError

SHIPPED = ROOT / "checkpoints" / "distilled" / "best_cnn_fmnist.pt"  # trained with mirrored images


def write(folder, rows, header=("file", "strict", "lenient")):
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "labels.csv"


@pytest.fixture
def garments(sample, tmp_path):
    """Forty test images as PNG files; of every fourth the label says none."""
    rows = []
    for number, (image, label) in enumerate(
        zip(sample["test"].images[:40].numpy(), sample["test"].labels, strict=False)
    ):
        name = CLASSES[label] if number % 4 else "none"
        fair = f"{name}|Bag" if number % 4 and name != "Bag" else name
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
        rows.append((f"{number:02}.png", name, fair, number % 2))
    return write(tmp_path, rows, ("file", "strict", "lenient", "odd"))


def answered(images):
    """The most probable class of the shipped CNN, and its probability, by the mean over both views."""
    model, _ = checkpoint.load(SHIPPED)
    split = classify.as_split(model, list(images.numpy()), CLASSES)
    mirrored = split._replace(images=split.images.flip(2))
    mean = engine.average([engine.predict_logits(model, each) for each in (split, mirrored)]).exp()
    return [CLASSES[k] for k in mean.argmax(1)], mean.max(1).values.numpy()


def test_an_answer_is_the_mean_over_both_views_where_mirrored_images_were_trained_on(sample):
    images = sample["test"].images[:50]
    model, info = checkpoint.load(SHIPPED)
    candidate = classify.candidate(SHIPPED, model, info)
    best, probability = answered(images)
    for views in (images, images.flip(2)):
        found = classify.probabilities(classify.logits_of(candidate, list(views.numpy())), 1)
        assert [CLASSES[k] for k in found.argmax(1)] == best
        assert found.max(1) == pytest.approx(probability, abs=1e-5)
    _, info = checkpoint.load(ROOT / "checkpoints" / "best_cnn_fmnist.pt")
    assert not classify.is_mirrored(info)


def test_evaluate_counts_what_the_network_answers(garments, sample):
    finished = run_script("predict.py", "--evaluate", garments, "--checkpoint", SHIPPED, "--json")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    best, probability = answered(sample["test"].images[:40])
    truth = [CLASSES[k] for k in sample["test"].labels[:40]]
    own = [k for k in range(40) if k % 4]
    right = [best[k] in (truth[k], "Bag") for k in own]
    sure = probability >= classify.SURE
    assert (found["n"], found["lenient"]["n"]) == (40, 30)
    assert found["lenient"]["count"] == sum(right)
    assert found["lenient"]["ci95"] == pytest.approx(wilson_interval(sum(right), 30))
    assert found["strict"]["count"] == sum(best[k] == truth[k] for k in own)
    assert found["coverage"]["count"] == found["precision"]["n"] == sum(sure[own])
    assert found["precision"]["count"] == sum(fine for k, fine in zip(own, right, strict=True) if sure[k])
    assert (found["others_sure"]["count"], found["others_sure"]["n"]) == (sum(sure[::4]), 10)
    assert sum(each["n"] for each in found["classes"].values()) == 30
    assert {side: each["n"] for side, each in found["columns"]["odd"].items()} == {"0": 10, "1": 20}
    assert [each["best"] for each in found["pictures"]] == best
    table = photos.text(found)
    assert f"{found['lenient']['share']:.1%}" in table
    assert "10 of none" in table


def test_a_label_alone_is_enough_and_an_empty_one_is_of_no_class(sample, tmp_path):
    for number in range(3):
        Image.fromarray(sample["test"].images[number].numpy()).save(tmp_path / f"{number}.png")
    path = write(tmp_path, [("0.png", "Bag"), ("1.png", ""), ("2.png", "none")], ("\ufefffile", "label"))
    found = photos.read_labels(path, CLASSES)
    assert [each.fair for each in found] == [{"Bag"}, set(), set()]
    assert photos.read_labels(path, [*CLASSES[:8], "Bag", "Hat"])[0].strict == {"Bag"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,lenient\na.png,Bag\n", "lacks the column label or strict"),
        ("picture,label\na.png,Bag\n", "lacks the column file"),
        ("file,label,label\na.png,Bag,Bag\n", "names the column 'label' twice"),
        ("", "lacks the column file"),
        ("file,label\n", "names no picture"),
        ("file,label\na.png,Bag\nb.png,Bag\n", "line 3: b.png is missing"),
        ("file,label\na.png,Hat\n", "line 2: 'Hat' is no class; they are T-shirt/top"),
        ("file,label\na.png,Bag\n./a.png,Bag\n", "line 3: ./a.png is there twice"),
        ("file,label\na.png\n", "line 2: it has more or fewer values"),
        ("file,label\na.png,Bag,1\n", "line 2: it has more or fewer values"),
        ("file,strict,lenient\na.png,Bag,Coat\n", "line 2: strict is Bag, but lenient is Coat"),
        ("file,strict,lenient\na.png,Bag,none|Bag\n", "line 2: 'none' is no class"),
        ('file,label\na.png,"Bag\n', "no CSV file"),
        ("file,label\na.png,\xff\n", "not a text in UTF-8"),
    ],
)
def test_a_fault_of_the_labels_is_one_clear_line(content, message, sample, tmp_path):
    Image.fromarray(sample["test"].images[0].numpy()).save(tmp_path / "a.png")
    path = tmp_path / "labels.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        photos.read_labels(path, CLASSES)
    assert message in str(caught.value)
    assert "labels.csv" in str(caught.value)


def test_faults_of_files_and_flags_are_one_line(sample, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    path = write(tmp_path, [("a.png", "Bag", "Bag")])
    for labels, message in ((path, "a.png: a text file, not a picture"), (tmp_path / "none.csv", "No such file")):
        finished = run_script("predict.py", "--evaluate", labels)
        assert finished.returncode == 2
        assert message in finished.stderr.splitlines()[-1]
    assert_one_line_error(run_script("predict.py", "--evaluate", path, "a.png"), "not both")
    assert_one_line_error(run_script("predict.py", "--evaluate", path, "--csv"), "it takes no --show, --top or --csv")
    assert_one_line_error(run_script("predict.py"), "name pictures, or --evaluate LABELS.csv")


def sample_of(logits, labels, own):
    """Logits with labels, as a Sample; where own is false, none is fair."""
    return rule.Sample([logits], np.eye(10, dtype=bool)[labels] & own[:, None])


def test_a_rule_finds_the_temperature_and_keeps_to_its_thresholds(sample):
    """Fitted to test images, half of which are made of two garments and count as other things."""
    model, _ = checkpoint.load(SHIPPED)
    test = sample["test"]
    mixed = test._replace(images=(test.images // 2 + test.images.flip(0) // 2))
    logits, others = engine.predict_logits(model, test), engine.predict_logits(model, mixed)
    labels, n = test.labels.numpy(), len(test.labels)
    both, twice = torch.cat([logits, others]), np.concatenate([labels, labels])
    pictures, hard = sample_of(both, twice, np.arange(2 * n) < n), sample_of(logits, labels, np.ones(n, bool))
    found = rule.fit(pictures, hard)
    sharper = rule.Sample([3 * each for each in pictures.views], pictures.fair)
    scaled = rule.fit(sharper, rule.Sample([3 * each for each in hard.views], hard.fair))
    assert scaled.temperature == pytest.approx(3 * found.temperature, rel=0.01)
    assert scaled.probability == pytest.approx(found.probability, abs=0.01)
    measured = rule.measure(found, pictures)
    assert measured["others"] <= 1 - rule.OTHERS + 1 / n
    assert measured["coverage"] == pytest.approx(rule.COVERAGE, abs=0.02)
    assert measured["precision"] > measured["accuracy"]
    assert 0.8 * measured["coverage"] < rule.held_out(pictures, hard)["coverage"] < 1.2 * measured["coverage"]


def test_a_fitted_rule_belongs_to_its_checkpoint(garments, tmp_path):
    own = tmp_path / "best_own.pt"
    shutil.copy(SHIPPED, own)
    (tmp_path / "best_own.pictures.json").write_text("{}")
    assert_one_line_error(run_script("predict.py", tmp_path / "01.png", "--checkpoint", own), "is no rule for pictures")
    _, info = checkpoint.load(own)
    with pytest.raises(UserError, match="is no rule for pictures"):
        rule.main([str(garments), "--checkpoint", str(own)])
    content = {
        "checkpoint_sha256": info["sha256"],
        "temperature": 2.0,
        "energy": -9.0,
        "unlike": -9.0,
        "probability": 0.0,
    }

    def answer(**changes):
        text = json.dumps(content | {"measured": {}} | changes)
        (tmp_path / "best_own.pictures.json").write_text(text)
        finished = run_script("predict.py", tmp_path / "01.png", "--checkpoint", own, "--json")
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout), finished.stderr

    row, said = answer()
    assert row["answer"] == next(iter(row["probabilities"]))
    assert "no rule" not in said
    assert answer(energy=1000.0)[0]["answer"] == classify.NOT_SURE
    assert answer(energy=1000.0, unlike=1000.0)[0]["answer"] == classify.UNLIKE
    assert answer(probability=1.0)[0]["answer"] == classify.NOT_SURE
    (tmp_path / "best_own.pictures.json").write_text(json.dumps(content | {"measured": {}, "unlike": 0.0}))
    with pytest.raises(UserError, match="unlike is above energy"):
        classify.rule_of(own, info)
    other, said = answer(checkpoint_sha256="0" * 64, probability=1.0)
    assert "is not the checkpoint that best_own.pictures.json was fitted for: its answers are sure from" in said
    assert other["answer"] != classify.NOT_SURE


def test_the_command_writes_a_rule_that_predict_uses(garments, tmp_path, sample_as_published, capsys):
    own = tmp_path / "best_own.pt"
    shutil.copy(SHIPPED, own)
    assert rule.main([str(garments), "--checkpoint", str(own), "--data-dir", str(SAMPLE)]) == 0
    _, info = checkpoint.load(own)
    digest, found = classify.read_rule(tmp_path / "best_own.pictures.json")
    assert digest == info["sha256"]
    assert classify.rule_of(own, info) == found
    assert "no rule" not in capsys.readouterr().err
    few = write(tmp_path, [("00.png", "Bag", "Bag")])
    with pytest.raises(UserError, match="1 pictures of the classes and 0 of none of them"):
        rule.main([str(few), "--checkpoint", str(own), "--data-dir", str(SAMPLE)])
