"""hubconf.py: torch.hub loads the models from this clone, from wherever the user stands."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLE

import hubconf
import models

CODE = """
import json, sys, torch
root, sample, loads = json.loads(sys.argv[1])
models = [torch.hub.load(root, name, source="local", **options) for name, options in loads]
assert root not in sys.path
try:
    torch.hub.load(root, "cnn", source="local", pretrained=True, recipe="fast")
except ValueError as error:
    print(error, file=sys.stderr)
sys.path.insert(0, root)
import data
(test,) = data.load("test", data_dir=sample)
images = (test.images.unsqueeze(1) / 255 - 0.5) / 0.5  # as the docstrings say
for model in models:
    print("training" if model.training else "evaluating", end=" ")
    with torch.inference_mode():
        print((model.eval()(images).argmax(1) == test.labels).float().mean().item())
"""
LOADS = [
    ("mlp", {"pretrained": True}, 0.80, 0.95),
    ("cnn", {"pretrained": True}, 0.87, 0.97),
    ("mlp", {"pretrained": True, "recipe": "distilled"}, 0.85, 0.99),
    ("cnn", {"pretrained": True, "recipe": "distilled"}, 0.90, 0.99),
    ("resnet", {"pretrained": True}, 0.92, 0.99),
    ("cnn", {}, 0.0, 0.35),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A process that stands in another folder, loads each model there, and tests it on the sample."""
    folder = tmp_path_factory.mktemp("elsewhere")
    asked = json.dumps([str(ROOT), str(SAMPLE), [(name, options) for name, options, _, _ in LOADS]])
    environment = os.environ | {"TORCH_HOME": str(folder), "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", CODE, asked],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_hub_loads_the_models_from_another_folder(loaded):
    assert loaded.returncode == 0, loaded.stderr
    lines = [line.split() for line in loaded.stdout.splitlines() if not line.startswith("data:")]
    for (_, options, low, high), (mode, accuracy) in zip(LOADS, lines, strict=True):
        assert mode == ("evaluating" if options else "training")
        assert low < float(accuracy) < high


def test_weights_that_are_not_shipped_are_an_error(loaded):
    assert "cnn has no weights of recipe 'fast'; there are published, distilled" in loaded.stderr


def test_the_hub_lists_the_models_and_their_input():
    public = {name: value for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert set(public) == {"mlp", "cnn", "resnet"}  # as torch.hub.list does
    for function in public.values():
        assert "(pixel / 255 - 0.5) / 0.5" in function.__doc__


def test_other_weights_at_the_place_of_a_model_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(hubconf._cli, "CHECKPOINTS", tmp_path)
    place = tmp_path / "best_cnn_fmnist.pt"
    shutil.copy(ROOT / "checkpoints" / "best_mlp_fmnist.pt", place)
    with pytest.raises(ValueError, match="is no checkpoint of cnn"):
        hubconf.cnn(pretrained=True)
    torch.save(models.build("cnn").state_dict(), place)
    with pytest.raises(ValueError, match="is no checkpoint of cnn"):
        hubconf.cnn(pretrained=True)
