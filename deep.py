"""The long trainings behind the error analysis: other seeds of every model and recipe, and five folds.

deep.run(cli.DEEP, data_dir=None, device="auto")     # hours, resumed where it was cut off
results = deep.Results(cli.DEEP, fingerprint)        # what is there of it, at once

Each training is train.py's own. What the analysis needs of it is kept in a small JSON file, written when it has ended:
runs/deep/<data>/<model>-<recipe>-<seed>.json and fold-<k>.json, <data> being the first digits of the images' SHA-256.
"""

import hashlib
import importlib.util
import inspect
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import cli
import corruptions
import data
import engine
import errors
import explain
import models
import recipes
from record import history_of

SEEDS = 5
FOLDS = 5
FOLD_MODEL, FOLD_RECIPE, FOLD_EPOCHS = "cnn", "best", 10  # of the trainings that give the out-of-fold probabilities
FOLD_SEED = 5  # of the folds alone
PROBABILITY = 10_000  # what a probability of 1 is in a file


class DeepError(data.UserError):
    """A result of a deep run that cannot be used."""


class Stopped(Exception):
    """A training was told to stop, and has saved itself; its argument is the exit code that asks for."""


class Results:
    """The finished trainings of one data set, of the models and recipes as they are now; others are passed over."""

    def __init__(self, folder, fingerprint):
        self.folder = Path(folder, fingerprint[:8])
        self.stale = []  # names of files that are of changed code, or of another recipe

    def seeds(self):
        """Results of the seed trainings, in the order of jobs()."""
        found = [self.read(name, key) for name, key in jobs().items() if not name.startswith("fold")]
        return [result for result in found if result]

    def out_of_fold(self, n):
        """Out-of-fold probabilities float64 (n, 10) of the training images and then the test images, or None."""
        probabilities, every = np.zeros((n, len(data.CLASSES))), jobs()
        for fold, index in enumerate(fold_indices(n)):
            result = self.read(f"fold-{fold}", every[f"fold-{fold}"])
            if not result:
                return None
            probabilities[index] = np.reshape(result["probabilities"], (len(index), -1)) / PROBABILITY
        return probabilities / probabilities.sum(1, keepdims=True)

    def embedding(self, digest, features=None):
        """The 2-D map float64 (n, 2) of the checkpoint of that SHA-256, or None; with features, made where it lacks."""
        path = self.folder / f"map-{digest[:8]}.json"
        if not path.exists() and features is not None:
            if not importlib.util.find_spec("openTSNE"):
                print(
                    "no map: it needs the package openTSNE: pip install -r requirements-optional.txt", file=sys.stderr
                )
                return None
            print("deep: a map of the features, in a minute or two", flush=True)
            places = np.rint(explain.layout(features) * 100).astype(int)
            checkpoint.write_atomically(path, json.dumps({"key": digest, "map": places.tolist()}).encode())
        result = self.read(path.stem, digest)
        return result and np.array(result["map"]) / 100

    def read(self, name, key):
        """The result of that name in jobs(), or None where there is none of just this training."""
        path = self.folder / f"{name}.json"
        try:
            result = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DeepError(f"{path}: {error}; delete it, and --deep makes it anew") from None
        if not isinstance(result, dict) or result.get("key") != key:
            self.stale.append(path.name)
            return None
        return result


def jobs():
    """Every training by name, with all that its result hangs on, in the order they are done."""
    every = {f"fold-{fold}": _key(FOLD_MODEL, FOLD_RECIPE, FOLD_SEED, epochs=FOLD_EPOCHS) for fold in range(FOLDS)}
    for recipe, rows in recipes.RECIPES.items():
        if recipe == "distilled":  # which hangs on its teachers
            continue
        trained = [model for model in models.MODELS if model in rows or recipe == recipes.default(model)]
        for seed in range(SEEDS):
            every |= {f"{model}-{recipe}-{seed}": _key(model, recipe, seed) for model in trained}
    return every


def _key(model, recipe, seed, **changes):
    values = recipes.find(recipe, model)._replace(**changes)._asdict()
    defaults = recipes.Recipe._field_defaults  # left out, so that a new kind of value leaves old results as they are
    values = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    code = hashlib.sha256(inspect.getsource(models.MODELS[model]).encode()).hexdigest()[:16]
    return {"model": model, "code": code, "recipe_name": recipe, "recipe": values, "seed": seed}


def fold_indices(n):
    """Indices int64 of the images of each of FOLDS folds, of n in all: a partition drawn once and for all."""
    return [np.sort(part) for part in np.array_split(np.random.RandomState(FOLD_SEED).permutation(n), FOLDS)]


def run(folder, data_dir, device):
    """Do every training that has no result yet, telling how far it is.

    folder: where the results are, a folder for each data set. Returns 0, or the exit code that a signal asks for: the
    training has saved itself then, and the same call goes on with it.
    """
    train, test = data.load("train+val", "test", data_dir=data_dir)
    results, every = Results(folder, data.fingerprint(train, test)), jobs()
    results.folder.mkdir(parents=True, exist_ok=True)
    left = [name for name, key in every.items() if not results.read(name, key)]
    print(f"deep: {len(every) - len(left)} of {len(every)} trainings are in {cli.shown(results.folder)}", flush=True)
    pace = {}  # by model, as it went here: seconds an epoch, and seconds of all else
    for number, name in enumerate(left):
        key = every[name]
        costs = [
            every[other]["recipe"]["epochs"] * pace[every[other]["model"]][0] + pace[every[other]["model"]][1]
            for other in left[number:]
            if every[other]["model"] in pace
        ]
        known = len(costs) == len(left) - number
        eta = f", about {timedelta(seconds=round(sum(costs)))} for all that is left" if known else ""
        print(f"\ndeep: {name}, training {len(every) - len(left) + number + 1} of {len(every)}{eta}", flush=True)
        start = time.monotonic()
        own = results.folder / "checkpoints" / name
        try:
            if name.startswith("fold"):
                result = _train_fold(own, int(name.removeprefix("fold-")), key, train, test, device)
            else:
                result = _train_seed(own, key, test, data_dir, device)
        except Stopped as stopped:
            return stopped.args[0]
        training = result["training_seconds"]
        pace[key["model"]] = (training / key["recipe"]["epochs"], max(0, time.monotonic() - start - training))
        text = json.dumps({"key": key, "data": test.source, **result}, allow_nan=False, ensure_ascii=False)
        checkpoint.write_atomically(results.folder / f"{name}.json", (text + "\n").encode())
    return 0


def _train(own, key, data_dir, device):
    """Train as a user would, into the folder `own`. Returns the model, and what is known of the run."""
    import train  # the script itself, so that a training here is one of its own

    own.mkdir(parents=True, exist_ok=True)
    flags = ["--model", key["model"], "--recipe", key["recipe_name"], "--epochs", key["recipe"]["epochs"]]
    flags += ["--seed", key["seed"], "--checkpoint-dir", own, "--device", device, "--resume"]
    flags += ["--data-dir", data_dir] if data_dir else []
    if code := train.main([str(word) for word in flags]):
        raise Stopped(code)
    path = own / f"best_{key['model']}_fmnist.pt"
    history = history_of(path)
    kept = ("device", "threads", "kernels", "versions", "training_seconds", "train_images", "best_epoch")
    return checkpoint.load(path)[0], {name: history[name] for name in kept} | {
        "precision": history["flags"]["precision"]
    }


def _train_seed(own, key, test, data_dir, device):
    """One training on the whole set, and what its model makes of the test images and of harder ones."""
    model, result = _train(own, key, data_dir, device)
    target = engine.pick_device(device)
    model.to(target)
    logits = engine.predict_logits(model, test.to(target))
    probabilities, labels = logits.double().softmax(1).numpy(), test.labels.numpy()
    measured = engine.metrics(logits, test.labels)
    mistakes = errors.most_confident_mistakes(probabilities, labels)
    robustness = {kind: [] for kind in corruptions.KINDS}
    steps = [(kind, strength) for kind in corruptions.KINDS for strength in range(1, 6)]
    for kind, strength in tqdm(steps, desc="robustness", disable=None, unit=" sets"):
        harder = test._replace(images=corruptions.corrupt(test.images, kind, strength))
        predicted = engine.predict_logits(model, harder.to(target)).argmax(1)
        robustness[kind].append((predicted == test.labels).double().mean().item())
    return result | {
        **{name: measured[name] for name in ("n", "accuracy", "accuracy_ci95", "log_loss", "ece")},
        "predicted": "".join(map(str, probabilities.argmax(1))),  # a digit for each test image
        "findings": errors.check_findings(mistakes),
        "robustness": robustness,  # accuracy at strengths 1 to 5
    }


def _train_fold(own, fold, key, train, test, device):
    """One training on all images but the fold's, and what its model makes of those."""
    images, labels = (torch.cat([getattr(split, name) for split in (train, test)]) for name in ("images", "labels"))
    index = fold_indices(len(labels))[fold]
    others = np.setdiff1d(np.arange(len(labels)), index)
    folder = own / "data"
    data.write(folder, {"train": (images[others], labels[others]), "t10k": (images[index], labels[index])})
    model, result = _train(own, key, folder, device)
    target = engine.pick_device(device)
    held_out = data.Split(f"fold {fold}", images[index], labels[index], test.source)
    logits = engine.predict_logits(model.to(target), held_out.to(target))
    probabilities = logits.double().softmax(1).mul(PROBABILITY).round().long()
    return result | {
        "n": len(index),
        "accuracy": engine.loss_and_accuracy(logits, held_out.labels)[1],
        "probabilities": probabilities.flatten().tolist(),  # of ten classes for each image, in 1 / PROBABILITY
    }
