"""The page of demo.py: how it looks (by Gradio), and what it shows of a picture.

page = layout(Explainer(candidates, train), test)
"""

from collections.abc import Sequence
from typing import Any

import gradio
import numpy as np
from PIL import Image, ImageOps

from analysis import classify, explain
from data import CLASSES, Split
from pictures.convert import convert
from pictures.read import PictureError, opaque, read

SHOWN = 280  # pixels a side of the pictures on the page
NEIGHBOURS = 8
EXAMPLES = (0, 1, 2, 8, 12, 18)  # test images that the page offers


class Explainer:
    """Classifies a picture by all candidates and explains the first one's answer by the training images."""

    def __init__(self, candidates: Sequence[classify.Candidate], train: Split):
        """Compute the training images' features; the split is on the CPU."""
        self.candidates = candidates
        self.train = train
        self.model = candidates[0].model
        self.references = explain.features(self.model, train.to(next(self.model.parameters()).device))[1]

    def answer(self, source: Any) -> list[Any]:
        """Return what the page shows for a picture's path or for a drawing (Gradio's dict): the values of explain().

        Nothing is shown for no picture or an empty canvas. Raises gradio.Error for an unreadable picture.
        """
        drawn = isinstance(source, dict)
        nothing = [None] * (3 + len(self.candidates))
        if source is None or (drawn and source["composite"] is None):
            return nothing
        try:
            return self.explain(convert(opaque(source["composite"]) if drawn else read(source)))
        except PictureError as error:
            if drawn:  # an empty canvas
                return nothing
            raise gradio.Error(str(error), print_exception=False) from None

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


def layout(explainer: Explainer, test: Split) -> gradio.Blocks:
    """Lay out the page and connect it with the explainer; a few test images serve as examples."""
    what = "garment" if tuple(test.classes) == CLASSES else "object"
    with gradio.Blocks(title=test.source, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(
            f"# What {what} is it?\nChoose a picture of one {what} on a plain background, light or dark, or draw one. "
            "It stays on this machine."
        )
        with gradio.Row():
            with gradio.Column():
                inputs = _inputs(test)
            with gradio.Column():
                seen = _picture("What the models saw")
                heat = _picture("Where the first one looked (Grad-CAM; for an MLP, gradient x input)")
            with gradio.Column():
                labels = [gradio.Label(label=each.name, num_top_classes=10) for each in explainer.candidates]
        gradio.Markdown("The nearest training images, by the features of the first model")
        near = gradio.Gallery(label="nearest", show_label=False, columns=NEIGHBOURS, height=170, buttons=[])
        for each in inputs:
            each.change(explainer.answer, each, [seen, heat, *labels, near])
    return page


def _inputs(test: Split) -> tuple[gradio.Image, gradio.Sketchpad]:
    """Make the tabs for a picture and for a drawing."""
    with gradio.Tab("Picture"):
        picture = gradio.Image(sources=["upload", "clipboard"], label="drop, paste or choose", height=SHOWN)
        picture.preprocess = _path_of  # type: ignore[method-assign, assignment]
        # Not gradio.Examples: a click on one makes the session a new Image, without this preprocess.
        pictures = [[example] for example in examples(test)]
        offered = gradio.Dataset(
            components=[picture], samples=pictures, type="values", label="test images of the data set"
        )
        offered.click(lambda sample: sample[0], offered, picture)
    with gradio.Tab("Drawing"):
        drawing = gradio.Sketchpad(
            type="pil",
            canvas_size=(SHOWN, SHOWN),
            label="take the brush, and draw",
            brush=gradio.Brush(default_size=14, colors=["#000000", "#808080"]),
            transforms=(),
            layers=False,
        )
    return picture, drawing


def _path_of(file: gradio.FileData | None) -> str | None:
    """Hand a file to pictures.read as it is, instead of decoded by Gradio, which has checked that it was uploaded."""
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
