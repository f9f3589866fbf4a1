"""Tables of pictures and answers: delimited text, a JSON list or JSON lines, as rows with their lines.

What a spreadsheet exports is read as it is: separators `,` `;` tab or `|`, UTF-8 with or without a byte order mark, and
Windows' Western code page. Nothing here knows what a column means.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.data.readers import open_source
from llavakit.errors import RecordError, UserError, quoted

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
TEXT = (".csv", ".tsv", ".txt")
JSON = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        line: Its line in the file, or its number in a JSON list; counted from 1.
        cells: Column to value; text of a delimited file, any JSON value otherwise.
    """

    line: int
    cells: Mapping[str, Any]


@dataclass
class Table:
    """A file of rows.

    Attributes:
        file: The file.
        columns: Names of the columns; of JSON all keys in the order of their first use.
        rows: Its rows.
        said: How the file was read, in words.
    """

    file: Path
    columns: list[str]
    rows: list[Row]
    said: list[str] = field(default_factory=list)

    def error(self, row: Row, column: str, problem: str) -> RecordError:
        """The error to raise about a cell."""
        return RecordError(str(self.file), row.line, column, problem)


OnBad = Callable[[RecordError], None]


def read_table(path: Path, on_bad: OnBad, is_picture: Callable[[str], bool]) -> Table:
    """The rows of a file.

    Args:
        on_bad: Called for every row that is broken; it raises the error, or the row is left out.
        is_picture: Whether a cell names a picture; a first row that does is no header.

    Raises:
        UserError: If the file cannot be read or has no rows.
    """
    table = _json(path, on_bad) if path.suffix.lower() in JSON else _delimited(path, on_bad, is_picture)
    if not table.rows:
        raise UserError(f"{path}: holds no rows; one row per picture, with its answer, would be right")
    return table


def _json(path: Path, on_bad: OnBad) -> Table:
    source = open_source(path)
    rows, columns = [], {}
    for index in range(len(source)):
        try:
            cells = source[index]
            if not isinstance(cells, Mapping):
                raise RecordError(str(path), source.line(index), "row", f"must be an object, not {quoted(cells)}")
        except RecordError as error:
            on_bad(error)
            continue
        rows.append(Row(source.line(index), cells))
        columns |= dict.fromkeys(map(str, cells))
    return Table(path, list(columns), rows)


def _delimited(path: Path, on_bad: OnBad, is_picture: Callable[[str], bool]) -> Table:
    text, said = _text(path)
    lines = text.lstrip("\n")
    first = lines.partition("\n")[0]
    separator = max(SEPARATORS, key=lambda mark: len(_cells(first, mark)))
    header = _cells(first, separator)
    if len(header) < 2:
        raise UserError(
            f"{path}: its first line has one column ({quoted(first)}); it should name a column of pictures and one of "
            "answers, separated by commas, semicolons or tabs"
        )
    said.append(f"separated by {SEPARATORS[separator]}")
    found = list(_records(path, text, separator))
    if any(map(is_picture, header)):
        if len(header) > 3:
            raise UserError(
                f"{path}: its first line names no columns but a picture ({quoted(first)}); write a line such as "
                f"image{separator}question{separator}answer above it"
            )
        header = ["image", "question", "answer"] if len(header) == 3 else ["image", "answer"]
        said.append(f"no header, taken as {', '.join(header)}")
    else:
        found = found[1:]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two columns are called {twice!r}; give each a name of its own")
    rows = []
    for line, cells in found:
        if len(cells) != len(header):
            on_bad(RecordError(str(path), line, "row", _wrong_count(cells, header, separator)))
        else:
            rows.append(Row(line, dict(zip(header, cells, strict=True))))
    return Table(path, header, rows, said)


def _text(path: Path) -> tuple[str, list[str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\0" in content[:4096]:
        raise UserError(f"{path}: is not a text file; export the table as CSV in UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"), []
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        return text.replace("\r\n", "\n").replace("\r", "\n"), ["not UTF-8, read as Windows' Western code page"]


def _cells(line: str, separator: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]


def _records(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the line that each begins in."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begin = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield begin, [cell.strip() for cell in cells]
            begin = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(str(path), begin, "row", f"is no row of a table ({error})") from None


def _wrong_count(cells: list[str], header: list[str], separator: str) -> str:
    problem = f"has {len(cells)} cell{'' if len(cells) == 1 else 's'}, the header has {len(header)}"
    if len(cells) > len(header):
        return f"{problem}; put text that holds {separator!r} in double quotes"
    other = next(
        (mark for mark in SEPARATORS if mark != separator and len(_cells(cells[0].partition("\n")[0], mark)) > 1), None
    )
    if len(cells) == 1 and other is not None:
        return f"{problem}; the file is separated by {SEPARATORS[separator]}, this row by {SEPARATORS[other]}"
    return f"{problem}, separated by {SEPARATORS[separator]}"
