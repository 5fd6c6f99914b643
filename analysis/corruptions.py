"""Test images made harder in six ways at five strengths each, to measure how robust a model is.

for kind in corruptions.KINDS:
    for strength in range(1, 6):
        harder = corruptions.corrupt(test.images, kind, strength)

After ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261) and MNIST-C (Mu and Gilmer 2019, arXiv:1906.02337),
with torchvision's transforms. The strengths are chosen for images of 28x28: results do not compare with either.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import nn
from tqdm import tqdm

import data
import engine
import metrics

SEED = 28  # of the corruptions alone: every model sees the same harder images
STRENGTHS = {  # by kind, the amounts of strengths 1 to 5, and their unit
    "shift": ((1, 2, 3, 4, 5), "pixels, in one of eight directions"),
    "rotation": ((5, 10, 15, 20, 30), "degrees, to either side"),
    "noise": ((0.04, 0.08, 0.12, 0.18, 0.26), "standard deviation of Gaussian noise, of the grey range"),
    "blur": ((0.5, 0.75, 1.0, 1.5, 2.0), "pixels of a Gaussian's standard deviation"),
    "contrast": ((0.8, 0.6, 0.4, 0.3, 0.2), "of each pixel's distance from the image's mean remains"),
    "occlusion": ((4, 6, 8, 10, 12), "pixels a side of a black square around any pixel"),
}
KINDS = tuple(STRENGTHS)


def corrupt(images: torch.Tensor, kind: str, strength: int) -> torch.Tensor:
    """Make images uint8 (n, 28, 28) on the CPU harder. kind: one of KINDS; strength: 1 to 5.

    What is drawn for an image depends on its place, the kind and the strength alone.
    """
    amount = STRENGTHS[kind][0][strength - 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(*data.derive_seeds(SEED, KINDS.index(kind), strength))
        return CORRUPTIONS[kind](images.unsqueeze(1), amount).squeeze(1)


def accuracies(model: nn.Module, split: data.Split) -> dict[str, list[float]]:
    """Measure a model's accuracy on a split on the CPU, by kind, at strengths 1 to 5."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    device = next(model.parameters()).device
    steps = [(kind, strength) for kind in KINDS for strength in range(1, 6)]
    for kind, strength in tqdm(steps, desc="robustness", disable=None, unit=" sets"):
        harder = split._replace(images=corrupt(split.images, kind, strength)).to(device)
        found[kind].append(metrics.accuracy(engine.predict_logits(model, harder), split.labels))
    return found


def _transforms() -> ModuleType:
    """Import torchvision's transforms, which takes seconds."""
    from torchvision.transforms.v2 import functional

    return functional


def _shift(images: torch.Tensor, pixels: int) -> torch.Tensor:
    steps = [(x, y) for x in (-pixels, 0, pixels) for y in (-pixels, 0, pixels) if x or y]
    still = {"angle": 0.0, "scale": 1.0, "shear": [0.0, 0.0]}
    return _pick([_transforms().affine(images, translate=list(step), **still) for step in steps])


def _rotation(images: torch.Tensor, degrees: int) -> torch.Tensor:
    bilinear = _transforms().InterpolationMode.BILINEAR
    return _pick([_transforms().rotate(images, sign * degrees, bilinear) for sign in (-1, 1)])


def _noise(images: torch.Tensor, deviation: float) -> torch.Tensor:
    noisy = _transforms().gaussian_noise(images.float() / 255, sigma=deviation)  # clips to [0, 1]
    return (noisy * 255).round().to(torch.uint8)


def _blur(images: torch.Tensor, deviation: float) -> torch.Tensor:
    return _transforms().gaussian_blur(images, kernel_size=[9, 9], sigma=[deviation, deviation])


def _contrast(images: torch.Tensor, share: float) -> torch.Tensor:
    return _transforms().adjust_contrast(images, share)


def _occlusion(images: torch.Tensor, side: int) -> torch.Tensor:
    draw = data.Draws(len(images), slice(None), images.device)
    return data.erase(images.squeeze(1), draw, side).unsqueeze(1)


CORRUPTIONS: dict[str, Callable[..., torch.Tensor]] = {  # (images uint8 (n, 1, 28, 28), amount) -> the same shape
    "shift": _shift,
    "rotation": _rotation,
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "occlusion": _occlusion,
}


def _pick(versions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Draw one of the versions for each image."""
    chosen = torch.randint(len(versions), (len(versions[0]),))
    return torch.stack(list(versions))[chosen, torch.arange(len(chosen))]
