"""Fashion-MNIST in memory: find it, verify it, split it, and cut it into batches.

    train, val, test = data.load("train", "val", "test")
    for images, labels in data.batches(train, 128, seed=0, epoch=1):
        logits = model(data.normalise(data.augment(images, flip=True)))

The data set is kept as uint8 tensors; a batch is gathered, augmented and normalised in a few tensor operations.
"""

import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD = 0.5, 0.5  # of pixels scaled to [0, 1], as published

# SHA-256 of the decompressed files: distributions recompress them, so sums of the .gz differ.
PUBLISHED = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # first four bytes of an IDX file of images, of labels
MAX_IMAGES = 200_000  # a header that claims more is not believed

HERE = Path(__file__).resolve().parent
FETCHED = HERE / "data"  # what a download leaves, in torchvision's layout
PACKAGED = "usr/share/datasets/fashion-mnist"  # where the package dataset-fashion-mnist of Debian and Ubuntu puts it
SYSTEM = Path("/", PACKAGED)
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # the one torchvision uses
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
LAYOUTS = ("", "FashionMNIST/raw", "raw", "data/fashion", "fashion")  # below a data folder
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

SPLIT_SEED = 20170825  # of the validation split alone, never of a run: the day arXiv:1708.07747 appeared
VALIDATION_SHARE = 12  # one training image in twelve of each class: 5,000 of 60,000


class UserError(Exception):
    """A user's mistake or a fault of their files: the scripts tell it in one line and exit with code 2."""


class DataError(UserError):
    """The data set is missing, damaged, or not what it should be."""


class Split(NamedTuple):
    """Images and labels of one split, in the order of the published files."""

    name: str  # "train", "val", "train+val" or "test"
    images: torch.Tensor  # uint8 (n, 28, 28), 0 is the black ground
    labels: torch.Tensor  # int64 (n,), 0 to 9
    source: str  # "Fashion-MNIST", or the name of the folder that brought its own SHA256SUMS

    def to(self, device):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def load(*splits, data_dir=None):
    """Find and verify the data set, and return the splits asked for.

    "train" and "val" are the 55,000 and 5,000 images of the fixed stratified split of the training set,
    "train+val" is all 60,000 of it, "test" is the published test set. Sources, in order: `data_dir` (or the
    variable FMNIST_DIR), a copy fetched earlier, the system's package, then downloads.

    Returns a list of Split. Raises DataError when no source has the data.
    """
    parts = {"t10k" if name == "test" else "train" for name in splits}
    names = [name for name in PUBLISHED if name.split("-")[0] in parts]
    files, source = _find(names, data_dir or os.environ.get("FMNIST_DIR"))
    result = []
    for split in splits:
        part = "t10k" if split == "test" else "train"
        images, labels = files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"]
        if split in ("train", "val"):
            index = split_indices(labels)[split]
            images, labels = images[index], labels[index]
        result.append(Split(split, torch.tensor(images), torch.tensor(labels, dtype=torch.int64), source))
    return result


def split_indices(labels):
    """Stratified indices of the training set's "train" and "val" images, the same for every run and machine.

    labels: uint8 (n,). Returns a dict of sorted int64 arrays. RandomState, whose stream numpy froze for good
    (NEP 19), draws one image in twelve of each class.
    """
    random = np.random.RandomState(SPLIT_SEED)
    held_out = []
    for label in range(len(CLASSES)):
        members = random.permutation(np.flatnonzero(labels == label))
        held_out.append(members[: len(members) // VALIDATION_SHARE])
    val = np.sort(np.concatenate(held_out))
    return {"train": np.setdiff1d(np.arange(len(labels)), val), "val": val}


def fingerprint(*splits):
    """SHA-256, in hexadecimal, of the images and labels of these splits in their order."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.images.cpu().numpy())
        digest.update(split.labels.cpu().numpy())
    return digest.hexdigest()


def derive_seeds(*key, n=1):
    """n 63-bit seeds, as a list of int, from (seed,) for a run's initial weights or (seed, epoch) for an epoch.

    Of an epoch's, the first is for its permutation and the one at index i for its step i, counted from 1, however
    many are asked for. So every random draw is a function of its place in the run, and no generator's state lives
    across steps. (seed, epoch, rank) gives the seeds of one process among several. Epochs count from 1, as
    SeedSequence pads its key with zeros; for the same reason the seeds of rank 0 are those of a lone process.
    """
    return (np.random.SeedSequence(key).generate_state(n, np.uint64) >> 1).tolist()


def batches(split, batch_size, seed=None, epoch=None, *, first=0, rank=0, world=1):
    """Yield (images uint8 (b, 28, 28), labels int64 (b,)) on the split's device, each image once.

    With a seed, in the order of the permutation of (seed, epoch); without, in the order of the files. The first
    `first` batches are passed over. Of `world` processes, the one of that rank gets its share of every batch.
    """
    n, device = len(split.labels), split.labels.device
    if seed is None:
        order = torch.arange(n, device=device)
    else:  # drawn on the CPU, so that every device sees the same order
        generator = torch.Generator().manual_seed(derive_seeds(seed, epoch)[0])
        order = torch.randperm(n, generator=generator).to(device)
    for index in order.split(batch_size)[first:]:  # index_select copies whole images: six times as fast as indexing
        index = index[share(len(index), rank, world)]
        yield split.images.index_select(0, index), split.labels.index_select(0, index)


def share(n, rank, world):
    """The slice of n things that falls to one of `world` processes: together each once, in sizes that differ by one."""
    return slice(n * rank // world, n * (rank + 1) // world)


def augment(images, *, flip=False, shift=0, still=0.0, erase=0, n=None, part=slice(None)):
    """Alter each image uint8 (b, 28, 28) in its own way, drawn from the default generator of its device.

    flip mirrors half of them; shift moves them by up to so many pixels along both axes, black coming in, but for the
    share still of them; erase blackens a square of so many pixels a side around any pixel, cut off at the border
    (cutout: DeVries and Taylor 2017, arXiv:1708.04552). Where the images are a part of a batch of n, what is drawn is
    what the whole would get.
    """
    n, size, device = n or len(images), images.shape[-1], images.device
    if flip:
        chosen = torch.rand(n, 1, 1, device=device)[part] < 0.5
        images = torch.where(chosen, images.flip(2), images)
    if shift:
        windows = F.pad(images, (shift,) * 4).unfold(1, size, 1).unfold(2, size, 1)  # every position, without a copy
        places = torch.randint(2 * shift + 1, (2, n), device=device)
        if still:
            places = torch.where(torch.rand(n, device=device) < still, shift, places)
        down, right = places[:, part]
        images = windows[torch.arange(len(images), device=device), down, right]
    if erase:
        place = torch.arange(size, device=device)
        rows, columns = torch.randint(size, (2, n, 1), device=device)[:, part] - erase // 2
        in_rows, in_columns = ((start <= place) & (place < start + erase) for start in (rows, columns))
        images = images.masked_fill(in_rows.unsqueeze(2) & in_columns.unsqueeze(1), 0)
    return images


def normalise(images, dtype=torch.float32):
    """uint8 (b, 28, 28) -> dtype (b, 1, 28, 28) in [-1, 1], which is (pixel / 255 - MEAN) / STD.

    In float32 with torchvision's steps, to the bit. Shorter dtypes hold a pixel and its distance from the mean exactly,
    so that they are rounded once, with a third of the traffic to memory.
    """
    images = images.unsqueeze(1).to(dtype)
    if dtype == torch.float32:
        return images.div_(255).sub_(MEAN).div_(STD)
    return images.sub_(255 * MEAN).div_(255 * STD)


def write(folder, parts):
    """Write a data set of its own, with its SHA256SUMS, into a folder that load() then takes as data_dir.

    parts: {"train" and "t10k": (images uint8 (n, 28, 28), labels int64 (n,))}, on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = []
    for part, (images, labels) in parts.items():
        for name, magic, content in (
            (f"{part}-images-idx3-ubyte", (IMAGES_MAGIC, len(images), *images.shape[1:]), images),
            (f"{part}-labels-idx1-ubyte", (LABELS_MAGIC, len(labels)), labels.to(torch.uint8)),
        ):
            file = struct.pack(f">{len(magic)}I", *magic) + content.numpy().tobytes()
            (folder / name).write_bytes(file)
            sums.append(f"{hashlib.sha256(file).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums))


def _find(names, data_dir):
    """Arrays of the files `names` from the first source that has them all, and that source's name."""
    local = [(Path(data_dir).expanduser(), "given folder")] if data_dir else []
    local += [(FETCHED, "fetched copy"), (SYSTEM, "system copy")]
    for folder, label in local:
        given = label == "given folder"
        own = _own_sums(folder) if given else None
        if not given and not any(_candidates(folder, name) for name in names):
            continue  # a usual place that is empty is not worth a line
        try:
            sums = PUBLISHED if own is None else own
            arrays = _parse({name: _read(folder, name, sums) for name in names})
        except (DataError, OSError) as error:
            if own is not None:  # a set of its own: no other source can stand in for it
                raise DataError(f"{folder} (with its own SHA256SUMS): {error}") from None
            _report(f"{label} {folder} not used: {error}")
            continue
        if own is not None:
            print(f"data: {label} {folder}, verified by its own SHA256SUMS: not the published set", flush=True)
            return arrays, folder.resolve().name
        print(f"data: {label} {folder} (SHA-256 verified)", flush=True)
        return arrays, "Fashion-MNIST"
    return _fetch(names), "Fashion-MNIST"


def _fetch(names):
    """Download all four files into FETCHED, once, whatever else runs; return the arrays of `names`."""
    from filelock import FileLock

    FETCHED.mkdir(exist_ok=True)
    with _wait_for(FileLock(FETCHED / "fetch.lock")):
        with contextlib.suppress(DataError):  # the process we waited for may have fetched it
            files = {name: _read(FETCHED, name, PUBLISHED) for name in names}
            print(f"data: fetched copy {FETCHED} (SHA-256 verified)", flush=True)
            return _parse(files)
        for left_behind in FETCHED.glob("fetching-*"):  # by a process that was killed; we hold the lock
            shutil.rmtree(left_behind, ignore_errors=True)
        for source, fetch in [*((url, _download) for url in MIRRORS), ("Debian package", _fetch_debian)]:
            print(f"data: fetching 30 MB from {source}", flush=True)
            try:
                with tempfile.TemporaryDirectory(prefix="fetching-", dir=FETCHED) as temporary:
                    folder = fetch(source, Path(temporary))
                    files = {name: _read(folder, name, PUBLISHED) for name in PUBLISHED}
                    raw = FETCHED / "FashionMNIST" / "raw"
                    raw.mkdir(parents=True, exist_ok=True)
                    for name, content in files.items():
                        part = Path(temporary, name + ".verified")
                        part.write_bytes(content)
                        part.replace(raw / name)
            except (DataError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                _report(f"{source} failed: {_one_line(error)}")
                continue
            print(f"data: fetched copy {FETCHED}, from {source} (SHA-256 verified)", flush=True)
            return _parse({name: files[name] for name in names})
    raise DataError(
        "no source had the data set; put the four files train-/t10k-images-idx3-ubyte.gz and "
        "-labels-idx1-ubyte.gz of github.com/zalandoresearch/fashion-mnist into a folder and pass --data-dir FOLDER"
    )


def _wait_for(lock):
    from filelock import Timeout

    try:
        return lock.acquire(blocking=False)
    except Timeout:
        _report("waiting for another process that is fetching the data")
        return lock.acquire()


def _download(mirror, folder):
    from torchvision.datasets.utils import download_url  # seconds to import, so only here

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none
    try:
        for name in PUBLISHED:
            download_url(f"{mirror}{name}.gz", folder)
    finally:
        socket.setdefaulttimeout(timeout)
    return folder


def _fetch_debian(_, folder):
    """Debian's package through apt-get with its state and cache in a private folder, which needs no root."""
    from tqdm import tqdm

    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DataError("no apt-get and dpkg-deb here: not Debian or Ubuntu")
    for sub in ("state/lists/partial", "cache/archives/partial"):
        Path(folder, sub).mkdir(parents=True)
    options = [f"Dir::State={folder}/state", f"Dir::Cache={folder}/cache", "APT::Status-Fd=1"]
    options += ["Dir::State::status=/var/lib/dpkg/status", "Acquire::Languages=none", "Acquire::Retries=2"]
    apt = ["apt-get", *(word for option in options for word in ("-o", option))]
    for arguments in (["update"], ["download", "dataset-fashion-mnist"]):
        with (
            open(folder / "errors", "w+") as errors,
            subprocess.Popen([*apt, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder) as run,
            tqdm(total=100, desc=f"apt-get {arguments[0]}", bar_format="{desc} {percentage:3.0f}% |{bar}|") as bar,
        ):
            for line in run.stdout:  # apt-get tells its progress as dlstatus:<file>:<percent>:<text>
                if line.startswith("dlstatus:"):
                    bar.update(float(line.split(":")[2]) - bar.n)
            if run.wait():
                errors.seek(0)
                raise DataError(f"apt-get {arguments[0]}: {_one_line(errors.read()) or 'failed'}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
    return folder / PACKAGED


def _candidates(folder, name):
    """Existing files below `folder` that may hold `name`, raw before .gz, in the usual layouts."""
    paths = [Path(folder, layout, name + suffix) for layout in LAYOUTS for suffix in ("", ".gz")]
    return [path for path in paths if path.is_file()]


def _read(folder, name, sums):
    """Verified decompressed bytes of the IDX file `name`; a damaged copy is told and the next one tried."""
    if not Path(folder).is_dir():
        raise DataError("no such folder")
    problems = []
    for path in _candidates(folder, name):
        try:
            content = _read_idx(path, LABELS_MAGIC if "labels" in name else IMAGES_MAGIC)
        except (OSError, EOFError, zlib.error) as error:
            problems.append(f"{path.name} cannot be read: {_one_line(error)}")
            continue
        except DataError as error:
            problems.append(str(error))
            continue
        digest = hashlib.sha256(content).hexdigest()
        if digest == sums.get(name):
            for problem in problems:
                _report(f"{problem}; used {path.name} beside it")
            return content
        known = {value: key for key, value in sums.items()}
        if digest in known:
            problems.append(f"{path.name} holds the content of {known[digest]}: swapped")
        else:
            problems.append(f"{path.name} is altered: its SHA-256 is {digest[:12]}…, not {sums.get(name, '?')[:12]}…")
    raise DataError("; ".join(problems) or f"{name}(.gz) is missing")


def _read_idx(path, magic):
    """Decompressed bytes of an IDX file, no more than its own header announces (a gzip bomb stays small)."""
    kind = {IMAGES_MAGIC: "images", LABELS_MAGIC: "labels"}
    words = 4 if magic == IMAGES_MAGIC else 2  # magic, count, and for images rows and columns
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        header = file.read(4 * words)
        if len(header) < 4 * words:
            raise DataError(f"{path.name} is truncated: it ends within its header")
        found, count, *size = struct.unpack(f">{words}I", header)
        if found != magic:
            raise DataError(f"{path.name} is not an IDX file of {kind[magic]} (it begins with {found}, not {magic})")
        if count > MAX_IMAGES or size not in ([28, 28], []):
            pixels = f" of {size[0]}x{size[1]} pixels" if size else ""
            raise DataError(f"{path.name} announces {count:,} {kind[magic]}{pixels}: not Fashion-MNIST")
        expected = count * 784 if magic == IMAGES_MAGIC else count
        if path.stat().st_size > expected + expected // 100 + 1000:  # a .gz of a million empty members takes long
            raise DataError(f"{path.name} is longer than its header announces")
        payload = file.read(expected + 1)
    if len(payload) < expected:
        raise DataError(f"{path.name} is truncated: {len(payload):,} of {expected:,} bytes")
    if len(payload) > expected:
        raise DataError(f"{path.name} is longer than its header announces")
    return header + payload


def _parse(files):
    """IDX bytes by name -> uint8 arrays by name, (n, 28, 28) or (n,), checked to belong together."""
    arrays = {}
    for name, content in files.items():
        if "images" in name:
            arrays[name] = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
        else:
            arrays[name] = np.frombuffer(content, np.uint8, offset=8)
    for part in {name.split("-")[0] for name in files}:
        images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        if len(images) != len(labels) or not len(labels) or labels.max() >= len(CLASSES):
            raise DataError(f"{part}: {len(images):,} images, {len(labels):,} labels up to {max(labels, default=0)}")
    return arrays


def _own_sums(folder):
    """SHA-256 by file name from a folder's own SHA256SUMS (as `sha256sum` writes it), or None."""
    path = Path(folder, "SHA256SUMS")
    if not path.is_file():
        return None
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
    return {words[1].lstrip("*"): words[0].lower() for words in lines if len(words) == 2}


def _one_line(error):
    return " ".join(str(error).split())


def _report(message):
    print(f"data: {message}", file=sys.stderr, flush=True)
