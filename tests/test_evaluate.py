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
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, log_loss, precision_recall_fscore_support

import checkpoint
import data
import engine
import metrics
from analysis import evaluation, excluded
from data import CLASSES
from dataset import arrays, published
from runtime import cli
from runtime.errors import UserError


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
    assert "+0.00 points for each of 2 seeds: no test is possible" in " ".join(finished.stdout.split())


def test_means_are_compared_over_common_seeds(trained, sample):
    loaded = evaluation.load([trained[0] / "best_mlp_fmnist.pt"], checkpoint.Bare())
    (one,) = evaluation.answer(loaded, sample["test"], False, False)
    result = evaluation.describe(one, sample["test"])
    flags, accuracies = result["training"]["flags"], {0.001: [0.7, 0.8, 0.75, 0.9], 0.002: [0.8, 0.81, 0.77]}
    results = [
        result | {"accuracy": accuracy, "training": result["training"] | {"seed": seed, "flags": flags | {"lr": lr}}}
        for lr, row in accuracies.items()
        for seed, accuracy in enumerate(row)
    ]
    groups = evaluation.alike_but_for_seed(results)
    (pair,) = evaluation.pairs(groups)
    assert (pair["name"], pair["against"], pair["n"]) == ("lr=0.001", "lr=0.002", 3)
    assert pair["p_value"] == pair["p_holm"] == pytest.approx(ttest_rel([0.7, 0.8, 0.75], [0.8, 0.81, 0.77]).pvalue)
    assert [mean["n"] for mean in evaluation.spread(groups)] == [4, 3]
    assert evaluation.pairs(groups[:1]) == []


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


# --- without the images of a list ------------------------------------------------------------------------


def wilson(right, n, z=1.959963984540054):
    """The interval as the roots of (p - right / n)^2 = z^2 p (1 - p) / n."""
    return sorted(np.roots([1 + z * z / n, -(2 * right / n + z * z / n), (right / n) ** 2]))


def write_list(path, rows, header="split,index,label,suggested,p_label,p_suggested,rank"):
    path.write_text(f"{header}\n" + "".join(f"{row}\n" for row in rows))
    return path


def rows_of(sample, part, indices):
    """Rows of a list with the right labels; train counts in all training images."""
    whole = sample["train+val" if part == "train" else part]
    return [f"{part},{i},{CLASSES[whole.labels[i]]},Bag,0.01,0.9,{rank}" for rank, i in enumerate(indices, 1)]


def left(sample, split, indices):
    """Where the images of a split are that are not at these indices of all, found by their pixels."""
    whole = sample["test" if split == "test" else "train+val"]
    pixels = {whole.images[i].numpy().tobytes() for i in indices}
    return [i for i, image in enumerate(sample[split].images) if image.numpy().tobytes() not in pixels]


@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_the_accuracy_is_measured_also_without_listed_images(trained, sample, tmp_path, split):
    path, chosen = trained[0] / "best_cnn_fmnist.pt", {"train": range(0, 1000, 7), "test": range(3, 500, 11)}
    rows = [row for part, indices in chosen.items() for row in rows_of(sample, part, indices)]
    listed = write_list(tmp_path / "suspects.csv", rows)
    finished = evaluate(path, "--split", split, "--exclude", listed, "--json", tmp_path / "x.json")
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    kept = left(sample, split, chosen["test" if split == "test" else "train"])
    predicted = engine.predict_logits(checkpoint.load(path)[0], sample[split]).argmax(1).numpy()
    labels = sample[split].labels.numpy()
    right, n = int((predicted[kept] == labels[kept]).sum()), len(kept)
    assert 0 < n < len(labels)
    assert result["accuracy"] == accuracy_score(labels, predicted)  # the first figure stays that of all images
    without = result["without"]
    assert without["file"] == cli.relative(listed)
    assert without["sha256"] == hashlib.sha256(listed.read_bytes()).hexdigest()
    assert (without["excluded"], without["n"]) == (len(labels) - n, n)
    assert without["accuracy"] == pytest.approx(right / n)
    assert without["accuracy_ci95"] == pytest.approx(wilson(right, n))
    low, high = wilson(right, n)
    said = finished.stdout.splitlines()
    (line,) = [number for number, text in enumerate(said) if text.startswith("  accuracy    ")]
    assert said[line + 1] == f"  accuracy without these      {right / n:.2%}  (95% interval {low:.2%} to {high:.2%})"
    counts = f"without these: the {len(labels) - n} in {cli.shown(listed)}; n = {n} are left"
    assert counts in " ".join(finished.stdout.split())


def test_of_several_checkpoints_each_is_measured_without_listed_images(trained, sample, tmp_path):
    paths = [trained[0] / f"best_{name}_fmnist.pt" for name in ("mlp", "cnn")]
    listed = write_list(tmp_path / "few.csv", [f" test , {index} " for index in range(100)], "split, index")
    finished = evaluate(*paths, "--ensemble", "--exclude", listed, "--json", tmp_path / "x.json")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "x.json").read_text())["checkpoints"]
    plain = [engine.predict_logits(checkpoint.load(path)[0], sample["test"]).double().softmax(1) for path in paths]
    labels = sample["test"].labels[100:].numpy()
    for number, (result, chances) in enumerate(zip(results, [*plain, sum(plain)], strict=True), 1):
        accuracy = accuracy_score(labels, chances[100:].argmax(1).numpy())
        assert result["without"]["accuracy"] == pytest.approx(accuracy)
        low, high = result["without"]["accuracy_ci95"]
        cells = rf"^ {number} +{result['accuracy']:.2%} .* {accuracy:.2%} +{low:.2%} to {high:.2%}"
        assert re.search(cells, finished.stdout, re.MULTILINE)
    assert re.search(r"accuracy +95% interval +without these +their interval", finished.stdout)


LISTS = {  # content, and what is said of it
    "no index": ("split,rank\ntest,1\n", "line 1: it lacks the column index"),
    "no header": ("test,1\ntest,2\n", "line 1: it lacks the column split and the column index"),
    "empty": ("", "is an empty file"),
    "header alone": ("split,index\n", "lists none of the 500 images of the test split"),
    "other split": ("split,index\ntrain,1\n", "lists none of the 500 images of the test split"),
    "all": ("split,index\n" + "".join(f"test,{i}\n" for i in range(500)), "lists all images of the test split"),
    "unknown split": ("split,index\ntest,1\ntset,2\n", "line 3: its split is 'tset', not train or test"),
    "beyond": ("split,index\n\ntest,500\n", "line 3: its index is '500', not a whole number from 0 to 499"),
    "negative": ("split,index\ntest,-1\n", "line 2: its index is '-1', not a whole number"),
    "fraction": ("split,index\ntest,1.0\n", "line 2: its index is '1.0', not a whole number"),
    "of train": ("split,index\ntrain,x\n", "line 2: its index is 'x', not a whole number"),
    "huge": (f"split,index\ntest,{'9' * 5000}\n", "line 2: its index is '9+', not a whole number"),
    "twice": ("split,index\ntest,5\ntrain,5\ntest,05\n", "line 4: image 5 of test is there twice, first in line 2"),
    "label": ("split,index,label\ntest,0,Hat\n", "line 2: its label is 'Hat', but image 0 of test is a '.*other data"),
    "ragged": ("split,index\ntest,0\ntest\n", "line 3: it has more or fewer values"),
    "quotes": ('split,index\ntest,"0\n', "line 2: no CSV file"),
    "UTF-8": ("split,index\ntest,0\ntest,\xff\n", "line 3: not a text in UTF-8"),
    "header twice": ("split,index,index\ntest,0,1\n", "line 1: its header names the column 'index' twice"),
}


@pytest.mark.parametrize("fault", LISTS)
def test_a_faulty_list_is_one_clear_line(sample, tmp_path, fault):
    content, said = LISTS[fault]
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"a\.csv,? {said}") as caught:
        excluded.read(tmp_path / "a.csv", sample["test"], sample["test"])
    assert str(caught.value).isprintable()


def test_a_faulty_list_ends_evaluate(trained, tmp_path):
    path = trained[0] / "best_mlp_fmnist.pt"
    listed = write_list(tmp_path / "a.csv", ["train,1000"], "split,index")
    assert_one_line_error(evaluate(path, "--split", "val", "--exclude", listed), "line 2: its index is '1000'.* to 999")
    assert_one_line_error(evaluate(path, "--exclude", tmp_path / "none.csv"), "none.csv: No such file")
    assert_one_line_error(evaluate(path, "--exclude", tmp_path), "not a regular file")


# --- arrays ----------------------------------------------------------------------------------------------


def save(folder, images, labels):
    np.save(folder / "F.npy", images)
    np.save(folder / "L.npy", labels)
    return "--images", folder / "F.npy", "--labels", folder / "L.npy"


def corrupted(sample):
    """Real images that are nearly as dark as night, as of a corrupted test set: uint8 (500, 28, 28)."""
    return (sample["test"].images.numpy() // 5).astype(np.uint8)


def nowhere():
    """Let no source have Fashion-MNIST."""

    def find(*_):
        raise AssertionError("Fashion-MNIST was looked for")

    data.find = find


@pytest.mark.parametrize("shape", [(-1, 28, 28), (-1, 28, 28, 1), (-1, 784)])
def test_arrays_take_the_place_of_the_data_set(trained, sample, tmp_path, shape):
    path, images, labels = trained[0] / "best_cnn_fmnist.pt", corrupted(sample), sample["test"].labels.numpy()
    flags = save(tmp_path, images.reshape(shape), labels.astype(np.int32))
    finished = run_script("evaluate.py", path, *flags, "--json", tmp_path / "a.json", before=nowhere)
    assert finished.returncode == 0, finished.stderr
    assert "data:" not in finished.stdout
    result = json.loads((tmp_path / "a.json").read_text())
    model = checkpoint.load(path)[0]
    with torch.no_grad():
        predicted = model((torch.tensor(images)[:, None] / 255 - 0.5) / 0.5).argmax(1).numpy()
    assert result["accuracy"] == accuracy_score(labels, predicted)
    assert result["accuracy"] < accuracy_score(labels, engine.predict_logits(model, sample["test"]).argmax(1)) - 0.05
    assert (result["n"], result["split"], result["data"]) == (500, None, "images of F.npy and labels of L.npy")
    for kind, name in (("images", "F.npy"), ("labels", "L.npy")):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert result["files"][kind] == {"file": cli.relative(tmp_path / name), "sha256": digest}
    assert "\nimages of F.npy and labels of L.npy, n = 500\n" in finished.stdout
    assert "caution: trained on sample, measured on images of F.npy and" in finished.stdout


def test_arrays_have_the_classes_of_the_checkpoint(own_set, trained, sample, tmp_path):
    _, path, names = own_set
    flags = save(tmp_path, sample["test"].images.numpy(), sample["test"].labels.numpy())
    finished = run_script("evaluate.py", path, *flags)
    assert finished.returncode == 0, finished.stderr
    assert re.findall(r"^(my class \d)  +\d", finished.stdout, re.MULTILINE) == names
    both = run_script("evaluate.py", path, trained[0] / "best_cnn_fmnist.pt", *flags)
    assert_one_line_error(both, "best_mlp_fmnist.pt and .*best_cnn_fmnist.pt were trained for different classes")
    several = run_script("evaluate.py", path, path, *flags)
    assert "\nimages of F.npy and labels of L.npy, n = 500\n" in several.stdout


def test_arrays_that_do_not_fit_are_one_clear_line(sample, tmp_path):
    images, labels = sample["test"].images.numpy(), sample["test"].labels.numpy()
    nan = np.where(images > 0, images, np.nan)
    cases = [
        (images / 255, labels, r"F.npy is float64 \(500, 28, 28\); it must be whole numbers from 0 to 255, as uint8"),
        (nan, labels, "F.npy is float64 .* as uint8"),
        (images > 0, labels, "F.npy is bool .* as uint8"),
        (images.astype(np.int16) - 1, labels, "F.npy has values from -1 to 254; they must be 0 to 255"),
        (images.astype(object), labels, "F.npy is object"),
        (images[:, :27], labels, r"F.npy has the shape \(500, 27, 28\), not \(n, 28, 28\) or \(n, 784\)"),
        (labels, images, r"F.npy has the shape \(500,\), not"),
        (images[:0], labels[:0], "F.npy has no images"),
        (images[1:], labels, "F.npy has 499 images, but .*L.npy has 500 labels"),
        (images, labels + 1, "L.npy has values from 1 to 10; they must be 0 to 9"),
        (images, labels - 1, "L.npy has values from -1 to 8; they must be 0 to 9"),
        (images, labels.astype(np.float32), r"L.npy is float32 \(500,\); it must be whole numbers from 0 to 9"),
        (images, np.eye(10, dtype=np.uint8)[labels], r"L.npy has the shape \(500, 10\), not \(n,\)"),
    ]
    for first, second, said in cases:
        save(tmp_path, first, second)
        with pytest.raises(UserError, match=said):
            arrays.read(tmp_path / "F.npy", tmp_path / "L.npy")


def test_files_that_are_no_arrays_are_one_clear_line(sample, tmp_path, monkeypatch):
    images, labels = sample["test"].images.numpy(), sample["test"].labels.numpy()
    save(tmp_path, images, labels)
    whole = (tmp_path / "F.npy").read_bytes()
    np.savez(tmp_path / "both.npz", images=images, labels=labels)
    cases = {
        whole[:-1]: "F.npy is truncated",
        whole + b"\0": "F.npy is longer than its header announces",
        whole[:20]: "F.npy is no array",
        whole[:6] + b"\2" + whole[7:]: "F.npy is no array: its header has another version",
        b"": "F.npy is an empty file",
        b"<!DOCTYPE html>": "F.npy is an HTML page",
        b"\x80\x04K\x01.": "F.npy is no .npy file",
        (tmp_path / "both.npz").read_bytes(): "F.npy is an .npz or another zip",
        whole.replace(b"(500, 28, 28)", b"(999999, 784)"): "for 200,000 images at most",
    }
    for content, said in cases.items():
        (tmp_path / "F.npy").write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            arrays.read(tmp_path / "F.npy", tmp_path / "L.npy")
        assert str(caught.value).isprintable()
    monkeypatch.setattr(arrays, "MOST_BYTES", 1_000)
    (tmp_path / "F.npy").write_bytes(whole)
    with pytest.raises(UserError, match=r"F\.npy: larger than 1,000 bytes"):
        arrays.read(tmp_path / "F.npy", tmp_path / "L.npy")


def test_by_columns_and_big_endian_are_the_same_arrays(sample, tmp_path):
    images, labels = sample["test"].images.numpy(), sample["test"].labels.numpy()
    save(tmp_path, np.asfortranarray(images.astype(">i4")), labels.astype(">u2"))
    found = arrays.read(tmp_path / "F.npy", tmp_path / "L.npy")
    assert (found.images == images).all()
    assert (found.labels == labels).all()
    assert found.images.dtype == found.labels.dtype == np.uint8


def test_arrays_conflict_with_a_data_set(tmp_path):
    flags = ["--images", tmp_path / "F.npy", "--labels", tmp_path / "L.npy"]
    for half in (flags[:2], flags[2:]):
        assert_one_line_error(run_script("evaluate.py", *half), "--images and --labels go together")
    for more in (["--split", "test"], ["--data-dir", SAMPLE], ["--other-data"], ["--exclude", "a.csv"]):
        finished = run_script("evaluate.py", *flags, *more)
        assert_one_line_error(finished, f"take the place of the data set: leave out {more[0]} ")
    assert_one_line_error(run_script("evaluate.py", *flags), "F.npy: No such file")


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
