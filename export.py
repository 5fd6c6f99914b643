"""Write a checkpoint as ONNX: uint8 pixels in, logits out, for any batch size; and check it against PyTorch.

python export.py checkpoints/best_cnn_fmnist.pt       # checkpoints/best_cnn_fmnist.onnx

needs pip install -r requirements-optional.txt.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from runtime import cli, files
from runtime.errors import UserError

TOLERANCE = 1e-4  # of a logit, between PyTorch and ONNX Runtime
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser("Write a checkpoint as ONNX.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument(
        "--output",
        metavar="FILE.onnx",
        type=cli.file_to_write(".onnx"),
        help="where to write (default: beside the checkpoint)",
    )
    cli.add_bare(parser)
    cli.add_data_dir(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return 1 if ONNX Runtime and PyTorch disagree, else 0."""
    args = parse_args(argv)
    output = args.output or args.checkpoint.with_suffix(".onnx")
    if output.exists() and output not in (args.output, args.checkpoint):  # loading refuses the latter
        raise UserError(f"{cli.shown(output)} is there already: to replace it, name it with --output")
    files.check_file(output)
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        raise UserError(f"this needs {', '.join(missing)}: {cli.install()}")
    with cli.loading():
        import checkpoint
        import data
        from analysis import onnx

    ((model, info),) = checkpoint.load_all([args.checkpoint], checkpoint.Bare(args.model, args.mean, args.std))
    (test,) = data.load("test", data_dir=args.data_dir, other_data=args.other_data)
    checkpoint.check_classes(args.checkpoint, info, test)
    content = onnx.to_onnx(model, info)
    session = onnx.session_of(content)
    gap = onnx.largest_gap(model, session, test.images)
    if not gap <= TOLERANCE:  # NaN is not
        print(f"export.py: ONNX Runtime and PyTorch differ by {gap:.1e}: nothing is written", file=sys.stderr)
        return 1
    files.write_atomically(output, content)
    print(f"{cli.shown(output)}: the {info['model']}, uint8 pixels (n, 28, 28) in, float32 logits (n, 10) out")
    if checkpoint.is_bare(info):
        print(f"inside it the pixels are normalised by {checkpoint.normalisation(info)}")
    print(f"the largest gap to PyTorch's logits on {len(test.images):,} test images is {gap:.1e}")
    for batch, (ours, theirs) in onnx.speeds(model, session, test.images).items():
        print(f"batch of {batch:>3}: PyTorch {1000 * ours:.2f} ms, ONNX Runtime {1000 * theirs:.2f} ms")
    return 0


if __name__ == "__main__":
    cli.run(main)
