"""pictures/: any file, whatever its size, background or damage, becomes an image of the data set or one line."""

import fcntl
import inspect
import io
import itertools
import os
import random
import resource
import signal
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pillow_heif
import pyarrow as arrow
import pytest
import torch
from conftest import ROOT, in_a_fork, start_fork
from PIL import Image, ImageDraw, TiffImagePlugin
from pyarrow import parquet

import checkpoint
import engine
from dataset.forms import PARQUET
from dataset.forms import decode as decode_of_a_set
from dataset.idx import DataError
from pictures import worker
from pictures.background import fit_border
from pictures.convert import convert, explain
from pictures.decode import decode
from pictures.read import PictureError, files_below, read
from runtime import cli
from runtime.errors import UserError

INTERPOLATIONS = [Image.Resampling.NEAREST, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]


@pytest.fixture(scope="module")
def images(sample):
    return sample["test"].images.numpy()


def enlarged(image, chance, interpolation=Image.Resampling.NEAREST, background=255):
    """An image of the data set as a user might have it: large, on a light (or dark) background, off-centre."""
    edge = round(28 * chance.uniform(4, 20))
    garment = Image.fromarray(255 - image if background else image).resize((edge, edge), interpolation)
    left, top, right, bottom = (chance.randrange(edge // 2) for _ in range(4))
    picture = Image.new("L", (left + edge + right, top + edge + bottom), background)
    picture.paste(garment, (left, top))
    return picture


def saved(picture, form="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def seen(content):
    return convert(read(content))


def test_images_of_the_data_set_pass_unchanged(images):
    for image in images[:100]:
        assert np.array_equal(seen(saved(Image.fromarray(image))), image)
    assert np.array_equal(seen(saved(Image.fromarray(images[0]).convert("RGB"))), images[0])


def test_enlarged_inverted_padded_jpegs_are_classified_as_the_original(images, sample):
    chance = random.Random(0)
    model, _ = checkpoint.load(ROOT / "checkpoints" / "best_cnn_fmnist.pt")
    large = map(enlarged, images[::4], itertools.repeat(chance), itertools.cycle(INTERPOLATIONS))
    converted = [seen(saved(each.convert("RGB"), "JPEG", quality=70)) for each in large]
    both = torch.from_numpy(images[::4]), torch.from_numpy(np.stack(converted))
    splits = [sample["test"]._replace(images=each, labels=sample["test"].labels[::4]) for each in both]
    before, after = (engine.predict_logits(model, split).argmax(1) for split in splits)
    assert (before == after).double().mean() > 0.94


def test_the_background_may_be_light_or_dark(images):
    chance = random.Random(0)
    for image in images[:20]:
        light, dark = (seen(saved(enlarged(image, random.Random(7), background=background))) for background in (255, 0))
        assert np.abs(light.astype(int) - dark).mean() < 1
    grey = Image.eval(enlarged(images[0], chance), lambda value: value * 200 // 255)
    assert seen(saved(grey))[0, 0] == 0  # a grey background becomes black, too


def test_a_corner_a_speck_and_a_frame_count_for_nothing(images):
    garment = enlarged(images[0], random.Random(3)).convert("RGB")
    expected = convert(garment).astype(int)
    marked = garment.copy()
    marked.paste("red", (0, 0, 3, 3))
    framed = Image.new("RGB", (garment.width + 12, garment.height + 12), "black")
    framed.paste(garment, (6, 6))
    for picture in (marked, framed, garment.crop((1, 1, garment.width - 1, garment.height - 1))):
        assert np.abs(convert(picture) - expected).mean() < 6


def drawn(*boxes):
    """A dark top of these boxes on a blue background."""
    picture = Image.new("RGB", (300, 260), (70, 120, 190))
    for box in boxes:
        picture.paste((30, 30, 30), box)
    return picture


@pytest.mark.parametrize(
    ("boxes", "is_squeezed"),
    [
        ([(95, 60, 205, 230), (30, 60, 270, 110)], True),  # a top with its sleeves spread
        ([(95, 60, 205, 230), (30, 60, 205, 110)], False),  # with one sleeve
        ([(40, 90, 260, 230)], False),  # a bag
        ([(95, 30, 205, 230), (60, 60, 240, 110)], False),  # a top that is higher than wide
        ([(130, 90, 170, 170), (20, 110, 280, 140)], False),  # a long thin thing
    ],
)
def test_spread_sleeves_are_squeezed_and_nothing_else(boxes, is_squeezed):
    rows, columns = (np.flatnonzero((convert(drawn(*boxes)) > 60).any(axis)) for axis in (1, 0))
    edges = [max(box[k] for box in boxes) - min(box[k - 2] for box in boxes) for k in (2, 3)]  # width, height
    expected = 1 if is_squeezed else edges[0] / edges[1]
    assert (np.ptp(columns) + 1) / (np.ptp(rows) + 1) == pytest.approx(expected, rel=0.12)


def test_an_object_that_covers_a_part_of_the_border_leaves_the_shades_as_they_are():
    rows, columns = np.mgrid[:200, :300]
    wall = np.stack([150 + rows / 4 - columns / 5, 140 + columns / 6, 120 + rows * columns / 2000], -1)
    pixels = wall.round().astype(np.uint8)
    pixels[120:, 130:210] = 20  # to the lower edge
    assert np.abs(fit_border(pixels, 0.9) - wall).max() < 4
    pixels[:, :100] = 20
    assert fit_border(pixels, 0.9) is None


def test_a_person_is_cropped_at_the_neck_and_said(images):
    picture = Image.new("RGB", (300, 460), (120, 150, 110))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((120, 20, 180, 105), fill=(205, 160, 135))
    draw.rectangle((138, 95, 162, 135), fill=(205, 160, 135))
    draw.polygon([(138, 122), (162, 122), (250, 150), (240, 440), (60, 440), (50, 150)], fill=(30, 30, 60))
    found = explain(picture)
    assert found.notes == ("someone seems to wear it",)
    assert not found.mask[:90].any()
    assert found.mask[200:400, 100:200].all()


def heic(picture, **options):
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture).save(buffer, quality=95, **options)
    return buffer.getvalue()


def forms(garment):
    """Yield the same picture (L, on white) in every form: name, bytes."""
    white, rgb = Image.new("L", garment.size, 255), garment.convert("RGB")
    clear = rgb.convert("RGBA")
    clear.putalpha(garment.point(lambda value: 0 if value > 250 else 255))
    palette = clear.quantize(64)
    sixteen = Image.fromarray(np.asarray(garment).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6  # a viewer turns it clockwise
    yield "grey PNG", saved(garment)
    yield "RGB PNG", saved(rgb)
    yield "RGBA PNG, transparent background", saved(clear)
    yield "LA PNG", saved(clear.convert("LA"))
    yield "palette PNG with transparency", saved(palette)
    yield "GIF with transparency", saved(clear, "GIF")
    yield "animated GIF", saved(rgb, "GIF", save_all=True, append_images=[white.convert("RGB")])
    yield "16-bit PNG", saved(sixteen)
    yield "16-bit TIFF", saved(sixteen, "TIFF")
    yield "floating-point TIFF", saved(Image.fromarray(np.asarray(garment, np.float32) / 255), "TIFF")
    yield "CMYK JPEG", saved(rgb.convert("CMYK"), "JPEG", quality=95)
    yield "JPEG turned by EXIF", saved(rgb.rotate(90, expand=True), "JPEG", quality=95, exif=turned)
    yield "WebP", saved(rgb, "WEBP", lossless=True)
    yield "BMP", saved(rgb, "BMP")
    yield "AVIF", saved(rgb, "AVIF", quality=95)
    yield "HEIC", heic(rgb)
    yield "HEIC, turned", heic(rgb.rotate(90, expand=True), exif=turned.tobytes())


def test_every_form_of_a_picture_is_seen_alike(images):
    garment = enlarged(images[0], random.Random(3))
    expected = seen(saved(garment))
    for name, content in forms(garment):
        assert np.abs(seen(content).astype(int) - expected).mean() < 4, name


def exif(*tags):
    """EXIF data of these tags: number, type, count, value of at most 4 bytes. Pillow writes no malformed ones."""
    entries = (struct.pack("<HHI4s", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("odd", [(0x128, 12, 1, b"\x08"), (0x11A, 2, 2, b"72"), (0x8769, 2, 3, b"ab")])
@pytest.mark.parametrize("side", [300, 2400])
def test_a_picture_is_turned_upright_whatever_else_its_exif_data_hold(odd, side):
    lying = Image.new("L", (side, side // 2))
    sixteen = Image.fromarray(np.zeros((side // 2, side), np.uint16))
    turned = exif((0x112, 3, 1, b"\6"), odd)
    for content in (saved(lying, "JPEG", exif=turned), saved(sixteen, exif=turned), saved(lying, "WEBP", exif=turned)):
        width, height = read(content).size
        assert height == 2 * width
    assert read(saved(lying, "JPEG", exif=b"Exif\0\0nothing")).width > 200


def test_heic_names_the_package_that_it_needs(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    monkeypatch.setattr(worker, "decode", decode)
    with pytest.raises(PictureError, match=r"HEIC, which needs pillow-heif: .* -m pip install -r requirements-opt"):
        read(heic(enlarged(images[0], random.Random(3)).convert("RGB")))


def test_a_raw_file_is_not_answered_by_its_preview(images):
    garment, tags = enlarged(images[0], random.Random(3)), TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"  # DNGVersion
    with pytest.raises(PictureError, match="a camera's raw file"):
        read(saved(garment, "TIFF", tiffinfo=tags))


def test_from_the_smallest_to_the_largest():
    with pytest.raises(PictureError, match="all of one colour"):
        seen(saved(Image.new("RGB", (1, 1), "red")))
    two = Image.new("L", (2, 1), 255)
    two.putpixel((0, 0), 0)
    assert seen(saved(two)).shape == (28, 28)
    large = Image.new("1", (12_000, 12_000), 1)
    large.paste(0, (3_000, 2_000, 6_000, 9_000))
    result = seen(saved(large))
    assert result.max() == 255
    assert (result[:, 13:15] > 200).all()
    with pytest.raises(PictureError, match="too many"):
        seen(saved(Image.new("1", (12_001, 12_000))))


def damage(image, count):
    """Read damaged pictures; return how many were refused, lost and wrong, and the memory of the decoder in KiB."""
    chance, refused, lost, wrong = random.Random(0), 0, [], []
    contents = [content for _, content in forms(enlarged(image, chance).resize((150, 150)))]
    for number in range(count):
        content = bytearray(contents[number % len(contents)])
        kind = chance.randrange(4)
        if kind == 0:
            del content[chance.randrange(len(content)) :]
        elif kind == 1:
            for _ in range(chance.randrange(1, 20)):
                content[chance.randrange(len(content))] = chance.randrange(256)
        elif kind == 2:
            content[chance.randrange(30) : 30] = chance.randbytes(chance.randrange(30))
        else:
            content = bytearray(chance.choice([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"not a picture", bytes(5000)]))
        try:
            if seen(bytes(content)).shape != (28, 28):
                wrong.append(number)
        except PictureError:
            refused += 1
        except Exception as error:
            lost.append(f"{number}: {error!r}")
    worker._end_all()
    return refused, lost, wrong, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def test_damage_ends_in_one_line(images, tally, tries):
    """A truncated, altered, foreign or empty file is read or raises PictureError; nothing else happens."""
    refused, lost, wrong, memory = in_a_fork(damage, images[1], 300 * tries)  # which has no other children
    assert refused > 100
    assert memory < 2**20
    tally("malformed or odd picture", 300 * tries, lost, wrong)


def progressive(scans):
    """A progressive JPEG with its last scan so many times."""
    content = saved(Image.new("L", (2000, 2000), 100), "JPEG", progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * scans + content[-2:]


def tagged(count, length):
    """A TIFF with so many tags, each of which refers to the same bytes, so many of them."""
    tags = b"".join(struct.pack("<HHII", number, 2, length, 8) for number in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + tags + bytes(4 + length)


def png(*chunks):
    """A PNG of these chunks: type, content."""
    summed = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(summed)


def webp(width, height):
    """A WebP with this size in its header, and the content of one pixel."""
    content = saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True)
    return content[:21] + struct.pack("<I", width - 1 | height - 1 << 14) + content[25:]


SMALL = (b"IHDR", struct.pack(">IIBBBBB", 10, 10, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(110))), (b"IEND", b"")
BOMBS = {  # a small file that costs much: what it holds, and what is said of it
    "tags of a TIFF": (lambda: tagged(60_000, 100_000), "damaged, or takes more than 1 GB of memory"),
    "floating-point TIFF": (
        lambda: saved(Image.new("F", (5000, 5000)), "TIFF", compression="tiff_adobe_deflate"),
        "5,000 x 5,000 pixels are too many: at most 18,000,000",
    ),
    "WebP": (lambda: webp(8000, 9000), "8,000 x 9,000 pixels are too many: at most 48,000,000"),
    "PNG's profile": (
        lambda: png(SMALL[0], (b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7))), *SMALL[1:]),
        "damaged: Decompressed data too large",
    ),
    "GIF's canvas": (lambda: b"GIF89a" + b"\xff" * 4 + bytes(3) + b",\0\0\0\0\1\0\1\0\0\2\2L\1\0;", "too many pixels"),
    "PNG's header": (
        lambda: png((b"IHDR", b"\x7f\xff\xff\xff" * 2 + b"\x08\0\0\0\0")),
        "damaged: its header cannot be read",
    ),
    "PostScript": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "PostScript: save it as PNG first",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_costs_much_is_refused_and_the_next_one_is_read(name, images):
    make, reason = BOMBS[name]
    with pytest.raises(PictureError, match=f"^{reason}"):
        read(make())
    assert np.array_equal(seen(saved(Image.fromarray(images[0]))), images[0])


@pytest.mark.parametrize("limits", [(0.3, 1000), (1000, 0.3)], ids=["processor", "clock"])
def test_a_picture_that_takes_long_is_refused(limits, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", limits[0])
    monkeypatch.setattr(worker, "PATIENCE", limits[1])
    reason = r"^takes more than 0.3 s to decode: (try again later, or )?save it anew as JPEG$"
    with pytest.raises(PictureError, match=reason):
        read(progressive(6_000))


def test_a_busy_machine_does_not_make_a_picture_a_bad_one(images, monkeypatch):
    """Nor does one that stopped all processes of a terminal, as Ctrl-Z does, and continued them later."""
    monkeypatch.setattr(worker, "PATIENCE", 0.3)
    monkeypatch.setattr(worker, "_idle", [])
    worker.start()
    (slow,) = worker._idle
    slow._process.send_signal(signal.SIGSTOP)
    threading.Timer(0.5, slow._process.send_signal, [signal.SIGCONT]).start()
    content = saved(Image.fromarray(images[0]))
    assert np.array_equal(seen(content), images[0])
    assert worker._idle == [slow]  # which was given the time to start
    slow._process.send_signal(signal.SIGSTOP)
    assert np.array_equal(seen(content), images[0])
    assert worker._idle != [slow]  # which is gone; a second one has read the picture
    worker._end_all()


def test_the_decoder_itself_knows_no_postscript():
    """Pillow would start Ghostscript."""
    with pytest.raises(UserError, match=r"^$"):
        decode(BOMBS["PostScript"][0]())


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, beginning in (("video", b"\0\0\0\x18ftypmp42"), ("jpeg", b"\xff\xd8\xff\xe0")):
        with open(tmp_path / name, "wb") as file:
            file.write(beginning)
            file.truncate(2**40)
    before = bytes_read()
    reasons = {"pipe": "a pipe or a device", "video": "a video", "jpeg": "larger than 256 MiB"}
    for name, reason in reasons.items():
        with pytest.raises(PictureError, match=f"^{reason}"):
            read(tmp_path / name)
    with pytest.raises(PictureError, match=r"a pipe or a device, not a file: pipe a picture to .*predict.py -$"):
        read("/dev/zero")
    assert bytes_read() - before < 10_000


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_folder_of_loops_devices_and_depth_is_searched(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.png").touch()
    (tmp_path / "b.png").touch()
    deep = tmp_path
    for _ in range(300):
        deep = deep / "a"
        deep.mkdir()
    (deep / "a.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    found = files_below(tmp_path)
    sys.setrecursionlimit(limit)
    assert found == [deep / "a.png", tmp_path / "b.png"]


def test_the_process_that_decodes_inherits_no_secret_and_is_kept(images, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setattr(worker, "_idle", [])
    content = saved(Image.fromarray(images[0]))
    read(content)
    (kept,) = worker._idle
    assert fcntl.fcntl(kept._process.stdin, fcntl.F_GETPIPE_SZ) <= 2**16  # a larger one may be refused
    assert b"secret" not in Path(f"/proc/{kept._process.pid}/environ").read_bytes()
    with pytest.raises(PictureError):
        read(content[:60])
    read(content)
    assert worker._idle == [kept]
    with ThreadPoolExecutor(3) as pool:  # as many processes as pictures at the same time
        found = list(pool.map(seen, [saved(Image.fromarray(image)) for image in images[:12]]))
    assert np.array_equal(found, images[:12])
    for each in worker._idle:
        each._process.kill()  # as a system without memory does
        each._process.wait()
    assert np.array_equal(seen(content), images[0])
    worker._end_all()


def read_slowly(path):
    cli.run(lambda: print(read(path)))


def test_a_signal_is_answered_during_a_slow_picture(tmp_path):
    (tmp_path / "slow.jpg").write_bytes(progressive(20_000))
    process = start_fork(tmp_path / "log", read_slowly, tmp_path / "slow.jpg")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.01)
    time.sleep(0.3)  # the process that decodes starts
    process.terminate()
    process.join(2)
    assert process.exitcode == 143
    assert not Path(f"/proc/{found[0]}").exists()


def test_a_picture_of_a_data_set_takes_little_memory(tmp_path):
    """The data set's reader decodes in its own process: what can be large there is refused before that."""
    small = saved(Image.new("L", (28, 28)), "JPEG")
    exif = b"".join(b"\xff\xe1\xfd\xf0Exif\0\0" + part for part in pieces(tagged(20_000, 100_000), 65_000))
    for content, reason in (
        (tagged(1_000, 5_000), "none of PNG, JPEG"),
        (small[:2] + exif + small[2:], "20,000 bytes"),
    ):
        with pytest.raises(DataError, match=reason):
            decode_of_a_set("a picture", content)
    repeated = arrow.DictionaryArray.from_arrays(arrow.array([0] * 100), arrow.array([bytes(10_000_000)]))
    table = arrow.table({"image": repeated, "label": [0] * 100})
    parquet.write_table(table, tmp_path / "train.parquet", compression="zstd", store_schema=False)
    assert in_a_fork(memory_of_reading, tmp_path / "train.parquet") < 300  # 1,000 where each row has its own copy


def pieces(content, length):
    return [content[start : start + length].ljust(length, b"\0") for start in range(0, len(content), length)]


def memory_of_reading(path):
    """MiB that are taken to refuse a parquet file."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="20,000 bytes"):
        PARQUET.read([path], "train")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
