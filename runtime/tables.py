"""Read a CSV file with a header, and name the line of each fault.

for line, row in tables.rows(path, content, check_header):
    print(line, row["label"])
"""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime import cli
from runtime.errors import UserError

MOST_BYTES = 2**26  # of a CSV file


def rows(path: Path, content: bytes, check: Callable[[list[str]], None]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file as (line in the file, column to value); empty lines are skipped.

    path: how errors call the file; content: its bytes, UTF-8. check is called with the columns' names before the first
    row, and may refuse them. Raises UserError, as soon as it gets there, for what is no CSV file in UTF-8.
    """
    name, line = cli.shown(path), 0
    table = csv.reader(io.StringIO(decode(name, content), newline=""), strict=True)
    try:
        header = [title.strip() for title in next(table, [])]
        line = table.line_num
        if twice := [title for title in header if title and header.count(title) > 1]:
            raise UserError(f"{name}, line 1: its header names the column {twice[0]!r} twice")
        check(header)
        for values in table:
            line = table.line_num
            if values and len(values) != len(header):
                raise UserError(f"{name}, line {line}: it has more or fewer values than the header has columns")
            if values:
                yield line, dict(zip(header, values, strict=True))
    except csv.Error as error:  # in what begins there: a quote that nothing ends reaches to the last line
        raise UserError(f"{name}, line {line + 1}: no CSV file: {error}") from None


def decode(name: str, content: bytes) -> str:
    """Decode the bytes of a file in UTF-8, with or without a byte order mark. Raises UserError, which names it."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}, line {line}: not a text in UTF-8: save it as CSV in UTF-8") from None
