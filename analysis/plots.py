"""Draw the figures. Every function takes plain numbers and arrays, and returns a matplotlib Figure.

figure = plots.training_curves(history)   # a notebook with `%matplotlib inline` shows it
Path("curves.png").write_bytes(plots.png(figure))

Importing this module and calling its functions leaves matplotlib's global settings as they are.
"""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

import engine
import recipes
from analysis import placing

Rows = Sequence[Mapping[str, Any]]

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY, SOFT, DARK, PALE = placing.GREY, "#6a6a6a", "#33424d", "#e4e4e4"
WIDTH, DPI = 9.2, 110  # inches, pixels an inch: together the 1012 pixels of a README's column
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "figure.titleweight": "bold",
    "text.parse_math": False,  # a $ in the name of a class or a file is a $
}
BEHIND = (226, 180, 205)  # stands for a background that was removed
COLUMNS = 5  # pictures a row
PEOPLE_TITLES = {  # of humans.compare's trainings
    "people_accuracy": "answers that are people's choice",
    "cross_entropy_scaled": "cross-entropy to the votes, nats, best temperature",
}
FEW = 10  # mistakes of a kind that are too few for a bar
PEOPLE_SIDES = {  # of humans.SIDES, in words
    "model": ("the model's answer", BLUE),
    "label": ("the label", "#8f2d25"),
    "other": ("another class", "#c9d1d8"),
    "tied": ("tied", "#eef1f3"),
}


def png(figure: Figure, title: str | None = None) -> bytes:
    """Return the figure as a PNG, with a title in its metadata. The same numbers are drawn as the same bytes."""
    buffer = io.BytesIO()
    for text in figure.findobj(Text):
        printable = text.get_text().encode(errors="backslashreplace").decode()  # the name of a file need not be Unicode
        if printable != text.get_text():
            text.set_text(printable)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None, "Title": title})
    return buffer.getvalue()


@matplotlib.rc_context(STYLE)
def confusion_matrix(matrix: ArrayLike, title: str, classes: Sequence[str]) -> Figure:
    """Draw counts, and beneath each its percentage of the row. Only mistakes are coloured.

    matrix: int (n, n), true classes in rows, predicted classes in columns; classes: their n names.
    """
    counts = np.asarray(matrix)
    n, names = len(counts), [wrapped(name) for name in classes]
    figure = blank(7.6)
    axes = figure.subplots()
    mistakes = np.where(np.eye(n, dtype=bool), 0, counts)
    norm = PowerNorm(0.6, 0, max(mistakes.max(), 1))  # makes small counts visible
    axes.imshow(np.ma.masked_equal(mistakes, 0), cmap="Reds", norm=norm, aspect="auto")
    for row, column in np.argwhere(counts):
        _matrix_cell(axes, row, column, counts[row], dark=row != column and norm(counts[row, column]) > 0.55)
    axes.set_xticks(range(n), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), names)
    axes.set_xticks(np.arange(-0.5, n), minor=True)
    axes.set_yticks(np.arange(-0.5, n), minor=True)
    axes.grid(which="minor", color="#d9d9d9", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    return figure


def _matrix_cell(axes: Axes, row: int, column: int, counts: np.ndarray, dark: bool) -> None:
    """Write one count of a row of the matrix and its percentage of the row."""
    scale = min(1.0, 10 / len(counts))
    colour, weight = "white" if dark else "black", "normal"
    if row == column:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color="#e8eef2"))
        colour, weight = DARK, "bold"
    percent = 100 * counts[column] / counts.sum()
    style: dict[str, Any] = {"ha": "center", "color": colour}
    axes.text(column, row + 0.06, f"{counts[column]:,}", va="bottom", size=11 * scale, weight=weight, **style)
    axes.text(column, row + 0.13, f"{percent:.1f}%", va="top", size=8 * scale, **style)


@matplotlib.rc_context(STYLE)
def confused_pairs(pairs: Rows, n_mistakes: int) -> Figure:
    """Draw two bars for each pair of classes, one for each direction.

    pairs: dicts with a and b (names), a_as_b, b_as_a and total (counts); n_mistakes: of all pairs, shown or not.
    """
    figure = blank(0.6 * len(pairs) + 1.1)
    axes = figure.subplots()
    names, places = [], []
    for number, pair in enumerate(pairs):
        for offset, true, predicted, count in (
            (-0.2, pair["a"], pair["b"], pair["a_as_b"]),
            (0.2, pair["b"], pair["a"], pair["b_as_a"]),
        ):
            bar = axes.barh(number + offset, count, 0.36, color=BLUE)
            axes.bar_label(bar, [f"{count:,}"], padding=4)
            names.append(f"{shortened(true)} classified as {shortened(predicted)}")
            places.append(number + offset)
        if number % 2 == 0:
            axes.axhspan(number - 0.5, number + 0.5, color="#f3f5f7", zorder=0)
        total, at = f"{pair['total']:,} in total ", axes.get_yaxis_transform()
        axes.text(1, number, total, va="center", ha="right", transform=at)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.25 * max([1, *(max(pair["a_as_b"], pair["b_as_a"]) for pair in pairs)]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(max(len(pairs), 1) - 0.5, -0.5)  # the first pair on top
    axes.set_xlabel("test images")
    figure.suptitle(f"The most confused pairs of classes ({n_mistakes:,} mistakes in total)", size=12)
    return figure


@matplotlib.rc_context(STYLE)
def mistakes(images: Sequence[ArrayLike], records: Rows, title: str) -> Figure:
    """Draw misclassified images with their true class, predicted class and confidence.

    images: n of uint8 (28, 28); records: n dicts with index, true, predicted (names) and confidence (0 to 1).
    """
    figure, cells = _picture_grid(len(images), COLUMNS, above=0.75)
    top = figure.get_figheight()
    below: dict[str, Any] = {"ha": "center", "va": "top", "size": 9, "color": SOFT}
    figure.suptitle(title, size=13, y=1 - 0.12 / top)
    key: dict[str, Any] = {"y": 1 - 0.5 / top, "va": "center"}
    figure.text(0.31, s="true class", color=GREEN, weight="bold", ha="right", **key)
    figure.text(0.33, s="predicted class", color=ORANGE, **key)
    figure.text(0.475, s="below: number of the image, confidence", color=SOFT, **key)
    for axes, image, record in zip(cells, images, records, strict=False):
        axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
        axes.text(13.5, -4.6, shortened(record["true"], 20), ha="center", color=GREEN, weight="bold")
        axes.text(13.5, -1.5, shortened(record["predicted"], 24), ha="center", color=ORANGE)
        axes.text(13.5, 28.2, f"image {record['index']}, {_percent(record['confidence'])}", **below)
    return figure


@matplotlib.rc_context(STYLE)
def seen(rows: Sequence[tuple[str, str, ArrayLike, ArrayLike, ArrayLike, Sequence[str]]]) -> Figure:
    """Draw pictures, what counts as the object of each, and what the network saw.

    rows: (name of the file, answer, picture uint8 (height, width, 3), mask bool (height, width), pixels uint8 (28, 28),
    notes).
    """
    figure, cells = _picture_grid(3 * len(rows), 3 * min(len(rows), 2))
    for number, (name, answer, picture, mask, pixels, notes) in enumerate(rows):
        views = cells[3 * number : 3 * number + 3]
        shown = np.where(np.asarray(mask)[..., None], picture, BEHIND).astype(np.uint8)
        for axes, view in zip(views, (picture, shown, pixels), strict=True):
            axes.imshow(np.asarray(view), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        short = name if len(name) <= 44 else f"…{name[-43:]}"
        for text, y, style in (
            (short, 1.16, {"size": 8, "color": SOFT}),
            (answer, 1.03, {"color": ORANGE, "weight": "bold"}),
            (shortened("; ".join(notes), 70), -0.04, {"size": 8, "color": DARK, "va": "top"}),
        ):
            views[0].text(*_left(views[0], y), text, transform=figure.transFigure, **style)
    return figure


def _left(axes: Axes, y: float) -> tuple[float, float]:
    """Return a point of the figure at the left of a cell, whatever the shape of its picture."""
    cell = axes.get_position(original=True)
    return cell.x0, cell.y0 + y * cell.height


def _picture_grid(n: int, columns: int, above: float = 0) -> tuple[Figure, list[Axes]]:
    """Return a figure with n or more cells for pictures, and free inches above them."""
    picture, gap, texts = 1.6, 0.24, 0.85  # inches; texts stand above and below each picture
    lines = max(1, -(-n // columns))
    width, height = columns * (picture + gap), lines * (picture + texts) + above
    figure = Figure((width, height), DPI)
    space = {
        "left": gap / 2 / width,
        "right": 1 - gap / 2 / width,
        "top": 1 - (above + 0.55) / height,
        "bottom": (texts - 0.55) / height,
        "wspace": gap / picture,
        "hspace": texts / picture,
    }
    cells = list(figure.subplots(lines, columns, squeeze=False, gridspec_kw=space).flat)
    for axes in cells:
        axes.axis("off")
    return figure, cells


@matplotlib.rc_context(STYLE)
def training_curves(history: Mapping[str, Any]) -> Figure:
    """Draw loss and accuracy of every epoch, of the training images and of the images that selected the epoch.

    history: as train.py writes it, best_<model>_fmnist.json.
    """
    flags = recipes.upgrade(history["flags"])
    trained, selected = _training_loss(flags), "cross-entropy"
    measured = any("select_loss" in row for row in history["epochs"])
    images = recipes.selection(flags).images
    figure = blank(4.4)
    left, right = figure.subplots(1, 2)
    training = "training, mean over the epoch"
    _curves(left, history, "loss", [f"{training}: {trained}", f"{images}: {selected}"])
    if trained == selected:
        left.set_ylabel("cross-entropy, nats")
    else:
        both = [f"{trained} (training)", f"{selected} ({images})"] if measured else [trained]
        left.set_ylabel("\n".join(wrapped(name, 46, 3) for name in both))
    _curves(right, history, "accuracy", [training, images])
    right.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    right.set_ylabel("accuracy")
    figure.suptitle(f"{history['model']}, seed {history['seed']}, {history['train_images']:,} training images", size=12)
    return figure


def _training_loss(flags: Mapping[str, Any]) -> str:
    """Name the training loss of a run by its flags, which are in today's form."""
    known = {name: value for name, value in flags.items() if name in recipes.Recipe._fields}
    return engine.loss_name(recipes.Recipe(**known))


def _curves(axes: Axes, history: Mapping[str, Any], key: str, names: Sequence[str]) -> None:
    """Draw a panel: train_<key> and select_<key> by epoch, and the epoch that was kept."""
    for side, colour, name in zip(("train", "select"), (BLUE, ORANGE), names, strict=True):
        points = [(row["epoch"], row[f"{side}_{key}"]) for row in history["epochs"] if f"{side}_{key}" in row]
        if points:  # a run that keeps its last epoch has no selection images
            marker = "o" if len(points) <= 40 else None
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=wrapped(name, 40, 4), **style)
    best = history["best_epoch"]
    axes.axvline(best, color=GREY, linestyle=":", label=f"epoch {best} was kept")
    axes.set(xlabel="epoch", title=key.capitalize())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=PALE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)


@matplotlib.rc_context(STYLE)
def bench(results: Mapping[str, Any]) -> Figure:
    """Draw the seconds that programs need for an epoch, and for a training to the published accuracy.

    results: as bench.py writes them, with epoch, to_target and machine.
    """
    panels = _bench_panels(results)
    bars_in_all = sum(len(bars) for _, bars in panels)
    figure = blank(1.05 * len(panels) + 0.34 * bars_in_all + 0.4)
    heights = [len(bars) + 0.6 for _, bars in panels]
    grid = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, bars) in zip(grid[:, 0], panels, strict=True):
        _bench_bars(axes, bars)
        axes.set_title(title, loc="left", size=10)
    machine = results["machine"]
    text = ", ".join([f"{machine['threads']} cores of {machine['processor']}", *machine.get("features", [])])
    grid[-1, 0].set_xlabel(f"seconds\n{wrapped(text, 110)}")
    figure.suptitle("Training time, and speed compared with the tutorial loop", size=12)
    return figure


def _bench_panels(results: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return a title and the seconds by program for each panel."""
    panels = []
    for model, programs in results["epoch"].items():
        panels.append((f"{model.upper()}: one epoch", {name: row["seconds"] for name, row in programs.items()}))
        goal = results["to_target"][model]
        if "tutorial" in goal:
            bars = {"tutorial loop": goal["tutorial"]["seconds"], "ours, fast": goal["ours"]["seconds"]}
            panels.append((f"{model.upper()}: training to {goal['target']:.2%} on the test images", bars))
    return panels


def _bench_bars(axes: Axes, bars: Mapping[str, float]) -> None:
    """Draw a bar for each program; ours are orange."""
    reference = bars["tutorial loop"]
    for place, (name, seconds) in enumerate(bars.items()):
        axes.barh(place, seconds, color=ORANGE if name.startswith("ours") else GREY, height=0.7)
        ratio = f"   {reference / seconds:.1f} times as fast" if name != "tutorial loop" else ""
        axes.text(seconds, place, f"  {seconds:.2f} s{ratio}", va="center", size=9)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(bars.values()))
    axes.tick_params(axis="y", length=0)


@matplotlib.rc_context(STYLE)
def strength(rows: Rows) -> Figure:
    """Draw accuracies against the strength of an augmentation.

    rows: dicts with strength, and the accuracies plain, mirrored and corrupted.
    """
    figure = blank(3.6)
    axes = figure.subplots()
    lines = (("plain", "held-out images", BLUE), ("mirrored", "mirrored", SKY), ("corrupted", "corrupted", ORANGE))
    for key, name, colour in lines:
        points = [(row["strength"], 100 * row[key]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        above = 7 if key == "plain" else -15  # points
        for x, y in points:
            if key != "mirrored":
                axes.annotate(f"{y:.1f}%", (x, y), (0, above), textcoords="offset points", ha="center", color=colour)
    axes.set(xlabel="strength of the augmentation (1: recipe robust)", ylabel="accuracy, %", ylim=(70, 97))
    axes.set_xticks([row["strength"] for row in rows])
    axes.legend(loc="lower right", frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def people_sides(checkpoint: Mapping[str, Any], groups: Mapping[str, str]) -> Figure:
    """Draw whose class people choose on a checkpoint's mistakes: all of them, and by kind.

    checkpoint: of humans.compare; groups: the names of the kinds.
    """
    kinds = {name: checkpoint["groups"].get(key) for key, name in groups.items()}
    rows = {"all mistakes": checkpoint["mistakes"]}
    rows |= {name: row for name, row in kinds.items() if row and row["n"] >= FEW}
    figure = blank(0.6 * len(rows) + 1.5)
    axes, names = figure.subplots(), [f"{wrapped(name, 26)}\nn = {row['n']:,}" for name, row in rows.items()]
    left = np.zeros(len(rows))
    for side, (name, colour) in PEOPLE_SIDES.items():
        shares = np.array([100 * (row[side]["share"] or 0) for row in rows.values()])
        bars = axes.barh(names, shares, 0.62, left=left, color=colour, label=name)
        texts = [f"{share:.0f}%" if share >= 4 else "" for share in shares]
        axes.bar_label(bars, texts, label_type="center", color="white" if side in ("model", "label") else "black")
        left += shares
    chance = [100 * (row["expected"]["model"] or 0) for row in rows.values()]
    style: dict[str, Any] = {"color": "black", "marker": "|", "markersize": 26, "markeredgewidth": 2, "linestyle": ""}
    axes.plot(chance, range(len(rows)), label="the answer by chance", **style)
    axes.set(xlabel="share of the mistakes, %", xlim=(0, 100))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9, markerscale=0.5)
    figure.suptitle("The class that most people vote for, on the mistakes of the model", size=12)
    return figure


@matplotlib.rc_context(STYLE)
def people_entropy(confidence: Mapping[str, Any], ambiguity: Mapping[str, Any] | None) -> Figure:
    """Draw how far people disagree on tenths of the images, by confidence and by ambiguity; both of humans.compare."""
    figure = blank(3.4)
    axes, tenths = figure.subplots(), range(1, 11)
    rows = [(confidence, confidence["tenths"], "least to most confident", BLUE, "o")]
    if ambiguity:  # the most ambiguous first
        rows.append((ambiguity, ambiguity["tenths"][::-1], "most to least ambiguous to the trainings", ORANGE, "s"))
    for found, points, name, colour, marker in rows:
        label = f"{name} (Spearman: {_correlation(found['spearman'])})"
        axes.plot(tenths, [point["entropy"] for point in points], color=colour, marker=marker, label=label)
    axes.set(xlabel="tenths of the test images", ylabel="entropy of people's votes, bits", ylim=(0, None))
    axes.set_xticks(tenths)
    axes.grid(color=PALE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle("How far people disagree, by the confidence of the model and by the trainings", size=12)
    return figure


def _correlation(rho: float | None) -> str:
    return "none" if rho is None else f"{rho:.2f}".replace("-", "−")


@matplotlib.rc_context(STYLE)
def people_trainings(rows: Rows) -> Figure:
    """Draw for kinds of trainings how near they are to the labels, and how near to people's votes.

    rows: the trainings of humans.compare; the right panel has those whose cross-entropy was measured. The lines are the
    95% intervals of the means.
    """
    titles = {key: title for key, title in PEOPLE_TITLES.items() if any(key in row for row in rows)}
    figure = blank(4.4)
    panels = dict(zip(titles, figure.subplots(1, len(titles), squeeze=False)[0], strict=True)) if titles else {}
    points = {key: [(row["label_accuracy"]["mean"], row[key]["mean"]) for row in rows if key in row] for key in titles}
    for key, axes in panels.items():
        for row in (row for row in rows if row.get(key, {}).get("ci95")):
            axes.plot([row["label_accuracy"]["mean"]] * 2, row[key]["ci95"], color=BLUE, alpha=0.35, linewidth=1.5)
        axes.plot(*zip(*points[key], strict=True), "o", color=BLUE)
        axes.set_title(titles[key], size=10)
        axes.set_xlabel("answers that are the label")
        axes.grid(color=PALE, linewidth=0.6)
        axes.margins(0.14)
        for axis in (axes.xaxis, axes.yaxis) if key == "people_accuracy" else (axes.xaxis,):
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    figure.draw_without_rendering()  # so that sizes in pixels are known
    for key, axes in panels.items():
        taken = [placing.around(place, 6) for place in axes.transData.transform(points[key])]
        names = [row["name"] for row in rows if key in row]
        for point, name in sorted(zip(points[key], names, strict=True), key=lambda named: -named[0][1]):
            taken.append(placing.write(axes, point, name, np.array(taken)))
    return figure


def blank(height: float) -> Figure:
    """Return an empty figure of so many inches, as wide as a README's column."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def wrapped(name: str, width: int = 18, lines: int = 2) -> str:
    """Break a long name into lines, and end it with … where these do not suffice."""
    return textwrap.fill(name, width, max_lines=lines, placeholder=" …", break_on_hyphens=False)


def shortened(name: str, width: int = 24) -> str:
    """Cut a long name off, with an ellipsis at its end."""
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _percent(confidence: float) -> str:
    """Write 0.99996 as "> 99.99%": rounding up to 100% would claim a certainty that the model does not have."""
    return "> 99.99%" if confidence > 0.9999 else f"{100 * confidence:.2f}%"
