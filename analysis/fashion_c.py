"""The 15 kinds of harder images of Fashion-MNIST-C, made anew by their definitions, and a model's accuracy on each.

python -m analysis.fashion_c                    # the shipped published CNN, best ResNet and robust CNN
python -m analysis.fashion_c A.pt --json A.json # a checkpoint of your own

Fashion-MNIST-C is by Weiss and Tonella 2022, github.com/testingautomated-usi/fashion-mnist-c (MIT). The values here are
those that its generator uses, one strength for each kind, with scikit-image 0.19.0, which it requires. The images are
our own: other random draws, and values rounded where the generator cuts them off. So results do not compare with those
on its files. The numbers of the shipped checkpoints go to docs/figures/fashion_c.json.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import ndimage
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint
import data
import engine
import metrics
from analysis import corruptions, evaluation
from runtime import cli, files

PROGRAM = "python -m analysis.fashion_c"
SHIPPED = (cli.DEFAULT_CHECKPOINT, cli.CHECKPOINTS / "best_resnet_fmnist.pt", cli.PICTURES_CHECKPOINT)
RESULTS = cli.ROOT / "docs" / "figures" / "fashion_c.json"
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}  # a new one goes last: its place is part of its seed

PHOTONS = 3  # of shot noise, expected at a white pixel
IMPULSES = 0.17  # share of the pixels that become black or white
GLASS = 0.7  # pixels of a Gaussian's standard deviation, before and after pixels change places
MOTION_STEPS, MOTION_DEVIATION, MOTION_DEGREES = 21, 3.0, 45.0  # ImageMagick's width of radius 10, its sigma, its angle
ANGLE = 0.4  # radians, of shear and rotate
SCALE = 0.7
CONTRAST = 0.1  # of each pixel's distance from the image's mean remains
BRIGHTER = 0.5  # of the grey range
SATURATION, TINT = 20.0, 0.2  # hue, saturation and value are multiplied by the one, and the other is added
LUMA = (0.2125, 0.7154, 0.0721)  # of red, green and blue in grey


def kind(name: str) -> Callable:
    """Register a function that makes images float32 (n, 28, 28) harder. They, and what it returns, lie on [0, 1]."""

    def register(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        KINDS[name] = function
        return function

    return register


def corrupt(images: torch.Tensor, name: str) -> torch.Tensor:
    """Make images uint8 (n, 28, 28) on the CPU harder. name: one of KINDS.

    What is drawn depends on the number of images and the kind alone. The state of PyTorch's generator does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(*data.derive_seeds(corruptions.SEED, list(KINDS).index(name)))
        return _to_pixels(KINDS[name](images.float() / 255))


def measure(loaded: Sequence[evaluation.Loaded], split: data.Split) -> list[dict[str, Any]]:
    """Measure checkpoints on a split as it is and by kind: a dict for the JSON of each."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for name in tqdm(["plain", *KINDS], desc="harder images", disable=None, unit=" kinds", leave=False):
        harder = split if name == "plain" else split._replace(images=corrupt(split.images, name))
        answers[name] = [_share(each.model, harder) for each in loaded]
    return [
        {
            "checkpoint": cli.relative(each.path),
            "checkpoint_sha256": each.info["sha256"],
            "model": each.info["model"],
            "plain": answers["plain"][place],
            "kinds": {name: answers[name][place] for name in KINDS},
            "mean": sum(answers[name][place]["share"] for name in KINDS) / len(KINDS),
        }
        for place, each in enumerate(loaded)
    ]


def _share(model: torch.nn.Module, split: data.Split) -> dict[str, Any]:
    right = engine.predict_logits(model, split).argmax(1) == split.labels
    return metrics.share(int(right.sum()), len(right))


# --- the kinds -------------------------------------------------------------------------------------------


@kind("shot noise")
def shot_noise(images: torch.Tensor) -> torch.Tensor:
    """Count photons, whose expected number grows with the brightness."""
    return torch.poisson(images * PHOTONS) / PHOTONS


@kind("impulse noise")
def impulse_noise(images: torch.Tensor) -> torch.Tensor:
    """Make a share of the pixels black or white, with equal chance."""
    hit, white = torch.rand_like(images) < IMPULSES, torch.rand_like(images) < 0.5
    return torch.where(hit, white.float(), images)


@kind("glass blur")
def glass_blur(images: torch.Tensor) -> torch.Tensor:
    """Let near pixels change places twice, between two Gaussian blurs.

    The generator blurs from top to bottom only: it passes a grey image as one of several channels. So do we.
    """
    pixels = _to_pixels(_blur_down(images)).flatten(1).T.contiguous()  # (784, n): a pixel of all images lies together
    for _ in range(2):
        _exchange(pixels)
    return _blur_down(pixels.T.reshape(images.shape) / 255)


def _blur_down(images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ndimage.gaussian_filter1d(images.numpy(), GLASS, axis=1, mode="nearest"))


def _exchange(pixels: torch.Tensor) -> None:
    """Exchange each pixel, in turn from the last, with one up to a row above and a column to the left, or with none.

    pixels: uint8 (784, n), changed in place. A pixel stays where it is with a chance of one half, and then one in four.
    """
    side, every = 28, torch.arange(pixels.shape[1])
    distances = torch.tensor([0, 0, 0, 0, 0, 1, side, side + 1])
    for row in range(side - 1, 1, -1):
        for column in range(side - 1, 1, -1):
            place = row * side + column
            other = place - distances[torch.randint(len(distances), every.shape)]
            here, there = pixels[place].clone(), pixels[other, every]
            pixels[other, every] = here
            pixels[place] = there


@kind("motion blur")
def motion_blur(images: torch.Tensor) -> torch.Tensor:
    """Smear along a direction drawn for each image: one half of a Gaussian, beginning at the pixel.

    The generator uses ImageMagick. This kernel is our own, written after a reading of ImageMagick's source.
    """
    angle = torch.deg2rad((2 * torch.rand(len(images)) - 1) * MOTION_DEGREES)
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    steps = torch.arange(MOTION_STEPS)
    weights = torch.softmax(-(steps**2) / (2 * MOTION_DEVIATION**2), 0)
    still = torch.eye(2).expand(len(images), 2, 2)
    smeared = torch.zeros_like(images)
    for step, weight in zip(steps, weights, strict=True):
        smeared += weight * _sample(images, still, (step * direction).round(), outside="border")
    return smeared


@kind("shear")
def shear(images: torch.Tensor) -> torch.Tensor:
    """Slant to either side. The image also gets higher by a twelfth, by scikit-image's definition of a shear."""
    angle = _either_side(images)
    rows = [torch.ones_like(angle), -angle.sin()], [torch.zeros_like(angle), angle.cos()]
    return _sample(images, _matrix(rows))


@kind("scale")
def scale(images: torch.Tensor) -> torch.Tensor:
    """Shrink about the centre."""
    return _sample(images, (torch.eye(2) / SCALE).expand(len(images), 2, 2))


@kind("rotate")
def rotate(images: torch.Tensor) -> torch.Tensor:
    """Turn to either side about the centre."""
    angle = _either_side(images)
    return _sample(images, _matrix(([angle.cos(), -angle.sin()], [angle.sin(), angle.cos()])))


@kind("brightness")
def brightness(images: torch.Tensor) -> torch.Tensor:
    """Add to every pixel."""
    return (images + BRIGHTER).clamp(max=1)


@kind("contrast")
def contrast(images: torch.Tensor) -> torch.Tensor:
    """Move every pixel towards the mean of its image."""
    mean = images.mean((1, 2), keepdim=True)
    return mean + (images - mean) * CONTRAST


@kind("saturate")
def saturate(images: torch.Tensor) -> torch.Tensor:
    """Raise hue, saturation and value, and return to grey.

    Of a grey pixel, hue and saturation are 0. Both become TINT: a yellow whose red and blue are less than its green.
    """
    value = (images * SATURATION + TINT).clamp(max=1)
    red, blue = 1 - TINT * (6 * TINT - 1), 1 - TINT  # of the green, at a hue of a sixth to a third
    return value * (LUMA[0] * red + LUMA[1] + LUMA[2] * blue)


@kind("inverse")
def inverse(images: torch.Tensor) -> torch.Tensor:
    """Exchange black and white."""
    return 1 - images


@kind("mirrored")
def mirrored(images: torch.Tensor) -> torch.Tensor:
    """Flip left to right."""
    return images.flip(2)


@kind("upside down")
def upside_down(images: torch.Tensor) -> torch.Tensor:
    """Flip top to bottom."""
    return images.flip(1)


@kind("turned left")
def turned_left(images: torch.Tensor) -> torch.Tensor:
    """Turn by 90 degrees against the clock."""
    return images.rot90(1, (1, 2))


@kind("turned right")
def turned_right(images: torch.Tensor) -> torch.Tensor:
    """Turn by 90 degrees with the clock."""
    return images.rot90(-1, (1, 2))


def _to_pixels(values: torch.Tensor) -> torch.Tensor:
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def _either_side(images: torch.Tensor) -> torch.Tensor:
    """Draw ANGLE or its negative for each image: float32 (n,)."""
    return ANGLE * (2 * torch.randint(2, (len(images),)) - 1)


def _matrix(rows: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Stack two rows of two numbers for each image: float32 (n, 2, 2)."""
    return torch.stack([torch.stack(list(row), 1) for row in rows], 1)


def _sample(
    images: torch.Tensor, matrix: torch.Tensor, moved: torch.Tensor | None = None, outside: str = "zeros"
) -> torch.Tensor:
    """Take each pixel from where matrix float32 (n, 2, 2) maps its place (x, y), seen from the centre.

    moved: pixels to add to that, float32 (n, 2). Between pixels the value is bilinear; outside: "zeros" or "border".
    """
    moved = torch.zeros(len(images), 2) if moved is None else moved
    theta = torch.cat([matrix, moved.unsqueeze(2) * 2 / images.shape[-1]], 2)
    grid = F.affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), grid, padding_mode=outside, align_corners=False).squeeze(1)


# --- the program -----------------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Write the accuracies of measure's results as lines: a row for each kind, a column for each checkpoint."""
    rows = {"as they are": [each["plain"]["share"] for each in results]}
    rows |= {name: [each["kinds"][name]["share"] for each in results] for name in KINDS}
    rows[f"mean of the {len(KINDS)} kinds"] = [each["mean"] for each in results]
    wide = max(map(len, rows))
    head = " " * wide + "".join(f"{number:>9}" for number in range(1, len(results) + 1))
    return [head, *(f"{name:<{wide}}" + "".join(f"{share:>9.2%}" for share in row) for name, row in rows.items())]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    parser = cli.Parser("Measure checkpoints on harder test images, of the kinds of Fashion-MNIST-C.")
    parser.prog = PROGRAM
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        type=Path,
        help="default: the shipped published CNN, best ResNet and robust CNN",
    )
    parser.add_argument(
        "--json",
        metavar="FILE.json",
        type=cli.file_to_write(".json"),
        help="write the numbers there (default: docs/figures/fashion_c.json if no CHECKPOINT is named, else nowhere)",
    )
    cli.add_data_dir(parser, other=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the numbers. Returns the exit code."""
    args = parse_args(argv)
    target = args.json or (None if args.checkpoints else RESULTS)
    loaded = evaluation.load(args.checkpoints or SHIPPED, checkpoint.Bare())
    (split,) = data.load("test", data_dir=args.data_dir)
    for each in loaded:
        checkpoint.check_classes(each.path, each.info, split)
    results = measure(loaded, split)
    print(f"Accuracy on {len(split.labels):,} test images of {split.source}, made harder in {len(KINDS)} ways:")
    for number, each in enumerate(loaded, 1):
        print(f"  {number}: {cli.shown(each.path)}")
    print("\n".join(["", *table(results)]))
    if target:
        files.write_json(target, {"data": split.source, "n": len(split.labels), "checkpoints": results})
        print(f"\nwritten to {cli.shown(target)}")
    return 0


if __name__ == "__main__":
    cli.run(main, PROGRAM)
