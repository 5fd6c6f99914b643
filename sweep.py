"""Train many runs, each in its own folder: a grid of values times seeds, or a search. The same command goes on.

python sweep.py --model mlp --recipe fast --set muon_lr=0.05,0.07 flip=true,false --seeds 5
python sweep.py --model mlp --recipe fast --seeds 2 --folds 5        # every fold of five, each with two seeds
python sweep.py --model mlp --recipe fast --search "muon_lr=log:0.01..0.3 batch_size=256,384,512" --trials 30
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import recipes
from runtime import cli
from runtime.errors import UserError

if TYPE_CHECKING:
    from training.sweeps import Job

JUDGES = {"val": "val", "40k/20k": "1/3"}  # --judge, and what train.py --fold calls it


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags. Raises UserError for flags that do not go together."""
    parser = cli.Parser("Train many runs, each in its own folder, and compare them. The same command goes on.")
    count = cli.whole_number(1, 10_000)
    parser.add_argument("--model", required=True, help="mlp, cnn, resnet, or any other name in models.py")
    parser.add_argument("--recipe", choices=recipes.RECIPES, help="a row of recipes.py (default: as of train.py)")
    parser.add_argument("--teacher", metavar="CHECKPOINT", nargs="+", type=Path, help="for --recipe distilled")
    words: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    changes = (
        "values of the recipe, such as muon_lr=0.03,0.07 (Muon's rate; lr is Adam's) flip=true,false epochs=2; every "
        "combination is trained"
    )
    parser.add_argument("--set", metavar="NAME=VALUE,VALUE", help=changes, **words)
    parser.add_argument("--seeds", metavar="N", type=count, help="train each with the seeds 0 to N - 1 (default: 1)")
    parser.add_argument("--folds", metavar="K", type=cli.whole_number(2, 1000), help="train each on all folds of K")
    spaces = "search the best values with Optuna: name=low..high, name=log:low..high or name=value,value"
    parser.add_argument("--search", metavar="NAME=LOW..HIGH", help=spaces, **words)
    parser.add_argument("--trials", metavar="N", type=count, help="of a search, in all processes (default: 30)")
    held_out = "training images to measure on, not the test set: val (5,000; default of --search) or 40k/20k (20,000)"
    parser.add_argument("--judge", metavar="IMAGES", help=held_out)
    parser.add_argument("--jobs", metavar="N", type=count, default=1, help="runs to train at a time (default: 1)")
    shared = "where to write (default: sweeps). The same command on another machine that shares it shares the work"
    parser.add_argument("--dir", metavar="DIR", type=Path, default=cli.ROOT / "sweeps", help=shared)
    cli.add_common(parser)
    flags = parser.parse_args(argv)
    check(flags)
    return flags


def check(flags: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together, and for a package that is missing."""
    if flags.judge not in (None, *JUDGES):
        why = ": what the test set has chosen, it cannot judge any more" if flags.judge == "test" else ""
        raise UserError(f"--judge {flags.judge}{why}; use val or 40k/20k")
    if flags.search and (flags.folds or flags.seeds):
        raise UserError("--search has no --seeds and no --folds: trials have seed 0, and other seeds confirm the best")
    if flags.trials and not flags.search:
        raise UserError("--trials needs --search: a grid has as many runs as combinations times seeds")
    if flags.folds and flags.judge:
        raise UserError("--folds and --judge both say which images are held out: leave one out")
    if flags.search and not importlib.util.find_spec("optuna"):
        raise UserError(f"--search needs the package: {cli.install()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, and compare. Returns the exit code: 1 where a run has failed."""
    flags = parse_args(argv)
    cli.share_cores(flags.jobs)
    with cli.loading():
        import data
        from training import pool, search, sweeps
        from training.plan import Request

    data.check_augmentations(recipes.RECIPES)
    fold = JUDGES[flags.judge or "val"] if flags.judge or flags.search else None
    where = {"data_dir": flags.data_dir, "other_data": flags.other_data, "device": flags.device}
    base = Request(flags.model, recipe=flags.recipe, teacher=flags.teacher, fold=fold, **where)
    if not flags.search:
        jobs = sweeps.grid(base, flags.dir.absolute(), flags.set, range(flags.seeds or 1), flags.folds or 0)
        sweeps.check(jobs)
        sweeps.remark(jobs[0].request, jobs[0].request.settings)
        return train(jobs, flags.jobs, compared)
    found = search.plan(base, flags.dir.absolute(), flags.set, flags.search, flags.trials or 30)
    sweeps.remark(found.base, {**found.base.settings, **found.space})
    if code := pool.carry_out(found, flags.jobs):
        return code
    jobs = found.confirming()
    sweeps.check(jobs)
    return train(jobs, flags.jobs, found.summary)


def compared(jobs: Sequence["Job"]) -> str:
    """Return how finished runs compare."""
    from analysis import comparison

    return comparison.report([job.folder for job in jobs])


def train(jobs: Sequence["Job"], at_a_time: int, described: Callable[[Sequence["Job"]], str]) -> int:
    """Carry out the runs of a grid, and print how those that have finished are described. Returns the exit code."""
    from training import pool, sweeps

    grid = sweeps.Grid(jobs)
    if code := pool.carry_out(grid, at_a_time):
        return code
    finished = [job for job in jobs if not grid.state(job).failure]
    print(described(finished) if finished else "no run has finished")
    for job in jobs:
        if why := grid.state(job).failure:
            print(f"sweep.py: {job.name} failed: {why}; to try again, delete {cli.shown(job.folder)}", file=sys.stderr)
    return 0 if len(finished) == len(jobs) else 1


if __name__ == "__main__":
    cli.run(main)
