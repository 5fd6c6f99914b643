"""Read and encode IDX files, the published form of the data set (http://yann.lecun.com/exdb/mnist describes it).

images = idx.read(Path("t10k-images-idx3-ubyte.gz"), "images")
"""

import io
import re
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from runtime.errors import UserError, one_line
from runtime.files import MISTAKEN, read_bytes

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # first four bytes of an IDX file of images, of labels
KINDS = {IMAGES_MAGIC: "images", LABELS_MAGIC: "labels"}
MAGICS = {kind: magic for magic, kind in KINDS.items()}
SIZE = 28
MAX_IMAGES = 200_000  # a header that announces more is not believed
MOST_BYTES = {kind: MAX_IMAGES * (SIZE**2 if kind == "images" else 1) * 101 // 100 + 1000 for kind in MAGICS}
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file, whatever its name
GZIP_MEMBERS = 10_000  # programs that pack in pieces write one for 64 kB or more
PIECE = 2**16  # bytes of a gzip file that are unpacked at once
DEFLATED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as the files of a zip are packed
MOST_ZIPPED = 2**32  # bytes of a zip
MOST_ENTRIES = 250_000  # files of a zip
MOST_DIRECTORY = 100 * MOST_ENTRIES  # bytes of a zip's list of its files
ENTRY = b"PK\1\2"  # how each entry of that list begins
MOST_OF_PATHS = 2**26  # characters of a zip's names, times their folders: zipfile goes through them
MOST_OF_FOLDERS = 2**22  # the same of its folders: zipfile stores them

FOREIGN = (  # the first bytes of what is downloaded in the place of data
    *MISTAKEN,
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text: save it as UTF-8"),
)

File = Path | zipfile.Path  # on the disk, or in a zip
FAULTS = (OSError, EOFError, ValueError, OverflowError, RuntimeError, MemoryError)  # of a file that lies
UNREADABLE = (*FAULTS, struct.error, zlib.error, zipfile.BadZipFile)


class DataError(UserError):
    """The data set is missing, damaged, or not what it should be."""


@contextmanager
def reading(path: File) -> Iterator[None]:
    """Turn the errors of a file that cannot be read or unpacked into a DataError that names it."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{path.name} cannot be read: {one_line(error) or type(error).__name__}") from None


@contextmanager
def opened(path: File, most: int) -> Iterator[IO[bytes]]:
    """Open a file of at most so many bytes, as it lies and, in a zip, unpacked too. Raises DataError for others."""
    with reading(path):
        if isinstance(path, Path):
            size = path.stat().st_size
        else:
            info = path.root.getinfo(path.at)
            size = max(info.file_size, info.compress_size)
            if info.compress_type not in DEFLATED:
                raise DataError(f"{path.name} is packed by another method than deflate: unpack the zip")
        if size > most:
            raise DataError(f"{path.name} is larger than {most:,} bytes, the most that is read")
        with path.open("rb") as file:
            yield file


class _OfZip(io.BufferedReader):
    """The file of a zip. zipfile reads the list of files at once, by the size that the zip claims for it."""

    most: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is None:
            return super().read(size)
        if (size or 0) > self.most:
            raise zipfile.BadZipFile(f"its list of files has more than {self.most:,} bytes: unpack it")
        content = super().read(size)
        if content.count(ENTRY) > MOST_ENTRIES:
            raise zipfile.BadZipFile(f"it has more than {MOST_ENTRIES:,} files: unpack it")
        return content


def open_zip(file: Path | IO[bytes], most: int = MOST_DIRECTORY) -> zipfile.ZipFile:
    """Open a zip; most: the bytes of its list of files. Raises BadZipFile for a larger one, as for a damaged one."""
    if isinstance(file, Path) and file.stat().st_size > MOST_ZIPPED:
        raise zipfile.BadZipFile(f"it has more than {MOST_ZIPPED >> 30} GiB: unpack it")
    buffered = _OfZip(io.FileIO(str(file)) if isinstance(file, Path) else cast(Any, file))
    buffered.most = most
    archive = zipfile.ZipFile(cast(IO[bytes], buffered))
    buffered.most = None
    weakref.finalize(archive, buffered.close)
    names = archive.namelist()
    folders = {name.rpartition("/")[0] for name in names}
    if _weight(names) > MOST_OF_PATHS or _weight(folders) > MOST_OF_FOLDERS:
        raise zipfile.BadZipFile("its folders are too many and too deep: unpack it")
    return archive


def _weight(paths: Iterable[str]) -> int:
    return sum(len(path) * path.count("/") for path in paths)


def read_whole(path: File, most: int) -> bytes:
    """Read a small file, of at most so many bytes. Raises DataError where it is larger, or no regular file."""
    if not isinstance(path, Path):
        with opened(path, most) as file:
            return file.read()
    try:
        with reading(path):
            return read_bytes(path, most)
    except UserError as error:
        raise DataError(str(error)) from None


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
    with unpacked(path, MOST_BYTES[kind]) as file:
        shape = _read_header(path, file, kind)
        content = _read_exactly(path, file, int(np.prod(shape)))
    return np.frombuffer(content, np.uint8).reshape(shape)


@contextmanager
def unpacked(path: File, most: int) -> Iterator[IO[bytes]]:
    """Open a file to read its content, unpacked if it is a gzip file, of at most so many bytes before and after."""
    with opened(path, most) as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        yield cast(IO[bytes], io.BufferedReader(_Gunzip(raw, most), PIECE)) if packed else raw


class _Gunzip(io.RawIOBase):
    """Unpack a gzip file. gzip.GzipFile takes minutes for a header of many bytes, or for a million empty members."""

    def __init__(self, raw: IO[bytes], most: int):
        self.raw, self.left, self.members, self.packed = raw, most, GZIP_MEMBERS, b""
        self.member = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        content = b""
        while not content:
            self.packed = self.packed or self.raw.read(PIECE)
            if self.member.eof:  # zeros may follow, and other members
                if not self.packed:
                    return 0
                self.packed = self.packed.lstrip(b"\0")
                if self.packed:
                    self._begin_member()
                continue
            content = self.member.decompress(self.packed, len(buffer))
            if not (content or self.packed or self.member.eof):
                raise EOFError("it is packed, and ends before its last block")
            self.packed = self.member.unused_data or self.member.unconsumed_tail
        self.left -= len(content)
        if self.left < 0:
            raise OSError("it unpacks to more bytes than fit")
        buffer[: len(content)] = content
        return len(content)

    def _begin_member(self) -> None:
        self.members -= 1
        if self.members < 0:
            raise OSError(f"it has more than {GZIP_MEMBERS:,} parts")
        self.member = zlib.decompressobj(16 + zlib.MAX_WBITS)


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
    content = file.read(expected + 1)
    if len(content) < expected:
        raise DataError(f"{path.name} is truncated: {len(content):,} of {expected:,} bytes")
    if len(content) > expected:
        raise DataError(f"{path.name} is longer than its header announces")
    return content


def describe(path: Path) -> str | None:
    """Say what an IDX file of any name holds, as "60,000 images of 32x32 pixels", or None if it is no such file."""
    try:
        with path.open("rb") as file:
            start = file.read(PIECE)
        if start.startswith(GZIP):
            start = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(start, 16)
        magic, *shape = struct.unpack(">4I", start[:16].ljust(16, b"\0"))
    except UNREADABLE:
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
