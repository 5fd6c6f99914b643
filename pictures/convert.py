"""Convert a picture of one object to the form of the data set's images.

pixels = convert(read("shirt.jpg"))       # uint8 (28, 28), light on black

The steps are the publisher's (Xiao et al. 2017, arXiv:1708.07747, section 2): trim the edges that have the colour of
the background, bring the longest edge to 28 pixels, sharpen, centre on 28x28, negate, convert to grey. Three
differences: the background always ends as black, however bright it was; a black one is not negated; and one without a
single colour is removed first (pictures/background.py).
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from pictures.background import LARGE, find_object, fit_border, large_parts, outermost, without_thin_parts
from pictures.read import PictureError, read

SIZE = 28
TOLERANCE = 0.05  # published: a pixel this near to the background's colour is background (1: from black to white)
EDGE = 0.15  # as a share of the object's distance: so are blurred edges and the ripples of a JPEG around the object
PLAIN = 0.9  # of the border's pixels have the background's colour, or it is not plain
EVEN = 0.02  # a border is plain, too, if most of it is this near to one colour: a garment may touch the border
BLACK = 16  # grey value up to which a background is black
LIGHT = 128  # grey value from which a background can be white in less light
SPECKS = 200  # a row or column is background, too, if less than one pixel in so many has another colour
SPECK = 0.01  # of the largest part's size: smaller parts beside it are specks
FRAME = 0.06  # of a picture's longest edge: a frame around it is not wider
FULL = 0.85  # of the pixels in the first rows and columns inside a frame have another colour
CLEAR = 0.45  # below this clearness of its edge, the object was hardly found
HEAD = 0.7, 2.2  # a head is at least and at most so many times as high as wide
NARROW, WIDE = 0.8, 1.6  # a neck is narrower, and shoulders are wider, by these factors than the head
NOISY = 4  # an object is so many times as far from smooth shades as the noise of the border
FAINT = 0.03, TOLERANCE  # but this distance is not less and not more
RIM = 0.4  # of a pixel of the result: the edge of an object, where its colour is mixed with the background's
SPREAD = 1.1, 1.8  # the width of a top with spread sleeves, divided by its height, is between these
EVEN_SIDES = 0.8  # of its silhouette is also in the mirrored silhouette
SLEEVE = 0.7  # of the height in its middle: it is lower at the ends of the sleeves
SHARPEN = ImageFilter.Kernel(  # a Gaussian of sigma 1, at half the publisher's strength: the resizing here is sharper
    (3, 3), [-31, -51, -31, -51, 1328, -51, -31, -51, -31], 1000
)
AT_ONCE = 2  # pictures that are read and converted
SHOWN = 320  # pixels a side of a picture that is kept to be shown
WHITE = np.full(3, 255, np.uint8)
UNCLEAR = "no clear background was found"
WORN = "someone seems to wear it"


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
    left, top, right, bottom = _inside_frame(pixels)
    mask = np.zeros(pixels.shape[:2], bool)
    mask[top:bottom, left:right], result, notes = _convert(picture.crop((left, top, right, bottom)))
    return Conversion(picture, mask, result, notes)


def explain_all(sources: Iterable[str | Path | bytes]) -> Iterator[Conversion | PictureError]:
    """Read and convert pictures, two at a time, and yield them in order; for one that cannot be read, the error."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(_explain_source, sources)


def _explain_source(source: str | Path | bytes) -> Conversion | PictureError:
    try:
        return explain(read(source))
    except PictureError as error:
        return error


def small(conversion: Conversion) -> Conversion:
    """Return a conversion whose picture and mask have at most 320 pixels a side, to keep many of them."""
    picture, mask = conversion.picture.copy(), Image.fromarray(conversion.mask)
    picture.thumbnail((SHOWN, SHOWN))
    return conversion._replace(picture=picture, mask=np.asarray(mask.resize(picture.size, Image.Resampling.NEAREST)))


def _convert(picture: Image.Image) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Convert a picture without a frame. Return the mask, the converted pixels and the notes."""
    pixels = np.asarray(picture)
    background, is_plain = _find_background(pixels)
    if is_plain:
        mask = _differs(pixels, background)
        if _keeps_polarity(pixels, mask, background):
            mask = _without_specks(mask)
            fitted = _fit(picture.crop(_bounding_box(mask)))
            return mask, _light_on_black(_centre(fitted, background), background), ()
    found, clearness = _find_object(pixels)
    if not found.any() and not is_plain:
        found = np.ones_like(found)
    mask = found.copy() if found.any() else mask
    notes = [] if clearness >= CLEAR or is_plain else [UNCLEAR]
    if neck := find_neck(mask):
        mask[:neck] = False
        notes.append(WORN)
    return mask, _on_white(pixels, mask), tuple(notes)


def _find_object(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Find the object, bool (height, width), and its clearness, in front of smooth shades or of anything else."""
    shades = fit_border(pixels, PLAIN)
    if shades is not None:
        distance = _distance(pixels, shades)
        noise = np.percentile(outermost(distance), 80)
        found = large_parts(distance > np.clip(NOISY * noise, *FAINT), LARGE)
        if found.any():
            left, top, right, bottom = _bounding_box(found)
            found = without_thin_parts(found, rim=round(RIM * max(right - left, bottom - top) / SIZE))
        if found.any():
            return found, 1.0
    return find_object(pixels)


def _differs(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Find what differs from a plain background: bool (height, width). Raises PictureError if nothing does."""
    distance = _distance(pixels, background)
    differs = distance > TOLERANCE
    if not differs.any():
        raise PictureError("all of one colour: it shows no object")
    return np.asarray(distance > max(TOLERANCE, EDGE * np.percentile(distance[differs], 90)))


def find_neck(mask: np.ndarray) -> int:
    """Return the row of the neck where a silhouette, bool (height, width), shows head, neck and shoulders, else 0."""
    rows = np.flatnonzero(mask.any(1))
    if len(rows) < 20:
        return 0
    widths = mask[rows[0] : rows[-1] + 1].sum(1)
    height = len(widths)
    neck = height // 16 + int(widths[height // 16 : 2 * height // 5].argmin())
    head = widths[:neck].max()
    shoulders = widths[neck : neck + height // 5].max()
    is_head = HEAD[0] * head < neck < HEAD[1] * head and widths[neck] < NARROW * head
    return int(rows[0] + neck) if is_head and shoulders > WIDE * head else 0


def _inside_frame(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom edge of what a thin frame of one colour surrounds, or of everything."""
    height, width = pixels.shape[:2]
    whole = 0, 0, width, height
    background, is_plain = _find_background(pixels)
    if not is_plain or min(height, width) < SIZE:
        return whole
    is_inside = _distance(pixels, background) > 2 * TOLERANCE
    rows, columns = (np.flatnonzero(is_inside.mean(axis) > FULL) for axis in (1, 0))
    if not (len(rows) and len(columns)):
        return whole
    widest = FRAME * max(height, width)
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    if max(left, top, width - right, height - bottom) > widest or not left or not top:
        return whole
    return left + 1, top + 1, right - 1, bottom - 1  # an edge may be blurred


def _keeps_polarity(pixels: np.ndarray, is_object: np.ndarray, background: np.ndarray) -> bool:
    """Say whether a plain background is black, or white in less light: then nothing is brighter."""
    zero = _grey(background)
    if zero <= BLACK:
        return True
    luma = np.asarray(Image.fromarray(pixels).convert("L"))[is_object]
    return zero >= LIGHT and float((luma > zero + 8).mean()) < 0.05


def _grey(colour: np.ndarray) -> int:
    return int(np.asarray(Image.new("RGB", (1, 1), tuple(int(value) for value in colour)).convert("L"))[0, 0])


def _on_white(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Put the object on white and convert it as the publisher did: uint8 (28, 28). Spread sleeves are squeezed."""
    left, top, right, bottom = _bounding_box(mask)
    inside = mask[top:bottom, left:right]
    picture = Image.fromarray(np.where(inside[..., None], pixels[top:bottom, left:right], 255).astype(np.uint8))
    if are_sleeves_spread(inside):
        picture = picture.resize((bottom - top, bottom - top), Image.Resampling.BOX)
    return _light_on_black(_centre(_fit(picture), WHITE), WHITE)


def are_sleeves_spread(mask: np.ndarray) -> bool:
    """Say whether a silhouette, bool (height, width), is like a top with its sleeves spread: in the data set they hang.

    It is somewhat wider than high, its left side is like its right one, and its ends are narrower than its middle.
    """
    height, width = mask.shape
    sixth, columns = width // 6, mask.mean(0)
    if not SPREAD[0] < width / height < SPREAD[1] or not sixth:
        return False
    is_even = (mask & mask[:, ::-1]).sum() > EVEN_SIDES * mask.sum()
    ends = max(columns[:sixth].mean(), columns[-sixth:].mean())
    return bool(is_even and ends < SLEEVE * columns[2 * sixth : -2 * sixth].mean())


def is_native(pixels: np.ndarray) -> bool:
    """Say whether pixels, uint8 (height, width, 3), look like an image of the data set: 28x28, grey, on black."""
    return is_small_grey(pixels) and bool((pixels == 0).sum() > (pixels == 255).sum())


def is_small_grey(pixels: np.ndarray) -> bool:
    """Say whether pixels, uint8 (height, width, 3), are 28x28 and grey."""
    return pixels.shape[:2] == (SIZE, SIZE) and bool((pixels == pixels[..., :1]).all())


def _find_background(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Find the most frequent colour of the border, uint8 (3,), and whether it is the border's only one."""
    border = outermost(pixels)
    cells = (border >> 4).astype(np.int32) @ [256, 16, 1]
    colour = border[cells == np.bincount(cells).argmax()].mean(0)
    for _ in range(3):  # the cell's edge may divide the colour
        colour = border[_distance(border, colour) <= TOLERANCE].mean(0)
    distance = _distance(border, colour)
    is_shaded = ((distance > EVEN) & (distance < 3 * TOLERANCE)).mean() > 1 - PLAIN
    is_plain = (distance <= TOLERANCE).mean() >= PLAIN or ((distance <= EVEN).mean() > 0.5 and not is_shaded)
    return colour.round().astype(np.uint8), bool(is_plain)


def _distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Measure each pixel's distance from a colour; from black to white it is 1."""
    difference = pixels.astype(np.float32) - colour.astype(np.float32)
    return np.sqrt(np.einsum("...c,...c", difference, difference)) / (255 * 3**0.5)  # .sum(-1) takes longer


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Leave out parts that are small beside the largest one, if the object may be smaller without them."""
    counts = mask.sum(1), mask.sum(0)
    if all((_extent(each, len(other) * 6) == _extent(each, len(other))) for each, other in (counts, counts[::-1])):
        return mask
    return mask & large_parts(mask, SPECK)


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
    zero = float(_grey(background))
    grey = np.asarray(canvas.convert("L")).astype(float)
    light = (zero - grey) / zero if zero > 127 else (grey - zero) / (255 - zero)
    return (255 * light.clip(0, 1)).round().astype(np.uint8)
