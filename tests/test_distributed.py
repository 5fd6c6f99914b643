"""Several processes under torchrun: one training, the same as in one process to rounding, that survives its workers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SAMPLE, start_training

import data
import recipes

PROCESSES = 2
FLAGS = ["--model", "cnn", "--epochs", 8, "--batch-size", 33]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
ADAPTED = """
import sys
sys.path.append("tests")
import test_distributed, cli, train
test_distributed.adapt_recipes()
cli.run(train.main)
"""
WRITES_FROM_THE_FIRST_ALONE = """
import os
import checkpoint, cli, train
if os.environ["RANK"] != "0":
    checkpoint.write_atomically = checkpoint.write_json = lambda *_: os.abort()
cli.run(train.main)
"""


def start(processes, folder, *flags, code=None, options=()):
    """Start torchrun on train.py, or on the Python code given instead; it speaks to a file beside the folder."""
    script = ["--no-python", sys.executable, "-c", code] if code else ["train.py"]
    command = [*TORCHRUN, processes, *options, *script, *flags, "--data-dir", SAMPLE, "--checkpoint-dir", folder]
    with open(folder.with_suffix(".log"), "w") as log:
        return subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=log, stderr=log)


def run(processes, folder, *flags, **how):
    """Such a training to its end: the rows of its history."""
    assert start(processes, folder, *flags, **how).wait(100) == 0, folder.with_suffix(".log").read_text()
    return rows(folder)


def rows(folder):
    (path,) = folder.glob("*.json")
    history = json.loads(path.read_text())
    assert history["status"] == "finished"
    times = ("seconds", "images_per_second")
    return [{key: value for key, value in row.items() if key not in times} for row in history["epochs"]]


def adapt_recipes():
    """Without dropout, whose draws no two processes share; and images left out, whose losses each has a part of."""
    published, best = recipes.RECIPES["published"], recipes.RECIPES["best"]
    published["cnn"] = published["cnn"]._replace(dropout=0.0)
    best["mlp"] = best["mlp"]._replace(prune=0.5)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_each_image_is_seen_once_an_epoch_by_one_process(sample, world):
    train = sample["train"]
    train = train._replace(labels=torch.arange(len(train.labels)))  # which tell the images apart
    shares = [list(data.batches(train, 32, 0, 1, rank=rank, world=world)) for rank in range(world)]
    for number, (images, labels) in enumerate(data.batches(train, 32, 0, 1)):
        parts = [share[number] for share in shares]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        sizes = [len(part[1]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_augmentation_does_not_depend_on_who_does_it(sample):
    images = sample["train"].images[:50]
    everything = {"flip": True, "shift": 2, "still": 0.3, "erase": 6}
    torch.manual_seed(0)
    whole = data.augment(images, **everything)
    for rank in range(3):
        part = data.share(50, rank, 3)
        torch.manual_seed(0)
        assert torch.equal(data.augment(images[part], **everything, n=50, part=part), whole[part])


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--model", "cnn"], 1e-3),
        (["--model", "mlp", "--batch-size", "919"], 1e-4),  # of 920: the last batch leaves a process without an image
        (["--model", "mlp", "--recipe", "best", "--precision", "float32"], 1e-2),  # Muon amplifies rounding
    ],
    ids=["cnn", "an image left over", "augmented and pruned"],
)
def test_one_and_two_processes_agree_in_their_curves(tmp_path, flags, tolerance):
    flags += ["--epochs", 3, "--data-dir", SAMPLE]
    alone = start_training(tmp_path / "1.log", *flags, "--checkpoint-dir", tmp_path / "1", before=adapt_recipes)
    two = run(2, tmp_path / "2", *flags, code=ADAPTED)
    alone.join()
    one = rows(tmp_path / "1")
    assert one != two  # else there were not two
    for a, b in zip(one, two, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=1.01 / 80 if "accuracy" in key else 0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of FLAGS in PROCESSES, of which only the first is able to write."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(PROCESSES, folder, *FLAGS, code=WRITES_FROM_THE_FIRST_ALONE)
    return folder


def test_only_the_first_process_writes_and_speaks(uninterrupted):
    said = uninterrupted.with_suffix(".log").read_text()
    assert said.count("data: given folder") == said.count("test accuracy") == 1
    assert f"{PROCESSES} processes" in said
    assert json.loads((uninterrupted / "best_cnn_fmnist.json").read_text())["processes"] == PROCESSES


def same(folder, other):
    """Whether two runs ended in the same rows, and in the same checkpoint to the bit."""
    one, two = ((path / "best_cnn_fmnist.pt").read_bytes() for path in (folder, other))
    return rows(folder) == rows(other) and one == two


def test_killed_workers_are_started_again_and_the_run_is_the_same_to_the_bit(tmp_path, uninterrupted, tally):
    """Each worker in its turn, the first last, as soon as there is a new state saved."""
    options = ["--max-restarts", PROCESSES]
    torchrun = start(PROCESSES, tmp_path / "run", *FLAGS, "--save-every", 0.2, options=options)
    state = tmp_path / "run" / "unfinished_cnn_fmnist.pt"
    for rank in reversed(range(PROCESSES)):
        before = state.stat().st_mtime_ns if state.exists() else 0
        while not (state.exists() and state.stat().st_mtime_ns > before):
            assert torchrun.poll() is None, (tmp_path / "run.log").read_text()
            time.sleep(0.02)
        os.kill(worker(torchrun.pid, rank), signal.SIGKILL)
    assert torchrun.wait(100) == 0
    assert (tmp_path / "run.log").read_text().count("resumed") == PROCESSES
    tally("one of two processes killed", PROCESSES, [], [] if same(tmp_path / "run", uninterrupted) else [state])


def worker(parent, rank):
    """Process id of the worker of that rank below torchrun."""
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    for child in children:
        with open(f"/proc/{child}/environ", "rb") as file:
            if f"RANK={rank}".encode() in file.read().split(b"\0"):
                return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


def test_a_stop_of_all_is_one_clean_save(tmp_path, uninterrupted):
    torchrun = start(PROCESSES, tmp_path / "run", *FLAGS)
    while "\n    1" not in (tmp_path / "run.log").read_text():
        assert torchrun.poll() is None
        time.sleep(0.05)
    torchrun.terminate()
    torchrun.wait(60)
    said = (tmp_path / "run.log").read_text()
    assert re.search(r"interrupted .*, and saved; .*: torchrun --nproc-per-node=2 train.py --model cnn --resume", said)
    run(PROCESSES, tmp_path / "run", "--model", "cnn", "--resume")
    assert "resumed" in (tmp_path / "run.log").read_text()
    assert same(tmp_path / "run", uninterrupted)


def test_two_machines_are_one_training(tmp_path):
    """As far as one machine can show: two torchruns that meet at an address. Either may get the first process."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    options = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", address]
    machines = [start(1, tmp_path / name, "--model", "mlp", options=options) for name in "ab"]
    assert [machine.wait(100) for machine in machines] == [0, 0]
    (path,) = tmp_path.glob("*/best_mlp_fmnist.json")
    assert len(rows(path.parent)) == 5
    assert json.loads(path.read_text())["processes"] == 2


@pytest.mark.parametrize("flags", [["--model", "vit"], ["--epochs", "0"], ["--model", "mlp", "--lr", "1e30"]])
def test_a_mistake_is_told_once(tmp_path, flags):
    assert start(2, tmp_path / "run", *flags).wait(60) != 0
    said = (tmp_path / "run.log").read_text()
    assert said.count("train.py: error: ") == 1
