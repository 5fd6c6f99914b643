"""The figures, each drawn from arrays and returned as PNG bytes."""

import io

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm

from data import CLASSES

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"  # Okabe-Ito, told apart by the colour-blind
DPI = 110
SELECTION = {"val": "validation", "test": "test"}

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"})


def confusion_matrix(matrix, title):
    """Counts and row percentages side by side; mistakes are coloured, the diagonal is only written.

    matrix: int (10, 10), rows true, columns predicted.
    """
    matrix = np.asarray(matrix)
    percent = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, panels = plt.subplots(1, 2, figsize=(16, 7.6), layout="constrained")
    figure.suptitle(title, size=12)
    for axes, values, form, name in (
        (panels[0], matrix, "{:,.0f}", "Images"),
        (panels[1], percent, "{:.1f}", "Percent of the true class"),
    ):
        mistakes = np.where(np.eye(10, dtype=bool), 0, values)
        norm = PowerNorm(0.6, 0, max(mistakes.max(), 1e-9))  # lifts the small counts
        axes.imshow(np.ma.masked_equal(mistakes, 0), cmap="Reds", norm=norm)
        for (row, column), value in np.ndenumerate(values):
            if row == column:
                axes.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color="#e8eef2"))
                axes.text(column, row, form.format(value), ha="center", va="center", color="#33424d", weight="bold")
            elif value:
                colour = "white" if norm(value) > 0.55 else "black"
                axes.text(column, row, form.format(value), ha="center", va="center", color=colour, size=9)
        axes.set_xticks(range(10), CLASSES, rotation=40, ha="right")
        axes.set_yticks(range(10), CLASSES)
        axes.set_xticks(np.arange(-0.5, 10), minor=True)
        axes.set_yticks(np.arange(-0.5, 10), minor=True)
        axes.grid(which="minor", color="#d9d9d9", linewidth=0.6)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted", ylabel="true", title=name)
    return _png(figure)


def confused_pairs(pairs, n_mistakes):
    """Bars for the pairs of classes most often confused, both directions. pairs: of errors.confused_pairs."""
    figure, axes = plt.subplots(figsize=(10, 0.62 * len(pairs) + 1.6), layout="constrained")
    for position, pair in enumerate(pairs):
        for offset, true, predicted, count, colour in (
            (-0.19, pair["a"], pair["b"], pair["a_as_b"], BLUE),
            (0.19, pair["b"], pair["a"], pair["b_as_a"], ORANGE),
        ):
            axes.barh(position + offset, count, 0.36, color=colour)
            axes.annotate(
                f"{count}  {true} taken for {predicted}",
                (count, position + offset),
                (4, 0),
                textcoords="offset points",
                va="center",
                size=9,
            )
    axes.set_yticks(range(len(pairs)), [f"{pair['a']} and {pair['b']}\n{pair['total']} in all" for pair in pairs])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.45 * max([1, *(max(pair["a_as_b"], pair["b_as_a"]) for pair in pairs)]))
    axes.invert_yaxis()
    axes.set(xlabel="test images", title=f"The most confused pairs, {n_mistakes:,} mistakes in all")
    return _png(figure)


def mistakes(images, records, title):
    """A 5 x 5 grid of mistakes. images: uint8 (n, 28, 28); records: n dicts with index, true, predicted, confidence."""
    figure, grid = plt.subplots(5, 5, figsize=(9.5, 13), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, hspace=0.03)
    figure.suptitle(f"{title}\n", weight="bold", size=13)
    figure.text(0.49, 0.962, "true class ", ha="right", color=GREEN, weight="bold")
    figure.text(0.49, 0.962, " predicted class and its confidence", color=ORANGE)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, record in zip(grid.flat, images, records, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{record['true']}", size=10, color=GREEN, pad=19)
        axes.text(
            0.5,
            1.03,
            f"{record['predicted']} {_percent(record['confidence'])}",
            ha="center",
            size=10,
            color=ORANGE,
            transform=axes.transAxes,
        )
        axes.text(
            0.5, -0.03, f"image {record['index']}", ha="center", va="top", size=8, color=GREY, transform=axes.transAxes
        )
    return _png(figure)


def seen(rows):
    """What the network saw of pictures, and what it said. rows: of predict.py, up to 100."""
    columns = min(len(rows), 5)
    lines = -(-len(rows) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(2.1 * columns, 2.6 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, pixels, classes) in zip(grid.flat, rows, strict=False):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{classes[0][0]} {_percent(classes[0][1])}", size=10, color=ORANGE)
        short = name if len(name) <= 26 else f"…{name[-25:]}"
        axes.text(
            0.5, -0.03, short.replace("$", r"\$"), ha="center", va="top", size=8, color=GREY, transform=axes.transAxes
        )
    return _png(figure)


def training_curves(history):
    """Loss and accuracy of every epoch of a run's history, training against selection."""
    rows, select = history["epochs"], history["flags"]["select"]
    epochs = [row["epoch"] for row in rows]
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for axes, key, scale, label in ((panels[0], "loss", 1, "cross-entropy, nats"), (panels[1], "accuracy", 100, "%")):
        for side, colour, name in (
            ("train", BLUE, "training, mean over the epoch"),
            ("select", ORANGE, SELECTION.get(select)),
        ):
            values = [scale * row[f"{side}_{key}"] for row in rows if f"{side}_{key}" in row]
            if not values:
                continue  # nothing selected an epoch: the last was kept
            axes.plot(epochs, values, color=colour, marker="o", markersize=4, label=name)
        axes.axvline(history["best_epoch"], color=GREY, linestyle=":", label=f"kept: epoch {history['best_epoch']}")
        axes.set(xlabel="epoch", ylabel=label, title=key.capitalize())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.legend(frameon=False)
    figure.suptitle(f"{history['model']}, seed {history['seed']}, {history['train_images']:,} training images", size=10)
    return _png(figure)


def frontier(rows, literature):
    """Test accuracy against seconds of training, parameters and operations; rows and literature: of frontier.py.

    A line joins those that nothing cheaper equals; only they are named.
    """
    rows = [row for row in rows if row["select"] != "test"]  # whose accuracies flatter
    models = list(dict.fromkeys(row["model"] for row in rows))
    colours = dict(zip(models, (BLUE, ORANGE, GREEN, *["black"] * len(models)), strict=False))
    figure, panels = plt.subplots(1, 3, figsize=(16, 6.5), sharey=True, layout="constrained")
    for axes, key, label in (
        (panels[0], "seconds", "seconds of training on two cores (hollow: float32, filled: bfloat16)"),
        (panels[1], "parameters", "parameters (crosses: published elsewhere, see README)"),
        (panels[2], "mflop", "MFLOP to classify an image"),
    ):
        best = []
        for row in sorted(rows, key=lambda row: (row[key], -row["accuracy"])):
            hollow = key == "seconds" and row["precision"] == "float32"
            low, high = row.get("ci95", [row["accuracy"]] * 2)
            axes.errorbar(
                row[key],
                100 * row["accuracy"],
                [[100 * (row["accuracy"] - low)], [100 * (high - row["accuracy"])]],
                fmt="o",
                color=colours[row["model"]],
                mfc="white" if hollow else None,
                capsize=2,
            )
            if not best or row["accuracy"] > best[-1]["accuracy"]:
                best.append(row)
        axes.plot([row[key] for row in best], [100 * row["accuracy"] for row in best], color=GREY, lw=1, zorder=0)
        for row in best:
            name, place = f"{row['model']}, {row['recipe']}", (row[key], 100 * row["accuracy"])
            axes.annotate(name, place, (6, -5), textcoords="offset points", va="top", size=8)
        for system in literature if key == "parameters" else []:
            place = (system["parameters"], 100 * system["accuracy"])
            axes.plot(*place, marker="x", color=GREY)
            axes.annotate(
                system["name"], place, (-5, 5), textcoords="offset points", ha="right", size=8, color="#666666"
            )
        axes.set(xscale="log", xlabel=label)
        axes.margins(x=0.3)  # for the names
        axes.grid(color="#e4e4e4", linewidth=0.6)
    panels[0].set_ylabel("test accuracy, %: mean of seeds and its 95% interval")
    return _png(figure)


def bench(results):
    """Bars for the seconds of an epoch by every program, and of the training to the published accuracy."""
    rows = []
    for model, programs in results["epoch"].items():
        rows.append((f"{model.upper()}: one epoch", {name: row["seconds"] for name, row in programs.items()}))
        goal = results["to_target"][model]
        if "tutorial" in goal:
            bars = {"tutorial loop": goal["tutorial"]["seconds"], "ours, fast": goal["ours"]["seconds"]}
            rows.append((f"{model.upper()}: to {goal['target']:.2%} on the test set", bars))
    figure, panels = plt.subplots(
        len(rows),
        figsize=(10, 1.2 * len(rows) + 0.36 * sum(len(bars) for _, bars in rows)),
        gridspec_kw={"height_ratios": [len(bars) + 1 for _, bars in rows]},
        layout="constrained",
    )
    for axes, (title, bars) in zip(panels, rows, strict=True):
        slowest = bars["tutorial loop"]
        for position, (name, seconds) in enumerate(bars.items()):
            axes.barh(position, seconds, color=ORANGE if name.startswith("ours") else GREY, height=0.7)
            ratio = f"   {slowest / seconds:.1f} times as fast" if name != "tutorial loop" else ""
            axes.text(seconds, position, f"  {seconds:.2f} s{ratio}", va="center", size=9)
        axes.set_yticks(range(len(bars)), bars)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.35 * max(bars.values()))
        axes.set_title(title, loc="left", size=10)
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("seconds")
    machine = results["machine"]
    figure.suptitle(f"{machine['threads']} cores of {machine['processor']}, {', '.join(machine['features'])}", size=9)
    return _png(figure)


def _percent(confidence):
    """0.99996 -> "> 99.99%": never rounded up to a certainty the model does not have."""
    return "> 99.99%" if confidence > 0.9999 else f"{100 * confidence:.2f}%"


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
