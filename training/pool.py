"""Worker processes that train many runs, together with every other process that works on the same folder.

code = pool.carry_out(sweeps.Grid(jobs), jobs=2)

A worker claims a run by a lease on a file in its folder, trains it, and looks for the next. So any number of processes
on any number of machines share the runs of a folder that all can write. The claim of a process that has died on this
machine is free at once; that of another machine once it has shown no sign of life for LEASE seconds.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import stat
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from filelock import SoftFileLease, Timeout
from tqdm import tqdm

from engine import TrainingError
from runtime import cli
from runtime.errors import UserError, one_line
from training.record import Held
from training.sweeps import Job, State
from training.trial import TrialError

LEASE = 60.0  # seconds; all processes that share a folder must agree on it
EMPTY = 5.0  # seconds, after which the empty file of a process that died while it made a claim counts no more
POLL = 0.25  # seconds between two looks
DEATHS = 3  # of the process that trains a run, until the run counts as failed
LOST = 75  # exit code of a worker whose claim another machine has taken
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Work(Protocol):
    """What is to be trained: sweeps.Grid, or search.Search. All processes agree on it by what is in the folders."""

    def settled(self) -> bool:
        """Say whether nothing is left to do."""

    def open(self) -> Iterator[Job]:
        """Yield the runs that somebody still has to train, those that have begun first."""

    def is_open(self, job: Job) -> bool:
        """Say whether a run that has just been claimed still has to be trained."""

    def carry_out(self, job: Job) -> int:
        """Train a claimed run. Returns 0 at its end, else the exit code after a signal."""

    def states(self) -> dict[str, State]:
        """Return how far each run is, by its name."""

    def epochs(self) -> tuple[int, int]:
        """Count the epochs that have been trained, or need not be any more, and those of all runs."""


# --- claims ----------------------------------------------------------------------------------------------


class Claims:
    """The leases of one process. One object sees for how long another machine's lease shows no sign of life."""

    def __init__(self) -> None:
        self._leases: dict[Path, Lease] = {}

    @contextlib.contextmanager
    def claim(self, folder: Path) -> Iterator[bool]:
        """Claim a folder while the context lasts. Yields whether it was free."""
        lease = self._leases.setdefault(folder, lease_on(folder / ".claim"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lease.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lease.release()


class Lease(SoftFileLease):
    """A lease whose file may have been left empty by a process that died between making and writing it."""

    _empty: tuple[Any, float] | None = None  # which empty file this process has seen, and since when

    def acquire(self, *_: Any, blocking: bool | None = None, **__: Any) -> Any:
        """Take the lease; wait for it unless blocking is False. Raises Timeout where another process has it."""
        while True:
            try:
                return super().acquire(blocking=False)
            except Timeout:
                self._remove_empty()
                if blocking is False:
                    raise
            time.sleep(POLL)

    def _remove_empty(self) -> None:
        """Remove the file if it has stayed empty for EMPTY seconds by this process's clock."""
        with contextlib.suppress(FileNotFoundError):
            found, now = os.lstat(self.lock_file), time.monotonic()
            which = found.st_ino, found.st_mtime_ns
            if found.st_size or not stat.S_ISREG(found.st_mode):
                self._empty = None
            elif not self._empty or self._empty[0] != which:
                self._empty = which, now
            elif now - self._empty[1] > EMPTY:
                os.unlink(self.lock_file)


def lease_on(path: Path) -> Lease:
    """Make the lease by which processes take turns at what a file stands for."""
    return Lease(path, lease_duration=LEASE, thread_local=False, on_compromise=_leave)


def _leave(_: Any) -> None:
    """End this process at once: another one has its claim, and they must not both write."""
    os.write(2, b"another process has taken over this run: it goes on there\n")
    os._exit(LOST)


# --- a worker --------------------------------------------------------------------------------------------


def _work(work: Work, parent: Connection) -> None:
    """Carry out runs until none is left, or until the parent closes the connection or is gone."""
    for number in (signal.SIGINT, cli.HANGUP):
        signal.signal(number, signal.SIG_IGN)  # the parent hears them, and closes the connection
    _print_to(Path(os.devnull))
    threading.Thread(target=_stop_with, args=(parent,), daemon=True).start()
    claims, code = Claims(), None
    with cli.StopSignals() as signals, contextlib.suppress(BrokenPipeError):
        try:
            while not (signals.code or code) and not work.settled():
                if (code := _take_one(work, claims, parent)) is None:
                    parent.send(("at", None))
                    time.sleep(POLL)
        except (UserError, OSError) as error:
            parent.send(("error", one_line(error)))
        except Exception:
            parent.send(("bug", traceback.format_exc()))
    sys.exit(signals.code or code)


def _stop_with(parent: Connection) -> None:
    """Ask the run in hand to save itself and end, once the parent closes the connection or is gone."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    while True:  # again and again: a run that is just beginning does not hear the first one
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def _take_one(work: Work, claims: Claims, parent: Connection) -> int | None:
    """Claim a run and carry it out. Returns 0, the exit code after a signal, or None where there was none to claim."""
    for job in work.open():
        with claims.claim(job.folder) as claimed:
            if claimed and work.is_open(job):
                parent.send(("at", job))
                with contextlib.suppress(Held):  # by a process that has lost its claim and has not ended
                    return _carry_out(work, job)
    return None


def _carry_out(work: Work, job: Job) -> int:
    """Train a run, which prints to its log. A run that cannot be trained is noted as failed; the others go on.

    Returns 0, or the exit code after a signal. Raises UserError, with the run's name, for what would stop the others.
    """
    _print_to(job.folder / "log.txt")
    try:
        return work.carry_out(job)
    except Held:
        raise
    except (TrainingError, TrialError) as error:
        _fail(job, error)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        raise UserError(f"{job.name}: {one_line(error)}") from error
    except Exception as error:  # a bug, say in a model: of the other runs it may be none
        traceback.print_exc()
        _fail(job, f"{type(error).__name__}: {error}")
    finally:
        _print_to(Path(os.devnull))
    return 0


def _fail(job: Job, why: object) -> None:
    print(why, file=sys.stderr)
    job.fail(str(why))


def _print_to(path: Path) -> None:
    """Let what this process prints go to the end of a file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)


# --- the parent ------------------------------------------------------------------------------------------


def carry_out(work: Work, jobs: int) -> int:
    """Carry out work with so many workers, and show how far it is. Returns 0, or the exit code after a signal.

    Raises UserError where a run meets what would stop the others too: no space on the disk, say.
    """
    with cli.StopSignals() as signals, contextlib.closing(Progress(work)) as progress, Pool(work, jobs) as workers:
        while signals.code is None and not work.settled():
            workers.tend()
            progress.show(workers.are_idle())
            time.sleep(POLL)
        progress.show()
    if signals.code is None:
        return 0
    states = work.states().values()
    ended = sum(state.settled for state in states)
    print(f"stopped and saved: {ended} of {len(states)} runs have ended; the same command goes on", file=sys.stderr)
    return signals.code


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let a process that begins here not hear Ctrl-C, while it still loads PyTorch. This one hears it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # where it begins, it unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, cli.HANGUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A process, the connection to it, and the run that it trains: None before its first, and while it finds none."""

    def __init__(self, context: Any, work: Work):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(work, theirs))
        with _deaf():
            self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.is_idle = False

    def listen(self) -> None:
        """Read what the worker has said. Raises UserError for what it could not go on with."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll():
                kind, content = self.connection.recv()
                if kind == "error":
                    raise UserError(content)
                if kind == "bug":
                    raise RuntimeError(f"in a worker:\n{content}")
                self.job, self.is_idle = content, content is None


class Pool:
    """A number of workers. Leaving the context stops them; a run in hand saves itself first."""

    def __init__(self, work: Work, jobs: int):
        self.work = work
        self._deaths: Counter[str] = Counter()
        self._context: Any = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            self._context.set_forkserver_preload([__name__])  # PyTorch is loaded once
        self._workers = [_Worker(self._context, work) for _ in range(min(jobs, _left(work)))]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers:
            worker.connection.close()
        try:
            if kind is KeyboardInterrupt:  # Ctrl-C for the second time
                raise KeyboardInterrupt
            for worker in self._workers:
                worker.process.join()
        except KeyboardInterrupt:
            for worker in self._workers:
                worker.process.kill()
            raise

    def are_idle(self) -> bool:
        """Say whether no worker has found a run to train."""
        return all(worker.is_idle for worker in self._workers)

    def tend(self) -> None:
        """Hear all workers, and replace those that have died. Raises UserError for what none can go on with."""
        for place, worker in enumerate(self._workers):
            code = worker.process.exitcode  # before the last words are read
            worker.listen()
            if code:
                if code not in (LOST, 128 + signal.SIGTERM):
                    self._count(worker, code)
                self._workers[place] = _Worker(self._context, self.work)

    def _count(self, worker: _Worker, code: int) -> None:
        """Count a death; after some of them the run counts as failed, so that it does not stop the others."""
        name = worker.job.name if worker.job else ""
        self._deaths[name] += 1
        if self._deaths[name] < DEATHS:
            return
        memory = "; is the memory too small?" if code == -signal.SIGKILL else ""
        why = f"its process died {DEATHS} times, with exit code {code}{memory}"
        if not worker.job:
            raise UserError(f"no worker can begin: {why}")
        if self.work.is_open(worker.job):
            worker.job.fail(why)


def _left(work: Work) -> int:
    """Count the runs that have not ended."""
    return sum(not state.settled for state in work.states().values())


class Progress:
    """A bar over the epochs of all runs, and a line for each run that ends, whoever trains it."""

    BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} epochs  ETA {remaining}"

    def __init__(self, work: Work):
        self.work = work
        self._said = {name for name, state in work.states().items() if state.settled}
        self._waits = False
        self._short = _without_common(list(work.states()))
        done, total = work.epochs()
        if self._said:
            print(f"{len(self._said)} of {len(work.states())} runs have ended before", flush=True)
        self._first = done
        self._bar = tqdm(
            desc="starting",
            total=total,
            initial=done,
            disable=None,  # where stderr is no terminal
            dynamic_ncols=True,
            bar_format=self.BAR,
            smoothing=0,
        )

    def show(self, waits: bool = False) -> None:
        """Show what has changed. waits: whether all that is left is trained by other processes."""
        states = self.work.states()
        for name, state in states.items():
            if state.settled and name not in self._said:
                self._said.add(name)
                self._write(f"[{len(self._said)}/{len(states)}] {self._short.get(name, name)}: {_ending(state)}")
        left = [self._short.get(name, name) for name, state in states.items() if not state.settled]
        if waits and left and not self._waits:
            self._write(f"waiting for other processes, which train {', '.join(left)}")
        self._waits = waits
        done, self._bar.total = self.work.epochs()
        said = "starting" if done == self._first else f"{len(self._said)}/{len(states)} runs"
        self._bar.set_description_str(said, refresh=False)
        self._bar.update(done - self._bar.n)

    def _write(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def _without_common(names: Sequence[str]) -> dict[str, str]:
    """Shorten the names of runs, by name: leave out the values that all of them share."""
    parts = {name: re.split(r"-(?=[a-z_]+=)", name) for name in names}
    common = set.intersection(*map(set, parts.values())) if len(names) > 1 else set()
    return {name: " ".join(part for part in each if part not in common) for name, each in parts.items()}


def _ending(state: State) -> str:
    if state.failure:
        return f"failed: {state.failure}"
    accuracy = "" if state.accuracy is None else f"{state.accuracy:.2%}"
    seconds = "" if state.seconds is None else f"in {state.seconds:.1f} s"
    return " ".join(filter(None, (accuracy, seconds, state.note)))
