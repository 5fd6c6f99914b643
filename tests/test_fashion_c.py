"""The kinds of harder images of Fashion-MNIST-C, on real images, and the program that measures on them."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLE, assert_one_line_error

from analysis import fashion_c


@pytest.fixture(scope="module")
def images(sample):
    return sample["test"].images


@pytest.fixture(scope="module")
def garments(sample):
    """Images whose outermost four pixels are black: turned or slanted, they stay whole."""
    images = sample["test"].images
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[4:-4, 4:-4] = True
    return images * inside


@pytest.mark.parametrize("name", fashion_c.KINDS)
def test_images_get_harder_the_same_each_time_and_draw_nothing_from_others(name, images):
    before, state = images.clone(), torch.random.get_rng_state()
    harder = fashion_c.corrupt(images, name)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(harder, fashion_c.corrupt(images, name))
    torch.random.set_rng_state(state)
    assert torch.equal(images, before)
    assert harder.shape == images.shape
    assert harder.dtype == torch.uint8
    assert not torch.equal(harder, images)


@pytest.mark.parametrize(("name", "back"), [
    ("inverse", "inverse"), ("mirrored", "mirrored"), ("upside down", "upside down"), ("turned left", "turned right"),
])  # fmt: skip
def test_these_two_cancel_each_other_to_the_bit(name, back, images):
    assert torch.equal(fashion_c.corrupt(fashion_c.corrupt(images, name), back), images)


def test_flips_and_turns_move_a_corner_where_their_names_say():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 0, 0] = 255  # above left
    for name, corner in {
        "mirrored": (0, 27),
        "upside down": (27, 0),
        "turned left": (27, 0),
        "turned right": (0, 27),
    }.items():
        assert fashion_c.corrupt(image, name).nonzero().tolist() == [[0, *corner]], name


def test_shot_noise_has_the_mean_of_the_image_and_four_greys(images):
    harder = fashion_c.corrupt(images, "shot noise")
    assert set(harder.unique().tolist()) == {0, 85, 170, 255}
    assert not harder[images == 0].any()  # no light, no noise
    dark = (images > 0) & (images < 100)  # brighter ones are cut off at white
    assert harder[dark].float().mean().item() == pytest.approx(images[dark].float().mean().item(), rel=0.03)


def test_impulse_noise_changes_17_percent_of_the_pixels_to_black_or_white(images):
    harder = fashion_c.corrupt(images, "impulse noise")
    grey = (images > 0) & (images < 255)
    changed = harder[grey] != images[grey]
    assert changed.float().mean().item() == pytest.approx(0.17, abs=0.005)
    assert set(harder[grey][changed].unique().tolist()) == {0, 255}
    assert (harder[grey][changed] == 255).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_glass_blur_moves_pixels_by_little_and_keeps_the_mean(garments):
    harder = fashion_c.corrupt(garments, "glass blur")
    assert harder.float().mean().item() == pytest.approx(garments.float().mean().item(), rel=0.01)
    dot = torch.zeros(200, 28, 28, dtype=torch.uint8)
    dot[:, 14, 14] = 255
    places = fashion_c.corrupt(dot, "glass blur").float()
    columns = places.sum(1).argmax(1)
    assert len(columns.unique()) > 2  # it moves sideways
    assert (columns - 14).abs().max() < 6
    blurred = fashion_c._blur_down(dot / 255)
    assert blurred.sum(1)[:, 14].numpy() == pytest.approx(1)  # and is not blurred that way


def test_the_pixels_that_change_places_are_the_same_ones():
    pixels = torch.arange(784).remainder(256).to(torch.uint8).unsqueeze(1).repeat(1, 50)
    before = pixels.clone()
    fashion_c._exchange(pixels)
    assert torch.equal(pixels.sort(0).values, before.sort(0).values)
    assert 0.5 < (pixels != before).float().mean() < 0.9
    edge = torch.zeros(28, 28, dtype=torch.bool)
    edge[0], edge[:, 0] = True, True
    assert torch.equal(pixels[edge.flatten()], before[edge.flatten()])


def test_motion_blur_smears_a_dot_along_a_direction_of_up_to_45_degrees():
    dots = torch.zeros(300, 28, 28, dtype=torch.uint8)
    dots[:, 14, 20] = 255
    smeared = fashion_c.corrupt(dots, "motion blur").float()
    assert smeared.sum((1, 2)).min() > 240  # rounding alone changes the sum
    weights = smeared / smeared.sum((1, 2), keepdim=True)
    place = torch.arange(28.0)
    left = 20 - (weights.sum(1) * place).sum(1)
    up = 14 - (weights.sum(2) * place).sum(1)
    assert left.min() > 1
    slopes = up / left
    assert slopes.abs().max() < 1.1
    assert slopes.min() < -0.8
    assert slopes.max() > 0.8
    grey = torch.full((1, 28, 28), 200, dtype=torch.uint8)
    assert torch.equal(fashion_c.corrupt(grey, "motion blur"), grey)  # nothing dark comes in


def middle_of_lines(name):
    """Where each row of 100 images of an upright line has its middle after a change, float (100, 28)."""
    lines = torch.zeros(100, 28, 28, dtype=torch.uint8)
    lines[:, :, 13:15] = 255
    changed = fashion_c.corrupt(lines, name).float()
    return (changed * torch.arange(28.0)).sum(2) / changed.sum(2)


def test_shear_slants_to_either_side_about_the_centre():
    middle = middle_of_lines("shear")
    slopes = (middle[:, 23] - middle[:, 4]) / 19
    assert set(slopes.mul(100).round().abs().tolist()) == {39}  # the sine of 0.4
    assert 30 < (slopes > 0).sum() < 70
    assert middle[:, 13:15].mean().item() == pytest.approx(13.5, abs=0.05)


def test_scale_shrinks_the_covered_area_to_049(images):
    full = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    small = fashion_c.corrupt(full, "scale").float()
    assert small.mean().item() / 255 == pytest.approx(0.49, abs=0.02)  # the edges fall between pixels
    assert torch.equal(small, small.flip(1))
    assert torch.equal(small, small.flip(2))
    ratio = fashion_c.corrupt(images, "scale").float().mean() / images.float().mean()
    assert ratio.item() == pytest.approx(0.49, abs=0.01)


def test_rotate_turns_by_23_degrees_to_either_side():
    middle = middle_of_lines("rotate")
    slopes = (middle[:, 20] - middle[:, 7]) / 13
    assert set(slopes.mul(100).round().abs().tolist()) == {42}  # the tangent of 0.4
    assert 30 < (slopes > 0).sum() < 70


def test_brightness_contrast_and_saturate_map_greys():
    greys = torch.arange(256, dtype=torch.uint8).repeat(784 // 256 + 1)[:784].view(1, 28, 28)
    brighter, flat, saturated = (fashion_c.corrupt(greys, name) for name in ("brightness", "contrast", "saturate"))
    assert (brighter.float() - (greys.float() + 127.5).clamp(max=255)).abs().max() <= 0.5
    mean = greys.float().mean()
    assert (flat.float() - (mean + 0.1 * (greys.float() - mean))).abs().max() <= 0.5
    assert saturated[greys == 0].unique().tolist() == [50]  # 0.977 of a fifth of the grey range
    assert saturated[greys > 11].unique().tolist() == [249]


def test_the_program_measures_and_writes_where_it_is_asked_to(trained, tmp_path, capsys):
    path, target = trained[0] / "best_mlp_fmnist.pt", tmp_path / "kinds.json"
    assert fashion_c.main([str(path), "--data-dir", str(SAMPLE), "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    (result,) = json.loads(target.read_text())["checkpoints"]
    assert list(result["kinds"]) == list(fashion_c.KINDS)
    for name, found in result["kinds"].items():
        assert found["n"] == 500
        assert found["ci95"][0] <= found["share"] == found["count"] / 500 <= found["ci95"][1]
        assert f"{found['share']:.2%}" in next(line for line in printed.splitlines() if line.startswith(name))
    assert f"{result['mean']:.2%}" in printed.splitlines()[-3]


def test_a_missing_checkpoint_is_one_line():
    command = [sys.executable, "-m", "analysis.fashion_c", "missing.pt"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert_one_line_error(finished, "^python -m analysis.fashion_c: error: missing.pt")
