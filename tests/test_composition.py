"""analysis.py, corruptions.py and explain.py: on numbers made by hand, and on real images and models."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import analysis
import checkpoint
import corruptions
import engine
import explain


def test_the_temperature_that_was_put_in_is_found():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20_000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert analysis.temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    before = analysis.calibration(analysis.scaled(3 * logits, 1), labels.numpy())
    after = analysis.calibration(analysis.scaled(3 * logits, 3), labels.numpy())
    assert after["ece"] < 0.02 < 0.15 < before["ece"]
    assert after["classwise_ece"] < before["classwise_ece"]
    assert after["log_loss"] < before["log_loss"]


def test_calibration_counts_every_image_in_each_diagram():
    probabilities = np.full((4, 10), 0.02)
    probabilities[:, 3] = 0.82
    result = analysis.calibration(probabilities, np.array([3, 3, 3, 1]))
    assert result["ece"] == pytest.approx(0.82 - 0.75)
    assert all(sum(each["counts"]) == 4 for each in (result["answer"], *result["classes"].values()))
    gaps = [0.02] * 10  # told 0.02 of each class that never comes
    gaps[3], gaps[1] = 0.07, 0.25 - 0.02
    assert result["classwise_ece"] == pytest.approx(np.mean(gaps))


def test_coverage_answers_the_most_confident():
    curve = analysis.coverage_curve(np.array([0.9, 0.5, 0.7, 0.6]), np.array([True, False, True, True]))
    assert [(point["n"], point["accuracy"], point["threshold"]) for point in curve] == [
        (1, 1.0, 0.9), (2, 1.0, 0.7), (3, 1.0, 0.6), (4, 0.75, 0.5),
    ]  # fmt: skip


def test_labels_that_were_exchanged_are_suspect():
    random = np.random.default_rng(0)
    true = random.integers(0, 10, 2000)
    probabilities = random.dirichlet(np.ones(10), 2000) * 0.3
    probabilities[np.arange(2000), true] += 0.7
    given = true.copy()
    exchanged = random.choice(2000, 60, replace=False)
    given[exchanged] = (given[exchanged] + 1) % 10
    found = analysis.label_issues(given, probabilities)
    assert len(set(found) & set(exchanged)) > 40  # confident learning is cautious: it misses some
    assert len(set(found) - set(exchanged)) < 3


def test_near_duplicates_by_either_space_and_consensus_of_all():
    pixel, feature, both = (
        np.array([0.01, 0.2, 0.2, 0.2]),
        np.array([0.5, 0.001, 0.001, 0.5]),
        np.array([0.5, 0.01, 0.2, 0.01]),
    )
    assert analysis.near_duplicates(pixel, feature, both).tolist() == [True, True, False, False]
    votes = np.array([[1, 2, 3]] * 4 + [[1, 2, 4]])
    assert analysis.consensus(np.array([1, 5, 3]), votes).tolist() == [True, False, False]
    assert analysis.consensus(np.array([1, 5, 3]), votes[:4]) is None
    bits = analysis.ambiguity(np.array([[0, 1], [0, 2]]))
    assert bits == pytest.approx([0, 1])


def test_each_mistake_is_in_the_first_group_that_it_fits():
    yes, no = np.ones(5, bool), np.zeros(5, bool)
    wrong = np.array([True, True, True, True, False])
    suspect, duplicate = np.array([True, False, False, False, True]), np.array([True, True, False, False, True])
    agreed = np.array([True, True, True, False, True])
    groups = analysis.group(wrong, suspect, duplicate, agreed)
    assert groups.tolist() == ["label", "duplicate", "consensus", "unstable", ""]
    assert analysis.group(yes, None, no, None).tolist() == ["unknown"] * 5


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
    maps, told = explain.attention_maps(network, test, predicted)
    assert told == method
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
