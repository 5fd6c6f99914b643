"""What evaluate.py prints of its results, in lines that fit into a terminal.

print(lines.measured_on(result))                         # of evaluation.describe
lines.print_columns(lines.accuracies(results))
"""

from collections.abc import Sequence
from typing import Any

from runtime import cli
from runtime.errors import one_line


def measured_on(result: dict[str, Any]) -> str:
    """Say on which images a result was measured, and which of them its second accuracy is without."""
    split = f"{result['split']} split of " if result["split"] else ""
    said = [f"{split}{result['data']}, n = {result['n']:,}"]
    if without := result.get("without"):
        said.append(f"without these: the {without['excluded']:,} in {without['file']}; n = {without['n']:,} are left")
    return "\n".join(cli.wrapped(one_line(line)) for line in said)


def accuracy(result: dict[str, Any]) -> str:
    """Write an accuracy with its interval."""
    return "{:.2%}  (95% interval {:.2%} to {:.2%})".format(result["accuracy"], *result["accuracy_ci95"])


def accuracies(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the columns of the accuracies and their intervals, title to cells: first those on all images."""
    columns = _pair("accuracy", "95% interval", results)
    if "without" in results[0]:
        columns |= _pair("without these", "their interval", [each["without"] for each in results])
    return columns


def _pair(title: str, of_intervals: str, results: list[dict[str, Any]]) -> dict[str, list[str]]:
    intervals = ["{:.2%} to {:.2%}".format(*each["accuracy_ci95"]) for each in results]
    return {title: [f"{each['accuracy']:.2%}" for each in results], of_intervals: intervals}


def print_columns(columns_of: dict[str, list[str]]) -> None:
    """Print columns, title to cells, with the rows numbered from 1; those that do not fit in follow below."""
    print(f"\n{columns(columns_of)}")


def columns(cells_of: dict[str, list[str]], numbers: Sequence[int] | None = None) -> str:
    """Lay out columns, title to cells; those that do not fit in follow below.

    numbers: of the rows, by default from 1.
    """
    blocks: list[list[str]] = []
    for title, cells in cells_of.items():
        wide = max(map(len, (title, *cells)))
        column = [f"  {text:>{wide}}" for text in (title, *cells)]
        if not blocks or len(blocks[-1][0]) + len(column[0]) > cli.WIDTH:
            blocks.append(["  ", *(f"{number:>2}" for number in numbers or range(1, len(cells) + 1))])
        blocks[-1] = [line + part for line, part in zip(blocks[-1], column, strict=True)]
    return "\n\n".join("\n".join(block) for block in blocks)
