"""Models of one's own: ordinary ones train by every recipe, and what cannot work is one line before the training."""

import contextlib
import io
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, in_a_fork, run_script, stop_training
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import engine
import metrics
import models
import recipes
from runtime.code_key import code_key
from runtime.errors import UserError
from training import record, run

RECIPES = ("published", "fast", "best")


class Branches(nn.Module):
    """A ModuleList, no buffer, and no matrix that is large enough for Muon."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(1, 4, size, stride=2) for size in (3, 5))
        self.fc = nn.Linear(8, 10)

    def forward(self, images):
        return self.fc(torch.cat([F.relu(branch(images)).amax((2, 3)) for branch in self.branches], 1))


class Frozen(nn.Module):
    """A frozen layer, and layers that forward does not use: one for Muon and one for Adam."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(784, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.first.requires_grad_(False)
        self.unused, self.small = nn.Linear(64, 64), nn.Linear(4, 4)

    def forward(self, images):
        return self.last(F.relu(self.second(F.relu(self.first(images.flatten(1))))))


class Lazy(nn.Module):
    """Layers that get their shapes from the first image."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LazyConv2d(16, 3, stride=2), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
        )

    def forward(self, images):
        return self.layers(images)


class Tied(nn.Module):
    """Two layers with one weight, and attention with buffers of bool, int64 and minus infinity."""

    def __init__(self):
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(28, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.places = nn.Embedding(28, 32)
        self.fc = nn.Linear(32, 10)
        self.register_buffer("position_ids", torch.arange(28))
        self.register_buffer("causal", torch.full((28, 28), -torch.inf).triu(1))
        self.register_buffer("kept", torch.ones(28, 28, dtype=torch.bool).tril())

    def forward(self, images):
        x = self.embed(images.squeeze(1)) + self.places(self.position_ids)
        scores = (self.one(x) @ self.two(x).mT / 6 + self.causal).masked_fill(~self.kept, -torch.inf)
        return self.fc((scores.softmax(-1) @ x).mean(1))


class Vectors(nn.Module):
    """No matrix at all."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(10)), nn.Parameter(torch.zeros(10))

    def forward(self, images):
        return self.scale * F.adaptive_avg_pool2d(images, (2, 5)).flatten(1) + self.shift


OWN = {each.__name__.lower(): each for each in (Branches, Frozen, Lazy, Tied, Vectors)}


def request(name, folder, **more):
    return run.Request(name, data_dir=SAMPLE, checkpoint_dir=Path(folder), epochs=1, **more)


def life_of(name, folder):
    """Train a model by every recipe, once whole and once cut off and resumed, and measure it from its file.

    Returns a line for each recipe: exit codes, whether both files are equal, whether the measurement is that of the
    history, what a rebuilt model's parameters are, and the key in file and history.
    """
    models.MODELS |= OWN
    whole_run, lines = engine.Training.run, []
    for recipe in RECIPES:
        whole, cut = Path(folder, recipe, "whole"), Path(folder, recipe, "cut")
        codes = [run.run(request(name, whole, recipe=recipe))]
        stop_training(lambda training: training.step == 2)
        codes += [run.run(request(name, cut, recipe=recipe))]
        engine.Training.run = whole_run
        codes += [run.run(request(name, cut, resume=True))]
        path = whole / f"best_{name}_fmnist.pt"
        model, info = checkpoint.load(path)
        (test,) = data.load("test", data_dir=SAMPLE)
        accuracy = metrics.accuracy(engine.predict_logits(model, test), test.labels)
        history = record.history_of(path)
        lines.append(
            [
                *codes,
                path.read_bytes() == (cut / path.name).read_bytes(),
                history["test"]["accuracy"] == accuracy,
                info["code"] == history["code"] == code_key(name),
                models.count_parameters(model) == sum(weight.numel() for weight in OWN[name]().parameters())
                if name != "lazy"
                else models.count_parameters(model) > 27_000,
            ]
        )
    return lines


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)


@pytest.mark.parametrize("name", OWN)
def test_ordinary_models_train_by_every_recipe_and_resume_to_the_same_bits(name, tmp_path):
    assert in_a_fork(quietly, life_of, name, tmp_path) == [[0, 143, 0, True, True, True, True]] * len(RECIPES)


# --- what cannot work ------------------------------------------------------------------------------------


class Answers(nn.Module):
    """A linear layer, whose answer a function changes."""

    def __init__(self, change):
        super().__init__()
        self.fc, self.change = nn.Linear(784, 10), change

    def forward(self, images):
        return self.change(self.fc(images.flatten(1)))


class Noted(Answers):
    def get_extra_state(self):
        return {"author": "me"}


def normalised():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 40), nn.BatchNorm1d(40), nn.Linear(40, 10))


def frozen():
    return Answers(lambda x: x).requires_grad_(False)


def empty():
    model = Answers(lambda x: x)
    model.unused = nn.Parameter(torch.full((3,), torch.nan))
    return model


BAD = {  # what builds it, how it is trained, and what the line says
    "rgb": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(10)), {}, r"expected input.*1 chan"),
    "wide": (lambda: nn.Linear(3, 10), {}, r"\(n, 1, 28, 28\).*shapes cannot be multiplied"),
    "tuple": (lambda: Answers(lambda x: (x, x)), {}, r"returns a tuple; .*logits \(n, 10\)"),
    "dict": (lambda: Answers(lambda x: {"logits": x}), {}, "returns a dict"),
    "none": (lambda: Answers(lambda x: None), {}, "returns a NoneType"),
    "nine": (lambda: Answers(lambda x: x[:, 1:]), {}, r"returns float32 \(2, 9\) for 2 images; .*\(n, 10\)"),
    "squeezed": (lambda: Answers(lambda x: x[0]), {}, r"returns float32 \(10,\)"),
    "whole": (lambda: Answers(lambda x: x.long()), {}, r"returns int64 \(2, 10\)"),
    "frozen": (frozen, {}, "no parameter to train"),
    "norm": (normalised, {"batch_size": 919}, "a batch of 1 image, the smallest.*--batch-size.*more than 1 value"),
    "noted": (lambda: Noted(lambda x: x), {}, "'_extra_state', a dict"),
    "empty": (empty, {}, "cannot be saved and read back: .*not finite"),
}


def lines_of(folder):
    """Try to train all of BAD. Returns what each is refused with, and whether the folder is as it was."""
    found = {}
    for name, (build, changes, _) in BAD.items():
        models.MODELS[name] = build
        try:
            found[name] = run.run(request(name, folder, **changes))
        except UserError as error:
            found[name] = str(error)
    return found, [path.name for path in folder.iterdir()]


def test_what_cannot_be_trained_or_kept_is_one_line_before_the_training(tmp_path):
    (tmp_path / "best_nine_fmnist.pt").write_text("an earlier one")
    found, left = in_a_fork(quietly, lines_of, tmp_path)
    for name, (*_, line) in BAD.items():
        assert re.search(rf"^models\.py: {name} .*{line}", str(found[name])), found[name]
        assert "\n" not in found[name]
    assert left == ["best_nine_fmnist.pt"]


def add_own(change):
    models.MODELS["own"] = lambda: Answers(change)
    recipes.RECIPES["published"]["own"] = recipes.Recipe(epochs=1)


def forgets_a_name(logits):
    return logits + undefined  # noqa: F821


def test_a_mistake_in_a_model_is_one_line_and_a_bug_keeps_its_traceback(tmp_path):
    flags = ["--model", "own", "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path]
    finished = run_script("train.py", *flags, before=partial(add_own, tuple))
    assert_one_line_error(finished, r"train\.py: error: models\.py: own returns a tuple")
    finished = run_script("train.py", *flags, before=partial(add_own, forgets_a_name))
    assert finished.returncode == 1
    assert re.search(r"Traceback(.*\n)+.*in forgets_a_name\n(.*\n)*NameError: name 'undefined'", finished.stderr)
    assert list(tmp_path.iterdir()) == []
