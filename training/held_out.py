"""The answers of a fold run to the training images that it held out, in a file beside its checkpoint."""

import io
from pathlib import Path

import numpy as np
import torch

import metrics
from runtime import cli
from runtime.files import read_bytes, write_atomically
from training import record


def write(path: Path, index: np.ndarray, labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Write held_out_<model>_fmnist.npz beside the checkpoint at `path`.

    It holds index int64 (n,), the places of the images among all training images; labels int64 (n,); and
    probabilities float32 (n, 10). The same run writes the same bytes. An earlier file with others is kept, under a name
    with the first digits of its SHA-256; a line says so.
    """
    buffer, place = io.BytesIO(), record.held_out_path(path)
    np.savez(buffer, index=index, labels=labels.numpy(), probabilities=metrics.probabilities(logits).astype(np.float32))
    if place.exists() and read_bytes(place, record.LARGEST) != buffer.getvalue():
        print(f"the earlier {place.name} is kept as {cli.shown(record.keep_aside(place) or place)}")
    write_atomically(place, buffer.getvalue())
