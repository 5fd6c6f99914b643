"""Names beside the points of a figure, each at the free place nearest to its point.

taken.append(placing.write(axes, point, name, np.array(taken)))

Places are boxes in pixels, float (2, 2): the lower left corner, the upper right one.
"""

import numpy as np
from matplotlib.axes import Axes

GREY = "#8a8a8a"
REACHES = (9, 16, 24, 34, 46, 60, 76, 94)  # pixels between a point and its name, nearest first
# Sides of a point where its name may stand: right, left, then below and above from right to left.
SIDES = [(1.0, 0.0), (-1.0, 0.0), *((x, y) for x in (1, 0.5, 0, -0.5, -1) for y in (-1, 1))]


def around(place: np.ndarray, reach: float) -> np.ndarray:
    """Return the box that reaches so many pixels to each side of a place."""
    return np.array([place - reach, place + reach])


def write(axes: Axes, point: tuple[float, float], name: str, taken: np.ndarray) -> np.ndarray:
    """Write a name beside its point and return the box it fills; a thin line leads to a name far away."""
    text = axes.annotate(name, point, (0, 0), textcoords="offset points", size=8, va="bottom")
    text.set_in_layout(False)
    half, anchor = np.array(text.get_window_extent().size) / 2, axes.transData.transform(point)
    places = [anchor + np.array(side) * (half + reach) for reach in REACHES for side in SIDES]
    boxes = [np.array([place - half, place + half]) for place in places]
    low, high = min(boxes, key=lambda box: _covered(box, taken, axes.bbox.get_points()))  # of equals the nearest
    to_points = 72 / axes.figure.dpi
    text.set_position(tuple((low - anchor) * to_points))
    nearest = np.clip(anchor, low, high)
    if np.hypot(*(nearest - anchor)) > REACHES[1]:
        style = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        end = tuple((nearest - anchor) * to_points)
        axes.annotate("", point, end, textcoords="offset points", arrowprops=style).set_in_layout(False)
    return np.array([low, high])


def _covered(box: np.ndarray, taken: np.ndarray, panel: np.ndarray) -> float:
    """Return the pixels of a box that taken boxes cover, and those outside the panel."""
    sides = np.minimum(box[1], taken[:, 1]) - np.maximum(box[0], taken[:, 0])
    covered = np.clip(sides, 0, None).prod(1).sum()
    inside = np.clip(np.minimum(box[1], panel[1]) - np.maximum(box[0], panel[0]), 0, None)
    return float(covered + (box[1] - box[0]).prod() - inside.prod())
