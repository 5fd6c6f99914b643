"""The figures: what they show of real runs, and of data and losses of one's own."""

import io
import json
import re
import warnings

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import data
import engine
from analysis import alike, charts, comparison, plots, runs, tables
from runtime import cli

FIGURES = ROOT / "docs" / "figures"
CHECKPOINTS = ROOT / "checkpoints"
OWN = (
    "a garment with extraordinarily long sleeves and buttons",
    "costs $5 or $6",
    *(f"class {k}" for k in range(2, 10)),
)


def read(path):
    return json.loads(path.read_text())


def drawn(figure):
    """Draw a figure as a user sees it, where no warning is allowed; return all its visible texts."""
    assert isinstance(figure, Figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.open(io.BytesIO(plots.png(figure)))
    assert image.format == "PNG"
    pixels = np.asarray(image)
    assert pixels[..., :3].std() > 10  # of 255: not blank
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


@pytest.fixture(scope="module")
def analysis():
    """The shipped CNN's analysis.json, of all test images."""
    return read(FIGURES / "analysis.json")


def test_the_matrix_shows_every_count_and_its_percentage(analysis):
    matrix = np.array(analysis["confusion_matrix"])
    texts = drawn(plots.confusion_matrix(matrix, "the title", data.CLASSES))
    for row in matrix:
        for count in row[row > 0]:
            assert f"{count:,}" in texts
            assert f"{100 * count / row.sum():.1f}%" in texts
    assert {"the title", *data.CLASSES} <= set(texts)


def colour(image):
    return np.stack([image] * 3, -1)


def test_long_names_of_own_classes_stay_inside_the_figures(analysis, sample):
    pair = {"a": OWN[0], "b": OWN[1], "a_as_b": 3, "b_as_a": 4, "total": 7}
    records = [{"index": 0, "true": OWN[0], "predicted": OWN[1], "confidence": 0.9}] * 7
    images = [sample["test"].images[0]] * 7
    for figure in (
        plots.confusion_matrix(analysis["confusion_matrix"], "own", OWN),
        plots.confused_pairs([pair] * 3, 21),
        plots.mistakes(images, records, "own"),
        plots.seen([("photo.jpg", OWN[0], colour(images[0]), images[0] > 0, images[0], ["a note"])] * 7),
    ):
        texts = " ".join(drawn(figure))
        assert "a garment" in texts.replace("\n", " ")
        assert "costs $5" in texts or "photo.jpg" in texts
        assert figure.axes[0].get_window_extent().width > 0.14 * figure.bbox.width
        for text in figure.findobj(Text):
            box = text.get_window_extent()
            if text.get_visible() and text.get_text():
                assert box.x0 >= -1
                assert box.x1 <= figure.bbox.width + 1


def test_confused_pairs_name_both_directions(analysis):
    texts = drawn(plots.confused_pairs(analysis["confused_pairs"][:10], analysis["mistakes"]))
    for pair in analysis["confused_pairs"][:10]:
        assert {f"{pair['a']} classified as {pair['b']}", f"{pair['b']} classified as {pair['a']}"} <= set(texts)
    drawn(plots.confused_pairs([], 0))


def test_pictures_come_with_their_classes(analysis, sample):
    records, images = analysis["confident_mistakes"], sample["test"].images[: len(analysis["confident_mistakes"])]
    texts = drawn(plots.mistakes(images, records, "The most confident mistakes"))
    assert {name for record in records for name in (record["true"], record["predicted"])} <= set(texts)
    texts = drawn(plots.seen([("a $ name.jpg", "Bag, 90%", colour(images[0]), images[0] > 0, images[0], ["a", "b"])]))
    assert {"Bag, 90%", "a $ name.jpg", "a; b"} <= set(texts)


@pytest.mark.parametrize("name", ["best_mlp_fmnist", "best_resnet_fmnist", "distilled/best_cnn_fmnist"])
def test_curves_name_the_losses(name):
    history = read(CHECKPOINTS / f"{name}.json")
    texts = " ".join(drawn(plots.training_curves(history))).replace("\n", " ")
    assert f"epoch {history['best_epoch']} was kept" in texts
    assert "cross-entropy" in texts
    assert ("validation: cross-entropy" in texts) == (history["flags"]["select"] == "val")
    assert ("distillation" in texts) == name.startswith("distilled")


def test_curves_name_a_loss_of_ones_own(monkeypatch):
    monkeypatch.setitem(engine.LOSSES, "hinge", engine.Loss("squared hinge loss", engine.cross_entropy))
    history = read(CHECKPOINTS / "best_cnn_fmnist.json")
    history["flags"] |= {"loss": "hinge"}
    figure = plots.training_curves(history)
    texts = " ".join(drawn(figure)).replace("\n", " ")
    assert "training, mean over the epoch: squared hinge loss" in texts
    assert "validation: cross-entropy" in texts
    assert figure.axes[0].get_ylabel() == "squared hinge loss (training)\ncross-entropy (validation)"


@pytest.fixture(scope="module")
def shipped():
    return runs.group(runs.read([cli.RUNS]))


def test_the_frontier_names_every_point_in_a_free_place(shipped):
    sections = comparison.of(shipped)
    figure, literature = charts.frontier(sections), tables.literature()
    texts = drawn(figure)
    ours = {f"{row.figures['model']} {row.figures['recipe']}" for row in sections[0].rows}
    assert len(ours) == 12
    assert all(texts.count(name) == 3 for name in ours)  # a panel each for seconds, parameters and operations
    assert all(texts.count(system["name"]) == 1 for system in literature)
    assert {"hollow: float32", "filled: bfloat16", "literature"} <= set(texts)
    assert "literature, data before the re-release of 2017-08-31" in texts
    assert "Runs that select their epoch on the test images are left out." in texts
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert not any(a.overlaps(b) for place, a in enumerate(boxes) for b in boxes[:place])


def test_too_many_curves_are_those_of_the_rows_with_the_most_runs(shipped):
    sections = comparison.of(shipped)
    texts = drawn(charts.curves(sections))
    assert "9 of 14 rows: the baseline and those with the most runs" in texts[0] + texts[-1]
    assert texts.count("cnn published select=val") == 2
    resnets = [text for text in texts if "resnet" in text]  # of three runs each; one of them is the baseline
    assert resnets == [sections[0].baseline.name] * 2


def test_long_sweeps_of_one_epoch_are_readable(shipped):
    (run, *_) = next(group for group in shipped if group[0].model == "mlp")
    groups = [
        [
            run._replace(
                unit=alike.Unit(seed),
                facts=run.facts
                | {"label_smoothing": number % 2 / 10, "a_long_name_of_a_value": number // 2, "lr": 0.01},
                accuracy=0.9 - number / 100,
                epochs=[run.epochs[0] | {"select_accuracy": 0.8 - number / 100}],
            )
            for seed in (0, 1)
        ]
        for number in range(12)
    ]
    for baseline, said in ((None, "the most accurate"), ("12", "the baseline and the most accurate")):
        figure = charts.curves(comparison.of(groups, baseline))
        texts = drawn(figure)
        assert any(text.endswith(f"after one epoch: mean of the runs\n9 of 12 rows: {said}") for text in texts)
        names = [text.get_text() for text in figure.axes[0].texts]
        last = 5 if baseline else 4
        assert len(set(names)) == 9
        assert all(re.fullmatch(rf"label_\w*…?=0.[01] a_long_\w*…=[0-{last}]", name) for name in names)
        low, high = figure.axes[0].get_xlim()
        assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [1]


def test_the_legend_shows_dots_as_they_are_drawn(shipped):
    for precision, fill in (("float32", "white"), ("bfloat16", charts.BLUE)):
        figures = [row.figures for row in comparison.of(shipped)[0].rows if row.figures["model"] == "mlp"]
        figures = [each | {"precision": precision} for each in figures]
        (legend,) = charts.draw_frontier(figures, ["name"] * len(figures), []).legends
        assert legend.legend_handles[0].get_markerfacecolor() == fill


@pytest.mark.parametrize("count", [2, 9])
def test_curves_show_the_mean_and_name_every_row_apart(count, shipped):
    (run, *_) = next(group for group in shipped if group[0].model == "mlp")
    groups = [
        [
            run._replace(
                unit=alike.Unit(seed),
                facts=run.facts | {"lr": 1 / (number + 1)},
                epochs=[row | {"select_accuracy": row["select_accuracy"] - 0.01 * seed} for row in run.epochs],
            )
            for seed in (0, 2)
        ]
        for number in range(count)
    ]
    figure = charts.curves(comparison.of(groups))
    texts = drawn(figure)
    assert any(text.startswith("Validation images") for text in texts)
    for axes in figure.axes:
        assert len(axes.lines) == count
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines that lead there
        assert len(boxes) == count
        assert not any(a.overlaps(b) for place, a in enumerate(boxes) for b in boxes[:place])
        assert all(box.x1 <= figure.bbox.width and box.x0 > axes.bbox.x1 for box in boxes)
    mean = [row["select_accuracy"] - 0.01 for row in run.epochs]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), mean)


def test_the_bench_shows_all_programs():
    results = read(FIGURES / "bench.json")
    texts = drawn(plots.bench(results))
    assert {name for programs in results["epoch"].values() for name in programs} <= set(texts)


def test_drawing_changes_no_setting_of_matplotlib(analysis):
    import matplotlib

    before = dict(matplotlib.rcParams)
    pair = analysis["confused_pairs"][:1]
    first = plots.png(plots.confused_pairs(pair, 7))
    assert dict(matplotlib.rcParams) == before
    assert plots.png(plots.confused_pairs(pair, 7)) == first
