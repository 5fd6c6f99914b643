"""sweep.py: runs are named, checked, shared among processes, and survive whatever cuts them off."""

import contextlib
import json
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pytest
from conftest import SAMPLE, _script, assert_one_line_error, in_a_fork, run_script, start_fork, without_times

import recipes
from runtime.errors import UserError
from training import pool, record, search, space, sweeps
from training.plan import Request

GRID = ("--model", "mlp", "--set", "batch_size=16", "epochs=3", "lr=0.001,0.004", "--seeds", 2)
SEARCH = ("--model", "mlp", "--recipe", "fast", "--set", "epochs=2", "--trials", 3)
JOURNAL = Path("search-mlp-fast-val", "journal.log")
SPACE = ("--search", "muon_lr=log:0.01..0.2", "batch_size=64,128")


def share_the_forkserver():
    """Let sweep.py start its workers by the forkserver of the tests, in which PyTorch is loaded."""
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None


def start(log, *arguments):
    """Start sweep.py on the sample in a new process, which prints to the file `log`."""
    words = [str(word) for word in (*arguments, "--data-dir", SAMPLE)]
    return start_fork(log, _script, "sweep.py", words, share_the_forkserver)


def sweep(*arguments):
    """The finished process of sweep.py on the sample."""
    return run_script("sweep.py", *arguments, "--data-dir", SAMPLE, before=share_the_forkserver)


def outcome(folder):
    """What runs have left, by file, without the times and the logs; a search's trials and results too."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.txt", "journal.log")]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return without_times(contents)


def workers(folder):
    """The processes that train a run below a folder now, by its name."""
    found = {}
    for path in folder.rglob(".claim"):
        with contextlib.suppress(ProcessLookupError):
            if pid := pool.lease_on(path).pid:
                os.kill(pid, 0)
                found[path.parent.name] = pid
    return found


def wait_until(true, process, seconds=30):
    until = time.monotonic() + seconds
    while not true() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The folder, the output and the outcome of a grid that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("expected")
    finished = sweep(*GRID, "--dir", folder)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout, outcome(folder)


# --- a grid ----------------------------------------------------------------------------------------------


def test_a_grid_trains_each_combination_in_a_folder_with_its_name(expected):
    folder, said, files = expected
    names = {
        f"mlp-published-epochs=3-batch_size=16-lr={lr}-seed={seed}" for lr in ("0.001", "0.004") for seed in (0, 1)
    }
    assert {path.name for path in folder.iterdir()} == names
    assert {name.split("/")[1] for name in files} == {"best_mlp_fmnist.pt", "best_mlp_fmnist.json"}
    for name in names:
        history = files[f"{name}/best_mlp_fmnist.json"]
        assert f"lr={history['flags']['lr']}-seed={history['seed']}" in name
        differing = name.partition("batch_size=16-")[2].replace("-", " ")  # the rest is the same in all names
        assert f"] {differing}: {history['test']['accuracy']:.2%}" in said
        assert "test accuracy" in (folder / name / "log.txt").read_text()
    assert re.search(r"lr.*\n.*0\.00[14] +2 ", said)  # the table of compare.py: n = 2


def test_finished_runs_are_not_trained_again(expected):
    folder, *_ = expected
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = sweep(*GRID, "--dir", folder, "--jobs", 2)
    assert again.returncode == 0
    assert "4 of 4 runs have ended before" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def cut_off(folder, kind, after):
    """Start the grid, and after so many seconds of training kill its process or its worker, or press Ctrl-C."""
    log, before = folder.with_suffix(".log"), set(workers(folder).values())
    process = start(log, *GRID, "--dir", folder)
    wait_until(lambda: {*workers(folder).values()} - before, process)
    time.sleep(after)
    if kind == "a worker":
        for pid in workers(folder).values():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)  # in which the worker is replaced
    with contextlib.suppress(ProcessLookupError):  # the sweep has ended before
        os.kill(process.pid, signal.SIGINT if kind == "Ctrl-C" else signal.SIGKILL)
    process.join(60)
    if kind == "Ctrl-C" and process.exitcode:
        assert process.exitcode == 130
        assert re.search("the same command goes on|interrupted", log.read_text())  # or it was past the last run
        assert not workers(folder)  # all have saved themselves and ended


def test_a_sweep_that_is_cut_off_at_any_moment_ends_with_the_same_bits(expected, tmp_path, tries, tally):
    lost, wrong, moments = [], [], random.Random(0)
    for number in range(tries):
        for kind in ("its process", "a worker", "Ctrl-C"):
            cut_off(tmp_path / f"cut{number}", kind, moments.uniform(0, 0.5))
        finished = sweep(*GRID, "--dir", tmp_path / f"cut{number}", "--jobs", 2)
        lost += [finished.stderr] if finished.returncode else []
        wrong += [number] if outcome(tmp_path / f"cut{number}") != expected[2] else []
    tally("a sweep's process or worker killed, or Ctrl-C", 3 * tries, lost, wrong)


def press_ctrl_c_while_the_workers_begin(log, words):
    """Start sweep.py in a process group of its own, which gets SIGINT, as from a terminal, while PyTorch is loaded."""
    process = start_fork(log, _script, "sweep.py", [*map(str, words), "--data-dir", str(SAMPLE)], os.setpgrp)
    wait_until(lambda: log.exists() and "data:" in log.read_text(), process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert "0 of 4 runs have ended; the same command goes on" in log.read_text()


def test_two_processes_share_a_folder_and_one_goes_on_when_the_other_dies(expected, tmp_path):
    words = (*GRID, "--dir", tmp_path / "shared")
    press_ctrl_c_while_the_workers_begin(tmp_path / "log", words)
    one, other = (start(tmp_path / f"log{number}", *words) for number in range(2))
    wait_until(lambda: len(workers(tmp_path / "shared")) == 2, one)
    held = workers(tmp_path / "shared")
    one.kill()
    other.join(60)
    assert other.exitcode == 0
    assert outcome(tmp_path / "shared") == expected[2]
    for log in (tmp_path / "shared").glob(
        "*/log.txt"
    ):  # each run was begun once, but for what the dead one had in hand
        assert log.read_text().count("test accuracy") == 1
        assert log.read_text().count("parameters on") == 1 or log.parent.name in held


def test_a_run_that_cannot_be_trained_does_not_stop_the_others(tmp_path):
    words = ("--model", "mlp", "--set", "epochs=1", "lr=0.001,1e37", "--dir", tmp_path)
    for _ in range(2):  # the second time it is not tried again
        finished = sweep(*words)
        assert finished.returncode == 1
        assert re.search(r"lr=1e[+]37-seed=0 failed: .*loss.* to try again, delete ", finished.stderr)
        assert "n = 1" in finished.stdout or re.search(r"lr=0.001|mlp", finished.stdout)
    assert (tmp_path / "mlp-published-epochs=1-lr=0.001-seed=0" / "best_mlp_fmnist.pt").exists()
    assert (tmp_path / "mlp-published-epochs=1-lr=1e+37-seed=0" / "log.txt").read_text().count("parameters on") == 1


def is_free(folder):
    with pool.Claims().claim(folder) as claimed:
        return claimed


class Deadly(sweeps.Grid):
    """A grid in which one run kills the process that trains it."""

    def carry_out(self, job):
        if job.request.seed == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().carry_out(job)


def ends_of_a_deadly_grid(folder):
    share_the_forkserver()
    plan = Deadly(sweeps.grid(Request("mlp", data_dir=SAMPLE, other_data=True), folder, ["epochs=1"], range(2)))
    return pool.carry_out(plan, 1), plan.states()


def test_a_run_whose_process_dies_again_and_again_counts_as_failed(tmp_path):
    code, states = in_a_fork(ends_of_a_deadly_grid, tmp_path)
    first, second = states.values()
    assert code == 0
    assert re.match("its process died 3 times", first.failure)
    assert second.accuracy


def test_a_claim_of_another_machine_is_free_once_it_shows_no_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "LEASE", 0.3)
    with pool.Claims().claim(tmp_path) as claimed:
        assert claimed
        record = (tmp_path / ".claim").read_text()
        with ThreadPoolExecutor() as threads:
            assert not threads.submit(is_free, tmp_path).result()
    (tmp_path / ".claim").write_text(re.sub("host=.*", "host=elsewhere", record))
    claims, taken = pool.Claims(), []
    begun = time.monotonic()
    while not taken and time.monotonic() - begun < 10:
        with claims.claim(tmp_path) as claimed:
            taken += [time.monotonic() - begun] if claimed else []
    assert taken[0] > 0.25
    monkeypatch.setattr(pool, "EMPTY", 0.2)
    (tmp_path / ".claim").touch()  # by a process that died before it wrote
    with pool.lease_on(tmp_path / ".claim"):
        assert (tmp_path / ".claim").read_text()


def test_a_run_that_a_stalled_process_still_writes_is_left_to_it(expected, tmp_path):
    words = (
        "--model",
        "mlp",
        "--set",
        "batch_size=16",
        "epochs=3",
        "lr=0.001",
        "--seeds",
        2,
        "--dir",
        tmp_path / "runs",
    )
    held, other = (tmp_path / "runs" / f"mlp-published-epochs=3-batch_size=16-lr=0.001-seed={seed}" for seed in (0, 1))
    held.mkdir(parents=True)
    with record.sole_writer(held / "best_mlp_fmnist.pt"):
        process = start(tmp_path / "log", *words)
        log = tmp_path / "log"
        wait_until(lambda: log.exists() and "waiting for other processes" in log.read_text(), process)
        assert (other / "best_mlp_fmnist.json").exists()
        assert not (held / "best_mlp_fmnist.json").exists()
    process.join(60)
    assert process.exitcode == 0
    assert outcome(held) == {
        name.partition("/")[2]: content for name, content in expected[2].items() if name.startswith(f"{held.name}/")
    }


# --- a search --------------------------------------------------------------------------------------------


def trials(folder):
    """The values and results of the trials in a folder, read by Optuna itself."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    return [(trial.state.name, trial.params, trial.value, trial.intermediate_values) for trial in study.trials]


def test_a_search_is_confirmed_with_other_seeds_and_shared_by_processes_of_which_one_dies(tmp_path):
    finished = sweep(*SEARCH, *SPACE, "--dir", tmp_path / "whole")
    assert finished.returncode == 0, finished.stderr
    whole = trials(tmp_path / "whole")
    assert [state for state, *_ in whole] == ["COMPLETE"] * 3
    assert all(value == steps[2] and len(steps) == 2 for *_, value, steps in whole)  # the last epoch counts
    best = max(range(3), key=lambda number: whole[number][2])
    assert f"the best of 3 trials is trial-{best:03}: epochs=2 muon_lr=" in finished.stdout
    assert f"in the search, one seed: {whole[best][2]:.2%}" in finished.stdout
    assert len(re.findall(r"%, n = 5, [\d.]+ s of training", finished.stdout)) == 2
    assert "Against" not in finished.stdout  # one report of the confirmation
    files = outcome(tmp_path / "whole")
    runs = [files[name] for name in files if "confirm" in name and name.endswith(".json")]
    means = {}
    for values in {run["flags"]["muon_lr"] for run in runs}:
        same = [run for run in runs if run["flags"]["muon_lr"] == values]
        assert sorted(run["seed"] for run in same) == [1, 2, 3, 4, 5]  # the trials had seed 0
        assert {(run["flags"]["fold"], run["flags"]["select"]) for run in same} == {("val", "last")}
        means[values] = mean(run["test"]["accuracy"] for run in same)
    assert len(means) == 2
    assert all(f"{100 * value:.2f} ± " in finished.stdout for value in means.values())

    confirmed = "search-mlp-fast-val/confirm"  # whose runs are those of a grid, which another test kills
    shutil.copytree(tmp_path / "whole" / confirmed, tmp_path / "shared" / confirmed)
    words = (*SEARCH, *SPACE, "--dir", tmp_path / "shared")
    one, other = (start(tmp_path / f"log{number}", *words) for number in range(2))
    wait_until(lambda: len(workers(tmp_path / "shared")) == 2, one)
    one.kill()
    other.join(60)
    assert other.exitcode == 0, (tmp_path / "log1").read_text()
    assert trials(tmp_path / "shared") == whole
    assert outcome(tmp_path / "shared") == files

    lines = (tmp_path / "whole" / JOURNAL).read_text().splitlines(keepends=True)
    drawn = [
        n
        for n, line in enumerate(lines)
        if {"param_name", "trial_id"} <= (each := json.loads(line)).keys() and each["trial_id"] == 1
    ]
    assert len(drawn) == 2
    for name in ("trial-001", "trial-002"):
        shutil.rmtree(tmp_path / "shared" / JOURNAL.parent / name)
    (tmp_path / "shared" / JOURNAL).write_text("".join(lines[: drawn[1]]))  # cut off between the values of a trial
    assert sweep(*words).returncode == 0
    assert trials(tmp_path / "shared") == whole
    (tmp_path / "shared" / JOURNAL).write_text("".join([*lines[:3], "{\n", *lines[4:]]))
    assert_one_line_error(sweep(*words), "journal.log is damaged", "another --dir")

    more = sweep(*SEARCH, "--search", "muon_lr=log:0.01..0.2", "--dir", tmp_path / "whole")
    assert_one_line_error(more, "holds a search of another space: give this search another --dir")


def carry_out_a_search(folder, words, total):
    """Search among these values in this process. Returns the exit code, and how the trials ended."""
    share_the_forkserver()
    base = Request("mlp", recipe="fast", fold="val", data_dir=SAMPLE, other_data=True)
    found = search.plan(base, folder, ["epochs=1"], words, total)
    return pool.carry_out(found, 1), found.states()


def test_a_trial_with_the_values_of_an_earlier_one_is_not_trained(tmp_path):
    code, states = in_a_fork(carry_out_a_search, tmp_path, ["batch_size=64,128", "flip=true,0.5"], 3)
    assert code == 0
    (again, *_) = [state for state in states.values() if "not trained" in state.note]
    first = states[re.search(r"the values of (trial-\d+)", again.note)[1]]
    assert again.accuracy == first.accuracy
    trained = {path.parent.name for path in tmp_path.rglob("best_mlp_fmnist.json")}
    assert trained == {name for name, state in states.items() if "not trained" not in state.note}


def test_a_trial_whose_values_do_not_go_together_fails_alone(tmp_path):
    code, states = in_a_fork(carry_out_a_search, tmp_path, ["optimizer=adam,muon", "muon_lr=0.05..0.2"], 6)
    failed = [state.failure for state in states.values() if state.failure]
    assert code == 0
    assert 0 < len(failed) < 6
    assert all("muon_lr needs optimizer=muon" in failure for failure in failed)


def test_strength_0_leaves_an_augmentation_out():
    recipe = recipes.find("fast", "cnn")
    among = space.parse(["flip=0..0.5", "shift=0..3"], recipe)
    assert space.own(among, recipe) == {"flip": 0, "shift": 0}
    assert space.values(among, {"flip": 0.0, "shift": 0}, recipe) == {"flip": False, "shift": False}


def test_the_values_to_search_are_checked():
    recipe = recipes.find("fast", "cnn")
    words = ["lr=log:1e-4..1e-1 epochs=1..3", "batch_size=128,256", "shift=0..3", "flip=0..0.5", "warmup=0..1"]
    among = space.parse(words, recipe)
    assert among["lr"] == space.Range(1e-4, 0.1, log=True, whole=False)
    assert among["batch_size"] == [128, 256]
    assert [name for name, each in among.items() if isinstance(each, space.Range) and each.whole] == [
        "epochs",
        "shift",
    ]
    for word, message in {
        "lr=log:0..1": "a log range begins above 0",
        "lr=2..1": "2 is not below 1",
        "lr=0..x": "lr",
        "epochs=0..3": "epochs is 0",
        "batch_sise=1..2": "did you mean batch_size",
        "precision=float16..float32": "a range is of numbers",
        "lr=1..2..3": "LOW..HIGH",
        " ": "names no value",
    }.items():
        with pytest.raises(UserError, match=message):
            space.parse([word], recipe)


# --- names and mistakes ----------------------------------------------------------------------------------


def test_a_folder_is_named_by_what_was_set(tmp_path):
    base = Request("cnn", recipe="fast", fold="2/5")
    words = ["shift=[1,0.3],2", "flip=false", "augment={}"]
    jobs = sweeps.grid(base, tmp_path, words, [3])
    names = [job.name for job in jobs]
    assert re.fullmatch(r"cnn-fast-augment=[0-9a-f]{8}-flip=false-shift=1,0\.3-fold=2of5-seed=3", names[0])
    assert "shift=2-fold" in names[1]
    assert all(job.folder == tmp_path / job.name and job.epochs == recipes.find("fast", "cnn").epochs for job in jobs)
    many = [
        f"{name}=0.{'1234567' * 4}" for name in ("lr", "warmup", "dropout", "label_smoothing", "prune", "temperature")
    ]
    (job,) = sweeps.grid(Request("cnn"), tmp_path, many, [0])
    assert re.fullmatch(r"cnn-published-6-values-[0-9a-f]{8}-seed=0", job.name)
    orders = (["lr=0.1", "flip=true", "epochs=2"], ["flip=true", "epochs=2", "lr=0.1"])
    one, other = (sweeps.grid(Request("cnn"), tmp_path, each, [0]) for each in orders)
    assert one[0].name == other[0].name
    with pytest.raises(UserError, match="leave one out"):
        sweeps.grid(base, tmp_path, ["flip=true,0.5"], [0])
    folds = sweeps.grid(Request("mlp"), tmp_path, [], range(2), folds=3)
    assert [(job.request.seed, job.request.fold) for job in folds][2:4] == [(0, "3/3"), (1, "1/3")]


MISTAKES = {
    "--set muon_lrr=1": "did you mean muon_lr",
    "--set lr=fast": "lr is",
    "--set lr=0.1,0.1": "twice",
    "--set shift=true": "write shift=",
    "--judge test --seeds 2": "--judge test.*val or 40k/20k",
    "--search lr=0..1 --judge test": "--judge test.*val or 40k/20k",
    "--search lr=0..1 --seeds 3": "--seeds",
    "--search lr=1..0": "1 is not below 0",
    "--search lr=0..1 --set lr=0.1": "leave one out",
    "--search lr=0.1": "one value is no search: use --set lr=0.1",
    "--search flip=0.2,0.3 prune=0,0.1": "only 4 combinations: --set",
    "--set lr=0.1, 0.2": "without a space beside the comma, as lr=1,2",
    "--set seed=0,1": "of sweep.py: --seeds N",
    "--trials 3": "--trials needs --search",
    "--folds 3 --judge val": "leave one out",
    "--recipe distilled": "--teacher",
    "--data-dir /nowhere": "/nowhere",
    "--dir README.md/sweeps": "README.md",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(words, tmp_path):
    finished = run_script("sweep.py", "--model", "mlp", "--dir", tmp_path, "--data-dir", SAMPLE, *words.split())
    assert_one_line_error(finished, MISTAKES[words])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_holds_another_run_is_left_alone(expected, tmp_path):
    name = "mlp-published-epochs=3-batch_size=16-lr=0.001-seed={}"
    shutil.copytree(expected[0] / name.format(1), tmp_path / name.format(0))
    before = outcome(tmp_path)
    assert_one_line_error(sweep(*GRID, "--dir", tmp_path), name.format(0), "holds a run of another seed: .* --dir")
    assert outcome(tmp_path) == before
