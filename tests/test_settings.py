"""Values of a recipe from text: train.py --set, and the same for a grid."""

import json
import re
import shlex
from itertools import product

import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, run_script, stop_at_the_first_look
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import recipes
from runtime.errors import UserError
from training import command, settings
from training.record import history_of

FAST, BEST = recipes.find("fast", "mlp"), recipes.find("best", "mlp")
ROWS = {(name, model): row for name, rows in recipes.RECIPES.items() for model, row in rows.items()}


def same_weights(folder, other):
    a, b = (torch.load(each / "best_mlp_fmnist.pt", weights_only=True)["weights"] for each in (folder, other))
    return all(torch.equal(a[key], b[key]) for key in a)


def as_flags(recipe, row):
    return recipes.upgrade({"recipe": recipe, **row._asdict()})


def test_every_recipe_can_be_made_of_every_other_one():
    """Also by the words of the command that repeats a run."""
    for before, after in product(ROWS.values(), ROWS.values()):
        words = [settings.written(*each) for each in settings.differences(before, after).items()]
        made = settings.change(before, settings.parse(words, before))
        assert made == after
    for (name, model), row in ROWS.items():
        own = as_flags(name, row._replace(precision="bfloat16" if row.precision == "auto" else row.precision))
        assert command.differences(model, own) == {}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("muon_lr=3e-2", 0.03),
        ("lr=1", 1.0),
        ("epochs=1e1", 10),
        ("dropout=none", None),
        ("warmup=.25", 0.25),
        ("fused=False", False),
        ("precision=auto", "auto"),
        ("loss=cross_entropy", "cross_entropy"),
        ("flip=0.5", 0.5),
        ("flip=true", True),
        ("flip=none", False),
        ("shift=[1.0, 0.3]", [1, 0.3]),
        ("augment=none", {}),
        ('augment={"flip":0.5}', {"flip": 0.5}),
    ],
)
def test_a_value_has_the_type_of_its_field(word, value):
    (found,) = settings.parse([word]).values()
    assert (found, type(found)) == (value, type(value))
    (again,) = settings.parse([settings.written(word.split("=")[0], found)]).values()
    assert again == found


def test_augmentations_are_changed_one_by_one():
    assert settings.change(BEST, settings.parse(["flip=false", "erase=8"])).augment == {"shift": 1, "erase": 8}
    assert settings.change(BEST, settings.parse(["flip=true", "shift=[1,0.3]"])).augment == {
        "flip": 0.5, "shift": [1, 0.3], "erase": 6
    }  # fmt: skip
    assert settings.change(FAST, settings.parse(["flip=true"])).augment == {"flip": 0.5}
    assert settings.change(BEST, settings.parse(["augment=none", "flip=1"])).augment == {"flip": 1}
    robust = recipes.find("robust", "cnn")
    same = settings.change(robust, settings.parse(["blur=[0.25,2]"]))
    assert json.dumps(same) == json.dumps(robust)  # and so they are one row of a comparison
    assert BEST.augment == recipes.find("best", "mlp").augment == {"flip": 0.5, "shift": 1, "erase": 6}


def test_adam_has_no_values_of_muon():
    changed = settings.change(FAST, settings.parse(["optimizer=adam"]))
    assert (changed.optimizer, changed.muon_lr) == ("adam", 0.0)
    published = recipes.find("published", "cnn")
    assert settings.change(published, settings.parse(["optimizer=muon", "muon_lr=0.05"])).muon_lr == 0.05


def test_a_grid_has_several_values_of_each():
    words = ["muon_lr=0.03,0.07", "flip=true,false", "shift=1,[1,0.3],false", "precision=auto,float32"]
    assert settings.parse_grid(words, FAST) == {
        "muon_lr": [0.03, 0.07], "flip": [True, False], "shift": [1, [1, 0.3], False], "precision": ["auto", "float32"]
    }  # fmt: skip
    with pytest.raises(UserError, match="shift=1 stands there twice"):
        settings.parse_grid(["shift=1,2,1.0"])
    with pytest.raises(UserError, match=r"write warp=\[SHARE,DEGREES,SCALE,PIXELS\]"):
        settings.parse_grid(["warp=false,true"], FAST)


MISTAKES = {
    "muonlr=3": "a recipe has no 'muonlr'; did you mean muon_lr",
    "filp=0.5": "did you mean flip",
    "zzz=3": "the names are epochs, .* noise",
    "seed=3": "use --seed",
    "lr": "write name=value",
    "lr=": "write name=value",
    "lr=-1": "lr is -1, not a number from 0",
    "lr=nan": "lr is nan",
    "lr=1" + "0" * 400: "lr is a huge number",
    "lr=1" + "0" * 9000: "lr is inf",
    "lr=" + "[" * 5000: "lr is",
    "lr=0.03,0.07": "one value is wanted; sweep.py trains each of several",
    "shift=1,0.3": r"shift=\[1,0.3\]",
    "epochs=1.5": "epochs is 1.5, not a whole number from 1",
    "fused=1": "fused is 1, not true or false",
    "flip=2": "share is 2, not a number from 0 to 1",
    "shift=[1,2,3]": "too many positional",
    "warp=true": r"write warp=\[SHARE,DEGREES,SCALE,PIXELS\]",
    "erase=true": r"write erase=\[SIDE,SHARE\]",
    "augment=3": "augment is 3, not an object",
    'augment={"filp":1}': "'filp' is not in data.py",
    "select=train": 'select is "train"',
    "loss=mse": "engine.py has no such loss; it has cross_entropy",
    "weight_decay=0.1": "needs optimizer=muon",
    "optimizer=muon": "add muon_lr",
}


@pytest.mark.parametrize("word", MISTAKES, ids=lambda word: word[:20])
def test_a_mistake_is_one_line(word):
    with pytest.raises(UserError, match=MISTAKES[word]) as error:
        settings.parse([word], recipes.find("published", "mlp"))
    assert str(error.value).isprintable()
    with pytest.raises(UserError, match="stands there twice"):
        settings.parse(["lr=1", "lr=2"])


def test_what_lr_means_where_muon_trains_is_said():
    muon, adam = recipes.find("fast", "mlp"), recipes.find("published", "mlp")
    assert "Muon's rate, for the large matrices, is muon_lr" in settings.remark(["epochs", "lr"], muon)
    assert not settings.remark(["lr", "muon_lr"], muon)
    assert not settings.remark(["lr"], adam)


# --- train.py --------------------------------------------------------------------------------------------

SET = ["--recipe", "fast", "--select", "val", "--set", "epochs=4", "muon_lr=0.08", "flip=true"]
SET += ["--set", "shift=[1,0.3]"]


def train(folder, *words, **options):
    flags = ["--model", "mlp", "--data-dir", SAMPLE, "--checkpoint-dir", folder]
    return run_script("train.py", *flags, *words, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run with several --set, and what it printed."""
    folder = tmp_path_factory.mktemp("set")
    finished = train(folder, *SET, "--tensorboard", folder / "board")
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_a_run_records_what_was_set_and_its_command_repeats_it(uninterrupted, tmp_path):
    folder, said = uninterrupted
    assert "augmentation: flip 0.5, shift [1, 0.3]" in said
    history = history_of(folder / "best_mlp_fmnist.pt")
    expected = FAST._replace(epochs=4, select="val", muon_lr=0.08, augment={"flip": 0.5, "shift": [1, 0.3]})
    assert history["flags"] == as_flags("fast", expected)
    words = command.command("mlp", history["flags"])
    assert words == "--model mlp --recipe fast --select val --epochs 4 --lr 0.08 --set flip=0.5 'shift=[1,0.3]'"
    assert train(tmp_path, *shlex.split(words)).returncode == 0
    assert history_of(tmp_path / "best_mlp_fmnist.pt")["flags"] == history["flags"]
    assert same_weights(folder, tmp_path)


def test_an_interrupted_run_goes_on_with_the_same_values_alone(uninterrupted, tmp_path):
    assert train(tmp_path, *SET, before=stop_at_the_first_look).returncode == 143
    for words, said in {
        ("--set", "shift=2"): r"--set augment was \{'flip': 0.5, 'shift': \[1, 0.3\]\} when this run began",
        ("--set", "label_smoothing=0.1"): "--set label_smoothing was 0.0 when this run began, and 0.1 would make",
        ("--set", "flip=false"): "--set augment was",
        ("--lr", "0.1"): "--lr was 0.08",
        ("--fold", "1/5"): "--fold was not given when this run began, and 1/5 would make",
        ("--lr", "0.08", "--set", "muon_lr=0.08"): "--lr and --set muon_lr are the same value: leave one of them out",
    }.items():
        assert_one_line_error(train(tmp_path, "--resume", *words), said)
    assert train(tmp_path, "--resume", "--set", "flip=true", "muon_lr=0.08").returncode == 0
    assert same_weights(uninterrupted[0], tmp_path)


def test_tensorboard_has_the_figures_of_the_history_and_the_hyperparameters(uninterrupted):
    folder, _ = uninterrupted
    (run,) = (folder / "board").iterdir()
    differences = r"epochs=4-muon_lr=0.08-select=val-flip=0.5-shift=\[1,0.3\]"
    assert re.fullmatch(rf"mlp-fast-{differences}-seed=0-\d{{8}}-\d{{6}}", run.name)
    events = EventAccumulator(str(run)).Reload()
    names = ["loss/train", "loss/val", "metrics/accuracy_train", "metrics/accuracy_val", "metrics/ece_val"]
    names += ["result/accuracy_test", "result/loss_test", "speed/images_per_second", "speed/seconds"]
    assert sorted(events.Tags()["scalars"]) == names
    history = history_of(folder / "best_mlp_fmnist.pt")
    assert [event.step for event in events.Scalars("metrics/accuracy_val")] == [1, 2, 3, 4]
    losses = [row["select_loss"] for row in history["epochs"]]
    assert [event.value for event in events.Scalars("loss/val")] == pytest.approx(losses)
    for kind in ("loss", "accuracy"):
        (event,) = events.Scalars(f"result/{kind}_test")
        assert (event.step, event.value) == (4, pytest.approx(history["test"][kind]))
    plugin = {tag: found.plugin_data.content for tag, found in events.summary_metadata.items()}
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    shown = {"model": "mlp", "recipe": "fast", "seed": 0, "muon_lr": 0.08, "flip": 0.5, "shift": "[1, 0.3]"}
    assert values == values | shown | {"erase": False, "fold": "none", "select": "val"}
    assert metadata.SESSION_END_INFO_TAG in plugin
    experiment = metadata.parse_experiment_plugin_data(plugin[metadata.EXPERIMENT_TAG])
    assert {each.name.tag for each in experiment.metric_infos} == {"result/loss_test", "result/accuracy_test"}
