"""compare.py as a user runs it, on finished runs of the sample; docs/results.md and the committed runs."""

import functools
import json
import os
import re
import shutil
from statistics import median

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script
from scipy.stats import t

import models
import recipes
from analysis import alike, comparison, tables
from analysis.runs import collect, group, read
from dataset.sources import CLASSES, NAME
from runtime import cli
from runtime.errors import UserError
from training import command as commands
from training.record import read_history

RESULTS = (ROOT / "docs" / "results.md").read_text()
TEACHER = "resnet-best-0"


def copy_run(trained, folder, model, flags=None, *, name=None, accuracy=None, seconds=None, **changes):
    """Write the history of a trained model into `folder`, with other flags and values, and as a model of that name.

    It has as many epochs as its flags say, each of so many seconds.
    """
    run = json.loads((trained[0] / f"best_{model}_fmnist.json").read_text())
    run |= changes | {"model": name or model, "flags": run["flags"] | (flags or {})}
    row = {key: value for key, value in run["epochs"][0].items() if not key.startswith("select")}
    row |= {} if seconds is None else {"seconds": seconds}
    run["best_epoch"] = run["flags"]["epochs"]
    run["epochs"] = [row | {"epoch": number + 1} for number in range(run["best_epoch"])]
    run["test"] |= {} if accuracy is None else {"accuracy": accuracy, "accuracy_ci95": [0, 1]}
    folder.mkdir(parents=True)
    path = folder / f"best_{run['model']}_fmnist.json"
    path.write_text(json.dumps(run))
    return path


@pytest.fixture
def runs(trained, tmp_path):
    """Three runs of the MLP of made-up accuracies, one of the CNN, and one that has not finished."""
    for name, model, changes in (
        ("mlp-0", "mlp", {"seed": 0, "accuracy": 0.80, "threads": 2, "seconds": 30.0}),
        ("mlp-1", "mlp", {"seed": 1, "accuracy": 0.83, "threads": 1, "seconds": 50.0}),
        ("mlp-2", "mlp", {"seed": 2, "accuracy": 0.82, "threads": 2, "seconds": 28.0}),
        ("cnn-0", "cnn", {"threads": 1}),
        ("cnn-1", "cnn", {"seed": 1, "status": "interrupted"}),
    ):
        copy_run(trained, tmp_path / "runs" / name, model, **changes)
    return tmp_path / "runs"


def test_runs_that_differ_in_their_seed_are_one_row(runs, tmp_path):
    numbers = tmp_path / "numbers.json"
    finished = run_script("compare.py", runs, "--json", numbers, "--figures-dir", tmp_path / "figures")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "compare: left out runs that have not finished: 1 interrupted\n"
    written = json.loads(numbers.read_text())
    mlp, cnn = (next(row for row in written["runs"] if row["model"] == model) for model in ("mlp", "cnn"))
    values = np.array([0.80, 0.83, 0.82])
    assert (mlp["seeds"], mlp["n"], mlp["accuracies"]) == ([0, 1, 2], 3, values.tolist())
    assert mlp["accuracy"] == pytest.approx(values.mean())
    assert mlp["sd"] == pytest.approx(values.std(ddof=1))
    assert mlp["ci95"] == pytest.approx(t.interval(0.95, 2, values.mean(), values.std(ddof=1) / 3**0.5))
    assert (mlp["parameters"], mlp["mflop"]) == (101_770, 0.203264)
    assert mlp["command"] == "--model mlp --epochs 3 --batch-size 32"
    assert (cnn["seeds"], "sd" in cnn) == ([0], False)
    assert (mlp["seconds"], mlp["cores"], cnn["cores"]) == (87, 2, 1)
    first = "recipe published, epochs=3, batch_size=32: test accuracy on the 500 test images"
    assert finished.stdout.replace("\n    ", " ").startswith(first)
    assert re.search(r"^ \d    mlp  3  81.67 ± 1.53%  77.87 to 85.46%   1.4 min      2$", finished.stdout, re.MULTILINE)
    assert max(map(len, finished.stdout.splitlines()[:-1])) <= 80
    for name in ("curves", "frontier"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len([*(tmp_path / "figures").iterdir()]) == 2
    assert finished.stdout.startswith(comparison.report([runs]))
    assert written["literature"] == tables.literature()
    markdown = tables.markdown(collect([runs]))
    assert "| published, 3 epochs, on sample |" in markdown
    assert "| **81.67 ± 1.53%** of 3 |" in markdown
    assert "| 1.4 min, float32 |" in markdown


def test_the_literature_says_which_results_are_of_the_first_release():
    old = {"DenseNet-BC", "WRN-40-4", "WRN-28-10", "WRN-28-10, random erasing"}
    assert {system["name"] for system in tables.literature() if system["old_release"]} == old
    assert all(name in RESULTS for name in old)


def test_a_folder_may_be_that_of_one_run_and_counts_once(runs):
    rows = collect([runs / "mlp-1", runs / "cnn-0", runs / "mlp-1" / ".." / "mlp-1"])
    assert [(row["model"], row["seeds"]) for row in rows] == [("mlp", [1]), ("cnn", [0])]
    assert collect([runs, runs / "mlp-1"]) == collect([runs])


@pytest.mark.parametrize(
    ("flags", "changes", "column"),
    [
        ({"lr": 0.002}, {}, "--lr 0.002"),
        ({"lr": 0.002}, {}, "| published, 3 epochs, on sample, lr 0.002 |"),
        ({"batch_size": 128}, {}, "`--model mlp --epochs 3`"),
        ({"batch_size": 128}, {}, ", batch size 128 |"),
        ({"precision": "bfloat16"}, {}, "--precision bfloat16"),
        ({"deterministic": True}, {}, "--deterministic"),
        ({"select": "last"}, {}, "--select last"),
        ({"epochs": 4}, {}, "| published, 4 epochs, on sample |"),
        ({"weight_decay": 0.1}, {}, "--set weight_decay=0.1"),
        ({"fold": "2/5"}, {}, "--fold K/5"),
        ({"fold": "val"}, {}, ", folds val |"),
        ({"gone": 0.1}, {}, "none: recipes.py has changed"),
        ({}, {"data": "others"}, ", on others |"),
        ({}, {"train_images": 900}, ", training images 900 |"),
        ({}, {"classes": list("abcdefghij")}, ", classes a/b/c/d/e/f/g/h/i/j |"),
        ({}, {"data_sha256": "0123456789" * 6}, ", images 01234567 |"),
        ({}, {"data_sha256": None}, ", images not recorded |"),
        ({}, {"code": "fedcba9876543210"}, ", code fedcba98 |"),
        ({}, {"resumed": [{"epoch": 2, "step": 0, "code": "fedcba9876543210"}]}, "/fedcba98 |"),
    ],
)
def test_runs_that_differ_in_anything_else_are_other_rows(flags, changes, column, trained, runs):
    copy_run(trained, runs / "mlp-3", "mlp", flags, seed=3, **changes)
    rows = [row for row in collect([runs]) if row["model"] == "mlp"]
    assert sorted(row["seeds"] for row in rows) == [[0, 1, 2], [3]]
    (other,) = [
        line for line, row in zip(tables.markdown(rows).splitlines()[2:], rows, strict=True) if row["seeds"] == [3]
    ]
    assert column in other
    names = [line.split("|")[1] for line in tables.brief(rows).splitlines()[2:]]
    assert len({*names, *comparison.names(alike.flat([run[0].facts for run in group(read([runs]))]))}) == 5
    again = {row["seeds"][0]: row["differs"] for row in rows if "differs" in row}
    assert not again or again.get(0) != again.get(3)


def test_the_number_of_processes_matters_to_batch_norm_alone(trained, tmp_path, monkeypatch):
    norm = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.BatchNorm1d(10))
    monkeypatch.setitem(models.MODELS, "norm", lambda: norm)
    for seed in (0, 1):
        for name in ("mlp", "norm"):
            copy_run(trained, tmp_path / f"{name}-{seed}", "mlp", name=name, seed=seed, processes=1 + seed)
    rows = collect([tmp_path])
    assert [(row["model"], row["seeds"]) for row in rows] == [("mlp", [0, 1]), ("norm", [0]), ("norm", [1])]
    assert [row["differs"] for row in rows[1:]] == ["processes 1", "processes 2"]


def test_a_teacher_is_its_weights_and_not_the_name_of_its_file(trained, tmp_path):
    teacher = {"checkpoint": "a.pt", "sha256": "1" * 64, "model": "cnn", "select": "last"}
    others = (teacher, teacher | {"checkpoint": "b.pt"}, teacher | {"sha256": "2" * 64})
    for seed, each in enumerate(others):
        flags = {"recipe": "distilled", **recipes.find("distilled", "mlp")._asdict(), "teachers": [each]}
        copy_run(trained, tmp_path / f"mlp-{seed}", "mlp", flags, seed=seed)
    rows = collect([tmp_path])
    assert [row["seeds"] for row in rows] == [[0, 1], [2]]
    assert rows[0]["command"].endswith(" --recipe distilled --precision auto --teacher a.pt")


def test_the_same_run_twice_is_counted_once_with_a_notice(trained, runs, capsys):
    copy_run(trained, runs / "mlp-9", "mlp", seed=2, accuracy=0.99)
    (mlp, _) = collect([runs])
    assert (mlp["seeds"], mlp["accuracy"]) == ([0, 1, 2], pytest.approx(2.45 / 3))
    _, notice = capsys.readouterr().err.splitlines()  # the first is of the unfinished run
    assert re.search("mlp-9.* skipped: .*mlp-2.* is a run of the same flags and seed", notice)


def test_runs_of_models_and_recipes_that_are_gone_are_named_once(trained, runs, capsys):
    for number in range(2):
        copy_run(trained, runs / f"other-{number}", "mlp", name="other")
        copy_run(trained, runs / f"gone-{number}", "mlp", {"recipe": "gone"}, seed=number)
    assert [row["model"] for row in collect([runs])] == ["mlp", "cnn"]
    _, notice = capsys.readouterr().err.splitlines()  # the first is of the unfinished run
    assert notice.endswith("models.py and recipes.py do not have: mlp by gone, other by published")
    shutil.rmtree(runs / "mlp-0")
    assert_one_line_error(run_script("compare.py", runs / "other-0"), "do not have .* other by published")


def test_histories_of_every_version_are_compared(trained, runs):
    """The oldest ones lack most flags; these stand for the defaults, and augmentations had flags of their own."""
    oldest = {"epochs": 3, "lr": 1e-3, "batch_size": 32, "select": "val", "deterministic": False}
    path = runs / "mlp-1" / "best_mlp_fmnist.json"
    run = json.loads(path.read_text())
    del run["classes"], run["processor"], run["resumed"]
    path.write_text(json.dumps(run | {"flags": oldest, "data": NAME}), encoding="utf-8-sig")  # as some editors save it
    for number in (0, 2):
        path = runs / f"mlp-{number}" / "best_mlp_fmnist.json"
        run = json.loads(path.read_text())
        flags = {key: value for key, value in run["flags"].items() if key not in ("augment", "loss", "teachers")}
        flags |= {"flip": False, "shift": 0, "erase": 0, "fused": False}
        run["classes"] = list(CLASSES)
        path.write_text(json.dumps(run | {"flags": flags, "data": NAME}))
    assert collect([runs])[0]["seeds"] == [0, 1, 2]


def flags_of(recipe, model, **changes):
    """Return flags as a run by that recipe records them on a processor with bfloat16."""
    row = recipes.find(recipe, model)._asdict() | changes
    precision = "bfloat16" if row["precision"] == "auto" else row["precision"]
    return recipes.upgrade({"recipe": recipe, **row, "precision": precision})


def test_a_command_repeats_its_row():
    assert commands.command("cnn", flags_of("published", "cnn", select="test")) == "--model cnn --select test"
    assert commands.command("cnn", flags_of("best", "cnn")) == "--model cnn --recipe best"
    assert commands.command("resnet", flags_of("best", "resnet")) == "--model resnet"
    taught = flags_of("distilled", "mlp", teachers=[{"checkpoint": "a/best_cnn_fmnist.pt"}, {"checkpoint": "b.pt"}])
    told = "--model mlp --recipe distilled --teacher a/best_cnn_fmnist.pt b.pt"
    assert commands.command("mlp", taught) == told
    faster = flags_of("fast", "mlp", muon_lr=0.3, precision="bfloat16")  # --lr sets Muon's rate where there is one
    assert commands.command("mlp", faster) == "--model mlp --recipe fast --lr 0.3 --precision bfloat16"
    other = flags_of("best", "mlp", lr=0.3, augment={"flip": 0.5, "shift": [1, 0.3]}, fold="2/5")
    assert commands.command("mlp", other) == (
        "--model mlp --recipe best --set lr=0.3 'shift=[1,0.3]' erase=false --fold 2/5"
    )
    for flags in (faster, other):
        assert commands.changed(flags) == {}
    assert commands.changed(flags_of("best", "mlp", augment={"gone": 1}, loss="gone")) == {"gone": 1, "loss": "gone"}


def test_without_a_run_it_says_so(runs, tmp_path):
    (tmp_path / "none").mkdir()
    for folder in (
        runs / "cnn-1",
        tmp_path / "none",
        tmp_path / "missing",
        tmp_path / "runs" / "mlp-0" / "best_mlp_fmnist.json",
    ):
        assert_one_line_error(run_script("compare.py", runs, folder), f"{folder.name} has no finished run")
    finished = run_script("compare.py", runs, "--json", next(runs.glob("*/best_cnn_fmnist.json")))
    assert_one_line_error(finished, "would replace the history of a run")


# --- histories that lie ----------------------------------------------------------------------------------


def changed(run, place, value):
    """Return a copy of a history with another value at a place such as "epochs.0.seconds"; ... removes it."""
    run = json.loads(json.dumps(run))
    *keys, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    part = functools.reduce(lambda part, key: part[key], keys, run)
    part[last] = value
    if value is ...:
        del part[last]
    return run


@pytest.mark.parametrize(
    ("place", "values", "said"),
    [
        ("seed", ["x", None, [1], 0.5, -1, True, 2**32], "seed is .* not a whole number from 0 to 4,294,967,295"),
        ("model", [["mlp"], None, "a\nb"], "model is .* not a text"),
        ("data", [None, "a\nb", "\x1b[2J", "x" * 1000], "data is .* not a text"),
        ("status", ["done", 1], 'status is .* not "running" or'),
        ("temperature", [-1, 0, "1", 1e-320, [1], True], "temperature is .* not a number from 0.01 to 100 or null"),
        ("test.accuracy", [7, -0.1, "0.5", None], "test.accuracy is .* not a number from 0 to 1"),
        ("test.accuracy_ci95", [[0, 0], [1, 0]], "test.accuracy is outside of test.accuracy_ci95"),
        ("test", [None, 3, ...], "test"),
        ("epochs.0.seconds", [-1, "1", 1e300], r"epochs\[0\].seconds is .* not a number from 0 to"),
        ("epochs.1.epoch", [1, 7], "its epochs are not 1, 2, 3"),
        ("epochs.1.select_accuracy", [0.5], "some of its epochs"),
        ("epochs.2", [...], "it has 2 of 3 epochs, and is finished"),
        ("epochs", [[], None, ...], "epochs|it lacks"),
        ("best_epoch", [1, 0, -1, None, "x"], "best_epoch is"),
        ("checkpoint_sha256", [None, 3], "checkpoint_sha256"),
        ("classes", [[], list("aaaaaaaaaa"), [*"abcdefghi", "\n"]], "class"),
        ("threads", [0, "2"], "threads is"),
        ("resumed", [[{"epoch": 1}], [3], {}], "resumed"),
        ("flags", [None, [], {}], "flags"),
        ("flags.epochs", ["many", 0, 10**6, ...], "flags.*epochs"),
        ("flags.lr", [-1, "x", [0.1], 10**308], "flags.lr is"),
        ("flags.dropout", [2, "x"], "flags.dropout is"),
        ("flags.batch_size", [0, 0.5], "flags.batch_size is"),
        ("flags.select", [[], "nothing"], "flags.select is"),
        ("flags.augment", [[], {"flip": {}}, {"flip": 1e9}], "flags"),
        ("flags.teachers", [3, [3], [{"checkpoint": 1}], "x"], "flags"),
        ("flags.unknown", [{}, [[[]]], "\n"], "flags.unknown is"),
        ("more", [1], "it has .more., which does not belong there"),
    ],
)
def test_an_edited_history_is_one_line(place, values, said, trained, tmp_path):
    path = copy_run(trained, tmp_path / "mlp-0", "mlp")
    run = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(changed(run, place, value)))
        with pytest.raises(UserError, match=said) as error:
            collect([tmp_path])
        assert str(error.value).isprintable()
        assert re.search("mlp-0.*is no history of a run of train.py: .*; restore it, or move it away", str(error.value))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"seed": NaN}', "not JSON: NaN is no finite number"),
        (b'{"seed": 1e999}', "not JSON: 1e999 is no finite number"),
        (b'{"seed": 1, "seed": 2}', "not JSON: a key stands there twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "is no history"),
        (b" " * 2**24 + b"{}", "larger than"),
        (None, "not a regular file"),
    ],
)
def test_a_file_that_is_no_history_is_one_line(content, said, tmp_path):
    (tmp_path / "mlp-0").mkdir()
    path = tmp_path / "mlp-0" / "best_mlp_fmnist.json"
    path.symlink_to("/dev/zero") if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        collect([tmp_path])
    if content is None:
        path.unlink()
        os.mkfifo(path)
        assert_one_line_error(run_script("compare.py", tmp_path), said)


def test_names_break_neither_the_table_nor_a_shell(trained, tmp_path):
    teacher = {"checkpoint": "a`.pt; ls", "sha256": "1" * 64, "model": "cnn", "select": "last"}
    flags = {"recipe": "distilled", **recipes.find("distilled", "mlp")._asdict(), "teachers": [teacher]}
    copy_run(trained, tmp_path / "mlp-0", "mlp", flags, data="a|b`<script>[c](d)\\", seconds=0)
    rows = collect([tmp_path])
    assert rows[0]["command"].endswith(" --teacher 'a`.pt; ls'")
    assert rows[0]["seconds"] > 0  # as the figure needs
    for table in (tables.markdown(rows), tables.brief(rows)):
        assert r", on a\|b\`\<script>[c]\(d)\\" in table
        assert re.search("`` .*a`.pt; ls' `` ", table)
        assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1


# --- the committed runs ----------------------------------------------------------------------------------


def committed(name):
    """Return the histories of the runs of that name, in the order of their seeds."""
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob(f"runs/{name}-[0-9]/best_*.json"))]


def test_the_results_page_has_the_table_of_the_runs(capsys):
    rows = collect([cli.RUNS])
    assert capsys.readouterr().err == ""
    assert tables.markdown(rows) in RESULTS
    assert len(rows) == 14
    for row, line in zip(rows, tables.brief(rows).splitlines()[2:], strict=True):
        epochs = f"{row['epochs']} epoch{'s' * (row['epochs'] > 1)}"
        assert re.match(rf"\| {row['model']}, {row['recipe']}, {epochs}\b", line)
        assert line.count("|") == 6
        assert f"| `python train.py {row['command']}` |" in line


def test_the_figures_numbers_are_those_of_the_runs():
    drawn = json.loads((ROOT / "docs" / "figures" / "frontier.json").read_text())
    assert drawn["literature"] == tables.literature()
    rows = {row["command"]: row for row in collect([cli.RUNS])}
    assert len(drawn["runs"]) == len(rows)
    for old in drawn["runs"]:
        row = rows[old["command"]]
        assert row == {key: pytest.approx(old[key]) if key in ("ci95", "sd") else old[key] for key in row}


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("select", ["val", "test"])
def test_the_published_runs_are_of_the_published_protocol(model, select):
    assert len(committed(f"{model}-{select}")) == 5
    for seed, run in enumerate(committed(f"{model}-{select}")):
        assert (run["model"], run["seed"], run["status"], run["data"]) == (model, seed, "finished", NAME)
        published = {"epochs": {"mlp": 5, "cnn": 15}[model], "lr": 1e-3, "batch_size": 128, "select": select}
        assert published.items() <= run["flags"].items()
        assert recipes.upgrade(run["flags"]) == flags_of("published", model, select=select)
        assert run["test"]["n"] == 10_000


@pytest.mark.parametrize(
    ("model", "recipe", "seeds", "limit"),  # in seconds on the two cores of the table
    [
        ("mlp", "fast", 5, 1),
        ("cnn", "fast", 5, 5),
        ("mlp", "best", 5, 600),
        ("cnn", "best", 5, 600),
        ("mlp", "distilled", 5, 6000),
        ("cnn", "distilled", 3, 6000),
        ("resnet", "fast", 3, 6000),
        ("resnet", "best", 3, 6000),
    ],
)
def test_the_other_runs_are_of_the_recipes_as_they_are(model, recipe, seeds, limit):
    (teacher,) = {run["checkpoint_sha256"] for run in committed("resnet-best") if run["seed"] == 0}
    assert len(committed(f"{model}-{recipe}")) == seeds
    for seed, run in enumerate(committed(f"{model}-{recipe}")):
        assert (run["model"], run["seed"], run["status"], run["data"]) == (model, seed, "finished", NAME)
        assert (run["train_images"], run["test"]["n"]) == (60_000, 10_000)
        flags = recipes.upgrade(run["flags"])
        teachers = flags["teachers"]
        assert [each["sha256"] for each in teachers] == ([teacher] if recipe == "distilled" else [])
        assert flags == flags_of(recipe, model) | {"teachers": teachers, "precision": flags["precision"]}
    seconds = median(sum(row["seconds"] for row in run["epochs"]) for run in committed(f"{model}-{recipe}"))
    assert seconds < limit


def test_every_history_names_its_processor_and_has_an_epoch_a_line():
    paths = [*ROOT.glob("runs/*/best_*_fmnist.json"), *ROOT.glob("checkpoints/distilled/best_*_fmnist.json")]
    assert len(paths) >= 51
    for path in paths:
        text = path.read_text()
        run = read_history(path)
        assert "avx2" in run["processor"] or "avx512" in run["processor"], path
        assert len(text.splitlines()) < len(run["epochs"]) + 40, path
    assert set(models.MODELS) == {read_history(path)["model"] for path in paths}
