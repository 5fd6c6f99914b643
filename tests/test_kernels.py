"""runtime/kernels.py: the fused operations are PyTorch's, for the model that gets them, and training can do without."""

import copy
import os
from functools import partial

import pytest
import torch
from conftest import SAMPLE, run_script
from torch.nn import functional as F

import data
import engine
import models
from runtime import kernels


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
    images = data.normalise(sample["train"].images[:77])
    with autocast(dtype):
        output = kernels.fused_conv_relu_pool(conv, images)
    assert type(output.grad_fn).__name__ == "_ConvReluPoolBackward"
    assert output.dtype == dtype
    expected = models.conv_relu_pool(conv, images)
    exact = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(output.float(), expected, atol=1e-6, rtol=exact)

    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    output.backward(gradient)
    ours = [conv.weight.grad.clone(), conv.bias.grad.clone()]
    conv.zero_grad()
    expected.backward(gradient.float())
    for a, b in zip(ours, [conv.weight.grad, conv.bias.grad], strict=True):  # of near ties, rounding picks another
        assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_passed_on_and_infinity_kept(dtype, sign):
    x = torch.full((1, 32, 4, 4), -1.0, dtype=dtype)
    x[0, 0, 0, 1] = sign * float("nan")
    x[0, 1, 0, 1] = sign * float("inf")
    output = kernels.fused_pool_relu(x.requires_grad_())
    assert output[0, 0, 0, 0].isnan()
    assert output[0, 1, 0, 0] == (float("inf") if sign > 0 else 0)
    conv = models.build("cnn").conv1
    with torch.no_grad():
        conv.weight[3] = float("nan")
    with autocast(dtype):
        output = kernels.fused_conv_relu_pool(conv, torch.ones(2, 1, 28, 28))
    assert output[:, 3].isnan().all()
    assert output[:, :3].isfinite().all()


def test_what_the_kernels_do_not_fit_is_left_to_pytorch():
    conv = torch.nn.Conv2d(1, 5, 3, padding=1)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(kernels.fused_conv_relu_pool(conv, images), models.conv_relu_pool(conv, images))
    for x in (torch.randn(2, 32, 7, 7), torch.randn(2, 5, 8, 8), torch.randn(2, 32, 8, 8, dtype=torch.float64)):
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
    assert torch.equal(engine.predict_logits(given, sample["val"]), engine.predict_logits(plain, sample["val"]))
    assert given.state_dict().keys() == plain.state_dict().keys()


# --- without a compiler ----------------------------------------------------------------------------------

COMPILERS = [("/nowhere/cc", "/nowhere/cc"), ("false", "false could not compile kernels.c: no message")]


@pytest.mark.parametrize(("compiler", "reason"), COMPILERS)
def test_without_a_compiler_training_continues_and_says_so(compiler, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    kernels.compiled.cache_clear()
    model = models.build("cnn")
    with pytest.raises(kernels.KernelError, match=reason):
        kernels.give(model, fused=True)
    assert model.conv_relu_pool is models.conv_relu_pool
    kernels.compiled.cache_clear()
    finished = run_script(
        "train.py", "--model", "cnn", "--recipe", "fast", "--epochs", "1", "--data-dir", SAMPLE,
        "--checkpoint-dir", tmp_path, before=partial(use_compiler, compiler),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert reason in finished.stderr
    assert "with PyTorch's own operations, more slowly" in finished.stderr
    assert (tmp_path / "best_cnn_fmnist.pt").exists()


def use_compiler(name):
    os.environ["CC"] = name
