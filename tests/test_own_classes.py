"""Ten classes of one's own, from a folder of pictures or from arrays: every script uses their names."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from PIL import Image

import data
from pictures import convert
from runtime import cli

CLOTHES = ROOT / "checkpoints" / "best_mlp_fmnist.pt"
ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jackdaw & co")


def folder_script(*arguments):
    return run_script("pictures.folder", *arguments)


def save_pictures(folder, split, per_class):
    """Save the first images of each class of a split as PNG files: folder/<animal>/<number>.png."""
    for label, name in enumerate(ANIMALS):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(split.images[split.labels == label][:per_class]):
            Image.fromarray(image.numpy()).save(folder / name / f"{number:03}.png")


@pytest.fixture(scope="module")
def pictures(sample, tmp_path_factory):
    """An image folder of animals, which look like clothes; with hidden files, and one large photo on white."""
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder / "train", sample["train+val"], 60)
    save_pictures(folder / "test", sample["test"], 20)
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "ant" / ".DS_Store").write_text("not a picture")
    image = Image.fromarray(255 - sample["test"].images[0].numpy())
    (folder / "test" / "ant" / "more").mkdir()
    image.resize((280, 280)).convert("RGB").save(folder / "test" / "ant" / "more" / "large.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def mine(pictures, tmp_path_factory):
    """The data folder made of them, by the command as a user types it."""
    folder = tmp_path_factory.mktemp("data") / "my animals"
    command = [sys.executable, "-m", "pictures.folder", pictures, folder]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    train, test, made, following = finished.stdout.splitlines()
    assert train == "train: 600 pictures: 600 taken as they are (28x28, grey, on black)"
    assert "201 pictures: 1 converted as predict.py does, 200 taken" in test
    assert made.endswith(", ".join(ANIMALS))
    assert following == f"next: {cli.python()} train.py --model cnn --data-dir '{folder}' --checkpoint-dir again/own"
    return folder


@pytest.fixture(scope="module")
def own(mine, tmp_path_factory):
    """A checkpoint trained on the animals."""
    folder = tmp_path_factory.mktemp("own")
    arguments = ["--model", "mlp", "--epochs", 4, "--batch-size", 32, "--data-dir", mine, "--checkpoint-dir", folder]
    finished = run_script("train.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    history = json.loads((folder / "best_mlp_fmnist.json").read_text())
    assert history["classes"] == list(ANIMALS)
    assert history["data"] == "my animals"
    return folder / "best_mlp_fmnist.pt"


def test_the_data_folder_holds_the_pictures_under_the_folders_names(mine, sample):
    train, test = data.load("train+val", "test", data_dir=mine)
    assert train.classes == test.classes == ANIMALS
    assert (mine / "classes.txt").read_text().splitlines() == list(ANIMALS)
    for label in range(10):
        expected = sample["train+val"].images[sample["train+val"].labels == label][:60]
        assert torch.equal(train.images[train.labels == label], expected)
    assert len(test.images) == 201
    original, converted = sample["test"].images[0].double(), test.images[20].double()
    assert torch.corrcoef(torch.stack([original.flatten(), converted.flatten()]))[0, 1] > 0.5
    assert test.labels[20] == 0


def test_evaluate_names_the_classes(own, mine, tmp_path):
    finished = run_script("evaluate.py", own, "--data-dir", mine, "--json", tmp_path / "all.json")
    assert finished.returncode == 0, finished.stderr
    for name in ANIMALS:
        assert re.search(rf"^\W*{re.escape(name)}\b", finished.stdout, re.MULTILINE), finished.stdout
    content = (tmp_path / "all.json").read_text()
    assert all(json.dumps(name) in content for name in ANIMALS)
    assert not any(json.dumps(name) in content for name in data.CLASSES)


def test_the_analysis_names_the_classes_and_no_published_finding(own, mine, tmp_path):
    flags = ["--data-dir", mine, "--figures-dir", tmp_path / "figures", "--deep-dir", tmp_path / "deep"]
    finished = run_script("analyze_errors.py", own, *flags)
    assert finished.returncode == 0, finished.stderr
    analysis = (tmp_path / "figures" / "analysis.json").read_text()
    page = (tmp_path / "figures" / "report.html").read_text()
    for name in ("ant", "hen", "ibis"):
        assert name in analysis
        assert name in page
    for text in (analysis, page, finished.stdout):
        assert not re.search(r"Shirt|Sneaker|T-shirt", text)
    assert "findings" not in finished.stdout
    assert not (tmp_path / "figures" / "shirt_mistakes.png").exists()
    assert (tmp_path / "figures" / "confusion_matrix.png").exists()


def test_predict_answers_with_the_names(own, pictures):
    finished = run_script("predict.py", pictures / "test" / "bee", "--checkpoint", own, "--json", "--top", 10)
    assert finished.returncode == 0, finished.stderr
    for line in finished.stdout.splitlines():
        row = json.loads(line)
        assert set(row["probabilities"]) == set(ANIMALS)
        assert row["answer"] in (*ANIMALS, "not sure")
    picture = os.path.relpath(pictures / "test" / "bee" / "000.png", ROOT)  # short enough for the table's first column
    table = run_script("predict.py", picture, "--checkpoint", own)
    head, line = table.stdout.splitlines()
    assert head.index("probabilities") == line.index(next(re.finditer(r"\S+ [\d.]+%", line)).group())


def test_an_export_carries_the_names(own, mine, tmp_path):
    finished = run_script("export.py", own, "--output", tmp_path / "own.onnx", "--data-dir", mine)
    assert finished.returncode == 0, finished.stderr
    metadata = onnxruntime.InferenceSession(tmp_path / "own.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(ANIMALS)


def test_the_page_has_the_names(own, mine):
    pytest.importorskip("gradio")
    import demo
    from analysis import page

    candidates, train, test = demo.load(demo.parse_args([str(own), "--data-dir", str(mine)]))
    explainer = page.Explainer(candidates, train, test)
    answer, details = explainer.explain(convert.explain(Image.fromarray(test.images[0].numpy()).convert("RGB")))
    assert any(name in answer for name in ANIMALS)
    assert any(name in details for name in ANIMALS)
    texts = json.dumps(page.layout(explainer, local=True).config, default=str)
    assert "What object is it?" in texts
    assert not any(name in texts for name in data.CLASSES)


@pytest.mark.parametrize("script", ["evaluate.py", "analyze_errors.py", "export.py", "demo.py"])
def test_a_checkpoint_of_other_classes_is_a_one_line_error(script, own, mine, tmp_path):
    flags = {"export.py": ["--output", tmp_path / "a.onnx"], "analyze_errors.py": ["--figures-dir", tmp_path]}
    for path, folder in ((CLOTHES, mine), (own, SAMPLE)):
        finished = run_script(script, path, "--data-dir", folder, *flags.get(script, []))
        assert_one_line_error(finished, path.name, "class")
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_different_classes_are_not_compared(own, mine):
    for script in ("evaluate.py", "demo.py"):
        assert_one_line_error(run_script(script, own, CLOTHES, "--data-dir", mine), "class")


def test_arrays_become_a_data_set(sample, tmp_path, own):
    parts = {
        part: (sample[name].images.numpy(), sample[name].labels.numpy())
        for part, name in (("train", "train+val"), ("t10k", "test"))
    }
    data.write(tmp_path / "arrays", parts, classes=ANIMALS)
    train, test = data.load("train+val", "test", data_dir=tmp_path / "arrays")
    assert train.classes == ANIMALS
    assert torch.equal(train.images, sample["train+val"].images)
    assert torch.equal(test.labels, sample["test"].labels)
    finished = run_script("evaluate.py", own, "--data-dir", tmp_path / "arrays")
    assert finished.returncode == 0, finished.stderr
    assert "jackdaw & co" in finished.stdout


@pytest.fixture
def small(tmp_path):
    """A small image folder that a test may spoil."""
    for part in ("train", "test"):
        for name in ANIMALS:
            (tmp_path / "in" / part / name).mkdir(parents=True)
            picture = np.zeros((28, 28), np.uint8)
            picture[5:20, 8:20] = 200
            Image.fromarray(picture).save(tmp_path / "in" / part / name / "1.png")
    return tmp_path / "in"


def test_any_grey_picture_of_28_by_28_is_taken_as_it_is(small, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    noise[:, :14] = 255
    Image.fromarray(noise).save(small / "train" / "ant" / "2.png")
    finished = folder_script(small, tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    assert "1 taken as they are (28x28, grey, but not on black: predict.py would convert them)" in finished.stdout
    (train,) = data.load("train+val", data_dir=tmp_path / "out")
    assert np.array_equal(train.images[1].numpy(), noise)


def test_a_folder_that_does_not_fit_is_a_one_line_error(small, tmp_path):
    out = tmp_path / "out"
    assert_one_line_error(folder_script(small / "train", out), "train/train is missing")
    (small / "test" / "ant").rename(small / "test" / "anteater")
    assert_one_line_error(folder_script(small, out), "'ant' is only in train")
    (small / "train" / "ant").rename(small / "train" / "anteater")
    (small / "train" / "anteater" / "1.png").write_text("broken")
    assert_one_line_error(folder_script(small, out), "train/anteater/1.png: a text file, not a picture")
    (small / "train" / "anteater" / "1.png").unlink()
    assert_one_line_error(folder_script(small, out), "train/anteater: there is no picture")
    for part in ("train", "test"):
        (small / part / "anteater").rename(tmp_path / part)
    assert_one_line_error(folder_script(small, out), "has 9 class folders; it must have 10")
    for part in ("train", "test"):
        (tmp_path / part).rename(small / part / ("a" * 41))
    assert_one_line_error(folder_script(small, out), "class name .* 40")
    assert not out.exists()


def test_nothing_is_overwritten(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert folder_script(small, out).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_one_line_error(folder_script(small, out), "not empty")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert_one_line_error(folder_script(small, out / "SHA256SUMS"), "not a folder")
