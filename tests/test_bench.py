"""bench.py and benchmarks/: what is timed is what the tables say; the full run itself is no test."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, in_a_fork, run_script
from torchvision import datasets

import bench
import data
import models
import recipes
from benchmarks import gpu, measure, neighbours, peers
from runtime import device

SPEED = (ROOT / "docs" / "speed.md").read_text()


def test_torchvision_reads_the_same_images_and_labels(sample, tmp_path):
    measure.write_for_torchvision(tmp_path, {"train": sample["train+val"], "t10k": sample["test"]})
    for train, split in ((True, sample["train+val"]), (False, sample["test"])):
        theirs = datasets.FashionMNIST(tmp_path, train=train)
        assert torch.equal(theirs.data, split.images)
        assert torch.equal(theirs.targets, split.labels)


def test_operations_of_a_training_step_are_those_by_hand():
    fc1, fc2 = 2 * 784 * 128, 2 * 128 * 10
    flop = {name: models.count_flop(models.build(name), training=True) for name in ("mlp", "cnn")}
    assert flop["mlp"] == 2 * fc1 + 3 * fc2  # the images need no gradient
    conv1, conv2, fc1 = 2 * 28 * 28 * 9 * 32, 2 * 14 * 14 * 9 * 32 * 64, 2 * 3136 * 128
    assert flop["cnn"] == 2 * conv1 + 3 * (conv2 + fc1 + fc2)


PROGRAMS = [
    {"program": "ours", "recipe": "published", "images": 2_500},
    {"program": "ours", "recipe": "fast", "images": 2_500},
    {"program": "tutorial"},
    {"program": "lightning"},
    {"program": "in memory"},
    {"program": "scikit-learn"},
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: " ".join(map(str, program.values())))
def test_every_peer_learns(program, sample, tmp_path):
    skip_without(program["program"])
    measure.write_for_torchvision(tmp_path, {"train": sample["train+val"], "t10k": sample["test"]})
    accuracy, peak = in_a_fork(learn, {"torchvision_dir": str(tmp_path)} | program)
    assert accuracy > 0.6
    assert 100 < peak < 4_000


def skip_without(program):
    """Skip a test of a program of peers.py whose packages are not installed."""
    if not all(map(importlib.util.find_spec, measure.NEEDS.get(program, []))):
        pytest.skip(f"{program} is not installed")


def learn(options):
    """Train a peer; its accuracy and the MiB of its process."""
    options = {"model": "mlp", "epochs": 5, "data_dir": str(SAMPLE)} | options
    program = peers.PROGRAMS[options["program"]](**options)
    assert all(0 < peers.answer(program, "epoch")["seconds"] < 60 for _ in range(options["epochs"]))
    return peers.answer(program, "test")["accuracy"], peers.answer(program, "memory")["peak_mib"]


def test_the_peers_on_jax_learn_and_the_loop_by_hand_computes_what_pytorch_does():
    skip_without("keras")  # requirements-bench.txt has both
    learnt, (ours, theirs) = in_a_fork(train_on_jax)
    for accuracy, peak in learnt:
        assert accuracy > 0.6
        assert 100 < peak < 4_000
    assert ours == pytest.approx(theirs, rel=1e-4)


def train_on_jax():
    """All that needs JAX, in one process, since its start and its compiling take seconds."""
    return [learn({"program": program}) for program in ("keras", "jax")], train_in_jax_and_pytorch()


def train_in_jax_and_pytorch():
    """Losses of the MLP's first steps, and logits of the CNN, by JAX and by PyTorch."""
    import jax

    images, labels = torch.randint(256, (20, 28, 28), dtype=torch.uint8), torch.arange(20) % 10
    network, cnn = peers.pytorch_network("mlp"), peers.pytorch_network("cnn").eval()
    layers = [(layer.weight.detach().t().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in network[1::2]]
    zeros = jax.tree.map(jax.numpy.zeros_like, layers)
    state, optimizer = (layers, zeros, zeros, jax.numpy.zeros(())), torch.optim.Adam(network.parameters(), lr=1e-3)
    ours, theirs, step = [], [], jax.jit(peers.jax_step)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(network(data.normalise(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state, total = step(state, images.numpy(), labels.numpy(), jax.random.key(0), jax.numpy.arange(20))
        ours.append(float(total) / 20)
        theirs.append(loss.item())
    conv1, conv2, fc1, fc2 = (cnn[place] for place in (0, 3, 7, 10))
    weights = [conv1.weight.permute(2, 3, 1, 0), conv2.weight.permute(2, 3, 1, 0)]
    weights += [fc1.weight.reshape(128, 64, 7, 7).permute(2, 3, 1, 0).reshape(3136, 128), fc2.weight.t()]
    biases = [layer.bias for layer in (conv1, conv2, fc1, fc2)]
    layers = [(w.detach().numpy(), b.detach().numpy()) for w, b in zip(weights, biases, strict=True)]
    ours += [float(jax.jit(peers.jax_logits)(layers, images.numpy())[0, 0])]
    return ours, [*theirs, cnn(data.normalise(images))[0, 0].item()]


def test_a_neighbour_is_busy_and_ends_with_the_benchmark():
    command = [sys.executable, "-c", neighbours.NEVER_RESTS, "60"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        begin = time.monotonic()
        while time.monotonic() < begin + 0.5 and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        process.stdin.close()  # as when bench.py is killed
        assert process.wait(10) == 0
    assert subprocess.run([*command[:3], "0.1"], stdin=subprocess.PIPE, timeout=10).returncode == 0


def test_the_gpu_check_says_what_is_missing_and_its_curves_pass_on_the_cpu(sample, monkeypatch):
    if not torch.cuda.is_available():
        assert_one_line_error(run_script("benchmarks.gpu"), "device 'cuda' cannot be used")
    rows = {name: {"mlp": models["mlp"]} for name, models in recipes.RECIPES.items() if "mlp" in models}
    monkeypatch.setattr(recipes, "RECIPES", rows)
    checks = list(gpu.curves(torch.device("cpu"), sample["train+val"]))
    assert len(checks) == 2 * len(rows)
    assert not any(wrong for _, wrong in checks)
    monkeypatch.setattr(gpu, "TOLERANCES", {"float32": -1})
    assert all("on the CPU" in wrong for _, wrong in gpu.curves(torch.device("cpu"), sample["train+val"]))


@pytest.mark.parametrize(
    ("recipe", "kernel"), [("published", "fused_conv_relu_pool"), ("fast", "fused_conv_relu_pool")]
)
def test_our_loop_is_timed_with_the_operations_that_train_gives_it(recipe, kernel):
    ours = peers.Ours("cnn", recipe, str(SAMPLE), images=100, epochs=1)
    assert ours.model.conv_relu_pool.__name__ == kernel


def test_a_worker_that_fails_says_why():
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
        measure.Worker(program="nonsense", threads=1)
    with pytest.raises(RuntimeError, match="Dataset not found"):
        peers.loaders(str(SAMPLE))


class Counting:
    """A worker that trains nothing: every epoch takes 2 s and adds 0.05 to the accuracy."""

    asked: list[tuple[str, str]]

    def __init__(self, **options):
        self.name = options["program"] + str(options.get("seed", ""))
        self.epochs = 0

    def ask(self, word):
        self.begin(word)
        return self.answer()

    def begin(self, word):
        self.asked.append((self.name, word))
        self.epochs += word == "epoch"

    def answer(self):
        return {"seconds": 2.0, "accuracy": 0.8 + 0.05 * self.epochs, "peak_mib": 7.0}

    def epoch_seconds(self):
        return self.ask("epoch")["seconds"]

    def close(self):
        self.asked.append((self.name, "close"))


@pytest.fixture
def asked(monkeypatch):
    """Put Counting in the place of Worker; the list of what the workers are asked."""
    monkeypatch.setattr(measure, "Worker", Counting)
    monkeypatch.setattr(neighbours, "Worker", Counting)
    monkeypatch.setattr(Counting, "asked", [], raising=False)
    return Counting.asked


def test_programs_take_turns_and_a_run_is_measured_to_the_target(asked, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES["fast"], "mlp", recipes.find("fast", "mlp")._replace(epochs=3))
    programs = {"tutorial loop": {"program": "tutorial"}, "ours, fast": {"program": "ours", "recipe": "fast"}}
    rows = measure.epochs("mlp", programs, {}, 2, print)
    assert asked[:4] == [("tutorial", "epoch"), ("tutorial", "test"), ("ours", "epoch"), ("ours", "test")]
    assert rows["ours, fast"] == {
        "seconds": 2.0, "all_seconds": [2.0, 2.0], "test_images_per_second": 5_000, "peak_mib": 7.0,
        "first_seconds": 2.0,
    }  # fmt: skip
    measure.add_limits(rows, 4e9, {"bfloat16": 8.0})
    assert (rows["ours, fast"]["gflops"], rows["ours, fast"]["share_of_bfloat16"]) == (2.0, 0.25)
    goal = measure.to_target("mlp", {}, False, print)
    assert goal["tutorial"] == {
        "seconds": 4.0, "epochs": 2, "mean_accuracies": [pytest.approx(0.85), pytest.approx(0.9)], "seeds": 3,
        "reached": True,
    }  # fmt: skip
    assert (goal["ours"]["seconds"], goal["ours"]["seeds"], goal["ratio"]) == (6.0, 5, pytest.approx(2 / 3))
    assert (goal["ours"]["mean_accuracy"], goal["ours"]["reached"]) == (pytest.approx(0.95), True)
    quick = measure.to_target("mlp", {}, True, print)
    assert (quick["ours"]["seeds"], "tutorial" in quick) == (2, False)
    assert sum(word == "close" for _, word in asked) == 2 + 3 + 5 + 2


def test_a_quick_benchmark_writes_its_tables_numbers_and_figure(asked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "TRAINING_IMAGES", 1_000)
    monkeypatch.setattr(measure, "MATRIX_SIZES", (64,))
    monkeypatch.setattr(measure, "MATRIX_SECONDS", 0.0)
    commands = measure.commands
    monkeypatch.setattr(measure, "commands", lambda *given: {name: ["-c", "pass"] for name in commands(*given)})
    monkeypatch.setattr(measure, "write_for_torchvision", lambda folder, parts: None)
    assert bench.main(["--quick", "--data-dir", str(SAMPLE), "--figures-dir", str(tmp_path / "new")]) == 0
    results = json.loads((tmp_path / "new" / "bench_quick.json").read_text())
    assert results.keys() == json.loads((ROOT / "docs" / "figures" / "bench.json").read_text()).keys()
    assert list(results["epoch"]["mlp"]) == list(measure.peers(torch.device("cpu")))
    assert results["limit_gflops"]["float32"] == max(results["products"]["float32"].values())
    assert [row["images"] for row in results["growth"]] == [6_000, 60_000]
    assert {"import torch", "evaluate.py", "predict.py PICTURE"} <= results["start_up"].keys()
    for row in results["neighbours"]:
        assert row["beside"].keys() == {"1", "3"}
        assert len(row["two"]) == 2
    assert (tmp_path / "new" / "bench_quick.png").read_bytes().startswith(b"\x89PNG")
    assert bench.markdown(results) in capsys.readouterr().out


def test_the_machine_is_named_once():
    machine = measure.machine(torch.device("cpu"))
    assert f"{machine['processor']} with {', '.join(machine['features'])}".removesuffix(" with ") == device.processor()
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_benchmark_wants_the_whole_set():
    assert_one_line_error(run_script("bench.py", "--data-dir", SAMPLE), "needs the whole of Fashion-MNIST")


def test_a_worker_answers_on_standard_output_alone(sample, tmp_path):
    measure.write_for_torchvision(tmp_path, {"train": sample["train+val"], "t10k": sample["test"]})
    options = {"program": "tutorial", "workers": 2, "model": "mlp", "threads": 1, "torchvision_dir": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.peers", json.dumps(options)]
    words = "epoch\nepoch\ntest\nmemory\n"
    worker = subprocess.run(command, cwd=ROOT, input=words, capture_output=True, text=True, timeout=120, check=True)
    ready, *epochs, test, memory = map(json.loads, worker.stdout.splitlines())
    assert ready == {"ready": True}
    assert all(epoch.keys() == {"seconds"} for epoch in epochs)
    assert test["accuracy"] > 0.3
    assert memory.keys() == {"peak_mib", "seconds"}


def test_the_speed_page_is_that_of_the_benchmark():
    results = json.loads((ROOT / "docs" / "figures" / "bench.json").read_text())
    for part in bench.markdown(results).split("\n\n"):
        assert part in SPEED
    sentences = " ".join(SPEED.split())
    for model, name in (("mlp", "MLP"), ("cnn", "CNN")):
        goal, rows = results["to_target"][model], results["epoch"][model]
        assert f"{goal['ours']['seconds']:.1f} seconds ({name})" in sentences
        ratio = rows["tutorial loop"]["seconds"] / rows["ours, published"]["seconds"]
        assert f"{ratio:.1f} times ({name})" in sentences
    mlp, cnn = (results["to_target"][model]["ratio"] for model in ("mlp", "cnn"))
    assert f"{mlp:.0f} times and {cnn:.0f} times as fast" in sentences
