"""Any picture of a garment on a plain ground, brought to the form of the data set's images.

pixels = pictures.convert(pictures.read("shirt.jpg"))       # uint8 (28, 28), the ground black

The steps are the publisher's (Xiao et al. 2017, arXiv:1708.07747, section 2): trim the edges that have the colour of
the corners, bring the longest edge to 28 pixels, sharpen, centre on 28x28, negate, make grey. Beyond them a dark ground
is left as it is instead of negated, and whatever the ground's brightness, it ends as black.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from data import UserError

SIZE = 28
MAX_PIXELS = 12_000 * 12_000  # a picture that announces more is refused, unopened
WORKING = 1_000  # pixels of the longest edge that are enough to find the garment
TOLERANCE = 0.05  # of the distance from black to white, as published: what is as near to the ground's colour is ground
EDGE = 0.15  # and, of how far the garment is from it: a blurred edge, or a JPEG's ripples around it
SPECKS = 200  # a row or column is ground, too, with less than one pixel in so many of another colour
SHARPEN = ImageFilter.Kernel(  # by a Gaussian of sigma 1, half as much as the publisher: the resizing is sharper here
    (3, 3), [-31, -51, -31, -51, 1328, -51, -31, -51, -31], 1000
)


class PictureError(UserError):
    """A file that is no picture of use."""


def read(source):
    """The picture, RGB upright on white where it was transparent, of a path or of bytes; of several frames the first.

    Raises PictureError when it is none, damaged or too large.
    """
    try:
        content = Path(source).read_bytes() if isinstance(source, str | Path) else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Pillow can make sense of none the less
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"{image.width:,} x {image.height:,} pixels are too many")
            image.draft("RGB", (WORKING, WORKING))  # a JPEG of many pixels is decoded to fewer
            image.load()
            return opaque(ImageOps.exif_transpose(_smaller(_eight_bits(image))))
    except UnidentifiedImageError:
        raise PictureError("not a picture that Pillow can open") from None
    except PictureError:
        raise
    except OSError as error:
        raise PictureError(error.strerror or f"damaged: {error}") from None
    except Exception as error:  # a malformed file can make a decoder raise anything
        raise PictureError(f"damaged: {error}") from None


def _eight_bits(image):
    """A picture of 16-bit, 32-bit or floating-point pixels scaled to 8 bits; others as they are."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        scale = next((limit for limit in (1.0, 255.0, 65_535.0) if values.max() <= limit), values.max())
        return Image.fromarray((values.clip(0) / scale * 255).round().astype(np.uint8))
    return image


def _smaller(image):
    """The picture at a size that is enough to work with."""
    factor = max(image.size) // WORKING
    if factor < 2:
        return image
    plain = image.convert("RGBA") if _is_transparent(image) else image.convert("RGB")
    return _with_exif(plain.reduce(factor), image)


def _with_exif(image, original):
    image.info["exif"] = original.getexif().tobytes()
    return image


def _is_transparent(image):
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def opaque(image):
    """A Pillow image as RGB, on white where it was transparent."""
    if _is_transparent(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def convert(picture):
    """The picture as the data set would have it: uint8 (28, 28), the garment light on a black ground.

    Raises PictureError where all is of one colour. An image of the data set itself comes back unchanged.
    """
    pixels = np.asarray(picture)  # uint8 (height, width, 3)
    if is_native(pixels):
        return pixels[..., 0].copy()
    ground, garment = _find_ground(pixels)
    top, bottom = _extent(garment.sum(1), garment.shape[1])
    left, right = _extent(garment.sum(0), garment.shape[0])
    picture = picture.crop((left, top, right, bottom))
    longest = max(picture.size)
    size = [max(1, round(SIZE * edge / longest)) for edge in picture.size]
    picture = picture.resize(size, Image.Resampling.HAMMING if longest >= SIZE else Image.Resampling.BICUBIC)
    picture = picture.filter(SHARPEN)
    canvas = Image.new("RGB", (SIZE, SIZE), tuple(ground))
    canvas.paste(picture, tuple((SIZE - edge + 1) // 2 for edge in size))  # rounded as in the data set
    black = float(np.asarray(Image.new("RGB", (1, 1), tuple(ground)).convert("L"))[0, 0])
    grey = np.asarray(canvas.convert("L")).astype(float)
    light = (black - grey) / black if black > 127 else (grey - black) / (255 - black)
    return (255 * light.clip(0, 1)).round().astype(np.uint8)


def is_native(pixels):
    """Whether it is an image of the data set: 28x28, grey, on black."""
    grey = pixels.shape[:2] == (SIZE, SIZE) and (pixels == pixels[..., :1]).all()
    return bool(grey) and (pixels == 0).sum() > (pixels == 255).sum()


def _find_ground(pixels):
    """The ground's colour uint8 (3,), and which pixels are not of it, bool (height, width).

    Of the four corners' colours, the one that most of the border has.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    ground = max(corners, key=lambda corner: (_distance(border, corner) <= TOLERANCE).sum())
    distance = _distance(pixels, ground)
    garment = distance > TOLERANCE
    if not garment.any():
        raise PictureError("all of one colour: there is no garment")
    return ground, distance > max(TOLERANCE, EDGE * np.percentile(distance[garment], 90))


def _distance(pixels, colour):
    """Distance of each pixel from a colour, of that from black to white."""
    return np.sqrt(((pixels.astype(np.float32) - colour) ** 2).sum(-1)) / (255 * 3**0.5)


def _extent(counts, across):
    """First and one past the last row (or column) that shows the garment, of its pixels in each."""
    (places,) = np.nonzero(counts > across // SPECKS)
    if not len(places):
        (places,) = np.nonzero(counts)
    return places[0], places[-1] + 1
