"""frontier.py as a user runs it, on finished runs of the sample."""

import json
import shutil

import numpy as np
import pytest
from conftest import assert_one_line_error, run_script
from scipy.stats import t

import frontier


@pytest.fixture
def runs(trained, tmp_path):
    """Three runs of the MLP of made-up accuracies, one of the CNN, and one that has not finished."""
    for name, model, changes in (
        ("mlp-0", "mlp", {"seed": 0, "test": {"accuracy": 0.80}, "threads": 2, "epochs": [{"seconds": 30.0}] * 3}),
        ("mlp-1", "mlp", {"seed": 1, "test": {"accuracy": 0.83}, "threads": 1, "epochs": [{"seconds": 50.0}] * 3}),
        ("mlp-2", "mlp", {"seed": 2, "test": {"accuracy": 0.82}, "threads": 2, "epochs": [{"seconds": 28.0}] * 3}),
        ("cnn-0", "cnn", {"threads": 1}),
        ("cnn-1", "cnn", {"seed": 1, "status": "interrupted", "test": None}),
    ):
        (tmp_path / name).mkdir()
        run = json.loads((trained[0] / f"best_{model}_fmnist.json").read_text())
        (tmp_path / name / f"best_{model}_fmnist.json").write_text(json.dumps(run | changes))
    return tmp_path


def test_runs_that_differ_in_their_seed_are_one_row(runs, tmp_path):
    finished = run_script("frontier.py", "--runs-dir", runs, "--figures-dir", tmp_path / "figures")
    assert finished.returncode == 0, finished.stderr
    mlp, cnn = json.loads((tmp_path / "figures" / "frontier.json").read_text())["runs"]
    values = np.array([0.80, 0.83, 0.82])
    assert mlp["seeds"] == [0, 1, 2]
    assert mlp["accuracy"] == pytest.approx(values.mean())
    assert mlp["sd"] == pytest.approx(values.std(ddof=1))
    assert mlp["ci95"] == pytest.approx(t.interval(0.95, 2, values.mean(), values.std(ddof=1) / 3**0.5))
    assert (mlp["parameters"], mlp["mflop"], mlp["command"]) == (101_770, 0.203264, "--model mlp --epochs 3")
    assert (cnn["seeds"], "sd" in cnn) == ([0], False)
    assert (mlp["seconds"], mlp["cores"], cnn["cores"]) == (87, 2, 1)
    assert "| **81.67 ± 1.53%** of 3 |" in finished.stdout
    assert "| 1.4 min, float32 |" in finished.stdout
    assert "float32, one core |" in finished.stdout
    assert (tmp_path / "figures" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_command_repeats_its_row():
    assert frontier.command("cnn", "published", "test", 15, ()) == "--model cnn --select test"
    assert frontier.command("cnn", "best", "last", 100, ()) == "--model cnn --recipe best"
    assert frontier.command("resnet", "best", "last", 65, ()) == "--model resnet"
    taught = frontier.command("mlp", "distilled", "last", 900, ("a/best_cnn_fmnist.pt", "b.pt"))
    assert taught == "--model mlp --recipe distilled --teacher a/best_cnn_fmnist.pt b.pt"


def test_without_a_run_it_says_so(runs, tmp_path):
    shutil.rmtree(runs / "cnn-0")
    for number in range(3):
        shutil.rmtree(runs / f"mlp-{number}")
    assert_one_line_error(run_script("frontier.py", "--runs-dir", runs), "has no finished run")
    (runs / "cnn-1" / "best_cnn_fmnist.json").write_text("{")
    assert_one_line_error(run_script("frontier.py", "--runs-dir", runs), "cnn-1.*is no history")
