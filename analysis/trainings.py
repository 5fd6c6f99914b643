"""The long trainings behind the error analysis: other seeds of every model and recipe, and five folds.

trainings.run(cli.DEEP, train, test)                 # hours; if it is interrupted, the same call resumes it
results = trainings.Results(cli.DEEP, fingerprint)   # the results that are there

What the analysis needs of a training is kept in a JSON file of one line, written when the training has ended:
runs/deep/<data>/<model>-<recipe>-<seed>.json and fold-<k>.json. <data> are the first digits of the images' SHA-256.
"""

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import checkpoint
import data
import engine
import metrics
import models
import recipes
import training.run
from analysis import corruptions, explain, humans, mistakes
from recipes import SHARE
from runtime import cli, device, files
from runtime.code_key import code_key
from runtime.errors import UserError
from runtime.schema import Maybe, Number, Text, problem
from training.record import COUNT, HISTORY, held_out_path, history_of

SEEDS = 5
SEEDS_OF = {"resnet": 3}  # of models that train for half an hour
TEACHER = cli.CHECKPOINTS / "best_resnet_fmnist.pt"  # of the recipes that need one
FASHION_MNIST = "ece17261"  # the folder of its results; the teacher knows no other data
FOLDS = 5
FOLD_MODEL, FOLD_RECIPE, FOLD_EPOCHS = "cnn", "best", 10  # of the trainings that give the out-of-fold probabilities
FOLD_SEED = 5  # of these trainings alone
PROBABILITY = 10_000  # stands for a probability of 1 in a file
KEPT = ("device", "threads", "kernels", "versions", "training_seconds", "train_images", "best_epoch")  # of a history

LARGEST = 2**25  # bytes of a result
FACTS = {"key": dict, "data": Text(), "precision": Text()} | {name: HISTORY[name] for name in KEPT}
FOLD = FACTS | {"n": COUNT, "accuracy": SHARE, "probabilities": [Number(0, PROBABILITY, whole=True)]}
FINDINGS = [
    {"holds": bool, "measured": {key: {"share": (SHARE, None), str: object}, str: object}, str: object}
    for key in mistakes.KEY_SHARES
]
SEED = FACTS | {
    "n": COUNT,
    "accuracy": SHARE,
    "accuracy_ci95": [SHARE, SHARE],
    "log_loss": Number(),
    "ece": Number(),
    "predicted": str,
    "findings": (FINDINGS, None),
    "robustness": dict.fromkeys(corruptions.KINDS, [SHARE] * 5),
    "mirrored": Maybe(SHARE),  # accuracy on mirrored images
    "people": Maybe({"sha256": Text(64), **humans.ENTROPIES}),  # of the votes, and humans.cross_entropies
}
PEOPLE = {"key": str, "people": humans.PEOPLE}
MAP = {"key": str, "map": [[Number(-(10**9), 10**9, whole=True)] * 2]}

Key = dict[str, Any]
Result = dict[str, Any]


class DeepError(UserError):
    """A result of a deep training that cannot be used."""


class Stopped(Exception):
    """A training was interrupted and has saved itself; the argument is the exit code."""


# --- results ---------------------------------------------------------------------------------------------


class Results:
    """The finished trainings of one data set, of the models and recipes as they are now; others are skipped.

    stale: the names of the skipped files.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder = Path(folder, fingerprint[:8])
        self.is_taught = self.folder.name == FASHION_MNIST
        self.stale: set[str] = set()

    def seeds(self, n: int) -> list[Result]:
        """Return the results of the seed trainings, of n test images, in the order of seed_jobs()."""
        found = [self.read(name, key, n) for name, key in seed_jobs(self.is_taught).items()]
        return [result for result in found if result]

    def out_of_fold(self, labels: np.ndarray) -> np.ndarray | None:
        """Return the out-of-fold probabilities float64 (n, 10) of the training images, then the test images, if known.

        labels: int (n,), of both. Each row is by a model that was not trained on the image.
        """
        probabilities = np.zeros((len(labels), len(data.CLASSES)))
        for name, key in fold_jobs().items():
            index = data.fold_indices(labels, key["fold"])
            result = self.read(name, key, len(index))
            if not result:
                return None
            probabilities[index] = np.reshape(result["probabilities"], (len(index), -1)) / PROBABILITY
        return probabilities / probabilities.sum(1, keepdims=True)

    def embedding(self, digest: str, n: int) -> np.ndarray | None:
        """Return the map float64 (n, 2) of the features of the checkpoint with that SHA-256, if it has been made."""
        result = self.read(f"map-{digest[:8]}", digest, n)
        return np.array(result["map"]) / 100 if result else None

    def people(self, digest: str, trainings: str) -> dict[str, Any] | None:
        """Return how the checkpoint with that SHA-256 compares with people, of humans.compare, if it was kept.

        trainings: humans.digest of the trainings that are there; where others were, the result is stale.
        """
        name = f"people-{digest[:8]}"
        result = self.read(name, digest)
        if result and result["people"]["trainings_sha256"] != trainings:
            self.stale.add(self._path(name).name)
            return None
        return result["people"] if result else None

    def keep(self, digest: str, features: torch.Tensor, people: dict[str, Any] | None) -> None:
        """Keep what takes long, or needs people's votes, of the checkpoint with that SHA-256.

        features: float32 (n, d), of which a map is made unless it is there; people: of humans.compare, if there are
        votes.
        """
        self._embed(digest, features)
        if people:  # of this checkpoint alone
            first = people | {"checkpoints": people["checkpoints"][:1]}
            text = json.dumps({"key": digest, "people": first}, allow_nan=False)
            files.write_atomically(self._path(f"people-{digest[:8]}"), (text + "\n").encode())

    def _embed(self, digest: str, features: torch.Tensor) -> None:
        """Make the map of a checkpoint's features, unless it is there."""
        name = f"map-{digest[:8]}"
        if self._path(name).exists():
            return
        if not importlib.util.find_spec("openTSNE"):
            print(f"no map: it needs the package openTSNE: {cli.install()}", file=sys.stderr)
            return
        print("deep: a map of the features, in a minute or two", flush=True)
        places = np.rint(explain.layout(features) * 100).astype(int)
        files.write_atomically(self._path(name), json.dumps({"key": digest, "map": places.tolist()}).encode())

    def read(self, name: str, key: Key | str, n: int | None = None) -> Result | None:
        """Return the result of that name, of n images if they are known, or None if there is none with this key.

        Raises DeepError where the file is damaged.
        """
        path = self._path(name)
        try:
            result = files.read_json(path, LARGEST)
        except FileNotFoundError:
            return None
        except (OSError, UserError) as error:
            raise DeepError(f"{error}; delete it, and --deep makes it again") from None
        if not isinstance(result, dict) or result.get("key") != key:
            self.stale.add(path.name)
            return None
        if wrong := _problem(result, n):
            raise DeepError(f"{cli.shown(path)}: {wrong}; delete it, and --deep makes it again")
        return result

    def write(self, name: str, key: Key, result: Result) -> None:
        """Write the result of a training."""
        text = json.dumps({"key": key, **result}, allow_nan=False, ensure_ascii=False)
        files.write_atomically(self._path(name), (text + "\n").encode())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _problem(result: Result, n: int | None) -> str | None:
    """Say what is wrong with a result, of n images if they are known, or return None."""
    key = result["key"]
    if "people" in result and isinstance(key, str):
        return problem(result, PEOPLE)
    kind, values = (
        (MAP, "map") if isinstance(key, str) else (FOLD, "probabilities") if "fold" in key else (SEED, "predicted")
    )
    if wrong := problem(result, kind):
        return wrong
    n, each = n or result.get("n"), len(data.CLASSES) if kind is FOLD else 1
    if n is not None and (len(result[values]) != n * each or result.get("n", n) != n):
        return f"{values} has {len(result[values]):,} values, not {n * each:,}"
    if kind is SEED and not set(result[values]) <= set("0123456789"):
        return "predicted is not a digit for each image"
    if kind is FOLD:
        sums = np.reshape(result[values], (-1, each)).sum(1)
        if (abs(sums - PROBABILITY) > each).any():  # each is rounded
            return "the probabilities of an image do not add up to 1"
    return None


# --- which trainings there are ---------------------------------------------------------------------------


def jobs(is_taught: bool) -> dict[str, Key]:
    """List every training by name, with all that its result depends on, in the order in which they run."""
    return fold_jobs() | seed_jobs(is_taught)


def fold_jobs() -> dict[str, Key]:
    """List the trainings on all images but one fold."""
    recipe = recipes.find(FOLD_RECIPE, FOLD_MODEL)._replace(epochs=FOLD_EPOCHS)
    key = _key(FOLD_MODEL, FOLD_RECIPE, recipe, FOLD_SEED)
    return {f"fold-{number}": key | {"fold": f"{number}/{FOLDS}"} for number in range(1, FOLDS + 1)}


def seed_jobs(is_taught: bool) -> dict[str, Key]:
    """List the trainings of every model by every recipe; of a recipe that needs a teacher if there is one."""
    teachers = [hashlib.sha256(TEACHER.read_bytes()).hexdigest()] if is_taught and TEACHER.exists() else []
    every = {}
    for name, rows in recipes.RECIPES.items():
        trained = {
            model: recipes.find(name, model) for model in models.MODELS if model in rows or _falls_to(name, model)
        }
        for seed in range(max(map(seeds_of, trained), default=0)):
            for model, recipe in trained.items():
                if seed < seeds_of(model) and (teachers or not recipe.distillation):
                    key = _key(model, name, recipe, seed)
                    every[f"{model}-{name}-{seed}"] = key | ({"teachers": teachers} if recipe.distillation else {})
    return every


def seeds_of(model: str) -> int:
    """Return how many seeds of a model are trained."""
    return SEEDS_OF.get(model, SEEDS)


def _falls_to(recipe: str, model: str) -> bool:
    """Check whether a recipe is the default of a model that has no row in the table."""
    return not any(model in rows for rows in recipes.RECIPES.values()) and recipe == recipes.default(model)


def _key(model: str, recipe_name: str, recipe: recipes.Recipe, seed: int) -> Key:
    defaults = recipes.Recipe._field_defaults  # left out, so that a new field does not make old results stale
    values = {
        name: value for name, value in recipe._asdict().items() if name not in defaults or value != defaults[name]
    }
    key = {"model": model, "code": code_key(model), "recipe_name": recipe_name, "recipe": values, "seed": seed}
    return json.loads(json.dumps(key))  # as it is read from a file


# --- doing them ------------------------------------------------------------------------------------------


def run(
    folder: str | Path,
    train: data.Split,
    test: data.Split,
    device_name: str = "auto",
    votes: humans.Votes | None = None,
    **where: Any,
) -> int:
    """Do every training that has no result yet, and print the progress.

    folder: where the results are, with a folder for each data set; train: the split "train+val"; votes: on the test
    images, to compare the trainings with; where: the data_dir and other_data of data.load that gave the splits. Returns
    0, or the exit code of an interruption; then the same call resumes the training.
    """
    results = Results(folder, data.fingerprint(train, test))
    every = jobs(results.is_taught)
    results.folder.mkdir(parents=True, exist_ok=True)
    left = [(name, key) for name, key in every.items() if not _is_whole(results.read(name, key), votes)]
    print(f"deep: {len(every) - len(left)} of {len(every)} trainings are in {cli.shown(results.folder)}", flush=True)
    trainer, pace = _Trainer(results.folder / "checkpoints", train, test, device_name, where, votes), _Pace()
    for number, (name, key) in enumerate(left):
        place = len(every) - len(left) + number + 1
        remaining = pace.remaining(key for _, key in left[number:])
        print(f"\ndeep: {name}, training {place} of {len(every)}{remaining}", flush=True)
        start = time.monotonic()
        try:
            result = trainer.train_fold(name, key) if "fold" in key else trainer.train_seed(name, key)
        except Stopped as stopped:
            return stopped.args[0]
        pace.add(key, result["training_seconds"], time.monotonic() - start)
        results.write(name, key, {"data": test.source, **result})
    return 0


def _is_whole(result: Result | None, votes: humans.Votes | None) -> bool:
    """Say whether a result is there and holds all that is measured today, and the comparison with votes if given."""
    if not result or "fold" in result["key"]:
        return bool(result)
    return "mirrored" in result and (not votes or result.get("people", {}).get("sha256") == votes.sha256)


class _Pace:
    """Estimates how long trainings take from those that this call has done."""

    def __init__(self) -> None:
        self.by_model: dict[str, tuple[float, float]] = {}  # seconds an epoch, and seconds of everything else

    def add(self, key: Key, training_seconds: float, seconds: float) -> None:
        """Note how long a training took, and how long it took with everything around it."""
        self.by_model[key["model"]] = training_seconds / key["recipe"]["epochs"], max(0, seconds - training_seconds)

    def remaining(self, keys: Iterable[Key]) -> str:
        """Describe how long these trainings take, or return "" while the pace of one of them is unknown."""
        total = 0.0
        for key in keys:
            if key["model"] not in self.by_model:
                return ""
            an_epoch, rest = self.by_model[key["model"]]
            total += key["recipe"]["epochs"] * an_epoch + rest
        return f", about {timedelta(seconds=round(total))} for all that are left"


class _Trainer:
    """Trains as train.py does, each training in a separate folder, and measures what the analysis needs."""

    def __init__(
        self,
        folder: Path,
        train: data.Split,
        test: data.Split,
        device_name: str,
        where: dict[str, Any],
        votes: humans.Votes | None = None,
    ):
        self.folder, self.train, self.test, self.where, self.votes = folder, train, test, where, votes
        self.device_name = device_name
        self.device = device.pick_device(device_name)

    def train_seed(self, name: str, key: Key) -> Result:
        """Train on the whole set, and measure the model on the test images and on harder ones."""
        model, result = self._train(name, key, self.where)
        test = self.test
        mirrored = test._replace(images=test.images.flip(2))
        logits, turned = (engine.predict_logits(model, each.to(self.device)) for each in (test, mirrored))
        measured, chances = metrics.evaluate(logits, test.labels, test.classes), metrics.probabilities(logits)
        records = mistakes.most_confident(chances, test.labels.numpy(), test.classes)
        return result | {
            **{figure: measured[figure] for figure in ("n", "accuracy", "accuracy_ci95", "log_loss", "ece")},
            "predicted": "".join(map(str, chances.argmax(1))),  # a digit for each test image
            "findings": mistakes.check_findings(records, test.classes),
            "robustness": corruptions.accuracies(model, test),
            "mirrored": metrics.accuracy(turned, test.labels),
            **({"people": self._people(logits)} if self.votes else {}),
        }

    def _people(self, logits: torch.Tensor) -> dict[str, Any]:
        assert self.votes  # for mypy
        return {"sha256": self.votes.sha256, **humans.cross_entropies(self.votes, logits)}

    def train_fold(self, name: str, key: Key) -> Result:
        """Train on all images but the fold's, as train.py --fold does, and keep the probabilities of these."""
        images, labels = (torch.cat(both) for both in zip(self.train[1:3], self.test[1:3], strict=True))
        folder, classes = self._folder(name, key), self.test.classes
        data.write(folder / "data", {"train": (images, labels)}, None if classes == data.CLASSES else classes)
        _, result = self._train(name, key, {"data_dir": folder / "data", "fold": key["fold"]})
        with np.load(held_out_path(folder / f"best_{key['model']}_fmnist.pt")) as held_out:
            answers, truth = held_out["probabilities"], held_out["labels"]
        return result | {
            "n": len(truth),
            "accuracy": float((answers.argmax(1) == truth).mean()),
            "probabilities": np.rint(answers * PROBABILITY).astype(int).flatten().tolist(),  # of ten classes each
        }

    def _folder(self, name: str, key: Key) -> Path:
        """Return the folder of a training; after an edit of its code or recipe it is another one."""
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / f"{name}-{digest[:8]}"

    def _train(self, name: str, key: Key, where: dict[str, Any]) -> tuple[nn.Module, Result]:
        """Train, or resume the training. Returns the model, on the device, and facts about the run."""
        folder = self._folder(name, key)
        folder.mkdir(parents=True, exist_ok=True)
        request = training.run.Request(
            key["model"],
            recipe=key["recipe_name"],
            epochs=key["recipe"]["epochs"],
            seed=key["seed"],
            checkpoint_dir=folder,
            teacher=[TEACHER] if "teachers" in key else None,
            resume=True,
            device=self.device_name,
            **where,
        )
        if code := training.run.run(request):
            raise Stopped(code)
        path = folder / f"best_{key['model']}_fmnist.pt"
        history = history_of(path)
        if not history:
            raise DeepError(f"{path}: its history is missing; delete {folder}, and --deep makes it again")
        facts = {name: history[name] for name in KEPT} | {"precision": history["flags"]["precision"]}
        return checkpoint.load(path)[0].to(self.device), facts
