"""Where the images come from: find a data set, verify it, and write one.

files = sources.find(["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"], data_dir=None)
sources.write(Path("mine"), {"train": (images, labels), "t10k": (images, labels)}, classes=names)

The images of Fashion-MNIST must have the published SHA-256. A folder may bring another set with its own SHA256SUMS, or
is accepted by other_data, and may name its ten classes in classes.txt.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import diagnose, fetch, forms, idx, published
from dataset.fetch import notice
from dataset.idx import IMAGES_MAGIC, LABELS_MAGIC, MAX_IMAGES, SIZE, DataError, File
from dataset.published import CLASSES, NAME, PUBLISHED
from dataset.sums import SUMS, Altered, Sums
from runtime.errors import one_line
from runtime.files import write_atomically

__all__ = ["CLASSES", "IMAGES_MAGIC", "LABELS_MAGIC", "NAME", "NAMES", "PUBLISHED", "SUMS", "DataError", "Files"]

NAMES = "classes.txt"  # what a folder may bring along, beside SHA256SUMS
SPELT = (NAMES, "Classes.txt", "CLASSES.TXT")
LONGEST_NAME = 40  # characters of a class name
LONGEST_SOURCE = 80  # of the name of a set
# The usual characters that look like these letters. Other tricks pass, and do no harm: a result holds data_sha256.
LIKE_LETTERS = str.maketrans(
    "015$7l|!@4\u0430\u0455\u04bb\u0456\u0131\u03b9\u043e\u03bf\u043c\u0442\u03c4\u03b1\u0578",
    "oisstiiiaaashiiioomttan",
)
DIGITS = tuple("0123456789")  # the class names of another set that brings none
VARIABLE = "FMNIST_DIR"

KERAS = Path(os.path.expanduser("~/.keras/datasets/fashion-mnist"))  # what keras.datasets.fashion_mnist leaves
SYSTEM = Path("/", fetch.PACKAGED)


class Files(NamedTuple):
    """The arrays of a data set's files by file name, the name of the set, and its class names."""

    arrays: dict[str, np.ndarray]  # uint8 (n, 28, 28) or (n,)
    source: str  # "Fashion-MNIST", or the name of the folder of another set
    classes: tuple[str, ...]


class Copy(NamedTuple):
    """A copy of the data set that has been read."""

    found: forms.Found
    arrays: dict[str, np.ndarray]
    classes: tuple[str, ...] | None  # as the form names them
    unlisted: str  # why no SHA256SUMS vouches for it; "" if one does
    restored: bool  # its images have been put into the published order
    other: str  # why it is not Fashion-MNIST; "" if it is

    @property
    def verified(self) -> bool:
        """Say whether it is what is published, or what its SHA256SUMS lists."""
        return not (self.other and self.unlisted)


def find(names: Sequence[str], data_dir: str | Path | None, other_data: bool | None = False) -> Files:
    """Read and verify the files `names`; one line says from where.

    With `data_dir`, or the variable FMNIST_DIR, that folder or file is the only source. Without, the first of these
    that has the files is used: a copy fetched earlier, Keras' cache, the system's package, downloads.
    other_data: accept images in the given place that are not the published ones; None where the user has no choice.
    Raises DataError when the given place cannot be used, or no source has the files.
    """
    parts = list(dict.fromkeys(name.split("-")[0] for name in names))
    if data_dir is not None:
        return _find_given(data_dir, "--data-dir", parts, other_data)
    if variable := os.environ.get(VARIABLE):
        return _find_given(variable, VARIABLE, parts, other_data)
    if other_data:
        raise DataError("--other-data accepts other images in a folder that you name: add --data-dir FOLDER")
    for folder, label in ((fetch.FETCHED, "fetched copy"), (KERAS, "Keras' cache"), (SYSTEM, "system copy")):
        try:
            arrays = _read_published(folder, parts)
        except (DataError, OSError) as error:
            notice(f"{label} {folder} not used: {error}")
            continue
        if arrays:  # a usual place that is empty is not worth a line
            print(f"data: {label} {folder} (SHA-256 verified)", flush=True)
            return Files(arrays, NAME, CLASSES)
    arrays = fetch.fetch(lambda folder: _read_published(folder, ["train", "t10k"], required=True))
    return Files({name: arrays[name] for name in names}, NAME, CLASSES)


def _read_published(folder: Path, parts: Sequence[str], required: bool = False) -> dict[str, np.ndarray]:
    """Read the published IDX files in a folder; {} if it has none of them and they are not required."""
    problems: list[str] = []
    for found in (each for each in forms.find(folder, []) if each.form is forms.IDX):
        try:
            copy = _read(found, parts, Sums(folder))
        except DataError as error:
            problems.append(str(error))
            continue
        if not copy.other:
            _notice_problems(problems, copy, parts)
            return copy.arrays
        problems.append(copy.other)
    if problems or required:
        raise DataError(_joined(problems) or "it has no IDX files")
    return {}


def _find_given(place: str | Path, flag: str, parts: Sequence[str], other_data: bool | None) -> Files:
    """Read the set in the folder or file that the user named. No other source can replace it."""
    if not isinstance(place, str | os.PathLike):
        raise DataError(f"{flag} must be a path, not {place!r}")
    if not str(place):
        raise DataError(f"{flag} is empty: name a folder, or leave it out")
    path = Path(os.path.expanduser(place))
    try:
        sums = Sums(path if path.is_dir() else path.parent)
        copy = _choose(path, flag, parts, other_data, sums)
        classes = _read_classes(copy, parts[0], sums, path)
    except (DataError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{flag} {one_line(path)}: {reason}") from None
    source = _name(path) if copy.other or classes != CLASSES else NAME
    _say_which(path, copy, source, classes)
    return Files(copy.arrays, source, classes)


def _name(path: Path) -> str:
    """Name another set by its folder, or by its file without the ending; none can pass for the published one."""
    name = one_line(unicodedata.normalize("NFC", path.resolve().name if path.is_dir() else path.stem)) or "data"
    name = name if len(name) <= LONGEST_SOURCE else f"{name[: LONGEST_SOURCE - 1]}…"
    plain = unicodedata.normalize("NFKD", name.casefold()).translate(LIKE_LETTERS)
    letters = "".join(filter(str.isalpha, plain)).replace("rn", "m")
    return f"{name} (own)" if NAME.lower().replace("-", "") in letters else name


def _say_which(path: Path, copy: Copy, source: str, classes: tuple[str, ...]) -> None:
    form = "" if copy.found.form is forms.IDX else f", {copy.found.form.name}"
    how = "SHA-256 verified" + ("; put into the published order" if copy.restored else "")
    if copy.other:
        by = "not verified" if copy.unlisted else f"verified by its own {SUMS}"
        named = f", with {NAME}'s class names" if classes == CLASSES else ""
        how = f"{by}: not the published images; results name it {source!r}{named}"
    print(f"data: given {'folder' if path.is_dir() else 'file'} {one_line(path)}{form} ({how})", flush=True)


def _choose(path: Path, flag: str, parts: Sequence[str], other_data: bool | None, sums: Sums) -> Copy:
    """Read the copy in a place that is verified; else the one there, if other data are accepted.

    Raises DataError if there is none, or if folders or files of the place hold different ones.
    """
    problems: list[str] = []
    copies: dict[str, Copy] = {}  # the best of each folder or file
    others: list[Copy] = []
    altered, halves = False, set[str]()
    for found in forms.find(path, problems):
        before = copies.get(str(found.place))
        if before and before.verified:
            continue
        there = {part for part in parts if found.files.get(part)}
        halves |= there if len(there) < len(parts) else set()
        try:
            copy = _read(found, parts, sums)
        except DataError as error:
            problems.append(str(error))
            altered |= isinstance(error, Altered)
            continue
        if not copy.verified:
            problems.append(copy.other)
            others.append(copy)
        if copy.verified or not before:
            copies[str(found.place)] = copy
        if not next(iter(copies.values())).other:
            break  # the published images
    usable = [copy for copy in copies.values() if copy.verified or (other_data and not altered)]
    _refuse_several(usable)
    if usable:
        _notice_problems([problem for problem in problems if problem != usable[0].other], usable[0], parts)
        return usable[0]
    if not problems:
        raise DataError(diagnose.describe(path, flag, parts))
    raise DataError(_joined(problems) + _advice(path, flag, parts, others, other_data, halves))


def _refuse_several(copies: Sequence[Copy]) -> None:
    """Raise DataError if the copies do not hold the same images and labels: only the user knows which are meant."""
    for copy in copies[1:]:
        if not all(np.array_equal(array, copy.arrays[name]) for name, array in copies[0].arrays.items()):
            both = " and ".join(one_line(each.found.place) for each in (copies[0], copy))
            archive = copy.found.archive
            unpack = "unpack the zip and " if archive and archive == copies[0].found.archive else ""
            raise DataError(f"it holds different data sets: {both}; {unpack}name one of them")


def _advice(
    path: Path, flag: str, parts: Sequence[str], others: Sequence[Copy], other_data: bool | None, halves: set[str]
) -> str:
    """Say what to do where no copy can be used."""
    if others and other_data is not None:
        unlisted = next((copy.unlisted for copy in others if SUMS in copy.unlisted), "")
        by_sums = f"; {unlisted}" if unlisted else f", and so does a {SUMS} beside it"
        return f"; --other-data accepts it as another set, named {_name(path)!r}{by_sums}"
    if others:
        return f"; this script needs {NAME}"
    if len(halves) == len(parts) > 1:
        return "; put the files of both parts into one folder"
    return diagnose.nearby(path, flag, parts)


def _notice_problems(problems: list[str], copy: Copy, parts: Sequence[str]) -> None:
    if problems:
        notice(f"{_joined(problems)}; used {copy.found.names(parts)} beside it")


def _joined(problems: list[str]) -> str:
    return "; ".join(dict.fromkeys(problems))


def _read(found: forms.Found, parts: Sequence[str], sums: Sums) -> Copy:
    """Read the parts of a copy and compare them with its SHA256SUMS and with what is published.

    Raises DataError if it is damaged, inconsistent, or not what its SHA256SUMS says.
    """
    arrays: dict[str, np.ndarray] = {}
    unlisted, differences, named = [], [], []
    restored = False
    for part in parts:
        images, labels, classes = found.read(part)
        named.append(classes)
        unlisted.append(_unlisted(found, part, sums, (images, labels)))
        if found.form is not forms.IDX:  # whose order is what its SHA-256 is about
            given = images
            images, labels = published.restore(part, images, labels)
            restored = restored or images is not given
        differences.append(_difference(found, part, images, labels))
        arrays |= {idx.name_of(part, "images"): images, idx.name_of(part, "labels"): labels}
    if named[0] != named[-1]:
        raise DataError(f"{found.names(parts)}: the class names of the two parts are not the same")
    return Copy(found, arrays, named[0], _first(unlisted), restored, _first(differences))


def _first(reasons: Iterable[str]) -> str:
    return next(filter(None, reasons), "")


def _unlisted(found: forms.Found, part: str, sums: Sums, arrays: tuple[np.ndarray, np.ndarray]) -> str:
    """Say why no SHA256SUMS vouches for every file of a part, or for the zip that holds them; "" if one does.

    Raises Altered for a file that differs, and for pictures and parquet files that are listed and missing.
    """
    if found.archive and sums.vouch(found.archive):
        return ""
    if not any(map(sums.any, found.files[part])):
        return "not listed"  # at once, where a set has 70,000 pictures
    files = found.used(part)
    if missing := sums.missing(*found.pieces(part), files):
        raise Altered(f"{one_line(missing)} is missing, which {SUMS} lists")
    contents = [idx.encode(array) for array in arrays] if found.form is forms.IDX else [b""] * len(files)
    bare = found.form is not forms.FOLDERS  # where a name alone does not say of which class the picture is
    unlisted = [
        file for file, content in zip(files, contents, strict=True) if not sums.vouch(file, content, bare)
    ]  # a list: none may be altered
    return f"its {SUMS} does not list {one_line(unlisted[0].name)}" if unlisted else ""


def _difference(found: forms.Found, part: str, images: np.ndarray, labels: np.ndarray) -> str:
    """Say why a part is not the published one; "" if it is. Raises DataError if it is not one of ten classes either."""
    of_both = found.used(part) if found.form is forms.IDX else [None, None]
    try:
        for kind, array, file in zip(("images", "labels"), (images, labels), of_both, strict=True):
            published.check(idx.name_of(part, kind), array, file.name if file else found.names([part]))
    except DataError as error:
        reason = str(error)
    else:
        return ""
    try:
        idx.check(part, images, labels)
    except DataError as error:
        raise DataError(f"{reason}; {error}") from None
    return reason


# --- class names -----------------------------------------------------------------------------------------


def _read_classes(copy: Copy, part: str, sums: Sums, path: Path) -> tuple[str, ...]:
    """Return the class names of a copy in the given place.

    They are in a classes.txt beside the files or above them. Else they are those of the form, or Fashion-MNIST's where
    a SHA256SUMS vouches for the files, or 0 to 9.
    """
    file, archive = copy.found.files[part][0], copy.found.archive
    folders = [*sums.folders(file), *(sums.folders(archive) if archive and archive != path else [])]
    for folder in folders:
        if path_of_names := next((folder / name for name in SPELT if (folder / name).exists()), None):
            return check_classes(_lines(path_of_names, sums))
    if sums.lists(folders[0] / NAMES):
        raise DataError(f"{NAMES} is missing")
    if copy.classes and copy.other:
        return check_classes(copy.classes)
    return DIGITS if copy.other and copy.unlisted else CLASSES


def _lines(path: File, sums: Sums) -> list[str]:
    content = idx.read_whole(path, 10_000)
    sums.vouch(path)
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return [line for line in content.decode("utf-16" if utf16 else "utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8 text: save it in this encoding") from None


def check_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return ten class names as a tuple. Raises DataError unless they are ten, distinct, short and printable."""
    classes = tuple(str(name).strip() for name in names)
    if len(classes) != len(CLASSES) or len(set(classes)) != len(classes):
        twice = one_line(next((name for name in classes if classes.count(name) > 1), ""))[:LONGEST_NAME]
        given = f"{twice!r} more than once" if twice and len(classes) == len(CLASSES) else str(len(classes))
        raise DataError(f"there must be {len(CLASSES)} different class names, and not {given}")
    for name in classes:
        if not name or not name.isprintable() or len(name) > LONGEST_NAME:
            raise DataError(
                f"class name {one_line(name)[:LONGEST_NAME]!r} is not 1 to {LONGEST_NAME} printable characters"
            )
    return classes


def write(folder: str | Path, parts: Mapping[str, tuple], classes: Iterable[str] | None = None) -> None:
    """Write a data set that load() then accepts as data_dir, with its SHA256SUMS.

    parts: {"train" and "t10k": (images uint8 (n, 28, 28), labels (n,) from 0 to 9)}, CPU tensors or arrays.
    classes: ten names for classes.txt; without them the set has Fashion-MNIST's.
    Raises DataError when shapes, dtypes, labels or names do not fit, or the folder has files of these names with other
    content. So a write that was interrupted can be repeated.
    """
    folder, files = Path(folder), dict[str, bytes]()
    for part, (images, labels) in parts.items():
        files |= _idx_files(part, np.asarray(images), np.asarray(labels))
    if classes is not None:
        files[NAMES] = "".join(f"{name}\n" for name in check_classes(classes)).encode()
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    files[SUMS] = "".join(lines).encode()
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{one_line(folder)} is a file; name a new folder")
    for name in (*files, NAMES):
        path = folder / name
        if path.exists() and not (path.is_file() and path.read_bytes() == files.get(name)):
            raise DataError(f"{one_line(folder)} already has another {name}; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)


def _idx_files(part: str, images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    """Encode the images and labels of one part as its two IDX files."""
    n = len(labels)
    if part not in ("train", "t10k"):
        raise DataError(f"the parts of a data set are train and t10k, not {part!r}")
    if images.dtype != np.uint8 or images.shape != (n, SIZE, SIZE) or not 0 < n <= MAX_IMAGES:
        raise DataError(f"{part}: images must be uint8 ({n}, {SIZE}, {SIZE}), not {images.dtype} {images.shape}")
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise DataError(f"{part}: labels must be whole numbers from 0 to {len(CLASSES) - 1}")
    return {
        idx.name_of(part, "images"): idx.encode(images),
        idx.name_of(part, "labels"): idx.encode(labels.astype(np.uint8)),
    }
