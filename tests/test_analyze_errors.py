"""analyze_errors.py as a user runs it: the figures, and the numbers behind them."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import SAMPLE, run_script
from matplotlib import image as pictures

import checkpoint
import engine
from data import CLASSES

FIGURES = ("confusion_matrix.png", "confused_pairs.png", "confident_mistakes.png", "shirt_mistakes.png")


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    finished = run_script(
        "analyze_errors.py", trained[0] / "best_cnn_fmnist.pt", "--data-dir", SAMPLE, "--figures-dir", folder
    )
    assert finished.returncode == 0, finished.stderr
    return folder, json.loads((folder / "analysis.json").read_text()), finished.stdout


def test_every_figure_is_a_picture_with_something_on_it(analysed):
    for name in (*FIGURES, "training_curves.png"):
        pixels = pictures.imread(analysed[0] / name)
        assert min(pixels.shape[:2]) > 400, name
        assert pixels[..., :3].std() > 0.05, name


def test_the_numbers_are_those_of_the_checkpoint(analysed, trained, sample):
    _, analysis, said = analysed
    path = trained[0] / "best_cnn_fmnist.pt"
    test = sample["test"]
    probabilities = engine.predict_logits(checkpoint.load(path)[0], test).double().softmax(1).numpy()
    wrong = probabilities.argmax(1) != test.labels.numpy()
    assert analysis["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (analysis["n"], analysis["mistakes"]) == (500, wrong.sum())
    matrix = np.array(analysis["confusion_matrix"])
    assert matrix.sum() - np.trace(matrix) == wrong.sum()
    for pair in analysis["confused_pairs"]:
        a, b = CLASSES.index(pair["a"]), CLASSES.index(pair["b"])
        assert (pair["a_as_b"], pair["b_as_a"]) == (matrix[a, b], matrix[b, a])
    shown = analysis["confident_mistakes"]
    assert len(shown) == 25
    assert [row["confidence"] for row in shown] == sorted((row["confidence"] for row in shown), reverse=True)
    assert shown[0]["confidence"] == pytest.approx(probabilities.max(1)[wrong].max())
    for row in shown + analysis["shirt_mistakes"]:
        assert row["true"] == CLASSES[test.labels[row["index"]]]
        assert row["predicted"] == CLASSES[probabilities[row["index"]].argmax()] != row["true"]
    assert all("Shirt" in (row["true"], row["predicted"]) for row in analysis["shirt_mistakes"])
    assert f"{wrong.sum()} mistakes in 500 test images" in said


def test_each_finding_has_one_verdict_in_print_and_in_the_numbers(analysed):
    _, analysis, said = analysed
    assert len(analysis["findings"]) == 4
    for finding in analysis["findings"]:
        alone = "confirmed" if finding["holds"] else "not confirmed"
        assert finding["verdict"].startswith(alone)
        assert f"{finding['finding']}: {finding['verdict']}" in said
        assert finding["summary"] in said


def test_a_checkpoint_without_history_gets_no_curves_and_no_stale_ones(analysed, trained, tmp_path):
    folder = analysed[0]
    weights = checkpoint.load(trained[0] / "best_mlp_fmnist.pt")[0].state_dict()
    torch.save(weights, tmp_path / "bare.pt")
    assert (folder / "training_curves.png").exists()
    finished = run_script("analyze_errors.py", tmp_path / "bare.pt", "--data-dir", SAMPLE, "--figures-dir", folder)
    assert finished.returncode == 0, finished.stderr
    assert "no training curves" in finished.stdout
    assert not (folder / "training_curves.png").exists()
