"""Search for the values of a recipe with Optuna, judged on training images that are held out.

found = search.plan(Request("cnn", recipe="fast", fold="val"), Path("sweeps"), [], ["lr=log:1e-4..1e-1"], trials=40)
pool.carry_out(found, jobs=2)
pool.carry_out(sweeps.Grid(found.confirming()), jobs=2)
print(found.summary(found.confirming()))

    sweeps/search-cnn-fast-val/journal.log   every trial, as Optuna records it
                               trial-007     the run of a trial, as training/sweeps.py describes it
                               confirm       a folder for each run that confirms the best trial

A trial is a run with seed 0 whose accuracy on the held-out images is measured after each epoch. The last epoch counts:
the best one would be chosen on these images. A trial whose accuracy is below the median of the others is given up. A
trial with the values of one that has ended has its result, and is not trained. What the sampler draws depends on the
trial's number and on the trials that have ended, not on how often the search was interrupted.
"""

import contextlib
import functools
import json
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

from filelock import SoftFileLease

import metrics
import recipes
from runtime import cli, files
from runtime.errors import UserError, one_line
from training import pool, run, settings, space, sweeps
from training.plan import Request
from training.space import Space
from training.sweeps import Job, State

SEED = 0  # of every trial
CONFIRMING = range(1, 6)  # seeds that no trial has used
OWN = "the recipe's own values"
WARMING = 4  # a trial is never given up in the first of so many parts of its epochs


def plan(base: Request, folder: Path, fixed: Sequence[str], words: Sequence[str], trials: int) -> "Search":
    """Plan a search, or the rest of one: its folder is named by model, recipe and held-out images.

    fixed: name=value, the same in all trials; words: of parse_space. Raises UserError where the search cannot be made,
    or where its folder holds another one.
    """
    name, recipe = sweeps.recipe_of(base)
    base = replace(base, settings=settings.parse(fixed, recipe))
    among = space.parse(words, settings.change(recipe, base.settings))
    if twice := [name for name in among if name in base.settings]:
        raise UserError(f"--set {twice[0]} and --search {twice[0]} are the same value: leave one out")
    if "select" in (*among, *base.settings):
        raise UserError("--search decides what selects: the last epoch of each trial counts; leave select out")
    if (several := space.combinations(among)) and several <= trials:
        raise UserError(f"--search has only {several} combinations: --set with --judge trains each of them")
    files.check_folder(folder)
    fold = recipes.fold_name(str(base.fold))
    search = Search(base, folder / f"search-{base.model}-{name}-{fold}", among, trials)
    search.prepare(sweeps.Facts().of(replace(base, seed=SEED)))
    return search


class Search:
    """The trials of a search, as training/pool.py wants them. `total` counts those of all processes and restarts."""

    def __init__(self, base: Request, folder: Path, among: Space, total: int):
        self.base, self.folder, self.space, self.total = base, folder.absolute(), among, total
        _, self.recipe = sweeps.recipe_of(base)

    def __getstate__(self) -> dict[str, Any]:
        own = ("study", "_turn")  # each process opens its own
        return {name: value for name, value in self.__dict__.items() if name not in own}

    # --- what is in the journal

    @functools.cached_property
    def study(self) -> Any:
        """The study in the journal, which is made where there is none."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.folder.mkdir(parents=True, exist_ok=True)
        path, lock = self.folder / "journal.log", pool.lease_on(self.folder / ".journal.lock")
        with lock:
            _cut_torn_line(path)
        backend = JournalFileBackend(str(path), lock_obj=cast(Any, lock))
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=self.recipe.epochs // WARMING)
        with _readable(self.folder):
            storage = JournalStorage(backend)
            return optuna.create_study(
                study_name="search", storage=storage, direction="maximize", pruner=pruner, load_if_exists=True
            )

    @functools.cached_property
    def _turn(self) -> SoftFileLease:
        """The lease by which processes take turns at changes of the list of trials."""
        return pool.lease_on(self.folder / ".turn")

    def trials(self) -> list[Any]:
        """Return the trials that have begun, in their order."""
        with _readable(self.folder):
            found = self.study.get_trials(deepcopy=False)
        return [trial for trial in found if trial.state.name != "WAITING"]

    def prepare(self, facts: Mapping[str, Any]) -> None:
        """Begin the search with the recipe's own values, or check that the folder holds the same search.

        facts: of the recipe's own run, its images and the model's code. Raises UserError where something is different.
        """
        asked = json.loads(json.dumps({**facts, "space": self.space, "--set": self.base.settings}))
        with self._turn:
            begun = self.study.user_attrs.get("asked")
            if begun is None:
                if own := space.own(self.space, self.recipe):
                    self.study.enqueue_trial(own, skip_if_exists=True)
                else:
                    print(f"{OWN} are outside of --search: no trial has them", file=sys.stderr)
                self.study.set_user_attr("asked", asked)
            elif other := [key for key in asked if begun.get(key) != asked[key]]:
                what = sweeps.different(other[0])
                raise UserError(f"{cli.shown(self.folder)} holds a search of {what}: give this search another --dir")

    def settings_of(self, trial: Any) -> dict[str, Any]:
        """Return the values of a trial as those of Request.settings."""
        return {**self.base.settings, **space.values(self.space, trial.params, self.recipe)}

    # --- the work

    def settled(self) -> bool:
        """Say whether as many trials as asked for have ended."""
        trials = self.trials()
        return len(trials) >= self.total and all(trial.state.is_finished() for trial in trials)

    def open(self) -> Iterator[Job]:
        """Yield the trials that have begun and not ended; where nobody can claim one of them, begin another."""
        for trial in self.trials():
            if not trial.state.is_finished() and (job := self._planned(trial)):
                yield job
        if (trial := self._begin()) and (job := self._planned(trial)):
            yield job

    def _planned(self, trial: Any) -> Job | None:
        """Plan the run of a trial, or let the trial fail where its values do not go together."""
        try:
            return self.job(trial)
        except UserError as error:
            self._taken(trial.number).set_user_attr("why", one_line(error))
            self.study.tell(trial.number, state=_state_named("FAIL"), skip_if_finished=True)
            return None

    def _begin(self) -> Any:
        """Begin the next trial, or return None where there are enough."""
        with self._turn:
            if (number := len(self.trials())) >= self.total:
                return None
            self.study.sampler = _sampler(number)
            return space.suggest(self.space, self.study.ask(), functools.partial(_sampler, number))

    def job(self, trial: Any) -> Job:
        """Plan the run of a trial. One that was cut off while its values were drawn gets the rest of them."""
        if self.space.keys() - trial.params.keys():
            with self._turn:
                sampler = functools.partial(_sampler, trial.number)
                trial = space.suggest(self.space, self._taken(trial.number), sampler)
        request = replace(self.base, settings=self.settings_of(trial), seed=SEED, select="test")
        return sweeps.job(request, self.folder, _name(trial.number))

    def _taken(self, number: int) -> Any:
        """Return a trial of the journal as one of this process."""
        import optuna

        self.study.sampler = _sampler(number)
        return optuna.trial.Trial(self.study, self.trials()[number]._trial_id)

    def is_open(self, job: Job) -> bool:
        """Say whether a trial that has just been claimed has not ended."""
        return not self.trials()[_number(job)].state.is_finished()

    def carry_out(self, job: Job) -> int:
        """Train a trial, and record its result. Returns 0 at its end, else the exit code after a signal."""
        number = _number(job)
        if job.failure:  # noted when it was tried before
            self.study.tell(number, state=_state_named("FAIL"))
            return 0
        trial = self._taken(number)
        if same := self._same(trial):
            trial.set_user_attr("same", same.number)
            self.study.tell(number, same.value if same.state.name == "COMPLETE" else None, state=same.state)
            return 0
        reported = set(self.trials()[number].intermediate_values)

        def watch(row: Mapping[str, Any]) -> bool:
            if row["epoch"] not in reported:
                trial.report(row["select_accuracy"], row["epoch"])
            return row["epoch"] < job.epochs and bool(trial.should_prune())

        code = run.run(job.request, watch, sweeps.load)
        if code == run.GIVEN_UP:
            self.study.tell(number, state=_state_named("PRUNED"))
            return 0
        if code == 0 and (history := job.history()):
            self.study.tell(number, history["epochs"][-1]["select_accuracy"])
        return code

    def _same(self, trial: Any) -> Any:
        """Return the first trial that has ended with the values of this one, or None."""
        ended = [each for each in self.trials() if each.state.name in ("COMPLETE", "PRUNED")]
        return next((each for each in ended if self._trained(each) == self._trained(trial)), None)

    def _trained(self, trial: Any) -> recipes.Recipe:
        """Return the recipe by which a trial is trained."""
        return settings.change(self.recipe, self.settings_of(trial))

    # --- what is shown

    def states(self) -> dict[str, State]:
        """Return how far each trial is, by its name; those that have not begun are there too."""
        return {_name(number): State() for number in range(self.total)} | {
            _name(trial.number): self._state(trial) for trial in self.trials()
        }

    def _state(self, trial: Any) -> State:
        kind = trial.state.name
        ended = trial.state.is_finished()
        return State(
            epochs=len(trial.intermediate_values),
            settled=ended,
            failure=self._failure(trial) if kind == "FAIL" else None,
            accuracy=trial.value,
            note=self._note(trial) if ended else "",
        )

    def _note(self, trial: Any) -> str:
        """Write the values of a trial that has ended, and why it was not trained to its end."""
        values = self.settings_of(trial)
        note = " ".join(settings.written(name, values[name]) for name in self.space)
        if "same" in trial.user_attrs:
            return f"{note}, not trained: the values of {_name(trial.user_attrs['same'])}"
        if trial.state.name == "PRUNED":
            note += f", given up after epoch {trial.last_step} of {self.recipe.epochs}: below the median"
        return note

    def _failure(self, trial: Any) -> str:
        """Say why a trial has failed."""
        return trial.user_attrs.get("why") or self.job(trial).failure or "log.txt says why"

    def epochs(self) -> tuple[int, int]:
        """Count the epochs that have been trained, or need not be any more, and those of all trials."""
        states, epochs = self.states(), self.recipe.epochs
        done = sum(epochs if state.settled else min(state.epochs, epochs) for state in states.values())
        return done, epochs * len(states)

    # --- the result

    def best(self) -> Any:
        """Return the trial with the highest accuracy. Raises UserError where none has ended."""
        ended = [trial for trial in self.trials() if trial.state.name == "COMPLETE"]
        if not ended:
            raise UserError(f"no trial of {cli.shown(self.folder)} could be trained: search among other values")
        return max(ended, key=lambda trial: trial.value)

    def confirming(self) -> list[Job]:
        """Plan the runs that confirm the best trial beside the recipe's own values, with seeds that no trial has used.

        Where the recipe's own values are the best, they are alone.
        """
        best, own = self.settings_of(self.best()), dict(self.base.settings)
        found = self._trained(self.best()) != self.recipe
        return [
            sweeps.job(replace(self.base, settings=values, seed=seed), self.folder / "confirm")
            for seed in CONFIRMING
            for values in ([best, own] if found else [own])
        ]

    def summary(self, jobs: Sequence[Job]) -> str:
        """Say what the search has found, what is left of it with other seeds, and how to train it.

        jobs: of confirming(), which have ended.
        """
        best = self.best()
        chosen = self.settings_of(best)
        chosen_is_own = self._trained(best) == self.recipe
        words = [settings.written(*each) for each in chosen.items()]
        histories: dict[bool, dict[int, Any]] = {True: {}, False: {}}  # by whether the values are the best trial's
        for job in jobs:
            if (history := job.history()) and history["test"]:
                histories[job.request.settings == chosen][history["seed"]] = history
        found, own = histories[True], histories[False]
        lines = [
            f"the best of {len(self.trials())} trials is {_name(best.number)}: {' '.join(words)}",
            f"  in the search, one seed: {best.value:.2%}; as the highest of all it is partly luck",
            f"  these are {OWN}" if chosen_is_own else f"  {_described('with other seeds', found)}",
            f"  {_described(OWN, own)}",
        ]
        if common := sorted(found.keys() & own.keys()):
            accuracies = ([each[seed]["test"]["accuracy"] for seed in common] for each in (found, own))
            lines.append(f"  {_difference(*accuracies)}")
        last = f"to train it on all images and measure the test set once:\n{self._command(words)}"
        return "\n".join([*map(cli.wrapped, lines), last])

    def _command(self, words: Sequence[str]) -> str:
        """Return the command that trains a recipe with these settings, as a user would type it here."""
        base = self.base
        where = ["--data-dir", base.data_dir] if base.data_dir else []
        where += ["--teacher", *base.teacher] if base.teacher else []
        where += ["--other-data"] if base.other_data else []
        name, _ = sweeps.recipe_of(base)
        return cli.command("train.py", "--model", base.model, "--recipe", name, "--set", *words, *where)


def _described(what: str, histories: Mapping[int, Any]) -> str:
    """Describe the accuracies and the time of runs that differ in their seed."""
    if not histories:
        return f"{what}: no run has finished"
    described = metrics.spread([each["test"]["accuracy"] for each in histories.values()])
    sd = f" ± {100 * described['sd']:.2f}" if "sd" in described else ""
    seconds = mean(each["training_seconds"] for each in histories.values())
    return f"{what}: {100 * described['mean']:.2f}{sd}%, n = {described['n']}, {seconds:.1f} s of training"


def _difference(found: Sequence[float], own: Sequence[float]) -> str:
    """Describe the difference of two ways of training, of the same seeds in the same order."""
    if len(found) < 2:
        return "difference: one seed says nothing of its spread"
    paired = metrics.paired(found, own)
    interval = paired["ci95"] and "95% interval {:+.2f} to {:+.2f}".format(*(100 * end for end in paired["ci95"]))
    return f"difference over the same seeds: {100 * paired['difference']:+.2f} points, {interval or 'in each of them'}"


def _name(number: int) -> str:
    return f"trial-{number:03}"


def _number(job: Job) -> int:
    return int(job.name.removeprefix("trial-"))


def _sampler(number: int, name: str = "") -> Any:
    """Return the sampler of a trial's value: what it draws depends on number and name, and on the trials before."""
    from optuna.samplers import TPESampler

    return TPESampler(seed=zlib.crc32(f"{number} {name}".encode()))


def _state_named(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn what Optuna raises of a damaged journal into a UserError."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{cli.shown(folder / 'journal.log')} is damaged: {one_line(error)}; use another --dir"
        ) from None


def _cut_torn_line(path: Path) -> None:
    """Remove the end of a line that was being written when the power failed."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n") and content:
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
