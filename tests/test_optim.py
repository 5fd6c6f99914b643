"""optim.py: Adam is PyTorch's, Muon is Muon, the learning rates rise and fall."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data
import engine
import models
import optim
import recipes


def gradients(model, sample):
    images, labels = next(data.batches(sample["train"], 64))
    torch.nn.functional.cross_entropy(model(data.normalise(images)), labels).backward()


def test_our_adam_is_that_of_pytorch_to_the_bit(sample):
    networks = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = models.build("cnn")
        parameters = model.parameters()
        optimizer = optim.FusedAdam(parameters, 1e-3) if ours else torch.optim.Adam(parameters, 1e-3, fused=True)
        training = engine.Training(model, sample["train"], None, recipes.Recipe(epochs=1, batch_size=32), seed=0)
        training.optimizers = [optimizer]
        next(training.run())
        networks.append((model, optimizer))
    for a, b in zip(networks[0][0].parameters(), networks[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in networks[0][1].state[a].items():
            assert torch.equal(value, networks[1][1].state[b][key])


@pytest.mark.parametrize("shape", [(128, 784), (10, 128), (300, 20)])
def test_orthogonalising_leaves_the_directions_and_evens_out_their_sizes(shape):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, min(shape), generator=generator))[0] for side in shape)
    sizes = torch.logspace(0, -1, min(shape))
    result = optim.orthogonalise((u * sizes) @ v.t())
    expected = sizes / sizes.norm()
    a, b, c = optim.NEWTON_SCHULZ
    for _ in range(optim.NEWTON_SCHULZ_STEPS):  # the iteration as published; ours is a rearrangement of it
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(u.t() @ result @ v, expected.diag(), atol=0.02, rtol=0.02)


def test_a_tiny_limit_finds_no_more_directions_than_there_are():
    images = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    directions = optim.WhitenedInputs(torch.nn.Linear(20, 4), images, 1e-30).directions
    torch.testing.assert_close(directions.T @ directions, torch.eye(5), atol=1e-4, rtol=0)
    assert optim.WhitenedInputs(torch.nn.Linear(20, 4), images[:1], 1.0).directions.shape == (20, 0)


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_a_layer_is_trained_as_if_its_inputs_were_whitened(name, sample):
    inputs, labels = data.normalise(sample["train"].images[:300]).flatten(1), sample["train"].labels[:300]
    pixels, whitened = torch.nn.Linear(784, 40), torch.nn.Linear(784, 40)
    ours = optim.WhitenedInputs(pixels, inputs, 5.0)
    values, directions = torch.linalg.eigh((inputs.double() - inputs.double().mean(0)).T.cov())
    large = directions[:, values > 5].float()
    assert large.shape[1] == 7  # of 784
    shrink = torch.eye(784) - large * (1 - (5 / values[values > 5].float()).sqrt()) @ large.T
    with torch.no_grad():
        whitened.weight.copy_(pixels.weight @ torch.linalg.inv(shrink))
        whitened.bias.copy_(pixels.bias + pixels.weight @ inputs.mean(0))
    shrunk = (inputs - inputs.mean(0)) @ shrink
    assert shrunk.T.cov().diagonal().sum() < 0.5 * inputs.T.cov().diagonal().sum()
    recipe = recipes.Recipe(epochs=1, optimizer=name, lr=0.001, muon_lr=0.02 if name == "muon" else 0.0)
    start = pixels.weight.detach().clone()
    for layer, x, around in ((pixels, inputs, ours), (whitened, shrunk, contextlib.nullcontext())):
        optimizers = optim.build_optimizers(layer, recipe)
        for _ in range(5):
            layer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), labels).backward()
            with around:
                [optimizer.step() for optimizer in optimizers]
    change = pixels.weight - start
    assert change.abs().mean() > 0.0005
    assert (change - (whitened.weight @ shrink - start)).norm() < 0.03 * change.norm()  # Adam enlarges rounding near 0
    torch.testing.assert_close(pixels(inputs), whitened(shrunk), atol=0.01, rtol=0.01)


def test_orthogonalising_nothing_gives_nothing():
    assert torch.equal(optim.orthogonalise(torch.zeros(8, 20)), torch.zeros(8, 20))


def test_muon_on_a_matrix_agrees_with_pytorchs(monkeypatch):
    monkeypatch.setattr(optim, "NEWTON_SCHULZ_STEPS", 5)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 100, generator=generator)
    steps = [torch.randn(40, 100, generator=generator) for _ in range(4)]
    ends = []
    for optimizer_class in (optim.Muon, torch.optim.Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class([weight], lr=0.1, weight_decay=0.01)
        for gradient in steps:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.03 * ends[1].norm()  # PyTorch's iterates in bfloat16


def test_muon_takes_the_large_matrices_and_adam_everything_else():
    model = models.build("cnn")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adam = optim.build_optimizers(model, recipes.Recipe(epochs=1, optimizer="muon", muon_lr=0.1))
    taken = [[names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adam)]
    assert taken[0] == ["conv2.weight", "fc1.weight"]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())


def test_muon_changes_a_convolution_whatever_its_memory_format(sample):
    ends = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = models.build("cnn").to(memory_format=memory_format).eval()
        gradients(model, sample)
        optim.Muon([model.conv2.weight], lr=0.1).step()
        ends.append(model.conv2.weight.detach().contiguous())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-3, rtol=0.02)


def test_a_large_matrix_without_a_gradient_is_left_as_it_is():
    """As of a layer that is frozen, or that a step does not use; also where there is no other."""
    weights = [torch.nn.Parameter(torch.ones(40, 40)), torch.nn.Parameter(torch.ones(4))]
    for optimizer in (optim.Muon(weights[:1], 0.1, weight_decay=0.1), optim.FusedAdam(weights, 0.1)):
        optimizer.step()
        assert not optimizer.state_dict()["state"]
    assert all((weight == 1).all() for weight in weights)
    recipe = recipes.Recipe(epochs=1, optimizer="muon", muon_lr=0.1)
    kinds = [type(each) for each in optim.build_optimizers(torch.nn.Linear(20, 10), recipe)]
    assert kinds == [optim.FusedAdam]
    assert [type(each) for each in optim.build_optimizers(torch.nn.Linear(40, 40, bias=False), recipe)] == [optim.Muon]


BF16, AMX, OLD = {"avx512_bf16": True}, {"amx_bf16": True, "avx512_bf16": True}, {"avx2": True, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "environment", "onednn", "expected"),
    [
        (BF16, {}, True, True),
        (AMX, {}, True, True),
        (OLD, {}, True, False),
        ({}, {}, True, False),  # another architecture
        (BF16, {}, False, False),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, True, False),
        (AMX, {"DNNL_MAX_CPU_ISA": "avx512_core_vnni"}, True, False),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, True),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX", "DNNL_MAX_CPU_ISA": "AVX2"}, True, True),  # the first counts
        (OLD, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True, False),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, True, True),
        (AMX, {"ONEDNN_MAX_CPU_ISA": ""}, True, True),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "no such name"}, True, True),
        (AMX, {"ATEN_CPU_CAPABILITY": "avx2"}, True, True),
    ],
)
def test_bfloat16_is_native_where_onednn_may_use_it(capabilities, environment, onednn, expected):
    assert optim.multiplies_bfloat16(capabilities, environment, onednn) is expected


def test_onednn_limited_to_avx2_multiplies_no_bfloat16_natively():
    """PyTorch itself then does it, and oneDNN has nothing to report."""
    code = (
        "import optim, torch; print(optim.NATIVE_BFLOAT16)\n"
        "torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("False\n")
    assert "matmul" not in said


def test_the_learning_rate_is_constant_as_published_or_a_triangle():
    published, triangle = recipes.Recipe(epochs=1), recipes.Recipe(epochs=1, warmup=0.25)
    assert {optim.rate(published, step, 8) for step in range(8)} == {1.0}
    shares = [optim.rate(triangle, step, 8) for step in range(8)]
    assert shares == pytest.approx([0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    optimizer = optim.FusedAdam([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for share in (0.5, 0.2):
        optim.set_rates([optimizer], share)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * share)
