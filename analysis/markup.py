"""What the page of demo.py says and draws of a picture, as HTML. All that comes from elsewhere is escaped.

top, below = answer(answers), details(pixels, heat, neighbours)
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from analysis.classify import NOT_SURE, Classified
from pictures.convert import UNCLEAR, Conversion

BARS = 3  # classes of an answer
LONGEST = 480  # pixels of a picture that is shown
COVER = (96, 64, 160)  # over what was not the garment
HEAT = (255, 120, 0)
SURE, UNSURE, NO_KIND = ("sure", "&#10003;"), ("unsure", "?"), ("unsure", "&#8709;")  # a style and a sign
EMPTY = '<div class="answer empty"><p>Choose a picture of one garment, or draw one. The answer appears here.</p></div>'
CSS = """
.answer {border: 2px solid var(--border-color-primary); border-radius: 12px; padding: 14px 18px}
.answer h2 {font-size: 2.4rem; line-height: 1.15; margin: 0 !important; overflow-wrap: anywhere}
.answer h3 {font-size: 1.3rem; margin: 0 !important}
.answer p {margin: 4px 0 8px}
.answer .sign {display: inline-block; min-width: 1.1em; font-weight: 700}
.answer.sure {border-color: #15803d; border-left-width: 12px}
.answer.sure .sign {color: #15803d}
.answer.unsure, .answer.failed {border: 3px dashed #b45309}
.answer.unsure h2, .answer.unsure h3 {font-weight: 400; font-style: italic}
.answer.unsure .sign {color: #b45309}
.answer.empty {border-style: dotted; font-size: 1.2rem; padding: 28px 18px}
.answer + .answer {margin-top: 10px}
.answer .note::before {content: "Note: "; font-weight: 700}
.bars {list-style: none; margin: 0 !important; padding: 0 !important}
.bars li {display: flex; justify-content: space-between; padding: 3px 8px; margin: 4px 0; border-radius: 4px;
  background: linear-gradient(#8887, #8887) 0 / var(--share) no-repeat, #8881}
.seen {display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; margin-top: 12px}
.explained {display: grid; grid-template-columns: 1fr 5fr; gap: 20px}
.near {display: grid; grid-template-columns: repeat(8, 1fr); gap: 6px}
.examples {display: grid; grid-template-columns: repeat(6, 1fr); gap: 6px}
.examples button {border: 2px solid transparent; border-radius: 6px; padding: 0; cursor: pointer; overflow: hidden}
.examples button:hover, .examples button:focus-visible {border-color: var(--color-accent)}
.examples img {width: 100%; display: block; margin: 0 !important}
figure {margin: 0 !important}
figure img {width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882; border-radius: 6px; margin: 0}
figure .small {image-rendering: pixelated}
figcaption {font-size: .85rem; line-height: 1.25; overflow-wrap: anywhere}
@media (max-width: 600px) {
  .answer h2 {font-size: 2rem}
  .seen {gap: 6px}
  .near {grid-template-columns: repeat(4, 1fr)}
  .explained {grid-template-columns: 1fr}
  .explained > section > figure {max-width: 50%}
}
"""


def answer(answers: Sequence[Classified]) -> str:
    """Say what the candidates answer, the first one in large letters, what the conversion notes, and what they saw."""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in answers[0].conversion.notes)
    blocks = (_block(row, "h3" if number else "h2", "" if number else notes) for number, row in enumerate(answers))
    return "".join(blocks) + _seen(answers[0].conversion)


def _block(row: Classified, heading: str, notes: str) -> str:
    style, sign = SURE if row.is_sure else UNSURE if row.answer == NOT_SURE else NO_KIND
    by = (
        f"Answered by: {row.name}"
        if row.is_sure
        else f"The likeliest kinds, but they may well be wrong. By: {row.name}"
    )
    bars = "".join(
        f'<li style="--share: {share:.0%}"><span>{escape(name)}</span> <b>{share:.1%}</b></li>'
        for name, share in row.ranking[:BARS]
    )
    return (
        f'<div class="answer {style}"><{heading}><span class="sign" aria-hidden="true">{sign}</span> '
        f'{escape(row.answer)}</{heading}>{notes}<p>{escape(by)}</p><ol class="bars">{bars}</ol></div>'
    )


def failed(reason: str) -> str:
    """Say why there is no answer, in a sentence."""
    return f'<div class="answer failed"><h2>No answer</h2><p>{escape(reason[:1].upper() + reason[1:])}.</p></div>'


def _seen(conversion: Conversion) -> str:
    """Show the picture, what counts as the garment, and what the network saw."""
    picture = conversion.picture.copy()
    picture.thumbnail((LONGEST, LONGEST))
    found = "Purple: not the garment"
    if UNCLEAR in conversion.notes or conversion.mask.all() or not conversion.mask.any():
        found = "Hardly found: is all but the garment purple?"
    seen = figure(picture, "Your picture") + figure(masked(picture, conversion.mask), found)
    seen += figure(Image.fromarray(conversion.pixels), "What the network saw (28 by 28)")
    return f'<div class="seen">{seen}</div>'


def details(pixels: np.ndarray, heat: np.ndarray, neighbours: Sequence[tuple[np.ndarray, str]]) -> str:
    """Show where the network looked, float (n, n) in [0, 1], and the images, uint8 (28, 28), that are most alike."""
    looked = figure(overlay(pixels, heat), "Orange: what counted most")
    near = "".join(figure(Image.fromarray(each), name) for each, name in neighbours)
    return (
        f'<div class="explained"><section><h3>Where it looked</h3>{looked}</section>'
        f'<section><h3>The nearest training images</h3><div class="near">{near}</div></section></div>'
    )


def masked(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """Cover what is not in a mask, bool of any size."""
    garment = Image.fromarray(mask).convert("L").resize(picture.size)
    return Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, COVER), 0.8), garment)


def overlay(pixels: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Lay a map, (n, n) in [0, 1], in orange on a grey image, uint8 (28, 28)."""
    grey = Image.fromarray(pixels).convert("RGB")
    share = Image.fromarray((153 * heat).astype(np.uint8)).resize(grey.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", grey.size, HEAT), grey, share)


def figure(picture: Image.Image, caption: str) -> str:
    """Draw a picture with its caption, which a screen reader reads once."""
    return f"<figure>{image(picture, '')}<figcaption>{escape(caption)}</figcaption></figure>"


def buttons(pictures: Sequence[tuple[str, Image.Image]]) -> str:
    """Draw pictures, each with its name, as buttons that know their number."""
    every = enumerate((name, picture.resize((96, 96))) for name, picture in pictures)
    drawn = (f'<button type="button" data-index="{k}">{image(small, name)}</button>' for k, (name, small) in every)
    return f'<p>Or try one of these:</p><div class="examples">{"".join(drawn)}</div>'


def image(picture: Image.Image, name: str) -> str:
    """Draw a picture, with its name for a screen reader and for the pointer."""
    content, small = io.BytesIO(), max(picture.size) <= 28
    picture.save(content, "PNG" if small else "JPEG", quality=90)
    source = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"
    return f'<img class="{"small" if small else ""}" src="{source}" alt="{escape(name)}" title="{escape(name)}">'
