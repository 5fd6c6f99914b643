"""The page of demo.py: how it looks (by Gradio), and what it shows of a picture.

page = layout(Explainer(candidates, train, test), local=True)
with serve.running(app(page, uploads, serve.names("127.0.0.1", True), password=None), listening):
    input("Enter ends it")
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import fastapi
import gradio
import torch
from gradio.components.base import server
from gradio.components.image_editor import EditorData
from gradio.data_classes import DataWithFiles
from PIL import Image

from analysis import classify, explain, markup, serve
from analysis.examples import examples
from data import CLASSES, Split
from pictures import convert
from pictures.read import PictureError, read

HEIGHT = 280  # pixels, of the fields for a picture and a drawing
NEIGHBOURS = 8
MOST = 50_000_000  # bytes of an uploaded picture
AT_ONCE = 4  # pictures that are read at the same time
TURNS = 16  # pictures that are read or wait for that …
OF_ADDRESS, OF_SESSION = 3, 2  # … and those of one, so that others need not wait for its slow ones
WAITING = 64  # pictures, and drawings, that wait to be read
USER = "demo"  # the name to log in with
SPOKEN = """element.setAttribute('aria-live', 'polite')
watch('value', () => document.querySelector('canvas')?.checkVisibility() || element.scrollIntoView({block: 'nearest'}))
"""  # a new answer is read out, and scrolled to unless one is drawing
CLICKED = """element.addEventListener('click', event => {
    const button = event.target.closest('button')
    if (button) trigger('click', {index: Number(button.dataset.index)})
})"""


class Explainer:
    """Classifies a picture by all candidates and explains the first one's answer by the training images."""

    def __init__(self, candidates: Sequence[classify.Candidate], train: Split, test: Split):
        """Compute the training images' features; the splits are on the CPU. Test images make the examples."""
        self.candidates = candidates
        self.train = train
        self.model = candidates[0].model
        self.references = explain.features(self.model, train.to(next(self.model.parameters()).device))[1]
        self.explaining = threading.Lock()  # the models have one set of hooks
        self.reading = threading.Semaphore(AT_ONCE)
        refusal = "other pictures are being read: try again in some seconds"
        self.addresses = serve.Shares(TURNS, OF_ADDRESS, 0, refusal)
        self.sessions = serve.Shares(TURNS, OF_SESSION, 0, refusal)
        self.drawings, self.examples = Drawings(), examples(test)

    def answer(self, source: str | bytes | Image.Image | None, request: gradio.Request) -> tuple[str, str]:
        """Return the page's two texts for a path, a file's bytes or a picture: the answer, or why none; and details."""
        try:
            return self._answer(source, request)
        except (PictureError, serve.Refused) as error:
            return markup.failed(str(error)), ""

    def answer_example(self, event: gradio.EventData, request: gradio.Request) -> tuple[Any, str, str]:
        """Return the example that was clicked, for the field, and the same as answer for it."""
        index: Any = event._data.get("index") if isinstance(event._data, dict) else None
        if index not in range(len(self.examples)):
            raise gradio.Error("no such picture", print_exception=False)
        picture = self.examples[index][1]
        return picture, *self.answer(picture, request)

    def answer_drawing(self, drawn: EditorData | None, request: gradio.Request) -> tuple[str, str]:
        """Return the same for a drawing; an empty canvas is no picture."""
        try:
            return self._answer(self.drawings.take(drawn, request.session_hash), request)
        except PictureError:
            return markup.EMPTY, ""
        except serve.Refused as error:
            return markup.failed(str(error)), ""

    def _answer(self, source: str | bytes | Image.Image | None, request: gradio.Request) -> tuple[str, str]:
        if source is None:
            return markup.EMPTY, ""
        with self.addresses.use(request.client.host), self.sessions.use(str(request.session_hash)), self.reading:
            conversion = convert.explain(source if isinstance(source, Image.Image) else read(source))
        with self.explaining:
            return self.explain(conversion)

    def explain(self, conversion: convert.Conversion) -> tuple[str, str]:
        """Explain a picture: all answers, and what the first one is based on."""
        answers = [classify.classify(each, [(each.name, conversion)])[0] for each in self.candidates]
        split = classify.as_split(self.model, [conversion.pixels], self.train.classes)
        _, features = explain.features(self.model, split)
        best = self.train.classes.index(answers[0].ranking[0][0])
        maps, _ = explain.attention_maps(self.model, split, torch.tensor([best]))
        near = explain.nearest(features, self.references, NEIGHBOURS)[1][0].tolist()
        neighbours = [(self.train.images[i].numpy(), self.train.classes[self.train.labels[i]]) for i in near]
        return markup.answer(answers), markup.details(conversion.pixels, maps[0].numpy(), neighbours)


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


def layout(explainer: Explainer, local: bool) -> gradio.Blocks:
    """Lay out the page and connect it with the explainer.

    local: whether the page can be reached from this machine only. The page says where the pictures go.
    """
    what = "garment" if tuple(explainer.train.classes) == CLASSES else "object"
    with gradio.Blocks(title=explainer.train.source, analytics_enabled=False, delete_cache=(60, serve.KEPT)) as page:
        gradio.Markdown(f"# What {what} is it?")
        with gradio.Row():
            with gradio.Column():
                answer = gradio.HTML(markup.EMPTY, js_on_load=SPOKEN)
            with gradio.Column():
                picture, offered, drawing = _inputs(explainer)
                gradio.Markdown(serve.where(local))
        below = gradio.HTML()
        options: dict[str, Any] = {"concurrency_id": "read", "api_visibility": "private", "show_progress_on": answer}
        offered.click(explainer.answer_example, None, [picture, answer, below], **options)
        picture.upload(explainer.answer, picture, [answer, below], **options)
        drawing.change(explainer.answer_drawing, drawing, [answer, below], **options)
        nothing = json.dumps([markup.EMPTY, ""])
        picture.clear(None, None, [answer, below], js=f"() => {nothing}")  # comes last: no request
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
        css=markup.CSS,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        mcp_server=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        max_file_size=MOST,
        auth=(USER, password) if password else None,
        auth_message=f"The user's name is {USER}.",
    )
    return serve.Gate(mounted, uploads, names, MOST, functions=sum(each.fn is not None for each in page.fns.values()))


def _inputs(explainer: Explainer) -> tuple[gradio.Image, gradio.HTML, gradio.Sketchpad]:
    """Make the tabs for a picture, with some to choose from, and for a drawing."""
    with gradio.Tab("Picture"):
        picture = gradio.Image(sources=["upload", "clipboard"], label="Drop, paste or choose a picture", height=HEIGHT)
        picture.preprocess = _path_of  # type: ignore[method-assign, assignment]
        choice = gradio.HTML(markup.buttons(explainer.examples), js_on_load=CLICKED)
    with gradio.Tab("Drawing"):
        drawing = gradio.Sketchpad(
            canvas_size=(HEIGHT, HEIGHT),
            label="Draw here",
            brush=gradio.Brush(default_size=14, colors=["#000000", "#808080"]),
            transforms=(),
            layers=False,
        )
        drawing.accept_blobs = explainer.drawings.accept
        drawing.preprocess = lambda drawn: drawn  # type: ignore[method-assign, assignment, return-value]
    return picture, choice, drawing


def _path_of(file: gradio.FileData | None) -> str | None:
    """Hand a file to pictures.read as it is, instead of decoded by Gradio; the gate has checked that it is here."""
    return file.path if file else None
