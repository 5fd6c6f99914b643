"""data.py and dataset/sources.py: finding, verifying, fetching, splitting and augmenting, on the real sample."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import shutil
import socketserver
import struct
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, run_script, start_fork
from torchvision import transforms

import data
import recipes
from analysis.strength import scaled
from dataset import fetch, published, sources
from runtime.errors import UserError

FILES = tuple(sources.PUBLISHED)


def copy_sample(folder, raw=False):
    """The sample's four files in `folder`, without its SHA256SUMS."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if raw:
            (folder / name).write_bytes(gzip.decompress((SAMPLE / f"{name}.gz").read_bytes()))
        else:
            shutil.copy(SAMPLE / f"{name}.gz", folder)
    return folder


# --- finding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw", "raw", "data/fashion", "fashion"])
def test_every_usual_layout_is_found(sample_as_published, sample, capsys, layout, raw):
    copy_sample(sample_as_published / "given" / layout, raw)
    (test,) = data.load("test", data_dir=sample_as_published / "given")
    assert torch.equal(test.images, sample["test"].images)
    assert test.source == "Fashion-MNIST"
    assert f"given folder {sample_as_published / 'given'} (SHA-256 verified)" in capsys.readouterr().out


def test_sources_are_tried_in_order(sample_as_published, capsys, monkeypatch):
    used = []
    for name in ("system", "keras", "fetched", "variable", "given"):
        copy_sample(sample_as_published / name)
        if name == "variable":
            monkeypatch.setenv("FMNIST_DIR", str(sample_as_published / name))
        data.load("test", data_dir=sample_as_published / name if name == "given" else None)
        out = capsys.readouterr().out
        assert out.count("\n") == 1  # one line says which
        used.append(Path(out.split(" (SHA")[0].split()[-1]).name)
    assert used == ["system", "keras", "fetched", "variable", "given"]


def test_evaluating_the_test_set_needs_only_its_two_files(sample_as_published):
    copy_sample(sample_as_published / "system")
    for name in FILES:
        if name.startswith("train"):
            (sample_as_published / "system" / f"{name}.gz").unlink()
    assert len(data.load("test")[0].labels) == 500


def test_there_are_four_splits():
    for name in ("Test", "tset", "t10k", ""):
        with pytest.raises(data.DataError, match=f"no split '{name}'; they are train, val, train\\+val, test"):
            data.load("val", name, data_dir=SAMPLE)


# --- verifying -------------------------------------------------------------------------------------------


def truncate(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100_000])


def truncate_raw(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    (folder / "t10k-images-idx3-ubyte").write_bytes(gzip.decompress(path.read_bytes())[:-1])
    path.unlink()


def alter(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[100] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))


def swap_parts(folder):
    shutil.copy(folder / "train-images-idx3-ubyte.gz", folder / "t10k-images-idx3-ubyte.gz")


def swap_kinds(folder):
    shutil.copy(folder / "t10k-labels-idx1-ubyte.gz", folder / "t10k-images-idx3-ubyte.gz")


def lengthen(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))


def claim_billions(folder):
    content = struct.pack(">4I", sources.IMAGES_MAGIC, 4_000_000_000, 28, 28)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))


def no_gzip(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>404 Not Found</html>")


def empty(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"")


def missing(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()


DAMAGES = {
    truncate: "t10k-images-idx3-ubyte.gz cannot be read: .*end",
    truncate_raw: "t10k-images-idx3-ubyte is truncated: 391,999 of 392,000 bytes",
    alter: "t10k-labels-idx1-ubyte.gz is not Fashion-MNIST's, or is altered: 500 labels",
    swap_parts: "t10k-images-idx3-ubyte.gz holds the content of train-images-idx3-ubyte: swapped",
    swap_kinds: "t10k-images-idx3-ubyte.gz is not an IDX file of images",
    lengthen: "t10k-labels-idx1-ubyte.gz is longer than its header announces",
    claim_billions: "t10k-images-idx3-ubyte.gz announces 4,000,000,000 images",
    no_gzip: "t10k-images-idx3-ubyte.gz is not an IDX file of images",
    empty: "t10k-images-idx3-ubyte.gz is truncated",
    missing: r"t10k-labels-idx1-ubyte\(.gz\) is missing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named_and_never_used(sample_as_published, sample, capsys, damage):
    damage(copy_sample(sample_as_published / "fetched"))
    copy_sample(sample_as_published / "system")
    (test,) = data.load("test")
    captured = capsys.readouterr()
    assert re.search(f"fetched copy .* not used: .*{DAMAGES[damage]}", captured.err), captured.err
    assert captured.err.count("\n") == 1
    assert "system copy" in captured.out
    assert torch.equal(test.images, sample["test"].images)
    assert torch.equal(test.labels, sample["test"].labels)
    with pytest.raises(data.DataError, match=f"^--data-dir .*{DAMAGES[damage]}"):  # what is named has no substitute
        data.load("test", data_dir=sample_as_published / "fetched")


def test_a_good_copy_beside_a_damaged_one_is_used_and_reported(sample_as_published, capsys):
    folder = copy_sample(sample_as_published / "given", raw=True)
    copy_sample(folder)
    (folder / "t10k-images-idx3-ubyte").write_bytes(b"rubbish")
    data.load("test", data_dir=folder)
    assert "used t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz beside it" in capsys.readouterr().err


def test_a_set_with_its_own_sums_is_verified_too_and_has_no_substitute(tmp_path, capsys):
    folder = copy_sample(tmp_path / "own")
    shutil.copy(SAMPLE / "SHA256SUMS", folder)
    assert data.load("test", data_dir=folder)[0].source == "own"
    assert "not the published images" in capsys.readouterr().out
    alter(folder)
    for other_data in (False, True):
        with pytest.raises(data.DataError, match=r"t10k-labels-idx1-ubyte\.gz is altered"):
            data.load("test", data_dir=folder, other_data=other_data)


def test_a_set_that_is_written_is_read_back_with_its_class_names(sample, tmp_path):
    names = [f"class {number}" for number in range(10)]
    test = sample["test"]
    parts = {"train": (test.images[:40], test.labels[:40]), "t10k": (test.images.numpy(), test.labels.numpy())}
    data.write(tmp_path / "mine", parts, names)
    train, read = data.load("train+val", "test", data_dir=tmp_path / "mine")
    assert read.classes == train.classes == tuple(names)
    assert read.source == "mine"
    assert torch.equal(read.images, test.images)
    assert torch.equal(read.labels, test.labels)
    assert len(train.labels) == 40
    assert sample["test"].classes == data.CLASSES  # a set without classes.txt


NAMES = {
    ("a\n" * 10): "there must be 10 different class names, and not 'a' more than once",
    "".join(f"class {number}\n" for number in range(9)): "there must be 10 different class names, .* not 9",
    "".join(f"class {number}\n" for number in range(9)) + "\x1b[2J\n": "is not 1 to 40 printable characters",
    "".join(f"class {number}\n" for number in range(9)) + "x" * 41: "is not 1 to 40 printable characters",
}


@pytest.mark.parametrize("content", NAMES, ids=["the same", "nine", "controls", "too long"])
def test_class_names_that_are_not_ten_good_ones_are_refused(content, tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "mine")
    (tmp_path / "mine" / "classes.txt").write_text(content)
    with pytest.raises(data.DataError, match=NAMES[content]) as caught:
        data.load("test", data_dir=tmp_path / "mine")
    assert str(caught.value).isprintable()


LIKE_IT = ("Fashion-MNIST", "FASHION MNIST", "F\u0430shion-MNIST", "fash10n_mni5t", "Fashion-MNIS7", "Fashion-rnNIST",
           "Fashion-MN|ST", "Fashion-MN!ST", "\uff26ashion-MNIST")  # fmt: skip


def test_the_name_of_another_set_is_printable_and_not_that_of_the_published_one(sample, tmp_path):
    folder = tmp_path / "first"
    images, labels = sample["test"].images[:20], sample["test"].labels[:20]
    data.write(folder, {"t10k": (images, labels)})
    names = {
        "a\u00a0b": "a b",
        "e\u0301\udcff\u202e": "\u00e9\\udcff\\u202e",
        "n" * 255: "n" * 79 + "…",
        "2024-05-15": "2024-05-15",
        **{name: f"{name} (own)" for name in LIKE_IT},
        **{name: name for name in ("моя_коллекция", "服装图片数据集训练测试样本", "fashion", "mnist")},
    }
    for name, source in names.items():
        folder = folder.rename(tmp_path / name)
        (split,) = data.load("test", data_dir=folder)
        assert split.source == source


@pytest.mark.parametrize("name", ["SHA256SUMS", "classes.txt"])
def test_what_describes_a_set_is_read_only_if_it_is_a_small_file(name, tmp_path):
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    if name == "classes.txt":  # whose sum is not computed either
        with (tmp_path / "SHA256SUMS").open("a") as file:
            file.write(f"{'0' * 64}  {name}\n")
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(data.DataError, match=f"{name}: not a regular file"):
        data.load("test", data_dir=tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # whose writer never comes
    with pytest.raises(data.DataError, match=f"{name}: not a regular file"):
        data.load("test", data_dir=tmp_path)


def test_a_sum_of_no_possible_path_is_refused(tmp_path):
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {'a/' * 3000}b\n")
    with pytest.raises(data.DataError, match="SHA256SUMS, line 5, is not as sha256sum writes it"):
        data.load("test", data_dir=tmp_path)


@pytest.mark.parametrize("spelling", ["utf-8-sig", "utf-16", "blank lines", "Classes.txt"])
def test_class_names_are_read_as_editors_save_them(spelling, tmp_path):
    copy_sample(tmp_path)
    names = ["Größe", *(f"class {number}" for number in range(1, 10))]
    encoding = spelling if spelling.startswith("utf") else "utf-8"
    between = "\n\n" if spelling == "blank lines" else "\r\n"
    path = tmp_path / ("Classes.txt" if spelling == "Classes.txt" else "classes.txt")
    path.write_bytes("".join(name + between for name in names).encode(encoding))
    assert data.load("test", data_dir=tmp_path, other_data=True)[0].classes == tuple(names)
    path.write_bytes("\n".join(names).encode("latin-1"))
    with pytest.raises(data.DataError, match=r"lasses\.txt is not UTF-8 text"):
        data.load("test", data_dir=tmp_path, other_data=True)


def test_writing_a_set_loses_no_file(sample, tmp_path):
    images, labels = sample["test"].images, sample["test"].labels
    names = [f"class {number}" for number in range(10)]
    data.write(tmp_path / "mine", {"t10k": (images, labels)}, names)
    (tmp_path / "mine" / "SHA256SUMS").unlink()
    data.write(tmp_path / "mine", {"t10k": (images, labels)}, names)  # as after an interruption
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    for parts, classes in (({"t10k": (255 - images, labels)}, names), ({"t10k": (images, labels)}, None),
                           ({"train": (images, labels)}, names)):  # fmt: skip
        with pytest.raises(data.DataError, match=r"mine already has another .*; name a new folder"):
            data.write(tmp_path / "mine", parts, classes)
        assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="file is a file; name a new folder"):
        data.write(tmp_path / "file", {"t10k": (images, labels)})


def test_class_names_that_are_altered_or_missing_are_noticed(sample, tmp_path):
    test = sample["test"]
    data.write(tmp_path, {"t10k": (test.images, test.labels)}, [f"class {number}" for number in range(10)])
    path = tmp_path / "classes.txt"
    path.write_text(path.read_text().replace("class 3", "class three"))
    with pytest.raises(data.DataError, match=r"classes\.txt is altered"):
        data.load("test", data_dir=tmp_path)
    path.unlink()
    with pytest.raises(data.DataError, match=r"classes\.txt is missing"):
        data.load("test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda images, labels: (images.float(), labels), "images must be uint8"),
        (lambda images, labels: (images[1:], labels), r"images must be uint8 \(500, 28, 28\)"),
        (lambda images, labels: (images, labels - 1), "labels must be whole numbers from 0 to 9"),
        (lambda images, labels: (images, labels + 1), "labels must be whole numbers from 0 to 9"),
        (lambda images, labels: (images, labels.float()), "labels must be whole numbers"),
        (lambda images, labels: (images[:0], labels[:0]), "images must be uint8"),
    ],
    ids=["floats", "too few images", "below 0", "above 9", "fractions", "nothing"],
)
def test_what_is_no_data_set_is_not_written(sample, tmp_path, change, reason):
    with pytest.raises(data.DataError, match=reason):
        data.write(tmp_path, {"t10k": change(sample["test"].images, sample["test"].labels)})
    assert list(tmp_path.iterdir()) == []


# --- fetching --------------------------------------------------------------------------------------------


@pytest.fixture
def mirror():
    """A real HTTP server on loopback that serves a folder, slowly enough for two processes to meet."""
    counts = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            self.directory = str(self.server.folder)
            return super().translate_path(path)

        def do_GET(self):
            counts[Path(self.path).name] = counts.get(Path(self.path).name, 0) + 1
            time.sleep(self.server.delay)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.delay, server.counts = SAMPLE, 0, counts
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_is_verified_stored_for_torchvision_and_found_again(
    sample_as_published, sample, mirror, monkeypatch, capfd
):
    nothing = "http://127.0.0.1:9/"  # the discard port: nobody answers
    monkeypatch.setattr(fetch, "MIRRORS", (nothing, mirror.url))
    train, test = data.load("train+val", "test")
    assert torch.equal(train.images, sample["train+val"].images)
    captured = capfd.readouterr()
    assert captured.err.count(f"{nothing} failed: ") == 1
    assert "100%" in captured.err  # of the progress bar
    raw = fetch.FETCHED / "FashionMNIST" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(FILES)
    assert not list(fetch.FETCHED.glob("fetching-*"))
    monkeypatch.setattr(fetch, "MIRRORS", ())
    assert torch.equal(data.load("test")[0].images, test.images)


def test_an_altered_download_is_refused_and_the_next_source_tried(
    sample_as_published, mirror, monkeypatch, capfd, tmp_path
):
    mirror.folder = copy_sample(tmp_path / "altered")
    alter(mirror.folder)
    monkeypatch.setattr(fetch, "MIRRORS", (mirror.url,))
    monkeypatch.setenv("PATH", "")  # no apt-get either
    with pytest.raises(data.DataError, match=r"--data-dir FOLDER"):
        data.load("test")
    err = capfd.readouterr().err
    assert "failed: t10k-labels-idx1-ubyte.gz is not Fashion-MNIST's, or is altered" in err
    assert "Debian package failed: no apt-get" in err
    assert not list(fetch.FETCHED.rglob("*ubyte*"))


LIES = {  # what a server sends at first, then again and again, seconds between, and how the notice calls it
    "endless": (b"HTTP/1.0 200 OK\r\n\r\n", bytes(2**16), 0, "larger than 1,000,000 bytes"),
    "slow": (b"HTTP/1.0 200 OK\r\n\r\n", b"\0", 0.02, "has not sent all"),
    "slow from the first line": (b"HTTP/1.0 ", b"2", 0.02, "has not sent all"),
    "not HTTP": (b"\x1b[2J\r\n\r\n", b"", 0, r"failed: \\x1b\[2J"),
    "leads nowhere": (b"HTTP/1.0 302 Found\r\nLocation: http://[/\r\n\r\n", b"", 0, "failed: Invalid IPv6 URL"),
    "leads to plain HTTP": (b"HTTP/1.0 302 Found\r\nLocation: HTTP://[::1]:9/\r\n\r\n", b"", 0, "which is not HTTPS"),
}


@pytest.mark.parametrize("lie", LIES)
def test_no_server_fills_the_disk_or_keeps_one_waiting(lie, sample_as_published, monkeypatch, capfd):
    first, then, seconds, notice = LIES[lie]
    over = threading.Event()

    class Liar(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(2**16)
            self.request.sendall(first)
            with contextlib.suppress(OSError):  # until the other side has seen enough
                while then and not over.wait(seconds):
                    self.request.sendall(then)

    monkeypatch.setattr(fetch, "DOWNLOAD_MOST", 10**6)
    monkeypatch.setattr(fetch, "DOWNLOAD_DEADLINE", 0.3)
    monkeypatch.setenv("PATH", "")  # no apt-get either
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr(fetch, "MIRRORS", (f"http://127.0.0.1:{server.server_address[1]}/",))
        with pytest.raises(data.DataError, match="no source had the data set"):
            data.load("test")
        over.set()
        server.shutdown()
    assert re.search(notice, capfd.readouterr().err)
    assert not list(fetch.FETCHED.glob("fetching-*"))


def test_downloads_come_over_https():
    assert all(url.startswith("https://") for url in fetch.MIRRORS)


def fetch_the_sample(folder, url):
    lines = (line.split() for line in (SAMPLE / "SHA256SUMS").read_text().splitlines())
    published.PUBLISHED = {name: digest for digest, name in lines}
    fetch.FETCHED, sources.SYSTEM, sources.KERAS, fetch.MIRRORS = folder, Path("/none"), Path("/none"), (url,)
    data.load("train", "test")


def test_two_processes_at_once_fetch_once_and_both_succeed(mirror, tmp_path):
    mirror.delay = 0.2
    logs = [tmp_path / name for name in "ab"]
    both = [start_fork(log, fetch_the_sample, tmp_path / "fetched", mirror.url) for log in logs]
    for process in both:
        process.join(120)
    said = [log.read_text() for log in logs]
    assert [process.exitcode for process in both] == [0, 0], said
    assert sorted(("fetching 30 MB" in text, "waiting for another process" in text) for text in said) == [
        (False, True),
        (True, False),
    ]


def test_a_fetch_that_was_killed_leaves_nothing_that_is_used_or_stays(mirror, tmp_path):
    mirror.delay = 0.5
    first = start_fork(tmp_path / "log", fetch_the_sample, tmp_path / "fetched", mirror.url)
    while len(mirror.counts) < 2 and first.is_alive():  # until in the middle of the second file
        time.sleep(0.02)
    first.kill()
    first.join()
    assert list((tmp_path / "fetched").glob("fetching-*"))
    mirror.delay = 0
    second = start_fork(tmp_path / "log", fetch_the_sample, tmp_path / "fetched", mirror.url)
    second.join(120)
    assert second.exitcode == 0, (tmp_path / "log").read_text()
    assert not list((tmp_path / "fetched").glob("fetching-*"))


@pytest.mark.skipif(not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="not Debian or Ubuntu")
def test_the_debian_package_is_fetched_by_the_real_apt(sample_as_published, sample, monkeypatch, capfd):
    repository = sample_as_published / "repository"
    copy_sample(repository / "tree" / "usr/share/datasets/fashion-mnist")
    control = "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: tests <tests@localhost>\n"
    (repository / "tree/DEBIAN").mkdir()
    (repository / "tree/DEBIAN/control").write_text(control + "Description: the tests' sample\n")
    package = repository / "dataset-fashion-mnist.deb"
    subprocess.run(["dpkg-deb", "--build", repository / "tree", package], check=True, capture_output=True)
    content = package.read_bytes()
    (repository / "Packages").write_text(
        f"{control}Filename: ./{package.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
    )
    (repository / "sources.list").write_text(f"deb [trusted=yes] copy:{repository} ./\n")
    (repository / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{repository}/sources.list";\nDir::Etc::sourceparts "-";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(repository / "apt.conf"))
    (test,) = data.load("test")
    assert torch.equal(test.images, sample["test"].images)
    captured = capfd.readouterr()
    assert "from Debian package (SHA-256 verified)" in captured.out
    assert "apt-get download 100%" in captured.err
    assert not list(fetch.FETCHED.glob("fetching-*"))


def test_a_script_reports_missing_data_in_one_line(tmp_path):
    flags = ["--data-dir", tmp_path / "typo", "--checkpoint-dir", tmp_path / "new"]
    finished = run_script("train.py", "--model", "mlp", *flags)
    assert_one_line_error(finished, "--data-dir .*typo: there is no such file or folder")
    assert not list((tmp_path / "new").iterdir())


# --- splitting and batching ------------------------------------------------------------------------------


def test_the_split_is_stratified_disjoint_and_fixed_for_good(sample):
    labels = np.repeat(np.arange(10), 6000).astype(np.uint8)
    split = data.split_indices(labels)
    assert np.bincount(labels[split["val"]]).tolist() == [500] * 10
    assert np.array_equal(np.sort(np.concatenate([split["train"], split["val"]])), np.arange(60_000))
    digest = hashlib.sha256(split["val"].astype("<i8").tobytes()).hexdigest()
    assert digest == "ea44cd983f8f5124110d48216441a7e8294608635f2a34c2de1379cacaa9497f"
    assert len(sample["train"].labels) + len(sample["val"].labels) == len(sample["train+val"].labels) == 1000


def test_an_epoch_sees_each_image_once_in_an_order_of_seed_and_epoch_alone(sample):
    def epoch(seed, number):
        return torch.cat([images for images, _ in data.batches(sample["train"], 100, seed, number)])

    first = epoch(0, 1)
    assert torch.equal(first, epoch(0, 1))
    assert not torch.equal(first, epoch(0, 2))
    assert not torch.equal(first, epoch(1, 1))

    def in_any_order(images):
        return sorted(images.flatten(1).double().mul(torch.arange(784)).sum(1).tolist())

    unshuffled = torch.cat([images for images, _ in data.batches(sample["train"], 100)])
    assert in_any_order(first) == in_any_order(unshuffled)


def test_labels_stay_with_their_images(sample):
    split = sample["train"]
    label_of = {
        image.numpy().tobytes(): label for image, label in zip(split.images, split.labels.tolist(), strict=True)
    }
    for images, labels in data.batches(split, 64, seed=3, epoch=2):
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_normalisation_is_that_of_torchvision_to_the_bit(sample):
    published = transforms.Compose([transforms.ToTensor(), transforms.Normalize((data.MEAN,), (data.STD,))])
    images = sample["test"].images
    theirs = torch.stack([published(image.numpy()) for image in images])
    ours = data.normalise(images)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_normalisation_in_bfloat16_is_that_of_float32_rounded_once():
    every = torch.arange(256, dtype=torch.uint8).repeat(4)[:784].view(1, 28, 28)
    assert torch.equal(data.normalise(every, torch.bfloat16), data.normalise(every).to(torch.bfloat16))


# --- augmentation ----------------------------------------------------------------------------------------


def test_augmentation_mirrors_moves_and_erases_as_asked(sample):
    images = sample["train"].images[:200]
    torch.manual_seed(0)
    assert torch.equal(data.augment(images, {}), images)
    mirrored = (data.augment(images, {"flip": 0.5}) == images.flip(2)).all((1, 2))
    assert 60 < mirrored.sum() < 140
    assert torch.equal(data.augment(images[mirrored], {}), images[mirrored])

    moved = data.augment(images, {"shift": 2})
    frame = torch.nn.functional.pad(images, (2,) * 4)
    offsets = [(frame[:, i : i + 28, j : j + 28] == moved).all((1, 2)) for i in range(5) for j in range(5)]
    assert torch.stack(offsets).any(0).all()  # each image is itself, moved by up to two pixels
    assert sum(offset.any() for offset in offsets) > 20  # by nearly every offset, image by image
    moved = data.augment(images, {"shift": [2, 0.5]})
    assert 90 < (moved == images).all((1, 2)).sum() < 140  # half of them, and by chance some of the others

    white = torch.full((500, 28, 28), 255, dtype=torch.uint8)
    black = (data.augment(white, {"erase": 6}) == 0).sum((1, 2))
    assert black.max() == 36
    assert black.min() >= 9  # a corner of it, at the border
    assert torch.equal(images, sample["train"].images[:200])  # the split itself is never changed


@pytest.mark.parametrize("name", [name for name in recipes.ROBUST if name != "flip"])
def test_augmentations_of_robust_change_the_share_of_the_images_that_was_asked_for(name, sample):
    images, values = sample["train"].images[:400], recipes.ROBUST[name]
    place = 1 if name == "erase" else 0  # of the share among the values

    def changed(share):
        torch.manual_seed(0)
        asked = [*values[:place], share, *values[place + 1 :]]
        result = data.augment(images, {name: asked})
        assert result.dtype == torch.uint8
        return (result != images).any(1).any(1)

    everywhere = changed(1.0)
    assert not changed(0.0).any()
    assert everywhere.float().mean() > 0.75
    assert 0.3 < changed(0.5).sum() / everywhere.sum() < 0.7
    assert torch.equal(images, sample["train"].images[:400])


def test_each_augmentation_of_robust_does_what_it_says(sample):
    images = sample["train"].images[:300]
    augment = partial(data.augment, images)
    torch.manual_seed(0)
    assert torch.equal(augment({"warp": [1.0, 0, 0, 0]}), images)  # by nothing
    turned = augment({"warp": [1.0, 90, 0, 0]}).float()
    assert (turned.sum((1, 2)) / images.float().sum((1, 2)) - 1).abs().median() < 0.05  # as many bright pixels
    assert not torch.equal(turned[:, :14], images[:, :14].float())
    brighter = augment({"light": [1.0, 0.5]})
    assert torch.equal((brighter == 0)[images == 0], torch.ones_like(images[images == 0], dtype=torch.bool))
    covered = (augment({"clutter": [1.0, 6]}) != images).float().mean(0)
    assert covered[6:22, 6:22].max() == 0
    assert covered[0].mean() > 0.03
    veiled = augment({"veil": [1.0, 0.3]})
    assert (veiled >= images).all()
    assert (veiled[images == 0] > 0).float().mean() > 0.5
    blurred = augment({"blur": [1.0, 2.0]}).float()
    assert (blurred.diff(dim=2).abs().mean() < 0.8 * images.float().diff(dim=2).abs().mean()).item()
    spread = [each.float().std((1, 2)) for each in (augment({"fade": [1.0, 0.2]}), images)]
    assert (spread[0] < spread[1] + 1).all()
    assert 0.4 < (spread[0] / spread[1]).mean() < 0.8
    grey = torch.full((300, 28, 28), 128, dtype=torch.uint8)
    deviations = data.augment(grey, {"noise": [1.0, 0.2]}).float().std((1, 2))
    assert deviations.max() < 0.21 * 255
    assert deviations.mean() == pytest.approx(0.1 * 255, rel=0.1)


def test_augmentations_are_applied_in_one_order_however_a_recipe_writes_them(sample):
    images, values = sample["train"].images[:50], {"flip": 0.5, "shift": [2, 0.3], "erase": 6}
    results = []
    for names in (values, reversed(values)):
        torch.manual_seed(0)
        results.append(data.augment(images, {name: values[name] for name in names}))
    assert torch.equal(*results)


def test_an_augmentation_that_is_misspelt_or_unused_is_one_clear_line(sample, monkeypatch):
    data.check_augmentations(recipes.RECIPES)  # which are right
    with pytest.raises(UserError, match=r"augmentation 'filp' is not in data\.py, which has flip, shift, warp, light"):
        data.augment(sample["train"].images[:5], {"filp": 0.5})
    row = recipes.Recipe(epochs=1, augment={"filp": 0.5})
    with pytest.raises(UserError, match=r"^recipes\.py, row best, cnn: augmentation 'filp' is not in data\.py"):
        data.check_augmentations({"best": {"cnn": row}})
    monkeypatch.setattr(data, "AUGMENTATIONS", data.AUGMENTATIONS | {"smear": data.flip})
    with pytest.raises(UserError, match=r"no row of recipes\.py uses the augmentation 'smear'"):
        data.check_augmentations(recipes.RECIPES)


# --- seeds -----------------------------------------------------------------------------------------------


def test_every_place_in_a_run_has_a_seed_of_its_own_whatever_is_asked_for():
    starts = [data.derive_seeds(seed)[0] for seed in range(50)]
    epochs = {(seed, epoch): data.derive_seeds(seed, epoch, n=50) for seed in range(20) for epoch in range(1, 20)}
    every = starts + [one for seeds in epochs.values() for one in seeds]
    assert len(set(every)) == len(every)
    assert data.derive_seeds(3, 4, n=7) == epochs[3, 4][:7]
    assert data.derive_seeds(0, 1, n=2) == [
        2918264622725855778,
        4405800739349447345,
    ]  # for good: published results depend on them


def test_the_gentler_augmentation_is_the_robust_one_of_half_as_many_images():
    assert scaled(recipes.ROBUST, 0.5) == recipes.GENTLER
