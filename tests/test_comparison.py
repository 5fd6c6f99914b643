"""What compare.py says of rows of runs: which it compares, by which test, and in which words."""

import csv
import io
import re
import shutil

import numpy as np
import pytest
from conftest import SAMPLE, assert_one_line_error, run_script
from scipy import stats

import metrics
from analysis import alike, comparison, runs
from runtime.errors import UserError

A, B, C = (np.array(row) for row in ([0.91, 0.92, 0.90, 0.93, 0.92], [0.90, 0.90, 0.895, 0.92, 0.90], [0.5] * 5))


@pytest.fixture(scope="module")
def run(trained):
    """The finished run of the MLP on the sample."""
    (found,) = (run for run in runs.read([trained[0]]) if run.model == "mlp")
    return found


def row(run, accuracies, fold=None, images=None, **facts):
    """Runs of made-up accuracies, by seed, of other facts; fold: the folds of these runs, "val" or "5"."""
    flags = run.flags | {key: value for key, value in facts.items() if key in run.flags}
    found = []
    for place, (number, accuracy) in enumerate(dict(enumerate(accuracies) if images is None else images).items()):
        named = fold and (fold if fold == "val" else f"{place % int(fold) + 1}/{fold}")
        seed = place // int(fold) if fold and fold != "val" else number
        own = flags | {"fold": named}
        found.append(
            run._replace(
                unit=alike.unit(seed, own),
                flags=own,
                facts=run.facts | facts | ({"folds": fold} if fold else {}),
                images=(fold, "sample") if fold else run.images,
                accuracy=float(accuracy),
            )
        )
    return found


# --- statistics, by SciPy --------------------------------------------------------------------------------


def test_the_paired_test_is_that_of_scipy():
    found, expected = metrics.paired(A, B), stats.ttest_rel(A, B)
    assert found["p_value"] == pytest.approx(expected.pvalue)
    assert found["ci95"] == pytest.approx([*expected.confidence_interval()])
    assert (found["n"], found["difference"]) == (5, pytest.approx((A - B).mean()))
    assert found["sd"] == pytest.approx((A - B).std(ddof=1))
    assert metrics.paired(B, A)["p_value"] == found["p_value"]


@pytest.mark.parametrize("shift", [0, 0.1])
def test_equal_differences_say_nothing_of_chance(shift):
    found = metrics.paired(A, A - shift)
    assert (found["sd"], found["p_value"], found["ci95"]) == (0, None, None)
    assert found["difference"] == pytest.approx(shift)


def test_folds_widen_the_interval_by_what_their_training_images_share():
    """Of five folds: variance times 1 / 5 + 1 / 4 instead of 1 / 5."""
    plain, corrected = metrics.paired(A, B), metrics.paired(A, B, 1 / 4)
    widths = [np.ptp(each["ci95"]) for each in (plain, corrected)]
    assert widths[1] / widths[0] == pytest.approx(1.5)
    t = stats.ttest_rel(A, B).statistic / 1.5
    assert corrected["p_value"] == pytest.approx(2 * stats.t.sf(abs(t), 4))
    units = [alike.Unit(0, fold) for fold in range(1, 6)]
    assert alike.overlap(units, "5") == 1 / 4
    assert alike.overlap(units[:1], "5") == alike.overlap(units, None) == alike.overlap(units[:1], "val") == 0


def test_the_power_is_the_share_of_simulated_tests_that_show_the_difference():
    random = np.random.default_rng(0)
    for n, difference, sd in ((5, 0.002, 0.0015), (14, 0.002, 0.0025), (2, 0.02, 0.001)):
        drawn = random.normal(difference, sd, (n, 20_000))
        shown = (stats.ttest_1samp(drawn, 0).pvalue < 0.05).mean()
        assert metrics.power(n, difference, sd) == pytest.approx(shown, abs=0.012)
    assert metrics.power(100, 1, 1e-3) == 1


def test_the_seeds_needed_are_the_fewest_with_that_power():
    needed = metrics.seeds_needed(0.002, 0.0025)
    assert metrics.power(needed - 1, 0.002, 0.0025) < 0.8 <= metrics.power(needed, 0.002, 0.0025)
    assert metrics.seeds_needed(0.002, 0.1) is None
    corrected = metrics.seeds_needed(0.002, 0.0025, 0.05 / 3)
    assert (
        metrics.power(corrected - 1, 0.002, 0.0025, 0.05 / 3) < 0.8 <= metrics.power(corrected, 0.002, 0.0025, 0.05 / 3)
    )
    assert corrected > needed


# --- rows and comparisons --------------------------------------------------------------------------------


def test_p_values_are_corrected_over_all_comparisons(run):
    rows = [row(run, A, lr=0.1), row(run, B, lr=0.2), row(run, B[::-1], lr=0.3), row(run, C + A / 10, lr=0.4)]
    (section,) = comparison.of(rows)
    raw = sorted(stats.ttest_rel(A, other).pvalue for other in (B, B[::-1], C + A / 10))
    expected = [3 * raw[0], max(3 * raw[0], 2 * raw[1]), max(2 * raw[1], raw[2])]  # Holm's steps by hand
    found = sorted(section.pairs, key=lambda pair: pair["p_value"])
    assert [pair["p_holm"] for pair in found] == pytest.approx(np.minimum(expected, 1).tolist())
    assert section.baseline.name == "lr=0.1"
    assert "lr=0.4: worse by 32.44 points" in comparison.text([section]).replace("\n    ", " ")


def test_a_comparison_is_said_in_plain_words(run):
    (section,) = comparison.of([row(run, A, lr=0.1), row(run, B, lr=0.2)], "lr=0.2")
    low, high = (100 * end for end in stats.ttest_rel(A, B).confidence_interval())
    p = stats.ttest_rel(A, B).pvalue
    assert section.pairs[0]["text"] == f"better by 1.30 points ({low:.2f} to {high:.2f}), p = {p:.2g}, n = 5"
    (section,) = comparison.of([row(run, A, lr=0.1), row(run, A[::-1], lr=0.2)], "1")
    needed = metrics.seeds_needed(0.002, (A - A[::-1]).std(ddof=1))
    said = section.pairs[0]["text"]
    assert said.startswith("no difference shown at n = 5 (")
    assert said.endswith(f"p = 1); a difference of 0.2 points would need about {needed} seeds")
    assert needed > 100
    precise = [row(run, A, lr=0.1), row(run, A + np.array([0, 1e-4, -1e-4, 0, 0]), lr=0.2)]
    assert comparison.of(precise)[0].pairs[0]["text"].endswith("a difference of 0.2 points would likely have shown")


def test_a_difference_that_the_correction_hides_is_still_named(run):
    """Ten rows, so that p is multiplied by nine for the strictest; its seeds are counted at that step."""
    change = np.array([0.02, 0.03, 0.025])
    others = [row(run, A[:3] - 0.01 * np.roll([1, -1, 0.5], k), lr=k + 1) for k in range(8)]
    (section,) = comparison.of([row(run, A[:3], lr=0.1), row(run, A[:3] - change, lr=0.2), *others], "lr=0.1")
    (pair,) = (pair for pair in section.pairs if pair["name"] == "lr=0.2")
    needed = metrics.seeds_needed(0.025, change.std(ddof=1), 0.05 / 9)
    assert pair["p_value"] < 0.05 < pair["p_holm"]
    assert re.fullmatch(
        r"lower by 2.50 points \(1.26 to 3.74\), but not significant after the correction \(p = 0.12, n = 3\); "
        f"that difference would need about {needed} seeds",
        pair["text"],
    )
    said = comparison.text([section]).replace("\n    ", " ")
    assert "Seeds needed: for a power of 80% at p < 0.05 / 9, the strictest step of the correction." in said
    assert "95% interval: of the mean over seeds. It leaves out the chance in the choice of test images." in said


@pytest.mark.parametrize(
    ("n", "end"), [(2, "; too few seeds to tell"), (4, "; more seeds are needed to tell"), (5, " likely have shown")]
)
def test_few_seeds_are_not_said_to_show_that_there_is_no_difference(n, end, run):
    precise = A[:n] + np.array([1e-4, -1e-4, 0, 0, 0])[:n]
    said = comparison.of([row(run, A[:n], lr=0.1), row(run, precise, lr=0.2)])
    assert said[0].pairs[0]["text"].endswith(end)
    assert "Seeds needed" not in comparison.text(said)


def test_only_common_seeds_are_compared(run):
    other = {1: 0.80, 3: 0.85, 4: 0.82, 9: 0.99, 10: 0.99}
    (section,) = comparison.of([row(run, A, lr=0.1), row(run, [], images=other, lr=0.2)])
    (pair,) = section.pairs
    assert pair["n"] == 3
    assert abs(pair["difference"]) == pytest.approx((A[[1, 3, 4]] - [0.80, 0.85, 0.82]).mean())


def test_where_no_test_is_possible_it_says_what_to_train(run):
    sections = comparison.of(
        [row(run, A, lr=0.1), row(run, [0.9], lr=0.2), row(run, [], images={7: 0.8, 8: 0.8}, lr=0.3)]
    )
    text = comparison.text(sections).replace("\n    ", " ")
    assert "2 lr=0.2, 3 lr=0.3: no test is possible: fewer than 2 seeds in common with 1" in text
    assert re.search(
        r"A test needs the same seeds or folds in both rows: train more seeds \(.*sweep.py --seeds 5\)", text
    )
    assert "chosen after the results" not in text


def test_choosing_the_best_row_is_said_to_be_a_choice(run):
    rows = [row(run, A, lr=0.1), row(run, B, lr=0.2)]
    said = "The best is chosen after the results, which favours row 1: --baseline"
    assert said in comparison.text(comparison.of(rows)).replace("\n    ", " ")
    assert said not in comparison.text(comparison.of(rows, "lr=0.1"))


def test_a_row_that_chose_its_epoch_on_the_measured_images_or_had_one_run_is_not_the_best(run):
    rows = [row(run, A + 0.05, select="test"), row(run, A, select="last"), row(run, [0.99], select="last", lr=0.2)]
    (section,) = comparison.of(rows)
    assert section.rows[0].figures["accuracy"] == 0.99
    assert section.baseline.name == "select=last lr=0.001"
    assert "select=test chooses the best epoch on the images that are measured" in comparison.text([section])


def test_rows_on_other_images_are_shown_apart_and_not_compared(run):
    folds = [row(run, A - number / 10, "5", lr=lr) for number, lr in enumerate((0.1, 0.2))]
    rows = [row(run, B, lr=0.1), *folds, row(run, C, "val", lr=0.1), row(run, C + B / 9, "val", lr=0.2)]
    sections = comparison.of(rows)
    text = comparison.text(sections).replace("\n    ", " ")
    assert [len(section.rows) for section in sections] == [1, 2, 2]
    assert [row.number for section in sections for row in section.rows] == [1, 2, 3, 4, 5]
    assert [len(section.pairs) for section in sections] == [0, 1, 1]
    assert "held-out accuracy on 5 folds of the training images of sample, each left out of training in turn" in text
    assert "Rows that are measured on different images are not compared with one another." in text
    assert "Folds share training images" in text
    (pair,) = sections[1].pairs
    assert (pair["n"], pair["p_value"]) == (5, None)  # the same difference in each fold
    assert len({row.name for section in sections for row in section.rows}) == 5


def test_one_fold_alone_is_said_to_be_one(run):
    """Such as those of sweep.py --judge 40k/20k."""
    rows = []
    for values, lr in ((A, 0.1), (B, 0.2)):
        flags = run.flags | {"fold": "1/3"}
        rows.append([each._replace(flags=flags, unit=alike.unit(seed, flags), images=("3", "sample"))
                     for seed, each in enumerate(row(run, values, lr=lr, folds="3"))])  # fmt: skip
    text = comparison.text(comparison.of(rows)).replace("\n    ", " ")
    assert "held-out accuracy on fold 1 of 3 of the training images of sample, mean" in text
    assert "in turn" not in text
    assert "over common seeds, " in text


def test_the_note_says_over_what_a_test_is(run):
    for n, over in ((5, "folds"), (10, "seeds and folds")):
        values = np.r_[A, B[::-1]][:n]
        text = comparison.text(
            comparison.of([row(run, values, "5", lr=0.1), row(run, values[::-1] - 0.1, "5", lr=0.2)])
        )
        assert f"over common {over}, two-sided" in text.replace("\n    ", " ")


def test_the_units_of_folds_are_seed_and_fold(run):
    first, second = (row(run, np.r_[A, B][:10] - part, "5", lr=part + 0.1) for part in (0.1 * A[0], 0))
    (section,) = comparison.of([first, second])
    assert [row.figures["n"] for row in section.rows] == [10, 10]
    assert section.rows[0].figures["seeds"] == [0, 1]
    assert section.rows[0].figures["command"].endswith("--fold K/5")


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("lr=0.3", "no row has the name or number 'lr=0.3': did you mean 'lr=0.[12]'"),
        ("batch_size=32", "fits 2 rows: batch_size=32 lr=0.2; batch_size=32 lr=0.1: add words, or give a number"),
        ("32", "fits 2 rows"),
        ("9", "no row has the name or number '9'"),
        ("\n", "no row has the name"),
    ],
)
def test_a_baseline_that_is_no_row_is_an_error_that_helps(baseline, said, run):
    rows = [row(run, A - lr, lr=lr, batch_size=size) for lr, size in ((0.1, 32), (0.2, 32), (0.1, 64))]
    rows[1] = row(run, A, lr=0.2, batch_size=32)
    with pytest.raises(UserError, match=said) as error:
        comparison.of(rows, baseline)
    assert str(error.value).isprintable()
    for text in ("batch_size=64", "3", "lr=0.1 batch_size=64", "64", "64 0.1"):
        assert comparison.of(rows, text)[0].baseline.facts["batch_size"] == 64


def test_columns_are_what_differs_and_the_head_says_what_all_share(run):
    (section,) = comparison.of([row(run, A, augment={"flip": 0.5}), row(run, B, augment={"shift": [1, 0.3]})])
    cells = comparison.table(section)
    assert list(cells)[:3] == ["flip", "shift", "n"]
    assert (cells["flip"], cells["shift"]) == (["0.5", "false"], ["false", "[1,0.3]"])
    assert section.common == "mlp, recipe published, epochs=3, batch_size=32"
    assert [each.name for each in section.rows] == ["flip=0.5 shift=false", "flip=false shift=[1,0.3]"]


# --- files -----------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_and_counted_once(trained, tmp_path, capsys):
    source = trained[0] / "best_mlp_fmnist.json"
    for place in ("a/b/c/best_mlp_fmnist.json", "a/best_mlp_fmnist.0123abcd.json", ".hidden/best_mlp_fmnist.json"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / place)
    (tmp_path / "a" / "best_mlp_fmnist.pictures.json").write_text("{}")
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    other = source.read_text().replace('"seed": 0', '"seed": 5')
    (tmp_path / "a" / "best_mlp_fmnist.0123456789abcdef.json").write_text(other)  # an earlier run that was kept aside
    assert [path.name for path in runs.find(tmp_path)].count("best_mlp_fmnist.json") == 1
    (group,) = runs.group(runs.read([tmp_path, tmp_path / "a"]))
    assert [run.unit.seed for run in group] == [0, 5]
    assert capsys.readouterr().err == ""


def test_the_shipped_checkpoints_are_not_counted_twice(capsys):
    rows = runs.collect([runs.cli.RUNS, runs.cli.CHECKPOINTS])
    assert rows == runs.collect([runs.cli.RUNS])
    assert capsys.readouterr().err == ""


def test_fold_runs_of_train_are_a_row_of_their_own(trained, tmp_path):
    for fold in ("1/2", "2/2"):
        flags = ["--model", "mlp", "--epochs", 3, "--batch-size", 32, "--data-dir", SAMPLE, "--fold", fold]
        finished = run_script("train.py", *flags, "--checkpoint-dir", tmp_path / fold.replace("/", "of"))
        assert finished.returncode == 0, finished.stderr
    files = [f"--{kind}={tmp_path / name}" for kind, name in (("csv", "runs.csv"), ("markdown", "table.md"))]
    finished = run_script("compare.py", tmp_path, trained[0], *files, "--figures-dir", tmp_path / "figures")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(comparison.report([tmp_path, trained[0]]))
    assert "held-out accuracy on 2 folds of the training images of sample" in finished.stdout.replace("\n    ", " ")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    assert sorted((line["model"], line["images"], line["fold"]) for line in lines) == [
        ("cnn", "test", ""), ("mlp", "2", "1/2"), ("mlp", "2", "2/2"), ("mlp", "test", ""),
    ]  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert len(re.findall(r"^\|---", table, re.MULTILINE)) == 2
    assert "--fold K/2`" in table


def test_what_would_be_replaced_by_a_slip_is_refused(trained):
    for flag, name in (("--csv", "a.json"), ("--markdown", "a.csv"), ("--csv", "missing/a.csv")):
        assert_one_line_error(run_script("compare.py", trained[0], flag, name), f"{flag}: .* is not a ")
