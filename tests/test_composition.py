"""What mistakes are made of, corruptions, maps, code keys: on numbers made by hand, on real images and models."""

import inspect
import re

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import checkpoint
import engine
import models
import recipes
from analysis import composition, corruptions, explain
from runtime import cli
from runtime.code_key import code_key, reachable


def test_labels_that_were_exchanged_are_suspect():
    random = np.random.default_rng(0)
    true = random.integers(0, 10, 2000)
    probabilities = random.dirichlet(np.ones(10), 2000) * 0.3
    probabilities[np.arange(2000), true] += 0.7
    given = true.copy()
    exchanged = random.choice(2000, 60, replace=False)
    given[exchanged] = (given[exchanged] + 1) % 10
    found = composition.label_issues(given, probabilities)
    assert len(set(found) & set(exchanged)) > 40  # confident learning is cautious: it misses some
    assert len(set(found) - set(exchanged)) < 3
    twice = composition.label_issues(np.tile(given, 2), np.tile(probabilities, (2, 1)))
    own = np.tile(probabilities[np.arange(2000), given], 2)
    assert len(set(own[twice])) < len(twice)
    assert twice.tolist() == sorted(twice.tolist(), key=lambda i: (own[i], i))  # on any processor


def test_near_duplicates_by_either_space_and_consensus_of_all():
    pixel, feature, both = (
        np.array([0.01, 0.2, 0.2, 0.2]),
        np.array([0.5, 0.001, 0.001, 0.5]),
        np.array([0.5, 0.01, 0.2, 0.01]),
    )
    assert composition.near_duplicates(pixel, feature, both).tolist() == [True, True, False, False]
    votes = np.array([[1, 2, 3]] * 4 + [[1, 2, 4]])
    assert composition.consensus(np.array([1, 5, 3]), votes, 5).tolist() == [True, False, False]
    assert composition.consensus(np.array([1, 5, 3]), votes[:4], 5) is None
    bits = composition.ambiguity(np.array([[0, 1], [0, 2]]))
    assert bits == pytest.approx([0, 1])


def test_a_run_of_changed_values_is_not_compared_with_those_of_the_recipe():
    _, info = checkpoint.load(cli.DEFAULT_CHECKPOINT)
    assert composition._identity(info)["recipe"] == "published"
    other = info | {"flags": recipes.upgrade(info["flags"]) | {"epochs": 2}}
    assert composition._identity(other)["recipe"] == "published with epochs 2"
    shipped = [*cli.CHECKPOINTS.glob("best_*.pt"), *cli.CHECKPOINTS.glob("distilled/best_*.pt")]
    assert {composition._identity(checkpoint.load(path)[1])["recipe"] for path in shipped} <= set(recipes.RECIPES)


def test_each_mistake_is_in_the_first_group_that_it_fits():
    yes, no = np.ones(5, bool), np.zeros(5, bool)
    wrong = np.array([True, True, True, True, False])
    suspect, duplicate = np.array([True, False, False, False, True]), np.array([True, True, False, False, True])
    agreed = np.array([True, True, True, False, True])
    groups = composition.group(wrong, suspect, duplicate, agreed)
    assert groups.tolist() == ["label", "duplicate", "consensus", "unstable", ""]
    assert composition.group(yes, None, no, None).tolist() == ["unknown"] * 5


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_images_get_harder_with_strength_and_the_same_each_time(kind, sample):
    images = sample["test"].images
    harm = []
    for strength in range(1, 6):
        harder = corruptions.corrupt(images, kind, strength)
        assert harder.shape == images.shape
        assert harder.dtype == torch.uint8
        assert torch.equal(harder, corruptions.corrupt(images, kind, strength))
        harm.append((harder.float() - images.float()).square().mean().item())
    assert harm == sorted(harm)
    assert harm[0] > 0
    state = torch.random.get_rng_state()
    corruptions.corrupt(images, kind, 1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_shift_moves_by_so_many_pixels(sample):
    images = sample["test"].images[:50]
    padded = torch.nn.functional.pad(images, (4,) * 4)
    for image, moved in zip(padded, corruptions.corrupt(images, "shift", 4), strict=True):
        places = [(y, x) for y in (0, 4, 8) for x in (0, 4, 8) if (y, x) != (4, 4)]
        assert any(torch.equal(image[y : y + 28, x : x + 28], moved) for y, x in places)


def test_the_nearest_are_those_of_scikit_learn(sample):
    test, train = (sample[name].images.flatten(1).float() / 255 for name in ("test", "train"))
    distances, indices = explain.nearest(test, train, 3)
    expected, where = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(train.numpy()).kneighbors(test.numpy())
    np.testing.assert_allclose(distances, expected, atol=1e-3)
    assert (indices.numpy() == where).mean() > 0.999


@pytest.mark.parametrize(("model", "method"), [("cnn", "Grad-CAM"), ("mlp", "gradient x input")])
def test_maps_show_where_the_evidence_is(model, method, trained, sample):
    network, _ = checkpoint.load(trained[0] / f"best_{model}_fmnist.pt")
    test = sample["test"]
    logits, features = explain.features(network, test)
    assert torch.equal(logits, engine.predict_logits(network, test))
    assert features.shape == (500, 128)
    torch.testing.assert_close(network.fc2(features), logits)
    predicted = logits.argmax(1)
    maps, name = explain.attention_maps(network, test, predicted)
    assert name == method
    assert maps.shape == (500, 7, 7)
    # Blackening the quarter with the most evidence lowers the answer's logit more than that with the least.
    order = maps.flatten(1).argsort(1)
    drops = []
    for chosen in (order[:, -12:], order[:, :12]):
        mask = torch.zeros(500, 49).scatter(1, chosen, 1).view(500, 7, 7).bool()
        mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
        hidden = engine.predict_logits(network, test._replace(images=test.images.masked_fill(mask, 0)))
        drops.append((logits - hidden).gather(1, predicted.unsqueeze(1)).mean().item())
    assert drops[0] > 2 * abs(drops[1])


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({}, "Temperature "),  # its best epoch was chosen on the validation images
        ({"select": "last"}, "No temperature .* trained on these very images"),
        ({"data": "other"}, "No temperature .* trained on other, measured on sample"),
        (None, "No temperature .* not known"),
    ],
)
def test_a_temperature_needs_images_that_were_not_trained_on(change, note, trained, sample, tmp_path):
    model, info = checkpoint.load(trained[0] / "best_mlp_fmnist.pt")
    if change is None:
        torch.save(model.state_dict(), tmp_path / "bare.pt")
        model, info = checkpoint.load(tmp_path / "bare.pt")
    elif "select" in change:
        info["flags"] |= change
    else:
        info |= change
    measured = composition.measure("best.pt", model, info, sample["test"], sample["val"])
    assert re.match(note, measured.temperature_note), measured.temperature_note
    assert (measured.temperature is None) == (measured.after is None) == note.startswith("No")
    unknown = "mlp, training unknown, normalised by mean 0.5 and std 0.5 (assumed)"
    own = measured.title.startswith("mlp, recipe published with epochs 3, batch size 32")
    assert measured.title == unknown if change is None else own


# --- what makes the result of a long training stale ------------------------------------------------------


def edited(old, new):
    """models.py with an edit."""
    source = inspect.getsource(models)
    assert old in source
    return source.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        ("SKIPPED = 0.1", "SKIPPED = 0.2", ("resnet",)),  # of a layer that the class uses
        ("F.relu(self.norm(x))", "F.gelu(self.norm(x))", ("resnet",)),  # of a layer of that layer
        ("F.max_pool2d(F.relu(conv(x)), 2)", "F.avg_pool2d(F.relu(conv(x)), 2)", ("cnn",)),  # of a function
        ("nn.Dropout(0.3)", "nn.Dropout(0.2)", ("cnn",)),
        ("MODELS[name]()", "MODELS[name]().double()", ("mlp", "cnn", "resnet")),  # of what builds them all
        ("from torch import nn", "from other import nn", ("mlp", "cnn", "resnet")),
        ("class MLP(nn.Module):", "class Other(nn.Module):\n    pass\n\n\nclass MLP(nn.Module):", ()),  # a new model
        ('    "mlp": MLP,', '    "mlp": MLP,\n    "other": Other,', ()),
        ("# 28x28\n", "# a comment\n", ()),
        ('"""Add the convolutions\' output to the input."""', '"""Another docstring."""', ()),
        ("def count_parameters(", "def count_weights(", ()),
    ],
)
def test_a_result_is_stale_after_an_edit_of_what_its_model_uses_and_of_nothing_else(old, new, stale):
    source, changed = inspect.getsource(models), edited(old, new)
    starts = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet"}
    found = {
        name
        for name, start in starts.items()
        if any(reachable(source, each) != reachable(changed, each) for each in ("build", start))
    }
    assert found == set(stale)


def test_models_have_keys_of_16_digits_that_differ():
    keys = {code_key(name) for name in models.MODELS}
    assert len(keys) == len(models.MODELS)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
