"""Read a data set in any of the forms that people have it in.

for found in forms.find(Path("archive.zip")):       # in order of preference
    images, labels, classes = found.read("t10k")    # uint8 (n, 28, 28), uint8 (n,), ten names or None

The forms, in that order: IDX files, Kaggle's CSV files, an .npz, Hugging Face's parquet files, folders of pictures, and
a zip with one of them. docs/data.md describes them. Sizes are bounded, and no file is executed or unpickled.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from tqdm import tqdm

from dataset import arrays, idx
from dataset.idx import MAX_IMAGES, SIZE, DataError, File
from dataset.published import CLASSES
from runtime import cli
from runtime.errors import one_line

PARTS = {"train": "training", "t10k": "test"}  # the name of a part in IDX files, and its word
LAYOUTS = ("", "FashionMNIST/raw", "raw", "data/fashion", "fashion", "fashion-mnist", "fashion_mnist")  # below a folder
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")  # Pillow's decoder of TIFF needs gigabytes for some small files
MOST_BYTES = 20_000  # of one picture: 28x28 pixels need less, and its metadata takes the square of its size
MOST_OF_CSV = MAX_IMAGES * 5_000  # bytes: 785 numbers, quoted, have 4,700
MOST_UNPACKED = arrays.MOST_BYTES  # bytes of a parquet file, and of an array
MOST_IN_MEMORY = 2**28  # bytes of an .npz or parquet file in a zip
MOST_OF_PICTURES = (
    2**27
)  # bytes of a parquet file's pictures: pyarrow takes four times as much, and aborts if it cannot
MOST_OF_NPZ = 2**32  # bytes: four arrays
MOST_LISTED = 2**16  # bytes of the list of an .npz's arrays
MOST_METADATA = 2**22  # bytes of what a parquet file says of itself
MOST_KNOWN = 1_000  # pictures of a parquet file that are not decoded twice
MOST_MEMORY = 900 * 2**20  # bytes for pyarrow
MOST_FOLDERS = 200  # in which files are looked for
MOST_MEMBERS = 250_000  # of a folder
LINE = 10_000  # more bytes than a line of a CSV file has
HIDDEN = (".", "__MACOSX")  # how the names begin of what a system adds to folders and to zips
ARRAYS = {"train": ("x_train", "y_train"), "t10k": ("x_test", "y_test")}

Part = tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]  # images, labels, and the names of the classes
Copies = Iterator[tuple[File, dict[str, list[File]]]]  # the folder or file of a copy, and its files by part


class Form(NamedTuple):
    """A form: its name, what its parts are called, and how to find and to read them."""

    name: str
    wanted: dict[str, str]  # by part
    find: Callable[[list[File]], Copies]  # in these folders
    read: Callable[[list[File], str], Part]


class Found(NamedTuple):
    """A copy of the data set, or of one part of it, that has been found but not read yet."""

    form: Form
    files: dict[str, list[File]]  # by part
    place: File  # the folder that holds them, or the file where a folder may hold several sets of this form
    archive: Path | None = None  # the zip that holds the files

    def read(self, part: str) -> Part:
        """Read a part, "train" or "t10k". Raises DataError if it is missing, cannot be read, or has another size."""
        if not self.files.get(part):
            only = ", ".join(word for other, word in PARTS.items() if self.files.get(other))
            raise DataError(f"{self.form.wanted[part]} is missing: only the {only} part is there")
        if self.form is FOLDERS:
            _check_same_classes(self.files)
        return self.form.read(self.files[part], part)

    def used(self, part: str) -> list[File]:
        """List the files of a part, for pictures each of them."""
        files = self.files[part]
        return [path for each in files for path in pictures_in(each)] if self.form is FOLDERS else files

    def pieces(self, part: str) -> tuple[File, str]:
        """Return a folder, and what matches the path of every picture or parquet file of a part below it."""
        first = self.files[part][0]
        above = idx.above(first)
        if self.form is FOLDERS:
            return above, rf"[^/]+/[^/]+({'|'.join(PICTURES)})$"
        word = first.name.lower().split("-")[0] if above == self.place else ""
        return above, rf"{re.escape(word)}.*\.parquet$"

    def names(self, parts: Sequence[str]) -> str:
        """Name the files of some parts, the first three of them."""
        files = [file for part in parts for file in self.files.get(part, [])]
        if self.form is FOLDERS:
            files = [idx.above(file) for file in files]
        if self.archive:
            return self.archive.name + str(self.place).removeprefix(str(self.archive)).rstrip("/")
        names = list(dict.fromkeys(file.name for file in files))
        return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def find(place: Path, problems: list[str]) -> Iterator[Found]:
    """Yield the copies of the data set in a folder, or in a .zip or .npz file, in order of preference.

    What is said of a zip that cannot be read is added to the problems.
    """
    archives = [place] if place.is_file() and place.suffix.lower() == ".zip" else []
    if place.is_dir():
        folders: list[File] = [place / layout for layout in LAYOUTS if (place / layout).is_dir()]
        yield from _in_folders(folders)
        archives = [each for each in _files(place, r"\.zip$") if isinstance(each, Path)]
    elif place.is_file() and place.suffix.lower() == ".npz":
        yield Found(NPZ, {part: [place] for part in PARTS}, place)
    for archive in archives:
        try:
            with idx.reading(archive):
                root = zipfile.Path(idx.open_zip(archive))
                folders = [root, *folders_below(root)]
        except DataError as error:
            problems.append(str(error))
        else:
            yield from _in_folders(folders, archive)


def _in_folders(folders: list[File], archive: Path | None = None) -> Iterator[Found]:
    return (Found(form, files, place, archive) for form in FORMS for place, files in form.find(folders))


def folders_below(place: File, levels: int = 2) -> list[File]:
    """List the folders below a place, so many levels down, without hidden ones; no more than MOST_FOLDERS."""
    found: list[File] = []
    above = [place]
    for _ in range(levels):
        above = [each for folder in above for each in _folders(folder)][:MOST_FOLDERS]
        found += above
    return found[:MOST_FOLDERS]


def listed(folder: File) -> Iterator[File]:
    """Yield what is in a folder, sorted by name, without hidden files; nothing if it must not be read.

    Raises DataError for a folder of too many files.
    """
    return (_in(folder, name) for name in _names(folder))


def _names(folder: File) -> list[str]:
    """List what listed() yields by its names, those of folders with "/" behind."""
    if isinstance(folder, zipfile.Path):
        return _tree(folder.root).get(folder.at, [])
    try:
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir() for entry in itertools.islice(entries, MOST_MEMBERS + 1)}
    except OSError:
        return []
    if len(names) > MOST_MEMBERS:
        raise DataError(f"{folder.name} has more than {MOST_MEMBERS:,} files")
    return [name + "/" * names[name] for name in sorted(names) if not name.startswith(HIDDEN)]


def _in(folder: File, name: str) -> File:
    return folder / name if isinstance(folder, Path) else zipfile.Path(folder.root, folder.at + name)


_trees: WeakKeyDictionary[zipfile.ZipFile, dict[str, list[str]]] = WeakKeyDictionary()


def _tree(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Return the names in each folder of a zip, as of _names(). zipfile.Path reads all names for each folder."""
    if archive not in _trees:
        tree: dict[str, set[str]] = {}
        for name in archive.namelist():
            above, _, last = name.rstrip("/").rpartition("/")
            if last and not last.startswith(HIDDEN):
                tree.setdefault(above + "/" * bool(above), set()).add(last + "/" * name.endswith("/"))
        _trees[archive] = {folder: sorted(names) for folder, names in tree.items()}
    return _trees[archive]


def _files(folder: File, pattern: str) -> list[File]:
    """List the files in a folder whose names, in lower case, match."""
    found = [_in(folder, name) for name in _names(folder) if name[-1] != "/" and re.search(pattern, name.lower())]
    return [each for each in found if each.is_file()]


def _folders(folder: File) -> list[File]:
    return [_in(folder, name) for name in _names(folder) if name.endswith("/")]


# --- IDX -------------------------------------------------------------------------------------------------


def _find_idx(folders: list[File]) -> Copies:
    """Yield the first copy of each file in a folder, then the second: raw before .gz. Folders are not mixed."""
    for folder in folders:
        copies: dict[tuple[str, str], list[File]] = {}
        for file in _idx_files(folder):
            part, kind = re.split(r"[-.]", file.name.lower())[:2]
            copies.setdefault((part, kind), []).append(file)
        for number in range(max(map(len, copies.values()), default=0)):
            chosen = {key: files[min(number, len(files) - 1)] for key, files in copies.items()}
            yield folder, {part: [file for (of, _), file in sorted(chosen.items()) if of == part] for part in PARTS}


def _idx_files(folder: File) -> Iterator[File]:
    """Yield the IDX files in a folder; each may lie in a folder of its name, as some unpackers leave it."""
    for name in _names(folder):
        if re.match(r"(train|t10k)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?/?$", name.lower()):
            each = _in(folder, name)
            file = each / each.name if each.is_dir() else each
            if file.is_file():
                yield file


def _read_idx(files: list[File], part: str) -> Part:
    found = {}
    for kind in ("images", "labels"):
        file = next((file for file in files if kind in file.name.lower()), None)
        if file is None:
            raise DataError(f"{idx.name_of(part, kind)}(.gz) is missing")
        found[kind] = idx.read(file, kind)
    return found["images"], found["labels"], None


# --- CSV -------------------------------------------------------------------------------------------------


CSV_NAME = (
    r"(?P<set>(?:.*[^a-z])?)(?P<part>train|test|t10k)(?: ?\(\d+\))?\.csv(\.gz)?$"  # "(1)": a browser's second copy
)


def _find_csv(folders: list[File]) -> Copies:
    """Find pairs of names that differ in the word of the part alone."""
    for folder in folders:
        sets: dict[str, dict[str, list[File]]] = {}
        for file in _files(folder, CSV_NAME):
            if name := re.match(CSV_NAME, file.name.lower()):
                part = "train" if name["part"] == "train" else "t10k"
                sets.setdefault(name["set"], {}).setdefault(part, []).append(file)
        for files in sets.values():
            first = {part: each[:1] for part, each in files.items()}
            yield next(iter(first.values()))[0], first


def _read_csv(files: list[File], part: str) -> Part:
    """Read lines of a label and 784 pixels from 0 to 255, below a header or none."""
    (path,) = files
    with idx.unpacked(path, MOST_OF_CSV) as file:
        first = file.readline(LINE).removeprefix(b"\xef\xbb\xbf")
        has_header = _has_header(path, first)
        if has_header:
            first = file.readline(LINE)
        lines = itertools.chain([first] if first else [], iter(lambda: file.readline(LINE), b""))
        try:
            texts = (line.replace(b'"', b"").decode("ascii") for line in itertools.islice(lines, MAX_IMAGES + 1))
            rows = np.loadtxt(texts, np.uint8, delimiter=",", ndmin=2, comments=None) if first else np.empty((0, 785))
        except ValueError as error:
            raise DataError(f"{path.name} has a line without 785 numbers from 0 to 255: {one_line(error)}") from None
    _check_count(path, len(rows))
    if not has_header and _has_all_classes(rows[:, -1]) and not _has_all_classes(rows[:, 0]):
        raise DataError(f"{path.name} seems to have the label in its last column; it must be the first")
    return rows[:, 1:].reshape(-1, SIZE, SIZE).copy(), rows[:, 0].copy(), None


def _has_header(path: File, first: bytes) -> bool:
    """Say whether the first line of a CSV file is a header. Raises DataError if it is neither that nor an image.

    The names of the pixels must count up, as pixel1 to pixel784 or 1x1 to 28x28: in another order they are no images.
    """
    names = first.decode("ascii", errors="replace").replace('"', "").lower().strip().split(",")
    numbers = [tuple(map(int, re.findall(r"\d+", name[:40]))) for name in names[1:]]
    if len(names) == SIZE**2 + 1 and names[0].strip().isdigit():
        return False
    if len(names) == SIZE**2 + 1 and names[0] == "label" and all(a < b for a, b in itertools.pairwise(numbers)):
        return True
    columns = f"{len(names):,} columns, the first called {one_line(names[0])[:40]!r}"
    what = idx.foreign(first) or f"{columns}: it must have label, pixel1 to pixel784, in this order, as UTF-8"
    raise DataError(f"{path.name} {'is' if idx.foreign(first) else 'has'} {what}")


def _has_all_classes(column: np.ndarray) -> bool:
    return np.array_equal(np.unique(column), np.arange(len(CLASSES)))


def _check_count(path: File, count: int) -> None:
    if not 0 < count <= MAX_IMAGES:
        raise DataError(f"{path.name} has {f'more than {MAX_IMAGES:,}' if count else 'no'} images")


# --- npz -------------------------------------------------------------------------------------------------


def _find_npz(folders: list[File]) -> Copies:
    for file in (file for folder in folders for file in _files(folder, r"\.npz$")):
        yield file, {part: [file] for part in PARTS}


def _read_npz(files: list[File], part: str) -> Part:
    (path,) = files
    with _for_random_access(path, MOST_OF_NPZ) as file, idx.open_zip(file, MOST_LISTED) as archive:
        images, labels = (_read_npy(path, archive, name) for name in ARRAYS[part])
    images = arrays.as_images(f"{path.name}: {ARRAYS[part][0]}", images)
    _check_count(path, len(images))
    return images, labels.reshape(-1), None


def _read_npy(path: File, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array of an .npz, whole numbers from 0 to 255, as uint8."""
    if f"{name}.npy" not in archive.namelist():
        keys = ", ".join(each.removesuffix(".npy") for each in archive.namelist()[:6])
        raise DataError(
            f"{path.name} has the arrays {one_line(keys)}; it must have x_train, y_train, x_test and y_test"
        )
    with idx.opened(zipfile.Path(archive, f"{name}.npy"), MOST_UNPACKED) as file:
        return arrays.parse(f"{path.name}: {name}", file)


@contextlib.contextmanager
def _for_random_access(path: File, most: int) -> Iterator[IO[bytes]]:
    """Open a file of at most so many bytes. One in a zip is read whole: each step back would unpack it anew."""
    on_disk = isinstance(path, Path)
    with idx.opened(path, most if on_disk else MOST_IN_MEMORY) as file:
        yield file if on_disk else io.BytesIO(file.read())


# --- parquet ---------------------------------------------------------------------------------------------


def _find_parquet(folders: list[File]) -> Copies:
    """Find train-*.parquet and test-*.parquet in one or several pieces, or train/*.parquet and test/*.parquet."""
    for folder in folders:
        found = {}
        for part, name in (("train", "train"), ("t10k", "test")):
            below = folder / name
            pieces = _files(folder, rf"^{name}.*\.parquet$") or (below.is_dir() and _files(below, r"\.parquet$")) or []
            found[part] = pieces
        if any(found.values()):
            yield folder, found


def _read_parquet(files: list[File], part: str) -> Part:
    """Read Hugging Face's columns image, a struct with the bytes of a PNG file, and label."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{files[0].name} needs pyarrow, which is not installed: {cli.install()}") from None
    images: list[np.ndarray] = []
    labels: list[int] = []
    known: dict[bytes, np.ndarray] = {}  # a few bytes of a file can repeat a picture many times
    names: tuple[str, ...] | None = None
    for path in files:
        try:
            with _little_memory(), _for_random_access(path, MOST_UNPACKED) as file:
                metadata = _metadata(path, file)
                column = _column_of_pictures(path, metadata)  # a picture that its rows repeat is in memory once:
                with parquet.ParquetFile(file, metadata=metadata, read_dictionary=[column]) as table:
                    names = names or _stored_names(table.schema_arrow.metadata)
                    for picture, label in _rows(path, table, column):
                        if picture not in known:
                            known[picture] = decode(f"{path.name}: image {len(images):,}", picture)
                        images.append(known[picture])
                        if len(known) > MOST_KNOWN:
                            known.clear()
                        labels.append(label)
        except (arrow.ArrowException, KeyError) as error:  # KeyError: of odd names of columns and of time zones
            with idx.opened(path, MOST_UNPACKED) as file:
                what = idx.foreign(file.read(1000))
            raise DataError(f"{path.name} {f'is {what}' if what else f'cannot be read: {one_line(error)}'}") from None
    _check_count(files[0], len(images))
    return np.stack(images), arrays.as_bytes(f"{files[0].name}: label", np.array(labels)), names


def _metadata(path: File, file: IO[bytes]) -> Any:
    """Return what a parquet file says of itself. Raises DataError if that is long: its parts take more memory yet."""
    from pyarrow import parquet

    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    file.seek(0)
    if MOST_METADATA < length < size:
        raise DataError(f"{path.name}: its metadata have more than {MOST_METADATA:,} bytes")
    return parquet.read_metadata(file)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Let the process take MOST_MEMORY bytes more, on Linux: pyarrow believes the sizes that a file claims."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    least = min(limit for limit in (used + MOST_MEMORY, soft) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _column_of_pictures(path: File, metadata: Any) -> str:
    """Return the path of the column of the pictures' bytes.

    Raises DataError if it, or that of the labels, is missing, too large or of another type.
    """
    columns = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    found = next((name for name in ("image.bytes", "image") if name in columns), "")
    if not found or "label" not in columns:
        raise DataError(f"{path.name} has the columns {one_line(', '.join(columns))}; it must have image and label")
    if metadata.num_rows > MAX_IMAGES:
        raise DataError(f"{path.name} has more than {MAX_IMAGES:,} images")
    for name, types in ((found, ("BYTE_ARRAY",)), ("label", ("INT32", "INT64"))):
        column = metadata.schema.column(columns.index(name))
        if column.physical_type not in types or column.max_repetition_level:
            raise DataError(f"{path.name}: image must be the bytes of a picture, and label a whole number")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if sum(group.column(columns.index(found)).total_uncompressed_size for group in groups) > MOST_OF_PICTURES:
        raise DataError(
            f"{path.name}: its pictures have more than {MOST_OF_PICTURES >> 20:,} MiB: write them into several files"
        )
    return found


def _rows(path: File, table: Any, column: str) -> Iterator[tuple[bytes, int]]:
    """Yield the bytes of each picture with its label."""
    for batch in table.iter_batches(batch_size=500, columns=[column, "label"], use_threads=False):
        images = batch.column("image").field("bytes") if column == "image.bytes" else batch.column("image")
        for picture, label in zip(images, batch.column("label"), strict=True):
            picture, label = picture.as_py(), label.as_py()
            if not isinstance(picture, bytes) or type(label) is not int:
                raise DataError(f"{path.name}: image must be the bytes of a picture, and label a whole number")
            yield picture, label


def _stored_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """Return the class names that Hugging Face's library stores in a file's metadata, if they are there."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


# --- folders of pictures ---------------------------------------------------------------------------------


def _find_pictures(folders: list[File]) -> Copies:
    for folder in folders:
        found = {}
        for part, names in (("train", ("train", "training")), ("t10k", ("test", "testing", "t10k"))):
            below = [name for name in _names(folder) if name.endswith("/") and name[:-1].lower() in names]
            found[part] = _folders(_in(folder, below[0])) if below else []
        if any(found.values()):
            yield folder, found


def _check_same_classes(files: dict[str, list[File]]) -> None:
    """Raise DataError if the class folders of both parts are there and are not the same."""
    names = [{each.name for each in files[part]} for part in PARTS if files.get(part)]
    if different := sorted(names[0] ^ names[-1]):
        raise DataError(
            f"train and test have different class folders: {one_line(different[0])!r} is only in one of them"
        )


def _read_pictures(files: list[File], part: str) -> Part:
    """Read the pictures of ten class folders, of 28x28 grey pixels, in the order of their paths."""
    parent = idx.above(files[0])
    label_of, classes = _labels_of([each.name for each in files], parent)
    pictures = []
    for each in files:
        found = pictures_in(each)
        if not found:
            raise DataError(f"{parent.name}/{one_line(each.name)} has no pictures")
        pictures += [(path, label_of[each.name]) for path in found]
    _check_count(parent, len(pictures))
    images = []
    for path, _ in tqdm(pictures, desc=f"data: {parent.name}", unit=" pictures", disable=None, leave=False):
        label = f"{parent.name}/{idx.above(path).name}/{path.name}"
        with idx.opened(path, MOST_UNPACKED) as file:
            content = file.read(MOST_BYTES + 1)
        images.append(decode(label, content, idx.above(parent)))
    return np.stack(images), np.array([label for _, label in pictures], np.uint8), classes


def pictures_in(folder: File) -> list[File]:
    """List the pictures in a folder by their names."""
    return _files(folder, rf"({'|'.join(PICTURES)})$")


def _labels_of(names: list[str], above: File) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the labels of class folders by their names, and the names of the classes 0 to 9.

    They are 0 to 9, or Fashion-MNIST's classes in any spelling ("T-shirt_top"), or ten others, sorted.
    """
    if len(names) != len(CLASSES):
        raise DataError(f"{above.name} has {len(names)} class folders ({one_line(', '.join(names[:3]))} …), not ten")
    spelt = [_spelling(name) for name in names]
    for known, classes in ((tuple("0123456789"), tuple("0123456789")), (tuple(map(_spelling, CLASSES)), CLASSES)):
        if set(spelt) == set(known):
            return {name: known.index(each) for name, each in zip(names, spelt, strict=True)}, classes
    return {name: label for label, name in enumerate(sorted(names))}, tuple(sorted(names))


def _spelling(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def decode(label: str, content: bytes, folder: File | None = None) -> np.ndarray:
    """Decode a picture of 28x28 grey pixels: uint8 (28, 28). folder: what pictures.folder would convert.

    Raises DataError for another picture; the label is how the error calls it.
    """
    from PIL import Image, UnidentifiedImageError  # only where there are pictures: it takes a tenth of a second

    kind = f"more than {MOST_BYTES:,} bytes"
    try:
        if len(content) <= MOST_BYTES:
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                kind = f"{picture.width}x{picture.height} pixels, {picture.mode}"
                if picture.size == (SIZE, SIZE) and picture.mode == "L":
                    return np.asarray(picture)
                if picture.size == (SIZE, SIZE) and picture.mode in ("1", "P", "RGB"):
                    pixels = np.asarray(picture.convert("RGB"))
                    if (pixels == pixels[..., :1]).all():
                        return pixels[..., 0]
                    kind = f"{picture.width}x{picture.height} pixels, coloured"
    except UnidentifiedImageError:
        kind = f"damaged, or none of {', '.join(FORMATS)}"
    except Exception as error:  # a malformed file can make a decoder raise anything
        raise DataError(f"{label} is not a picture that can be read: {one_line(error)}") from None
    advice = ""
    if folder:
        on_disk = isinstance(folder, Path)
        advice = f"; {'' if on_disk else 'unpack the zip and '}convert them: "
        advice += command("-m", "pictures.folder", cli.relative(str(folder)) if on_disk else "IMAGES", "FOLDER")
    raise DataError(f"{label} is not 28x28 and grey ({kind}){advice}")


def command(*words: str) -> str:
    """Write a command of Python that imports modules of this repository, as a user would type it here."""
    modules = "" if Path.cwd() == cli.ROOT else f"PYTHONPATH={shlex.quote(str(cli.ROOT))} "
    return f"{modules}{cli.python()} {shlex.join(words)}"


def _both(text: str) -> dict[str, str]:
    return {"train": text.format("train"), "t10k": text.format("test")}


IDX = Form("IDX files", {part: f"{part}-images-idx3-ubyte(.gz)" for part in PARTS}, _find_idx, _read_idx)
CSV = Form("CSV files", _both("fashion-mnist_{}.csv"), _find_csv, _read_csv)
NPZ = Form("arrays", _both("x_{}"), _find_npz, _read_npz)
PARQUET = Form("parquet files", _both("{}-*.parquet"), _find_parquet, _read_parquet)
FOLDERS = Form("pictures", _both("{}/<class>/"), _find_pictures, _read_pictures)
FORMS = (IDX, CSV, NPZ, PARQUET, FOLDERS)
