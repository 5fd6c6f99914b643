"""Fit the rule that says when a model's answer to a picture counts, and write it beside the checkpoint.

python -m analysis.rule LABELS.csv                      # of checkpoints/robust/best_cnn_fmnist.pt
python -m analysis.rule LABELS.csv --checkpoint best.pt

LABELS.csv names labelled pictures, as for `python predict.py --evaluate`; some must show what the classes lack. They
set the three thresholds. The temperature is fitted to them and to harder validation images, where both count alike.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime import cli
from runtime.errors import UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import torch

    from analysis.classify import Candidate, Rule
    from analysis.photos import Labelled
    from data import Split

PROGRAM = "python -m analysis.rule"
COVERAGE = 0.55  # of the pictures of the classes get a sure answer; of unseen ones about half do
OTHERS = 0.9  # of other things have an energy below the threshold, unless that costs coverage
MISTAKEN = 0.1  # of the pictures of a class are called unlike all classes
LEAST = 0.4  # a sure answer is at least as probable, whatever that costs of coverage
MOST = 1_000  # harder images
FEWEST = 10  # pictures of the classes, and of other things
HALVES = 20  # times that the pictures are divided in two to measure on one half what was fitted on the other


class Sample(NamedTuple):
    """Images with a model's logits and their fair answers."""

    views: "Sequence[torch.Tensor]"  # logits (n, 10) of each view
    fair: np.ndarray  # bool (n, 10): the classes that would be a fair answer; none for other things

    @property
    def is_own(self) -> np.ndarray:
        """bool (n,): whether an image is of the classes."""
        return np.asarray(self.fair.any(1))

    def part(self, chosen: np.ndarray) -> "Sample":
        """Return the images of which bool (n,) is true."""
        return Sample([logits[chosen] for logits in self.views], self.fair[chosen])


def parse_args(argv: list[str] | None = None) -> "argparse.Namespace":
    """Parse the command line."""
    parser = cli.Parser("Fit to labelled pictures when an answer of predict.py is sure.")
    parser.prog = PROGRAM
    parser.add_argument("labels", metavar="LABELS.csv", type=Path, help="as for predict.py --evaluate")
    cli.add_pictures_checkpoint(parser)
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse_args(argv)
    with cli.loading():
        import checkpoint
        import data
        from analysis.classify import Candidate, Rule, is_mirrored, read_rule, rule_path
        from analysis.photos import read_labels
        from runtime.device import pick_device
        from runtime.files import write_json

    model, info = checkpoint.load(args.checkpoint)
    place = rule_path(args.checkpoint)
    if place.exists():
        read_rule(place)  # nothing else is replaced
    labelled = read_labels(args.labels, info["classes"])
    (held,) = data.load("val", data_dir=args.data_dir, other_data=args.other_data)
    checkpoint.check_classes(args.checkpoint, info, held)
    model.to(pick_device(args.device))
    candidate = Candidate(str(args.checkpoint), model, info["classes"], Rule(), is_mirrored(info))
    photos, hard = sample_of_pictures(candidate, labelled), sample_of_harder(candidate, held)
    rule = fit(photos, hard)
    measured = {"pictures": measure(rule, photos), "held_out": held_out(photos, hard), "harder": measure(rule, hard)}
    write_json(place, {"checkpoint_sha256": info["sha256"], **rule._asdict(), "measured": measured})
    print(", ".join(f"{name} {value:.3f}" for name, value in rule._asdict().items()))
    for name, found in measured.items():
        print(f"{name:<9} " + ", ".join(f"{key} {value:.1%}" for key, value in found.items() if value is not None))
    if note := checkpoint.caution(info, held):
        print(f"harder images: {note[1]}")
    print(f"the rule is in {cli.shown(place)}")
    return 0


def sample_of_pictures(candidate: "Candidate", labelled: "Sequence[Labelled]") -> Sample:
    """Convert labelled pictures and compute their logits. Raises UserError where there are too few."""
    from tqdm import tqdm

    from analysis.classify import logits_of
    from analysis.photos import conversions

    fair = np.array([[name in each.fair for name in candidate.classes] for each in labelled])
    own = int(fair.any(1).sum())
    if min(own, len(labelled) - own) < FEWEST:
        raise UserError(
            f"{own} pictures of the classes and {len(labelled) - own} of none of them: a rule needs {FEWEST} or more "
            "of each"
        )
    with tqdm(total=len(labelled), unit=" pictures", disable=None) as bar:
        pixels = [conversion.pixels for _, conversion in conversions(labelled, bar.update)]
    return Sample(logits_of(candidate, pixels), fair)


def sample_of_harder(candidate: "Candidate", held: "Split") -> Sample:
    """Make images harder, each by the next of all kinds and strengths of corruptions, and compute their logits."""
    import torch

    from analysis import corruptions
    from analysis.classify import logits_of

    chosen = torch.linspace(0, len(held.labels) - 1, min(MOST, len(held.labels))).long()
    images, labels = held.images[chosen], held.labels[chosen]
    harder = torch.empty_like(images)
    ways = [(kind, strength) for kind in corruptions.KINDS for strength in range(1, 6)]
    for number, (kind, strength) in enumerate(ways):
        harder[number :: len(ways)] = corruptions.corrupt(images[number :: len(ways)], kind, strength)
    return Sample(logits_of(candidate, list(harder.numpy())), np.eye(10, dtype=bool)[labels.numpy()])


def fit(photos: Sample, hard: Sample) -> "Rule":
    """Fit a rule: the temperature, then the energy, then the probability."""
    from analysis.classify import Rule, energy, probabilities

    temperature = fit_temperature([photos, hard])
    energies = energy(photos.views, temperature)
    likely = probabilities(photos.views, temperature).max(1)
    own = photos.is_own
    least = min(np.quantile(energies[~own], OTHERS), np.quantile(energies[own], 1 - COVERAGE))
    high = own & (energies >= least)
    probability = max(LEAST, float(np.quantile(likely[high], max(0.0, 1 - COVERAGE * own.sum() / high.sum()))))
    unlike = min(least, np.quantile(energies[own], MISTAKEN))
    return Rule(temperature, probability, float(least), float(unlike))


def fit_temperature(samples: "Sequence[Sample]") -> float:
    """Find the temperature that makes fair answers most likely, where each sample counts alike.

    Guo et al. 2017, arXiv:1706.04599, with the sum over the fair classes in place of the label's probability.
    """
    from scipy.optimize import minimize_scalar

    from analysis.classify import probabilities

    own = [sample.part(sample.is_own) for sample in samples]

    def loss(logarithm: float) -> float:
        fair = [(probabilities(each.views, np.exp(logarithm)) * each.fair).sum(1) for each in own]
        return float(-np.mean([np.log(np.maximum(each, 1e-12)).mean() for each in fair]))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-3}).x))


def measure(rule: "Rule", sample: Sample) -> dict[str, float | None]:
    """Compute accuracy, coverage, precision, and the share of other things with a sure answer; None without any."""
    from analysis.classify import energy, probabilities

    answers = probabilities(sample.views, rule.temperature)
    right = sample.fair[np.arange(len(answers)), answers.argmax(1)]
    sure, own = (
        (energy(sample.views, rule.temperature) >= rule.energy) & (answers.max(1) >= rule.probability),
        sample.is_own,
    )
    chosen = {"accuracy": right[own], "coverage": sure[own], "precision": right[own & sure], "others": sure[~own]}
    return {name: float(values.mean()) if len(values) else None for name, values in chosen.items()}


def held_out(photos: Sample, hard: Sample) -> dict[str, Any]:
    """Fit on one half of the pictures and measure on the other, many times; return the means."""
    found = []
    for seed in range(HALVES):
        half = _half(photos.is_own, seed)
        found.append(measure(fit(photos.part(half), hard), photos.part(~half)))
    values = {name: [value for each in found if (value := each[name]) is not None] for name in found[0]}
    return {name: float(np.mean(each)) for name, each in values.items() if each}


def _half(is_own: np.ndarray, seed: int) -> np.ndarray:
    """Choose one half of the pictures of the classes and one of the others: bool (n,)."""
    chosen, random = np.zeros(len(is_own), bool), np.random.default_rng(seed)
    for part in (np.flatnonzero(is_own), np.flatnonzero(~is_own)):
        chosen[random.permutation(part)[: len(part) // 2]] = True
    return chosen


if __name__ == "__main__":
    cli.run(main, PROGRAM)
