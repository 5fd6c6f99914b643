"""demo.py in a real browser: a picture, a drawing, the examples, and nothing sent anywhere. And what it refuses."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection

import httpx
import pytest
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from PIL import Image, ImageOps
from playwright.sync_api import expect

from analysis import markup, serve
from analysis.classify import NOT_SURE, UNLIKE
from data import CLASSES
from runtime.errors import UserError

EXAMPLES = 6
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PASSWORD = "of the tests"
EXAMPLE, PICTURE, DRAWING = range(3)  # the page's functions
KILLED, OWN = "0123456789abcdef", ("holidays", "20261128" * 2)  # the second is named like a session
NOTHING = [markup.EMPTY, ""]
META = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The file of what the server prints."""
    return tmp_path_factory.mktemp("demo") / "log"


def free():
    """Find a port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder with the sessions' folders; a killed session has left its own there, and the user has put others."""
    folder = tmp_path_factory.mktemp("uploads") / "fashion-mnist-demo"
    for name in (KILLED, *OWN):
        (folder / name).mkdir(parents=True)
        (folder / name / "picture.png").write_text("someone's")
    for name in (KILLED, "holidays"):
        (folder / name / serve.MARK).touch()
    (folder / "a1b2c3d4e5f60718").symlink_to(folder / "holidays")
    return folder


@pytest.fixture(scope="module")
def address(log, uploads):
    """Where the page is served, from the moment on when the server says so; its folder is gone at the end."""
    port = free()
    command = [sys.executable, "demo.py", "--port", str(port), "--data-dir", str(SAMPLE), "--password"]
    options = {"cwd": ROOT, "env": os.environ | {"GRADIO_TEMP_DIR": str(uploads.parent)}, "stdin": subprocess.PIPE}
    with open(log, "w") as out, subprocess.Popen(command, stdout=out, stderr=out, **options) as process:
        process.stdin.write(f"{PASSWORD}\n".encode())
        process.stdin.close()
        try:
            for _ in range(10_000):
                assert process.poll() is None, log.read_text()
                if f"http://127.0.0.1:{port}" in log.read_text():
                    break
                time.sleep(0.01)
            socket.create_connection(("127.0.0.1", port)).close()
            yield f"http://127.0.0.1:{port}"
        finally:  # else the end of the process would be waited for
            process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert {file.name for file in uploads.iterdir()} == {"sessions.lock", "a1b2c3d4e5f60718", *OWN}


@pytest.fixture(scope="module")
def page(browser, address):
    """The page in Chromium, which cannot reach any other address."""
    permissions = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(viewport=DESKTOP, permissions=permissions)
    page, page.outside = context.new_page(), []
    context.route(
        lambda url: not url.startswith((address, "data:", "blob:")),
        lambda route: (page.outside.append(route.request.url), route.abort()),
    )
    context.request.post(f"{address}/login", form={"username": "demo", "password": PASSWORD})
    page.goto(address)
    page.get_by_text("What garment is it?").wait_for(timeout=60_000)
    yield page
    context.close()


def again(page):
    """Load the page anew."""
    page.reload()
    page.get_by_text("What garment is it?").wait_for(timeout=60_000)
    page.wait_for_load_state("networkidle")


def quiet(page):
    """Wait until the page has asked for nothing for a second."""
    asked, before = [], -1

    def note(request):
        asked.append(request)

    page.on("request", note)
    while len(asked) > before:
        before = len(asked)
        page.wait_for_timeout(1000)
    page.remove_listener("request", note)


def answers(page):
    """Wait for the answers, and return them without the sign before each."""
    page.locator(".answer h2").wait_for(timeout=60_000)
    return [re.sub(r"^\W\s*", "", text) for text in page.locator(".answer :is(h2, h3)").all_inner_texts()]


def removed(page):
    """Remove the picture, and wait until its answers are gone."""
    page.get_by_label("Remove Image").click()
    expect(page.locator(".answer h2")).to_have_count(0, timeout=60_000)


def own_picture(sample, path):
    """Save a test image as a user might have it."""
    image = Image.fromarray(sample["test"].images[0].numpy()).resize((200, 200), Image.Resampling.NEAREST)
    ImageOps.expand(ImageOps.invert(image), 30, fill=255).save(path, quality=80)
    return path


COPY = """async content => navigator.clipboard.write(
    [new ClipboardItem({"image/png": await (await fetch("data:image/png;base64," + content)).blob()})])"""


def test_a_click_on_an_example_answers_it_and_leaves_the_page_working(page, sample, log, tmp_path):
    again(page)
    offered = page.locator(".examples button")
    assert offered.count() == EXAMPLES
    for number in (0, EXAMPLES - 1, 0):
        offered.nth(number).click()
        page.get_by_label("Remove Image").wait_for(timeout=60_000)
        assert set(answers(page)) <= {*CLASSES, NOT_SURE, UNLIKE}
        removed(page)
    picture, right = own_picture(sample, tmp_path / "own.png"), [CLASSES[sample["test"].labels[0]]]
    page.set_input_files("input[type=file] >> nth=0", picture)
    assert answers(page) == right
    removed(page)
    assert page.get_by_text("A picture stays on the machine that runs this page").count() == 1
    page.evaluate(COPY, base64.b64encode(picture.read_bytes()).decode())
    page.get_by_label("Paste from clipboard").click()
    assert answers(page) == right
    assert page.get_by_text("Error", exact=True).count() == 0
    assert "Traceback" not in log.read_text()
    assert page.outside == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_picture_is_answered_at_the_top_and_explained(page, sample, size, tmp_path):
    page.set_viewport_size(size)
    again(page)
    page.set_input_files("input[type=file] >> nth=0", own_picture(sample, tmp_path / "own.jpg"))
    assert answers(page) == [CLASSES[sample["test"].labels[0]]]
    assert page.locator(".answer h2").bounding_box()["y"] < 200
    assert page.get_by_text(re.compile(r"^\d+\.\d%$")).count() == 3  # probabilities
    boxes = [each.bounding_box() for each in page.locator(".seen img").all()]
    assert len(boxes) == 3
    assert len({box["y"] for box in boxes}) == 1
    assert min(box["width"] for box in boxes) >= 90
    assert page.locator(".near img").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.outside == []
    page.set_viewport_size(DESKTOP)


def test_a_file_that_is_not_a_picture_is_an_error_on_the_page(page, log, tmp_path):
    (tmp_path / "none.png").write_text("not a picture")
    again(page)
    page.set_input_files("input[type=file] >> nth=0", tmp_path / "none.png")
    page.get_by_text("A text file, not a picture.").wait_for(timeout=60_000)
    assert answers(page) == ["No answer"]
    assert "Traceback" not in log.read_text()


def test_a_drawing_is_answered_and_cleared(page):
    again(page)
    page.get_by_role("tab", name="Drawing").click()
    page.get_by_label("Brush", exact=True).click()
    page.wait_for_timeout(1000)
    box = page.locator("canvas").first.bounding_box()
    x, y, w, h = (box[key] for key in ("x", "y", "width", "height"))
    page.mouse.move(x + w / 2, y + h * 0.2)
    page.mouse.down()
    page.mouse.move(x + w / 2, y + h * 0.8, steps=3)
    page.mouse.up()
    assert len(answers(page)) == 1
    quiet(page)  # Gradio may send a stroke after the clearing that followed it
    page.get_by_label("Clear canvas").click()
    expect(page.locator(".answer h2")).to_have_count(0, timeout=60_000)
    assert page.get_by_text("Error", exact=True).count() == 0
    assert page.outside == []


@pytest.fixture(scope="module")
def client(address):
    """Someone who has logged in, and sends what no browser would."""
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.post("/login", data={"username": "demo", "password": PASSWORD}).is_success
        yield client


def upload(client, content):
    """Upload a file; returns its path."""
    return client.post("/gradio_api/upload", files={"files": ("own.jpg", content)}).json()[0]


def ask(client, number, value=None, session=None, **fields):
    """Call a function of the page: the HTTP status and, of a call that is taken, the last message."""
    session = session or os.urandom(8).hex()
    content = {
        "data": [] if number == EXAMPLE else [value],
        "fn_index": number,
        "session_hash": session,
        **fields,
    }
    response = client.post("/gradio_api/queue/join", json=content)
    if not response.is_success:
        return response.status_code, None
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as messages:
        for line in messages.iter_lines():
            if '"process_completed"' in line:
                return 200, json.loads(line.removeprefix("data:"))["output"]


def jpeg(image, **options):
    """Save an image as a JPEG file's bytes."""
    content = io.BytesIO()
    image.save(content, "JPEG", **options)
    return content.getvalue()


def test_a_request_can_name_only_what_was_uploaded(client, uploads, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    Image.new("L", (50, 50), 255).save(tmp_path / "secret.png")
    path = upload(client, jpeg(Image.linear_gradient("L")))
    folder = os.path.dirname(os.path.dirname(path))
    os.symlink(tmp_path / "secret.png", f"{folder}/link.png")
    outside = [tmp_path / "secret.png", f"{folder}/../../../{tmp_path.name}/secret.png", f"{folder}/link.png"]
    others = [
        "/dev/zero",
        tmp_path / "pipe",
        "/proc/self/environ",
        folder,
        "",
        "\0",
        "a" * 5000,
        "docs/figures/seen.png",
    ]
    addresses = [
        "http://127.0.0.1:1/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,",
    ]
    for name in [*map(str, outside + others), *addresses, 5, True, [path], {"path": "/dev/zero"}]:
        files = [{"path": name}, {"path": name, **META}, {"path": name, "is_stream": True, **META}]
        for file in files if name in outside else files[:1]:
            places = [(PICTURE, file), (DRAWING, {"composite": file}), (DRAWING, {"layers": [file]})]
            assert {ask(client, *place)[0] for place in places} == {400}, file
        assert ask(client, PICTURE, None, event_data=[{"value": {"path": name}}])[0] == 400
    for url in addresses:
        assert ask(client, PICTURE, {"url": url})[1]["data"] == NOTHING
    for file in ({"path": path}, {"path": path, **META}):
        assert ask(client, PICTURE, file)[1]["data"] != NOTHING
    assert ask(client, DRAWING, {"composite": file})[1]["data"] != NOTHING


def test_nothing_is_served_but_the_page(client, address):
    folder = "/gradio_api/file="
    files = ["/etc/passwd", str(ROOT / "README.md"), "https://example.com", "http://127.0.0.1:1", "/dev/zero"]
    hidden = [folder + name for name in files] + ["/gradio_api/proxy=https://example.com", "/monitoring/summary"]
    hidden += ["/gradio_api/info", "/gradio_api/vibe-code", "/gradio_api/deep_link", "/gradio_api/file/etc/passwd"]
    assert {client.get(path).status_code for path in hidden} == {404}
    calls = ["run/answer", "api/answer", "call/answer", "process_recording", "vibe-edit", "vibe-code", "cancel"]
    assert {client.post(f"/gradio_api/{call}", json={"data": []}).status_code for call in calls} == {404}
    assert {client.request(method, "/").status_code for method in ("PUT", "DELETE", "OPTIONS", "PATCH")} == {404}
    with httpx.Client(base_url=address) as stranger:
        assert stranger.post("/login", data={"username": "demo", "password": "guessed it"}).status_code == 400
        assert [stranger.get(path).status_code for path in ("/config", "/gradio_api/queue/data")] == [401, 401]
        assert (
            ask(stranger, PICTURE, None)[0] == stranger.post("/gradio_api/upload", files={"a": b""}).status_code == 401
        )


def test_other_web_pages_cannot_ask(client, address):
    port = address.rsplit(":", 1)[1]
    for host in (f"evil.com:{port}", "127.0.0.1.evil.com", "", "[", "a@127.0.0.1", "0x7f.1", f"127.0.0.1:{port}:1"):
        assert client.get("/", headers={"Host": host}).status_code == 400, host
    for host in (f"localhost:{port}", "LOCALHOST", f"[::1]:{port}", "192.0.2.1"):
        assert client.get("/", headers={"Host": host}).status_code == 200, host
    for origin in ("http://evil.com", "null", "http://[", f"http://localhost:{port}"):
        assert client.post("/gradio_api/upload", headers={"Origin": origin}).status_code == 403, origin
    assert socket.gethostname().lower() in serve.names("0.0.0.0", local=False)
    assert serve.names("127.0.0.1", local=True) == {"localhost", "127.0.0.1"}


def test_no_request_is_larger_than_it_needs_to_be(client, address):
    sizes = {"upload": 60_000_000, "queue/join": 200_000, "component_server/": 2_000_000}
    for call, size in sizes.items():
        connection = HTTPConnection(address.removeprefix("http://"))
        connection.request("POST", f"/gradio_api/{call}", headers={"Content-Length": size})
        assert connection.getresponse().status == 413
        connection.close()
        assert client.post(f"/gradio_api/{call}", content=iter([b"a"])).status_code == 411  # in chunks, without an end
    for content in (b'{"data": ' + b"[" * 90_000, b'{"data": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", b"{"):
        assert client.post("/gradio_api/queue/join", content=content).status_code == 400


def test_drawings_that_wait_take_little_memory(client):
    config = client.get("/config").json()
    number = next(part["id"] for part in config["components"] if "accept_blobs" in part["props"].get("server_fns", []))
    gradient = jpeg(Image.linear_gradient("L"))

    def send(name, kind="composite", index="null"):
        fields = {"id": name, "type": kind, "index": index, "fn_name": "accept_blobs", "session_hash": "a"}
        content = {"files": {"file": ("a.jpg", gradient)}, "data": fields | {"component_id": str(number)}}
        assert client.post("/gradio_api/component_server/", **content).is_success

    send("a", "layer", "2000000000")  # a list of so many layers would take 16 GB
    for name in range(70):
        send(str(name))
    for name, session in (("0", "a"), ("69", "b")):  # too old, someone else's
        assert ask(client, DRAWING, {"id": name}, session)[1]["data"] == NOTHING
    assert ask(client, DRAWING, {"id": "69"}, "a")[1]["data"] != NOTHING


def test_an_upload_is_one_file_and_leaves_nothing_if_it_breaks_off(client, address, uploads):
    def count():
        return len(list(uploads.glob("*/pictures/*")))

    before = count()
    for fields in ([("files", ("a", b"a"))] * 2, [("files", ("a", b"a")), ("files", (None, b"text"))]):
        assert client.post("/gradio_api/upload", files=fields).status_code == 400
    connection = HTTPConnection(address.removeprefix("http://"))
    cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    form = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": 1000, "Cookie": cookies}
    connection.request("POST", "/gradio_api/upload", headers=form)
    connection.send(b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nbegun')
    for wanted in (before + 1, before):
        end = time.monotonic() + 10
        while count() != wanted and time.monotonic() < end:
            time.sleep(0.01)
        assert count() == wanted
        connection.close()


def test_nonsense_is_refused_without_a_traceback(client, log):
    for content in ({"fn_index": 3}, {"fn_index": 99}, {"fn_index": "x"}, {}, [], {"fn_index": [1]}):
        assert client.post("/gradio_api/queue/join", json=content).status_code == 400
    assert client.post("/gradio_api/component_server/", json={"component_id": 5}).status_code == 415
    for index in (99, -1, "x", [1]):
        assert ask(client, EXAMPLE, event_data={"index": index})[1]["error"] == "no such picture"
    assert ask(client, EXAMPLE, event_data=[0])[1]["error"] == "no such picture"
    assert "Traceback" not in log.read_text()


def sent(gate, path, sizes, client="192.0.2.1"):
    """Send requests of these sizes through a gate, all at once: their statuses."""

    async def send():
        transport = httpx.ASGITransport(gate, client=(client, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as someone:
            form = {"Content-Type": "multipart/form-data; boundary=x"}
            posts = [someone.post(path, headers=form | {"Content-Length": str(size)}) for size in sizes]
            return [response.status_code for response in await asyncio.gather(*posts)]

    with ThreadPoolExecutor() as other:  # the browser's thread has a loop already
        return other.submit(asyncio.run, send()).result()


async def slow_app(scope, receive, send, status=200):
    """Answer after all requests have come."""
    await asyncio.sleep(0.1)
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body"})


def test_the_folder_of_pictures_never_holds_too_many(tmp_path):
    large, small = 2**26, 10

    def gate(app=slow_app):
        return serve.Gate(app, tmp_path, {"localhost"}, most=large, functions=3)

    full = gate()  # the statuses of requests at the same time, and of one that comes after them
    assert sorted(sent(full, serve.UPLOAD, [large] * 9)) == [200] * 8 + [429]
    assert sent(full, serve.UPLOAD, [small]) == [429]
    assert sorted(sent(full, serve.UPLOAD, [large] * 9, "192.0.2.2")) == [200] * 8 + [429]
    assert sent(full, serve.UPLOAD, [small], "192.0.2.3") == [429]
    nearly = [large] * 7 + [large - 2**13]
    assert sent(gate(), serve.UPLOAD, [*nearly, small]) == [200] * 8 + [429]  # a file takes more than its bytes
    strangers = gate(partial(slow_app, status=401))
    assert [sent(strangers, serve.UPLOAD, [large] * 8).count(401) for _ in range(2)] == [8, 8]  # nothing is stored
    for number in range(3):
        (tmp_path / f"of a broken upload {number}").touch()
        (tmp_path / f"emptied {number}").mkdir()
    for place in tmp_path.glob("* [12]"):
        os.utime(place, (0, 0))
    assert sent(gate(), serve.UPLOAD, [small]) == [200]
    assert {file.name for file in tmp_path.iterdir()} == {"of a broken upload 0", "emptied 0"}


def test_a_password_cannot_be_guessed_quickly(tmp_path):
    gate = serve.Gate(slow_app, tmp_path, {"localhost"}, most=0, functions=3)
    assert sent(gate, serve.LOGIN, [20] * 50).count(200) == 10
    assert sum(sent(gate, serve.LOGIN, [20] * 50, f"192.0.2.{number}").count(200) for number in range(2, 9)) == 50
    gate.logins.uses.clear()  # a minute later
    assert sent(gate, serve.LOGIN, [20]) == [200]


def test_uses_are_forgotten():
    shares = serve.Shares(3, 2, 0, "too much")
    with shares.use("a"), shares.use("a"), shares.use("b"):
        for client in "ac":
            with pytest.raises(serve.Refused, match="too much"), shares.use(client):
                pass
    with shares.use("c"):
        assert [use.client for use in shares.uses] == ["c"]


def test_silent_connections_and_false_addresses_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "SILENT", 0.5)
    monkeypatch.setattr(serve, "OF_ONE", 5)
    seen = []

    async def app(scope, receive, send):
        if scope["type"] == "http":
            seen.append(scope["client"][0])
            await slow_app(scope, receive, send)

    listening = socket.create_server(("127.0.0.1", 0))
    gate = serve.Gate(app, tmp_path, {"localhost"}, most=0, functions=3)
    with serve.running(gate, listening):
        silent = [socket.create_connection(listening.getsockname()) for _ in range(8)]
        silent[0].send(b"GET / HTTP/1.1\r\nHost: ")  # begun, but never whole
        time.sleep(0.2)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{listening.getsockname()[1]}")
        for connection in silent:
            connection.settimeout(10)
            assert connection.recv(1) == b"" if connection in silent[:5] else True
            connection.close()
        false = {"X-Forwarded-For": "192.0.2.1"}
        assert httpx.get(f"http://127.0.0.1:{listening.getsockname()[1]}", headers=false).is_success
    assert seen == ["127.0.0.1"]


def test_a_slow_picture_of_one_does_not_stop_another(client, address):
    content = jpeg(Image.new("L", (2000, 2000), 128), progressive=True)
    last = content.rindex(b"\xff\xda")  # a scan, which takes as much time each time it is repeated
    slow = {"path": upload(client, content[:last] + 500 * content[last:-2] + content[-2:])}
    quick, ends = {"path": upload(client, jpeg(Image.linear_gradient("L")))}, {}

    def answer(name, someone, file):
        ends[name] = ask(someone, PICTURE, file)[1], time.monotonic()

    false = httpx.Client(base_url=address, timeout=60, cookies=client.cookies, headers={"X-Forwarded-For": "192.0.2.1"})
    busy = [threading.Thread(target=answer, args=(number, client, slow)) for number in range(3)]
    for thread in busy:
        thread.start()
    time.sleep(0.2)
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2" if sys.platform == "linux" else None)
    with httpx.Client(base_url=address, timeout=60, transport=elsewhere, cookies=client.cookies) as other:
        answer("quick", other, quick)
    assert "try again" in ask(false, PICTURE, quick)[1]["data"][0]  # the fourth picture of the first address
    for thread in busy:
        thread.join()
    assert ends["quick"][0]["data"]
    assert ends["quick"][1] < min(ends[number][1] for number in range(3))


def test_a_session_removes_its_pictures_and_those_of_killed_ones_alone(uploads, address, tmp_path):
    assert not (uploads / KILLED).exists()
    assert all((uploads / name / "picture.png").exists() for name in OWN)
    (tmp_path / "link").symlink_to(uploads)
    with pytest.raises(UserError, match="is a link"), serve.uploads(tmp_path / "link"):
        pass
    code = "import sys, time; from pathlib import Path; from analysis import serve; from runtime import cli\n"
    code += "def main():\n with serve.uploads(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)\n"
    command = [sys.executable, "-c", code + "cli.run(main)", str(tmp_path / "base")]
    run = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **run) as ended, subprocess.Popen(command, **run) as killed:
        folders = [process.stdout.readline().strip() for process in (ended, killed)]
        for folder in folders:
            (tmp_path / folder / "picture.png").write_text("someone's")
        killed.kill()
        killed.wait()
        with serve.uploads(tmp_path / "base") as mine:
            assert [os.path.exists(folder) for folder in folders] == [True, False]
            ended.send_signal(signal.SIGHUP)
            assert ended.wait() == 128 + signal.SIGHUP
            assert mine.exists()
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["sessions.lock"]


def test_who_can_reach_the_page_is_said(tmp_path):
    finished = run_script("demo.py", tmp_path / "none.pt", "--data-dir", SAMPLE, "--host", "0.0.0.0", "--port", free())
    assert re.match("warning: .*--password", finished.stderr)
    assert "goes unencrypted to the machine" in serve.where(local=False)


def test_bad_arguments_get_one_clear_line(address):
    assert_one_line_error(run_script("demo.py", "--password", "--port", free()), "at least 8 characters")
    port = address.rsplit(":", 1)[1]
    assert_one_line_error(run_script("demo.py", "--port", "0"), "--port")
    assert_one_line_error(run_script("demo.py", "none.pt", "--port", port), "choose another --port")  # noticed first
    assert_one_line_error(run_script("demo.py", "--host", "no.such.host"), "--host")
    assert_one_line_error(run_script("demo.py", "none.pt", "--data-dir", SAMPLE), "none.pt: no such file")
