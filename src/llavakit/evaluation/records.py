"""Files of questions, gold answers and predictions, read with line numbers.

A record is one JSON object of a JSONL file or of a JSON list. Faults are reported as `FILE:LINE: FIELD: PROBLEM`. This
module knows no benchmark; benchmarks say which fields they need.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import RecordError, UserError

T = TypeVar("T")

_MISSING = object()
_WORDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _WORDS.get(type(value), type(value).__name__)


@dataclass(frozen=True)
class Record:
    """One object of a data file and its place in it.

    Attributes:
        file: The data file.
        line: Line in a JSONL or TSV file, or index in a JSON list; counted from 1.
        data: The object.
    """

    file: str
    line: int
    data: dict[str, Any]

    def error(self, field: str, problem: str) -> RecordError:
        """The error to raise about `field` of this record."""
        return RecordError(self.file, self.line, field, problem)

    def get(self, field: str, kinds: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """The value of `field`, checked to be one of `kinds`.

        Args:
            default: Returned if the field is absent or null; without it, an absent field is an error.

        Raises:
            RecordError: If the field is absent or of another type.
        """
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        value = self.data.get(field)
        if value is None and field not in self.data and default is _MISSING:
            raise self.error(field, f"is missing; give {' or '.join(_WORDS[k] for k in kinds)}")
        if value is None and default is not _MISSING:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(field, f"must be {' or '.join(_WORDS[k] for k in kinds)}, is {_kind(value)}")
        return value

    @property
    def id(self) -> str:
        """`question_id` as text, so that 12 and "12" are the same question."""
        return str(self.get("question_id", (str, int)))


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        RecordError: If it is not JSON.
    """
    try:
        return parse_json(read_text(path))
    except JsonError as error:
        raise RecordError(str(path), 1, "(json)", str(error)) from None


def _reason(error: JsonError) -> str:
    return str(error).removeprefix("not valid JSON (").removesuffix(")")


def _parse_line(file: str, number: int, line: str) -> Record:
    try:
        data = parse_json(line)
    except JsonError as error:
        problem = f"is not JSON: {_reason(error)}; one object per line is needed"
        raise RecordError(file, number, "(line)", problem) from None
    if not isinstance(data, dict):
        raise RecordError(file, number, "(line)", f"must be an object, is {_kind(data)}")
    return Record(file, number, data)


def read_records(path: str | Path, on_broken: Callable[[RecordError], None] | None = None) -> list[Record]:
    """The records of a JSONL file or of a JSON list (told apart by content; the suffix does not matter).

    Args:
        on_broken: Called for every line that is not a JSON object, which is then left out; by default such a line
            is an error.

    Raises:
        RecordError: At the first broken record.
    """
    file, text = str(path), read_text(path)
    if text.lstrip()[:1] == "[":
        return as_records(path, read_json(path))
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 inside strings
        if not line.strip():
            continue
        try:
            records.append(_parse_line(file, number, line))
        except RecordError as error:
            if on_broken is None:
                raise
            on_broken(error)
    return records


def read_answers(path: str | Path) -> list[Record]:
    """The records of a predictions file, each with an id and a text.

    Raises:
        RecordError: At the first broken record.
    """
    records = read_records(path)
    for record in records:
        for field, kinds in (("question_id", (str, int)), ("text", str)):
            record.get(field, kinds)
    return records


def read_table(path: str | Path, columns: Iterable[str] = ()) -> list[Record]:
    """The rows of a TSV file with a header line; values are strings, empty cells are None.

    Raises:
        RecordError: If one of `columns` is not in the header.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images are stored in cells
    file = str(path)
    lines = (f"{line}\n" for line in read_text(path).split("\n"))  # cells may hold line breaks
    reader = csv.reader(lines, delimiter="\t")
    header = next(reader, [])
    for column in columns:
        if column not in header:
            raise RecordError(file, 1, column, f"is not a column; the columns are {', '.join(header)}")
    records = []
    for row in reader:
        if row:
            cells = [cell if cell != "" else None for cell in row]
            records.append(Record(file, reader.line_num, dict(zip(header, cells, strict=False))))
    return records


def as_records(path: str | Path, rows: Iterable[Any]) -> list[Record]:
    """Rows of a file that were read otherwise, numbered from 1.

    Raises:
        RecordError: If a row is not an object.
    """
    found = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RecordError(str(path), number, "(item)", f"must be an object, is {_kind(row)}")
        found.append(Record(str(path), number, row))
    return found


def index(records: Iterable[Record], key: Callable[[Record], T]) -> dict[T, Record]:
    """Records by key.

    Raises:
        RecordError: If two records have the same key.
    """
    found: dict[T, Record] = {}
    for record in records:
        name = key(record)
        if name in found:
            raise record.error("question_id", f"{_show(name)} was used in line {found[name].line} already")
        found[name] = record
    return found


def _show(key: Any) -> str:
    return " ".join(repr(part) for part in key) if isinstance(key, tuple) else repr(key)


def pair(
    gold: Iterable[Record],
    predictions: Iterable[Record],
    *,
    key: Callable[[Record], Any] = lambda record: record.id,
    gold_key: Callable[[Record], Any] | None = None,
    missing: str = "error",
    extra: str = "error",
) -> Iterator[tuple[Record, Record | None]]:
    """Every gold record with its prediction, in the order of the gold file.

    Args:
        key: Key of a prediction, and of a gold record unless `gold_key` is given.
        missing: What a question without a prediction is: an "error", or "wrong" (paired with None).
        extra: What a prediction for an unknown question is: an "error", or to be left out ("ignore").

    Raises:
        RecordError: For a duplicate, missing or surplus key.
    """
    choose(missing, "missing", ("error", "wrong"))
    choose(extra, "extra", ("error", "ignore"))
    questions = index(gold, gold_key or key)
    answers = index(predictions, key)
    if not questions:
        raise UserError("the gold file holds no question")
    absent = [name for name in questions if name not in answers]
    if absent and missing == "error":
        first = questions[absent[0]]
        hint = "finish the run, or score with missing=wrong to count them as wrong"
        raise first.error(
            "question_id", f"{_show(absent[0])} has no prediction ({len(absent)} of {len(questions)} lack one); {hint}"
        )
    refuse_surplus(answers, questions, extra)
    return ((record, answers.get(name)) for name, record in questions.items())


def refuse_surplus(answers: Mapping[Any, Record], questions: Container[Any], extra: str) -> None:
    """Refuse predictions by key for unknown questions, unless `extra` is "ignore".

    Raises:
        RecordError: For the first one.
    """
    choose(extra, "extra", ("error", "ignore"))
    surplus = [name for name in answers if name not in questions]
    if surplus and extra == "error":
        record = answers[surplus[0]]
        hint = "is this the right gold file? score with extra=ignore to leave such predictions out"
        raise record.error("question_id", f"{_show(surplus[0])} is not in the gold file ({len(surplus)} such); {hint}")


def choose(value: str, name: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of `allowed`.

    Raises:
        UserError: If it is not.
    """
    if value not in allowed:
        raise UserError(f"{name}={value}: must be {' or '.join(allowed)}")
    return value
