"""Load the models by torch.hub.

model = torch.hub.load("PATH/TO/CLONE", "cnn", source="local", pretrained=True)
logits = model(images)   # float32 (n, 1, 28, 28), as (pixel / 255 - 0.5) / 0.5 with 0 for the background -> (n, 10)

torch.hub lists each public function here, so what else this file needs begins with an underscore.
"""

from torch import nn as _nn

import checkpoint as _checkpoint
import models as _models
from runtime import cli as _cli

dependencies = ["torch", "numpy", "scipy", "filelock", "tqdm", "PIL"]

_WEIGHTS = {
    ("mlp", "published"): "best_mlp_fmnist.pt",
    ("mlp", "distilled"): "distilled/best_mlp_fmnist.pt",
    ("cnn", "published"): "best_cnn_fmnist.pt",
    ("cnn", "distilled"): "distilled/best_cnn_fmnist.pt",
    ("resnet", "best"): "best_resnet_fmnist.pt",
}


def mlp(pretrained: bool = False, recipe: str = "published") -> _nn.Module:
    """Build the MLP, 784 - 128 - 10.

    Input: float32 (n, 1, 28, 28), each pixel as (pixel / 255 - 0.5) / 0.5. Output: logits (n, 10).
    pretrained: load the weights in checkpoints/, in evaluation mode. These are the shipped ones unless you have trained
    there. recipe: "published", or "distilled" for those that the ResNet taught.
    """
    return _build("mlp", pretrained, recipe)


def cnn(pretrained: bool = False, recipe: str = "published") -> _nn.Module:
    """Build the CNN, two convolutions and two linear layers.

    Input: float32 (n, 1, 28, 28), each pixel as (pixel / 255 - 0.5) / 0.5. Output: logits (n, 10).
    pretrained: load the weights in checkpoints/, in evaluation mode. These are the shipped ones unless you have trained
    there. recipe: "published", or "distilled" for those that the ResNet taught.
    """
    return _build("cnn", pretrained, recipe)


def resnet(pretrained: bool = False, recipe: str = "best") -> _nn.Module:
    """Build the ResNet, ten convolutions and a linear layer.

    Input: float32 (n, 1, 28, 28), each pixel as (pixel / 255 - 0.5) / 0.5. Output: logits (n, 10).
    pretrained: load the weights in checkpoints/, of recipe "best", in evaluation mode. These are the shipped ones
    unless you have trained there.
    """
    return _build("resnet", pretrained, recipe)


def _build(name: str, pretrained: bool, recipe: str) -> _nn.Module:
    if (name, recipe) not in _WEIGHTS:
        shipped = ", ".join(other for model, other in _WEIGHTS if model == name)
        raise ValueError(f"{name} has no weights of recipe {recipe!r}; there are {shipped}")
    if not pretrained:
        return _models.build(name)
    path = _cli.CHECKPOINTS / _WEIGHTS[name, recipe]
    model, info = _checkpoint.load(path)
    if _checkpoint.is_bare(info) or info["model"] != name:
        raise ValueError(f"{path} is no checkpoint of {name} that train.py wrote")
    return model
