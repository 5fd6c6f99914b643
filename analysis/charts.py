"""Draw how ways of training compare: their curves over the epochs, and their accuracy against their cost.

figure = charts.curves(sections)      # of comparison.of
figure = charts.frontier(sections)
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

import recipes
from analysis import comparison, placing, runs, tables
from analysis.plots import BLUE, DARK, GREEN, GREY, ORANGE, PALE, PINK, SKY, STYLE, YELLOW, Rows, blank
from dataset import published

COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, DARK, "#7A4FBF", "#8B5A2B")
MOST = len(COLOURS)  # rows that a reader can tell apart
MOST_NAMED = 20  # rows in a chart that names each point
GAP = 0.06  # between two names, of the height of a panel
EPOCHS = "epoch by epoch: mean of the runs, and a band from the least to the most"
LABELS = {("train", "loss"): "loss, as each row defines it", ("select", "loss"): "cross-entropy, nats"}
LEADER = {"arrowstyle": "-", "linestyle": ":", "linewidth": 0.6, "color": GREY, "shrinkA": 1, "shrinkB": 3}
LEADER |= {"relpos": (0, 0.5)}  # from the name's left
COSTS = {"seconds": "training time, seconds", "parameters": "parameters", "mflop": "MFLOP to classify one image"}


def curves(sections: Sequence[comparison.Section]) -> Figure:
    """Draw the curves of all rows; of too many, the baselines and those with the most runs, then the most accurate.

    They are of the images that chose the epoch, where these are the same for all rows, else of the training images.
    """
    rows = [row for section in sections for row in section.rows]
    shown, chosen = _most(rows, [section.baseline for section in sections])
    side, images = _measured(shown)
    is_short = all(len(run.epochs) == 1 for row in shown for run in row.runs)  # too short for a band
    over = "after one epoch: mean of the runs" if is_short else EPOCHS
    said = f"{images}, {over}"
    names = comparison.names([row.facts for row in shown])  # without what all of these share
    epochs = [[run.epochs for run in row.runs] for row in shown]
    return draw_curves(dict(zip(names, epochs, strict=True)), side, said + chosen)


def _most(rows: Sequence[comparison.Row], baselines: Sequence[comparison.Row]) -> tuple[list[comparison.Row], str]:
    """Choose MOST rows to draw, in their order, and say which these are; "" for all of them."""
    if len(rows) <= MOST:
        return list(rows), ""
    best = sorted(rows, key=lambda row: (-len(row.runs), -row.figures["accuracy"]))
    numbers = [row.number for row in sorted(best, key=lambda row: row not in baselines)[:MOST]]
    which = "the most accurate" if len({len(row.runs) for row in rows}) == 1 else "those with the most runs"
    if {*numbers} != {row.number for row in best[:MOST]}:
        which = f"the baseline and {which}"
    return [row for row in rows if row.number in numbers], f"\n{MOST} of {len(rows)} rows: {which}"


def _measured(rows: Sequence[comparison.Row]) -> tuple[str, str]:
    """Return whose figures to draw, as keys of a history's epochs begin, and a title that names these images."""
    of = {(row.figures["select"], row.runs[0].images if row.is_optimistic else None) for row in rows}
    if len(of) > 1 or not all("select_accuracy" in epoch for row in rows for run in row.runs for epoch in run.epochs):
        return "train", "Training images"
    ((select, images),) = of
    return (
        "select",
        f"{'Held-out' if images and images[0] != 'test' else recipes.SELECTIONS[select].images.capitalize()} images",
    )


def frontier(sections: Sequence[comparison.Section]) -> Figure | None:
    """Draw the first section's accuracies against their costs.

    Rows that chose their epoch on the measured images are left out, as their accuracies are too high. Returns None
    where there are no others.
    """
    section = sections[0]
    rows = [row for row in section.rows if not row.is_optimistic]
    if not rows:
        return None
    is_test = rows[0].runs[0].images[0] == "test"
    said = []
    if len(rows) < len(section.rows):
        said.append(f"Runs that select their epoch on the {'test' if is_test else 'held-out'} images are left out.")
    if len(sections) > 1:
        said.append("Rows that are measured on other images are left out.")
    if len(rows) > MOST_NAMED:
        said.append(f"These are the {MOST_NAMED} most accurate of {len(rows)} rows.")
    rows = rows[:MOST_NAMED]
    figures = [row.figures for row in rows]
    if len({each["model"] for each in figures}) > 1:
        figures = [each | {"mflop": runs.mflop(each["model"])} for each in figures]
    literature = tables.literature() if rows[0].runs[0].images[:2] == ("test", published.NAME) else []
    shown = comparison.names([row.facts for row in rows])
    what = "Test accuracy" if is_test else "Held-out accuracy"
    return draw_frontier(figures, shown, literature, " ".join(said), what)


@matplotlib.rc_context(STYLE)
def draw_curves(rows: Mapping[str, Sequence[Rows]], side: str, title: str) -> Figure:
    """Draw the accuracy and the loss of every epoch: for each row the mean of its runs, and a band from least to most.

    rows: name to the "epochs" of each run's history, one to MOST rows; side: "train" or "select", whose figures.
    """
    figure = blank(9)
    figure.suptitle(title, size=12)
    lengths = [len(every[0]) for every in rows.values()]
    for axes, key in zip(figure.subplots(2, 1), ("accuracy", "loss"), strict=True):
        figures = [np.array([[row[f"{side}_{key}"] for row in run] for run in every]) for every in rows.values()]
        for values, colour in zip(figures, COLOURS, strict=False):
            _curve(axes, values, colour)
        _zoom(axes, figures)
        axes.set(xlabel="epoch", ylabel=LABELS.get((side, key), key))
        if max(lengths) > 8 * min(lengths):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:g}"))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color=PALE, linewidth=0.6)
        _name_curves(axes, [(values.shape[1], float(values.mean(0)[-1])) for values in figures], list(rows))
    figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    return figure


def _curve(axes: Axes, values: np.ndarray, colour: str) -> None:
    """Draw one row: float (runs, epochs)."""
    epochs = np.arange(1, values.shape[1] + 1)
    axes.plot(
        epochs, values.mean(0), color=colour, linewidth=1.4, marker="o" if len(epochs) <= 20 else None, markersize=3
    )
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _zoom(axes: Axes, figures: Sequence[np.ndarray]) -> None:
    """Show the values after the first quarter of the epochs: the first ones would squeeze all others together."""
    late = np.concatenate([values[:, values.shape[1] // 4 :].ravel() for values in figures])
    margin = max(0.05 * np.ptp(late), 1e-6)
    axes.set_ylim(late.min() - margin, late.max() + margin)


def _name_curves(axes: Axes, ends: Sequence[tuple[int, float]], names: Sequence[str]) -> None:
    """Write the names at the right of a panel, at the height of the ends of their curves where there is room."""
    low, high = axes.get_ylim()
    heights = _apart([(y - low) / (high - low) for _, y in ends], GAP)
    for end, height, name, colour in zip(ends, heights, _fitting(names, 40), COLOURS, strict=False):
        axes.annotate(
            name, end, (1.06, height), textcoords="axes fraction", color=colour, size=9, va="center",
            arrowprops=LEADER,
        )  # fmt: skip


def _fitting(names: Sequence[str], width: int) -> list[str]:
    """Shorten names where they say least: first what stands before "=", alike in all, then their middle."""
    said = list(names)
    for kept in range(20, 2, -1):
        if max(map(len, said)) <= width:
            return said
        said = [re.sub(rf"\b(\w{{{kept}}})\w\w+=", r"\1…=", name) for name in names]
    return [name if len(name) <= width else f"{name[: width // 2]}…{name[1 - width // 2 :]}" for name in said]


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move places from 0 to 1 so far that they are `gap` apart, in their order."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places)[order]
    for number in range(1, len(moved)):
        moved[number] = max(moved[number], moved[number - 1] + gap)
    moved[-1] = min(moved[-1], 1)
    for number in range(len(moved) - 2, -1, -1):
        moved[number] = min(moved[number], moved[number + 1] - gap)
    return moved[np.argsort(order)].tolist()


@matplotlib.rc_context(STYLE)
def draw_frontier(
    rows: Rows, names: Sequence[str], literature: Rows, note: str = "", what: str = "Test accuracy"
) -> Figure:
    """Draw an accuracy against seconds of training, parameters and operations, with every point named.

    rows: of runs.describe, one or more, and their names; of several models with "mflop" of runs. literature: dicts
    with name, accuracy (0 to 1), parameters, and old_release where they used the first release. Rows of one model are
    drawn against seconds alone.
    """
    palette = (BLUE, ORANGE, GREEN, SKY, YELLOW)
    models = list(dict.fromkeys(row["model"] for row in sorted(rows, key=lambda row: row["parameters"])))
    colours = {model: palette[place % len(palette)] for place, model in enumerate(models)}
    several = len(models) > 1  # else all have the same parameters and operations
    literature = literature if several else []
    figure = blank(11 if several else 6)
    figure.suptitle(f"{what} against cost: mean of the runs, 95% interval", size=12)
    layout: list[Any] = [["seconds"] * 2, *([["parameters", "mflop"]] if several else [])]
    panels = figure.subplot_mosaic(layout, width_ratios=[3, 2])
    for key, axes in panels.items():
        _draw_costs(axes, key, rows, literature if key == "parameters" else [], colours)
    low, high = zip(*(axes.get_ylim() for axes in panels.values()), strict=True)
    for axes in panels.values():
        axes.set_ylim(min(low), max(high))
    legend = _frontier_legend(figure, rows, literature, colours)
    if note:
        legend.set_title(note)
        legend.get_title().set_fontsize(9)
    figure.draw_without_rendering()  # lays the figure out, so that sizes in pixels are known
    for key, axes in panels.items():
        _name_points(axes, key, rows, names, literature if key == "parameters" else [])
    return figure


def _draw_costs(axes: Axes, key: str, rows: Rows, literature: Rows, colours: Mapping[str, str]) -> None:
    """Draw one panel of the frontier but for the names."""
    for row in rows:
        low, high = row.get("ci95", (row["accuracy"], row["accuracy"]))
        axes.errorbar(
            row[key],
            row["accuracy"],
            [[row["accuracy"] - low], [high - row["accuracy"]]],
            fmt="o",
            color=colours[row["model"]],
            mfc="white" if row["precision"] == "float32" else None,
            capsize=2,
        )
    for system in literature:
        axes.plot(system["parameters"], system["accuracy"], **_cross(system.get("old_release", False)))
    best = _pareto(rows, key)
    axes.plot([row[key] for row in best], [row["accuracy"] for row in best], color=GREY, linewidth=1, zorder=0)
    axes.set(xscale="log", xlabel=COSTS[key], ylabel="accuracy")
    axes.margins(x=0.2, y=0.06)  # room for the names
    axes.grid(color=PALE, linewidth=0.6)
    numbers = FuncFormatter(lambda v, _: f"{v / 1e6:,g}M" if v >= 1e6 else f"{v:,.3g}" if v < 100 else f"{v:,g}")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter(numbers)
    axes.xaxis.set_minor_formatter(numbers if high < 8 * low else NullFormatter())  # else powers of 10 say enough
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))


def _cross(old_release: bool) -> dict[str, Any]:
    return {"linestyle": "", "marker": "P" if old_release else "x", "color": PINK if old_release else "#666666"}


def _pareto(rows: Rows, key: str) -> list[Mapping[str, Any]]:
    """Return the rows that no cheaper row equals in accuracy, cheapest first."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[key], -row["accuracy"])):
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    return best


def _frontier_legend(figure: Figure, rows: Rows, literature: Rows, colours: Mapping[str, str]) -> Legend:
    """Explain colours, fillings, crosses and the line below the panels."""
    dot: dict[str, Any] = {"linestyle": "", "marker": "o"}
    entries = []
    for model, colour in colours.items():
        filled = any(row["precision"] != "float32" for row in rows if row["model"] == model)
        entries.append((Line2D([], [], color=colour, markerfacecolor=None if filled else "white", **dot), model))
    for precision in dict.fromkeys(row["precision"] for row in rows):
        hollow = precision == "float32"
        filling = Line2D([], [], color=DARK, markerfacecolor="white" if hollow else None, **dot)
        entries.append((filling, f"{'hollow' if hollow else 'filled'}: {precision}"))
    entries.append((Line2D([], [], color=GREY, linewidth=1), "Pareto frontier of these runs"))
    for old in dict.fromkeys(system.get("old_release", False) for system in literature):
        when = ", data before the re-release of 2017-08-31" if old else ""
        entries.append((Line2D([], [], **_cross(old)), f"literature{when}"))
    return figure.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _name_points(axes: Axes, key: str, rows: Rows, names: Sequence[str], literature: Rows) -> None:
    """Write the names of a panel's points, each at the free place nearest to its point.

    Places are boxes in pixels, float (2, 2): the lower left corner, the upper right one. Points, error bars, the
    frontier's line and names already written are not free.
    """
    points = [(row[key], row["accuracy"]) for row in rows]
    points += [(system["parameters"], system["accuracy"]) for system in literature]
    names = [*names, *(system["name"] for system in literature)]
    taken = [placing.around(place, 6) for place in axes.transData.transform(points)]
    bars = [[(row[key], end) for end in row["ci95"]] for row in rows if "ci95" in row]
    taken += [axes.transData.transform(bar) + np.array([[-3, 0], [3, 0]]) for bar in bars]
    line = axes.transData.transform([(row[key], row["accuracy"]) for row in _pareto(rows, key)])
    for start, end in pairwise(line):
        taken += [placing.around(start + step * (end - start), 2) for step in np.linspace(0, 1, 40)]
    for point, name in sorted(zip(points, names, strict=True), key=lambda named: -named[0][1]):
        taken.append(placing.write(axes, point, name, np.array(taken)))
