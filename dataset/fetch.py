"""Download Fashion-MNIST: from two sites over HTTPS, or as the package of Debian and Ubuntu, without root.

arrays = fetch.fetch(read)      # read(folder) verifies the four files there, and returns their arrays by name
"""

import contextlib
import http.client
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

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
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",  # the publisher's
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",  # Keras'
)
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
DOWNLOAD_DEADLINE = 1200  # seconds for the four files of a site: 26 kB/s
LATE = f"it has not sent all after {DOWNLOAD_DEADLINE} s"
DOWNLOAD_MOST = 30_000_000  # bytes of a file: the largest one has 26,421,880

# What a source that fails, or lies, ends in. ValueError: of an address to which a site redirects.
FAILURES = (DataError, OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError)

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
            except FAILURES as error:
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
    print(one_line(f"data: {message}"), file=sys.stderr, flush=True)


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
    """Download the four files of a site. A thread does it: a site can delay every byte, of the header too."""
    finished, end = Future[None](), time.monotonic() + DOWNLOAD_DEADLINE

    def work() -> None:
        try:
            for name in PUBLISHED:
                _download_file(f"{mirror}{name}.gz", folder / f"{name}.gz", end)
            finished.set_result(None)
        except Exception as error:  # of any kind: the main thread raises it
            finished.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # one that is late does not keep the process alive
    if not wait([finished], DOWNLOAD_DEADLINE).done:
        raise DataError(LATE)
    finished.result()
    return folder


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only to HTTPS: on the way to any other address, others could read or alter what is sent."""

    def redirect_request(self, *request: Any) -> urllib.request.Request | None:
        if not (address := request[-1]).startswith("https://"):
            raise DataError(f"it redirects to {address}, which is not HTTPS")
        return super().redirect_request(*request)


def _download_file(url: str, path: Path, end: float) -> None:
    """Download a file of at most DOWNLOAD_MOST bytes before a time of time.monotonic()."""
    with (
        urllib.request.build_opener(_HttpsOnly).open(url, timeout=DOWNLOAD_TIMEOUT) as response,
        open(path, "wb") as file,
        tqdm(total=response.length, unit="B", unit_scale=True, desc=path.name) as bar,
    ):
        while part := response.read1(2**16):  # what has come, without a wait for more
            file.write(part)
            bar.update(len(part))
            if bar.n > DOWNLOAD_MOST:
                raise DataError(f"{path.name} is larger than {DOWNLOAD_MOST:,} bytes")
            if time.monotonic() > end:
                raise DataError(LATE)


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
