"""What a model sees in an image: its features, the training images nearest to it, and where it looks.

Of any model of models.py: the features are what its last linear layer is given, the map is of its last convolution.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import engine
from data import batches, normalise

CHUNK = 500  # test images whose distances to all training images are held at once: 120 MB
MAP_SIZE = 7  # pixels a side of a map, each of four by four of the image's


def features(model, split):
    """Logits float32 (n, 10) and features float32 (n, d) of the split's images, both on the CPU.

    The features are the input of the model's last nn.Linear, or the logits themselves where there is none.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen = []
    hook = linear and linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).cpu()))
    try:
        logits = engine.predict_logits(model, split)
    finally:
        if hook:
            hook.remove()
    return logits, torch.cat(seen) if seen else logits


def nearest(queries, references, k):
    """The k references nearest to each query, nearest first: distances float32 (n, k) and indices int64 (n, k).

    queries: float32 (n, d), references: float32 (m, d). Euclidean distances, by exhaustive search.
    """
    squares = (references**2).sum(1)
    distances, indices = [], []
    for chunk in queries.split(CHUNK):
        squared = torch.addmm(squares, chunk, references.T, alpha=-2).add_((chunk**2).sum(1, keepdim=True))
        found = squared.topk(min(k, len(references)), largest=False)
        distances.append(found.values.clamp_(min=0).sqrt_())
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def attention_maps(model, split, predicted):
    """Maps of the evidence for the predicted class, float32 (n, MAP_SIZE, MAP_SIZE) in [0, 1], and the method's name.

    Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) of the last convolution's output after ReLU, without which half
    of the CNN's maps would be empty; of a model without a convolution, the magnitude of gradient times input (Shrikumar
    et al. 2016, arXiv:1605.01713). predicted: int64 (n,). Each map's maximum is 1.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    method = "Grad-CAM" if convolutions else "gradient x input"
    seen, maps, start = {}, [], 0
    hook = convolutions and convolutions[-1].register_forward_hook(lambda *args: seen.update(output=args[2]))
    model.eval()
    try:
        for images, _ in batches(split, engine.EVALUATION_BATCH):
            pixels = normalise(images).requires_grad_(not convolutions)
            logits = model(pixels)
            chosen = predicted[start : start + len(images)].to(logits.device)
            start += len(images)
            score = logits.gather(1, chosen.unsqueeze(1)).sum()
            source = seen["output"] if convolutions else pixels
            (gradient,) = torch.autograd.grad(score, source)
            with torch.no_grad():
                if convolutions:
                    weights = gradient.mean((2, 3), keepdim=True)
                    found = F.relu((weights * F.relu(source)).sum(1, keepdim=True))
                else:
                    found = (
                        gradient * (source + 1) / 2
                    ).abs()  # of the pixel in [0, 1]: the black ground counts for nothing
                found = F.adaptive_avg_pool2d(found, MAP_SIZE).squeeze(1)
                maps.append((found / found.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu())
    finally:
        if hook:
            hook.remove()
    return torch.cat(maps), method


def layout(vectors, seed=0):
    """A 2-D map float64 (n, 2) of vectors float32 (n, d): t-SNE (van der Maaten and Hinton 2008) by openTSNE."""
    from openTSNE import TSNE

    return np.asarray(TSNE(n_jobs=-1, random_state=seed, metric="cosine", verbose=False).fit(vectors.numpy()))
