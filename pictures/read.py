"""Read a picture file of any format: upright, RGB, and on white where it was transparent.

image = read("shirt.jpg")       # or the file's bytes
"""

import glob
import importlib.util
import io
import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime import cli
from runtime.errors import UserError

MAX_PIXELS = 12_000 * 12_000  # a picture that announces more is refused unopened
WORKING = 1_000  # pixels of the longest edge that are enough to find the object
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")  # Pillow's modes with an alpha channel
HEIC = re.compile(rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)  # the default of most phones
RAW = re.compile(rb".{4}ftypcrx |II\*\0.{4}CR|FUJIFILMCCD-RAW|IIR[OS]", re.DOTALL)  # of Canon, Fujifilm, Olympus
DNG_VERSION = 50706  # a TIFF tag that raw files alone have
OTHERS = (  # files that people take for pictures: what they begin with, what they are, and what to do
    (rb"%PDF-", "a PDF: save its page as a picture first"),
    (rb"(<\?xml.*)?<svg[\s>]", "an SVG drawing: save it as PNG first"),
    (rb"(<!doctype html|<html)", "a web page: save the picture itself"),
    (rb"(.{4}ftyp(isom|iso\d|mp4|M4V|qt  |avc1|3g)|\x1a\x45\xdf\xa3|RIFF.{4}AVI )", "a video: save a frame of it"),
    (rb"(PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf)", "an archive: unpack it, and name its folder"),
    (rb"version https://git-lfs", "a Git LFS pointer: `git lfs pull` fetches the file itself"),
)


class PictureError(UserError):
    """A file that is not a usable picture."""


def read(source: str | Path | bytes) -> Image.Image:
    """Read a picture from a path or from a file's bytes; an animation yields its first frame.

    The result is RGB and upright. A picture with more than 2 * WORKING pixels a side is made smaller.
    Raises PictureError if it is not a picture, is damaged or is too large.
    """
    try:
        content = Path(source).read_bytes() if isinstance(source, str | Path) else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities that it can handle
            return opaque(ImageOps.exif_transpose(_smaller(_eight_bits(_decode(content)))))
    except UnidentifiedImageError:
        raise PictureError(_what_else(content)) from None
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(_why_missing(str(source)) or error.strerror) from None
    except OSError as error:
        raise PictureError(error.strerror or f"damaged: {error}") from None
    except Exception as error:  # a malformed file can make a decoder raise anything
        raise PictureError(f"damaged: {error}") from None


def opaque(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, on white where it was transparent."""
    if _is_transparent(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def find(given: Sequence[str]) -> list[str]:
    """List the names of all pictures: the files given, and the files in the folders given.

    Raises UserError if there is none.
    """
    names: list[str] = []
    for name in given:
        names += map(str, files_below(Path(name))) if Path(name).is_dir() else [name]
    if not names:
        raise UserError("no picture in there")
    return names


def files_below(folder: Path) -> list[Path]:
    """List all files in a folder and its subfolders in order, without hidden ones and those in hidden folders."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _what_else(content: bytes) -> str:
    """Say what a file is that is no picture, by its first bytes, and what to do with it."""
    if not content:
        return "an empty file"
    found = [words for start, words in OTHERS if re.match(start, content[:1000].lstrip(), re.DOTALL | re.IGNORECASE)]
    return found[0] if found else "not a picture that Pillow can open"


def _why_missing(name: str) -> str | None:
    """Say what a name without a file is, if not just a file that is missing."""
    if re.match(r"https?:/", name):
        return f"an address: download it first: curl -sL {shlex.quote(name)} | {cli.command('predict.py', '-')}"
    if not glob.has_magic(name):
        return None
    if found := glob.glob(name):
        return f"a pattern that the shell did not expand; without quotes it stands for {len(found):,} files"
    return "no file matches this pattern"


def _open(content: bytes) -> Image.Image:
    """Open a picture without decoding it; HEIC by a package that is optional."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if not HEIC.match(content):
            raise
    if not importlib.util.find_spec("pillow_heif"):
        raise PictureError(f"HEIC, which needs pillow-heif: {cli.install()}")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(content))


def _decode(content: bytes) -> Image.Image:
    """Decode a picture if its header announces an acceptable size."""
    image = None if RAW.match(content) else _open(content)
    if image is None or DNG_VERSION in getattr(image, "tag_v2", ()):  # Pillow would open the small preview in it
        raise PictureError("a camera's raw file: save it as JPEG first")
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(f"{image.width:,} x {image.height:,} pixels are too many")
    image.draft("RGB", (WORKING, WORKING))  # decodes a large JPEG to fewer pixels, which is faster
    image.load()
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point pixels to 8 bits; leave other images as they are."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        scale = next((limit for limit in (1.0, 255.0, 65_535.0) if values.max() <= limit), values.max())
        return Image.fromarray((values.clip(0) / scale * 255).round().astype(np.uint8))
    return image


def _smaller(image: Image.Image) -> Image.Image:
    """Shrink a picture to a size that is enough to work with, and keep its EXIF orientation."""
    factor = max(image.size) // WORKING
    if factor < 2:
        return image
    reduced = image.convert("RGBA" if _is_transparent(image) else "RGB").reduce(factor)
    reduced.info["exif"] = image.getexif().tobytes()
    return reduced


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in TRANSPARENT or "transparency" in image.info
