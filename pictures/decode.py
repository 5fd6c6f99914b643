"""Decode the bytes of a picture: upright, RGB, on white where it was transparent, and not larger than is useful.

Only pictures/worker.py calls decode(), in a process that may take little time and memory: a decoder is a large program,
and what it does with a malicious file is not known.
"""

import importlib.util
import io
import re
import warnings

from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from PIL import WebPImagePlugin as WebPImagePlugin

from runtime.errors import UserError

Image.preinit()  # with the three modules imported above, these are all decoders that can run
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # and HEIF; Pillow knows 40 more
BEGINNINGS = re.compile(  # of the files of these formats
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|.{4}ftyp(avi[fs]|mif1|msf1|hei[cmsx]|hev[cmsx])|GIF8[79]a|BM"
    rb"|II[*+]\0|MM\0[*+]|P[1-6]\s",
    re.DOTALL,
)
HEIC = re.compile(rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)  # the default of most phones
DNG_VERSION = 50706  # a TIFF tag that raw files alone have
WORKING = 1_000  # pixels of the longest edge that are enough to find the object
MOST_PIXELS = 12_000 * 12_000  # a picture that announces more is refused undecoded
DEARER = {"I;16": 3, "I;16B": 3, "I;16L": 3, "I;16N": 3, "I": 8, "F": 8}  # modes with so many times fewer pixels
DEARER |= {"AVIF": 2, "HEIF": 2, "WEBP": 3}  # and formats
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")  # Pillow's modes with an alpha channel
ROWS = 64  # of a reduced picture that are made at a time


def decode(content: bytes) -> Image.Image:
    """Decode a picture; an animation yields its first frame. One of more than 2 * WORKING pixels a side is reduced.

    Raises UserError if it is too large, and UserError without words if no decoder knows it. A malformed file can make
    a decoder raise anything.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities that it can handle
        try:
            image = _open(content)
        except UnidentifiedImageError:
            raise UserError from None
        _check(image)
        image.draft("RGB", (WORKING, WORKING))  # decodes a large JPEG to fewer pixels, which is faster
        image.load()
        return _upright(_opaque(_smaller(_eight_bits(image))), _orientation(image))


def _orientation(image: Image.Image) -> object:
    """Return the EXIF orientation of a decoded image; None where the EXIF data are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # the pixels are fine
        return None


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    """Turn an image upright in place, without its other EXIF data: a malformed tag is no reason to refuse it."""
    image.info.clear()
    image.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _opaque(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, on white where it was transparent."""
    if _is_transparent(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _open(content: bytes) -> Image.Image:
    """Open a picture without decoding it; HEIC by a package that is optional."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each thread takes memory
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"too many pixels: at most {MOST_PIXELS:,} are decoded") from None
    except UnidentifiedImageError:
        if not HEIC.match(content) or not importlib.util.find_spec("pillow_heif"):
            raise
    import pillow_heif

    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(content), formats=["HEIF"])


def _check(image: Image.Image) -> None:
    """Raise UserError for a raw file, of which Pillow would open the small preview, and for too many pixels."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and DNG_VERSION in image.tag_v2:
        raise UserError("a camera's raw file: save it as JPEG first")
    most = MOST_PIXELS // max(DEARER.get(image.mode, 1), DEARER.get(image.format or "", 1))
    if image.width * image.height > most:
        raise UserError(f"{image.width:,} x {image.height:,} pixels are too many: at most {most:,} are decoded")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point pixels to 8 bits; leave other images as they are."""
    if image.mode not in DEARER:
        return image
    import numpy as np  # only where it is needed: the worker starts sooner

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    scale = next((limit for limit in (1.0, 255.0, 65_535.0) if values.max() <= limit), values.max())
    return Image.fromarray((values.clip(0) / scale * 255).round().astype(np.uint8))


def _smaller(image: Image.Image) -> Image.Image:
    """Shrink a picture to a size that is enough to work with, in strips: it is never in memory twice."""
    factor = max(image.size) // WORKING
    if factor < 2:
        return image
    mode = "RGBA" if _is_transparent(image) else "RGB"
    reduced = Image.new(mode, (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, reduced.height, ROWS):
        strip = image.crop((0, top * factor, image.width, min((top + ROWS) * factor, image.height)))
        reduced.paste(strip.convert(mode).reduce(factor), (0, top))
    return reduced


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in TRANSPARENT or "transparency" in image.info
