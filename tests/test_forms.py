"""The forms that people have a data set in: each is read, verified and put into order, on the real sample."""

import gzip
import hashlib
import io
import json
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from PIL import Image
from pyarrow import parquet

import data
from dataset import arrays, forms, idx, published
from training.run import Request, resume_command

SPELT = ("TShirt-Top", "trouser", "PULLOVER", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "ankle_boot")
STORED = ("T - shirt / top", *data.CLASSES[1:])  # as Hugging Face spells them
FRUIT = ("apple", "banana", "cherry", "date", "elder", "fig", "grape", "haw", "ilama", "jujube")
WORDS = {"train": "train", "t10k": "test"}


@pytest.fixture(scope="module")
def parts(sample):
    """The sample as (images, labels) uint8, by the name of the part."""
    splits = {"train": sample["train+val"], "t10k": sample["test"]}
    return {part: (split.images.numpy(), split.labels.byte().numpy()) for part, split in splits.items()}


@pytest.fixture(scope="module")
def shuffled(parts):
    """The same in another order, as in Kaggle's files."""
    orders = {part: np.random.default_rng(0).permutation(len(labels)) for part, (_, labels) in parts.items()}
    return {part: (images[orders[part]], labels[orders[part]]) for part, (images, labels) in parts.items()}


@pytest.fixture(scope="module")
def others(parts):
    """Another data set: the first test images, inverted."""
    return {part: (255 - images[:100], labels[:100]) for part, (images, labels) in parts.items()}


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_idx(folder, parts, name="{}-{}-idx{}-ubyte", packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for part, both in parts.items():
        for kind, array, number in zip(("images", "labels"), both, (3, 1), strict=True):
            content = idx.encode(array)
            path = folder / name.format(part, kind, number)
            path.write_bytes(gzip.compress(content, 1) if packed else content)
    return folder


def into_folders(folder):
    for path in list(folder.iterdir()):
        (folder / "moved").write_bytes(path.read_bytes())
        path.unlink()
        path.mkdir()
        (folder / "moved").rename(path / path.name)
    return folder


def write_csv(folder, parts):
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in parts.items():
        header = ",".join(["label", *(f"pixel{number}" for number in range(1, 785))])
        rows = np.concatenate([labels[:, None], images.reshape(-1, 784)], 1)
        np.savetxt(folder / f"fashion-mnist_{WORDS[part]}.csv", rows, "%d", ",", header=header, comments="")
    return folder


def write_npz(folder, parts):
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{kind}_{WORDS[part]}": array for part in parts for kind, array in zip("xy", parts[part], strict=True)}
    np.savez_compressed(folder / "all.npz", **named)
    return folder / "all.npz"


def write_parquet(folder, parts):
    below = folder / "fashion_mnist"
    below.mkdir(parents=True)
    stored = {"info": {"features": {"label": {"_type": "ClassLabel", "names": STORED}}}}
    for part, (images, labels) in parts.items():
        rows = [{"bytes": png(image), "path": None} for image in images]
        table = pyarrow.table({"image": rows, "label": labels.astype(np.int64)})
        table = table.replace_schema_metadata({"huggingface": json.dumps(stored)})
        half = len(labels) // 2
        for number, piece in enumerate((table[:half], table[half:])):
            parquet.write_table(piece, below / f"{WORDS[part]}-0000{number}-of-00002.parquet")
    return folder


def write_pictures(folder, parts, names=SPELT):
    for part, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / WORDS[part] / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return folder


def write_zip(path, folder):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder.parent))
    return path


FORMS = {
    "dotted": lambda folder, parts: write_idx(folder, parts, "{}-{}.idx{}-ubyte"),
    "capitals": lambda folder, parts: write_idx(folder, parts, "{}-{}.IDX{}-UBYTE.GZ", packed=True),
    "unpacked .gz": lambda folder, parts: write_idx(folder, parts, "{}-{}-idx{}-ubyte.gz"),
    "zip of IDX": lambda folder, parts: write_zip(folder.with_suffix(".zip"), write_idx(folder, parts)),
    "CSV": write_csv,
    "each in a folder of its name": lambda folder, parts: into_folders(write_idx(folder, parts)),
    "zip of CSV, in a folder": lambda folder, parts: (
        write_zip(folder / "archive.zip", write_csv(folder / "csv", parts)).parent
    ),
    "npz": write_npz,
    "npz, in a folder": lambda folder, parts: write_npz(folder, parts).parent,
    "parquet": write_parquet,
    "pictures by name": write_pictures,
    "pictures by digit": lambda folder, parts: write_pictures(folder, parts, "0123456789"),
    "zip of pictures": lambda folder, parts: write_zip(folder.with_suffix(".zip"), write_pictures(folder, parts)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_verified_and_put_into_the_published_order(
    sample_as_published, sample, parts, shuffled, form, capsys
):
    in_order = form in ("dotted", "capitals", "unpacked .gz", "zip of IDX", "each in a folder of its name")
    place = FORMS[form](sample_as_published / "given", parts if in_order else shuffled)
    train, val, test = data.load("train", "val", "test", data_dir=place, other_data="npz" in form)
    for split in (train, val, test):
        assert torch.equal(split.images, sample[split.name].images)
        assert torch.equal(split.labels, sample[split.name].labels)
    assert (test.source, test.classes) == ("Fashion-MNIST", data.CLASSES)
    out = capsys.readouterr().out
    assert str(place) in out
    assert "SHA-256 verified" in out
    assert ("put into the published order" in out) != in_order


def test_the_shipped_order_is_that_of_the_published_images(tmp_path):
    train, test = data.load("train+val", "test")
    parts = {part: (s.images.numpy(), s.labels.byte().numpy()) for part, s in (("train", train), ("t10k", test))}
    assert {data.fingerprint(train, test), data.fingerprint(train)} < {*published.FINGERPRINTS}  # the latter of folds
    assert data.fingerprint(*data.load("train", "val", "test")) in published.FINGERPRINTS
    published.write_order(tmp_path / "order.npz", parts)
    made, shipped = (dict(np.load(path)) for path in (tmp_path / "order.npz", published.ORDER))
    assert made.keys() == shipped.keys()
    for name in shipped:  # the bytes of the file around them vary between versions of Python
        np.testing.assert_array_equal(made[name], shipped[name], strict=True)


def test_one_part_is_enough_where_only_it_is_asked_for(sample_as_published, parts):
    for number, write in enumerate((write_csv, write_parquet, write_pictures)):
        place = write(sample_as_published / str(number), {"t10k": parts["t10k"]})
        assert len(data.load("test", data_dir=place)[0].labels) == 500
        with pytest.raises(data.DataError, match=r"train.* is missing: only the test part is there"):
            data.load("train", data_dir=place)


def test_two_forms_in_a_folder_have_an_order(sample_as_published, parts, others, capsys):
    folder = write_idx(write_csv(sample_as_published / "given", parts), parts)
    data.load("test", data_dir=folder)
    assert "CSV" not in capsys.readouterr().out
    write_idx(folder, others)
    data.load("test", data_dir=folder)
    captured = capsys.readouterr()
    assert "CSV files (SHA-256 verified)" in captured.out
    assert re.search("t10k-images-idx3-ubyte is not Fashion-MNIST's.*; used fashion-mnist_test.csv", captured.err)


# --- other data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_other_images_are_refused_unless_they_are_asked_for(tmp_path, others, form, capsys):
    place = FORMS[form](tmp_path / "mine", others)
    with pytest.raises(data.DataError, match=r"is not Fashion-MNIST's.*--other-data accepts it as another set, named"):
        data.load("test", data_dir=place)
    (test,) = data.load("test", data_dir=place, other_data=True)
    assert test.source == ("all" if form == "npz" else "mine")
    assert "not the published images" in capsys.readouterr().out
    names = {"parquet": STORED, "pictures by name": data.CLASSES, "zip of pictures": data.CLASSES}
    assert test.classes == names.get(form, tuple("0123456789"))
    pairs = {image.numpy().tobytes(): label for image, label in zip(test.images, test.labels.tolist(), strict=True)}
    expected = zip(*others["t10k"], strict=True)
    assert pairs == {image.tobytes(): label for image, label in expected}


def test_other_classes_are_named_by_their_folders_or_by_a_file(tmp_path, others):
    folder = write_pictures(tmp_path / "Fashion-MNIST", others, FRUIT)
    (test,) = data.load("test", data_dir=folder, other_data=True)
    assert (test.source, test.classes) == ("Fashion-MNIST (own)", FRUIT)
    (folder / "classes.txt").write_text("\n".join(name.upper() for name in FRUIT), encoding="utf-8-sig")
    assert data.load("test", data_dir=folder, other_data=True)[0].classes[0] == "APPLE"


def test_what_no_flag_can_accept_is_not_offered(tmp_path, others):
    folder = write_csv(tmp_path, others)
    with pytest.raises(data.DataError, match=r"is not Fashion-MNIST's.*; this script needs Fashion-MNIST$"):
        data.load("test", data_dir=folder, other_data=None)


def test_the_published_images_under_other_names_are_another_set(sample_as_published, parts):
    folder = write_idx(sample_as_published / "noms", parts)
    (folder / "classes.txt").write_text("\n".join(FRUIT))
    (test,) = data.load("test", data_dir=folder)
    assert (test.source, test.classes) == ("noms", FRUIT)


def test_a_run_on_other_data_names_them_and_its_resumption_asks_for_them(tmp_path, others):
    place = write_idx(tmp_path / "mine", others)
    flags = ["--model", "mlp", "--epochs", 1, "--data-dir", place, "--checkpoint-dir", tmp_path / "runs"]
    assert_one_line_error(run_script("train.py", *flags), "^train.py: error: --data-dir .*--other-data")
    finished = run_script("train.py", *flags, "--other-data")
    assert finished.returncode == 0, finished.stderr
    history = json.loads((tmp_path / "runs" / "best_mlp_fmnist.json").read_text())
    assert (history["data"], history["classes"]) == ("mine", list("0123456789"))
    request = Request(model="mlp", checkpoint_dir=tmp_path, data_dir=place, other_data=True)
    assert resume_command(request).endswith(f"--data-dir {place} --other-data")


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_two_sets_are_never_mixed(tmp_path, others, parts, packed):
    folder = write_idx(tmp_path / "given", others)
    write_idx(folder / "fashion", parts)
    place = write_zip(tmp_path / "two.zip", folder) if packed else folder
    with pytest.raises(data.DataError, match=r"different data sets: \S+ and \S+/fashion/?; .*name one of them"):
        data.load("train+val", data_dir=place, other_data=True)
    (folder / "train-labels-idx1-ubyte").unlink()
    place = write_zip(tmp_path / "two.zip", folder) if packed else folder
    (train,) = data.load("train+val", data_dir=place, other_data=True)
    assert torch.equal(train.images, torch.tensor(parts["train"][0]))
    assert train.labels.tolist() == parts["train"][1].tolist()
    shutil.rmtree(folder / "fashion")
    write_idx(folder / "fashion", others)
    write_idx(folder, others)
    assert len(data.load("train+val", data_dir=folder, other_data=True)[0].labels) == 100  # the same set twice


def test_train_and_test_have_the_same_classes(tmp_path, others):
    folder = write_pictures(tmp_path / "given", {"train": others["train"]}, FRUIT)
    write_pictures(folder, {"t10k": others["t10k"]}, [*FRUIT[1:], "kiwi"])
    for splits in (("test",), ("train", "test")):
        with pytest.raises(data.DataError, match="train and test have different class folders: 'apple' is only in one"):
            data.load(*splits, data_dir=folder, other_data=True)
    stored = write_parquet(tmp_path / "stored", others) / "fashion_mnist"
    for path in stored.glob("test*"):
        names = {"info": {"features": {"label": {"names": STORED[::-1]}}}}
        table = parquet.read_table(path).replace_schema_metadata({"huggingface": json.dumps(names)})
        parquet.write_table(table, path)
    with pytest.raises(data.DataError, match="the class names of the two parts are not the same"):
        data.load("train", "test", data_dir=stored, other_data=True)
    shutil.rmtree(folder / "test" / "kiwi")
    shutil.rmtree(folder / "train" / "apple")
    (folder / "test" / "apple").mkdir()
    (folder / "train" / "apple").mkdir()
    with pytest.raises(data.DataError, match="test/apple has no pictures"):
        data.load("test", data_dir=folder, other_data=True)


def reordered(text):
    rows = [line.split(",") for line in text.splitlines()]
    order = sorted(range(785), key=rows[0].__getitem__)
    return "\n".join(",".join(row[column] for column in order) for row in rows)


def without_header(text):
    return text.split("\n", 1)[1]


def class_last(text):
    return "\n".join(",".join([*line.split(",")[1:], line.split(",")[0]]) for line in without_header(text).splitlines())


CSV = {
    "no header, BOM": (lambda text: without_header(text).encode("utf-8-sig"), None),
    "quoted": (lambda text: re.sub(r"(\w+)", r'"\1"', text).encode(), None),
    "gzip": (lambda text: gzip.compress(text.encode()), None),
    "in another order": (
        lambda text: reordered(text).encode(),
        "has 785 columns, .* must have label, pixel1 to pixel784, in this order",
    ),
    "class last": (lambda text: class_last(text).encode(), "seems to have the label in its last column"),
    "semicolons": (lambda text: text.replace(",", ";").encode(), "has 1 columns, the first called 'label;pixel1"),
    "UTF-16": (lambda text: text.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "header alone": (lambda text: text.splitlines()[0].encode(), "has no images"),
    "a pointer": (lambda text: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
}


@pytest.mark.parametrize("case", CSV)
@pytest.mark.filterwarnings("error")
def test_csv_files_are_read_as_others_save_them_or_refused(tmp_path, others, case):
    change, reason = CSV[case]
    path = write_csv(tmp_path, {"t10k": others["t10k"]}) / "fashion-mnist_test.csv"
    (tmp_path / "a_test_results.csv").write_text("epoch,loss\n1,2\n")
    (tmp_path / "latest_train.csv").write_text("epoch,loss\n1,2\n")
    path.write_bytes(change(path.read_text()))
    if case == "gzip":
        path.rename(f"{path}.gz")
    if reason:
        with pytest.raises(data.DataError, match=f"fashion-mnist_test.csv {reason}"):
            data.load("test", data_dir=tmp_path, other_data=True)
    else:
        (test,) = data.load("test", data_dir=tmp_path, other_data=True)
        assert test.labels.tolist() == others["t10k"][1].tolist()
        assert torch.equal(test.images, torch.tensor(others["t10k"][0]))


def test_a_broken_zip_does_not_hide_a_good_one(tmp_path, others, capsys):
    write_zip(tmp_path / "archive.zip", write_csv(tmp_path / "csv", others))
    shutil.rmtree(tmp_path / "csv")
    (tmp_path / "archive (1).zip").write_bytes((tmp_path / "archive.zip").read_bytes()[:5000])
    assert len(data.load("test", data_dir=tmp_path, other_data=True)[0].labels) == 100
    assert re.search(
        r"archive \(1\)\.zip cannot be read.*; used archive\.zip/csv/\S+ beside it", capsys.readouterr().err
    )


# --- what is no data set ---------------------------------------------------------------------------------


def letters(parts):
    return {part: (images, labels + 1) for part, (images, labels) in parts.items()}


def larger(parts):
    return {part: (np.pad(images, ((0, 0), (2, 2), (2, 2))), labels) for part, (images, labels) in parts.items()}


def torch_files(folder, parts):
    (folder / "processed").mkdir(parents=True)
    for part, name in (("train", "training.pt"), ("t10k", "test.pt")):
        torch.save(tuple(map(torch.tensor, parts[part])), folder / "processed" / name)


def texts(**files):
    def write(folder, _):
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_bytes(content)

    return write


REFUSED = {
    "labels of letters": (lambda f, parts: write_idx(f, letters(parts)), "its labels are 1 to 10; they must be 0 to 9"),
    "32x32": (lambda f, parts: write_idx(f, larger(parts)), "announces 100 images of 32x32 pixels: not Fashion-MNIST"),
    "EMNIST's names": (
        lambda f, parts: write_idx(f, parts, "emnist-letters-{}-{}-idx{}-ubyte.gz", packed=True),
        r"emnist-letters-\S+ holds 100 \S+.* but has another name than is read; copy the files as",
    ),
    "in a subfolder": (
        lambda f, parts: write_idx(f / "one" / "two", parts),
        r"it holds one/;.* (\S+/one/two) has IDX files: --data-dir \1$",
    ),
    "torchvision's tensors": (torch_files, r"training.pt and test.pt are of an early torchvision; convert them: \S*py"),
    "large pictures": (
        lambda f, parts: write_pictures(f, larger(parts)),
        r"\S+/\d+.png is not 28x28 and grey \(32x32 pixels, L\); convert them: \S+ -m pictures.folder \S+/given FOLDER",
    ),
    "nine classes": (lambda f, parts: write_pictures(f, parts, [*FRUIT[:9], "fig"]), "test has 9 class folders"),
    "flat pictures": (texts(a_png=png(np.zeros((28, 28), np.uint8))), r"pictures \(a.png\), but not in train/<class>/"),
    "narrow CSV": (texts(train_csv=b"label,a\n1,2\n", test_csv=b"label,a\n1,2\n"), "csv has 2 columns"),
    "no zip": (texts(a_zip=b"rubbish"), "a.zip cannot be read: File is not a zip file"),
    "a tar": (texts(data_tgz=b"a"), "it holds data.tgz, which is packed: unpack it"),
    "an array": (texts(x_npy=b"a"), "it holds x.npy: put all arrays into one file"),
    "empty": (texts(), "it is empty"),
    "something else": (texts(a_b=b"", c_d=b""), "it holds a.b, c.d; docs/data.md lists the forms"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_data_set_is_said_in_one_line(tmp_path, others, case, monkeypatch):
    write, reason = REFUSED[case]
    write(tmp_path / "given", others)
    monkeypatch.setenv("FMNIST_DIR", str(SAMPLE))  # which is no substitute
    for other_data in (False, True):
        with pytest.raises(data.DataError, match=f"^--data-dir .*{reason}") as caught:
            data.load("test", data_dir=tmp_path / "given", other_data=other_data)
        assert str(caught.value).isprintable()


def test_the_command_for_torchvisions_tensors_works(tmp_path, others, monkeypatch):
    torch_files(tmp_path / "it's old", others)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError) as caught:
        data.load("test", data_dir=tmp_path / "it's old")
    words = shlex.split(str(caught.value).split("convert them: ")[1])
    assert words[0] == f"PYTHONPATH={ROOT}"  # elsewhere than in the repository
    exec(words[3])
    assert torch.equal(data.load("test", data_dir="NEW")[0].images, torch.tensor(others["t10k"][0]))


def test_no_place_is_advised_that_cannot_be_read(tmp_path, others):
    folder = write_idx(tmp_path / "given" / "one" / "two", others)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"it holds one/; docs/data.md lists the forms that are read$"):
        data.load("test", data_dir=tmp_path / "given")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(data.DataError, match=r"there is no such file or folder$"):
        data.load("test", data_dir=tmp_path / "link")
    with pytest.raises(data.DataError, match="is a web address: download the file"):
        data.load("test", data_dir="https://example.org/fashion-mnist.zip")


def test_the_place_that_is_named_is_the_only_source(sample_as_published, parts, monkeypatch):
    write_idx(sample_as_published / "system", parts)
    write_csv(sample_as_published / "kaggle", {"t10k": parts["t10k"]})
    for place, reason in (
        (sample_as_published / "kagle", "there is no such file or folder; did you mean --data-dir .*/kaggle"),
        (sample_as_published / "kaggle" / "fashion-mnist_test.csv", "is one file, .*--data-dir .*/kaggle$"),
        (Path("/dev/null"), "is neither a folder nor a file"),
        ("", "is empty"),
    ):
        with pytest.raises(data.DataError, match=reason):
            data.load("test", data_dir=place)
    with pytest.raises(data.DataError, match="--other-data accepts other images in a folder that you name"):
        data.load("test", other_data=True)
    monkeypatch.setenv("FMNIST_DIR", str(sample_as_published / "kagle"))
    with pytest.raises(data.DataError, match=r"^FMNIST_DIR .*did you mean FMNIST_DIR=.*/kaggle"):
        data.load("test")
    monkeypatch.setenv("FMNIST_DIR", "")
    assert data.load("test")[0].source == "Fashion-MNIST"  # as if it were not set


def test_parquet_without_pyarrow_names_it(tmp_path, others, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(data.DataError, match=r"needs pyarrow, .* -m pip install -r requirements-optional\.txt"):
        data.load("test", data_dir=write_parquet(tmp_path / "hf", others))


# --- hostile files ---------------------------------------------------------------------------------------


def lying_npy(shape, dtype="|u1"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def test_files_that_become_large_are_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "MAX_IMAGES", 5_000)
    zeros = bytes(2**20)
    shapes = (10**15,), (-1, 28, 28), (0, 10**30, 28), (0, 2**62, 28), (1,) * 70, (True, 28, 28)
    header = [*map(lying_npy, shapes), lying_npy((1,), "|O"), lying_npy((10, 28, 28)), lying_npy("(" * 9_000)]
    refusals = ["it must be whole numbers from 0 to 255"] * 7 + ["x_test is truncated", "x_test is no array"]
    cases = [({f"{name}.npy": [each, bytes(784)] for name in ("x_test", "y_test")}, reason)
             for each, reason in zip(header, refusals, strict=True)]  # fmt: skip
    many = [b"0" + b",0" * 784 + b"\n"] * 10_000 + [b"not a number\n"]
    cases += [({"test.csv": [b"0" * 2**20] * 100}, "has 1 columns"), ({"test.csv": many}, "more than 5,000 images")]
    idx_files = {"t10k-images-idx3-ubyte": [zeros] * 100, "t10k-labels-idx1-ubyte": [b""]}
    cases.append((idx_files, "is not an IDX file of images"))
    for number, (files, reason) in enumerate(cases):
        path = tmp_path / f"{number}{'.npz' if number < len(header) else '.zip'}"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, pieces in files.items():
                with archive.open(name, "w") as file:
                    file.writelines(pieces)
        with pytest.raises(data.DataError, match=reason):
            data.load("test", data_dir=path, other_data=True)


def write_bytes(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def claim_a_long_list(folder):
    write_bytes(folder / "x.zip", b"")
    with (folder / "x.zip").open("r+b") as file:
        file.seek(2**31)  # takes no room on the disk
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**31, 0, 0))


def write_members(folder, files, method=zipfile.ZIP_DEFLATED):
    folder.mkdir()
    with zipfile.ZipFile(folder / "x.zip", "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / "x.zip"


def with_a_name_that_is_no_text(folder):
    path = write_members(folder, {"é": b""})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))


def write_columns(folder, images, labels, name="image", **options):
    folder.mkdir()
    parquet.write_table(pyarrow.table({name: images, "label": labels}), folder / "test.parquet", **options)


LONG_NAME = b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * 10**7  # of the file that is packed
LIARS = {  # where the limits are those of TIGHT
    "a long list of files": (claim_a_long_list, "list of files has more than 25,000,000 bytes"),
    "many files": (
        lambda folder: write_members(folder, dict.fromkeys(map(str, range(200)), b"")),
        "more than 100 files",
    ),
    "deep folders": (
        lambda folder: write_members(folder, {"a/" * 30_000: b""}),
        "its folders are too many and too deep",
    ),
    "another method": (
        lambda folder: write_members(folder, {"test.csv": b"0"}, zipfile.ZIP_LZMA),
        "another method than deflate",
    ),
    "a name that is no text": (with_a_name_that_is_no_text, "x.zip cannot be read: 'utf-8' codec"),
    "arrays in a zip": (
        lambda folder: write_members(folder, {"a.npz": bytes(2**20)}),
        "a.npz is larger than 100,000 bytes",
    ),
    "a long gzip header": (
        lambda folder: write_bytes(folder / f"{idx.name_of('t10k', 'images')}.gz", LONG_NAME),
        "ends before its last block",
    ),
    "empty gzip members under any name": (
        lambda folder: write_bytes(folder / "photo", gzip.compress(b"") * 100_000),
        "it holds photo",
    ),
    "empty gzip members": (
        lambda folder: write_bytes(folder / "test.csv.gz", gzip.compress(b"") * 100_000),
        "more than 10,000 parts",
    ),
    "a large CSV": (
        lambda folder: write_bytes(folder / "test.csv.gz", gzip.compress((b"0" + b",0" * 784 + b"\n") * 1_400)),
        "bytes than fit",
    ),
    "large labels": (lambda folder: write_columns(folder, [b""] * 100, ["x" * 10**6] * 100), "label a whole number"),
    "repeated labels": (
        lambda folder: write_columns(folder, [b""], [[0] * 10**6]),
        "has the columns image, label.list",
    ),
    "large pictures": (
        lambda folder: write_columns(folder, [bytes(2**20)], [0], use_dictionary=False),
        "have more than 0 MiB",
    ),
    "a column with a dot in its name": (
        lambda folder: write_columns(folder, [b""], [0], "image.bytes"),
        "test.parquet cannot be read",
    ),
    "long metadata": (
        lambda folder: write_columns(folder, [b""] * 1_000, [0] * 1_000, row_group_size=1),
        "its metadata have more than",
    ),
    "many files in a folder": (
        lambda folder: [write_bytes(folder / str(number), b"") for number in range(200)],
        "more than 100 files",
    ),
}
TIGHT = {
    forms: {"MOST_MEMBERS": 100, "MOST_OF_CSV": 2_100_000, "MOST_METADATA": 100_000, "MOST_OF_PICTURES": 10**6},
    idx: {"MOST_ENTRIES": 100},
}


@pytest.mark.parametrize("case", LIARS)
def test_files_that_lie_about_their_size_are_refused_soon(tmp_path, case, monkeypatch):
    write, reason = LIARS[case]
    write(tmp_path / "given")
    for module, limits in TIGHT.items():
        for name, most in limits.items():
            monkeypatch.setattr(module, name, most)
    if case == "arrays in a zip":
        monkeypatch.setattr(forms, "MOST_IN_MEMORY", 100_000)
    start, pool = time.process_time(), pyarrow.default_memory_pool()
    before = pool.max_memory()
    with pytest.raises(data.DataError, match=reason) as caught:
        data.load("test", data_dir=tmp_path / "given", other_data=True)
    assert str(caught.value).isprintable()
    assert time.process_time() - start < 5
    assert pool.max_memory() - before < 2**26


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux keeps this limit")
def test_pyarrow_gets_little_memory():
    with forms._little_memory(), pytest.raises(MemoryError):
        np.empty(2**31, np.uint8)
    assert np.empty(2**31, np.uint8).size


def test_a_picture_that_a_parquet_file_repeats_is_decoded_once(tmp_path, others):
    content = png(others["t10k"][0][0])
    chunk = struct.pack(">L", 4) + b"tEXta\0bc" + struct.pack(">L", zlib.crc32(b"tEXta\0bc"))
    write_columns(tmp_path / "given", [content[:33] + chunk * 1_000 + content[33:]] * 10_000, [0] * 10_000)
    start = time.process_time()
    assert len(data.load("test", data_dir=tmp_path / "given", other_data=True)[0].labels) == 10_000
    assert time.process_time() - start < 2


def test_a_zip_of_many_folders_is_looked_through_quickly(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(10_000):
            archive.writestr(f"{number // 25:04}/{number:06}.jpg", b"")
    start = time.process_time()
    with pytest.raises(data.DataError, match=r"it holds photos.zip"):
        data.load("test", data_dir=tmp_path)
    assert time.process_time() - start < 2


def test_an_array_of_wide_numbers_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK", 10_000)
    labels = np.arange(2_000) % 10
    np.savez(tmp_path / "a.npz", x_test=np.zeros((2_000, 28, 28), np.int64), y_test=labels)
    tracemalloc.start()
    (test,) = data.load("test", data_dir=tmp_path / "a.npz", other_data=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert test.labels.tolist() == labels.tolist()
    assert peak < 2_000 * 28 * 28 * 8 * 0.8


def test_the_library_of_pictures_is_loaded_only_for_pictures():
    code = "import dataset.sources, sys; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("form", ["zip of IDX", "npz", "CSV", "parquet", "pictures by digit"])
def test_malformed_files_are_refused_in_one_line(tmp_path, others, form):
    place = FORMS[form](tmp_path / "given", {"t10k": tuple(array[:30] for array in others["t10k"])})
    files = [place] if place.is_file() else sorted(each for each in place.rglob("*") if each.is_file())
    chance, said = random.Random(0), []
    for _ in range(40):
        path = chance.choice(files)
        good, at = path.read_bytes(), chance.randrange(path.stat().st_size)
        changed = bytearray(good)
        changed[at : at + chance.choice((0, 1, 4))] = chance.choice((b"", b"\0", b"\xff" * 4, chance.randbytes(4)))
        path.write_bytes(changed[: chance.choice((None, None, at))])
        try:
            (test,) = data.load("test", data_dir=place, other_data=True)
        except data.DataError as error:
            said.append(str(error))
        else:
            assert test.source == place.stem
        path.write_bytes(good)
    assert said
    assert all(map(str.isprintable, said))


# --- SHA256SUMS ------------------------------------------------------------------------------------------


def listed(folder, line="{sum}  {name}\n", prefix=""):
    """The lines of sha256sum for the files in a folder, as they lie."""
    paths = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return "".join(line.format(sum=digest, name=prefix + name) for name, digest in sums.items())


SUMS = {
    "as they lie": lambda f: listed(f),
    "./": lambda f: listed(f, prefix="./"),
    "--tag": lambda f: listed(f, "SHA256 ({name}) = {sum}\n"),
    "openssl": lambda f: listed(f, "SHA2-256({name})= {sum}\n"),
    "binary": lambda f: listed(f, "{sum} *{name}\n"),
    "capitals, CRLF, BOM, comments": lambda f: "\ufeff# mine\r\n\r\n" + listed(f).upper().replace("T10K", "t10k")
    .replace("IMAGES-IDX3-UBYTE.GZ", "images-idx3-ubyte.gz").replace("LABELS-IDX1-UBYTE.GZ", "labels-idx1-ubyte.gz")
    .replace("\n", "\r\n"),
    "of the content": lambda f: (SAMPLE / "SHA256SUMS").read_text(),
    "an absolute path": lambda f: listed(f, prefix="/somewhere/else/"),
}  # fmt: skip


@pytest.mark.parametrize("above", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("form", SUMS)
def test_sums_in_every_spelling_vouch_for_a_set(tmp_path, form, above):
    folder = tmp_path / "mine" / above
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("train*", "SHA*"))
    (tmp_path / "mine" / "SHA256SUMS").write_text(SUMS[form](folder), encoding="utf-8", newline="")
    (test,) = data.load("test", data_dir=tmp_path / "mine")
    assert (test.source, test.classes) == ("mine", data.CLASSES)
    path = folder / "t10k-labels-idx1-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-1] + bytes([content[-1] ^ 1])))
    for other_data in (False, True):
        with pytest.raises(data.DataError, match=r"t10k-labels-idx1-ubyte\.gz is altered.* as SHA256SUMS says"):
            data.load("test", data_dir=tmp_path / "mine", other_data=other_data)


def test_sums_name_paths_below_their_folder(tmp_path, others):
    for name in ("raw", "old"):
        write_idx(tmp_path / name, others if name == "raw" else letters(others))
    lines = listed(tmp_path / "old", prefix="old/") + listed(tmp_path / "raw", prefix="raw/")
    (tmp_path / "SHA256SUMS").write_text(lines)
    assert data.load("test", data_dir=tmp_path)[0].source == tmp_path.name


def test_sums_vouch_for_other_forms_too(tmp_path, others):
    for number, (form, write) in enumerate(FORMS.items()):
        folder = tmp_path / str(number)
        place = write(folder / "given", others)
        files = [place] if place.is_file() else [each for each in place.rglob("*") if each.is_file()]
        top = place.parent if place.is_file() else place
        lines = (f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.relative_to(top)}\n" for each in files)
        (top / "SHA256SUMS").write_text("".join(lines))
        assert data.load("test", data_dir=place)[0].source == place.stem, form


def test_sums_beside_the_published_set_do_not_make_it_another(sample_as_published, parts):
    folder = write_idx(sample_as_published / "given", parts, packed=True, name="{}-{}-idx{}-ubyte.gz")
    (folder / "SHA256SUMS").write_text(listed(folder))
    assert data.load("test", data_dir=folder)[0].source == "Fashion-MNIST"
    for path in folder.glob("*.gz"):  # unpacked, beside the sums of the packed files
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert data.load("test", data_dir=folder)[0].source == "Fashion-MNIST"


def test_no_other_form_replaces_a_file_that_is_not_what_its_sum_says(tmp_path, others):
    folder = write_idx(tmp_path / "given", others)
    (folder / "SHA256SUMS").write_text(listed(folder))
    write_csv(write_idx(folder, letters(others)), others)
    with pytest.raises(data.DataError, match="t10k-labels-idx1-ubyte is altered"):
        data.load("test", data_dir=folder, other_data=True)


def test_pictures_that_are_moved_missing_or_new_are_noticed(tmp_path, others):
    folder = write_pictures(tmp_path / "given", {"t10k": others["t10k"]}, FRUIT)
    files = sorted(folder.rglob("*.png"))
    sums = "".join(f"{hashlib.sha256(each.read_bytes()).hexdigest()}  ./{each.relative_to(folder)}\n" for each in files)
    (folder / "SHA256SUMS.txt").write_text(sums)
    assert data.load("test", data_dir=folder)[0].source == "given"
    first = files[0]
    moved = first.rename(folder / "test" / "fig" / first.name)
    with pytest.raises(data.DataError, match=rf"test/apple/{first.name} is missing, which SHA256SUMS lists"):
        data.load("test", data_dir=folder, other_data=True)
    shutil.copy(moved, first)
    with pytest.raises(data.DataError, match=rf"its SHA256SUMS does not list {first.name}$"):
        data.load("test", data_dir=folder)
    shutil.copy(files[-1], first)
    with pytest.raises(data.DataError, match=rf"test/apple/{first.name} holds the content of test/jujube/"):
        data.load("test", data_dir=folder, other_data=True)


def test_a_piece_of_parquet_that_is_missing_is_noticed(tmp_path, others):
    folder = write_parquet(tmp_path / "given", {"t10k": others["t10k"]}) / "fashion_mnist"
    (folder / "SHA256SUMS").write_text(listed(folder))
    assert data.load("test", data_dir=folder)[0].source == "fashion_mnist (own)"
    (folder / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(data.DataError, match=r"test-00001-of-00002.parquet is missing, which SHA256SUMS lists"):
        data.load("test", data_dir=folder, other_data=True)


def test_malformed_sums_are_one_line(tmp_path, others):
    folder = write_idx(tmp_path / "given", others)
    (folder / "SHA256SUMS").write_text("\n")
    with pytest.raises(data.DataError, match="its SHA256SUMS does not list t10k-images-idx3-ubyte"):
        data.load("test", data_dir=folder)
    (folder / "SHA256SUMS").write_text(listed(folder) + "<html>\x1b[2J")
    with pytest.raises(data.DataError, match="SHA256SUMS, line 5, is not as sha256sum writes it: '<html>") as caught:
        data.load("test", data_dir=folder, other_data=True)
    assert str(caught.value).isprintable()
