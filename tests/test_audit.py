"""The audit that analyze_errors.py --export writes: of the sample, and the one that is shipped in runs/audit."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from test_report import analysed, shorten  # noqa: F401 - a fixture

import data
from analysis import audit, composition, trainings

SHIPPED = ROOT / "runs" / "audit"
# Training images of wrong label by the authors of arXiv:1912.05283: zalandoresearch/fashion-mnist#166.
PUBLISHED = {45592, 16691, 28264, 33982, 40513, 42018}
TRAININGS = re.escape("the five folds") + ".*" + re.escape("Consensus needs 5 trainings of cnn, published")


def export(trained, deep, folder, *flags, figures=None):
    """Run analyze_errors.py --export for the CNN of the sample."""
    return run_script(
        "analyze_errors.py", trained[0] / "best_cnn_fmnist.pt", "--data-dir", SAMPLE, "--deep-dir", deep,
        "--figures-dir", figures or folder / "figures", "--export", folder, *flags, before=shorten,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(analysed):  # noqa: F811
    """What --deep --export wrote of the sample: the folder of the audit, that of the trainings, and analysis.json."""
    folder, numbers, said = analysed
    assert re.search(r"written to .*: suspects.csv, near_duplicates.csv, consensus.csv, README.md", said)
    return folder / "audit", folder / "deep", numbers


@pytest.fixture(params=["shipped", "sample"])
def both(request):
    """A folder of the audit, the numbers of the report that it must agree with, and the two splits."""
    if request.param == "shipped":
        analysis = json.loads((ROOT / "docs/figures/analysis.json").read_text())
        return SHIPPED, analysis, *data.load("train+val", "test")
    folder, _, analysis = request.getfixturevalue("exported")
    return folder, analysis, *data.load("train+val", "test", data_dir=SAMPLE)


def rows(folder, name):
    """The rows of a file, whose columns are those that README.md documents."""
    with open(folder / name, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(audit.COLUMNS[name])
        return list(reader)


def test_the_suspects_are_those_of_the_report(both):
    folder, analysis, train, test = both
    issues, found = analysis["report"]["label_issues"], rows(folder, "suspects.csv")
    for split, images in (("train", train), ("test", test)):
        own = [row for row in found if row["split"] == split]
        assert [int(row["index"]) for row in own] == issues[f"{split}_indices"]
        assert len(own) == issues[split]["count"]
        for row in own:
            assert row["label"] == images.classes[images.labels[int(row["index"])]]
    assert [int(row["rank"]) for row in found] == list(range(1, len(found) + 1))
    chances = [(float(row["p_label"]), float(row["p_suggested"])) for row in found]
    assert chances == sorted(chances, key=lambda pair: pair[0])
    for row, (own, other) in zip(found, chances, strict=True):
        assert 0 <= own <= other <= 1
        assert re.fullmatch(r"[01]\.\d{4}", row["p_label"])
        assert row["suggested"] != row["label"]


def test_the_near_duplicates_are_those_of_the_report(both):
    folder, analysis, train, test = both
    double, found = analysis["report"]["near_duplicates"], rows(folder, "near_duplicates.csv")
    assert len({row["test_index"] for row in found}) == len(found) == double["test"]["count"]
    assert sum(row["test_label"] != row["train_label"] for row in found) == double["of_another_label"]
    for row in found:
        i, twin = int(row["test_index"]), int(row["train_index"])
        assert row["test_label"] == test.classes[test.labels[i]]
        assert row["train_label"] == test.classes[train.labels[twin]]
        pixel, feature = float(row["pixel_distance"]), float(row["feature_distance"])
        difference = (test.images[i].double() - train.images[twin].double()) / 255
        assert pixel == pytest.approx(difference.square().mean().sqrt().item(), abs=6e-5)
        near = feature <= composition.FEATURE_LIMIT and pixel <= composition.LOOSE_PIXEL_LIMIT
        assert pixel <= composition.PIXEL_LIMIT or near


def test_the_consensus_is_that_of_the_report(both):
    folder, analysis, _, test = both
    (first, *_), found = analysis["report"]["checkpoints"], rows(folder, "consensus.csv")
    groups = [row["group"] for row in found]
    assert groups.count("consensus") == first["groups"]["consensus"]["count"]
    assert set(groups) <= {"label", "duplicate", "consensus"}
    assert groups.count("label") <= first["groups"]["label"]["count"]
    suspect = {int(row["index"]) for row in rows(folder, "suspects.csv") if row["split"] == "test"}
    for row in found:
        assert row["label"] == test.classes[test.labels[int(row["test_index"])]] != row["answer"]
        assert (row["group"] == "label") == (int(row["test_index"]) in suspect)


def test_consensus_is_the_same_wrong_answer_of_five_trainings(exported, sample):
    folder, deep, _ = exported
    votes = [json.loads(path.read_text())["predicted"] for path in sorted(deep.glob("*/cnn-published-?.json"))]
    assert len(votes) == trainings.SEEDS
    answers, labels = np.array([list(map(int, each)) for each in votes]), sample["test"].labels.numpy()
    alike = set(np.flatnonzero((answers == answers[0]).all(0) & (answers[0] != labels)))
    listed = {int(row["test_index"]): row["answer"] for row in rows(folder, "consensus.csv")}
    assert set(listed) <= alike  # the checkpoint, trained on its own, need not agree with them
    assert len(listed) > 10
    for i, answer in listed.items():
        assert answer == data.CLASSES[answers[0, i]]


def test_the_readme_documents_every_column_and_the_codes_values(both):
    folder, analysis, _, _ = both
    text = (folder / "README.md").read_text()
    for columns in audit.COLUMNS.values():
        for column, meaning in columns.items():
            assert f"| {column} | {meaning} |" in text
    for value in (analysis["checkpoint_sha256"], analysis["checkpoint"], analysis["data"]):
        assert value in text
    for limit in (composition.PIXEL_LIMIT, composition.FEATURE_LIMIT, composition.LOOSE_PIXEL_LIMIT):
        assert f"is under {limit}" in " ".join(text.split())
    recipe = f"{trainings.FOLD_MODEL}, recipe {trainings.FOLD_RECIPE}, {trainings.FOLD_EPOCHS} epochs"
    assert f"with seed {trainings.FOLD_SEED}" in text
    assert "seeds 0, 1, 2, 3, 4" in text
    assert recipe in text or folder != SHIPPED  # the sample's are shorter
    for name in audit.COLUMNS:
        assert f"| [{name}]({name}) | {len(rows(folder, name))} |" in text
    groups = [row["group"] for row in rows(folder, "consensus.csv")]
    for name in ("label", "duplicate", "consensus"):
        assert f"| {name} | {groups.count(name)} |" in text
    assert ("Zalando" in text) == (folder == SHIPPED)
    assert "MIT" in text
    assert str(ROOT) not in text


def test_the_published_label_errors_are_among_the_suspects():
    listed = {int(row["index"]) for row in rows(SHIPPED, "suspects.csv") if row["split"] == "train"}
    assert listed >= PUBLISHED


def test_the_page_counts_the_rows():
    text = " ".join((ROOT / "docs/mistakes.md").read_text().split())
    for name, words in (
        ("suspects.csv", "suspect labels"),
        ("near_duplicates.csv", "near-duplicates with their twins"),
        ("consensus.csv", "test images on which all five trainings, the checkpoint among them, give the same wrong"),
    ):
        assert f"{len(rows(SHIPPED, name))} {words}" in text


def test_the_same_command_replaces_its_files_by_the_same_bytes(exported, trained, tmp_path):
    folder, deep, _ = exported
    shutil.copytree(folder, tmp_path / "audit")
    (tmp_path / "audit" / "consensus.csv").write_text(audit.FIRST_LINES["consensus.csv"] + "\r\nolder\n")
    (tmp_path / "audit" / "notes.csv").write_text("mine")
    finished = export(trained, deep, tmp_path / "audit")
    assert finished.returncode == 0, finished.stderr
    for name in audit.FIRST_LINES:
        assert (tmp_path / "audit" / name).read_bytes() == (folder / name).read_bytes(), name
    assert (tmp_path / "audit" / "notes.csv").read_text() == "mine"


@pytest.mark.parametrize("name", audit.FIRST_LINES)
def test_no_file_of_the_users_is_replaced(name, trained, tmp_path):
    content = audit.FIRST_LINES[name].replace("a", "A", 1) + "\n"
    (tmp_path / name).write_text(content)
    finished = export(trained, tmp_path / "deep", tmp_path)
    assert_one_line_error(finished, f"{name} was not written by --export and is not replaced: choose another folder")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_folder_in_the_place_of_a_file_is_one_line(trained, tmp_path):
    (tmp_path / "suspects.csv").mkdir()
    assert_one_line_error(export(trained, tmp_path / "deep", tmp_path), "suspects.csv: not a regular file")


def test_without_the_long_trainings_nothing_is_written(trained, exported, tmp_path):
    finished = export(trained, tmp_path / "deep", tmp_path / "audit")
    assert_one_line_error(finished, "analyze_errors.py --deep trains " + TRAININGS)
    shutil.copytree(
        exported[1], tmp_path / "deep", ignore=shutil.ignore_patterns("checkpoints", "cnn-*-4.json", "people-*")
    )
    finished = export(trained, tmp_path / "deep", tmp_path / "audit")
    assert_one_line_error(finished, "Consensus needs 5 trainings of cnn, published: .*--deep runs them")
    assert not (tmp_path / "audit").exists()


def test_the_twin_nearest_in_pixels_counts_first(sample):
    train, test = sample["train"], sample["test"]
    images = train.images[:3].clone()
    copied = test._replace(images=images, labels=train.labels[:3])
    features = torch.eye(len(train.labels))[:, :8] + 1
    first = type("First", (), {"features": features[[5, 5, 5]]})
    results = type("Results", (), {"out_of_fold": lambda *_: None, "seeds": lambda *_: []})()
    evidence = composition.gather(first, features, train, copied, results)
    found = audit._near_duplicates(first, evidence, features, train, copied)
    assert [row[:3] for row in found] == [(0, 0, "0.0000"), (1, 1, "0.0000"), (2, 2, "0.0000")]
