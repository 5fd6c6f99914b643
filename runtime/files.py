"""Files that are written whole or not at all.

digest = files.write_atomically("best.pt", content)
files.write_json("history.json", history)
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from runtime.errors import UserError

MISTAKEN = (  # the first bytes of what is often saved in the place of a file that was to be downloaded, and what to do
    (rb"\s*$", "an empty file: copy or download it again"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: `git lfs pull` in its clone fetches that"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype )?html", "an HTML page: download the file itself, not the page that shows it"),
)


def write_atomically(path: str | Path, content: bytes) -> str:
    """Write bytes so that after a crash at any moment the path holds the old file or the new one, whole.

    Returns the SHA-256 of the content. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
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


def file_sha256(path: str | Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
