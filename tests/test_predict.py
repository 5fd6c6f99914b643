"""predict.py as a user runs it."""

import ast
import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, run_script
from matplotlib.figure import Figure
from PIL import Image

import checkpoint
import engine
import metrics
import predict as predict_script
from analysis import classify, corruptions, plots
from analysis.classify import NOT_SURE, UNLIKE, Classified, Csv
from data import CLASSES
from pictures.convert import Conversion
from runtime import cli


@pytest.fixture
def folder(sample, tmp_path):
    """Twenty test images as PNG files in a folder and a subfolder, with a hidden file and one that is not a picture."""
    (tmp_path / "in" / "more").mkdir(parents=True)
    for number, image in enumerate(sample["test"].images[:20].numpy()):
        name = f"more/{number:02}.png" if number > 14 else f"{number:02}.png"
        Image.fromarray(image).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    (tmp_path / "in" / ".hidden").write_text("skipped without a word")
    return tmp_path / "in"


def predict(*arguments, **options):
    return run_script("predict.py", *arguments, **options)


def test_a_folder_is_classified_and_a_file_that_is_not_a_picture_is_skipped_with_a_line(folder, sample):
    finished = predict(folder, "--json", "--top", 10)
    assert finished.returncode == 1
    errors = [line for line in finished.stderr.splitlines() if "notes.txt" in line]
    assert errors == [f"predict.py: {folder / 'notes.txt'}: a text file, not a picture"]
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [row["picture"] for row in rows] == sorted(str(path) for path in folder.rglob("*.png"))
    candidate = classify.candidate(cli.PICTURES_CHECKPOINT, *checkpoint.load(cli.PICTURES_CHECKPOINT))
    views = classify.logits_of(candidate, list(sample["test"].images[:20].numpy()))
    expected = classify.probabilities(views, candidate.rule.temperature).argmax(1)
    energies = classify.energy(views, candidate.rule.temperature)
    for row, answer, energy in zip(rows, expected, energies, strict=True):
        assert next(iter(row["probabilities"])) == CLASSES[answer]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["energy"] == pytest.approx(energy)
        likely = max(row["probabilities"].values()) >= candidate.rule.probability
        doubt = "unlike all ten kinds" if energy < candidate.rule.unlike else "not sure"
        assert row["answer"] == (CLASSES[answer] if likely and energy >= candidate.rule.energy else doubt)


def test_table_and_csv_say_the_same(folder):
    picture = folder / "03.png"
    table = predict(picture)
    assert table.returncode == 0
    head, line = table.stdout.splitlines()
    assert head.split() == ["picture", "answer", "probabilities"]
    (row,) = csv.DictReader(io.StringIO(predict(picture, "--csv", "--top", 2).stdout))
    assert row["picture"] == str(picture)
    assert line.startswith(str(picture)[:50])
    assert f"{row['class 1']} {float(row['probability 1']):.1%}, {row['class 2']}" in line


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        (" \uff1d1", " '\uff1d1"),
        ("\u3000=1", "\\u3000=1"),
        ("x\n=1\r\t\udcff.png", r"x\n=1\r\t\udcff.png"),
        ("y;=1+1.png", "y;'=1+1.png"),
        ('a,"b" - c.png', 'a,"b" - c.png'),
    ],
)
def test_a_name_in_csv_is_one_cell_and_no_formula(name, cell):
    conversion = Conversion(Image.new("RGB", (28, 28)), np.ones((28, 28), bool), np.zeros((28, 28), np.uint8))
    row = Classified(name, conversion, [("-Bag", 1.0)])
    line = Csv(1, [name], ["-Bag"]).line(row)
    assert list(csv.reader([line])) == [[cell, "'-Bag", "'-Bag", "1.0", ""]]
    assert next(csv.reader([line], delimiter=";"))[0].startswith(cell)


def test_what_is_no_picture_is_named(folder):
    """Each in a line that says what to do, and the pictures among them are answered."""
    contents = {
        "a.pdf": b"%PDF-1.7\n", "b.svg": b'<?xml version="1.0"?>\n<svg xmlns="x">', "c.mp4": b"\0\0\0\x18ftypmp42\0",
        "d.zip": b"PK\x03\x04", "e.jpg": b"<!DOCTYPE html>\n", "f.cr2": b"II*\0\x10\0\0\0CR\2\0", "g.png": b"",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    finished = predict(folder, "https://x.org/a b.jpg", folder / "0*.png", folder / "none*.png", "none.png", "--csv")
    assert finished.returncode == 1
    assert len(finished.stdout.splitlines()) == 21
    begun = "predict.py: "
    lines = [line.removeprefix(begun) for line in finished.stderr.splitlines() if line.startswith(begun)]
    assert lines[0] == "answers of checkpoints/robust/best_cnn_fmnist.pt, cnn"
    words = ["a PDF", "an SVG drawing", "a video", "an archive", "a web page", "a camera's raw file", "an empty file"]
    for line, (name, word) in zip(lines[1:], zip(contents, words, strict=True), strict=False):
        assert line.startswith(f"{folder / name}: {word}")
    download = f"curl -sL 'https://x.org/a b.jpg' | {cli.command('predict.py', '-')}"
    assert lines[-4:] == [
        f"https://x.org/a b.jpg: an address: download it first: {download}",
        f"{folder}/0*.png: a pattern that the shell did not expand; without quotes it stands for 10 files",
        f"{folder}/none*.png: no file matches this pattern",
        "none.png: No such file or directory",
    ]


def test_a_picture_on_standard_input(folder):
    content = (folder / "00.png").read_bytes()
    command = [sys.executable, "predict.py", "-", "--json"]
    finished = subprocess.run(command, cwd=ROOT, input=content, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr
    row = json.loads(finished.stdout)
    del row["picture"]
    other = json.loads(predict(folder / "00.png", "--json").stdout)
    assert row.items() <= other.items()


def test_what_the_network_saw_is_drawn(folder, tmp_path):
    finished = predict(*sorted(folder.glob("0*.png")), "--show", tmp_path / "seen.png")
    assert finished.returncode == 0, finished.stderr
    assert np.asarray(Image.open(tmp_path / "seen.png")).std() > 10
    first = (tmp_path / "seen.png").read_bytes()
    assert predict(folder / "00.png", "--show", tmp_path / "seen.png").returncode == 0
    assert (tmp_path / "seen.png").read_bytes() != first


def test_a_picture_is_not_overwritten_by_what_the_network_saw(folder):
    """As by `--show 0*.png`, which the shell expands to --show and the first picture, and to the other pictures."""
    own, figure, link = folder / "00.png", folder / "figure.png", folder / "link.png"
    figure.write_bytes(plots.png(Figure(), predict_script.TITLE))  # as an earlier --show drew it
    link.symlink_to("nowhere")
    content = own.read_bytes()
    assert_one_line_error(predict("--show", own, folder / "01.png"), "00.png exists; --show replaces only a figure")
    assert_one_line_error(predict("--show", figure, folder), "figure.png is one of the pictures")
    assert_one_line_error(predict("--show", link, folder), "link.png exists")
    assert own.read_bytes() == content


def test_probabilities_are_calibrated_or_a_line_says_that_they_are_not(folder, trained, tmp_path):
    own = trained[0] / "best_cnn_fmnist.pt"
    history = json.loads(own.with_suffix(".json").read_text())
    assert history["temperature"] > 0
    finished = predict(folder / "00.png", "--checkpoint", own, "--json")
    assert "calibrated" not in finished.stderr
    bare = tmp_path / "bare.pt"
    bare.write_bytes(own.read_bytes())
    uncalibrated = predict(folder / "00.png", "--checkpoint", bare, "--json")
    assert "not calibrated" in uncalibrated.stderr
    assert uncalibrated.stdout != finished.stdout


def test_the_help_names_the_answers_that_are_no_class():
    said = " ".join(predict("--help").stdout.split())
    assert NOT_SURE in said
    assert UNLIKE in said


def test_the_lines_for_use_from_python_work(sample, monkeypatch, capsys):
    documented = (ROOT / "docs" / "pictures.md").read_text()
    lines, written = re.findall(r"```python\n(.*?)```", documented, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(lines, {"images": sample["test"].images[:20].numpy()})
    answers = ast.literal_eval(capsys.readouterr().out)
    truth = [CLASSES[k] for k in sample["test"].labels[:20]]
    assert sum(answer == true for answer, true in zip(answers, truth, strict=True)) > 15
    assert "data.write(" in written  # test_own_classes.py writes such a set


def test_bad_arguments_get_one_clear_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(predict(tmp_path / "empty"), "no picture")
    assert_one_line_error(predict(folder, "--show", tmp_path / "seen.jpg"), "not a .png file")
    assert_one_line_error(predict(folder, "--top", 11), "--top")
    assert_one_line_error(predict(folder, "--checkpoint", tmp_path / "none.pt"), "no such file")
    missing = predict(tmp_path / "none.png")
    assert missing.returncode == 1
    assert "none.png: No such file" in missing.stderr


def test_the_default_network_stands_mirrored_and_harder_images(sample):
    model, info = checkpoint.load(cli.PICTURES_CHECKPOINT)
    test = sample["test"]
    mirrored = test._replace(images=test.images.flip(2))
    plain, turned = (metrics.accuracy(engine.predict_logits(model, split), split.labels) for split in (test, mirrored))
    assert plain > 0.9
    assert turned > plain - 0.02
    harder = corruptions.accuracies(model, test)
    assert all(np.mean(accuracies) > 0.8 for accuracies in harder.values())
    assert info["flags"]["recipe"] == "robust"
