"""Files that are written whole or not at all, and read only if they are files, of a size that fits.

digest = files.write_atomically("best.pt", content)
files.write_json("history.json", history)
content = files.read_bytes("best.pt", most=2**32)
"""

import hashlib
import io
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import UserError, one_line

MISTAKEN = (  # the first bytes of what is often saved in the place of a file that was to be downloaded, and what to do
    (rb"\s*$", "an empty file: copy or download it again"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: `git lfs pull` in its clone fetches that"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype )?html", "an HTML page: download the file itself, not the page that shows it"),
)


READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # an empty pipe must not block
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # through no link that someone else put there


def read_bytes(path: str | Path, most: int, check: Callable[[bytes], None] | None = None) -> bytes:
    """Read a file of at most so many bytes. A pipe or a device could last for ever, or fill the memory.

    check is called with the first 16 MiB before the rest is read, and may refuse them.
    Raises UserError where it is no regular file, or larger; OSError where it cannot be opened.
    """
    with _open(path, most) as file:
        content = io.BytesIO()
        while content.tell() <= most and (part := file.read(2**24)):  # read(most) would reserve as much memory at once
            if check and not content.tell():
                check(part)
            content.write(part)
    if content.tell() > most:  # it has grown, or its size is not known, as below /proc
        raise _too_large(path, most)
    return content.getvalue()


def _open(path: str | Path, most: int) -> io.BufferedReader:
    """Open a regular file of at most so many bytes."""
    descriptor = os.open(path, READ)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file, but a folder, a pipe or a device: name a file")
    if found.st_size > most:
        os.close(descriptor)
        raise _too_large(path, most)
    return open(descriptor, "rb")


def _too_large(path: str | Path, most: int) -> UserError:
    return UserError(f"{path}: larger than {most:,} bytes, the most that is read")


def read_json(path: str | Path, most: int) -> Any:
    """Read a JSON file of at most so many bytes, as parse_json does.

    Raises UserError where it is too large, no regular file, or no JSON; OSError where it cannot be opened.
    """
    content = read_bytes(path, most)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def parse_json(content: bytes) -> Any:
    """Return the value of JSON in UTF-8, which may have a byte order mark: with finite numbers, and no key twice.

    Raises ValueError, in one line.
    """
    try:
        return json.loads(
            content.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique
        )
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {one_line(error)[:200]}") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def write_atomically(path: str | Path, content: bytes) -> str:
    """Write bytes so that after a crash at any moment the path holds the old file or the new one, whole.

    Returns the SHA-256 of the content. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(temporary, NEW, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return hashlib.sha256(content).hexdigest()


def check_file(path: str | Path) -> None:
    """Raise UserError unless a file can be written at this path: to be called before the work whose result goes there.

    Nothing is changed; a folder that is missing may still be made.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file")
    check_folder(path.parent)


def check_folder(folder: str | Path) -> None:
    """Raise UserError unless files can be written in this folder, or in a new one at its place. Nothing is changed."""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=place):  # permissions alone say too little: the disk may be read-only
            pass
    except OSError as error:
        raise UserError(f"{place} cannot be written to: {error.strerror}") from None


def file_sha256(path: str | Path, most: int = 2**32) -> str:
    """Compute the SHA-256 of a file of at most so many bytes, in hexadecimal. Raises what read_bytes does."""
    with _open(path, most) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write JSON atomically, in the layout of to_json()."""
    write_atomically(path, to_json(content).encode())


def to_json(content: dict[str, Any]) -> str:
    """Lay out a dict as JSON: one line for each key, and one for each dict in a list of dicts, such as an epoch.

    Numbers are written in full. Raises ValueError for NaN and infinity.
    """
    lines = [f"  {_compact(key)}: {_laid_out(value)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _laid_out(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return "[\n" + ",\n".join(f"    {_compact(part)}" for part in value) + "\n  ]"
    return _compact(value)


def _compact(value: Any) -> str:
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()  # the name of a file need not be Unicode
