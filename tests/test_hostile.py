"""Files and flags made to do harm: each ends in a one-line error, soon, in little memory, and nothing in them runs."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE, in_a_fork
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import analyze_errors
import bench
import checkpoint
import compare
import data
import demo
import evaluate
import export
import models
import predict
import recipes
import sweep
import train
from analysis import classify, composition, corruptions, mistakes, plots, tables, trainings
from analysis.runs import collect
from dataset import sources
from pictures import worker
from runtime import cli, weights
from runtime.errors import UserError
from training import record

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
LIMITS = {signal.ITIMER_PROF: 5, signal.ITIMER_REAL: 120}  # seconds of the processor; and by the clock, for what waits
LIMIT_MIB = 1024
NUMBERS = (0, 1, 27, 28, 49, 50, 51, 784, 2049, 2051, 60_000, 10**6, 10**9, 2**31 - 1, 2**31, 2**32 - 1)


def mutate(content, chance):
    """Bytes near the given ones: bits flipped, a part cut out, doubled, moved, or made of noise, zeros or 0xff."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at, length = chance.randrange(len(content) or 1), int(chance.paretovariate(0.5)) % 5_000
        part = content[at : at + length]
        match chance.randrange(7):
            case 0:
                if content:
                    content[at] ^= 1 << chance.randrange(8)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = part
            case 3:
                del content[at:]
            case 4:
                content[at : at + length] = chance.randbytes(length)
            case 5:
                content[at : at + length] = chance.choice((b"\0", b"\xff")) * length
            case 6:
                content += chance.randbytes(length)
    return bytes(content)


def try_one(use, results, name):
    """Call use(), which must raise UserError in one line, or succeed; anything else is recorded."""
    for timer, seconds in LIMITS.items():
        signal.setitimer(timer, seconds)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            use()
        results["accepted"] += 1
        if not said.getvalue().replace("\n", "").isprintable():
            results["lost"].append(f"{name}: controls the terminal: {said.getvalue()!r}"[:500])
    except (UserError, OSError) as error:
        if "\n" in str(error) or not str(error).isprintable():
            results["lost"].append(f"{name}: not one line: {error!r}"[:500])
    except BaseException as error:
        results["lost"].append(f"{name}: {error!r}"[:500])
    finally:
        for timer in LIMITS:
            signal.setitimer(timer, 0)


class TooLong(BaseException):
    """Not an Exception, which the code under test might catch."""


def too_long(*_):
    raise TooLong


def fuzz(make_cases, folder, count):
    """Try the cases; returns {"tries", "lost", "wrong", "accepted", "mib"}, the last being the peak of memory."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, too_long)
    results = {"tries": 0, "lost": [], "wrong": [], "accepted": 0}
    for name, use in make_cases(folder, count, random.Random(0), results["wrong"]):
        results["tries"] += 1
        try_one(use, results, name)
    return results | {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def check(results, fault, tally):
    assert results["mib"] < LIMIT_MIB
    tally(fault, results["tries"], results["lost"], results["wrong"])


# --- IDX and gzip ----------------------------------------------------------------------------------------


def write_small(folder):
    """Write a set of the sample's first 50 test images, and return their split."""
    (test,) = data.load("test", data_dir=SAMPLE)
    data.write(folder, {"t10k": (test.images[:50], test.labels[:50])})
    return data.load("test", data_dir=folder)[0]


def data_cases(folder, count, chance, wrong):
    """Test sets with a malformed file, raw or as .gz, half of them with sums that vouch for it."""
    good = write_small(folder)
    sums = (folder / "SHA256SUMS").read_text()
    original = {name: (folder / name).read_bytes() for name in (IMAGES, LABELS)}
    for number in range(count):
        name = chance.choice((IMAGES, LABELS))
        raw = compressed = None
        match number % 4:
            case 0:
                raw = mutate(original[name], chance)
            case 1:  # a header that lies
                words = list(struct.unpack_from(">4I", original[name]))
                for _ in range(chance.randrange(1, 4)):
                    words[chance.randrange(4)] = chance.choice(NUMBERS)
                raw = struct.pack(">4I", *words) + original[name][16 : 16 + chance.choice((0, 100, 10**6))]
            case 2:
                compressed = mutate(gzip.compress(original[name], 1), chance)
            case 3:
                compressed = gzip.compress(mutate(original[name], chance), 1)
        yield f"{name} {number}", data_case(folder, name, raw, compressed, sums, original, good, number % 8 > 3, wrong)


def data_case(folder, name, raw, compressed, sums, original, good, vouched, wrong):
    def use():
        path, packed = folder / name, folder / f"{name}.gz"
        path.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)
        (packed if raw is None else path).write_bytes(compressed if raw is None else raw)
        content = raw
        if content is None:
            try:
                content = gzip.decompress(compressed)
            except Exception:
                content = b""
        digests = [hashlib.sha256(part).hexdigest() for part in (original[name], content)]
        (folder / "SHA256SUMS").write_text(sums.replace(*digests) if vouched else sums)
        try:
            (test,) = data.load("test", data_dir=folder)
            if not vouched and not (torch.equal(test.images, good.images) and torch.equal(test.labels, good.labels)):
                wrong.append(name)
        finally:
            packed.unlink(missing_ok=True)
            path.write_bytes(original[name])

    return use


def test_malformed_data_files(tmp_path, tally, tries):
    results = in_a_fork(fuzz, data_cases, tmp_path / "data", 800 * tries)
    check(results, "malformed IDX or gz file", tally)
    assert 0 < results["accepted"] < 0.2 * results["tries"]


def classes_cases(folder, count, chance, wrong):
    """Files of class names near good ones; what is accepted must be ten different names that can be printed."""
    write_small(folder)
    path = folder / sources.NAMES
    good = "".join(f"class {number}\n" for number in range(10)).encode()
    parts = ("é☃\u202e\x85", "\x1b[2J", "\0", "  ", "\r", "x" * 41, "\ufeff", "class 3")

    def case(content):
        def use():
            path.write_bytes(content)
            (test,) = data.load("test", data_dir=folder)
            fine = [name for name in test.classes if name.isprintable() and 0 < len(name) <= 40]
            if len(set(fine)) != 10:
                wrong.append(content)

        return use

    for number in range(count):
        content = good.replace(b"5", chance.choice(parts).encode()) if number % 2 else good
        yield f"classes {number}", case(content if number % 4 == 3 else mutate(content, chance))


def test_malformed_class_names(tmp_path, tally, tries):
    results = in_a_fork(fuzz, classes_cases, tmp_path / "data", 200 * tries)
    check(results, "malformed class names", tally)
    assert 0 < results["accepted"] < 0.8 * results["tries"]


def bombs(folder, count, chance, wrong):
    """Small files that become large: gigabytes of zeros, and a million empty members."""
    shutil.copytree(SAMPLE, folder)
    header = struct.pack(">4I", sources.IMAGES_MAGIC, 500, 28, 28)
    zeros = gzip.compress(header + bytes(2**24)) + gzip.compress(bytes(2**24)) * 128
    lies = gzip.compress(struct.pack(">4I", sources.IMAGES_MAGIC, 10**6, 28, 28)) + gzip.compress(bytes(2**24)) * 128
    members = gzip.compress(header) + gzip.compress(b"") * 10**6
    for name, content in {"zeros": zeros, "lies": lies, "members": members}.items():

        def use(name=name, content=content):
            (folder / f"{IMAGES}.gz").write_bytes(content)
            data.load("test", data_dir=folder)
            wrong.append(name)

        yield name, use


def test_gzip_bombs(tmp_path, tally):
    check(in_a_fork(fuzz, bombs, tmp_path / "data", 3), "gzip bomb", tally)


# --- checkpoints -----------------------------------------------------------------------------------------


class Call:
    """Pickled as the call of a function by its name."""

    def __init__(self, module, name, *arguments):
        self.call = module, name, arguments

    def __reduce__(self):
        module, name, arguments = self.call
        return getattr(__import__(module, fromlist=[name]), name), arguments


def nasty_values(marker):
    """What a checkpoint may hold in a field's place."""
    command = f"touch {marker}"
    return [
        *[None, True, -1, 2**63, 10**5000, 0.5, float("nan"), float("inf"), 1j, b"bytes", set(), (), [], {}],
        *["", "x" * 10**5, "two\nlines", "\x1b[2J", "mlp", "fmnist-checkpoint-1", "fmnist-checkpoint-2\n"],
        *[[None] * 1000, {"a": {"b": 1}}, {1: 2}, torch.Size([1]), torch.device("cpu"), torch.float32],
        *[torch.zeros(3), torch.zeros(0), torch.zeros(2, 2).long(), torch.tensor(float("nan")), torch.tensor(0.5)],
        *[torch.zeros(1).expand(10**12), torch.zeros(3).to_sparse(), torch.zeros(2, device="meta")],
        *[torch.zeros(128, 784).double() / 0, torch.zeros(1).expand(128, 784), torch.zeros(128).half()],
        torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8),
        *[Call("os", "system", command), Call("builtins", "eval", f"__import__('os').system({command!r})")],
        *[Call("builtins", "exec", command), Call("subprocess", "check_output", ["touch", str(marker)])],
        *[Call("builtins", "open", str(marker), "w"), Call("torch", "load", str(marker)), Call("pathlib", "Path", "x")],
        *[Call("builtins", "bytearray", 2**31), Call("builtins", "range", 2**40), Call("builtins", "print", "x")],
    ]


def altered(content, value, chance):
    """Bytes of a checkpoint with the value somewhere in its content, which is changed by it."""
    place, key = content, chance.choice(list(content))
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.9:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = value
    return checkpoint.to_bytes(content)


def archive(pickled, whole):
    """The checkpoint's archive with another pickle in it, its sums being right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, pickled if member.filename.endswith("data.pkl") else old.read(member))
    return buffer.getvalue()


def storage_of(call):
    """Bytes of a file in which a function of PyTorch is called with a storage of four numbers."""
    return to_file(Call("torch._utils", "_rebuild_tensor_v2", torch.zeros(4)._typed_storage(), *call, False, {}))


def to_file(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def with_pickle(pickled):
    return archive(b"\x80\x02" + pickled + b".", to_file(1))


def with_parts(value, change):
    """Bytes of a file whose parts, a list of (name, bytes), are changed."""
    buffer, parts = io.BytesIO(), []
    with zipfile.ZipFile(io.BytesIO(to_file(value))) as old:
        parts = [(member.filename, old.read(member)) for member in old.infolist()]
    with zipfile.ZipFile(buffer, "w") as new, warnings.catch_warnings(action="ignore"):
        for name, part in change(parts):
            new.writestr(name, part)
    return buffer.getvalue()


def key(*parts):
    """A pickle with a tuple within tuples, twice at every level: its hash would take 2^60 steps."""
    levels = b"".join(b"q%bh%b\x86" % (bytes([k]), bytes([k])) for k in range(60))
    return with_pickle((b"K\x01" + levels).join(parts))


def laughs(levels, width):
    """Lists within lists, each of which is repeated."""
    value = []
    for _ in range(levels):
        value = [value] * width
    return value


def loop():
    value = []
    value.append(value)
    return value


def old_format(pattern, other):
    """A file of the old format with a tensor of three numbers, in which a part is replaced."""
    whole = to_file(torch.ones(3), _use_new_zipfile_serialization=False)
    changed, count = re.subn(pattern, lambda _: other, whole, flags=re.DOTALL)
    assert count == 1
    return changed


def twins():
    """A pickle of two equal texts of 2 MiB, which the memo has as 7 and 8."""
    text = b"X" + struct.pack("<I", 2**21) + bytes(2**21)
    return text + b"q\x07" + text + b"q\x08"


def builds():
    """A state_dict that is given the same long attributes again and again."""
    versions = b"".join(b"J%b}" % struct.pack("<i", number) for number in range(5000))
    return with_pickle(
        b"}q\0X\x09\0\0\0_metadata}(" + versions + b"usccollections\nOrderedDict\n)R" + b"h\0b" * 150_000
    )


def doubled_lists():
    """Two equal lists within lists, each twice at every level: to compare them takes 2^32 steps."""
    return b"".join(b"](h%bh%beq%b" % (bytes([k]), bytes([k]), bytes([k + 1])) for k in range(10, 42))


ONES = struct.pack("<3f", 1, 1, 1)
NO_NAMES = "its dicts have keys that are no names: refused, nothing was run"
DAMAGED = "damaged, truncated or not a PyTorch checkpoint"
LYING = {  # what a file holds, and what is said
    "a tuple as key": (lambda: key(b"}", b"Ns"), NO_NAMES),
    "a tuple as key of items": (lambda: key(b"ccollections\nOrderedDict\n(]", b"N\x86atR"), DAMAGED),
    "a tuple as key, later": (lambda: key(b"ccollections\nOrderedDict\n)R", b"Ns"), NO_NAMES),
    "a tuple as the key of a storage": (
        lambda: key(b"(X\x07\0\0\0storagectorch\nFloatStorage\n", b"X\x03\0\0\0cpuK\x04tQ"),
        DAMAGED,
    ),
    "keys of one hash": (
        lambda: with_pickle(
            b"}(" + b"".join(b"\x8a\x0a%bN" % ((k << 61) - k).to_bytes(10, "little") for k in range(10**5)) + b"u"
        ),
        "holds a whole number of more than 64 bits",
    ),
    "equal keys of megabytes": (lambda: with_pickle(twins() + b"}(h\7Nu" + b"h\x08Ns" * 160_000), NO_NAMES),
    "attributes again and again": (builds, "holds more than weights and some logs"),
    "names that patterns take for ever to match": (
        lambda: with_parts(1, lambda parts: [*parts, ("code/" * 13_000 + "\n", b"")]),
        "a zip archive with names that are too long",
    ),
    "a memo without a value": (lambda: with_pickle(b"j\xff\xff\xff\x7f"), DAMAGED),
    "a mark too few": (lambda: with_pickle(b"K\x01t"), DAMAGED),
    "values below a mark": (lambda: with_pickle(b"}K\x01(K\x02s"), DAMAGED),
    "a storage as a value": (lambda: to_file([torch.zeros(4)._typed_storage()]), DAMAGED),
    "a number without end": (lambda: to_file(10**100), "holds a whole number of more than 64 bits"),
    "a conjugate view": (lambda: to_file(torch.zeros(1).cfloat().conj()), "holds a conjugate or negative view"),
    "a tensor repeated": (lambda: to_file(torch.zeros(1).expand(2**25)), "holds a tensor that repeats its numbers"),
    "more tensors than are looked at": (
        lambda: to_file(dict.fromkeys(map(str, range(30_000)), torch.zeros(2))),
        "holds more than 20,000 tensors",
    ),
    "lists that repeat lists": (lambda: to_file(laughs(9, 9)), "holds more than weights and some logs"),
    "a list in itself": (lambda: to_file(loop()), "holds more than 100 levels"),
    "lists in lists": (lambda: to_file(laughs(200, 1)), "holds more than 100 levels"),
    "a part twice": (
        lambda: with_parts(torch.ones(3), lambda parts: parts + parts[-3:]),
        "damaged: it holds 'archive/data/0' twice",
    ),
    "no storage": (lambda: with_parts(torch.ones(3), lambda parts: [p for p in parts if p[0][-2:] != "/0"]), DAMAGED),
    "a short storage": (
        lambda: with_parts(torch.ones(3), lambda parts: [(n, p[:8] if n[-2:] == "/0" else p) for n, p in parts]),
        DAMAGED,
    ),
    "a long storage": (
        lambda: with_parts(torch.ones(3), lambda parts: [(n, p * 2 if n[-2:] == "/0" else p) for n, p in parts]),
        DAMAGED,
    ),
    "big-endian": (
        lambda: with_parts(1, lambda parts: [(n, b"big" if "byteorder" in n else p) for n, p in parts]),
        "of a big-endian machine: torch.save",
    ),
    "bytes as truth values": (lambda: to_file(torch.full((3,), 2, dtype=torch.uint8).view(torch.bool)), DAMAGED),
    "a tensor too long": (lambda: storage_of((0, (5,), (1,))), DAMAGED),
    "a tensor too wide": (lambda: storage_of((0, (2, 2), (3, 1))), DAMAGED),
    "a tensor behind": (lambda: storage_of((4, (1,), (1,))), DAMAGED),
    "a tensor before": (lambda: storage_of((-1, (1,), (1,))), DAMAGED),
    "a step back": (lambda: storage_of((3, (4,), (-1,))), DAMAGED),
    "a size below 0": (lambda: storage_of((0, (-1,), (1,))), DAMAGED),
    "a size that overflows": (
        lambda: storage_of((0, (2**32, 2**32, 0), (0, 0, 0))),
        "holds a tensor that repeats its numbers",
    ),
    "terabytes": (lambda: to_file(torch.zeros(1).expand(10**12)), DAMAGED),
    "1,000 dimensions": (lambda: to_file(torch.zeros([1] * 1000)), DAMAGED),
    "old format, no keys": (lambda: old_format(rb"\]q\0X.{4}\d+q\x01a\.", b"]q\0."), DAMAGED),
    "old format, lists as keys": (
        lambda: old_format(
            rb"\]q\0X.{4}\d+q\x01a\.", b"](]q\x0a" + doubled_lists() + b"]q\x0a" + doubled_lists() + b"e."
        ),
        DAMAGED,
    ),
    "old format, texts of megabytes as keys": (
        lambda: old_format(rb"\]q\0X.{4}\d+q\x01a\.", b"](" + twins() + b"h\7h\x08" * 100_000 + b"e."),
        DAMAGED,
    ),
    "old format, no numbers": (lambda: old_format(re.escape(b"\3\0\0\0\0\0\0\0" + ONES), b""), DAMAGED),
    "old format, other numbers": (lambda: old_format(b"\3\0\0\0\0\0\0\0", bytes(8)), DAMAGED),
    "old format, too few numbers": (lambda: old_format(re.escape(ONES), ONES[1:]), DAMAGED),
    "old format, a huge storage": (lambda: old_format(b"cpuq\4K\3", b"cpuq\4J\0\0\0\x7f"), DAMAGED),
}


@pytest.mark.parametrize("kind", LYING)
def test_a_file_that_lies_about_its_content_is_refused_soon(kind):
    make, said = LYING[kind]
    content = make()
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, LIMITS[signal.ITIMER_PROF])
    try:
        with pytest.raises(checkpoint.CheckpointError, match=rf"^a\.pt: {said}"):
            checkpoint.from_content(Path("a.pt"), content)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def test_of_several_pickles_and_archives_in_a_file_the_one_that_was_checked_is_read():
    """PyTorch itself finds parts whatever their case, and archives by other rules than Python."""
    other = to_file("other")
    with zipfile.ZipFile(io.BytesIO(other)) as opened:
        hidden = opened.read("archive/data.pkl")
    both = with_parts("checked", lambda parts: [("archive/DATA.PKL", hidden), *parts])
    for content in (both, other + to_file("checked")):
        assert weights.parse(Path("a.pt"), content) == "checked"


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "zero.pt"):
        with pytest.raises(checkpoint.CheckpointError, match=f"{name}: not a regular file"):
            checkpoint.load(tmp_path / name)


def test_of_a_large_file_that_is_something_else_only_the_beginning_is_read(tmp_path):
    (path := tmp_path / "zeros.pt").touch()
    tracemalloc.start()
    for size, said in ((2**28, DAMAGED), (2**38, "larger than 4,294,967,296 bytes")):
        os.truncate(path, size)
        with pytest.raises(checkpoint.CheckpointError, match=said):
            checkpoint.load(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match=said):
        record.history_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27


def test_a_text_that_is_repeated_in_a_checkpoint_is_not_looked_at_again_and_again():
    fields = {"name": "mlp", "epoch": 1, "flags": {}, "seed": 0, "data": "x"}
    text = "x" * 2**22
    content = checkpoint.serialise(models.build("mlp"), metrics=dict.fromkeys(map(str, range(9000)), text), **fields)
    begun = time.process_time()
    with pytest.raises(checkpoint.CheckpointError, match="its metrics is not what a checkpoint holds there"):
        checkpoint.from_content(Path("a.pt"), content)
    assert time.process_time() - begun < LIMITS[signal.ITIMER_PROF]


def checkpoint_cases(folder, count, chance, wrong):
    """Checkpoints with bytes, fields and pickles altered, given to evaluate.py."""
    path, marker = folder / "hostile.pt", folder / "ran"
    write_small(folder)
    torch.manual_seed(0)
    taught = {"teachers": [{"checkpoint": "t.pt", "sha256": "0", "model": "cnn", "select": "last"}]}
    flags = {"recipe": "distilled", **recipes.find("distilled", "mlp")._asdict(), "deterministic": False, **taught}
    details = {"epoch": 3, "metrics": {"select_accuracy": 0.5}, "flags": flags, "seed": 7, "data": "sample"}
    whole = checkpoint.serialise(models.build("mlp"), name="mlp", **details)
    content = checkpoint.from_bytes(whole)
    old = to_file(content["weights"], _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith("data.pkl")]
        pickled = opened.read(name)
    nasty = nasty_values(marker)
    fields = [*content, *content["weights"]]

    def with_value(place, value):
        altered = content | {"weights": dict(content["weights"])}
        (altered if place in altered else altered["weights"])[place] = value
        return to_file(altered, _use_new_zipfile_serialization=chance.random() < 0.9)

    def cases():
        yield overlapping
        for operations in raw:
            yield lambda operations=operations: archive(b"\x80\x02" + operations + b".", whole)
            yield lambda operations=operations: b"\x80\x02" + operations + b"."
        for value in nasty:
            yield lambda value=value: pickle.dumps(value, chance.randrange(5))
            yield lambda value=value: to_file(value)
            for field in fields:
                yield lambda field=field, value=value: with_value(field, value)
        while True:
            yield lambda: mutate(whole, chance)
            yield lambda: archive(mutate(pickled, chance), whole)
            yield lambda: mutate(old, chance)
            yield lambda: with_value(chance.choice(fields), chance.choice(nasty))
            yield lambda: altered(checkpoint.from_bytes(whole), chance.choice(nasty), chance)
            yield lambda: archive(bytes(chance.choices(pickled, k=chance.randrange(1, 200))) + b".", whole)

    same_hash = [b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(100_000)]
    raw = [b"]" * 60_000 + b"a" * 59_999, b"(" * 60_000 + b"t" * 60_000]
    raw += [b"}(" + b"".join(same_hash[:n]) + b"u" for n in (10_000, 100_000)]

    def overlapping():
        """An archive that lists its largest part 200,000 times."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
            for member in old.infolist():
                new.writestr(member.filename, old.read(member))
            new.filelist += [max(new.filelist, key=lambda member: member.file_size)] * 200_000
        return buffer.getvalue()

    for number, make in zip(range(count), cases(), strict=False):
        try:
            hostile = make()
        except (RecursionError, pickle.PicklingError, RuntimeError, NotImplementedError, ValueError):
            continue  # cannot be written to a file
        yield f"checkpoint {number}", checkpoint_case(path, hostile, marker, wrong)


def checkpoint_case(path, hostile, marker, wrong):
    def use():
        path.write_bytes(hostile)
        try:
            evaluate.main([str(path), "--data-dir", str(path.parent), "--device", "cpu"])
        finally:
            if marker.exists():
                wrong.append("ran")
                marker.unlink()

    return use


def test_malformed_checkpoints(tmp_path, tally, tries):
    results = in_a_fork(fuzz, checkpoint_cases, tmp_path / "checkpoints", 1_500 * tries)
    assert results["tries"] > 1_400 * tries
    check(results, "malformed or malicious checkpoint", tally)
    assert 0 < results["accepted"] < 0.2 * results["tries"]


def state_cases(folder, count, chance, wrong):
    """The state of an unfinished run with a value or its bytes altered, given to train.py --resume."""
    marker = folder / "ran"
    arguments = ["--model", "mlp", "--recipe", "fast", "--batch-size", "32", "--data-dir", str(SAMPLE), "--resume"]
    arguments += ["--checkpoint-dir", str(folder)]

    def stop_itself(*arguments):
        run_save(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    run_save, record.Record.save = record.Record.save, stop_itself
    assert train.main(arguments) == 128 + signal.SIGTERM
    record.Record.save = run_save
    (path,) = folder.glob("unfinished*")
    whole = path.read_bytes()
    nasty = nasty_values(marker)

    def with_value():
        return altered(checkpoint.from_bytes(whole), chance.choice(nasty), chance)

    def with_history():
        content = checkpoint.from_bytes(whole)
        content["history"] = torch.frombuffer(
            bytearray(mutate(content["history"].numpy().tobytes(), chance)), dtype=torch.uint8
        )
        return checkpoint.to_bytes(content)

    def case(hostile):
        def use():
            for left in folder.iterdir():
                left.unlink()
            path.write_bytes(hostile)
            train.main(arguments)
            if marker.exists():
                wrong.append("ran")

        return use

    for number in range(count):
        try:
            hostile = (with_value, with_value, with_history, lambda: mutate(whole, chance))[number % 4]()
        except (pickle.PicklingError, RuntimeError, NotImplementedError, ValueError):
            continue  # cannot be written to a file
        yield f"state {number}", case(hostile)


def test_malformed_states(tmp_path, tally, tries):
    results = in_a_fork(fuzz, state_cases, tmp_path / "run", 200 * tries)
    check(results, "malformed state of a run", tally)
    assert results["accepted"] < 0.5 * results["tries"]


# --- histories and results -------------------------------------------------------------------------------

NASTY_JSON = [None, True, -1, 0, 2**63, 10**400, 0.5, 1e308, -1e-320, "", "x" * 10**5, "two\nlines", "\x1b[2J", "|"]
NASTY_JSON += [[], {}, [None] * 1000, [[[[]]]], {"a": {"b": 1}}, float("nan"), float("inf"), 7, "mlp", [1, 2]]


def beside_a_checkpoint(folder, history):
    """A file in a checkpoint's place, with a history beside it that says it is of that file."""
    path = folder / "best_mlp_fmnist.pt"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    path.with_suffix(".json").write_text(json.dumps(history | {"checkpoint_sha256": digest}))
    return path


def json_cases(folder, count, chance, wrong):
    """A history and a result of --deep with a value or their bytes altered, given to all that read them."""
    (folder / "ece17261").mkdir(parents=True)
    results = trainings.Results(folder, "ece17261")
    history = json.loads((ROOT / "runs" / "mlp-val-0" / "best_mlp_fmnist.json").read_text())
    path = beside_a_checkpoint(folder, history | {"temperature": 1.5})
    deep = json.loads((ROOT / "runs" / "deep" / "ece17261" / "mlp-published-0.json").read_text())

    def read_history():
        if not 0.01 <= classify.temperature_of(path) <= 100:
            wrong.append(path.with_suffix(".json").read_bytes()[:500])
        tables.markdown(collect([folder]))
        if (found := record.history_of(path)) and chance.random() < 0.1:  # it takes a tenth of a second
            plots.training_curves(found)

    def read_result():
        if result := results.read("seed", deep["key"], 10_000):
            mistakes.judge(result["findings"] or [], [result["findings"] or []] * 2)
            if len(composition.as_digits(result["predicted"])) != 10_000:
                wrong.append(result["predicted"][:500])
            composition._robustness(("mlp", "published"), [result])

    place = path.with_suffix(".json")
    good = [(place, json.loads(place.read_text()), read_history), (results.folder / "seed.json", deep, read_result)]
    for number in range(count):
        file, content, read = good[number % 2]
        text = json.dumps(with_nasty(content, chance)).encode()
        text = mutate(text, chance) if number % 8 > 5 else text

        def use(file=file, text=text, read=read):
            file.write_bytes(text)
            read()

        yield f"{file.name} {number}", use


def with_nasty(content, chance):
    """A copy of a dict with something nasty somewhere in it."""
    content = json.loads(json.dumps(content))
    place, key = content, chance.choice(list(content))
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.9:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = chance.choice(NASTY_JSON)
    return content


def test_malformed_histories_and_results(tmp_path, tally, tries):
    results = in_a_fork(fuzz, json_cases, tmp_path / "json", 200 * tries)
    check(results, "malformed history or result", tally)
    assert results["accepted"] < 0.5 * results["tries"]


@pytest.mark.parametrize("temperature", [-1, 0, "1", 1e-320, [1], True, 1e9])
def test_a_temperature_out_of_range_is_one_line(temperature, tmp_path):
    history = json.loads((ROOT / "runs" / "mlp-val-0" / "best_mlp_fmnist.json").read_text())
    assert classify.temperature_of(beside_a_checkpoint(tmp_path, history | {"temperature": 2.5})) == 2.5
    path = beside_a_checkpoint(tmp_path, history | {"temperature": temperature})
    with pytest.raises(UserError, match=r"best_mlp_fmnist\.json is no history.*temperature is .* from 0.01 to 100"):
        classify.temperature_of(path)


def test_a_history_that_cannot_be_read_is_one_line_and_one_of_another_file_does_not_count(tmp_path, capsys):
    path = tmp_path / "best_mlp_fmnist.pt"
    path.write_bytes(b"weights")
    place = path.with_suffix(".json")
    for content in (
        b"[" * 100_000,
        b"\xff",
        b'{"log": NaN}',
        b"[]",
        json.dumps({"checkpoint_sha256": "0" * 64}).encode(),
    ):
        place.write_bytes(content)
        assert classify.temperature_of(path) == 1
        assert re.search("are not calibrated: .*no history of it is beside it", capsys.readouterr().err)
    digest = hashlib.sha256(b"weights").hexdigest().encode()
    for content in (b"[" * 100_000 + digest, digest, b'{"checkpoint_sha256": "%b"}' % digest, b" " * 2**24 + digest):
        place.write_bytes(content)
        with pytest.raises(UserError, match=r"is no history|larger than"):
            classify.temperature_of(path)
    place.unlink()
    place.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not a regular file"):
        classify.temperature_of(path)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match="not a regular file"):
        classify.temperature_of(path)


def test_results_of_deep_trainings_that_lie_are_one_line(tmp_path):
    results = trainings.Results(tmp_path, "01234567")
    results.folder.mkdir()
    facts = {"data": "x", "device": "cpu", "threads": 1, "kernels": "fused", "versions": {}, "training_seconds": 1.0}
    facts |= {"train_images": 9, "best_epoch": 1, "precision": "float32", "n": 2, "accuracy": 0.5}
    finding = {"holds": True, "measured": {key: {"share": 0.5} for key in mistakes.KEY_SHARES}}
    robustness = {kind: [0.5] * 5 for kind in corruptions.KINDS}
    seed = {"accuracy_ci95": [0, 1], "log_loss": 1.0, "ece": 0.1, "predicted": "07", "findings": [finding] * 4}
    seed = facts | seed | {"robustness": robustness}
    fold = facts | {"probabilities": [1000] * 20}
    a_map = {"map": [[1, 2], [3, 4]]}
    for name, key, good, lies in (
        ("seed", {}, seed, [{"predicted": "0x"}, {"predicted": "\u0663" * 2}, {"predicted": "0" * 10**6}, {"n": 3}]),
        ("seed", {}, seed, [{"accuracy": 7}, {"robustness": {}}, {"robustness": robustness | {"blur": [2] * 5}}]),
        ("seed", {}, seed, [{"findings": [finding]}, {"findings": [finding | {"holds": "yes"}] * 4}, {"ece": "0"}]),
        (
            "fold",
            {"fold": 1},
            fold,
            [{"probabilities": [0] * 20}, {"probabilities": [-1] * 20}, {"probabilities": [1]}],
        ),
        (
            "map",
            "0" * 64,
            a_map,
            [{"map": [[1, 2]]}, {"map": [[1, 2, 3]] * 2}, {"map": [[0.5, 1e300]] * 2}, {"more": 1}],
        ),
    ):
        results.write(name, key, good)
        assert results.read(name, key, 2)
        for lie in lies:
            results.write(name, key, good | lie)
            with pytest.raises(trainings.DeepError, match=f"{name}.json: .*; delete it, and --deep makes it again"):
                results.read(name, key, 2)
    os.mkfifo(results.folder / "pipe.json")
    with pytest.raises(trainings.DeepError, match=r"not a regular file.*; delete it"):
        results.read("pipe", {})
    assert results.read("missing", {}) is None


# --- flags -----------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)  # as a shell can pass
WORDS = TEXT | st.sampled_from(
    [
        "0",
        "-1",
        "1e400",
        "nan",
        "-inf",
        "1_000",
        "٣",
        "0x10",
        " 1",
        "1 ",
        "1.0",
        "+1",
        "None",
        "true",
        "9" * 5000,
        "cuda:-1",
    ]
)


def is_whole_number(text, low, high):
    return text.isascii() and text.isdigit() and len(text) < 21 and low <= int(text) <= high


def is_positive(text):
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def whole(flag, low, high):
    return WORDS.filter(lambda text: not is_whole_number(text, low, high)).map(lambda text: [f"{flag}={text}"])


def positive(flag):
    return WORDS.filter(lambda text: not is_positive(text)).map(lambda text: [f"{flag}={text}"])


def one_of(flag, *choices):
    return WORDS.filter(lambda text: text not in choices).map(lambda text: [f"{flag}={text}"])


def below_a_file(flag):
    return TEXT.map(lambda text: [f"{flag}={SAMPLE / 'SHA256SUMS'}/{text.replace('/', '')}"])


MODEL = ["--model=mlp"]
DEVICE = one_of("--device", "auto").filter(lambda flag: not flag[0].startswith("--device=cpu")) | st.sampled_from(
    [f"--device={kind}" for kind in ("meta", "meta:0", "xla", "xpu", "hpu", "vulkan", "privateuseone", "cuda:99")]
).map(lambda flag: [flag])
NONSENSE = {
    train: one_of("--model", *models.MODELS)
    | st.one_of(
        whole("--epochs", 1, 10_000),
        whole("--batch-size", 1, 60_000),
        whole("--seed", 0, 2**32 - 1),
        positive("--lr"),
        positive("--save-every"),
        one_of("--select", *recipes.SELECTIONS),
        one_of("--recipe", *recipes.RECIPES),
        TEXT.map(lambda text: [f"--set=no {text}"]),
        TEXT.map(lambda text: [f"--set=lr=no {text}"]),
        TEXT.map(lambda text: [f"--fold=no {text}"]),
        one_of("--precision", "auto", "float32", "bfloat16"),
        below_a_file("--checkpoint-dir"),
        DEVICE,
        TEXT.map(lambda text: [f"--no-{text}"]),
        TEXT.map(lambda text: ["--", text]),
        TEXT.map(lambda text: [f"--resume={text}"]),
    ).map(lambda flags: MODEL + flags),
    evaluate: st.one_of(
        one_of("--split", "test", "val", "train"),
        TEXT.filter(lambda text: not text.endswith(".json")).map(lambda text: [f"--json={text}"]),
        TEXT.map(lambda text: ["--", f"no such file {text}"]),
        DEVICE,
    ),
    analyze_errors: st.one_of(
        below_a_file("--figures-dir"),
        below_a_file("--export"),
        TEXT.map(lambda text: ["--", "a", "b", text]),
        DEVICE,
    ),
    bench: st.one_of(one_of("--quick"), TEXT.map(lambda text: ["--", text])),
    compare: st.one_of(
        below_a_file("--figures-dir"),
        TEXT.filter(lambda text: not text.endswith(".md")).map(lambda text: [f"--markdown={text}"]),
        TEXT.filter(lambda text: not text.endswith(".json")).map(lambda text: [f"--json={text}"]),
        TEXT.map(lambda text: ["--", f"no such folder {text}"]),
    ),
    predict: st.one_of(
        whole("--top", 1, 10),
        TEXT.map(lambda text: [f"--show={text}"]).filter(lambda flags: not flags[0].endswith(".png")),
        TEXT.map(lambda text: [f"--checkpoint=no such file {text}"]),
        TEXT.map(lambda text: [f"--json={text}"]),
        DEVICE,
    ).map(lambda flags: [str(SAMPLE), *flags]),
    sweep: st.one_of(
        *(whole(flag, 1, 10_000) for flag in ("--seeds", "--trials", "--jobs")),
        whole("--folds", 2, 1000),
        one_of("--judge", "val", "40k/20k"),
        one_of("--recipe", *recipes.RECIPES),
        TEXT.map(lambda text: [f"--set=no {text}"]),
        TEXT.map(lambda text: [f"--search=no={text}"]),
        TEXT.map(lambda text: [f"--search=lr=no {text}"]),
        below_a_file("--dir"),
        DEVICE,
    ).map(lambda flags: MODEL + flags),
    demo: st.one_of(whole("--port", 1, 65_535), TEXT.map(lambda text: ["--", f"no such file {text}"]), DEVICE),
    export: st.one_of(
        TEXT.map(lambda text: ["--", f"no such file {text}"]),
        TEXT.map(lambda text: [f"--output={text}", "a.pt"]).filter(lambda flags: not flags[0].endswith(".onnx")),
    ),
}


@pytest.mark.parametrize("script", NONSENSE, ids=lambda script: script.__name__)
def test_every_nonsense_flag_is_a_one_line_error(script, tally, tries, monkeypatch, capsys):
    """It must be noticed before the data are loaded."""
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("the nonsense was accepted"))
    monkeypatch.setattr(worker, "start", lambda: None)  # a process each time
    seen = []

    @settings(
        max_examples=200 * tries, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(NONSENSE[script])
    def try_flags(flags):
        seen.append(flags)
        sys.argv = [f"{script.__name__}.py", *flags]
        with pytest.raises(SystemExit) as exit:
            cli.run(script.main)
        said = capsys.readouterr().err
        assert exit.value.code == 2, said
        assert said.startswith(f"{script.__name__}.py: error: ")
        assert said[:-1].isprintable()
        assert said[-1] == "\n"

    monkeypatch.setattr(sys, "argv", [])
    try_flags()
    tally(f"nonsense flag of {script.__name__}.py", len(seen), [], [])
