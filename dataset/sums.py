"""Read the SHA256SUMS that lie beside a data set, as sha256sum, shasum and openssl write them.

sums = Sums(Path("mine"))
sums.vouch(Path("mine/raw/train-images-idx3-ubyte.gz"))     # True if a SHA256SUMS in mine/raw or mine lists its sum
"""

import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset.idx import DataError, File, above, read_whole, reading
from runtime.errors import one_line

SUMS = "SHA256SUMS"
NAMES = (SUMS, "SHA256SUMS.txt", "sha256sums.txt", "sha256sums")
MOST_BYTES = 25_000_000  # 200,000 pictures, each by its path
LONGEST_LINE = 5_000  # characters; a path has 4,096 bytes at most
GNU = re.compile(r"\\?(?P<sum>[0-9a-fA-F]{64})\s+\*?(?P<name>\S.*)")
OUTSIDE = re.compile(r"/|\.\./|[A-Za-z]:")  # how the paths begin that do not start in the folder of the SHA256SUMS
BSD = re.compile(r"SHA2?-?256 ?\((?P<name>.+)\) ?= ?(?P<sum>[0-9a-fA-F]{64})")


class Altered(DataError):
    """A file is not what a SHA256SUMS says."""


Table = dict[str, dict[str, str]]  # by file name: path below the folder of the SHA256SUMS -> sum


class Sums:
    """The SHA256SUMS of a data folder: each in the folder of a file, or in one above it up to the data folder."""

    def __init__(self, top: File):
        self.top = top
        self._read: dict[str, Table | None] = {}  # by folder

    def folders(self, file: File) -> Iterator[File]:
        """Yield the folders of a file, from its own up to the data folder; of a file in a zip, up to its root."""
        folder = above(file)
        while True:
            yield folder
            if str(folder) in (str(self.top), str(above(folder))) or not getattr(folder, "at", "/"):
                return
            folder = above(folder)

    def any(self, file: File) -> bool:
        """Say whether there is a SHA256SUMS in a folder of the file."""
        return any(self._of(folder) is not None for folder in self.folders(file))

    def lists(self, file: File) -> bool:
        """Say whether a SHA256SUMS lists a file of this name, whether or not it is there."""
        return any(file.name in (self._of(folder) or {}) for folder in self.folders(file))

    def missing(self, folder: File, pattern: str, present: Iterable[File]) -> str:
        """Name a file that a SHA256SUMS lists below a folder, by a path that matches, but is not present; or ""."""
        there = {str(file) for file in present}
        for above_it in self.folders(folder / "a file"):
            below = _below(above_it, folder)
            for path in (path for paths in (self._of(above_it) or {}).values() for path in paths):
                inside = path.startswith(f"{below}/" if below else "") and path[len(below) :].lstrip("/")
                if inside and re.match(pattern, inside.lower()) and str(above_it / path) not in there:
                    return path
        return ""

    def vouch(self, file: File, content: bytes = b"", bare: bool = True) -> bool:
        """Say whether a SHA256SUMS lists the sum of the file as it lies, or of its unpacked content.

        The file must be listed by its path from the folder of the SHA256SUMS, or by an absolute path that ends so. If
        bare is true, its name alone or with an absolute path is enough.
        Raises Altered where one lists another sum under its name, and DataError where one is malformed.
        """
        plain = file.name.removesuffix(".gz")
        tables = [(folder, table) for folder in self.folders(file) if (table := self._of(folder))]
        wanted: dict[str, str] = {}  # sum -> the name it is listed under
        for folder, table in tables:
            for name in (plain + ".gz", plain):
                path = posixpath.join(_below(folder, above(file)), name)
                for listed, digest in table.get(name, {}).items():
                    outside = OUTSIDE.match(listed) and (bare or listed.endswith(f"/{path}"))
                    if listed == path or outside or (bare and "/" not in listed):
                        wanted[digest] = name
        if not wanted:
            return False
        digests = [hashlib.sha256(content).hexdigest()] if content else []
        with reading(file), file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())  # type: ignore[arg-type]
        if any(digest in wanted for digest in digests):
            return True
        if set(wanted.values()) == {plain + ".gz"} != {file.name}:
            return False  # it is the sum of a packed file, and this one is not packed
        label = one_line(posixpath.join(_below(tables[-1][0], above(file)), file.name))
        all_paths = [paths for _, table in tables for paths in table.values()]
        if same := [path for paths in all_paths for path, digest in paths.items() if digest == digests[0]]:
            raise Altered(f"{label} holds the content of {one_line(same[0])}, {SUMS} says")
        expected = next(iter(wanted))
        raise Altered(f"{label} is altered: its SHA-256 is {digests[0][:12]}…, not {expected[:12]}… as {SUMS} says")

    def _of(self, folder: File) -> Table | None:
        """Return the sums that a folder's SHA256SUMS lists; None where there is none."""
        if str(folder) not in self._read:
            path = next((folder / name for name in NAMES if (folder / name).exists()), None)
            self._read[str(folder)] = parse(path) if path else None
        return self._read[str(folder)]


def _below(folder: File, lower: File) -> str:
    """Return the path from a folder to one below it, with "/"; "" if they are the same."""
    if isinstance(folder, Path):
        return Path(str(lower)).relative_to(folder).as_posix().removeprefix(".")
    return str(lower)[len(str(folder)) :].strip("/")


def parse(path: File) -> Table:
    """Read a SHA256SUMS: the sums in lower case, by file name and by path. Raises DataError if it is malformed."""
    content = read_whole(path, MOST_BYTES)
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # as PowerShell writes it
    found: Table = {}
    lines = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = GNU.fullmatch(line) or BSD.fullmatch(line)
        if not match or len(line) > LONGEST_LINE:
            raise DataError(f"{SUMS}, line {number}, is not as sha256sum writes it: {one_line(line)[:40]!r}")
        name = posixpath.normpath(match["name"].replace("\\", "/"))
        found.setdefault(posixpath.basename(name), {})[name] = match["sum"].lower()
    return found
