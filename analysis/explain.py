"""What a model sees in an image: its features, the nearest training images, and where it looks.

It works for any model of models.py: features are the input of the last linear layer, maps are of the last convolution.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import engine
from data import Split, batches, normalise

CHUNK = 500  # test images whose distances to all training images are in memory at once: 120 MB
MAP_SIZE = 7  # cells a side of a map; each covers four by four pixels


def features(model: nn.Module, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute logits float32 (n, 10) and features float32 (n, d) of the split's images, both on the CPU.

    The features are the input of the model's last nn.Linear, or the logits themselves if it has none.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen: list[torch.Tensor] = []
    hook = linear and linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).cpu()))
    try:
        logits = engine.predict_logits(model, split)
    finally:
        if hook:
            hook.remove()
    return logits, torch.cat(seen) if seen else logits


def nearest(queries: torch.Tensor, references: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k references nearest to each query, nearest first: distances float32 (n, k), indices int64 (n, k).

    queries: float32 (n, d), references: float32 (m, d). Euclidean distances, by exhaustive search.
    """
    squares = (references**2).sum(1)
    distances, indices = [], []
    for chunk in queries.split(CHUNK):
        squared = torch.addmm(squares, chunk, references.T, alpha=-2).add_((chunk**2).sum(1, keepdim=True))
        found = squared.min(1, keepdim=True) if k == 1 else squared.topk(min(k, len(references)), largest=False)
        distances.append(found.values.clamp_(min=0).sqrt_())
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def attention_maps(model: nn.Module, split: Split, predicted: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Map the evidence for the predicted class: float32 (n, MAP_SIZE, MAP_SIZE) in [0, 1], and the method's name.

    Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) of the last convolution's output after ReLU; without the ReLU,
    half of the CNN's maps would be empty. A model without a convolution gets the magnitude of gradient times input
    (Shrikumar et al. 2016, arXiv:1605.01713). predicted: int64 (n,). Each map's maximum is 1, or 0 without evidence.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    maps, start = [], 0
    model.eval()
    with _recorded_output(convolutions[-1:]) as seen:
        for images, _ in batches(split, engine.EVALUATION_BATCH):
            chosen = predicted[start : start + len(images)].to(images.device)
            start += len(images)
            pixels = normalise(images).requires_grad_(not convolutions)
            score = model(pixels).gather(1, chosen.unsqueeze(1)).sum()
            source = seen["output"] if convolutions else pixels
            (gradient,) = torch.autograd.grad(score, source)
            with torch.no_grad():
                evidence = _grad_cam(source, gradient) if convolutions else _gradient_times_input(source, gradient)
                maps.append(_as_map(evidence).cpu())
    return torch.cat(maps), "Grad-CAM" if convolutions else "gradient x input"


@contextmanager
def _recorded_output(modules: list[nn.Conv2d]) -> Iterator[dict[str, Any]]:
    """Put the last output of the modules (one or none) into the dict under "output"."""
    seen: dict[str, Any] = {}
    hooks = [module.register_forward_hook(lambda *args: seen.update(output=args[2])) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _grad_cam(output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Weigh the channels of a convolution's output by their mean gradients: (b, c, h, w) -> (b, 1, h, w)."""
    weights = gradient.mean((2, 3), keepdim=True)
    return F.relu((weights * F.relu(output)).sum(1, keepdim=True))


def _gradient_times_input(pixels: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Multiply the gradient by the pixel in [0, 1], so that the black background counts for nothing."""
    return (gradient * (pixels + 1) / 2).abs()


def _as_map(evidence: torch.Tensor) -> torch.Tensor:
    """Reduce evidence (b, 1, h, w) to maps (b, MAP_SIZE, MAP_SIZE) with a maximum of 1."""
    found = F.adaptive_avg_pool2d(evidence, MAP_SIZE).squeeze(1)
    return found / found.amax((1, 2), keepdim=True).clamp(min=1e-12)


def layout(vectors: torch.Tensor, seed: int = 0) -> np.ndarray:
    """Place vectors float32 (n, d) on a plane, float64 (n, 2): t-SNE (van der Maaten and Hinton 2008) by openTSNE."""
    from openTSNE import TSNE  # optional

    return np.asarray(TSNE(n_jobs=-1, random_state=seed, metric="cosine", verbose=False).fit(vectors.numpy()))
