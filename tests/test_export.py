"""export.py: the ONNX file has the logits of the checkpoint."""

import hashlib
import importlib
import json

import numpy as np
import onnx
import onnxruntime
from conftest import SAMPLE, assert_one_line_error, run_script

import analysis.onnx
import checkpoint
import engine
from data import CLASSES


def export(*arguments):
    return run_script("export.py", *arguments, "--data-dir", SAMPLE)


def test_onnx_runtime_answers_as_pytorch_for_any_batch(trained, sample, tmp_path):
    path = trained[0] / "best_cnn_fmnist.pt"
    finished = export(path, "--output", tmp_path / "a.onnx")
    assert finished.returncode == 0, finished.stderr
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    expected = engine.predict_logits(checkpoint.load(path)[0], sample["test"]).numpy()
    for n in (1, 7, 500):
        (logits,) = session.run(None, {"pixels": sample["test"].images[:n].numpy()})
        np.testing.assert_allclose(logits, expected[:n], atol=1e-4)
    assert "batch of 256: PyTorch" in finished.stdout
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert metadata["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_onnx_runtime_reports_to_nobody(monkeypatch):
    calls = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append("off"))
    importlib.reload(analysis.onnx)
    assert calls == ["off"]


def test_an_existing_file_is_kept_unless_named(trained, tmp_path):
    path = tmp_path / "best_mlp_fmnist.pt"
    path.write_bytes((trained[0] / path.name).read_bytes())
    path.with_suffix(".onnx").write_text("of somebody")
    assert_one_line_error(export(path), "best_mlp_fmnist.onnx is there already")
    assert path.with_suffix(".onnx").read_text() == "of somebody"
    assert export(path, "--output", path.with_suffix(".onnx")).returncode == 0
    assert_one_line_error(export(path, "--output", tmp_path / "a.pt"), "not a .onnx file")
    assert_one_line_error(export(tmp_path / "none.pt"), "no such file")
