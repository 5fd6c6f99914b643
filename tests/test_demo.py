"""demo.py in a real browser: a picture, a drawing, and nothing sent anywhere."""

import re
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SAMPLE, assert_one_line_error, run_script
from PIL import Image, ImageOps

from data import CLASSES


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the page is served."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "demo.py", "--port", str(port), "--data-dir", str(SAMPLE)]
    log = tmp_path_factory.mktemp("demo") / "log"
    with open(log, "w") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as process:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(scope="module", params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, address):
    """The page in Chromium, which cannot reach any other address."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
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


def test_a_picture_is_answered_by_both_models_and_explained(page, sample, tmp_path):
    image = Image.fromarray(sample["test"].images[0].numpy()).resize((200, 200), Image.Resampling.NEAREST)
    ImageOps.expand(ImageOps.invert(image), 30, fill=255).save(tmp_path / "own.jpg", quality=80)
    page.set_input_files("input[type=file] >> nth=0", tmp_path / "own.jpg")
    assert answers(page) == [CLASSES[sample["test"].labels[0]]] * 2
    assert page.get_by_text(re.compile(r"^\d+%$")).count() == 20  # probabilities
    page.locator(".thumbnail-lg, .thumbnail-item").nth(7).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.outside == []


def test_a_file_that_is_not_a_picture_is_an_error_on_the_page(page, tmp_path):
    (tmp_path / "none.png").write_text("not a picture")
    again(page)
    page.set_input_files("input[type=file] >> nth=0", tmp_path / "none.png")
    page.get_by_text("not a picture that Pillow can open").wait_for(timeout=60_000)


def test_a_drawing_is_answered(page):
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
    assert page.outside == []


def test_bad_arguments_get_one_clear_line(address):
    port = address.rsplit(":", 1)[1]
    assert_one_line_error(run_script("demo.py", "--port", "0"), "--port")
    assert_one_line_error(run_script("demo.py", "--port", port, "--data-dir", SAMPLE), "choose another --port")
    assert_one_line_error(run_script("demo.py", "none.pt", "--data-dir", SAMPLE), "none.pt: no such file")
