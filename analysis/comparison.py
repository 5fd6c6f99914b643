"""Which way of training is better: rows of runs that differ in their seed alone, and what their differences show.

sections = comparison.of(runs.group(runs.read(folders)), baseline="muon_lr=0.03")
print(comparison.text(sections))
print(comparison.report([Path("sweeps/first")]))     # both in one
"""

import csv
import difflib
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import metrics
from analysis import alike, lines, runs, tables
from runtime import cli
from runtime.errors import UserError, one_line
from training.command import differences

WORTH = 0.002  # a difference of accuracies, 0.2 points, that a reader may care about
SIGNIFICANT = 0.05
USUAL = 5  # seeds of a row; with fewer, their scatter is too uncertain to say that a test would have shown something
NAMED = 4  # rows without a test; more are given by their numbers alone
LABELS = {"train_images": "training images", "select_images": "selection images"}
ON = {  # what rows are measured on: of alike.folds, else one of several folds
    "test": "test accuracy on the {n} test images of {data}",
    "val": "held-out accuracy on the {n} validation images of {data}",
}
IN_TURN = ", each left out of training in turn"


class Row(NamedTuple):
    """The runs of one way of training, each of another seed or fold."""

    number: int  # from 1
    name: str
    facts: dict[str, Any]  # of alike.flat
    runs: list[runs.Run]
    figures: dict[str, Any]  # of runs.describe

    @property
    def is_optimistic(self) -> bool:
        """Say whether the best epoch was chosen on the images that the accuracy is measured on."""
        return self.figures["select"] == "test"


class Section(NamedTuple):
    """The rows that are measured on the same images, the most accurate first."""

    images: str
    columns: list[str]  # the facts to show
    common: str  # what all rows share
    rows: list[Row]
    baseline: Row
    is_chosen: bool  # by the user; else it is the best row
    pairs: list[dict[str, Any]]  # the other rows against the baseline


def of(groups: Iterable[Sequence[runs.Run]], baseline: str | None = None) -> list[Section]:
    """Compare the rows of runs.group with a baseline: by default the best row of those that are measured on its images.

    baseline: a row's number, or words of its name. P-values are corrected for all comparisons of all sections.
    Raises UserError where no row, or more than one, has this name.
    """
    by_images: dict[tuple[str, ...], list[Row]] = {}
    for row in _rows(groups):
        by_images.setdefault(row.runs[0].images, []).append(row)
    counted = itertools.count(1)
    ordered = sorted(by_images.items(), key=lambda each: each[0][0] != "test")  # first what is measured on a test set
    sections = [[row._replace(number=next(counted)) for row in rows] for _, rows in ordered]
    chosen = _named(baseline, [row for rows in sections for row in rows]) if baseline else None
    baselines = [chosen if chosen in rows else _best(rows) for rows in sections]
    pairs = [_pairs(rows, of) for rows, of in zip(sections, baselines, strict=True)]
    correct([pair for several in pairs for pair in several])
    return [
        Section(_images(rows, by_images), columns(rows), _common(rows), rows, of, of is chosen, found)
        for rows, of, found in zip(sections, baselines, pairs, strict=True)
    ]


def report(folders: Sequence[Path], baseline: str | None = None) -> str:
    """Return what compare.py prints of the finished runs in these folders. Raises UserError, of runs.read and of()."""
    return text(of(runs.group(runs.read(folders)), baseline))


# --- rows ------------------------------------------------------------------------------------------------


def _rows(groups: Iterable[Sequence[runs.Run]]) -> list[Row]:
    """Make the rows, the most accurate first, without their numbers."""
    groups = list(groups)
    facts = alike.flat([group[0].facts for group in groups])
    rows = [
        Row(0, name, each, list(group), runs.describe(group))
        for name, each, group in zip(names(facts), facts, groups, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.figures["accuracy"])


def names(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name rows by their facts, in as few words as tell them apart: "cnn fast muon_lr=0.03".

    A user can type these words. One row alone is named by its model and recipe.
    """
    base = [name for name in ("model", "recipe") if len({each[name] for each in every}) > 1]
    found = [" ".join(str(each[name]) for name in base) for each in every]
    for keys in (("select",), ("folds",), None):  # the first two change the numbers of images, too
        for name in {name for name in found if found.count(name) > 1}:
            kind = [place for place, other in enumerate(found) if other == name]
            differing = alike.differing([every[place] for place in kind])
            differing = [key for key in differing if key in (keys or differing)]
            for place in kind:
                words = [f"{_label(key)}={alike.text(key, every[place].get(key))}" for key in differing]
                found[place] = " ".join(filter(None, [name, *words]))
    return [name or "{model} {recipe}".format(**each) for name, each in zip(found, every, strict=True)]


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the facts that a table shows: those that differ, but for what model, recipe and selection imply."""
    facts = [row.facts for row in rows]
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for each in facts:
        kinds.setdefault(tuple(each[name] for name in ("model", "recipe", "select")), []).append(each)
    shown = {"select", "precision"}
    shown |= {name for kind in kinds.values() for name in alike.differing(kind)}
    shown |= {name for row in rows for name in differences(row.figures["model"], row.runs[0].flags)}
    differing = alike.differing(facts)
    first = [name for name in ("model", "recipe") if name in differing]
    return first + [name for name in differing if name in shown and name not in first]


def _common(rows: Sequence[Row]) -> str:
    """Say what all rows share and a reader must know: model, recipe, and values that are not the recipe's."""
    shown, (first, *_) = columns(rows), rows
    words = [first.facts["model"]] if "model" not in shown else []
    words += [f"recipe {first.facts['recipe']}"] if "recipe" not in shown else []
    differing = alike.differing([row.facts for row in rows])
    changed = differences(first.figures["model"], first.runs[0].flags)
    words += [f"{name}={alike.text(name, first.facts.get(name, False))}" for name in changed if name not in differing]
    return ", ".join(words)


def _images(rows: Sequence[Row], every: Iterable[tuple[str, ...]]) -> str:
    """Say on which images rows are measured."""
    kind, data, *rest = rows[0].runs[0].images
    if kind in ON:
        said = ON[kind].format(data=data, n=rest[0] if rest else "")
    else:
        said = f"held-out accuracy on {_folds(rows, kind)} of the training images of {data}"
        said += IN_TURN if _has_several_folds(rows) else ""
    several = [other for other in every if other[:2] == (kind, data)]
    return said if len(several) < 2 else f"{said} ({' '.join(each[:8] for each in rest)})"


def _folds(rows: Iterable[Row], of: str) -> str:
    """Name the folds that runs hold out: "5 folds" for all of them, "fold 1 of 3", "folds 1, 2 of 5"."""
    held_out = sorted({run.unit.fold for row in rows for run in row.runs})
    if len(held_out) == int(of):
        return f"{of} folds"
    return f"fold{'s' if len(held_out) > 1 else ''} {_ranges(held_out)} of {of}"


def _has_several_folds(rows: Iterable[Row]) -> bool:
    return len({run.unit.fold for row in rows for run in row.runs}) > 1


def _label(name: str) -> str:
    return LABELS.get(name, "images" if name == "data_sha256" else name)


def _best(rows: Sequence[Row]) -> Row:
    """Return the most accurate row: of those that chose their epoch on other images, and with several runs, if any."""
    candidates: Sequence[Row] = rows
    for kept in ([row for row in rows if not row.is_optimistic], [row for row in rows if len(row.runs) > 1]):
        candidates = [row for row in candidates if row in kept] or candidates
    return candidates[0]


def _named(baseline: str, rows: Sequence[Row]) -> Row:
    """Return the row of that number, or the only row whose name has these words, or that has these values."""
    words, shown = set(baseline.split()), columns(rows)
    found = [row for row in rows if baseline in (str(row.number), row.name)]
    found = found or [row for row in rows if words and words <= set(row.name.split())]
    found = found or [
        row
        for row in rows
        if words and words <= {*row.name.split(), *(alike.text(name, row.facts.get(name)) for name in shown)}
    ]
    if len(found) == 1:
        return found[0]
    if found:
        some = "; ".join(row.name for row in found[:4])
        raise UserError(
            f"--baseline {one_line(baseline)!r} fits {len(found)} rows: {some}: add words, or give a number"
        )
    near = difflib.get_close_matches(baseline, [part for row in rows for part in (row.name, *row.name.split())], 1)
    said = f"did you mean {near[0]!r}?" if near else "rows are " + "; ".join(row.name for row in rows[:9])
    raise UserError(f"--baseline: no row has the name or number {one_line(baseline)!r}: {said}")


# --- differences -----------------------------------------------------------------------------------------


def _pairs(rows: Sequence[Row], baseline: Row) -> list[dict[str, Any]]:
    """Compare the other rows with the baseline, without a correction yet."""
    accuracies = {row.number: {run.unit: run.accuracy for run in row.runs} for row in rows}
    folds = alike.folds(baseline.runs[0].flags)
    return [
        {"row": row.number, "name": row.name, "against": baseline.number}
        | pair(accuracies[row.number], accuracies[baseline.number], folds)
        for row in rows
        if row is not baseline
    ]


def pair(a: Mapping[alike.Unit, float], b: Mapping[alike.Unit, float], folds: str | None = None) -> dict[str, Any]:
    """Compare two rows, accuracies by unit, over the units of both: metrics.paired; of less than two only {"n"}.

    folds: of alike.folds. "over" says whether the units differ in "seeds", "folds" or "seeds and folds".
    """
    units = sorted(a.keys() & b.keys())
    if len(units) < 2:
        return {"n": len(units)}
    found = metrics.paired([a[unit] for unit in units], [b[unit] for unit in units], alike.overlap(units, folds))
    return found | {"over": _over(units)}


def _over(units: Iterable[alike.Unit]) -> str:
    seeds, folds = (len(set(part)) > 1 for part in zip(*units, strict=True))
    return " and ".join([*(["seeds"] if seeds or not folds else []), *(["folds"] if folds else [])])


def correct(pairs: Sequence[dict[str, Any]]) -> None:
    """Add "p_holm" to the pairs that were tested, by Holm's method over all of them, and to each "text".

    "seeds_needed" is how many show a difference of "worth" at the strictest step of that method with a power of 80%,
    None above 1,000. It is absent for folds, whose number is fixed, and for two seeds, whose SD says too little.
    """
    tested = [each for each in pairs if each.get("p_value") is not None]
    for each, p in zip(tested, metrics.holm([each["p_value"] for each in tested]), strict=True):
        each["p_holm"] = p
        if each["over"] == "seeds" and each["n"] > 2:
            each["worth"] = abs(each["difference"]) if _is_lost(each) else WORTH
            each["seeds_needed"] = metrics.seeds_needed(each["worth"], each["sd"], SIGNIFICANT / len(tested))
    for each in pairs:
        each["text"] = sentence(each)


def _is_lost(pair: Mapping[str, Any]) -> bool:
    """Say whether a difference is significant by itself, but not after the correction."""
    return pair["p_value"] < SIGNIFICANT <= pair["p_holm"]


def sentence(pair: Mapping[str, Any]) -> str:
    """Say in plain words what a comparison shows."""
    n = pair["n"]
    if n < 2:
        return f"no test is possible with {n or 'no'} run{'' if n == 1 else 's'} of a common seed"
    difference, interval = 100 * pair["difference"], pair["ci95"]
    if interval is None:
        return f"{difference:+.2f} points for each of {n} seeds: no test is possible where all differences are equal"
    low, high = (100 * end for end in interval)
    p = f"p = {pair['p_holm']:.2g}" if pair["p_holm"] >= 1e-4 else "p < 0.0001"
    if pair["p_value"] >= SIGNIFICANT:
        return f"no difference shown at n = {n} ({low:+.2f} to {high:+.2f} points, {p}){_advice(pair)}"
    words, low, high = (("better", "higher"), low, high) if difference > 0 else (("worse", "lower"), -high, -low)
    said = f"by {abs(difference):.2f} points ({low:.2f} to {high:.2f})"
    if _is_lost(pair):
        return f"{words[1]} {said}, but not significant after the correction ({p}, n = {n}){_advice(pair)}"
    return f"{words[0]} {said}, {p}, n = {n}"


def _advice(pair: Mapping[str, Any]) -> str:
    """Say how many seeds show a difference: the one found where the correction lost it, else one that matters."""
    if pair["n"] == 2:
        return f"; too few {pair['over']} to tell"
    if "seeds_needed" not in pair:
        return ""
    what = "that difference" if _is_lost(pair) else f"a difference of {100 * WORTH:.1f} points"
    needed = pair["seeds_needed"]
    if needed is None:
        return f"; {what} would need over 1,000 seeds"
    if needed > pair["n"]:
        return f"; {what} would need about {needed} seeds"
    return f"; {what} would likely have shown" if pair["n"] >= USUAL else "; more seeds are needed to tell"


# --- text ------------------------------------------------------------------------------------------------


def text(sections: Sequence[Section]) -> str:
    """Write the sections for a terminal: a table of each, its comparisons in words, and how to read them."""
    blocks = []
    for section in sections:
        blocks.append(_wrapped(title(section)))
        cells = table(section)
        numbers = [row.number for row in section.rows]
        blocks.append(lines.columns({name: [one_line(cell) for cell in each] for name, each in cells.items()}, numbers))
        if section.pairs:
            blocks.append("\n".join(map(_wrapped, _compared(section))))
    return "\n\n".join([*blocks, *map(_wrapped, notes(sections))])


def _wrapped(text: str) -> str:
    """Break a text into lines, but not within "n = 5" and "p < 0.0001"."""
    return cli.wrapped(re.sub(" ([=<]) ", "\xa0\\1\xa0", one_line(text))).replace("\xa0", " ")


def markdown(sections: Sequence[Section]) -> str:
    """Write the same in Markdown, with the command of each row."""
    blocks = []
    for section in sections:
        cells = {"": [str(row.number) for row in section.rows]} | table(section)
        cells = {name: [tables.plain(cell) for cell in each] for name, each in cells.items()}
        cells["`train.py` with"] = [tables.command(row.figures, "") for row in section.rows]
        blocks.append(tables.plain(title(section)) + ".")
        blocks.append(tables.table([*cells], [*zip(*cells.values(), strict=True)]).rstrip())
        if section.pairs:
            head, *said = map(tables.plain, _compared(section))
            blocks.append("\n".join([head, "", *(f"- {line}" for line in said)]))
    return "\n\n".join([*blocks, *map(tables.plain, notes(sections))]) + "\n"


def table_of_runs(sections: Sequence[Section]) -> str:
    """Write every run as a line of CSV, for pandas or R: its row, what differs, seed, fold, accuracy, cost and file."""
    rows = [row for section in sections for row in section.rows]
    shown = dict.fromkeys(["model", "recipe", *(name for section in sections for name in section.columns)])
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    last = ["images", "seed", "fold", "accuracy", "seconds", "cores", "history"]
    writer.writerow(["row", "name", *map(_label, shown), *last])
    for row in rows:
        values = [alike.text(name, row.facts.get(name)) for name in shown]
        for run in row.runs:
            measured = [run.images[0], run.unit.seed, run.flags.get("fold") or "", run.accuracy, run.seconds, run.cores]
            writer.writerow([row.number, row.name, *values, *measured, cli.shown(run.path)])
    return file.getvalue()


def numbers(sections: Sequence[Section]) -> dict[str, Any]:
    """Return everything as plain values, fit for JSON. A unit is seed and fold, or 0 without folds."""
    rows = [row for section in sections for row in section.rows]
    return {
        "runs": [
            {"row": row.number, "name": row.name, "images": row.runs[0].images[0]}
            | row.figures
            | {"mflop": runs.mflop(row.figures["model"])}
            | {"units": [[*run.unit] for run in row.runs], "accuracies": [run.accuracy for run in row.runs]}
            for row in rows
        ],
        "comparisons": [pair for section in sections for pair in section.pairs],
        "notes": notes(sections),
    }


def title(section: Section) -> str:
    """Say what a section's table shows."""
    n = {len(row.runs) for row in section.rows}
    return ": ".join(filter(None, [section.common, section.images])) + (", mean ± SD" if n != {1} else "")


def table(section: Section) -> dict[str, list[str]]:
    """Return the columns of a section's table, title to cells."""
    rows, figures = section.rows, [row.figures for row in section.rows]
    found = {_label(name): [alike.text(name, row.facts.get(name)) for row in rows] for name in section.columns}
    found["n"] = [str(each["n"]) for each in figures]
    found["accuracy"] = [tables.accuracy(each) for each in figures]
    if any("ci95" in each for each in figures):
        found["95% interval"] = [tables.interval(each) for each in figures]
    found["training"] = [tables.seconds(each) for each in figures]
    if len({each["cores"] for each in figures}) > 1:
        found["cores"] = [str(each["cores"]) for each in figures]
    return found


def _compared(section: Section) -> list[str]:
    """Write the comparisons of a section, a heading first."""
    best = "" if section.is_chosen else ", the best"
    said = [f"Against {section.baseline.number}{best}: {section.baseline.name}"]
    said += [f"{pair['row']} {pair['name']}: {pair['text']}" for pair in section.pairs if pair["n"] > 1]
    if untested := [pair for pair in section.pairs if pair["n"] < 2]:
        named = ", ".join(f"{pair['row']} {pair['name']}" for pair in untested)
        which = named if len(untested) <= NAMED else _ranges([pair["row"] for pair in untested])
        units = "folds" if _has_several_folds(section.rows) else "seeds"
        said.append(f"{which}: no test is possible: fewer than 2 {units} in common with {section.baseline.number}")
    return said


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers in short: "2, 5 to 9"."""
    runs = [
        [each for _, each in run] for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def notes(sections: Sequence[Section]) -> list[str]:
    """Say how to read the comparisons, and what limits them."""
    pairs, found = [pair for section in sections for pair in section.pairs], []
    rows = [row for section in sections for row in section.rows]
    if tested := [pair for pair in pairs if "p_holm" in pair]:
        found.append(_tests(tested))
    if any("ci95" in row.figures and row.runs[0].images[0] == "test" for row in rows):
        found.append("95% interval: of the mean over seeds. It leaves out the chance in the choice of test images.")
    if any(pair["n"] < 2 for pair in pairs):
        advice = f"{cli.command('sweep.py')} --seeds {USUAL}"
        found.append(f"A test needs the same seeds or folds in both rows: train more seeds ({advice}).")
    guessed = [each for each in sections if not each.is_chosen and any("p_holm" in pair for pair in each.pairs)]
    if guessed:
        best = " and ".join(f"row {section.baseline.number}" for section in guessed)
        found.append(f"The best is chosen after the results, which favours {best}: --baseline names another.")
    if any(row.is_optimistic for row in rows):
        found.append("select=test chooses the best epoch on the images that are measured: too high an accuracy.")
    if any(alike.overlap([run.unit for run in row.runs], row.figures.get("folds")) for row in rows):
        found.append("Folds share training images; intervals and p allow for that (Nadeau and Bengio 2003).")
    if len(sections) > 1:
        found.append("Rows that are measured on different images are not compared with one another.")
    return found


def _tests(tested: Sequence[Mapping[str, Any]]) -> str:
    """Say which test the comparisons are by."""
    n, over = len(tested), " or ".join(sorted({pair["over"] for pair in tested}))
    correction = f", with Holm's correction for {n} comparisons" if n > 1 else ""
    said = f"p: paired t test over common {over}, two-sided{correction}. Intervals of differences: 95%"
    said += ", without correction." if correction else "."
    if not any(" would need about " in pair["text"] for pair in tested):
        return said
    step = f" at p < {SIGNIFICANT} / {n}, the strictest step of the correction" if n > 1 else ""
    return f"{said} Seeds needed: for a power of 80%{step}."
