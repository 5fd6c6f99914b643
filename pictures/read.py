"""Read a picture file: upright, RGB, and on white where it was transparent.

image = read("shirt.jpg")       # or the file's bytes
"""

import glob
import importlib.util
import os
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pictures import worker
from pictures.decode import BEGINNINGS, HEIC
from runtime import cli, files
from runtime.errors import UserError

MOST_BYTES = 256 * 2**20  # of a file
BEGINNING = 1_000  # bytes that say what a file is
RAW = re.compile(rb".{4}ftypcrx |II\*\0.{4}CR|FUJIFILMCCD-RAW|IIR[OS]", re.DOTALL)  # of Canon, Fujifilm, Olympus
OTHERS = (  # files that people take for pictures: what they begin with, what they are, and what to do
    (rb"%!PS", "PostScript: save it as PNG first"),
    (rb"%PDF-", "a PDF: save its page as a picture first"),
    (rb"(<\?xml.*)?<svg[\s>]", "an SVG drawing: save it as PNG first"),
    (rb"(<!doctype html|<html)", "a web page: save the picture itself"),
    (rb"(.{4}ftyp(isom|iso\d|mp4|M4V|qt  |avc1|3g)|\x1a\x45\xdf\xa3|RIFF.{4}AVI )", "a video: save a frame of it"),
    (rb"(PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf)", "an archive: unpack it, and name its folder"),
    (rb"version https://git-lfs", "a Git LFS pointer: `git lfs pull` fetches the file itself"),
    (rb"[\t\n\r -~\x80-\xff]+$", "a text file, not a picture"),
)


class PictureError(UserError):
    """A file that is not a usable picture."""


def read(source: str | Path | bytes) -> Image.Image:
    """Read a picture from a path or from a file's bytes; an animation yields its first frame.

    The result is RGB and upright. A picture with more than 2 * WORKING pixels a side is made smaller. Another process
    decodes it, with a limit of time and of memory. Raises PictureError if it is not a picture, is damaged or too large.
    """
    try:
        content = source if isinstance(source, bytes) else _read_file(source)
        _check(content, len(content))
        return worker.decode(content)
    except FileNotFoundError as error:
        raise PictureError(_why_missing(str(source)) or error.strerror) from None
    except OSError as error:
        raise PictureError(error.strerror or str(error)) from None
    except UserError as error:
        raise PictureError(str(error) or _why_unknown(content)) from None


def _read_file(path: str | Path) -> bytes:
    """Read a file, but no more than its beginning if it is no picture or too large."""
    with open(os.open(path, files.READ), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(f"a pipe or a device, not a file: pipe a picture to {cli.command('predict.py', '-')}")
        _check(file.read(BEGINNING), status.st_size)
        file.seek(0)
        return file.read(MOST_BYTES + 1)


def _check(content: bytes, size: int) -> None:
    """Raise PictureError if a file begins as no format that is decoded, or has too many bytes."""
    if RAW.match(content):
        raise PictureError("a camera's raw file: save it as JPEG first")
    if not BEGINNINGS.match(content):
        raise PictureError(_what_else(content))
    if size > MOST_BYTES:
        raise PictureError(f"larger than {MOST_BYTES >> 20} MiB")


def find(given: Sequence[str]) -> list[str]:
    """List the names of all pictures: the files given, and the files in the folders given.

    Raises UserError if there is none.
    """
    names: list[str] = []
    for name in given:
        names += map(str, files_below(Path(name))) if Path(name).is_dir() else [name]
    if not names:
        raise UserError(f"no picture in {', '.join(given)}")
    return names


def files_below(folder: Path) -> list[Path]:
    """List all files in a folder and its subfolders in order, without hidden ones and those in hidden folders.

    Links to folders are not followed. A subfolder that must not be read is listed, so that reading it says so.
    """
    found, folders = [], [folder]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(place / entry.name)
                    elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry):  # a link to itself has none
                        found.append(place / entry.name)
        except OSError:
            found.append(place)
    return sorted(found)


def _what_else(content: bytes) -> str:
    """Say what a file is that is no picture, by its first bytes, and what to do with it."""
    if not content:
        return "an empty file"
    found = [
        words for start, words in OTHERS if re.match(start, content[:BEGINNING].lstrip(), re.DOTALL | re.IGNORECASE)
    ]
    return found[0] if found else "not a picture of a format that is read: save it as JPEG or PNG first"


def _why_unknown(content: bytes) -> str:
    """Say why no decoder knows a picture whose beginning is right."""
    if HEIC.match(content) and not importlib.util.find_spec("pillow_heif"):
        return f"HEIC, which needs pillow-heif: {cli.install()}"
    return "damaged: its header cannot be read"


def _why_missing(name: str) -> str | None:
    """Say what a name without a file is, if not just a file that is missing."""
    if re.match(r"https?:/", name):
        return f"an address: download it first: curl -sL {shlex.quote(name)} | {cli.command('predict.py', '-')}"
    if not glob.has_magic(name):
        return None
    if found := glob.glob(name):
        return f"a pattern that the shell did not expand; without quotes it stands for {len(found):,} files"
    return "no file matches this pattern"
