"""models.py: exactly the published layers, and what the residual network adds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import models
from runtime.errors import UserError

CONV1, CONV2, FC1, FC2 = (9, 1, 32, 784), (9, 32, 64, 196), (1, 3136, 128, 1), (1, 128, 10, 1)
MACS = {  # kernel, inputs, outputs, pixels of each layer
    "mlp": [(1, 784, 128, 1), FC2],
    "cnn": [CONV1, CONV2, FC1, FC2],
    "resnet": [
        *[CONV1, (9, 32, 64, 784), (9, 64, 64, 196), (9, 64, 64, 196)],
        *[(9, 64, 128, 196), (9, 128, 128, 49), (9, 128, 128, 49)],
        *[(9, 128, 256, 49), (9, 256, 256, 9), (9, 256, 256, 9), (1, 256, 10, 1)],
    ],
}


@pytest.mark.parametrize(("name", "parameters"), [("mlp", 101_770), ("cnn", 421_642), ("resnet", 1_940_938)])
def test_parameters_are_as_documented(name, parameters):
    model = models.build(name)
    assert models.count_parameters(model) == parameters
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def published(name, model):
    """The published layers in the published order, holding the model's weights."""
    layers = {
        "mlp": [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)],
        "cnn": [
            *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)],
        ],
    }
    network = nn.Sequential(*layers[name]).to(memory_format=torch.channels_last)
    network.load_state_dict(dict(zip(network.state_dict(), model.state_dict().values(), strict=True)))
    return network


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_outputs_and_gradients_are_those_of_the_published_order_to_the_bit(name, sample):
    model = models.build(name)
    network = published(name, model)
    images, labels = next(data.batches(sample["train"], 128))
    results = []
    for module in (model, network):
        torch.manual_seed(0)  # for dropout
        logits = module(data.normalise(images))
        F.cross_entropy(logits, labels).backward()
        results.append([logits, *(parameter.grad for parameter in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_lazy_layer_gets_its_weights_when_the_model_is_built(monkeypatch):
    monkeypatch.setitem(models.MODELS, "lazy", lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
    built = []
    for _ in range(2):
        torch.manual_seed(0)
        built.append(models.build("lazy"))
    assert models.count_parameters(built[0]) == 7850
    assert torch.equal(built[0][1].weight, built[1][1].weight)
    assert built[0].training


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_a_whitened_layer_gives_values_of_mean_0_and_variance_1_that_are_not_correlated(name, sample):
    images, model = data.normalise(sample["train"].images[:500]), models.build(name)
    models.whiten(model, images, 1e-6)
    values = F.conv2d(images, model.conv1.weight, model.conv1.bias).transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 1e-3
    assert (values[:9].cov() - torch.eye(9)).abs().max() < 0.1  # in float32
    assert torch.equal(values[9:18], -values[:9])
    assert (values[18:].var(1) - 1).abs().max() < 0.1  # mixtures
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["conv1.weight", "conv1.bias"]
    models.whiten(model, images, 1e3)  # far above any variance of a patch
    assert F.conv2d(images, model.conv1.weight, model.conv1.bias).std() < 0.1


@pytest.mark.parametrize(
    "model",
    [
        models.MLP(),
        nn.Sequential(nn.Conv2d(3, 32, 3)),
        nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 32, 3)),
        nn.Sequential(nn.Conv2d(1, 32, 3, dilation=2), nn.Conv2d(32, 10, 24)),
        nn.Sequential(nn.Conv2d(1, 32, 30, padding=4), nn.Conv2d(32, 10, 1)),
        nn.Sequential(nn.Conv2d(1, 10, 28), nn.Flatten()),
    ],
    ids=["mlp", "of colours", "normalised", "dilated", "larger than an image", "nothing else"],
)
def test_what_has_no_first_convolution_of_grey_images_cannot_be_whitened(model, sample):
    with pytest.raises(UserError, match=r"^whiten (needs a model whose|would leave nothing to train).*: set whiten=0$"):
        models.whiten(model, data.normalise(sample["train"].images[:10]), 0.1)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(784, 32), True),
        (nn.Linear(784, 32, bias=False), False),
        (nn.Linear(28, 32), False),
        (nn.Linear(784, 32).requires_grad_(False), False),
        (nn.utils.weight_norm(nn.Linear(784, 32)), False),
        (nn.BatchNorm1d(784), False),
        (None, False),
    ],
)
def test_a_linear_layer_of_the_pixels_is_one_that_learns_with_a_bias(layer, expected):
    assert models.is_linear_of(layer, torch.zeros(5, 1, 28, 28)) == expected


def test_dropout_is_off_in_evaluation(sample):
    model = models.build("cnn").eval()
    images, _ = next(data.batches(sample["test"], 8))
    assert torch.equal(model(data.normalise(images)), model(data.normalise(images)))


@pytest.mark.parametrize("name", MACS)
def test_flop_are_counted(name):
    assert models.count_flop(models.build(name)) == sum(2 * a * b * c * d for a, b, c, d in MACS[name])


@pytest.mark.parametrize("name", MACS)
def test_flop_of_a_training_step_are_those_of_three_passes_but_for_the_images(name):
    """Forward, the gradients of the weights, and those of the inputs, which the first layer does not need."""
    first, *others = (2 * a * b * c * d for a, b, c, d in MACS[name])
    model = models.build(name)
    assert models.count_flop(model, training=True) == 2 * first + 3 * sum(others)


def test_an_image_is_classified_alike_alone_and_among_others(sample):
    """In evaluation, batch normalisation uses what training has seen, not the batch."""
    model = models.build("resnet").eval()
    images = data.normalise(sample["test"].images[:8])
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:1], model(images[:1]), atol=1e-4, rtol=1e-4)
