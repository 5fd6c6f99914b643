"""runtime/kernels.py: the fused operations are PyTorch's, for the model that gets them, and training can do without."""

import contextlib
import copy
import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE, first, run_script
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import data
import engine
import models
import optim
import recipes
from runtime import kernels, mlp_step
from runtime.errors import UserError


@pytest.fixture(autouse=True)
def no_failure_is_remembered():
    """A test's compiler that fails must not keep the kernels from the tests after it."""
    yield
    kernels._try.cache_clear()


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_and_its_gradient_are_pytorchs_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, 14, 14, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(5, 64, 7, 7, generator=generator).to(dtype)
    results = []
    for function in (kernels.fused_pool_relu, kernels.pool_relu, lambda x: F.max_pool2d(F.relu(x), 2)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = function(leaf)
        output.backward(gradient)
        results.append((output, leaf.grad))
    assert type(results[0][0].grad_fn).__name__ == "_ReluPoolBackward"  # the fused one did run
    for output, leaf in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(leaf, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_block_and_its_gradients_are_pytorchs_but_for_rounding(dtype, sample):
    conv = models.build("cnn").conv1
    images = data.normalise(sample["train"].images[:77], dtype)  # as a training does
    with autocast(dtype):
        output = kernels.fused_conv_relu_pool(conv, images)
    assert type(output.grad_fn).__name__ == "_ConvReluPoolBackward"
    assert output.dtype == dtype
    expected = models.conv_relu_pool(conv, images.float())
    exact = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(output.float(), expected, atol=1e-6, rtol=exact)

    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    output.backward(gradient)
    ours = [conv.weight.grad.clone(), conv.bias.grad.clone()]
    conv.zero_grad()
    expected.backward(gradient.float())
    for a, b in zip(ours, [conv.weight.grad, conv.bias.grad], strict=True):  # of near ties, rounding picks another
        assert (a - b).norm() < 1e-3 * b.norm()


BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
NANS = {  # of either sign, with all bits of the fraction or one
    torch.float32: (0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x7FFFFF),
    torch.bfloat16: (0x7FFF, 0x7F81, 0x7FC0, -1, -0x7F),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", range(4))
def test_pooling_passes_nan_on_and_keeps_infinity(dtype, place):
    x = torch.full((1, 32, 2, 2), -1.0, dtype=dtype)
    nans = NANS[dtype]
    x[0, : len(nans), place // 2, place % 2] = torch.tensor(nans, dtype=BITS[dtype]).view(dtype)
    x[0, len(nans), place // 2, place % 2] = float("inf")
    x[0, len(nans) + 1, place // 2, place % 2] = -float("inf")
    x[0, 0, 0, 0] = x[0, 0, place // 2, place % 2]
    output = kernels.fused_pool_relu(x.requires_grad_())[0, :, 0, 0]
    assert output[: len(nans)].isnan().all()
    assert output[len(nans)] == float("inf")
    assert (output[len(nans) + 1 :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_block_loses_no_nan_and_no_infinity(dtype):
    conv = models.build("cnn").conv1
    images = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)
    images[:, :, 7] = 0
    nans = torch.tensor(NANS[torch.float32], dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        conv.weight[: len(nans), 0, 0, 0] = nans
        conv.weight[8, 0, 1, 1] = float("inf")  # NaN, infinity and numbers in one window
        conv.weight[9] = 3e38  # finite, but not their sums
        conv.bias[10] = nans[0]
        conv.bias[11] = -float("inf")
    with autocast(dtype):
        output, expected = kernels.fused_conv_relu_pool(conv, images), models.conv_relu_pool(conv, images)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())
    assert expected.isnan().sum((0, 2, 3))[:12].count_nonzero() == 7
    images[0, 0, 3, 3] = nans[0]
    with autocast(dtype):
        output, expected = (f(conv, images) for f in (kernels.fused_conv_relu_pool, models.conv_relu_pool))
    assert torch.equal(output.isnan(), expected.isnan())


# --- the second convolution ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "outputs", "bias"), [(1, 32, True), (33, 64, True), (130, 96, False)])
def test_the_second_block_and_its_gradients_are_pytorchs_but_for_rounding(n, outputs, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, outputs, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    results = []
    for function in (kernels.fused_conv_relu_pool, models.conv_relu_pool):
        torch.manual_seed(1)
        x = torch.randn(n, 32, 14, 14).relu().contiguous(memory_format=torch.channels_last).requires_grad_()
        conv.zero_grad()
        output = function(conv, x)
        (output * torch.randn(output.shape)).sum().backward()
        results.append([output.detach(), x.grad, *(parameter.grad.clone() for parameter in conv.parameters())])
        with torch.inference_mode():
            torch.testing.assert_close(function(conv, x), results[-1][0])
        names = type(output.grad_fn).__name__
        assert (names == "_SecondConvReluPoolBackward") == (function is kernels.fused_conv_relu_pool)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_the_second_block_leaves_unusual_numbers_to_pytorch(value):
    conv, x = nn.Conv2d(32, 32, 3, padding=1), torch.rand(2, 32, 14, 14)
    x[1, 3, 5, 5] = value
    assert torch.equal(*(f(conv, x).isnan() for f in (kernels.fused_conv_relu_pool, models.conv_relu_pool)))
    torch.testing.assert_close(
        *(f(conv, x) for f in (kernels.fused_conv_relu_pool, models.conv_relu_pool)), equal_nan=True
    )
    with torch.no_grad():
        conv.weight[4, 2, 1, 1] = value
    ours, theirs = (f(conv, torch.rand(2, 32, 14, 14)) for f in (kernels.fused_conv_relu_pool, models.conv_relu_pool))
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_the_second_block_leaves_out_a_gradient_that_nothing_needs(monkeypatch):
    conv, x = nn.Conv2d(32, 64, 3, padding=1), torch.randn(5, 32, 14, 14)
    gradients, results, call = [], [], kernels._call
    monkeypatch.setattr(kernels, "_call", lambda *given: results.append(given[6]) or call(*given))
    for needed in (True, False):
        conv.zero_grad()
        kernels.fused_conv_relu_pool(conv, x.requires_grad_(needed)).square().sum().backward()
        gradients.append([parameter.grad for parameter in conv.parameters()])
    assert [result is None for result in results[1::2]] == [False, True]  # of backward
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_second_block_is_the_same_with_narrower_registers_and_other_defaults(cache, monkeypatch):
    """Registers of eight numbers, as all tests here use them on a processor without AVX512."""
    conv, x = nn.Conv2d(32, 96, 3, padding=1), torch.randn(5, 32, 14, 14)
    expected = models.conv_relu_pool(conv, x)
    if torch.cpu.get_capabilities().get("avx512_f"):
        monkeypatch.setattr(kernels, "FLAGS", [*kernels.FLAGS, "-mno-avx512f"])
    torch.set_default_dtype(torch.float64)
    try:
        output = kernels.fused_conv_relu_pool(conv, x)
        output.square().sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(output, expected)
    ours, conv.weight.grad = conv.weight.grad, None
    expected.square().sum().backward()
    torch.testing.assert_close(ours, conv.weight.grad, rtol=1e-4, atol=1e-3)


def on_threads(function, numbers=(1, 2, 3)):
    """What a function returns with these numbers of threads."""
    before, results = torch.get_num_threads(), []
    for number in numbers:
        torch.set_num_threads(number)
        results.append(function())
    torch.set_num_threads(before)
    return results


def test_the_second_block_gives_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(32, 64, 3, padding=1), torch.randn(37, 32, 14, 14)

    def gradient():
        conv.zero_grad()
        kernels.fused_conv_relu_pool(conv, x).square().sum().backward()
        return conv.weight.grad.clone()

    first, *others = on_threads(gradient)
    assert all(torch.equal(first, other) for other in others)


# --- a whole step of the MLP -----------------------------------------------------------------------------


def trained(sample, recipe, model=None, epochs=1):
    """A training of the MLP, run to its end, and its first row."""
    torch.manual_seed(3)
    model = model or models.build("mlp")
    training = engine.Training(model, sample["train"], None, recipe._replace(epochs=epochs), seed=0)
    return training, next(iter(training.run()))


@pytest.mark.parametrize(
    ("recipe", "batch"), [("published", 128), ("published", 100), ("published", 300), ("fast", 384), ("fast", 77)]
)
def test_whole_steps_train_as_pytorchs_do_but_for_rounding(recipe, batch, sample):
    recipe = recipes.find(recipe, "mlp")._replace(batch_size=batch, precision="float32")
    if recipe.optimizer == "muon":  # rounds factors to bfloat16, so differences in the last bits grow with each step
        sample = {"train": first(sample["train"], 5 * batch // 2)}
    (ours, row), (theirs, expected) = (trained(sample, recipe._replace(fused=fused)) for fused in (True, False))
    assert ours.whole_step
    assert not theirs.whole_step
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()
    states = (training.state_dict()["optimizers"] for training in (ours, theirs))
    for a, b in zip(*states, strict=True):
        assert {key: list(value) for key, value in a.items()} == {key: list(value) for key, value in b.items()}
        assert all(torch.equal(value["step"], b[key]["step"]) for key, value in a.items() if "step" in value)


@pytest.mark.parametrize("recipe", ["published", "fast"])
def test_whole_steps_give_the_same_bits_on_any_number_of_threads(recipe, sample):
    changes = {"batch_size": 150, "precision": "float32", "optimizer": "adam", "muon_lr": 0.0, "whiten": 0.0}
    recipe = recipes.find(recipe, "mlp")._replace(**changes)
    results = on_threads(lambda: [p.detach() for p in trained(sample, recipe)[0].model.parameters()], (1, 2, 3, 9))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


class Wide(models.MLP):
    def __init__(self, hidden=256, bias=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(784, hidden, bias=bias), nn.Linear(hidden, 10)


class Scaled(models.MLP):
    def forward(self, images):
        return super().forward(images) * 2


class Unlike(models.MLP):
    def forward(self, images):
        return (
            self.fc2(F.relu(self.fc1(images.flatten(1)))) if images.sum() > 0 else self.fc2(images.flatten(1)[:, :128])
        )


class Twice(models.MLP):
    def forward(self, images):
        hidden = self.fc1(images.flatten(1))
        return self.fc2(F.relu(hidden) + hidden)


class Smooth(models.MLP):
    def forward(self, images):
        return self.fc2(F.gelu(self.fc1(images.flatten(1))))


class Called(models.MLP):
    def __call__(self, images):
        return 2 * super().__call__(images)


class Asking(models.MLP):
    def forward(self, images):
        return self.fc2(F.relu(self.fc1(images.flatten(1)))) * (2 if self.training else 1)


class Derived(models.MLP):
    """Its first layer is another than the one that it holds."""

    @property
    def fc1(self):
        return lambda images: 2 * self._modules["fc1"](images)


class Asked(models.MLP):
    def __getattribute__(self, name):
        layer = super().__getattribute__(name)
        return (lambda x: layer(x) + 1) if name == "fc2" else layer


class Wrapped(models.MLP):
    def _call_impl(self, images):
        return 2 * super()._call_impl(images)

    __call__ = _call_impl


def turn(model):
    model.fc1.weight = nn.Parameter(torch.randn(784, 128).t())


def changed(function):
    model = models.MLP()
    function(model)
    return model


OTHER_NETWORKS = {
    "hidden units that fill no vector": lambda: Wide(100),
    "no bias": lambda: Wide(128, bias=False),
    "scaled": Scaled,
    "a forward that looks at values": Unlike,
    "a shortcut": Twice,
    "another activation": Smooth,
    "a __call__": Called,
    "a forward that asks whether it trains": Asking,
    "weights in another order": lambda: changed(turn),
    "a hook of a weight": lambda: changed(lambda model: model.fc1.weight.register_hook(lambda gradient: gradient * 0)),
    "a hook": lambda: changed(lambda model: model.fc1.register_forward_hook(lambda *_: None)),
    "a hook of the model": lambda: changed(lambda model: model.register_forward_pre_hook(lambda *_: None)),
    "a frozen layer": lambda: changed(lambda model: model.fc1.requires_grad_(False)),
    "a buffer": lambda: changed(lambda model: model.register_buffer("mean", torch.zeros(1))),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.Dropout(), nn.ReLU(), nn.Linear(128, 10)),
    "float64": lambda: models.MLP().double(),
    "the CNN": lambda: models.build("cnn"),
    "a property for a layer": Derived,
    "attributes of its own making": Asked,
    "another call": Wrapped,
    "another call of the object": lambda: changed(lambda model: vars(model).update(_call_impl=lambda images: images)),
    "a function for a layer": lambda: changed(lambda model: vars(model).update(fc2=lambda x: x[:, :10])),
    "a tensor for a weight": lambda: changed(lambda model: vars(model.fc2).update(weight=torch.zeros(10, 128))),
}


def test_whole_steps_are_for_networks_that_compute_what_the_mlp_does(sample):
    assert mlp_step.find(models.MLP(), None, mlp_step.Team())
    for name, build in OTHER_NETWORKS.items():
        assert mlp_step.find(build(), None, mlp_step.Team()) is None, name
    recipe = recipes.find("published", "mlp")._replace(fused=True)
    ours, _ = trained(sample, recipe, Wide())
    assert ours.whole_step
    for change in ({"label_smoothing": 0.1}, {"prune": 0.5}, {"loss": "focal"}, {"fused": False}):
        with contextlib.suppress(UserError):
            assert not engine.Training(
                models.MLP(), sample["train"], None, recipe._replace(**change), seed=0
            )._find_whole_step()


def logged(function):
    return lambda *arguments, **options: function(*arguments, **options)


def doubled(function):
    return lambda *arguments, **options: 2 * function(*arguments, **options)


def flooded(logits, labels, recipe, reduction):
    """Ishida et al. 2020: the same near the beginning of a training, and another later."""
    return (F.cross_entropy(logits, labels, reduction=reduction) - 0.5).abs() + 0.5


def clipped(self, loss):
    self.model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
    for optimizer in self.optimizers:
        optimizer.step()


EDITS = {  # of the code that a whole step replaces: the place, its name, and what becomes of it
    "the loss in the table": (engine.LOSSES, "cross_entropy", engine.Loss("", doubled(engine.cross_entropy))),
    "a loss that also logs": (engine.LOSSES, "cross_entropy", engine.Loss("", logged(engine.cross_entropy))),
    "a loss that differs later": (engine.LOSSES, "cross_entropy", engine.Loss("", flooded)),
    "gradients that are clipped": (engine.Training, "_update", clipped),
    "the loss's own function": (F, "cross_entropy", doubled(F.cross_entropy)),
    "how images are normalised": (engine, "normalise", doubled(engine.normalise)),
    "PyTorch's linear layer": (nn.Linear, "forward", doubled(nn.Linear.forward)),
    "PyTorch's linear function": (F, "linear", doubled(F.linear)),
    "PyTorch's ReLU": (F, "relu", F.leaky_relu),
    "Adam's step": (optim.FusedAdam, "step", lambda self: None),
    "how gradients are used": (engine.Training, "_update", lambda self, loss: None),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_code_is_used_and_not_the_whole_step(name, sample, monkeypatch):
    recipe = recipes.find("published", "mlp")
    place, attribute, value = EDITS[name]
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, attribute, value)
    results = [trained(sample, recipe._replace(fused=fused)) for fused in (True, False)]
    assert results[0][1]["train_loss"] == results[1][1]["train_loss"]
    for a, b in zip(*(training.model.parameters() for training, _ in results), strict=True):
        assert torch.equal(a, b)


def test_the_whole_step_is_written_for_the_code_as_it_is(sample):
    training = engine.Training(models.MLP(), sample["train"], None, recipes.find("published", "mlp"), seed=0)
    assert training._code() == engine.WRITTEN_FOR, (
        "engine.WRITTEN_FOR: the code that runtime/mlp_step.c replaces has changed; once the C code does the same, or "
        "if no result has changed, set it to the digest above"
    )


class Watched(engine.Training):
    def _update(self, loss):
        self.watched = True
        super()._update(loss)


def test_methods_of_a_training_of_ones_own_are_called(sample):
    recipe = recipes.find("published", "mlp")._replace(epochs=1)
    for build in (Watched, engine.Training):
        training = build(models.MLP(), sample["train"], None, recipe, seed=0)
        if build is engine.Training:
            training._update = lambda loss, own=training: Watched._update(own, loss)
            training.__class__ = Watched  # for super()
        list(training.run())
        assert training.watched
    training = engine.Training(models.MLP(), sample["train"], None, recipe, seed=0)
    steps = torch.optim.lr_scheduler.ConstantLR(training.optimizers[0])  # puts a function around the optimiser's step
    list(training.run())
    assert steps is not None
    assert training.whole_step is None


def test_whole_steps_read_the_images_and_the_weights_that_are_there(sample):
    recipe = recipes.find("published", "mlp")._replace(fused=True)
    train = sample["train"]
    others = [
        train._replace(images=train.images.transpose(1, 2)),
        train._replace(labels=train.labels.int()),
        train._replace(labels=train.labels + 1),
        train._replace(labels=train.labels - 1),
    ]
    for other in others:
        assert not engine.Training(models.MLP(), other, None, recipe, seed=0)._find_whole_step()
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = models.MLP()
        training = engine.Training(model, sample["train"], None, recipe._replace(fused=fused), seed=0)
        model.fc1.weight.data = model.fc1.weight.data.clone() * 2
        next(training.run())
        results.append(model.fc1.weight.detach())
    assert (results[0] - results[1]).norm() < 1e-3 * results[1].norm()


def test_whole_steps_end_where_the_network_changes_between_epochs(sample):
    training, _ = trained(sample, recipes.find("published", "mlp")._replace(fused=True), epochs=3)
    assert training.whole_step
    assert copy.deepcopy(training).whole_step.parameters[0] is not training.whole_step.parameters[0]
    training.model.fc1.requires_grad_(False)
    before = training.model.fc1.weight.clone()
    list(training.run())
    assert not training.whole_step
    assert torch.equal(training.model.fc1.weight, before)


def test_whole_steps_go_on_when_the_images_are_learnt_by_heart(sample):
    recipe = recipes.find("fast", "mlp")._replace(epochs=6, batch_size=16)
    torch.manual_seed(0)
    training = engine.Training(models.build("mlp"), sample["train+val"], None, recipe, seed=0)
    losses = []
    for row in training.run():
        losses.append(row["train_loss"])
        training._agrees = None  # as after --resume
        assert training._find_whole_step()
    assert losses[-1] < 0.1


def test_a_run_by_whole_steps_resumes_to_the_same_bits(sample):
    recipe = recipes.find("published", "mlp")._replace(epochs=2, fused=True)
    whole, _ = trained(sample, recipe, epochs=2)
    list(whole.run())
    cut, _ = trained(sample, recipe, epochs=2)
    state = copy.deepcopy(cut.state_dict())
    resumed = engine.Training(models.build("mlp"), sample["train"], None, recipe, seed=0)
    resumed.load_state_dict(state)
    list(resumed.run())
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    del state["optimizers"][0][0]  # as of a weight that has never had a gradient: its steps are counted apart
    resumed.load_state_dict(state)
    assert not resumed._find_whole_step()


# --- what is fused, and what is left to PyTorch ------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(conv):
    conv.forward = lambda x: 2 * F.conv2d(x, conv.weight, conv.bias, padding=1)
    return conv


def hooked(conv):
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return conv


def strided_weights(conv):
    conv.weight = nn.Parameter(torch.randn(64, 1, 3, 3)[::2])
    conv.bias = nn.Parameter(torch.randn(64)[::2])
    return conv


FUSED = {
    "plain": lambda: nn.Conv2d(1, 32, 3, padding=1),
    "same": lambda: nn.Conv2d(1, 64, 3, padding="same"),
    "without a bias": lambda: nn.Conv2d(1, 32, 3, padding=1, bias=False),
    "in strides": lambda: strided_weights(nn.Conv2d(1, 32, 3, padding=1)),
}
LEFT = {
    "channels": lambda: nn.Conv2d(1, 5, 3, padding=1),
    "many channels": lambda: nn.Conv2d(1, 544, 3, padding=1),
    "stride": lambda: nn.Conv2d(1, 32, 3, padding=1, stride=2),
    "padding": lambda: nn.Conv2d(1, 32, 3),
    "more padding": lambda: nn.Conv2d(1, 32, 3, padding=2),
    "dilation": lambda: nn.Conv2d(1, 32, 3, padding=2, dilation=2),
    "dilation alone": lambda: nn.Conv2d(1, 32, 3, padding=1, dilation=2),
    "kernel": lambda: nn.Conv2d(1, 32, 5, padding=1),
    "a row": lambda: nn.Conv2d(1, 32, (1, 9), padding=1),
    "reflect": lambda: nn.Conv2d(1, 32, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(1, 32, 3, padding=1, padding_mode="circular"),
    "a subclass": lambda: Doubled(1, 32, 3, padding=1),
    "another forward": lambda: replaced(nn.Conv2d(1, 32, 3, padding=1)),
    "a hook": lambda: hooked(nn.Conv2d(1, 32, 3, padding=1)),
    "pruned": lambda: prune.random_unstructured(nn.Conv2d(1, 32, 3, padding=1), "weight", 0.5),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(1, 32, 3, padding=1)),
    "a sequence": lambda: nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.Tanh()),
}


def outcome(function, conv, x):
    """The output and the gradients of a module's parameters, or the error that it ends in."""
    conv.zero_grad()
    torch.manual_seed(0)
    try:
        output = function(conv, x)
    except RuntimeError as error:
        return str(error)
    (output * torch.randn(output.shape).to(output.dtype)).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in conv.parameters())]


@pytest.mark.parametrize("name", [*FUSED, *LEFT])
def test_a_layer_trains_as_pytorch_computes_it(name):
    torch.manual_seed(0)
    conv = (FUSED | LEFT)[name]()
    x = torch.randn(6, 1, 28, 28)
    assert kernels._is_plain(conv, 1) == (name in FUSED)
    results = [outcome(function, conv, x) for function in (kernels.fused_conv_relu_pool, models.conv_relu_pool)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("images", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_of_another_dtype_is_pytorchs(weights, images):
    conv = nn.Conv2d(1, 32, 3, padding=1).to(weights)
    x = torch.randn(2, 1, 28, 28).to(images)
    ours, theirs = (outcome(f, conv, x) for f in (kernels.fused_conv_relu_pool, models.conv_relu_pool))
    if weights != images:  # PyTorch refuses them, and so do we
        assert isinstance(ours, str)
        assert ours == theirs
        return
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4) if weights == torch.float32 else None
        assert weights == torch.float32 or torch.equal(a, b)


def test_what_the_kernels_do_not_fit_is_left_to_pytorch():
    conv = nn.Conv2d(1, 32, 3, padding=1)
    for x in (torch.randn(2, 1, 30, 28), torch.randn(1, 28, 28), torch.zeros(0, 1, 28, 28)):
        torch.testing.assert_close(kernels.fused_conv_relu_pool(conv, x), models.conv_relu_pool(conv, x))
    sizes = [(2, 32, 7, 7), (2, 5, 8, 8), (32, 8, 8), (0, 32, 8, 8)]
    for x in (*map(torch.randn, sizes), torch.randn(2, 32, 8, 8, dtype=torch.float64)):
        assert torch.equal(kernels.fused_pool_relu(x), F.relu(F.max_pool2d(x, 2)))


def test_gradients_do_not_depend_on_the_run(sample):
    conv = models.build("cnn").conv1
    images = data.normalise(sample["train"].images[:501])
    first = None
    for _ in range(5):
        conv.zero_grad()
        kernels.fused_conv_relu_pool(conv, images).square().sum().backward()
        first = conv.weight.grad.clone() if first is None else first
        assert torch.equal(conv.weight.grad, first)


# --- given to one model ----------------------------------------------------------------------------------


def step(model, sample):
    """The logits of a batch in training, and the gradients of a step, of this model."""
    images, labels = sample["train"].images[:64], sample["train"].labels[:64]
    torch.manual_seed(0)  # for dropout
    logits = model.train()(data.normalise(images))
    model.zero_grad()
    F.cross_entropy(logits, labels).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("name", models.MODELS)
def test_operations_in_another_order_give_the_bits_of_the_plain_model(name, sample):
    plain = models.build(name)
    given = copy.deepcopy(plain)
    kernels.give(given, fused=False)
    for ours, theirs in zip(step(given, sample), step(plain, sample), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(engine.predict_logits(given, sample["val"]), engine.predict_logits(plain, sample["val"]))


def test_kernels_that_one_model_gets_change_no_other(sample):
    plain = models.build("cnn")
    given, later = copy.deepcopy(plain), copy.deepcopy(plain)
    before = step(plain, sample)
    kernels.give(given, fused=True)
    after = step(given, sample)
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))  # it uses them
    for a, b in zip(after, before, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()
    for other in (plain, later):
        for ours, theirs in zip(step(other, sample), before, strict=True):
            assert torch.equal(ours, theirs)
    assert models.build("cnn").conv_relu_pool is models.conv_relu_pool


def test_a_model_with_kernels_evaluates_as_the_plain_one_and_has_its_weights(sample):
    plain = models.build("cnn")
    given = copy.deepcopy(plain)
    kernels.give(given, fused=True)
    images = data.normalise(sample["val"].images)
    assert torch.equal(*(engine.predict_logits(model, sample["val"]) for model in (given, plain)))
    torch.testing.assert_close(given(images), plain(images), atol=1e-5, rtol=1e-5)
    assert given.state_dict().keys() == plain.state_dict().keys()


def test_a_large_evaluation_borrows_the_kernels_and_returns_them(sample, monkeypatch):
    model = models.build("cnn")
    few = engine.predict_logits(model, sample["val"])
    monkeypatch.setattr(engine, "MANY", 1)
    many = engine.predict_logits(model, sample["val"])
    assert not torch.equal(few, many)  # they differ by rounding
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)
    assert model.conv_relu_pool is models.conv_relu_pool
    model.conv_relu_pool = lambda conv, x: F.max_pool2d(F.leaky_relu(conv(x)), 2)  # one of the user's own
    own = model.conv_relu_pool
    with kernels.evaluating(model, fused=True):
        assert model.conv_relu_pool is own
    model.conv_relu_pool = models.conv_relu_pool
    monkeypatch.setenv("CC", "/nowhere/cc")
    kernels._try.cache_clear()
    assert torch.equal(engine.predict_logits(model, sample["val"]), few)  # without a compiler


class Counting(models.CNN):
    """A CNN that notes on itself what it is asked."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images)

    def __copy__(self):
        raise TypeError("this network cannot be copied")


def test_an_evaluation_calls_the_model_itself(sample, monkeypatch):
    monkeypatch.setattr(engine, "MANY", 1)
    model, seen = Counting(), []
    model.register_forward_hook(lambda module, *_: seen.append(module is model))
    engine.predict_logits(model, sample["val"], 20)
    assert model.calls == len(seen) == len(sample["val"].labels) // 20
    assert all(seen)


def test_evaluations_in_several_threads_have_the_kernels_of_their_own(sample, monkeypatch):
    model, small = (
        models.build("cnn"),
        sample["val"]._replace(images=sample["val"].images[:30], labels=sample["val"].labels[:30]),
    )
    monkeypatch.setattr(engine, "MANY", 50)
    expected = [engine.predict_logits(model, split, 10) for split in (sample["val"], small)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(engine.predict_logits, model, (sample["val"], small)[n % 2], 10) for n in range(20)]
        results = [job.result() for job in jobs]
    assert all(torch.equal(result, expected[n % 2]) for n, result in enumerate(results))
    assert model.conv_relu_pool is models.conv_relu_pool


def test_tensors_that_pytorch_negates_later_and_gradients_by_functions_are_as_without_kernels(sample):
    conv = models.build("cnn").conv1
    images = torch._neg_view(data.normalise(sample["val"].images[:3]))
    gradient = torch._neg_view(torch.randn(3, 32, 14, 14))
    results = []
    for function in (kernels.fused_conv_relu_pool, models.conv_relu_pool):
        conv.zero_grad()
        output = function(conv, images)
        output.backward(gradient)
        pooled = torch.func.grad(lambda x, f=function: f(nn.Identity(), x).sum())(torch.arange(128.0).view(1, 32, 2, 2))
        results.append((output, conv.weight.grad.clone(), pooled))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore:Converting a tensor")
def test_a_model_with_kernels_that_is_recorded_computes_what_the_plain_one_does(sample):
    plain = models.build("cnn").eval()
    given = copy.deepcopy(plain)
    kernels.give(given, fused=True)
    first, second = (data.normalise(sample["val"].images[start : start + 5]) for start in (0, 5))
    recorded = torch.jit.trace(given, first)
    torch.testing.assert_close(recorded(second), plain(second))


# --- the library, and its compiler -----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in the place of .cache/kernels."""
    monkeypatch.setattr(kernels, "CACHE", tmp_path / "kernels")
    monkeypatch.setattr(kernels, "FLAGS", ["-O0", *kernels.FLAGS[1:]])  # compiled in less time
    kernels._try.cache_clear()
    return tmp_path / "kernels"


def compile_again():
    """As another process would; returns the libraries in the cache, after a look whether this one can be used."""
    kernels._try.cache_clear()
    assert kernels.library("float32").conv_pool_relu
    return sorted(kernels.CACHE.iterdir())


def truncate(path):
    content = path.read_bytes()[:9000]  # loading it would end the process
    path.unlink()  # this process has it loaded
    path.write_bytes(content)


def put_another(path):
    path.unlink()
    shutil.copy(Path(torch.__file__).with_name("lib") / "libtorch_global_deps.so", path)


def open_to_others(path):
    path.chmod(0o777)


def of_another_user(path):
    os.chown(path, 12345, 12345)


def link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("damage", [truncate, put_another, open_to_others, of_another_user, link])
def test_a_library_that_cannot_be_trusted_is_compiled_anew(cache, damage, monkeypatch):
    if damage is of_another_user and os.geteuid() != 0:
        pytest.skip("only root can do that")
    (path,) = compile_again()
    before = path.stat().st_ino, path.read_bytes()
    assert compile_again() == [path]
    assert path.stat().st_ino == before[0]  # found, not compiled
    damage(path)
    assert path in compile_again()
    assert (path.lstat().st_ino != before[0], path.read_bytes()) == (True, before[1])
    assert (path.lstat().st_uid, stat.S_IMODE(path.lstat().st_mode)) == (os.geteuid(), 0o755)


def test_a_pipe_or_a_library_that_cannot_be_loaded_is_compiled_anew(cache):
    (path,) = compile_again()
    stem = path.name.rpartition("-")[0]
    os.mkfifo(cache / f"{stem}-0.so")
    content = b"no library"
    (cache / kernels._name(stem, content)).write_bytes(content)
    assert path in compile_again()


def test_a_cache_that_others_can_write_to_is_closed_to_them_or_not_used(cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert len(compile_again()) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755
    if os.geteuid() == 0:
        shutil.rmtree(cache)
        cache.mkdir()
        os.chown(cache, 12345, 12345)
        with pytest.raises(kernels.KernelError, match=r"others can write to .*kernels, .*: remove it"):
            compile_again()
        assert list(cache.iterdir()) == []


@pytest.mark.parametrize("command", ["env gcc", "gcc -m64", "'{folder}/my gcc' -pipe"])
def test_a_compiler_with_words_after_it_is_used(command, cache, tmp_path, monkeypatch):
    (tmp_path / "my gcc").symlink_to(shutil.which("gcc"))
    monkeypatch.setenv("CC", command.format(folder=tmp_path))
    assert len(compile_again()) == 1


def script(path, lines):
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_hangs_or_writes_nonsense_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "TIMEOUT", 0.2)
    nonsense = r"printf '\033[2J\377 no\n' >&2; exit 1"
    cases = {
        script(tmp_path / "slow", "exec sleep 60"): "slow did not compile kernels.c within 0.2 s",
        script(tmp_path / "odd", nonsense): r"odd could not compile kernels.c: \\x1b\[2J. no",
        "true": "true could not compile kernels.c: no message",
        "gcc 'unfinished": "the variable CC, .*, is no command: No closing quotation",
    }
    for command, reason in cases.items():
        monkeypatch.setenv("CC", command)
        kernels._try.cache_clear()
        with pytest.raises(kernels.KernelError, match=reason):
            kernels.library("float32")
        assert list(cache.glob("*")) == []


# --- without a compiler ----------------------------------------------------------------------------------

COMPILERS = [
    ("/nowhere/cc", "the C compiler of the variable CC, /nowhere/cc, was not found"),
    ("false", "false could not compile SOURCE.c: no message"),
]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize(("compiler", "reason"), COMPILERS)
def test_without_a_compiler_training_continues_and_says_so(compiler, reason, name, tmp_path, monkeypatch):
    model = models.build("cnn")
    with monkeypatch.context() as patch:  # the script's process may be the first of many with this environment
        patch.setenv("CC", compiler)
        kernels._try.cache_clear()
        with pytest.raises(kernels.KernelError, match=reason.replace("SOURCE", "kernels")):
            kernels.give(model, fused=True)
    assert model.conv_relu_pool is models.conv_relu_pool
    kernels._try.cache_clear()
    finished = run_script(
        "train.py", "--model", name, "--recipe", "fast", "--epochs", "1", "--data-dir", SAMPLE,
        "--checkpoint-dir", tmp_path, before=partial(use_compiler, compiler),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert reason.replace("SOURCE", {"mlp": "mlp_step", "cnn": "kernels"}[name]) in finished.stderr
    assert "with PyTorch's own operations, more slowly" in finished.stderr
    assert json.loads((tmp_path / f"best_{name}_fmnist.json").read_text())["kernels"] == "PyTorch"


def use_compiler(name):
    os.environ["CC"] = name
