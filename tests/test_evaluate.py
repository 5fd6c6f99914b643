"""evaluate.py as a user runs it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script, six_views
from sklearn.metrics import accuracy_score, log_loss, precision_recall_fscore_support

import checkpoint
import data
import engine
from data import CLASSES


def evaluate(*arguments):
    return run_script("evaluate.py", *arguments, "--data-dir", SAMPLE)


@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_one_checkpoint(trained, sample, tmp_path, split):
    path = trained[0] / "best_cnn_fmnist.pt"
    finished = evaluate(path, "--split", split, "--json", tmp_path / "a.json")
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    labels = sample[split].labels.numpy()
    predicted = engine.predict_logits(checkpoint.load(path)[0], sample[split]).argmax(1).numpy()
    assert (result["model"], result["split"], result["n"]) == ("cnn", split, len(labels))
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert np.sum(result["confusion_matrix"]) == len(labels)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, zero_division=0)
    for index, name in enumerate(CLASSES):
        row = result["per_class"][name]
        assert [row["precision"], row["recall"], row["f1"]] == [precision[index], recall[index], f1[index]]
        assert re.search(rf"^{name} +{precision[index]:.1%} +{recall[index]:.1%} ", finished.stdout, re.MULTILINE)
    low, high = result["accuracy_ci95"]
    assert (
        f"accuracy                    {result['accuracy']:.2%}  (95% interval {low:.2%} to {high:.2%})"
        in finished.stdout
    )
    assert f"{result['log_loss']:.4f} nats" in finished.stdout
    assert f"{result['ece']:.4f}" in finished.stdout
    cautions = {"test": None, "val": "its best epoch was chosen on these", "train": "trained on these very images"}
    assert (cautions[split] or "None") in str(result["caution"])


def test_several_checkpoints_are_compared(trained, sample, tmp_path):
    paths = [trained[0] / f"best_{name}_fmnist.pt" for name in ("mlp", "cnn", "cnn")]
    finished = evaluate(*paths, "--json", tmp_path / "c.json")
    assert finished.returncode == 0, finished.stderr
    content = json.loads((tmp_path / "c.json").read_text())
    assert [result["model"] for result in content["checkpoints"]] == ["mlp", "cnn", "cnn"]
    right = [
        (engine.predict_logits(checkpoint.load(path)[0], sample["test"]).argmax(1) == sample["test"].labels).numpy()
        for path in paths
    ]
    first, _, third = content["mcnemar"]
    assert (first["only_a"], first["only_b"]) == ((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum())
    assert third["p_value"] == 1  # a checkpoint against itself
    assert (
        f" 1 against  2: {first['only_a']:>5} to {first['only_b']:>5}   p = {first['p_value']:.2g}" in finished.stdout
    )
    (mean,) = content["means"]
    assert (mean["model"], mean["n"], mean["sd"]) == ("cnn", 2, 0)


def test_an_ensemble_answers_with_the_mean_probabilities(trained, sample, tmp_path):
    paths = [trained[0] / f"best_{name}_fmnist.pt" for name in ("mlp", "cnn")]
    finished = evaluate(*paths, "--ensemble", "--json", tmp_path / "e.json")
    assert finished.returncode == 0, finished.stderr
    content = json.loads((tmp_path / "e.json").read_text())
    *_, together = content["checkpoints"]
    probabilities = sum(
        engine.predict_logits(checkpoint.load(path)[0], sample["test"]).double().softmax(1) for path in paths
    ).numpy()  # fmt: skip
    labels = sample["test"].labels.numpy()
    assert together["accuracy"] == accuracy_score(labels, probabilities.argmax(1))
    assert together["log_loss"] == pytest.approx(log_loss(labels, probabilities / 2))
    assert (together["model"], len(together["ensemble"]), len(content["mcnemar"])) == ("cnn+mlp", 2, 3)
    assert " 3  all 2 together" in finished.stdout
    assert content["means"] == []
    assert_one_line_error(evaluate(paths[0], "--ensemble"), "--ensemble needs two checkpoints")


def test_test_time_augmentation_is_told_apart_from_the_plain_answer(trained, sample, tmp_path):
    path = trained[0] / "best_cnn_fmnist.pt"
    finished = evaluate(path, "--tta", "--json", tmp_path / "t.json")
    assert finished.returncode == 0, finished.stderr
    plain, augmented = json.loads((tmp_path / "t.json").read_text())["checkpoints"]
    images, model = sample["test"].images, checkpoint.load(path)[0]
    with torch.no_grad():
        mean = sum(model(data.normalise(view.contiguous())).softmax(1) for view in six_views(images)) / 6
    assert augmented["accuracy"] == pytest.approx((mean.argmax(1) == sample["test"].labels).double().mean().item())
    assert (plain["views"], augmented["views"]) == (1, 6)
    assert plain["caution"] is None
    assert "not trained on mirrored and moved images" in augmented["caution"]
    assert re.search(r"^ 2  \S+best_cnn_fmnist.pt, 6 views ", finished.stdout, re.MULTILINE)


def test_the_default_is_the_shipped_cnn():
    finished = run_script("evaluate.py", "--data-dir", SAMPLE)
    assert finished.returncode == 0, finished.stderr
    assert "checkpoints/best_cnn_fmnist.pt: cnn" in finished.stdout
    assert "caution: trained on Fashion-MNIST, measured on sample" in finished.stdout


def test_bad_arguments_get_one_clear_line(trained, tmp_path):
    path = trained[0] / "best_cnn_fmnist.pt"
    assert_one_line_error(evaluate(path, "--split", "all"), "--split: invalid choice")
    assert_one_line_error(
        evaluate(path, "--json", tmp_path / "no" / "a.json"), "not a .json file in a folder that exists"
    )
    assert_one_line_error(evaluate(path, "--json", tmp_path / "a.pt"), "not a .json file")
    assert_one_line_error(evaluate(path, "--json", path.with_suffix(".json")), "would replace the history of a run")
    assert_one_line_error(
        evaluate(path, ROOT / "README.md"), "README.md: damaged, truncated or not a PyTorch checkpoint"
    )


def test_a_reader_who_has_seen_enough_is_no_error(trained):
    command = f"{sys.executable} evaluate.py {trained[0] / 'best_mlp_fmnist.pt'} --data-dir {SAMPLE} | head -n 1"
    finished = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.stderr == ""
