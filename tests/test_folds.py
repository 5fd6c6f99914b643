"""Folds of the training images: train.py --fold, and what a checkpoint of it may be measured on."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, in_a_fork, run_script, stop_in_the_second_epoch

import checkpoint
import data
import engine
import metrics
from runtime import cli
from runtime.errors import UserError
from training import record, run
from training.record import history_of, read_history


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_folds_share_out_every_class_of_the_training_images(count, sample):
    labels = sample["train+val"].labels.numpy()
    folds = [data.fold_indices(labels, f"{number}/{count}") for number in range(1, count + 1)]
    assert np.array_equal(np.sort(np.concatenate(folds)), np.arange(1000))
    for sizes in ([len(fold) for fold in folds], *np.array([np.bincount(labels[fold]) for fold in folds]).T):
        assert max(sizes) - min(sizes) <= 1
    assert all((np.diff(fold) > 0).all() for fold in folds)


def test_folds_are_the_same_for_good():
    labels = np.arange(60_000) % 10
    assert data.fold_indices(labels, "2/5")[:8].tolist() == [2, 6, 13, 15, 18, 23, 24, 29]
    assert np.array_equal(data.fold_indices(labels, "val"), data.split_indices(labels)["val"])


@pytest.mark.parametrize(("select", "sizes"), [("last", [800, 200]), ("test", [800, 200]), ("val", [720, 80, 200])])
def test_the_splits_of_a_fold_run_are_all_training_images(select, sizes, sample):
    whole = sample["train+val"]
    splits, index = data.hold_out(whole, "2/5", select)
    assert [len(split.labels) for split in splits] == sizes  # as many validation images as without a fold
    assert torch.equal(whole.images[index], splits[-1].images)
    images = torch.cat([split.images for split in splits]).flatten(1)
    assert sorted(map(bytes, images.numpy())) == sorted(map(bytes, whole.images.flatten(1).numpy()))


@pytest.mark.parametrize(
    ("fold", "said"),
    [
        *((fold, "write K/N") for fold in ("0/5", "6/5", "1/1", "2", "a/b", "-1/5", "1/5/5", "²/5", "test", "")),
        ("1/101", "a class has 100 training images"),
        ("1/99999999", "write K/N"),
    ],
)
def test_a_fold_that_cannot_be_is_one_line(fold, said, sample):
    with pytest.raises(UserError, match=said):
        data.fold_indices(sample["train+val"].labels.numpy(), fold)


# --- train.py --------------------------------------------------------------------------------------------


def train(folder, *words, data_dir=SAMPLE, **options):
    flags = ["--model", "mlp", "--recipe", "fast", "--epochs", "2", "--data-dir", data_dir, "--checkpoint-dir", folder]
    return run_script("train.py", *flags, *words, **options)


@pytest.fixture(scope="module")
def fold_run(tmp_path_factory):
    """The folder of a run of fold 2/5, and what it printed. Its data have no test images."""
    folder = tmp_path_factory.mktemp("fold")
    shutil.copytree(SAMPLE, alone := folder / "sample", ignore=shutil.ignore_patterns("t10k*"))
    finished = train(folder, "--fold", "2/5", "--select", "test", data_dir=alone)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_a_fold_run_measures_on_its_held_out_images_alone(fold_run, sample):
    folder, said = fold_run
    assert "800 training images; fold 2/5 holds out 200; best of 2 epochs, chosen on the 200 held-out images" in said
    assert "train acc held loss held acc" in said
    assert re.search(r"best epoch \d \(held-out accuracy", said)
    assert re.search(r"\nheld-out accuracy .*n = 200; the best epoch was chosen on these very images\n", said)
    assert "test accuracy" not in said
    history = read_history(folder / "best_mlp_fmnist.json")
    assert (history["flags"]["fold"], history["train_images"]) == ("2/5", 800)
    assert history["data_sha256"] == data.fingerprint(sample["train+val"])  # the same of every fold

    (_, held), index = data.hold_out(sample["train+val"], "2/5", "last")
    with np.load(folder / "held_out_mlp_fmnist.npz") as found:
        answers = dict(found)
    assert {name: (array.dtype, array.shape) for name, array in answers.items()} == {
        "index": (np.int64, (200,)), "labels": (np.int64, (200,)), "probabilities": (np.float32, (200, 10))
    }  # fmt: skip
    assert np.array_equal(answers["index"], index)
    assert np.array_equal(answers["labels"], sample["train+val"].labels[index])
    network, info = checkpoint.load(folder / "best_mlp_fmnist.pt")
    expected = metrics.probabilities(engine.predict_logits(network, held))
    np.testing.assert_allclose(answers["probabilities"], expected, rtol=1e-4, atol=1e-6)
    right = (answers["probabilities"].argmax(1) == answers["labels"]).mean()
    assert history["test"]["accuracy"] == right == history["epochs"][info["epoch"] - 1]["select_accuracy"]


def test_other_answers_are_kept_aside(fold_run, tmp_path):
    shutil.copytree(fold_run[0], tmp_path / "a")
    earlier = (tmp_path / "a" / "held_out_mlp_fmnist.npz").read_bytes()
    finished = train(tmp_path / "a", "--fold", "2/5", "--select", "test")
    assert "it is the same to the bit as the earlier one" in finished.stdout
    assert "held_out" not in finished.stdout
    finished = train(tmp_path / "a", "--fold", "val")
    (kept,) = (tmp_path / "a").glob("held_out_mlp_fmnist.*.npz")
    assert f"the earlier held_out_mlp_fmnist.npz is kept as {cli.shown(kept)}" in finished.stdout
    assert kept.read_bytes() == earlier
    with np.load(tmp_path / "a" / "held_out_mlp_fmnist.npz") as found:
        assert len(found["index"]) == 80


def test_an_interrupted_fold_run_ends_with_the_same_files(fold_run, tmp_path):
    words = ["--fold", "2/5", "--select", "test"]
    assert train(tmp_path, *words, before=stop_in_the_second_epoch).returncode == 143
    assert not list(tmp_path.glob("held_out*"))
    assert_one_line_error(train(tmp_path, "--resume", "--fold", "3/5"), "--fold was 2/5 when this run began, and 3/5")
    assert train(tmp_path, "--resume").returncode == 0
    for name in ("best_mlp_fmnist.pt", "held_out_mlp_fmnist.npz"):
        assert (tmp_path / name).read_bytes() == (fold_run[0] / name).read_bytes()


FOLD_CAUTIONS = [  # fold, select, split, kind
    ("2/5", "last", "test", None),
    ("2/5", "test", "test", None),  # the held-out images chose
    ("2/5", "last", "val", "trained"),
    ("2/5", "val", "val", "trained"),
    ("2/5", "last", "train", "trained"),
    ("val", "last", "val", None),
    ("val", "val", "val", None),  # other validation images chose
    ("val", "test", "val", "chosen"),
    ("val", "last", "train", "trained"),
]


@pytest.mark.parametrize(("fold", "select", "split", "kind"), FOLD_CAUTIONS)
def test_what_a_fold_run_has_seen_is_said(fold, select, split, kind, sample):
    said = checkpoint.caution({"flags": {"fold": fold, "select": select}, "data": "sample"}, sample[split])
    assert (said and said[0]) == kind


def test_a_teacher_must_not_have_seen_what_the_student_holds_out(fold_run, trained, tmp_path):
    words = ["--recipe", "distilled", "--epochs", "1", "--teacher"]
    of_the_fold, other = fold_run[0] / "best_mlp_fmnist.pt", trained[0] / "best_mlp_fmnist.pt"
    for flags, said in (
        ([other, "--fold", "2/5"], "was not trained without fold 2/5.*with --fold 2/5"),
        ([of_the_fold, "--fold", "1/5"], "was not trained without fold 1/5"),
        ([of_the_fold, "--fold", "2/5"], "its epoch was chosen on the images that fold 2/5 holds out"),
    ):
        assert_one_line_error(train(tmp_path, *words, *flags), said)
    assert train(tmp_path / "fit", "--epochs", "1", "--fold", "2/5").returncode == 0
    assert train(tmp_path, *words, tmp_path / "fit" / "best_mlp_fmnist.pt", "--fold", "2/5").returncode == 0


# --- the caller of a run ---------------------------------------------------------------------------------


def watched(folder, last):
    seen = []
    request = run.Request(
        "mlp", recipe="fast", epochs=3, fold="val", select="test", data_dir=SAMPLE, checkpoint_dir=folder
    )
    code = run.run(request, lambda row: seen.append(row["select_accuracy"]) or len(seen) == last)
    return code, seen


def test_a_caller_sees_every_epoch_and_may_give_the_run_up(tmp_path):
    code, seen = in_a_fork(watched, tmp_path, None)
    rows = history_of(tmp_path / "best_mlp_fmnist.pt")["epochs"]
    assert (code, seen) == (0, [row["select_accuracy"] for row in rows])
    code, some = in_a_fork(watched, tmp_path / "given-up", 2)
    assert (code, some) == (run.GIVEN_UP, seen[:2])
    assert json.loads((tmp_path / "given-up" / "best_mlp_fmnist.json").read_text())["status"] == "interrupted"
    assert not record.unfinished_path(tmp_path / "given-up" / "best_mlp_fmnist.pt").exists()
