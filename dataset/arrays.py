"""Read arrays that NumPy saved: whole numbers of a bounded size, and nothing is unpickled.

given = arrays.read(Path("images.npy"), Path("labels.npy"))
values = arrays.parse("images.npy", file)               # of an open file
"""

import hashlib
import io
import sys
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dataset import idx
from dataset.idx import MAX_IMAGES, SIZE, DataError
from dataset.published import CLASSES
from runtime import cli
from runtime.errors import one_line
from runtime.files import read_bytes

MOST_BYTES = 2**29  # of a file
CHUNK = 2**22  # numbers of an array that are read at once
START = b"\x93NUMPY"  # of what numpy.save writes
ZIP = b"PK\3\4"  # of what numpy.savez writes


class Given(NamedTuple):
    """Images and labels from two files of a user."""

    images: np.ndarray  # uint8 (n, 28, 28)
    labels: np.ndarray  # uint8 (n,), 0 to 9
    sha256: tuple[str, str]  # of the file of the images, and of that of the labels


def read(images: Path, labels: Path) -> Given:
    """Read images (n, 28, 28), (n, 28, 28, 1) or (n, 784) and labels (n,) from two .npy files.

    Each may have any dtype of whole numbers; the values are 0 to 255, and 0 to 9.
    Raises DataError for anything else, UserError and OSError where a file cannot be read.
    """
    pixels, first = _read(images, 255)
    pixels = as_images(cli.shown(images), pixels)
    classes, second = _read(labels, len(CLASSES) - 1)
    if classes.ndim != 1:
        raise DataError(f"{cli.shown(labels)} has the shape {classes.shape}, not (n,): one label for each image")
    if len(pixels) != len(classes):
        both = f"{cli.shown(images)} has {len(pixels):,} images, but {cli.shown(labels)} has {len(classes):,} labels"
        raise DataError(f"{both}: they do not belong together")
    return Given(pixels, classes, (first, second))


def _read(path: Path, most: int) -> tuple[np.ndarray, str]:
    """Read the array of an .npy file, uint8 up to `most`, and compute the SHA-256 of the bytes that were read."""
    content, name = read_bytes(path, MOST_BYTES), cli.shown(path)
    if content.startswith(ZIP):
        raise DataError(f"{name} is an .npz or another zip: save each of its arrays with numpy.save")
    if not content.startswith(START):
        raise DataError(f"{name} is {idx.foreign(content[:1000]) or 'no .npy file, as numpy.save writes it'}")
    return parse(name, io.BytesIO(content), most), hashlib.sha256(content).hexdigest()


def parse(label: str, file: IO[bytes], most: int = 255) -> np.ndarray:
    """Read an array of whole numbers from 0 to `most` as uint8; its size is checked before memory is asked for.

    file: what numpy.save wrote; label: how errors call it. Raises DataError for anything else.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its header has another version than 1.0")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # a malformed header can make NumPy raise anything
        raise DataError(f"{label} is no array: {one_line(error)}") from None
    lengths_fit = all(type(length) is int and 0 <= length <= MAX_IMAGES * SIZE**2 for length in shape)
    count = int(np.prod(shape, dtype=object)) if lengths_fit and len(shape) <= 4 else sys.maxsize
    if dtype.kind not in "iu" or count > MAX_IMAGES * SIZE**2:
        what = one_line(f"{dtype} {shape}")[:200]
        raise DataError(
            f"{label} is {what}; it must be whole numbers from 0 to {most}, as uint8, for {MAX_IMAGES:,} images at most"
        )
    values = np.empty(count, np.uint8)
    for start in range(0, count, CHUNK):  # of 8 bytes each, all at once would be gigabytes
        chunk = values[start : start + CHUNK]
        content = file.read(chunk.size * dtype.itemsize)
        if len(content) < chunk.size * dtype.itemsize:
            raise DataError(f"{label} is truncated")
        chunk[:] = as_bytes(label, np.frombuffer(content, dtype), most)
    if file.read(1):
        raise DataError(f"{label} is longer than its header announces")
    return np.ascontiguousarray(values.reshape(shape, order="F" if by_columns else "C"))


def as_bytes(label: str, values: np.ndarray, most: int = 255) -> np.ndarray:
    """Convert whole numbers from 0 to `most` to uint8. Raises DataError for others."""
    if values.size and (values.min() < 0 or values.max() > most):
        raise DataError(f"{label} has values from {values.min()} to {values.max()}; they must be 0 to {most}")
    return np.ascontiguousarray(values, np.uint8)


def as_images(label: str, values: np.ndarray) -> np.ndarray:
    """Return an array of images as (n, 28, 28), from one of that shape, or (n, 784), with or without lengths of 1.

    Raises DataError for another shape, or where there is no image.
    """
    shape = tuple(length for length in values.shape[1:] if length != 1)
    if shape not in ((SIZE, SIZE), (SIZE**2,)):
        raise DataError(f"{label} has the shape {values.shape}, not (n, {SIZE}, {SIZE}) or (n, {SIZE**2})")
    if not len(values):
        raise DataError(f"{label} has no images")
    return values.reshape(-1, SIZE, SIZE)
