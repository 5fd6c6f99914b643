"""Convert a model to ONNX, and compare the result with PyTorch.

content = to_onnx(model, info)
print(largest_gap(model, session_of(content), test.images))
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import onnxruntime
import torch

import data

onnxruntime.disable_telemetry_events()  # some builds send them

BATCHES = (1, 256)
REPEATS = 30


class FromPixels(torch.nn.Module):
    """A model that takes uint8 pixels (n, 28, 28)."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute logits float32 (n, 10)."""
        return self.model(data.normalise(pixels))


def to_onnx(model: torch.nn.Module, info: Mapping[str, Any]) -> bytes:
    """Convert a model to an ONNX file that takes uint8 pixels (n, 28, 28) and returns logits float32 (n, 10).

    info: of checkpoint.load. The metadata hold its "classes" as a JSON list, and as "checkpoint_sha256" its "sha256".
    """
    program = torch.onnx.export(
        FromPixels(model).eval(),
        (torch.zeros(2, 28, 28, dtype=torch.uint8),),
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        dynamo=True,
        verbose=False,
    )
    assert program, "torch.onnx.export returns a program where dynamo=True"
    props = {"classes": json.dumps(list(info["classes"])), "checkpoint_sha256": info["sha256"]}
    program.model.metadata_props.update(props)
    return program.model_proto.SerializeToString()


def session_of(content: bytes) -> onnxruntime.InferenceSession:
    """Open the bytes of an ONNX file with ONNX Runtime, on the CPU."""
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def largest_gap(model: torch.nn.Module, session: onnxruntime.InferenceSession, images: torch.Tensor) -> float:
    """Compute the largest difference of a logit between PyTorch and ONNX Runtime; images: uint8 (n, 28, 28)."""
    return max(
        float((_in_pytorch(model, part) - torch.from_numpy(session.run(None, {"pixels": part.numpy()})[0])).abs().max())
        for part in images.split(BATCHES[-1])
    )


def speeds(
    model: torch.nn.Module, session: onnxruntime.InferenceSession, images: torch.Tensor
) -> dict[int, tuple[float, float]]:
    """Measure median seconds of PyTorch and of ONNX Runtime, taking turns, by batch size."""
    result = {}
    for batch in BATCHES:
        part = images[:batch]
        turns = (partial(_in_pytorch, model, part), partial(session.run, None, {"pixels": part.numpy()}))
        times = [[_seconds(turn) for turn in turns] for _ in range(REPEATS)]
        pytorch, runtime = map(median, zip(*times, strict=True))
        result[batch] = (pytorch, runtime)
    return result


def _in_pytorch(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(data.normalise(images))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
