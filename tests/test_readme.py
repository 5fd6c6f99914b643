"""README.md and the shipped files: each number agrees with the run, checkpoint or figure it speaks of."""

import ast
import hashlib
import json
import os
import re
from statistics import mean, median, stdev

import pytest
from conftest import ROOT, run_script

import bench
import checkpoint
import data
import engine
import frontier
import recipes
from record import history_of

README = (ROOT / "README.md").read_text()
SHIPPED = {  # checkpoints/: runs/
    "best_mlp_fmnist.pt": "mlp-val-0",
    "best_cnn_fmnist.pt": "cnn-val-0",
    "best_resnet_fmnist.pt": "resnet-best-0",
    "distilled/best_mlp_fmnist.pt": "mlp-distilled-0",
    "distilled/best_cnn_fmnist.pt": "cnn-distilled-0",
}


def runs(name):
    """Histories of the runs of that name, in the order of their seeds."""
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob(f"runs/{name}-[0-9]/best_*.json"))]


def test_the_results_table_is_that_of_the_runs():
    assert frontier.markdown(frontier.collect(frontier.RUNS)) in README


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("select", ["val", "test"])
def test_the_published_runs_are_of_the_published_protocol(model, select):
    assert len(runs(f"{model}-{select}")) == 5
    for seed, run in enumerate(runs(f"{model}-{select}")):
        assert (run["model"], run["seed"], run["status"], run["data"]) == (model, seed, "finished", "Fashion-MNIST")
        published = {"epochs": {"mlp": 5, "cnn": 15}[model], "lr": 1e-3, "batch_size": 128, "select": select}
        assert run["flags"] == published | {"deterministic": False}
        assert run["test"]["n"] == 10_000


@pytest.mark.parametrize(
    ("model", "recipe", "seeds", "limit"),  # in seconds on the two cores of the table
    [
        ("mlp", "fast", 5, 1),
        ("cnn", "fast", 5, 10),
        ("mlp", "best", 5, 600),
        ("cnn", "best", 5, 600),
        ("mlp", "distilled", 5, 6000),
        ("cnn", "distilled", 3, 6000),
        ("resnet", "best", 3, 6000),
    ],
)
def test_the_other_runs_are_of_the_recipes_as_they_are(model, recipe, seeds, limit):
    expected = recipes.find(recipe, model)
    teacher = shipped_run("best_resnet_fmnist.pt")["checkpoint_sha256"]
    assert len(runs(f"{model}-{recipe}")) == seeds
    for seed, run in enumerate(runs(f"{model}-{recipe}")):
        assert (run["model"], run["seed"], run["status"], run["data"]) == (model, seed, "finished", "Fashion-MNIST")
        assert (run["train_images"], run["test"]["n"]) == (60_000, 10_000)
        flags = recipes.Recipe._field_defaults | {"teachers": []} | run["flags"]  # of before there were those values
        precision = {"precision": flags["precision"], "deterministic": False}
        teachers = [teacher["sha256"] for teacher in flags.pop("teachers")]
        assert teachers == ([teacher] if recipe == "distilled" else [])
        assert flags == {"recipe": recipe, **expected._asdict(), **precision}
    seconds = median(sum(row["seconds"] for row in run["epochs"]) for run in runs(f"{model}-{recipe}"))
    assert seconds < limit


def test_the_speed_section_is_that_of_the_benchmark():
    results = json.loads((ROOT / "figures" / "bench.json").read_text())
    for part in bench.markdown(results).split("\n\n"):
        assert part in README


def shipped_run(name):
    (path,) = (ROOT / "runs" / SHIPPED[name]).glob("best_*.json")
    return json.loads(path.read_text())


def shipped(name):
    """The shipped checkpoint and its run in the table; skips where the user has trained a checkpoint of their own."""
    path = ROOT / "checkpoints" / name
    run = shipped_run(name)
    is_shipped = hashlib.sha256(path.read_bytes()).hexdigest() == run["checkpoint_sha256"]
    if not is_shipped and "CI" not in os.environ:
        pytest.skip(f"{path.name} has been trained anew here")
    assert is_shipped
    return path, run


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_checkpoints_are_those_of_the_table(name):
    path, run = shipped(name)
    assert path.stat().st_size < 12e6
    assert history_of(path) == run
    assert checkpoint.load(path)[1]["epoch"] == run["best_epoch"]
    low, high = run["test"]["accuracy_ci95"]
    told = f"| {name} | {run['test']['accuracy']:.2%} ({100 * low:.2f} to {100 * high:.2f}) |"
    assert f"{told} {run['test']['loss']:.4f} |" in README


def test_the_shipped_figures_are_of_the_shipped_checkpoint_and_their_numbers_are_told():
    _, run = shipped("best_cnn_fmnist.pt")
    analysis = json.loads((ROOT / "figures" / "analysis.json").read_text())
    if analysis["checkpoint_sha256"] != run["checkpoint_sha256"] and "CI" not in os.environ:
        pytest.skip("figures/ has been drawn anew here")
    assert analysis["checkpoint_sha256"] == run["checkpoint_sha256"]
    assert f"({analysis['mistakes']} mistakes)" in README
    report = analysis["report"]
    (shipped_one,) = report["checkpoints"]
    assert sum(group["count"] for group in shipped_one["groups"].values()) == analysis["mistakes"]
    for group in shipped_one["groups"].values():
        low, high = group["ci95"]
        assert f"| {group['count']} | {group['share']:.1%} | {low:.1%} to {high:.1%} |" in README
    for finding in shipped_one["findings"]:
        (row,) = re.findall(rf"^\| {re.escape(finding['finding'])} \|.*$", README, re.MULTILINE)
        _, _, measured, trainings, verdict, _ = row.split("|")
        assert measured.strip() in finding["summary"]
        assert (trainings.strip(), verdict.strip()) == (finding["seeds"], finding["verdict"])
    for row in report["robustness"]:
        cells = " | ".join(f"{value:.1%}" for value in (row["clean"], *row["mean"].values(), row["all"]))
        assert f"| {row['name']} | {row['n']} | {cells} |" in README
    issues, double = report["label_issues"], report["near_duplicates"]
    for told in (
        f"{issues['train']['count']} training and {issues['test']['count']} test labels",
        f"{double['test']['count']} test images",
        f"from {shipped_one['calibration_before']['ece']:.4f} to {shipped_one['calibration_after']['ece']:.4f}",
    ):
        assert told in " ".join(README.split())


def test_every_file_the_readme_names_is_there():
    for name in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"|`([a-z_]+\.(?:py|txt))`", README):
        assert (ROOT / "".join(name)).exists(), name


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "analyze_errors.py", "bench.py", "frontier.py"])
def test_every_flag_the_readme_names_is_there(script):
    described = re.search(rf"^\*\*{script}.*?(?=^\*\*|^## )", README, re.MULTILINE | re.DOTALL).group()
    usage = run_script(script, "--help").stdout
    for flag in re.findall(r"--[a-z-]+", described):
        assert flag in usage


def test_the_model_card_is_of_the_shipped_checkpoints():
    card = " ".join((ROOT / "MODEL_CARD.md").read_text().split())
    report = json.loads((ROOT / "figures" / "analysis.json").read_text())["report"]
    for model, name in (("cnn", "CNN"), ("mlp", "MLP"), ("resnet", "ResNet")):
        path, run = shipped(f"best_{model}_fmnist.pt")
        test, ece = run["test"], engine.metrics(*logits_and_labels(path))["ece"]
        low, high = test["accuracy_ci95"]
        told = f"| {name} | {test['accuracy']:.2%} ({100 * low:.2f} to {100 * high:.2f}) | {test['loss']:.4f} "
        assert f"{told}| {ece:.4f}" in card
        assert f"value: {test['accuracy']}" in card
    for name, first in SHIPPED.items():
        accuracies = [100 * run["test"]["accuracy"] for run in runs(first.removesuffix("-0"))]
        assert f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f}%" in card, name
    (cnn,) = report["checkpoints"]
    assert f"with temperature {cnn['temperature']:.2f}: {cnn['calibration_after']['ece']:.4f}" in card
    recalls = [row[k] / sum(row) for k, row in enumerate(cnn["confusion_matrix"])]
    assert f"| CNN | {' | '.join(f'{recall:.1%}' for recall in recalls)} |" in card
    (robust,) = [row for row in report["robustness"] if row["name"] == "cnn, published"]
    for kind in ("shift", "rotation", "noise"):
        assert f"{robust['mean'][kind]:.1%}" in card


def logits_and_labels(path):
    (test,) = data.load("test")
    return engine.predict_logits(checkpoint.load(path)[0], test), test.labels


def test_the_lines_for_use_from_python_work(sample, monkeypatch, capsys):
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(lines, {"images": sample["test"].images[:20].numpy()})
    answers = ast.literal_eval(capsys.readouterr().out)
    truth = [data.CLASSES[k] for k in sample["test"].labels[:20]]
    assert sum(answer == true for answer, true in zip(answers, truth, strict=True)) > 15
