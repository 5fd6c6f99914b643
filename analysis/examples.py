"""Pictures as a user might have them, composed of the data set's images: on white, in colour, mirrored, on a cloth.

pictures = examples(test)    # one of each of EXAMPLES: (title, RGB picture)

python -m analysis.examples FOLDER      # writes them to a new folder, to try predict.py with
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from data import Split, load
from runtime import cli
from runtime.errors import UserError

PROGRAM = "python -m analysis.examples"
SIDE, MARGIN = 300, 40  # pixels: of a picture, and around its object
SEED = 0  # of the cloth


class Scene(NamedTuple):
    """How to show one image of a class."""

    label: int  # the first test image of this class
    words: str  # of the background
    background: tuple[int, int, int]  # its colour
    cloth: bool = False  # else the background is plain
    mirrored: bool = False


EXAMPLES = (
    Scene(7, "facing right, on white", (255, 255, 255), mirrored=True),
    Scene(9, "facing right, on blue", (70, 110, 160), mirrored=True),
    Scene(1, "on white", (255, 255, 255)),
    Scene(3, "on black", (0, 0, 0)),
    Scene(2, "on a cloth", (205, 190, 165), cloth=True),
    Scene(8, "on a blue cloth", (150, 175, 190), cloth=True),
)


def examples(test: Split, scenes: Sequence[Scene] = EXAMPLES) -> list[tuple[str, Image.Image]]:
    """Compose the scenes of test images that there are; equal in each call."""
    labels = test.labels.tolist()
    return [
        (f"{test.classes[scene.label]}, {scene.words}", compose(test.images[labels.index(scene.label)].numpy(), scene))
        for scene in scenes
        if scene.label in labels
    ]


def compose(image: np.ndarray, scene: Scene) -> Image.Image:
    """Compose a picture, RGB, of an image, uint8 (28, 28), light on black. The object is negated, as it was sold."""
    image = image[:, ::-1] if scene.mirrored else image
    inside = ndimage.binary_erosion(ndimage.binary_fill_holes(image > 8))
    solid = np.maximum(255 * inside, np.minimum(2.5 * image, 255))  # the edges of the data set's objects are dark
    cover = _enlarge(solid)[..., None]
    light = _enlarge(image)[..., None]
    if scene.background == (0, 0, 0):  # as in the data set
        return _picture(255 * light.repeat(3, 2))
    behind = np.full((SIDE, SIDE, 3), scene.background, float)
    if scene.cloth:
        shadow = ndimage.gaussian_filter(np.roll(cover[..., 0], 6, (0, 1)), 5)[..., None]
        behind *= _cloth()[..., None] * (1 - 0.35 * shadow)
    return _picture(cover * 255 * (1 - light) + (1 - cover) * behind)


def _enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarge an image with values to 255, and put it in the middle: float64 (SIDE, SIDE) in [0, 1]."""
    side = SIDE - 2 * MARGIN
    large = Image.fromarray(image.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.pad(np.clip(np.asarray(large, float) / 255, 0, 1), MARGIN)


def _cloth() -> np.ndarray:
    """Make the brightness of a woven, creased cloth: float64 (SIDE, SIDE) around 1."""
    rng = np.random.default_rng(SEED)
    y, x = np.mgrid[:SIDE, :SIDE]
    weave = np.sin(2 * np.pi * x / 6) * np.sin(2 * np.pi * y / 6)
    creases = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), (30, 12))
    return 1 + 0.06 * weave + 0.08 * creases / creases.std() + 0.03 * rng.normal(size=(SIDE, SIDE))


def _picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def main(argv: list[str] | None = None) -> int:
    """Write the pictures to a folder, as PNG files."""
    parser = cli.Parser("Write six pictures, composed of test images, to try predict.py with.")
    parser.prog = PROGRAM
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder for the PNG files")
    cli.add_data_dir(parser)
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise UserError(f"{cli.shown(args.folder)} is there already: name a new folder")
    (test,) = load("test", data_dir=args.data_dir, other_data=args.other_data)
    pictures = examples(test)
    args.folder.mkdir(parents=True)
    for number, (title, picture) in enumerate(pictures, 1):
        picture.save(args.folder / f"{number} {title.replace('/', ' ')}.png")
    print(f"{len(pictures)} pictures are in {cli.shown(args.folder)}")
    return 0


if __name__ == "__main__":
    cli.run(main, PROGRAM)
