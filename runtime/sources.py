"""Where the images come from: find a data set, verify it, download it, and write one.

files = sources.find(["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"], data_dir=None)
sources.write(Path("mine"), {"train": (images, labels), "t10k": (images, labels)}, classes=names)

A data set is four IDX files (http://yann.lecun.com/exdb/mnist describes the format), raw or .gz. Those of
Fashion-MNIST must have the published SHA-256. A folder may bring another set with its own SHA256SUMS, and the names of
its ten classes in classes.txt.
"""

import contextlib
import gzip
import hashlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from runtime import cli
from runtime.errors import UserError, one_line

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NAME = "Fashion-MNIST"

# SHA-256 of the decompressed files: distributions compress them anew, so the sums of the .gz differ.
PUBLISHED = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # first four bytes of an IDX file of images, of labels
KINDS = {IMAGES_MAGIC: "images", LABELS_MAGIC: "labels"}
SIZE = 28
MAX_IMAGES = 200_000  # a header that announces more is not believed
SUMS, NAMES = "SHA256SUMS", "classes.txt"  # what a folder may bring along
LONGEST_NAME = 40  # characters of a class name

FETCHED = cli.ROOT / "data"  # what a download leaves, in torchvision's layout
PACKAGED = "usr/share/datasets/fashion-mnist"  # where the package dataset-fashion-mnist of Debian and Ubuntu puts it
SYSTEM = Path("/", PACKAGED)
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # the one torchvision uses
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
LAYOUTS = ("", "FashionMNIST/raw", "raw", "data/fashion", "fashion")  # below a data folder
DOWNLOAD_TIMEOUT = 30  # seconds without a byte


class DataError(UserError):
    """The data set is missing, damaged, or not what it should be."""


class Files(NamedTuple):
    """The arrays of a data set's files by file name, the name of the set, and its class names."""

    arrays: dict[str, np.ndarray]  # uint8 (n, 28, 28) or (n,)
    source: str  # "Fashion-MNIST", or the name of the folder that brought its own SHA256SUMS
    classes: tuple[str, ...]


def find(names: Sequence[str], data_dir: str | Path | None) -> Files:
    """Read and verify the files `names`, from the first source that has them all.

    Sources, in order: `data_dir`, a copy fetched earlier, the system's package, downloads. One line says which is used.
    Raises DataError when none has the files, or when a folder with its own SHA256SUMS does not match them.
    """
    local = [(Path(data_dir).expanduser(), "given folder")] if data_dir else []
    local += [(FETCHED, "fetched copy"), (SYSTEM, "system copy")]
    for folder, label in local:
        given = label == "given folder"
        if given and (own := _own_sums(folder)) is not None:
            return _find_own(folder, names, own)
        if not given and not any(_candidates(folder, name) for name in names):
            continue  # a usual place that is empty is not worth a line
        try:
            arrays = _parse({name: _read(folder, name, PUBLISHED) for name in names}, len(CLASSES))
        except (DataError, OSError) as error:
            _notice(f"{label} {folder} not used: {error}")
            continue
        print(f"data: {label} {folder} (SHA-256 verified)", flush=True)
        return Files(arrays, NAME, CLASSES)
    return Files(_fetch(names), NAME, CLASSES)


def _find_own(folder: Path, names: Sequence[str], sums: dict[str, str]) -> Files:
    """Read a set that brought its own SHA256SUMS. No other source can replace it."""
    try:
        classes = _read_classes(folder, sums)
        arrays = _parse({name: _read(folder, name, sums) for name in names}, len(classes))
    except (DataError, OSError) as error:
        raise DataError(f"{folder} (with its own SHA256SUMS): {error}") from None
    print(f"data: given folder {folder}, verified by its own SHA256SUMS: not the published set", flush=True)
    name = folder.resolve().name
    return Files(arrays, f"{name} (own)" if name == NAME else name, classes)


def _fetch(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Download all four files into FETCHED, once, whatever else runs; return the arrays of `names`."""
    FETCHED.mkdir(exist_ok=True)
    with _wait_for(FileLock(FETCHED / "fetch.lock")):
        with contextlib.suppress(DataError):  # the process we waited for may have fetched it
            files = {name: _read(FETCHED, name, PUBLISHED) for name in names}
            print(f"data: fetched copy {FETCHED} (SHA-256 verified)", flush=True)
            return _parse(files, len(CLASSES))
        for left_behind in FETCHED.glob("fetching-*"):  # by a process that was killed; we hold the lock
            shutil.rmtree(left_behind, ignore_errors=True)
        for source in (*MIRRORS, "Debian package"):
            print(f"data: fetching 30 MB from {source}", flush=True)
            try:
                files = _fetch_from(source)
            except (DataError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                _notice(f"{source} failed: {one_line(error)}")
                continue
            print(f"data: fetched copy {FETCHED}, from {source} (SHA-256 verified)", flush=True)
            return _parse({name: files[name] for name in names}, len(CLASSES))
    raise DataError(
        "no source had the data set; put the four files train-/t10k-images-idx3-ubyte.gz and "
        "-labels-idx1-ubyte.gz of github.com/zalandoresearch/fashion-mnist into a folder and pass --data-dir FOLDER"
    )


def _fetch_from(source: str) -> dict[str, bytes]:
    """Fetch and verify all four files from one source, then move them into place."""
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=FETCHED) as temporary:
        folder = Path(temporary)
        folder = _fetch_debian(folder) if source == "Debian package" else _download(source, folder)
        files = {name: _read(folder, name, PUBLISHED) for name in PUBLISHED}
        raw = FETCHED / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            part = Path(temporary, name + ".verified")
            part.write_bytes(content)
            part.replace(raw / name)
    return files


def _wait_for(lock: FileLock) -> contextlib.AbstractContextManager:
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        _notice("waiting for another process that is fetching the data")
        return lock.acquire()


def _download(mirror: str, folder: Path) -> Path:
    from torchvision.datasets.utils import download_url  # takes seconds to import

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none
    try:
        for name in PUBLISHED:
            download_url(f"{mirror}{name}.gz", folder)
    finally:
        socket.setdefaulttimeout(timeout)
    return folder


def _fetch_debian(folder: Path) -> Path:
    """Fetch Debian's package by apt-get, whose state and cache lie in a private folder, so that it needs no root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DataError("no apt-get and dpkg-deb here: not Debian or Ubuntu")
    for sub in ("state/lists/partial", "cache/archives/partial"):
        Path(folder, sub).mkdir(parents=True)
    options = [f"Dir::State={folder}/state", f"Dir::Cache={folder}/cache", "APT::Status-Fd=1"]
    options += ["Dir::State::status=/var/lib/dpkg/status", "Acquire::Languages=none", "Acquire::Retries=2"]
    apt = ["apt-get", *(word for option in options for word in ("-o", option))]
    for arguments in (["update"], ["download", "dataset-fashion-mnist"]):
        _run_with_bar([*apt, *arguments], f"apt-get {arguments[0]}", folder)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
    return folder / PACKAGED


def _run_with_bar(command: list[str], name: str, folder: Path) -> None:
    """Run apt-get with a progress bar; it prints its progress as dlstatus:<file>:<percent>:<text>."""
    with (
        open(folder / "errors", "w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder) as run,
        tqdm(total=100, desc=name, bar_format="{desc} {percentage:3.0f}% |{bar}|") as bar,
    ):
        for line in run.stdout or ():
            if line.startswith("dlstatus:"):
                bar.update(float(line.split(":")[2]) - bar.n)
        if run.wait():
            errors.seek(0)
            raise DataError(f"{name}: {one_line(errors.read()) or 'failed'}")


def _candidates(folder: Path, name: str) -> list[Path]:
    """List the existing files below `folder` that may hold `name`, raw before .gz, in the usual layouts."""
    paths = [Path(folder, layout, name + suffix) for layout in LAYOUTS for suffix in ("", ".gz")]
    return [path for path in paths if path.is_file()]


def _read(folder: Path, name: str, sums: Mapping[str, str]) -> bytes:
    """Return the verified decompressed bytes of the IDX file `name`; after a damaged copy the next one is tried."""
    if not Path(folder).is_dir():
        raise DataError("no such folder")
    problems: list[str] = []
    for path in _candidates(folder, name):
        try:
            content = _read_idx(path, LABELS_MAGIC if "labels" in name else IMAGES_MAGIC)
            _verify(path, content, name, sums)
        except (OSError, EOFError, zlib.error) as error:
            problems.append(f"{path.name} cannot be read: {one_line(error)}")
        except DataError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                _notice(f"{problem}; used {path.name} beside it")
            return content
    raise DataError("; ".join(problems) or f"{name}(.gz) is missing")


def _verify(path: Path, content: bytes, name: str, sums: Mapping[str, str]) -> None:
    """Raise DataError unless the content has the SHA-256 that belongs to the name."""
    digest = hashlib.sha256(content).hexdigest()
    if digest == sums.get(name):
        return
    known = {value: key for key, value in sums.items()}
    if digest in known:
        raise DataError(f"{path.name} holds the content of {known[digest]}: swapped")
    raise DataError(f"{path.name} is altered: its SHA-256 is {digest[:12]}…, not {sums.get(name, '?')[:12]}…")


def _read_idx(path: Path, magic: int) -> bytes:
    """Return the decompressed bytes of an IDX file, no more than its header announces: a gzip bomb stays small."""
    kind, longer = KINDS[magic], DataError(f"{path.name} is longer than its header announces")
    words = 4 if magic == IMAGES_MAGIC else 2  # magic, count, and for images rows and columns
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        header = file.read(4 * words)
        if len(header) < 4 * words:
            raise DataError(f"{path.name} is truncated: it ends within its header")
        found, count, *size = struct.unpack(f">{words}I", header)
        if found != magic:
            raise DataError(f"{path.name} is not an IDX file of {kind} (it begins with {found}, not {magic})")
        if count > MAX_IMAGES or size not in ([SIZE, SIZE], []):
            pixels = f" of {size[0]}x{size[1]} pixels" if size else ""
            raise DataError(f"{path.name} announces {count:,} {kind}{pixels}: not Fashion-MNIST")
        expected = count * SIZE**2 if magic == IMAGES_MAGIC else count
        if path.stat().st_size > expected + expected // 100 + 1000:  # a .gz of a million empty members takes long
            raise longer
        payload = file.read(expected + 1)
    if len(payload) < expected:
        raise DataError(f"{path.name} is truncated: {len(payload):,} of {expected:,} bytes")
    if len(payload) > expected:
        raise longer
    return header + payload


def _parse(files: Mapping[str, bytes], n_classes: int) -> dict[str, np.ndarray]:
    """Turn IDX bytes by name into uint8 arrays by name, (n, 28, 28) or (n,), and check that they belong together."""
    arrays = {}
    for name, content in files.items():
        if "images" in name:
            arrays[name] = np.frombuffer(content, np.uint8, offset=16).reshape(-1, SIZE, SIZE)
        else:
            arrays[name] = np.frombuffer(content, np.uint8, offset=8)
    for part in {name.split("-")[0] for name in files}:
        images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        if len(images) != len(labels) or not len(labels) or labels.max() >= n_classes:
            raise DataError(f"{part}: {len(images):,} images, {len(labels):,} labels up to {max(labels, default=0)}")
    return arrays


def _own_sums(folder: Path) -> dict[str, str] | None:
    """Read the SHA-256 by file name from a folder's own SHA256SUMS (as `sha256sum` writes it), if it has one."""
    path = Path(folder, SUMS)
    if not path.is_file():
        return None
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
    return {words[1].lstrip("*"): words[0].lower() for words in lines if len(words) == 2}


def _read_classes(folder: Path, sums: Mapping[str, str]) -> tuple[str, ...]:
    """Read the class names from a folder's classes.txt; without one they are Fashion-MNIST's."""
    path = Path(folder, NAMES)
    if not path.is_file():
        if NAMES in sums:
            raise DataError(f"{NAMES} is missing")
        return CLASSES
    content = path.read_bytes()[: 100 * LONGEST_NAME]
    if NAMES in sums:
        _verify(path, content, NAMES, sums)
    return check_classes(content.decode(errors="replace").splitlines())


def check_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return ten class names as a tuple. Raises DataError unless they are ten, distinct, short and printable."""
    classes = tuple(str(name).strip() for name in names)
    if len(classes) != len(CLASSES) or len(set(classes)) != len(classes):
        raise DataError(f"there must be {len(CLASSES)} different class names, one a line, and not {len(classes)}")
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
    Raises DataError when shapes, dtypes, labels or names do not fit.
    """
    folder, files = Path(folder), dict[str, bytes]()
    for part, (images, labels) in parts.items():
        files |= _idx_files(part, np.asarray(images), np.asarray(labels))
    if classes is not None:
        files[NAMES] = "".join(f"{name}\n" for name in check_classes(classes)).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    (folder / SUMS).write_text("".join(lines))


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
        f"{part}-images-idx3-ubyte": struct.pack(">4I", IMAGES_MAGIC, n, SIZE, SIZE) + images.tobytes(),
        f"{part}-labels-idx1-ubyte": struct.pack(">2I", LABELS_MAGIC, n) + labels.astype(np.uint8).tobytes(),
    }


def _notice(message: str) -> None:
    print(f"data: {message}", file=sys.stderr, flush=True)
