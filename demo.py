"""A web page to try the models on pictures of your own: http://127.0.0.1:7860, reachable from this machine only.

python demo.py                      # the shipped CNN and MLP side by side
python demo.py A.pt B.pt --port 8000

needs pip install -r requirements-optional.txt. No picture leaves this machine, and no network is needed.
"""

import argparse
import importlib.util
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import cli, files
from runtime.errors import UserError

if TYPE_CHECKING:
    from analysis.classify import Candidate
    from data import Split

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GRADIO_TEMP_DIR", str(cli.ROOT / ".cache" / "gradio"))

DEFAULTS = [cli.DEFAULT_CHECKPOINT, cli.CHECKPOINTS / "best_mlp_fmnist.pt"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser("Try checkpoints on pictures of your own, in a browser.")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        type=Path,
        default=DEFAULTS,
        help="one or more to compare (default: the shipped CNN and MLP); the page explains the first one's answers",
    )
    parser.add_argument("--port", type=cli.whole_number(1, 65_535), default=7860, help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    cli.add_bare(parser)
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse_args(argv)
    if not importlib.util.find_spec("gradio"):
        raise UserError(f"this needs gradio: {cli.install()}")
    files.check_folder(os.environ["GRADIO_TEMP_DIR"])
    check_address(args.host, args.port)
    candidates, train, test = load(args)
    print("computing the training images' features, to find those nearest to a picture …", flush=True)
    import gradio  # takes seconds, so after everything that can be wrong

    from analysis import page

    built = page.layout(page.Explainer(candidates, train), test)
    try:
        built.launch(
            server_name=args.host,
            server_port=args.port,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise UserError(f"{error}: choose another --port") from None
    print(f"http://{args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
    threading.Event().wait()
    return 0


def check_address(host: str, port: int) -> None:
    """Raise UserError unless this machine can listen at the address."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port or --host") from None


def load(args: argparse.Namespace) -> tuple[list["Candidate"], "Split", "Split"]:
    """Load the checkpoints, the training images and the test images.

    Raises UserError unless all have the same classes.
    """
    import checkpoint
    import data
    from analysis.classify import Candidate, temperature_of
    from runtime.device import pick_device

    device = pick_device(args.device)
    candidates, infos = [], []
    loaded = checkpoint.load_all(args.checkpoints, checkpoint.Bare(args.model, args.mean, args.std))
    for path, (model, info) in zip(args.checkpoints, loaded, strict=True):
        candidates.append(Candidate(f"{info['model']}, {path.name}", model.to(device), temperature_of(path)))
        infos.append(info)
        if info["classes"] != infos[0]["classes"]:
            raise UserError(f"{cli.shown(path)} and {cli.shown(args.checkpoints[0])} have different classes")
    train, test = data.load("train+val", "test", data_dir=args.data_dir, other_data=args.other_data)
    checkpoint.check_classes(args.checkpoints[0], infos[0], train)
    return candidates, train, test


if __name__ == "__main__":
    cli.run(main)
