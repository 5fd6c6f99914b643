"""pictures/: any file, whatever its size, background or damage, becomes an image of the data set or one line."""

import io
import random
import sys

import numpy as np
import pillow_heif
import pytest
import torch
from conftest import ROOT
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

import checkpoint
import engine
from pictures.convert import convert
from pictures.read import PictureError, read

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
    for image in images:
        assert np.array_equal(seen(saved(Image.fromarray(image))), image)
    assert np.array_equal(seen(saved(Image.fromarray(images[0]).convert("RGB"))), images[0])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS, ids=lambda each: each.name)
def test_enlarged_inverted_padded_jpegs_are_classified_as_the_original(images, sample, interpolation):
    chance = random.Random(0)
    model, _ = checkpoint.load(ROOT / "checkpoints" / "best_cnn_fmnist.pt")
    jpegs = [saved(enlarged(i, chance, interpolation).convert("RGB"), "JPEG", quality=70) for i in images]
    changed = sample["test"]._replace(images=torch.from_numpy(np.stack([seen(jpeg) for jpeg in jpegs])))
    before, after = (engine.predict_logits(model, split).argmax(1) for split in (sample["test"], changed))
    assert (before == after).double().mean() > 0.95


def test_the_background_may_be_light_or_dark(images):
    chance = random.Random(0)
    for image in images[:20]:
        light, dark = (seen(saved(enlarged(image, random.Random(7), background=background))) for background in (255, 0))
        assert np.abs(light.astype(int) - dark).mean() < 1
    grey = Image.eval(enlarged(images[0], chance), lambda value: value * 200 // 255)
    assert seen(saved(grey))[0, 0] == 0  # a grey background becomes black, too


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


def test_heic_names_the_package_that_it_needs(images, monkeypatch):
    monkeypatch.setattr("pictures.read.Image.open", no_opener)  # another test may have registered it
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    with pytest.raises(PictureError, match=r"HEIC, which needs pillow-heif: .* -m pip install -r requirements-opt"):
        read(heic(enlarged(images[0], random.Random(3)).convert("RGB")))


def no_opener(file):
    raise UnidentifiedImageError


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


def test_damage_ends_in_one_line(images, tally, tries):
    """A truncated, altered, foreign or empty file is read or raises PictureError; nothing else happens."""
    chance, refused, lost, wrong = random.Random(0), 0, [], []
    contents = [content for _, content in forms(enlarged(images[1], chance))]
    for number in range(300 * tries):
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
    assert refused > 100
    tally("malformed or odd picture", 300 * tries, lost, wrong)


def test_a_huge_header_is_refused_before_any_memory_is_taken():
    png = bytearray(saved(Image.new("L", (10, 10))))
    png[16:24] = (2**31 - 1).to_bytes(4, "big") * 2  # width and height of the header
    with pytest.raises(PictureError):
        read(bytes(png))
