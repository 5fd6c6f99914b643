"""Test images made harder in six ways at five strengths each, to measure what a model's accuracy withstands.

for kind in corruptions.KINDS:
    for strength in range(1, 6):
        harder = corruptions.corrupt(test.images, kind, strength)

After ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261) and MNIST-C (Mu and Gilmer 2019, arXiv:1906.02337),
with torchvision's transforms; the strengths are set for images of 28x28, so their figures are not those of either.
"""

import torch

import data

SEED = 28  # of the corruptions alone: every model sees the same harder images
STRENGTHS = {  # by kind, what strengths 1 to 5 are, in the unit told beside it
    "shift": ((1, 2, 3, 4, 5), "pixels, in one of eight directions"),
    "rotation": ((5, 10, 15, 20, 30), "degrees, to either side"),
    "noise": ((0.04, 0.08, 0.12, 0.18, 0.26), "standard deviation of Gaussian noise, of the grey range"),
    "blur": ((0.5, 0.75, 1.0, 1.5, 2.0), "pixels of a Gaussian's standard deviation"),
    "contrast": ((0.8, 0.6, 0.4, 0.3, 0.2), "of each pixel's distance from the image's mean remains"),
    "occlusion": ((4, 6, 8, 10, 12), "pixels a side of a black square around any pixel"),
}
KINDS = tuple(STRENGTHS)


def corrupt(images, kind, strength):
    """Images uint8 (n, 28, 28) on the CPU -> the same shape and dtype; kind of KINDS, strength 1 to 5.

    What is drawn for an image hangs on its place, the kind and the strength alone.
    """
    from torchvision.transforms.v2 import functional as transforms  # which takes seconds to load

    amount = STRENGTHS[kind][0][strength - 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(*data.derive_seeds(SEED, KINDS.index(kind), strength))
        if kind == "occlusion":
            return data.augment(images, erase=amount)
        channels = images.unsqueeze(1)
        if kind == "shift":
            steps = [(x, y) for x in (-amount, 0, amount) for y in (-amount, 0, amount) if x or y]
            moved = [
                transforms.affine(channels, angle=0.0, translate=list(step), scale=1.0, shear=[0.0, 0.0])
                for step in steps
            ]
            result = _pick(moved)
        elif kind == "rotation":
            bilinear = transforms.InterpolationMode.BILINEAR
            result = _pick([transforms.rotate(channels, sign * amount, bilinear) for sign in (-1, 1)])
        elif kind == "noise":
            noisy = transforms.gaussian_noise(channels.float() / 255, sigma=amount)  # which clips to [0, 1]
            result = (noisy * 255).round().to(torch.uint8)
        elif kind == "blur":
            result = transforms.gaussian_blur(channels, kernel_size=[9, 9], sigma=[amount, amount])
        else:
            result = transforms.adjust_contrast(channels, amount)
    return result.squeeze(1)


def _pick(versions):
    """For each image one of its versions, drawn at random."""
    chosen = torch.randint(len(versions), (len(versions[0]),))
    return torch.stack(versions)[chosen, torch.arange(len(chosen))]
