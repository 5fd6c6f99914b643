"""Several processes under torchrun: one training, the same as in one process but for rounding; it survives a kill."""

import json
import os
import re
import shlex
import signal
import socket
import sys
import time

import pytest
import torch
from conftest import SAMPLE, start_fork, start_training
from torch import nn
from torch.distributed.run import main

import checkpoint
import data
import engine
import metrics
import models
import recipes
import train
from runtime import cli

PROCESSES = 2
FLAGS = ["--model", "cnn", "--epochs", 3, "--batch-size", 33]
BEST = ["--recipe", "best", "--precision", "float32"]


def adapt_recipes():
    """No dropout, whose draws no two processes share; and images left out, whose losses each has a part of."""
    published, best = recipes.RECIPES["published"], recipes.RECIPES["best"]
    published["cnn"] = published["cnn"]._replace(dropout=0.0)
    best["mlp"] = best["mlp"]._replace(prune=0.5)


def write_from_the_first_alone():
    """Any other process dies of writing a file."""
    if os.environ["RANK"] != "0":
        os.replace = lambda *_: os.abort()  # the end of every write


def start(processes, folder, *flags, before=None, options=()):
    """Start such a training in its own process, which prints to a file beside the folder.

    before() is called in each worker first.
    """
    options = [*options, "--nproc-per-node", processes, "--master-port", free_port()]
    flags = [*flags, "--data-dir", SAMPLE, "--checkpoint-dir", folder]
    words = [[str(word) for word in part] for part in (options, flags)]
    return start_fork(folder.with_suffix(".log"), torchrun, *words, before)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def torchrun(options, flags, before):
    """Be torchrun with these options. Its workers are forks, in which PyTorch is loaded already."""
    from torch.distributed import launcher, run

    config, *_ = run.config_from_args(run.parse_args([*options, "--start-method", "fork", "train.py"]))
    launcher.elastic_launch(config, be_worker)(flags, before)


def be_worker(flags, before):
    """Be train.py in a process that torchrun started."""
    print(f"worker {os.environ['RANK']} is process {os.getpid()}", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in any new process of Python, not as in torchrun
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["train.py", *flags]
    if before:
        before()
    cli.run(train.main)


def ended(process, seconds=100):
    """The exit code of such a process."""
    process.join(seconds)
    assert process.exitcode is not None, "it takes too long"
    return process.exitcode


def run(processes, folder, *flags, **how):
    """Such a training to its end: the rows of its history."""
    assert ended(start(processes, folder, *flags, **how)) == 0, folder.with_suffix(".log").read_text()
    return rows(folder)


def rows(folder):
    (path,) = folder.glob("*.json")
    history = json.loads(path.read_text())
    assert history["status"] == "finished"
    times = ("seconds", "images_per_second")
    return [{key: value for key, value in row.items() if key not in times} for row in history["epochs"]]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_each_image_is_seen_once_an_epoch_by_one_process(sample, world):
    train = sample["train"]
    train = train._replace(labels=torch.arange(len(train.labels)))  # a number for each image
    shares = [list(data.batches(train, 32, 0, 1, rank=rank, world=world)) for rank in range(world)]
    for number, (images, labels) in enumerate(data.batches(train, 32, 0, 1)):
        parts = [share[number] for share in shares]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        sizes = [len(part[1]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_augmentation_does_not_depend_on_who_does_it(sample):
    images = sample["train"].images[:50]
    everything = recipes.ROBUST | {"shift": [2, 0.3]}
    torch.manual_seed(0)
    whole = data.augment(images, everything)
    for rank in range(3):
        part = data.share(50, rank, 3)
        torch.manual_seed(0)
        assert torch.equal(data.augment(images[part], everything, n=50, part=part), whole[part])
    none = slice(50, 50)  # a process that has no image of a batch
    assert len(data.augment(images[none], everything, n=50, part=none)) == 0


@pytest.mark.parametrize(
    ("flags", "tolerance", "machines"),
    [
        (["--model", "cnn", "--epochs", 2], 1e-3, 1),
        (["--model", "mlp", "--epochs", 3, *BEST], 1e-2, 1),  # Muon amplifies rounding; the second leaves images out
        (["--model", "mlp", "--epochs", 2, "--batch-size", 919], 1e-4, 2),  # of 920: the last batch has one image
    ],
    ids=["cnn", "augmented and pruned", "an image left over, on two machines"],
)
def test_one_and_two_processes_agree_in_their_curves(tmp_path, flags, tolerance, machines):
    how = {"before": adapt_recipes}
    alone = start_training(tmp_path / "1.log", *flags, "--data-dir", SAMPLE, "--checkpoint-dir", tmp_path / "1", **how)
    two = run(2, tmp_path / "2", *flags, **how) if machines == 1 else run_on_two_machines(tmp_path, *flags, **how)
    assert ended(alone) == 0
    one = rows(tmp_path / "1")
    assert one != two  # otherwise there were not two
    for a, b in zip(one, two, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=1.01 / 80 if "accuracy" in key else 0)


def run_on_two_machines(folder, *flags, **how):
    """As far as one machine can show: two torchruns that meet at an address. Either may get the first process."""
    options = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    machines = [start(1, folder / name, *flags, options=options, **how) for name in "ab"]
    assert [ended(machine) for machine in machines] == [0, 0]
    (path,) = folder.glob("[ab]/best_mlp_fmnist.json")
    assert json.loads(path.read_text())["processes"] == 2
    return rows(path.parent)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of FLAGS in PROCESSES; only the first of them can write."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(PROCESSES, folder, *FLAGS, before=write_from_the_first_alone)
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


def wait_until(true, agent, log):
    """Wait for what a run does; it must not end before."""
    while not true():
        assert agent.is_alive(), log.read_text()
        time.sleep(0.02)


def test_killed_workers_are_started_again_and_the_run_is_the_same_to_the_bit(tmp_path, uninterrupted, tally):
    """Each worker in its turn, the first one last, as soon as a new state is saved."""
    options = ["--max-restarts", PROCESSES]
    agent = start(PROCESSES, tmp_path / "run", *FLAGS, "--save-every", 0.001, options=options)
    state, log = tmp_path / "run" / "unfinished_cnn_fmnist.pt", tmp_path / "run.log"
    for number, rank in enumerate(reversed(range(PROCESSES)), 1):
        before = state.stat().st_mtime_ns if state.exists() else 0
        wait_until(lambda before=before: state.exists() and state.stat().st_mtime_ns > before, agent, log)
        os.kill(int(re.findall(rf"worker {rank} is process (\d+)", log.read_text())[-1]), signal.SIGKILL)
        # one restart must not serve two kills
        wait_until(lambda number=number: log.read_text().count("resumed") >= number, agent, log)
    assert ended(agent) == 0
    assert log.read_text().count("resumed") == PROCESSES
    tally("one of two processes killed", PROCESSES, [], [] if same(tmp_path / "run", uninterrupted) else [state])


def test_a_stop_of_all_is_one_clean_save(tmp_path, uninterrupted):
    agent, log = start(PROCESSES, tmp_path / "run", *FLAGS), tmp_path / "run.log"
    wait_until(lambda: log.exists() and "\n    1" in log.read_text(), agent, log)
    agent.terminate()
    ended(agent)
    torchrun = r"(?:torchrun|python -m torch\.distributed\.run) (--nproc-per-node=2 train\.py --model cnn --resume .*);"
    (words,) = re.findall(rf"interrupted .*, and saved; to continue: .*{torchrun}", log.read_text())
    assert ended(start_fork(log, main, shlex.split(words))) == 0, log.read_text()
    assert "resumed" in log.read_text()
    assert same(tmp_path / "run", uninterrupted)


class Norm(nn.Module):
    """A model with running statistics, a layer that it does not use, and a buffer of bool."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 40), nn.BatchNorm1d(40), nn.Linear(40, 10))
        self.unused = nn.Linear(40, 40)
        self.register_buffer("kept", torch.ones(10, dtype=torch.bool))

    def forward(self, images):
        return self.layers(images) * self.kept


def add_a_model():
    models.MODELS["norm"] = Norm


def test_all_processes_evaluate_with_the_running_statistics_of_the_file(tmp_path, sample, monkeypatch):
    (row,) = run(2, tmp_path / "run", "--model", "norm", "--epochs", 1, "--select", "test", before=add_a_model)
    monkeypatch.setattr(models, "MODELS", models.MODELS.copy())
    add_a_model()
    model, _ = checkpoint.load(tmp_path / "run" / "best_norm_fmnist.pt")
    figures = metrics.measure(engine.predict_logits(model, sample["test"]), sample["test"].labels)  # in two batches
    assert row["select_loss"] == pytest.approx(figures["log_loss"], rel=1e-5)
    assert model.layers[2].num_batches_tracked == 8  # the steps alone


@pytest.mark.parametrize("flags", [["--model", "vit"], ["--epochs", "0"], ["--model", "mlp", "--lr", "1e30"]])
def test_a_mistake_is_reported_once(tmp_path, flags):
    assert ended(start(2, tmp_path / "run", *flags)) != 0
    said = (tmp_path / "run.log").read_text()
    assert said.count("train.py: error: ") == 1
