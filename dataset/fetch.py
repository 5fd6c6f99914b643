"""Download Fashion-MNIST: from the publisher's two sites, or as the package of Debian and Ubuntu, without root.

arrays = fetch.fetch(read)      # read(folder) verifies the four files there, and returns their arrays by name
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from dataset import idx
from dataset.idx import DataError
from dataset.published import PUBLISHED
from runtime import cli
from runtime.errors import one_line

FETCHED = cli.ROOT / "data"  # what a download leaves, in torchvision's layout
PACKAGED = "usr/share/datasets/fashion-mnist"  # where the package dataset-fashion-mnist of Debian and Ubuntu puts it
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # the one torchvision uses
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

Arrays = dict[str, np.ndarray]  # by the name of an IDX file


def fetch(read: Callable[[Path], Arrays]) -> Arrays:
    """Download all four files into FETCHED, once, whatever else runs; return their arrays.

    read: verifies the four files in a folder and returns their arrays, or raises DataError.
    Raises DataError when no source has them.
    """
    FETCHED.mkdir(exist_ok=True)
    with _wait_for(FileLock(FETCHED / "fetch.lock")):
        with contextlib.suppress(DataError):  # the process we waited for may have fetched it
            arrays = read(FETCHED)
            print(f"data: fetched copy {FETCHED} (SHA-256 verified)", flush=True)
            return arrays
        for left_behind in FETCHED.glob("fetching-*"):  # by a process that was killed; we hold the lock
            shutil.rmtree(left_behind, ignore_errors=True)
        for source in (*MIRRORS, "Debian package"):
            print(f"data: fetching 30 MB from {source}", flush=True)
            try:
                arrays = _fetch_from(source, read)
            except (DataError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                notice(f"{source} failed: {one_line(error)}")
                continue
            print(f"data: fetched copy {FETCHED}, from {source} (SHA-256 verified)", flush=True)
            return arrays
    raise DataError(
        "no source had the data set; put the four files train-/t10k-images-idx3-ubyte.gz and "
        "-labels-idx1-ubyte.gz of github.com/zalandoresearch/fashion-mnist into a folder and pass --data-dir FOLDER"
    )


def notice(message: str) -> None:
    """Print a line about the data on stderr."""
    print(f"data: {message}", file=sys.stderr, flush=True)


def _fetch_from(source: str, read: Callable[[Path], Arrays]) -> Arrays:
    """Fetch and verify all four files from one source, then move them into place."""
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=FETCHED) as temporary:
        folder = Path(temporary)
        arrays = read(_fetch_debian(folder) if source == "Debian package" else _download(source, folder))
        raw = FETCHED / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            part = Path(temporary, name + ".verified")
            part.write_bytes(idx.encode(array))
            part.replace(raw / name)
    return arrays


def _wait_for(lock: FileLock) -> contextlib.AbstractContextManager:
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        notice("waiting for another process that is fetching the data")
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
