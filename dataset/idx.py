"""Read and encode IDX files, the published form of the data set (http://yann.lecun.com/exdb/mnist describes it).

images = idx.read(Path("t10k-images-idx3-ubyte.gz"), "images")
"""

import gzip
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np

from runtime.errors import UserError, one_line
from runtime.files import MISTAKEN, read_bytes

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # first four bytes of an IDX file of images, of labels
KINDS = {IMAGES_MAGIC: "images", LABELS_MAGIC: "labels"}
MAGICS = {kind: magic for magic, kind in KINDS.items()}
SIZE = 28
MAX_IMAGES = 200_000  # a header that announces more is not believed
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file, whatever its name

FOREIGN = (  # the first bytes of what is downloaded in the place of data
    *MISTAKEN,
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text: save it as UTF-8"),
)

File = Path | zipfile.Path  # on the disk, or in a zip
UNREADABLE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)  # of both


class DataError(UserError):
    """The data set is missing, damaged, or not what it should be."""


@contextmanager
def reading(path: File) -> Iterator[None]:
    """Turn the errors of a file that cannot be read or unpacked into a DataError that names it."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{path.name} cannot be read: {one_line(error)}") from None


def read_whole(path: File, most: int) -> bytes:
    """Read a small file, of at most so many bytes. Raises DataError where it is larger, or no regular file."""
    try:
        with reading(path):
            if isinstance(path, Path):
                return read_bytes(path, most)
            with path.open("rb") as file:
                content = file.read(most + 1)
    except UserError as error:
        raise DataError(str(error)) from None
    if len(content) > most:
        raise DataError(f"{path.name} is larger than {most:,} bytes, the most that is read")
    return content


def size_of(path: File) -> int:
    """Return the size of a file in bytes; of a file in a zip, that after unpacking."""
    return path.stat().st_size if isinstance(path, Path) else path.root.getinfo(path.at).file_size


def above(file: File) -> File:
    """Return the folder of a file or folder."""
    return cast(File, file.parent)  # typeshed knows less of that in a zip


def name_of(part: str, kind: str) -> str:
    """Return the name of the IDX file of a part, "train" or "t10k", and a kind, "images" or "labels"."""
    return f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"


def read(path: File, kind: str) -> np.ndarray:
    """Read an IDX file of a kind, raw or gzip: images uint8 (n, 28, 28) or labels uint8 (n,).

    No more is read than the header announces, so a gzip bomb stays small. Raises DataError.
    """
    with reading(path), unpacked(path) as file:
        shape = _read_header(path, file, kind)
        content = _read_exactly(path, file, int(np.prod(shape)))
    return np.frombuffer(content, np.uint8).reshape(shape)


@contextmanager
def unpacked(path: File) -> Iterator[IO[bytes]]:
    """Open a file to read its content, unpacked if it is a gzip file."""
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if packed else raw as file:
            yield cast(IO[bytes], file)


def _read_header(path: File, file: IO[bytes], kind: str) -> tuple[int, ...]:
    words = 4 if kind == "images" else 2  # magic, count, and for images rows and columns
    header = file.read(4 * words)
    if len(header) < 4 * words:
        raise DataError(f"{path.name} is truncated: it ends within its header")
    found, *shape = struct.unpack(f">{words}I", header)
    if found != MAGICS[kind]:
        what = foreign(header + file.read(1000)) or f"it begins with {found}, not {MAGICS[kind]}"
        raise DataError(f"{path.name} is not an IDX file of {kind}: {what}")
    if shape[0] > MAX_IMAGES or shape[1:] not in ([SIZE, SIZE], []):
        raise DataError(f"{path.name} announces {announced(kind, shape)}: not Fashion-MNIST's, nor of its size")
    return tuple(shape)


def foreign(content: bytes) -> str:
    """Name what is often downloaded instead of a file, by its first bytes; "" if it is none of these."""
    return next((what for start, what in FOREIGN if re.match(start, content)), "")


def announced(kind: str, shape: list[int]) -> str:
    """Say what a header announces, as "60,000 images of 32x32 pixels"."""
    return f"{shape[0]:,} {kind}" + (f" of {shape[1]}x{shape[2]} pixels" if shape[1:] else "")


def _read_exactly(path: File, file: IO[bytes], expected: int) -> bytes:
    longer = DataError(f"{path.name} is longer than its header announces")
    if size_of(path) > expected + expected // 100 + 1000:  # a .gz of a million empty members takes long
        raise longer
    content = file.read(expected + 1)
    if len(content) < expected:
        raise DataError(f"{path.name} is truncated: {len(content):,} of {expected:,} bytes")
    if len(content) > expected:
        raise longer
    return content


def describe(path: File) -> str | None:
    """Say what an IDX file of any name holds, as "60,000 images of 32x32 pixels", or None if it is no such file."""
    try:
        with unpacked(path) as file:
            magic, *shape = struct.unpack(">4I", file.read(16).ljust(16, b"\0"))
    except (*UNREADABLE, struct.error):
        return None
    return announced(KINDS[magic], shape if magic == IMAGES_MAGIC else shape[:1]) if magic in KINDS else None


def encode(array: np.ndarray) -> bytes:
    """Encode images uint8 (n, 28, 28) or labels uint8 (n,) as the bytes of an IDX file."""
    magic = IMAGES_MAGIC if array.ndim == 3 else LABELS_MAGIC
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def check(part: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise DataError unless there are as many images as labels, at least one, and the labels are 0 to 9."""
    if len(images) != len(labels) or not len(labels):
        raise DataError(f"{part}: {len(images):,} images and {len(labels):,} labels do not belong together")
    if labels.max() > 9:
        raise DataError(f"{part}: its labels are {labels.min()} to {labels.max()}; they must be 0 to 9, of ten classes")
