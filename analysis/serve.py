"""What the page of demo.py lets a client do, and the folder where its pictures lie.

with serve.uploads(folder) as mine:
    names = serve.names("127.0.0.1", local=True)
    page.launch(app_kwargs={"middleware": [Middleware(serve.Gate, uploads=mine, names=names, most=50_000_000)]})

Gradio serves more than the page needs, and trusts what a request says, so the gate stands before all of it.
"""

import contextlib
import ipaddress
import json
import re
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHOW = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(static|assets)/.+"
    r"|/gradio_api/(startup-events|queue/data|upload_progress)"
)
FILE = "/gradio_api/file="
UPLOAD = "/gradio_api/upload"
JOIN = "/gradio_api/queue/join"
ROOM = {"/login": 10_000, JOIN: 100_000, "/gradio_api/component_server/": 1_000_000, UPLOAD: 100_000}  # bytes, most
FULL = 2**30  # bytes of all pictures that lie in the folder
KEPT = 600  # seconds that a picture lies there


@contextlib.contextmanager
def uploads(base: Path) -> Iterator[Path]:
    """Make a folder below base, which is removed at the end. Base must hold nothing else.

    Folders of sessions that were killed are removed first. A lock beside each folder says that its session still runs.
    """
    base.mkdir(parents=True, exist_ok=True)
    folder = base.resolve() / secrets.token_hex(8)
    running, alone = _lock(folder), FileLock(base / "sessions.lock")
    with alone:
        _remove_ended(base)
        running.acquire()
        folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        with alone:
            shutil.rmtree(folder, ignore_errors=True)
            running.release()
            Path(running.lock_file).unlink(missing_ok=True)


def _lock(folder: Path) -> FileLock:
    return FileLock(f"{folder}.lock", blocking=False)


def _remove_ended(base: Path) -> None:
    """Remove the folders whose lock nobody holds; what belongs to someone else stays."""
    for folder in base.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            lock = _lock(folder)
            with contextlib.suppress(OSError), lock:  # filelock.Timeout, for a session that runs, is an OSError
                shutil.rmtree(folder)
                Path(lock.lock_file).unlink()


def names(host: str, local: bool) -> set[str]:
    """List the names, in lower case, under which the page may be asked for when it listens at this host."""
    own = [] if local else [socket.gethostname(), f"{socket.gethostname()}.local", socket.getfqdn()]
    return {name.lower() for name in ("localhost", host, *own)}


def where(local: bool) -> str:
    """Say in a sentence where a picture goes, and how long it lies there."""
    machine = f"the machine that runs this page (`{socket.gethostname()}`)"
    way = f"stays on {machine}" if local else f"goes unencrypted to {machine}"
    return f"It {way}, and is deleted there within {KEPT // 60 + 1} minutes."


class Refused(Exception):
    """A request that goes no further: an HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        """Note the answer."""
        super().__init__(reason)
        self.status = status


class Gate:
    """Lets a request through to the app if the page itself could have sent it; as ASGI middleware."""

    def __init__(self, app: ASGIApp, uploads: Path, names: Collection[str], most: int):
        """uploads: the folder of all files that a request may name, resolved; most: bytes of an uploaded file."""
        self.app, self.uploads, self.names, self.most = app, uploads, names, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by the app or with what is wrong with it."""
        if scope["type"] == "http":
            request = Request(scope, receive)
            try:
                self._check_sender(request)
                self._check_route(request)
                if request.method == "POST" and scope["path"] == JOIN:
                    receive = _again(self._checked(await request.body()), receive)
            except Refused as refused:
                await PlainTextResponse(f"{refused}\n", refused.status)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check_sender(self, request: Request) -> None:
        """Refuse what another web page had a browser send.

        A page can lead its own name to this machine (DNS rebinding), but it cannot have an IP address as its name.
        """
        host = request.headers.get("host", "").lower()
        if not (found := re.fullmatch(r"\[([0-9a-f:.]+)\]|([^:\[\]/@]+)", re.sub(r":\d+$", "", host))):
            raise Refused(400, "no valid Host header")
        name = found[1] or found[2]
        if name not in self.names and not _is_address(name):
            raise Refused(400, "this page is not known by that name: use the IP address of its machine")
        origin = request.headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            raise Refused(403, "sent by another page")

    def _check_route(self, request: Request) -> None:
        """Refuse what the page never asks for, and what is too large."""
        path = request.scope["path"]
        if request.method in ("GET", "HEAD"):
            if not (SHOW.fullmatch(path) or (path.startswith(FILE) and self._holds(path.removeprefix(FILE)))):
                raise Refused(404, "not found")
        elif request.method == "POST" and path in ROOM:
            length = re.fullmatch(r"\d{1,15}", request.headers.get("content-length", ""), re.ASCII)
            if not length or "transfer-encoding" in request.headers:
                raise Refused(411, "a Content-Length is needed")
            if int(length[0]) > ROOM[path] + (self.most if path == UPLOAD else 0):
                raise Refused(413, "too large")
            if path == UPLOAD and int(length[0]) + _tidied(self.uploads) > FULL:
                raise Refused(507, "too many pictures: try again in some minutes")
        else:
            raise Refused(404, "not found")

    def _checked(self, body: bytes) -> bytes:
        """Return the body of a request that names no file outside of the folder; wherever in it the name is."""

        def check(fields: dict[str, Any]) -> dict[str, Any]:
            if fields.get("path") is not None and not self._holds(fields["path"]):
                raise Refused(400, "a file that was not uploaded here, or is no longer")
            return fields

        try:
            json.loads(body, object_hook=check)
        except (ValueError, RecursionError):
            raise Refused(400, "not valid JSON") from None
        return body

    def _holds(self, name: Any) -> bool:
        """Say whether this names a regular file in the folder; links are followed."""
        try:
            path = Path(name).resolve(strict=True)
            return path.is_relative_to(self.uploads) and path.is_file()
        except (TypeError, ValueError, OSError, RuntimeError):  # no text, a null byte, no such file, a circle of links
            return False


def _again(body: bytes, receive: Receive) -> Receive:
    """Let the app receive the body that was received already."""
    messages: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Message:
        return next(messages, None) or await receive()

    return replayed


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _tidied(folder: Path) -> int:
    """Add up the bytes of all files, and remove what Gradio leaves: old empty folders, and uploads that broke off."""
    size, old = 0, time.time() - KEPT
    for place in folder.iterdir():
        with contextlib.suppress(OSError):  # a file may be removed at this moment, and a folder may not be empty
            size += sum(file.lstat().st_size for file in (place.iterdir() if place.is_dir() else [place]))
            if place.lstat().st_mtime < old:
                place.rmdir() if place.is_dir() else place.unlink()
    return size
