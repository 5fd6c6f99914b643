"""kernels.py: the fused operations are PyTorch's, and where they cannot be had nothing is lost."""

import os

import pytest
import torch
from conftest import SAMPLE, run_script
from torch.nn import functional as F

import data
import kernels
import models


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_and_its_gradient_are_pytorchs_to_the_bit(dtype, fused):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, 14, 14, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(5, 64, 7, 7, generator=generator).to(dtype)
    results = []
    for function in (kernels.relu_pool, lambda x: F.relu(F.max_pool2d(x, 2))):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = function(leaf)
        output.backward(gradient)
        results.append((output, leaf.grad))
    assert type(results[0][0].grad_fn).__name__ == "_ReluPoolBackward"  # the fused one did run
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_block_and_its_gradients_are_pytorchs_but_for_rounding(dtype, sample, fused):
    conv = models.build("cnn").conv1
    images = data.normalise(sample["train"].images[:77])
    with autocast(dtype):
        output = kernels.conv_relu_pool(images, conv)
    assert type(output.grad_fn).__name__ == "_ConvReluPoolBackward"
    assert output.dtype == dtype
    expected = F.relu(F.max_pool2d(conv(images), 2))
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
def test_nan_is_passed_on_and_infinity_kept(dtype, sign, fused):
    x = torch.full((1, 32, 4, 4), -1.0, dtype=dtype)
    x[0, 0, 0, 1] = sign * float("nan")
    x[0, 1, 0, 1] = sign * float("inf")
    output = kernels.relu_pool(x.requires_grad_())
    assert output[0, 0, 0, 0].isnan()
    assert output[0, 1, 0, 0] == (float("inf") if sign > 0 else 0)
    conv = models.build("cnn").conv1
    with torch.no_grad():
        conv.weight[3] = float("nan")
    with autocast(dtype):
        output = kernels.conv_relu_pool(torch.ones(2, 1, 28, 28), conv)
    assert output[:, 3].isnan().all()
    assert output[:, :3].isfinite().all()


def test_what_the_kernels_do_not_fit_is_left_to_pytorch(fused):
    conv = torch.nn.Conv2d(1, 5, 3, padding=1)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(kernels.conv_relu_pool(images, conv), F.relu(F.max_pool2d(conv(images), 2)))
    for x in (torch.randn(2, 32, 7, 7), torch.randn(2, 5, 8, 8), torch.randn(2, 32, 8, 8, dtype=torch.float64)):
        assert torch.equal(kernels.relu_pool(x), F.relu(F.max_pool2d(x, 2)))


def test_gradients_do_not_depend_on_the_run(sample, fused):
    conv = models.build("cnn").conv1
    images = data.normalise(sample["train"].images[:501])
    first = None
    for _ in range(5):
        conv.zero_grad()
        kernels.conv_relu_pool(images, conv).square().sum().backward()
        first = conv.weight.grad.clone() if first is None else first
        assert torch.equal(conv.weight.grad, first)


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/nowhere/cc", "/nowhere/cc"), ("false", "false could not compile kernels.c: no message")]
)
def test_without_a_compiler_training_goes_on_and_says_so(compiler, reason, tmp_path):
    finished = run_script(
        "train.py", "--model", "cnn", "--recipe", "fast", "--epochs", "1", "--data-dir", SAMPLE,
        "--checkpoint-dir", tmp_path, env=os.environ | {"CC": compiler},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert reason in finished.stderr
    assert "training goes on with PyTorch's own operations" in finished.stderr
    assert (tmp_path / "best_cnn_fmnist.pt").exists()
