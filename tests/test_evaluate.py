"""evaluate.py and analysis/evaluation.py, as a user runs them."""

import hashlib
import json
import re
import shutil
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
import metrics
from analysis import evaluation
from data import CLASSES
from dataset import published
from runtime import cli


def evaluate(*arguments, data_dir=SAMPLE, **how):
    return run_script("evaluate.py", *arguments, "--data-dir", data_dir, **how)


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
    adjusted = metrics.holm([pair["p_value"] for pair in content["mcnemar"]])
    assert [pair["p_holm"] for pair in content["mcnemar"]] == adjusted
    counts = f" 1 against  2: {first['only_a']:>5} to {first['only_b']:>5}"
    p_values = f"p = {first['p_value']:.2g}   with Holm's correction {first['p_holm']:.2g}"
    assert f"{counts}   {p_values}\n" in finished.stdout
    (mean,) = content["means"]
    assert (mean["model"], mean["n"], mean["sd"], mean["repeats"]) == ("cnn", 1, None, [cli.shown(paths[2])])
    assert "best_cnn_fmnist.pt repeats a seed and does not count" in " ".join(finished.stdout.split())


def altered(path, folder, **changes):
    """Write a checkpoint that says something else of its training into a new folder."""
    content = checkpoint.from_bytes(path.read_bytes())
    flags = content["flags"] | changes.pop("flags", {})
    folder.mkdir()
    (folder / path.name).write_bytes(checkpoint.to_bytes(content | changes | {"flags": flags}))
    return folder / path.name


def test_means_are_of_checkpoints_that_differ_in_their_seed_alone(trained, tmp_path):
    first = trained[0] / "best_mlp_fmnist.pt"
    paths = [first, altered(first, tmp_path / "seed", seed=1)]
    for name, change in {
        "rate": {"flags": {"lr": 0.003}},
        "data": {"data_sha256": "0123456789" + "a" * 54},
        "code": {"code": "fedcba9876543210"},
        "old": {"data_sha256": None, "code": None},
    }.items():
        paths += [altered(first, tmp_path / f"{name}{seed}", seed=seed, **change) for seed in (0, 1)]
    finished = evaluate(*paths, "--json", tmp_path / "m.json")
    means = json.loads((tmp_path / "m.json").read_text())["means"]
    assert [mean["n"] for mean in means] == [2] * 5
    for number, words in {1: "lr 0.003", 2: "images 01234567", 3: "code fedcba98", 4: "code not recorded"}.items():
        assert words in means[number]["differs"]
        assert words in " ".join(finished.stdout.split())
    assert len({mean["differs"] for mean in means}) == 5


def test_images_that_only_call_themselves_published_are_other_data(sample):
    test = sample["test"]._replace(source="Fashion-MNIST")
    _, info = checkpoint.load(ROOT / "checkpoints" / "best_cnn_fmnist.pt")
    assert checkpoint.caution(info, test) is None  # an old one, without a fingerprint
    assert checkpoint.caution(info | {"data_sha256": published.FINGERPRINTS[0]}, test) is None
    lying = info | {"data_sha256": data.fingerprint(sample["train"], sample["test"])}
    said = "trained on Fashion-MNIST (own), measured on Fashion-MNIST"
    assert checkpoint.caution(lying, test) == ("other data", said)


def test_what_is_hashed_is_what_was_measured(trained, sample, tmp_path, monkeypatch):
    path, load = shutil.copy(trained[0] / "best_mlp_fmnist.pt", tmp_path / "a.pt"), checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *given: (load(*given), path.write_bytes(b"another"))[0])
    (measured,) = evaluation.answer(evaluation.load([path], checkpoint.Bare()), sample["test"], False, False)
    digest = hashlib.sha256((trained[0] / "best_mlp_fmnist.pt").read_bytes()).hexdigest()
    assert evaluation.describe(measured, sample["test"])["checkpoint_sha256"] == digest


def test_one_pair_needs_no_correction(trained):
    paths = [trained[0] / f"best_{name}_fmnist.pt" for name in ("mlp", "cnn")]
    finished = evaluate(*paths)
    assert re.search(r" 1 against  2: .* p = [\d.e-]+\n", finished.stdout)
    assert "Holm" not in finished.stdout


def add_a_metric():
    @metrics.metric("share of bags", unit="of all answers")
    def bags(logits, labels):
        return (logits.argmax(1) == CLASSES.index("Bag")).double().mean()


def test_a_metric_that_someone_adds_is_printed_and_written(trained, sample, tmp_path):
    paths = [trained[0] / f"best_{name}_fmnist.pt" for name in ("mlp", "cnn")]
    finished = evaluate(paths[1], "--json", tmp_path / "m.json", before=add_a_metric)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "m.json").read_text())
    predicted = engine.predict_logits(checkpoint.load(paths[1])[0], sample["test"]).argmax(1)
    assert result["bags"] == (predicted == CLASSES.index("Bag")).double().mean().item()
    assert f"  share of bags               {result['bags']:.4f} of all answers\n" in finished.stdout
    several = evaluate(*paths, before=add_a_metric).stdout
    assert re.search(r"^ 2  \S+best_cnn_fmnist.pt: cnn$", several, re.MULTILINE)
    assert re.search(rf"log loss +ece .*bags\n 1 .*\n 2 .* +{result['bags']:.4f}\n", several)


def add_long_metrics():
    def share(logits, labels):
        return (logits.argmax(1) == labels).double().mean()

    for number in range(4):
        share.__name__ = f"a_share_with_quite_a_long_name_{number}"
        metrics.metric(f"share {number}", unit="")(share)


def test_what_is_printed_fits_into_80_columns(trained):
    paths = [trained[0] / f"best_{name}_fmnist.pt" for name in ("mlp", "cnn", "cnn")]
    for arguments in (paths[:1], [*paths, "--ensemble", "--tta"]):
        finished = evaluate(*arguments, before=add_long_metrics)
        assert finished.returncode == 0, finished.stderr
        lines = [line for line in finished.stdout.splitlines() if not re.search(r"\w/\w+/", line)]  # no path is cut
        assert len(lines) > 20
        assert [line for line in lines if len(line) > 80] == []
    accuracies = re.findall(r"^ \d +(\d+\.\d\d)% ", finished.stdout, re.MULTILINE)
    shares = re.findall(r"^ \d +0\.\d{4} +(0\.\d{4})$", finished.stdout, re.MULTILINE)[-8:]  # the last metric's column
    assert [f"{float(each) / 100:.4f}" for each in accuracies] == shares


@pytest.fixture
def own_set(tmp_path):
    """The sample under ten other class names, and a checkpoint that was trained on it."""
    shutil.copytree(SAMPLE, tmp_path / "own")
    names = [f"my class {number}" for number in range(10)]
    (tmp_path / "own" / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    flags = ["--model", "mlp", "--epochs", 1, "--data-dir", tmp_path / "own", "--checkpoint-dir", tmp_path]
    assert run_script("train.py", *flags).returncode == 0
    return tmp_path / "own", tmp_path / "best_mlp_fmnist.pt", names


def test_the_classes_are_those_of_the_data_and_a_checkpoint_of_others_is_refused(own_set, trained):
    folder, path, names = own_set
    assert checkpoint.load(path)[1]["classes"] == json.loads(path.with_suffix(".json").read_text())["classes"] == names
    finished = evaluate(path, data_dir=folder)
    assert finished.returncode == 0, finished.stderr
    assert re.findall(r"^(my class \d)  +\d", finished.stdout, re.MULTILINE) == names
    assert not any(name in finished.stdout for name in CLASSES)
    assert_one_line_error(evaluate(path), "best_mlp_fmnist.pt: trained for the classes my class 0, .*T-shirt/top")
    other = trained[0] / "best_cnn_fmnist.pt"
    assert_one_line_error(evaluate(path, other, data_dir=folder), "best_cnn_fmnist.pt: trained for the classes T-shirt")


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


def test_test_time_augmentation_is_a_result_beside_the_plain_answer(trained, sample, tmp_path):
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
    assert re.search(r"^ 2  \S+best_cnn_fmnist.pt, 6 views: cnn$", finished.stdout, re.MULTILINE)


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
