"""docs/tour.ipynb runs from its folder, and its committed outputs are those of the shipped checkpoint."""

import json

import nbclient
import nbformat
import pytest
from conftest import ROOT, SAMPLE

TOUR = ROOT / "docs" / "tour.ipynb"
MOST_BYTES = 400_000


def printed(notebook):
    """All that the cells of a notebook print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook):
    """The number of pictures that the cells of a notebook show."""
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture
def committed():
    return nbformat.read(TOUR, as_version=4)


def test_the_tour_runs_on_the_sample(committed, monkeypatch, tmp_path):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))  # nothing is written into the user's home
    monkeypatch.setenv("FMNIST_DIR", str(SAMPLE))
    client = nbclient.NotebookClient(committed, timeout=300, resources={"metadata": {"path": str(TOUR.parent)}})
    executed = client.execute()
    text = printed(executed)
    assert "test  sample: images (500, 28, 28), labels (500,)" in text
    assert "validation accuracy" in text
    assert pictures(executed) == 4


def test_the_committed_outputs_are_of_the_shipped_checkpoint(committed):
    assert TOUR.stat().st_size < MOST_BYTES
    assert all(cell.outputs or "import" in cell.source for cell in committed.cells if cell.cell_type == "code")
    text = printed(committed)
    assert "test  Fashion-MNIST: images (10000, 28, 28), labels (10000,)" in text
    assert pictures(committed) == 4
    (path,) = (ROOT / "runs" / "cnn-val-0").glob("best_*.json")
    run = json.loads(path.read_text())
    low, high = run["test"]["accuracy_ci95"]
    assert f"test accuracy {run['test']['accuracy']:.2%}, 95% interval {low:.2%} to {high:.2%}, n = 10,000" in text
    assert f"log loss {run['test']['loss']:.4f} nats" in text
    assert f"recipe published, seed 0, epoch {run['best_epoch']}" in text
