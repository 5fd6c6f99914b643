"""demo.py in a real browser: a picture, a drawing, the examples, and nothing sent anywhere."""

import base64
import re
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from PIL import Image, ImageOps
from playwright.sync_api import expect

from data import CLASSES

EXAMPLES = 6


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The file of what the server prints."""
    return tmp_path_factory.mktemp("demo") / "log"


@pytest.fixture(scope="module")
def address(log):
    """Where the page is served, from the moment on when the server says so."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "demo.py", "--port", str(port), "--data-dir", str(SAMPLE)]
    with open(log, "w") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as process:
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


@pytest.fixture(scope="module", params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, address):
    """The page in Chromium, which cannot reach any other address."""
    width, height = request.param
    permissions = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(viewport={"width": width, "height": height}, permissions=permissions)
    page, page.outside = context.new_page(), []
    context.route(
        lambda url: not url.startswith((address, "data:", "blob:")),
        lambda route: (page.outside.append(route.request.url), route.abort()),
    )
    page.goto(address)
    page.get_by_text("What garment is it?").wait_for(timeout=60_000)
    yield page
    context.close()


def again(page):
    """Load the page anew."""
    page.reload()
    page.get_by_text("What garment is it?").wait_for(timeout=60_000)
    page.wait_for_timeout(1000)


def answers(page):
    """Wait for the answer of each model, and return them."""
    page.locator("h2[data-testid=label-output-value]").nth(1).wait_for(timeout=60_000)
    return [text.strip() for text in page.locator("h2[data-testid=label-output-value]").all_inner_texts()]


def removed(page):
    """Remove the picture, and wait until its answers are gone."""
    page.get_by_label("Remove Image").click()
    expect(page.locator("h2[data-testid=label-output-value]")).to_have_count(0, timeout=60_000)


def own_picture(sample, path):
    """Save a test image as a user might have it."""
    image = Image.fromarray(sample["test"].images[0].numpy()).resize((200, 200), Image.Resampling.NEAREST)
    ImageOps.expand(ImageOps.invert(image), 30, fill=255).save(path, quality=80)
    return path


COPY = """async content => navigator.clipboard.write(
    [new ClipboardItem({"image/png": await (await fetch("data:image/png;base64," + content)).blob()})])"""


def test_a_click_on_an_example_answers_it_and_leaves_the_page_working(page, sample, log, tmp_path):
    again(page)
    offered = page.locator("button.gallery-item")
    assert offered.count() == EXAMPLES
    for number in (*range(EXAMPLES), 0):
        offered.nth(number).click()
        page.get_by_label("Remove Image").wait_for(timeout=60_000)
        assert set(answers(page)) <= set(CLASSES)
        removed(page)
    picture, right = own_picture(sample, tmp_path / "own.png"), [CLASSES[sample["test"].labels[0]]] * 2
    page.set_input_files("input[type=file] >> nth=0", picture)
    assert answers(page) == right
    removed(page)
    page.evaluate(COPY, base64.b64encode(picture.read_bytes()).decode())
    page.get_by_label("Paste from clipboard").click()
    assert answers(page) == right
    assert page.get_by_text("Error", exact=True).count() == 0
    assert "Traceback" not in log.read_text()
    assert page.outside == []


def test_a_picture_is_answered_by_both_models_and_explained(page, sample, tmp_path):
    again(page)
    page.set_input_files("input[type=file] >> nth=0", own_picture(sample, tmp_path / "own.jpg"))
    assert answers(page) == [CLASSES[sample["test"].labels[0]]] * 2
    assert page.get_by_text(re.compile(r"^\d+%$")).count() == 20  # probabilities
    page.locator(".thumbnail-lg, .thumbnail-item").nth(7).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.outside == []


def test_a_file_that_is_not_a_picture_is_an_error_on_the_page(page, log, tmp_path):
    (tmp_path / "none.png").write_text("not a picture")
    again(page)
    page.set_input_files("input[type=file] >> nth=0", tmp_path / "none.png")
    page.get_by_text("not a picture that Pillow can open").wait_for(timeout=60_000)
    assert "Traceback" not in log.read_text()


def test_a_drawing_is_answered_and_cleared(page):
    again(page)
    page.get_by_role("tab", name="Drawing").click()
    page.get_by_label("Brush", exact=True).click()
    page.wait_for_timeout(1000)
    box = page.locator("canvas").first.bounding_box()
    x, y, w, h = (box[key] for key in ("x", "y", "width", "height"))
    for column in (40, 50, 60):  # a pair of trousers, roughly
        page.mouse.move(x + w * column / 100, y + h * 0.2)
        page.mouse.down()
        page.mouse.move(x + w * column / 100, y + h * 0.8, steps=3)
        page.mouse.up()
    assert len(answers(page)) == 2
    page.get_by_label("Clear canvas").click()
    expect(page.locator("h2[data-testid=label-output-value]")).to_have_count(0, timeout=60_000)
    assert page.get_by_text("Error", exact=True).count() == 0
    assert page.outside == []


def test_bad_arguments_get_one_clear_line(address):
    port = address.rsplit(":", 1)[1]
    assert_one_line_error(run_script("demo.py", "--port", "0"), "--port")
    assert_one_line_error(run_script("demo.py", "none.pt", "--port", port), "choose another --port")  # noticed first
    assert_one_line_error(run_script("demo.py", "--host", "no.such.host"), "--host")
    assert_one_line_error(run_script("demo.py", "none.pt", "--data-dir", SAMPLE), "none.pt: no such file")
