"""Write a checkpoint as ONNX: uint8 pixels in, logits out, for any batch size; and check it against PyTorch.

python export.py checkpoints/best_cnn_fmnist.pt       # checkpoints/best_cnn_fmnist.onnx

needs pip install -r requirements-optional.txt.
"""

import importlib.util
import io
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import cli

TOLERANCE = 1e-4  # of a logit, between PyTorch and ONNX Runtime
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 256)
REPEATS = 30


def parse_args(argv=None):
    parser = cli.Parser("Write a checkpoint as ONNX.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument(
        "--output",
        metavar="FILE.onnx",
        type=cli.file_to_write(".onnx"),
        help="where to write (default: beside the checkpoint)",
    )
    cli.add_data_dir(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import data

    output = args.output or args.checkpoint.with_suffix(".onnx")
    if output.exists() and not args.output:
        raise data.UserError(f"{cli.shown(output)} is there already: to replace it, name it with --output")
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        raise data.UserError(f"this needs {', '.join(missing)}: pip install -r requirements-optional.txt")
    import checkpoint

    model, info = checkpoint.load(args.checkpoint)
    (test,) = data.load("test", data_dir=args.data_dir)
    content = to_onnx(model)
    session = open_session(content)
    gap = largest_gap(model, session, test.images)
    if gap > TOLERANCE:
        print(f"export.py: ONNX Runtime and PyTorch differ by {gap:.1e}: nothing is written", file=sys.stderr)
        return 1
    checkpoint.write_atomically(output, content)
    print(f"{cli.shown(output)}: the {info['model']}, uint8 pixels (n, 28, 28) in, float32 logits (n, 10) out")
    print(f"the largest gap to PyTorch's logits on {len(test.images):,} test images is {gap:.1e}")
    for batch, (ours, theirs) in speeds(model, session, test.images).items():
        print(f"batch of {batch:>3}: PyTorch {1000 * ours:.2f} ms, ONNX Runtime {1000 * theirs:.2f} ms")
    return 0


def to_onnx(model):
    """The bytes of an ONNX file that takes uint8 pixels (n, 28, 28) and gives logits float32 (n, 10)."""
    import torch

    import data

    class FromPixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model(data.normalise(pixels))

    program = torch.onnx.export(
        FromPixels().eval(),
        (torch.zeros(2, 28, 28, dtype=torch.uint8),),
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        dynamo=True,
        verbose=False,
    )
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def open_session(content):
    import onnxruntime

    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def largest_gap(model, session, images):
    """The largest difference of a logit between PyTorch and ONNX Runtime; images: uint8 (n, 28, 28)."""
    return max(
        float(abs(in_pytorch(model, part).numpy() - session.run(None, {"pixels": part.numpy()})[0]).max())
        for part in images.split(BATCHES[-1])
    )


def in_pytorch(model, images):
    import torch

    import data

    with torch.inference_mode():
        return model(data.normalise(images))


def speeds(model, session, images):
    """Median seconds of PyTorch and of ONNX Runtime, taking turns, by batch size."""
    result = {}
    for batch in BATCHES:
        part = images[:batch]
        turns = (partial(in_pytorch, model, part), partial(session.run, None, {"pixels": part.numpy()}))
        times = [[seconds(turn) for turn in turns] for _ in range(REPEATS)]
        result[batch] = tuple(map(median, zip(*times, strict=True)))
    return result


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main)
