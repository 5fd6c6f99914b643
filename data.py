"""Fashion-MNIST in memory: split it, cut it into batches, augment and normalise them.

    train, val, test = data.load("train", "val", "test")
    for images, labels in data.batches(train, 128, seed=0, epoch=1):
        logits = model(data.normalise(data.augment(images, {"flip": 0.5})))

The data set stays in memory as uint8 tensors; a batch is gathered, augmented and normalised in a few tensor operations.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from dataset.sources import CLASSES, PUBLISHED, DataError, find, write
from recipes import SHARE, Recipe, fold_of
from runtime.errors import UserError
from runtime.schema import Number, problem

__all__ = [
    "AUGMENTATIONS",
    "CLASSES",
    "MEAN",
    "STD",
    "DataError",
    "Draws",
    "Split",
    "augment",
    "batches",
    "load",
    "write",
]

MEAN, STD = 0.5, 0.5  # of pixels scaled to [0, 1], as published
SPLIT_SEED = 20170825  # of the validation split alone, never of a run: the day arXiv:1708.07747 appeared
SPLITS = ("train", "val", "train+val", "test")
VALIDATION_SHARE = 12  # one training image in twelve of each class: 5,000 of 60,000


class Split(NamedTuple):
    """Images and labels of one split, in the order of the files."""

    name: str  # "train", "val", "train+val", "test", or "held-out" in a fold run
    images: torch.Tensor  # uint8 (n, 28, 28), 0 is the black background
    labels: torch.Tensor  # int64 (n,), 0 to 9
    source: str  # "Fashion-MNIST", or the name of the folder of another set
    classes: tuple[str, ...] = CLASSES

    def to(self, device: torch.device | str) -> "Split":
        """Move images and labels to a device."""
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def load(*splits: str, data_dir: str | Path | None = None, other_data: bool | None = False) -> list[Split]:
    """Find and verify the data set, and return the splits asked for.

    "train" and "val" are the 55,000 and 5,000 images of a fixed stratified split of the training set, "train+val" is
    all 60,000 of it, "test" is the published test set. `data_dir`, or the variable FMNIST_DIR, is a folder or a file of
    the data in any form of docs/data.md. Without them the data are found or fetched. other_data: accept images there
    that are not Fashion-MNIST; None where the user has no such choice.

    Raises DataError for another name of a split, when the place given cannot be used, or no source has the data.
    """
    if unknown := [name for name in splits if name not in SPLITS]:
        raise DataError(f"there is no split {unknown[0]!r}; they are {', '.join(SPLITS)}")
    parts = {"t10k" if name == "test" else "train" for name in splits}
    names = [name for name in PUBLISHED if name.split("-")[0] in parts]
    files = find(names, data_dir, other_data)
    result = []
    for split in splits:
        part = "t10k" if split == "test" else "train"
        images, labels = (files.arrays[f"{part}-{kind}-ubyte"] for kind in ("images-idx3", "labels-idx1"))
        if split in ("train", "val"):
            index = split_indices(labels)[split]
            if not len(index):
                raise DataError(f"no class has {VALIDATION_SHARE} training images: too few for validation images")
            images, labels = images[index], labels[index]
        tensors = torch.tensor(images), torch.tensor(labels, dtype=torch.int64)
        result.append(Split(split, *tensors, files.source, files.classes))
    return result


def held_out(train: Split) -> Split:
    """Return the validation images among all training images; none where no class has VALIDATION_SHARE of them."""
    index = split_indices(train.labels.numpy())["val"]
    return train._replace(name="val", images=train.images[index], labels=train.labels[index])


def split_indices(labels: np.ndarray, of: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Compute the stratified indices of the "train" and "val" images, the same for every run and machine.

    labels: uint8 (n,). Returns sorted int64 arrays. RandomState draws one image in twelve of each class; numpy froze
    its stream for good (NEP 19). of: labels of more images, whose twelfth is drawn from these; so all folds of them
    have as many validation images as the whole.
    """
    counts = np.bincount(labels if of is None else of, minlength=len(CLASSES)) // VALIDATION_SHARE
    val = np.sort(np.concatenate([members[:n] for members, n in zip(_shuffled(labels), counts, strict=True)]))
    return {"train": np.setdiff1d(np.arange(len(labels)), val), "val": val}


def _shuffled(labels: np.ndarray) -> list[np.ndarray]:
    """Return the indices of each class's images in a random order, the same for every run and machine."""
    random = np.random.RandomState(SPLIT_SEED)
    return [random.permutation(np.flatnonzero(labels == label)) for label in range(len(CLASSES))]


def fold_indices(labels: np.ndarray, fold: str) -> np.ndarray:
    """Compute the indices, sorted int64, of the images that a fold holds out of all training images.

    labels: (n,). fold: as recipes.fold_of reads it. The images of each class are dealt to the N folds in turns, so that
    any two folds differ by one image at most, in all and of each class. Every image is in one fold.
    Raises UserError where the name is none of a fold, or where a class is too small.
    """
    if not (place := fold_of(fold)):
        return split_indices(labels)["val"]
    number, count = place
    order = _shuffled(labels)
    if (fewest := min(map(len, order))) < count:
        raise DataError(
            f"--fold {fold}: a class has {fewest:,} training images, so there can be {fewest:,} folds at most"
        )
    return np.sort(np.concatenate(order)[number - 1 :: count])


def hold_out(whole: Split, fold: str, select: str) -> tuple[list[Split], np.ndarray]:
    """Cut the images of "train+val" into the splits of a fold run: training, validation if that selects, held-out.

    select: of the recipe. Returns the splits and the indices of the held-out images. Raises UserError of fold_indices.
    """
    labels = whole.labels.numpy()
    held = fold_indices(labels, fold)
    rest = np.setdiff1d(np.arange(len(labels)), held)
    cuts = {"train": rest, "held-out": held}
    if select == "val":
        inner = split_indices(labels[rest], of=labels)
        cuts = {"train": rest[inner["train"]], "val": rest[inner["val"]], "held-out": held}
    if empty := [name for name, index in cuts.items() if not len(index)]:
        raise DataError(f"--fold {fold}: no class has enough training images for any {empty[0]} images")
    splits = [whole._replace(name=name, images=whole.images[i], labels=whole.labels[i]) for name, i in cuts.items()]
    return splits, held


def fingerprint(*splits: Split) -> str:
    """Compute the SHA-256, in hexadecimal, of the images and labels of these splits in their order."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.images.cpu().numpy())  # type: ignore[arg-type]
        digest.update(split.labels.cpu().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def derive_seeds(*key: int, n: int = 1) -> list[int]:
    """Derive n 63-bit seeds from (seed,) for a run's initial weights, or from (seed, epoch) for an epoch.

    Of an epoch's seeds, the first is for its permutation, and the one at index i for its step i, counted from 1. A
    seed does not depend on n. So every random draw is a function of its place in the run, and no generator's state
    lives across steps. (seed, epoch, rank) gives the seeds of one process among several. Epochs count from 1 because
    SeedSequence pads its key with zeros; for the same reason the seeds of rank 0 are those of a single process.
    """
    return (np.random.SeedSequence(key).generate_state(n, np.uint64) >> np.uint64(1)).tolist()


def batches(
    split: Split, batch_size: int, seed: int | None = None, epoch: int | None = None, *,
    first: int = 0, rank: int = 0, world: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Yield (images uint8 (b, 28, 28), labels int64 (b,)) on the split's device, each image once.

    The order and the other arguments are those of places().
    """
    for index in places(split, batch_size, seed, epoch, first=first, rank=rank, world=world):
        # index_select copies whole images: six times as fast as indexing
        yield split.images.index_select(0, index), split.labels.index_select(0, index)


def places(
    split: Split, batch_size: int, seed: int | None = None, epoch: int | None = None, *,
    first: int = 0, rank: int = 0, world: int = 1,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Yield where the images of each batch are in the split, int64 (b,) on its device, each image once.

    With a seed, the order is the permutation of (seed, epoch); without, that of the files. The first `first` batches
    are skipped. Of `world` processes, the one with this rank gets its share of every batch.
    """
    n, device = len(split.labels), split.labels.device
    if seed is None or epoch is None:
        order = torch.arange(n, device=device)
    else:  # drawn on the CPU, so that every device sees the same order
        generator = torch.Generator().manual_seed(derive_seeds(seed, epoch)[0])
        order = torch.randperm(n, generator=generator).to(device)
    for index in order.split(batch_size)[first:]:
        yield index[share(len(index), rank, world)]


def share(n: int, rank: int, world: int) -> slice:
    """Return the slice of n items for one of `world` processes; sizes differ by at most one."""
    return slice(n * rank // world, n * (rank + 1) // world)


# --- augmentation: a function here and its value in a row of recipes.py are all it takes -----------------


class Draws:
    """Random numbers for each image of a batch, from the default generator of its device.

    Where a process has only a part of a batch of n images, it draws for all n and keeps its part. So the numbers do
    not depend on how many processes share the batch.
    """

    def __init__(self, n: int, part: slice, device: torch.device):
        self.n, self.part, self.device = n, part, device

    def uniform(self) -> torch.Tensor:
        """Draw a number in [0, 1) for each image: float32 (b,)."""
        return torch.rand(self.n, device=self.device)[self.part]

    def between(self, low: float, high: float) -> torch.Tensor:
        """Draw a number from low to high for each image: float32 (b, 1, 1), to calculate with images."""
        return low + (high - low) * self.uniform().view(-1, 1, 1)

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw numbers of mean 0 and deviation 1, so many for each image: float32 (b, *shape)."""
        return torch.randn(self.n, *shape, device=self.device)[self.part]

    def integers(self, high: int, rows: int = 1) -> torch.Tensor:
        """Draw whole numbers from 0 to high - 1: int64 (rows, b)."""
        return torch.randint(high, (rows, self.n), device=self.device)[:, self.part]


AUGMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {}  # by name, in the order in which they are applied
Share = Annotated[float, SHARE]  # with a kind of runtime/schema.py, which recipes and files must keep to
Pixels = Annotated[int, Number(0, 28, whole=True)]
Degrees = Annotated[float, Number(0, 180)]
Deviation = Annotated[float, Number(0, 28)]  # of a Gaussian, in pixels


def augmentation(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Register a function (images uint8 (b, 28, 28), Draws, values of a recipe ...) -> images of the same shape."""
    AUGMENTATIONS[function.__name__] = function
    return function


@augmentation
def flip(images: torch.Tensor, draw: Draws, share: Share = 0.5) -> torch.Tensor:
    """Mirror this share of the images left to right."""
    chosen = draw.uniform().view(-1, 1, 1) < share
    return torch.where(chosen, images.flip(2), images)


@augmentation
def shift(images: torch.Tensor, draw: Draws, pixels: Pixels, still: Share = 0.0) -> torch.Tensor:
    """Move each image by up to so many pixels along both axes, except for the share `still`; black comes in."""
    windows = F.pad(images, (pixels,) * 4).unfold(1, images.shape[1], 1).unfold(2, images.shape[2], 1)  # without a copy
    places = draw.integers(2 * pixels + 1, rows=2)
    if still:
        places = torch.where(draw.uniform() < still, pixels, places)
    down, right = places
    return windows[torch.arange(len(images), device=images.device), down, right]


@augmentation
def warp(
    images: torch.Tensor, draw: Draws, share: Share, degrees: Degrees, scale: Share, pixels: Pixels
) -> torch.Tensor:  # fmt: skip
    """Turn, stretch, slant and move this share of the images, each by up to so much; black comes in."""
    angle, slant = torch.deg2rad(draw.between(-degrees, degrees)), draw.between(-scale, scale)
    wide, high = draw.between(1 - scale, 1 + scale), draw.between(1 - scale, 1 + scale)
    right, down = (draw.between(-pixels, pixels) * 2 / images.shape[-1] for _ in range(2))
    cos, sin = angle.cos(), angle.sin()
    rows = torch.cat([wide * cos, slant - sin, right], 2), torch.cat([sin, high * cos, down], 2)
    grid = F.affine_grid(torch.cat(rows, 1), [len(images), 1, *images.shape[1:]], align_corners=False)
    moved = F.grid_sample(images.unsqueeze(1).float(), grid, align_corners=False).squeeze(1)
    return torch.where(draw.between(0, 1) < share, _to_pixels(moved), images)


@augmentation
def light(images: torch.Tensor, draw: Draws, share: Share, strength: Share) -> torch.Tensor:
    """Change the brightness of this share of the images, by a power and a factor of up to this strength."""
    power, factor = draw.between(-strength, strength).exp(), draw.between(1 - strength, 1)
    changed = _to_pixels((images / 255) ** power * 255 * factor)
    return torch.where(draw.between(0, 1) < share, changed, images)


@augmentation
def clutter(images: torch.Tensor, draw: Draws, share: Share, pixels: Pixels) -> torch.Tensor:
    """Cover up to so many pixels along a part of an edge by grey, in this share of the images: what lies beside."""
    side, (near, far) = images.shape[-1], draw.integers(images.shape[-1], rows=2).sort(0).values.view(2, -1, 1)
    depth, place = draw.between(0, pixels), torch.arange(side, device=images.device)
    along = ((place >= near) & (place <= far)).unsqueeze(1)  # (b, 1, side)
    strips = along & (place.view(1, -1, 1) < depth)  # at the upper edge
    turned = torch.stack([strips, strips.flip(1), strips.transpose(1, 2), strips.flip(1).transpose(1, 2)])
    chosen = turned[draw.integers(4)[0], torch.arange(len(images), device=images.device)]
    grey = _to_pixels(draw.between(0, 256))
    return torch.where(chosen & (draw.between(0, 1) < share), grey, images)


@augmentation
def veil(images: torch.Tensor, draw: Draws, share: Share, strength: Share) -> torch.Tensor:
    """Lay a grey that changes evenly over what is darker, in this share of the images: remains of a background."""
    place = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    slopes = draw.between(-1, 1) * place + draw.between(-1, 1) * place.unsqueeze(1)
    grey = _to_pixels(255 * strength * draw.between(0, 1) * (1 + slopes) / 2)
    return torch.where(draw.between(0, 1) < share, images.maximum(grey), images)


@augmentation
def erase(images: torch.Tensor, draw: Draws, side: Pixels, share: Share = 1.0) -> torch.Tensor:
    """Blacken a square of so many pixels a side around any pixel, cut off at the border, in this share of the images.

    Cutout: DeVries and Taylor 2017, arXiv:1708.04552.
    """
    place = torch.arange(images.shape[-1], device=images.device)
    rows, columns = draw.integers(images.shape[-1], rows=2).unsqueeze(2) - side // 2
    in_rows, in_columns = ((start <= place) & (place < start + side) for start in (rows, columns))
    square = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)
    return images.masked_fill(square & (draw.between(0, 1) < share) if share < 1 else square, 0)


@augmentation
def blur(images: torch.Tensor, draw: Draws, share: Share, deviation: Deviation) -> torch.Tensor:
    """Blur this share of the images by a Gaussian of up to this deviation, in pixels."""
    place = torch.arange(images.shape[-1], device=images.device)
    distance = (place - place.unsqueeze(1)) / draw.between(0, deviation).clamp(min=0.1)
    weights = torch.softmax(-(distance**2) / 2, 2)  # (b, side, side): those of each row add up to 1
    blurred = _to_pixels(weights @ images.float() @ weights.transpose(1, 2))
    return torch.where(draw.between(0, 1) < share, blurred, images)


@augmentation
def fade(images: torch.Tensor, draw: Draws, share: Share, least: Share) -> torch.Tensor:
    """Reduce the contrast of this share of the images: each pixel's distance from the mean, to `least` or more."""
    mean = images.float().mean((1, 2), keepdim=True)
    faded = _to_pixels(mean + (images - mean) * draw.between(least, 1))
    return torch.where(draw.between(0, 1) < share, faded, images)


@augmentation
def noise(images: torch.Tensor, draw: Draws, share: Share, deviation: Share) -> torch.Tensor:
    """Add Gaussian noise of up to this deviation, as a share of the grey range, to this share of the images."""
    noisy = _to_pixels(images + 255 * draw.between(0, deviation) * draw.normal(*images.shape[1:]))
    return torch.where(draw.between(0, 1) < share, noisy, images)


def _to_pixels(values: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def augment(
    images: torch.Tensor, augmentations: Mapping[str, Any], n: int | None = None, part: slice = slice(None)
) -> torch.Tensor:
    """Alter each image uint8 (b, 28, 28) in its own way.

    augmentations: as in a recipe, the name of a function to its value, or to a list of its values. They are applied in
    the order of AUGMENTATIONS. Where the images are a part of a batch of n, each gets what it would get in the whole.
    Raises UserError for a name that is not in AUGMENTATIONS.
    """
    draw = Draws(n or len(images), part, images.device)
    if unknown := augmentations.keys() - AUGMENTATIONS.keys():
        check_values({name: augmentations[name] for name in unknown})
    for name, function in AUGMENTATIONS.items():
        if name in augmentations and len(images):
            images = function(images, draw, *_listed(augmentations[name]))
    return images


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def check_values(augmentations: Mapping[str, Any], place: str = "") -> None:
    """Raise UserError for an augmentation that data.py lacks, or with values that it does not take."""
    for name, value in augmentations.items():
        if name not in AUGMENTATIONS:
            raise UserError(f"{place}augmentation {name!r} is not in data.py, which has {', '.join(AUGMENTATIONS)}")
        signature = inspect.signature(AUGMENTATIONS[name])
        try:
            values = signature.bind(None, None, *_listed(value)).arguments
        except TypeError as error:
            raise UserError(f"{place}augmentation {name!r} with {value!r:.100}: {error}") from None
        for key, each in values.items():
            for kind in getattr(signature.parameters[key].annotation, "__metadata__", ()):
                if wrong := problem(each, kind, key):
                    raise UserError(f"{place}augmentation {name!r} with {value!r:.100}: {wrong}")


def check_augmentations(table: Mapping[str, Mapping[str, Recipe]]) -> None:
    """Raise UserError for an augmentation that recipes name but data.py lacks, or that no recipe uses."""
    rows = {f"{name}, {model}": recipe for name, models in table.items() for model, recipe in models.items()}
    for row, recipe in rows.items():
        check_values(recipe.augment, f"recipes.py, row {row}: ")
    for name in AUGMENTATIONS:
        if not any(name in recipe.augment for recipe in rows.values()):
            raise UserError(f"data.py: no row of recipes.py uses the augmentation {name!r}; add it to a row's augment")


def normalise(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Turn uint8 (b, 28, 28) into dtype (b, 1, 28, 28) in [-1, 1]: (pixel / 255 - MEAN) / STD.

    In float32 it takes torchvision's steps, with the same bits. Shorter dtypes hold a pixel and its distance from the
    mean exactly; so they are rounded once, with a third of the memory traffic.
    """
    images = images.unsqueeze(1).to(dtype)
    if dtype == torch.float32:
        return images.div_(255).sub_(MEAN).div_(STD)
    return images.sub_(255 * MEAN).div_(255 * STD)
