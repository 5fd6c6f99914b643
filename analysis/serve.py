"""What the page of demo.py lets a client do, and the folder where its pictures lie.

with serve.uploads(folder) as mine:
    gate = serve.Gate(app, mine, serve.names("127.0.0.1", local=True), most=50_000_000, functions=3)
    with serve.running(gate, socket.create_server(("127.0.0.1", 7860))):
        input("Enter ends it")

Gradio serves more than the page needs, and trusts what a request says, so the gate stands before all of it.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime import cli
from runtime.errors import UserError

SHOW = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(static|assets)/.+"
    r"|/gradio_api/(startup-events|queue/data|upload_progress)"
)
FILE = "/gradio_api/file="
UPLOAD = "/gradio_api/upload"
JOIN = "/gradio_api/queue/join"
DRAWN = "/gradio_api/component_server/"
LOGIN = "/login"
ROOM = {LOGIN: 10_000, JOIN: 100_000, DRAWN: 1_000_000, UPLOAD: 100_000}  # bytes, most
PARTS = {DRAWN: 12, UPLOAD: 1}  # of a form, most; each can become a file
FULL = 2**30  # bytes of all pictures that lie in the folder; half of it for one client
TAKEN = {UPLOAD: 2**14, JOIN: 2**17}  # bytes, counted at least: a small file, or the pictures of an answer
KEPT = 600  # seconds that a picture lies there
SWEEP = 60  # seconds from one removal of old pictures to the next
SLOWEST = 300  # seconds that a request may take to arrive
SILENT = 10  # seconds that a connection may stay without a request
CONNECTIONS, OF_ONE = 128, 48  # at the same time, in all and of one client; macOS has 256 files for a process
LOGINS, LOGINS_OF_ONE = 60, 10  # in a minute
MARK = "fashion-mnist-demo.lock"  # in a session's folder


@contextlib.contextmanager
def uploads(base: Path) -> Iterator[Path]:
    """Make a folder in a session's folder below base, which is removed at the end.

    The folders of sessions that were killed are removed first: a lock in each says whether its session still runs.
    Raises UserError if base is a link or someone else's, who could then exchange what lies there.
    """
    base.mkdir(parents=True, exist_ok=True)
    if base.is_symlink() or (os.name == "posix" and base.stat().st_uid not in (os.geteuid(), cli.ROOT.stat().st_uid)):
        raise UserError(
            f"{cli.shown(base)} is a link or belongs to another user: set GRADIO_TEMP_DIR to another folder"
        )
    folder = base.resolve() / secrets.token_hex(8)
    lock, alone = _lock(folder), FileLock(base / "sessions.lock")
    try:
        with alone:
            _remove_ended(base)
            folder.mkdir(mode=0o700)
            lock.acquire()
            (folder / "pictures").mkdir()
        yield folder / "pictures"
    finally:
        with alone:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / MARK, blocking=False)


def _remove_ended(base: Path) -> None:
    """Remove what killed sessions left: folders named like theirs with a lock like theirs that nobody holds."""
    for folder in base.iterdir():
        ours = re.fullmatch("[0-9a-f]{16}", folder.name) and not folder.is_symlink()
        if ours and (folder / MARK).is_file() and not (folder / MARK).is_symlink():
            with contextlib.suppress(OSError):  # filelock.Timeout, for a session that runs, is an OSError
                with _lock(folder):
                    pass
                shutil.rmtree(folder)


def names(host: str, local: bool) -> set[str]:
    """List the names, in lower case, under which the page may be asked for when it listens at this host."""
    own = [] if local else [socket.gethostname(), f"{socket.gethostname()}.local", socket.getfqdn()]
    return {name.lower() for name in ("localhost", host, *own)}


def where(local: bool) -> str:
    """Say in a sentence where a picture goes, and how long it lies there."""
    machine = f"the machine that runs this page (`{socket.gethostname()}`)"
    way = f"stays on {machine}" if local else f"goes unencrypted to {machine}"
    return f"A picture {way}, and is deleted there within {KEPT // 60 + 1} minutes."


class Refused(Exception):
    """A request that goes no further: an HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        """Note the answer."""
        super().__init__(reason)
        self.status = status


@dataclass
class Use:
    """What a client uses of something: how much, and until when (a time of time.monotonic())."""

    client: str
    amount: int
    end: float = math.inf


class Shares:
    """Something that all clients share, of which one alone can only have a part."""

    def __init__(self, most: int, of_one: int, kept: float, refusal: str):
        """most, of_one: what all and what one may use; kept: seconds that a use still counts after its end."""
        self.most, self.of_one, self.kept, self.refusal = most, of_one, kept, refusal
        self.uses: list[Use] = []
        self.changing = threading.Lock()

    @contextlib.contextmanager
    def use(self, client: str, amount: int = 1) -> Iterator[Use]:
        """Count a use while it lasts, and return it. Raises Refused if it is too much."""
        with self.changing:
            now = time.monotonic()
            self.uses = [use for use in self.uses if use.end > now]
            own = sum(use.amount for use in self.uses if use.client == client)
            if own + amount > self.of_one or sum(use.amount for use in self.uses) + amount > self.most:
                raise Refused(429, self.refusal)
            use = Use(client, amount)
            self.uses.append(use)
        try:
            yield use
        finally:
            use.end = time.monotonic() + self.kept


class Body:
    """Receives the body of a request within a time, and as a form of few parts.

    MultiPartException has Gradio remove the files that it has begun.
    """

    def __init__(self, request: Request, receive: Receive):
        """Note what begins a part: the same as for Gradio's parser."""
        boundary = parse_options_header(request.headers.get("content-type"))[1].get(b"boundary")
        self.begin = b"--" + boundary if boundary is not None else None
        self.receive, self.parts = receive, PARTS.get(request.scope["path"], 0)
        self.until = asyncio.get_running_loop().time() + SLOWEST
        self.begun, self.last, self.whole = 0, b"", False

    async def __call__(self) -> Message:
        """Return the next message. Raises MultiPartException."""
        if self.whole:
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.until):
                message = await self.receive()
        except TimeoutError:
            raise MultiPartException("too slow") from None
        if message["type"] == "http.disconnect":
            raise MultiPartException("broken off")
        self.whole = not message.get("more_body", False)
        if self.begin is not None:
            content = self.last + message.get("body", b"")
            self.begun += content.count(self.begin)
            self.last = content[1 - len(self.begin) :]
            if self.begun > self.parts + 1:  # the end looks the same
                raise MultiPartException("too many parts: send one file at a time")
        return message


class Gate:
    """Lets a request through to the app if the page itself could have sent it; as ASGI middleware."""

    def __init__(self, app: ASGIApp, uploads: Path, names: Collection[str], most: int, functions: int):
        """Note what a request may name.

        uploads: the folder of all files, resolved; names: of this machine; most: bytes of an uploaded file; functions:
        how many the page has.
        """
        self.app, self.uploads, self.names, self.most, self.functions = app, uploads, names, most, functions
        self.disk = Shares(FULL, FULL // 2, KEPT + 2 * SWEEP, "too many pictures: try again in some minutes")
        self.logins = Shares(LOGINS, LOGINS_OF_ONE, 60, "too many logins: try again in a minute")
        self.swept = -math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by the app or with what is wrong with it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self._check_sender(request)
            self._check_route(request)
            with self._counted(request) as use:
                if use and request.scope["path"] in TAKEN:
                    send = _freeing(use, send)
                if request.method == "POST":
                    receive = await self._receiver(request, Body(request, receive))
                await self.app(scope, receive, send)
        except Refused as refused:
            await PlainTextResponse(f"{refused}\n", refused.status)(scope, receive, send)

    def _counted(self, request: Request) -> contextlib.AbstractContextManager[Use | None]:
        """Count what a request uses of what all share."""
        path, client = request.scope["path"], request.client.host if request.client else ""
        if request.method == "POST" and path == LOGIN:
            return self.logins.use(client)
        if request.method == "POST" and path in TAKEN:
            return self.disk.use(client, max(TAKEN[path], int(request.headers["content-length"])))
        return contextlib.nullcontext()

    async def _receiver(self, request: Request, receive: Receive) -> Receive:
        """Return what the app receives the body from; a call of the page's functions is checked first."""
        if request.scope["path"] == UPLOAD and time.monotonic() > self.swept + SWEEP:
            self.swept = time.monotonic()
            await run_in_threadpool(_sweep, self.uploads)
        if request.scope["path"] != JOIN:
            return receive
        try:
            return _again(self._checked(await Request(request.scope, receive).body()), receive)
        except MultiPartException as error:
            raise Refused(408, error.message) from None

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
            if path in PARTS and not request.headers.get("content-type", "").startswith("multipart/form-data;"):
                raise Refused(415, "not a form")
        else:
            raise Refused(404, "not found")

    def _checked(self, body: bytes) -> bytes:
        """Return the body of a request that names no file outside of the folder; wherever in it the name is."""

        def check(fields: dict[str, Any]) -> dict[str, Any]:
            if fields.get("path") is not None and not self._holds(fields["path"]):
                raise Refused(400, "a file that was not uploaded here, or is no longer")
            return fields

        try:
            call = json.loads(body, object_hook=check)
        except (ValueError, RecursionError):
            raise Refused(400, "not valid JSON") from None
        if not isinstance(call, dict) or call.get("fn_index") not in range(self.functions):
            raise Refused(400, "no function of the page")
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


def _freeing(use: Use, send: Send) -> Send:
    """Send what the app answers; what it refused, as without a login, has stored nothing."""

    async def noted(message: Message) -> None:
        if 400 <= message.get("status", 0) < 500:
            use.amount = 0
        await send(message)

    return noted


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _sweep(folder: Path) -> None:
    """Remove what Gradio leaves: old empty folders, and uploads that broke off."""
    for place in folder.iterdir():
        with contextlib.suppress(OSError):  # a file may be removed at this moment, and a folder may not be empty
            if place.lstat().st_mtime < time.time() - KEPT:
                place.rmdir() if place.is_dir() else place.unlink()


class Connection(H11Protocol):
    """A connection, which is closed if it stays silent, or if there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin with it, or close it at once."""
        super().connection_made(transport)
        clients = [other.client and other.client[0] for other in self.connections if isinstance(other, Connection)]
        if len(clients) > CONNECTIONS or clients.count(self.client and self.client[0]) > OF_ONE:
            transport.abort()
        self.loop.call_later(SILENT, self._end_silence)

    def _end_silence(self) -> None:
        if self.cycle is None:
            self.transport.abort()


@contextlib.contextmanager
def running(gate: Gate, listening: socket.socket) -> Iterator[None]:
    """Serve in the background. Who a client is says its connection, and no header."""
    server = uvicorn.Server(
        uvicorn.Config(
            gate,
            http=Connection,
            ws="none",
            proxy_headers=False,
            backlog=64,  # as many are accepted before one can be closed
            log_level="warning",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.01)
        yield
    finally:
        logging.getLogger("uvicorn.error").disabled = True  # a request that is cut off now is no bug
        server.should_exit = True
        thread.join(3)  # it waits for slow pictures, which nobody needs any more; as a daemon it ends with this process
