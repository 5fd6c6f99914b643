"""A web page to try the models on pictures of your own: http://127.0.0.1:7860, reachable from this machine only.

python demo.py                      # the default network
python demo.py A.pt B.pt --port 8000         # several, to compare them
python demo.py --host 0.0.0.0 --password     # for other machines too; asks for the password

needs pip install -r requirements-optional.txt. Pictures go to the machine that this runs on, and no further.
"""

import argparse
import getpass
import importlib.util
import ipaddress
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli, files
from runtime.errors import UserError

if TYPE_CHECKING:
    from analysis.classify import Candidate
    from data import Split

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"

ABBREVIATED = {"resnet": "ResNet"}  # other models' names are abbreviations


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser("Try checkpoints on pictures of your own, in a browser.")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        type=Path,
        default=[cli.PICTURES_CHECKPOINT],
        help="one, or several to compare; the page explains the first one's answers (default: that of predict.py)",
    )
    parser.add_argument("--port", type=cli.whole_number(1, 65_535), default=7860, help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument(
        "--password",
        action="store_true",
        help="ask for a password, or read it from stdin, that the page then asks for",
    )
    cli.add_bare(parser)
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse_args(argv)
    if not importlib.util.find_spec("gradio"):
        raise UserError(f"this needs gradio: {cli.install()}")
    base = uploads_folder()
    files.check_folder(base)
    with listen(args.host, args.port) as listening:
        password = read_password() if args.password else None
        if not password and not is_local(listening):
            print("warning: whoever reaches this machine can use the page: add --password", file=sys.stderr)
        show(args, base, listening, password)
    return 0


def uploads_folder() -> Path:
    """Return the folder below which the pictures of a session lie until it ends."""
    given = os.environ.get("GRADIO_TEMP_DIR")  # others may use it too
    return Path(given, "fashion-mnist-demo") if given else cli.ROOT / ".cache" / "gradio"


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address; a browser that comes too early waits. Raises UserError unless this machine can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port or --host") from None


def is_local(listening: socket.socket) -> bool:
    """Say whether a socket can be reached from this machine only."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def read_password() -> str:
    """Ask for the password, or read one line from a stdin that is no terminal, so that `ps` does not show it.

    Raises UserError for one that is easily guessed.
    """
    given = getpass.getpass("password of the page: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if len(given) < 8:
        raise UserError("the password needs at least 8 characters: type it, or pipe it to this command")
    return given


def load(args: argparse.Namespace) -> tuple[list["Candidate"], "Split", "Split"]:
    """Load the checkpoints, the training images and the test images.

    Raises UserError unless all have the same classes.
    """
    with cli.loading():
        import checkpoint
        import data
        from analysis.classify import candidate
        from runtime.device import pick_device

    device = pick_device(args.device)
    loaded = checkpoint.load_all(args.checkpoints, checkpoint.Bare(args.model, args.mean, args.std))
    infos = [info for _, info in loaded]
    for path, info in zip(args.checkpoints, infos, strict=True):
        if info["classes"] != infos[0]["classes"]:
            raise UserError(f"{cli.shown(path)} and {cli.shown(args.checkpoints[0])} have different classes")
    candidates = [
        candidate(path, model.to(device), info, name)
        for path, (model, info), name in zip(args.checkpoints, loaded, names(args.checkpoints, infos), strict=True)
    ]
    train, test = data.load("train+val", "test", data_dir=args.data_dir, other_data=args.other_data)
    checkpoint.check_classes(args.checkpoints[0], infos[0], train)
    return candidates, train, test


def names(paths: Sequence[Path], infos: Sequence[dict[str, Any]]) -> list[str]:
    """Name networks by their kind and recipe, and by their file where that is unknown or not enough."""
    kinds = [ABBREVIATED.get(info["model"], info["model"].upper()) for info in infos]
    plain = [
        f"{kind}, {info['flags']['recipe']}" if "flags" in info else kind
        for kind, info in zip(kinds, infos, strict=True)
    ]
    return [
        name if "flags" in info and plain.count(name) == 1 else f"{name}, {cli.shown(path)}"
        for name, info, path in zip(plain, infos, paths, strict=True)
    ]


def show(args: argparse.Namespace, base: Path, listening: socket.socket, password: str | None) -> None:
    """Serve the page until a signal ends this process."""
    candidates, train, test = load(args)
    print("computing the training images' features, to find those nearest to a picture …", flush=True)
    from analysis import serve

    local = is_local(listening)
    with serve.uploads(base) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = str(uploads)
        with cli.loading():  # gradio takes seconds, so it comes after everything that can be wrong
            from analysis import page

        built = page.layout(page.Explainer(candidates, train, test), local)
        with serve.running(page.app(built, uploads, serve.names(args.host, local), password), listening):
            login = f"; the user's name is {page.USER}" if password else ""
            everywhere = ipaddress.ip_address(listening.getsockname()[0]).is_unspecified
            host = socket.gethostname() if everywhere else args.host
            host = f"[{host}]" if ":" in host else host
            print(f"http://{host}:{args.port}  (Ctrl-C ends it{login})", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    try:
        cli.run(main)
    except SystemExit as end:
        if threading.active_count() > 1:  # those that still read slow pictures would keep this process
            os._exit(int(end.code or 0))
        raise
