"""Convert a picture of one object on a plain background to the form of the data set's images.

pixels = convert(read("shirt.jpg"))       # uint8 (28, 28), light on black

The steps are the publisher's (Xiao et al. 2017, arXiv:1708.07747, section 2): trim the edges that have the colour of
the corners, bring the longest edge to 28 pixels, sharpen, centre on 28x28, negate, convert to grey. Two differences:
a dark background is not negated, and the background always ends as black, however bright it was.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from pictures.read import PictureError

SIZE = 28
TOLERANCE = 0.05  # published: a pixel this near to the background's colour is background (1: from black to white)
EDGE = 0.15  # as a share of the object's distance: so are blurred edges and the ripples of a JPEG around the object
SPECKS = 200  # a row or column is background, too, if less than one pixel in so many has another colour
SHARPEN = ImageFilter.Kernel(  # a Gaussian of sigma 1, at half the publisher's strength: the resizing here is sharper
    (3, 3), [-31, -51, -31, -51, 1328, -51, -31, -51, -31], 1000
)


class Conversion(NamedTuple):
    """A picture, and what became of it."""

    picture: Image.Image  # RGB
    mask: np.ndarray  # bool (height, width): what counts as the object
    pixels: np.ndarray  # uint8 (28, 28), the object light on black
    notes: tuple[str, ...] = ()  # what may have gone wrong, in words


def convert(picture: Image.Image) -> np.ndarray:
    """Convert an RGB picture to an image like the data set's: uint8 (28, 28), the object light on black.

    An image of the data set itself is returned unchanged. Raises PictureError if all pixels have one colour.
    """
    return explain(picture).pixels


def explain(picture: Image.Image) -> Conversion:
    """Convert an RGB picture as convert does, and keep what shows how. Raises PictureError like convert."""
    pixels = np.asarray(picture)  # uint8 (height, width, 3)
    if is_native(pixels):
        return Conversion(picture, pixels[..., 0] > 0, pixels[..., 0].copy())
    background, is_object = _find_background(pixels)
    fitted = _fit(picture.crop(_bounding_box(is_object)))
    return Conversion(picture, is_object, _light_on_black(_centre(fitted, background), background))


def is_native(pixels: np.ndarray) -> bool:
    """Say whether pixels, uint8 (height, width, 3), look like an image of the data set: 28x28, grey, on black."""
    return is_small_grey(pixels) and bool((pixels == 0).sum() > (pixels == 255).sum())


def is_small_grey(pixels: np.ndarray) -> bool:
    """Say whether pixels, uint8 (height, width, 3), are 28x28 and grey."""
    return pixels.shape[:2] == (SIZE, SIZE) and bool((pixels == pixels[..., :1]).all())


def _find_background(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the background's colour, uint8 (3,), and the pixels of the object, bool (height, width).

    The colour is that of one of the four corners: the one that most of the border has.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    background = max(corners, key=lambda corner: (_distance(border, corner) <= TOLERANCE).sum())
    distance = _distance(pixels, background)
    differs = distance > TOLERANCE
    if not differs.any():
        raise PictureError("all of one colour: it shows no object")
    return background, distance > max(TOLERANCE, EDGE * np.percentile(distance[differs], 90))


def _distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Measure each pixel's distance from a colour; from black to white it is 1."""
    difference = pixels.astype(np.float32) - colour
    return np.sqrt(np.einsum("...c,...c", difference, difference)) / (255 * 3**0.5)  # .sum(-1) takes longer


def _bounding_box(is_object: np.ndarray) -> tuple[int, int, int, int]:
    """Return the object's left, top, right and bottom edge."""
    top, bottom = _extent(is_object.sum(1), is_object.shape[1])
    left, right = _extent(is_object.sum(0), is_object.shape[0])
    return left, top, right, bottom


def _extent(counts: np.ndarray, across: int) -> tuple[int, int]:
    """Return the first row and one past the last row that show the object; the same for columns.

    counts: the object's pixels in each row; across: all pixels in a row.
    """
    (places,) = np.nonzero(counts > across // SPECKS)
    if not len(places):
        (places,) = np.nonzero(counts)
    return places[0], places[-1] + 1


def _fit(picture: Image.Image) -> Image.Image:
    """Resize a picture so that its longest edge has 28 pixels, and sharpen it."""
    longest = max(picture.size)
    width, height = (max(1, round(SIZE * edge / longest)) for edge in picture.size)
    method = Image.Resampling.HAMMING if longest >= SIZE else Image.Resampling.BICUBIC
    return picture.resize((width, height), method).filter(SHARPEN)


def _centre(picture: Image.Image, background: np.ndarray) -> Image.Image:
    """Put a picture in the middle of 28x28 pixels of the background's colour."""
    canvas = Image.new("RGB", (SIZE, SIZE), tuple(background))
    left, top = ((SIZE - edge + 1) // 2 for edge in picture.size)  # rounded as in the data set
    canvas.paste(picture, (left, top))
    return canvas


def _light_on_black(canvas: Image.Image, background: np.ndarray) -> np.ndarray:
    """Convert to grey, uint8 (28, 28), scaled so that the background is black; negate it on a light background."""
    zero = float(np.asarray(Image.new("RGB", (1, 1), tuple(background)).convert("L"))[0, 0])
    grey = np.asarray(canvas.convert("L")).astype(float)
    light = (zero - grey) / zero if zero > 127 else (grey - zero) / (255 - zero)
    return (255 * light.clip(0, 1)).round().astype(np.uint8)
