"""The page of demo.py: how it looks (by Gradio), and what it shows of a picture.

page = layout(Explainer(candidates, train), test, local=True)
with serve.running(app(page, uploads, serve.names("127.0.0.1", True), password=None), listening):
    input("Enter ends it")
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import fastapi
import gradio
import numpy as np
from gradio.components.base import server
from gradio.components.image_editor import EditorData
from gradio.data_classes import DataWithFiles
from PIL import Image, ImageOps

from analysis import classify, explain, serve
from data import CLASSES, Split
from pictures.convert import convert
from pictures.read import PictureError, read

SHOWN = 280  # pixels a side of the pictures on the page
NEIGHBOURS = 8
EXAMPLES = (0, 1, 2, 8, 12, 18)  # test images that the page offers
MOST = 50_000_000  # bytes of an uploaded picture
AT_ONCE = 4  # pictures that are read at the same time
TURNS = 16  # pictures that are read or wait for that …
OF_ADDRESS, OF_SESSION = 3, 2  # … and those of one, so that others need not wait for its slow ones
WAITING = 64  # pictures, and drawings, that wait to be read
USER = "demo"  # the name to log in with


class Explainer:
    """Classifies a picture by all candidates and explains the first one's answer by the training images."""

    def __init__(self, candidates: Sequence[classify.Candidate], train: Split):
        """Compute the training images' features; the split is on the CPU."""
        self.candidates = candidates
        self.train = train
        self.model = candidates[0].model
        self.references = explain.features(self.model, train.to(next(self.model.parameters()).device))[1]
        self.explaining = threading.Lock()  # the models have one set of hooks
        self.reading = threading.Semaphore(AT_ONCE)
        refusal = "other pictures are being read: try again in some seconds"
        self.addresses = serve.Shares(TURNS, OF_ADDRESS, 0, refusal)
        self.sessions = serve.Shares(TURNS, OF_SESSION, 0, refusal)
        self.drawings = Drawings()

    def answer(self, source: str | bytes | None, request: gradio.Request) -> list[Any]:
        """Return what the page shows for a path or a file's bytes: the values of explain(), or nothing without either.

        Raises gradio.Error for an unreadable picture.
        """
        try:
            return self._answer(source, request)
        except (PictureError, serve.Refused) as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def answer_drawing(self, drawn: EditorData | None, request: gradio.Request) -> list[Any]:
        """Return the same for a drawing; an empty canvas is no picture."""
        try:
            return self._answer(self.drawings.take(drawn, request.session_hash), request)
        except PictureError:
            return self._answer(None, request)
        except serve.Refused as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def _answer(self, source: str | bytes | None, request: gradio.Request) -> list[Any]:
        if source is None:
            return [None] * (3 + len(self.candidates))
        with self.addresses.use(request.client.host), self.sessions.use(str(request.session_hash)), self.reading:
            pixels = convert(read(source))
        with self.explaining:
            return self.explain(pixels)

    def explain(self, pixels: np.ndarray) -> list[Any]:
        """Explain an image, uint8 (28, 28): itself, where the first model looked, all answers, nearest images."""
        answers = [
            classify.classify(model, [("picture", pixels)], temperature, self.train.classes)[0]
            for _, model, temperature in self.candidates
        ]
        split = classify.as_split(self.model, [pixels], self.train.classes)
        logits, features = explain.features(self.model, split)
        maps, _ = explain.attention_maps(self.model, split, logits.argmax(1))
        heat = np.kron(maps[0].numpy(), np.ones((4, 4)))
        near = explain.nearest(features, self.references, NEIGHBOURS)[1][0].tolist()
        neighbours = [(enlarged(self.train.images[i].numpy()), self.train.classes[self.train.labels[i]]) for i in near]
        return [
            enlarged(pixels),
            enlarged(overlay(pixels, heat)),
            *(dict(each.ranking) for each in answers),
            neighbours,
        ]


class Drawings:
    """The drawings that the page has sent, until they are read; the newest ones only."""

    def __init__(self) -> None:
        """Begin with none."""
        self.waiting: OrderedDict[tuple[Any, Any], bytes] = OrderedDict()

    @server
    def accept(self, sent: DataWithFiles) -> None:
        """Keep a whole drawing under its session and the name that the page chose; the page sends the layers too."""
        if sent.data.get("type") == "composite" and sent.files:
            self.waiting[sent.data.get("session_hash"), sent.data.get("id")] = sent.files[0][1]
            if len(self.waiting) > WAITING:
                self.waiting.popitem(last=False)

    def take(self, drawn: EditorData | None, session: str | None) -> str | bytes | None:
        """Return the drawing that the page names: the file's bytes if it was sent like this, or else its path."""
        if drawn is None or drawn.id is None:
            return _path_of(drawn.composite) if drawn else None
        return self.waiting.pop((session, drawn.id), None)


def layout(explainer: Explainer, test: Split, local: bool) -> gradio.Blocks:
    """Lay out the page and connect it with the explainer; a few test images serve as examples.

    local: whether the page can be reached from this machine only. The page says where the pictures go.
    """
    what = "garment" if tuple(test.classes) == CLASSES else "object"
    with gradio.Blocks(title=test.source, analytics_enabled=False, delete_cache=(60, serve.KEPT)) as page:
        gradio.Markdown(
            f"# What {what} is it?\nChoose a picture of one {what} on a plain background, light or dark, or draw one. "
            f"{serve.where(local)}"
        )
        with gradio.Row():
            with gradio.Column():
                picture, drawing = _inputs(test, explainer.drawings)
            with gradio.Column():
                seen = _picture("What the models saw")
                heat = _picture("Where the first one looked (Grad-CAM; for an MLP, gradient x input)")
            with gradio.Column():
                labels = [gradio.Label(label=each.name, num_top_classes=10) for each in explainer.candidates]
        gradio.Markdown("The nearest training images, by the features of the first model")
        near = gradio.Gallery(label="nearest", show_label=False, columns=NEIGHBOURS, height=170, buttons=[])
        shown = [seen, heat, *labels, near]
        for each, answer in ((picture, explainer.answer), (drawing, explainer.answer_drawing)):
            each.change(answer, each, shown, concurrency_id="read", api_visibility="private")
    return page


def app(page: gradio.Blocks, uploads: Path, names: Collection[str], password: str | None) -> serve.Gate:
    """Make the page an ASGI app, with all that Gradio could do beyond it turned off.

    uploads: the only folder with files of the page; names: of the machine, in a client's request.
    """
    page.queue(max_size=WAITING, default_concurrency_limit=TURNS)
    mounted = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        "/",
        footer_links=[],
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        mcp_server=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        max_file_size=MOST,
        auth=(USER, password) if password else None,
        auth_message=f"The user's name is {USER}.",
    )
    return serve.Gate(mounted, uploads, names, MOST, functions=len(page.fns))


def _choose(pictures: Sequence[Image.Image], index: int) -> Image.Image:
    """Return the picture that was clicked on."""
    if index not in range(len(pictures)):
        raise gradio.Error("no such picture", print_exception=False)
    return pictures[index]


def _inputs(test: Split, drawings: Drawings) -> tuple[gradio.Image, gradio.Sketchpad]:
    """Make the tabs for a picture and for a drawing."""
    with gradio.Tab("Picture"):
        picture = gradio.Image(sources=["upload", "clipboard"], label="drop, paste or choose", height=SHOWN)
        picture.preprocess = _path_of  # type: ignore[method-assign, assignment]
        # Not gradio.Examples: a click on one makes the session a new Image, without this preprocess.
        pictures = examples(test)
        offered = gradio.Dataset(
            components=[picture],
            samples=[[example] for example in pictures],
            type="index",
            label="test images of the data set",
        )
        offered.click(functools.partial(_choose, pictures), offered, picture, api_visibility="private")
    with gradio.Tab("Drawing"):
        drawing = gradio.Sketchpad(
            canvas_size=(SHOWN, SHOWN),
            label="take the brush, and draw",
            brush=gradio.Brush(default_size=14, colors=["#000000", "#808080"]),
            transforms=(),
            layers=False,
        )
        drawing.accept_blobs = drawings.accept
        drawing.preprocess = lambda drawn: drawn  # type: ignore[method-assign, assignment, return-value]
    return picture, drawing


def _path_of(file: gradio.FileData | None) -> str | None:
    """Hand a file to pictures.read as it is, instead of decoded by Gradio; the gate has checked that it is here."""
    return file.path if file else None


def examples(test: Split) -> list[Image.Image]:
    """Draw a few test images as a user might have them: enlarged, on white, with a margin."""
    negatives = [ImageOps.invert(enlarged(test.images[i].numpy())) for i in EXAMPLES if i < len(test.images)]
    return [ImageOps.expand(negative, 20, fill=255) for negative in negatives]


def _picture(title: str) -> gradio.Image:
    """Make a place for a picture that only the page fills."""
    gradio.Markdown(title)
    return gradio.Image(label=title, height=SHOWN, format="png", buttons=[], show_label=False)


def overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a map, [0, 1] (28, 28), in orange on a grey image, uint8 (28, 28): uint8 (28, 28, 3)."""
    grey, share = np.repeat(pixels[..., None], 3, 2), 0.6 * heat[..., None]
    return ((1 - share) * grey + share * np.array([255, 120, 0])).astype(np.uint8)


def enlarged(pixels: np.ndarray) -> Image.Image:
    """Enlarge an image, uint8 (28, 28) or (28, 28, 3), by repeating its pixels."""
    return Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.Resampling.NEAREST)
