"""bench.py and peers.py: what is timed is what it says; the full run itself is no test."""

import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, run_script
from torchvision import datasets

import bench


def test_torchvision_reads_the_same_images_and_labels(sample, tmp_path):
    bench.write_for_torchvision(tmp_path, {"train": sample["train+val"], "t10k": sample["test"]})
    for train, split in ((True, sample["train+val"]), (False, sample["test"])):
        theirs = datasets.FashionMNIST(tmp_path, train=train)
        assert torch.equal(theirs.data, split.images)
        assert torch.equal(theirs.targets, split.labels)


def test_operations_of_a_training_step_are_those_by_hand():
    fc1, fc2 = 2 * 784 * 128, 2 * 128 * 10
    assert bench.flops_of_training("mlp") == 2 * fc1 + 3 * fc2  # the images need no gradient
    conv1, conv2, fc1 = 2 * 28 * 28 * 9 * 32, 2 * 14 * 14 * 9 * 32 * 64, 2 * 3136 * 128
    assert bench.flops_of_training("cnn") == 2 * conv1 + 3 * (conv2 + fc1 + fc2)


@pytest.mark.parametrize(
    "program",
    [
        {"program": "ours", "recipe": "published", "images": 2_500},
        {"program": "ours", "recipe": "fast", "images": 2_500},
        {"program": "tutorial"},
        {"program": "tutorial", "workers": 2},
        {"program": "scikit-learn"},
    ],
    ids=lambda program: " ".join(map(str, program.values())),
)
def test_every_peer_learns(program, sample, tmp_path):
    bench.write_for_torchvision(tmp_path, {"train": sample["train+val"], "t10k": sample["test"]})
    common = {"model": "mlp", "epochs": 20, "threads": 2, "data_dir": str(SAMPLE), "torchvision_dir": str(tmp_path)}
    worker = bench.Worker(**program, **common)
    assert all(0 < worker.ask("epoch")["seconds"] < 60 for _ in range(20))
    assert worker.ask("test")["accuracy"] > 0.6
    assert 100 < worker.ask("memory")["peak_mib"] < 4_000
    worker.close()


def test_a_worker_that_fails_says_why():
    with pytest.raises(RuntimeError, match="Dataset not found"):
        bench.Worker(program="tutorial", model="mlp", threads=1, data_dir=None, torchvision_dir=str(SAMPLE))


def test_the_benchmark_wants_the_whole_set():
    assert_one_line_error(run_script("bench.py", "--data-dir", SAMPLE), "needs the whole of Fashion-MNIST")
