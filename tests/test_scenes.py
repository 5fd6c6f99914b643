"""pictures/convert.py on scenes composed of test images: the network answers as for the images themselves.

The backgrounds are plain, shaded, patterned and shadowed, lighter and darker than the garments. Saving a scene as JPEG
or cropping it by a few pixels hardly changes an answer.
"""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE
from PIL import Image
from scipy import ndimage

import checkpoint
from analysis import classify, examples
from pictures.convert import convert
from pictures.read import read
from runtime import cli
from runtime.errors import UserError

EVERY = 17  # of the sample's 500 test images, in each scene
PLAIN = {
    "white": (255, 255, 255),
    "white, mirrored": (255, 255, 255),
    "light": (225, 225, 225),
    "cream": (240, 228, 205),
    "black": (0, 0, 0),
}
OTHERS = {
    "blue": (170, 200, 230),
    "red": (190, 40, 40),
    "dark green": (20, 60, 35),
    "light, shaded": (215, 215, 215),
    "dark, shaded": (90, 20, 30),
    "light, with a shadow": (215, 215, 215),
    "beige, with a shadow": (200, 180, 150),
    "light, checked": (215, 215, 215),
    "beige, wood": (200, 180, 150),
    "light, coarse": (215, 215, 215),
}


def backdrop(name, colour, shape, chance):
    """A background in that colour: plain, or as its name says. float64 (height, width, 3)."""
    rows, columns = np.indices(shape)
    rng = np.random.default_rng(chance.randrange(2**32))
    shades = {
        "shaded": 60 * (columns / shape[1] - rows / shape[0]) * chance.choice([-1, 1]),
        "checked": 14 * ((rows // 10 + columns // 10) % 2),
        "wood": 10 * np.sin(rows / 3 + columns / 60 + np.cumsum(0.35 * rng.normal(size=shape[0]))[:, None]),
        "coarse": 10 * rng.normal(size=shape),
    }
    shade = shades.get(name.rpartition(", ")[2], np.zeros(shape))
    return np.full((*shape, 3), colour) + shade[..., None]


def compose(image, name, colour, chance):
    """A picture, RGB, of a test image: a product on that background, or on black as in the data set."""
    edge = 28 * chance.randrange(5, 8)
    left, top, right, bottom = (chance.randrange(6, edge // 2) for _ in range(4))
    image = image[:, ::-1] if "mirrored" in name else image
    cover, light = (
        np.pad(
            np.asarray(Image.fromarray(part.astype(np.uint8)).resize((edge, edge), Image.Resampling.BICUBIC), float),
            ((top, bottom), (left, right)),
        )[..., None]
        / 255
        for part in (255 * (image > 12), image if colour == (0, 0, 0) else 255 - image)
    )
    behind = backdrop(name, colour, cover.shape[:2], chance)
    if "shadow" in name:
        shadow = ndimage.gaussian_filter(np.roll(cover[..., 0], edge // 16, (0, 1)), edge / 20)
        behind *= 1 - 0.35 * shadow[..., None]
    return Image.fromarray((cover * 255 * light + (1 - cover) * behind).clip(0, 255).astype(np.uint8))


def saved_again(picture, chance):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=chance.randint(80, 95))
    return Image.open(buffer).convert("RGB")


def cropped(picture, chance):
    pixels = chance.randint(1, 5)
    return picture.crop((pixels, pixels, picture.width - pixels, picture.height - pixels))


@pytest.fixture(scope="module")
def candidate():
    """The network that answers to pictures."""
    path = Path(cli.PICTURES_CHECKPOINT)
    return classify.candidate(path, *checkpoint.load(path))


@pytest.fixture(scope="module")
def answered(candidate, sample):
    """For each background the answers, int64 (n,), to: the test images, the scenes, these saved again, and cropped."""
    images, chance = sample["test"].images[::EVERY].numpy(), random.Random(0)
    found = {}
    for name, colour in (PLAIN | OTHERS).items():
        scenes = [compose(image, name, colour, chance) for image in images]
        anew, cut = ([change(scene, chance) for scene in scenes] for change in (saved_again, cropped))
        pixels = [*images, *(convert(scene) for scene in (*scenes, *anew, *cut))]
        found[name] = classify.probabilities(classify.logits_of(candidate, pixels), 1).argmax(1).reshape(4, -1)
    return found


def agreement(answered, names, first, second):
    return np.mean([answered[name][first] == answered[name][second] for name in names])


def test_a_product_on_a_plain_background_is_answered_as_the_image_itself(answered):
    assert agreement(answered, PLAIN, 0, 1) > 0.95


def test_a_garment_is_found_in_front_of_anything(answered):
    assert agreement(answered, OTHERS, 0, 1) > 0.9


@pytest.mark.parametrize("name", OTHERS)
def test_a_garment_is_found_on_this_background(answered, name):
    assert agreement(answered, [name], 0, 1) > 0.8


def test_saving_a_picture_again_hardly_changes_an_answer(answered):
    assert agreement(answered, answered, 1, 2) > 0.98


def test_cropping_a_few_pixels_hardly_changes_an_answer(answered):
    assert agreement(answered, answered, 1, 3) > 0.98


def test_the_composed_examples_can_be_written_and_answered(candidate, tmp_path):
    words = [str(tmp_path / "new"), "--data-dir", str(SAMPLE)]
    assert examples.main(words) == 0
    files = sorted((tmp_path / "new").iterdir())
    assert len(files) == 6
    pixels = [convert(read(file)) for file in files]
    answers = classify.probabilities(classify.logits_of(candidate, pixels), 1).argmax(1)
    right = [candidate.classes[answer] in file.name for answer, file in zip(answers, files, strict=True)]
    assert sum(right) >= 5  # the sample's first boot is like a sneaker
    with pytest.raises(UserError, match="is there already"):
        examples.main(words)
