"""Examples: a picture, a question and an answer each, from a table, from records, or from names of files and folders.

    pets.csv                     columns are known by name (image, question, answer, subject and many synonyms)
    pets.jsonl                   rows with the same names, or conversations (LLaVA's or OpenAI's), kept as they are
    pets/                        the one table in it, or
    pets/cat/1.jpg               folders named by the answer, or
    pets/red_disc_01.png         pictures named by the answer

Whatever was assumed is noted in words.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.conversation.messages import media_of, text_of
from llavakit.data.records import BadRecords, read_record
from llavakit.errors import RecordError, UserError, quoted
from llavakit.projects.tables import JSON, TEXT, Row, Table, read_table
from llavakit.registry import nearest

PICTURES = frozenset(
    (
        ".png",
        ".jpg",
        ".jpeg",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".dcm",
        ".heic",
        ".heif",
        ".avif",
        ".jp2",
        ".ppm",
    )
)
_SYNONYMS = {
    "image": "image picture img photo file filename file_name image_path image_file path picture_path scan",
    "question": "question prompt instruction query input",
    "answer": "answer label class category caption text report diagnosis target output response description",
    "subject": "subject subject_id patient patient_id person person_id case case_id study study_id group",
}
COLUMNS = {meaning: names.split() for meaning, names in _SYNONYMS.items()}
"""What a column may be called, likeliest first; upper case, spaces and hyphens do not matter."""
FEW_ANSWERS = 20  # different answers up to which they are taken for classes
_NUMBER = re.compile(r"[\s_.-]*\(?\d*\)?$")


@dataclass(frozen=True)
class Example:
    """Something to learn from, or to ask.

    Attributes:
        id: Its line in the table, or its picture.
        media: Paths of its media.
        question: Of the user; None if the source has none.
        answer: The wanted answer.
        subject: Whom the picture shows, if the source says so; subjects are never split.
        place: File and line in messages.
        record: The conversation, if the source holds conversations.
    """

    id: str
    media: tuple[str, ...]
    question: str | None
    answer: str
    subject: str | None
    place: tuple[str, int]
    record: Mapping[str, Any] | None = None


@dataclass
class Found:
    """What a source holds.

    Attributes:
        examples: All of them.
        root: Folder that their paths are in.
        said: What was assumed, in words.
    """

    examples: list[Example]
    root: Path
    said: list[str] = field(default_factory=list)


def find(source: Path, columns: Mapping[str, str], bad: BadRecords | None) -> Found:
    """The examples of a folder or file.

    Args:
        columns: Names of columns by meaning (`COLUMNS`), where they are not to be guessed.
        bad: Where broken rows are noted and left out; without it the first one is an error.

    Raises:
        UserError: One line that says what is wrong.
    """
    for meaning in columns:
        if meaning not in COLUMNS:
            raise UserError(f"--column: unknown meaning {meaning!r}{nearest(meaning, list(COLUMNS))}")
    if source.is_dir():
        tables = sorted(path for path in source.iterdir() if path.suffix.lower() in (".csv", ".tsv", *JSON))
        if len(tables) > 1:
            names = ", ".join(path.name for path in tables)
            raise UserError(f"{source}: holds {len(tables)} tables ({names}); name one of them")
        if not tables:
            if columns:
                raise UserError(f"--column: {source} holds no table, only pictures")
            return _named(source)
        found = _listed(tables[0], columns, bad)
        found.said.insert(0, f"the table is {tables[0].name}")
        return found
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix.lower() not in (*TEXT, *JSON):
        raise UserError(f"{source}: must be a folder of pictures, or a .csv, .tsv, .json or .jsonl file")
    return _listed(source, columns, bad)


def is_picture(name: str) -> bool:
    """Whether a name ends like that of a picture."""
    return os.path.splitext(name)[1].lower() in PICTURES


def pictures_in(folder: Path) -> Iterator[Path]:
    """All pictures below a folder, in order of their paths; hidden folders are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if is_picture(name) and not name.startswith("."))


# names of files and folders


def _named(folder: Path) -> Found:
    pictures = list(pictures_in(folder))
    if not pictures:
        raise UserError(f"{folder}: holds neither pictures nor a table (.csv, .tsv, .json, .jsonl) of them")
    parents = {picture.parent for picture in pictures}
    if len(parents) > 1:
        loose = [picture for picture in pictures if picture.parent == folder]
        if loose:
            raise UserError(
                f"{loose[0]}: lies beside folders of pictures, so nothing names its answer; move it into one of them"
            )
        answers = [_as_answer(picture.parent.name) for picture in pictures]
        said = "answers are the names of the folders"
    else:
        answers = [_as_answer(_NUMBER.sub("", picture.stem)) for picture in pictures]
        said = "answers are the names of the pictures without their numbers"
        empty = next((picture for picture, answer in zip(pictures, answers, strict=True) if not answer), None)
        if empty is not None:
            raise UserError(
                f"{empty}: its name holds no answer; put pictures into folders named by the answer, name them by it "
                "(cat_01.jpg), or add a table with the columns image and answer"
            )
    examples = []
    for picture, answer in zip(pictures, answers, strict=True):
        name = str(picture.relative_to(folder))
        examples.append(Example(name, (name,), None, answer, None, (str(picture), 1)))
    return Found(examples, folder, [said])


def _as_answer(name: str) -> str:
    return re.sub(r"[_\s]+", " ", name).strip()


# tables


def _listed(path: Path, columns: Mapping[str, str], bad: BadRecords | None) -> Found:
    def on_bad(error: RecordError) -> None:
        if bad is None:
            raise error
        bad.add(error)

    table = read_table(path, on_bad, is_picture)
    if {"conversations", "messages"} & set(table.columns) and not columns:
        return _conversations(table, on_bad)
    names = _meanings(table, columns)
    said = [", ".join([f"{len(table.rows):,} rows", *table.said])]
    said.append(", ".join(f"{meaning} is the column {name!r}" for meaning, name in names.items()))
    files = _Files(path.parent)
    examples = []
    for row in table.rows:
        try:
            examples.append(_example(table, row, names, files))
        except RecordError as error:
            on_bad(error)
    if files.guessed:
        said.append(f"{files.guessed:,} pictures were found by their name below {path.parent}")
    return Found(examples, path.parent, said)


def _example(table: Table, row: Row, names: Mapping[str, str], files: _Files) -> Example:
    values = {meaning: _cell(table, row, name) for meaning, name in names.items()}
    for meaning in ("image", "answer", "question"):
        if meaning in names and not values[meaning]:
            raise table.error(row, names[meaning], "is empty")
    picture = files.find(values["image"])
    if picture is None:
        raise table.error(row, names["image"], f"there is no file {values['image']!r} in {files.root}")
    place = (str(table.file), row.line)
    subject = values.get("subject") or None
    return Example(str(row.line), (picture,), values.get("question"), values["answer"], subject, place)


def _cell(table: Table, row: Row, name: str) -> str:
    value = row.cells.get(name)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (str, int, float)):
        raise table.error(row, name, f"must be text, not {quoted(value)}")
    return str(value).strip()


def _meanings(table: Table, given: Mapping[str, str]) -> dict[str, str]:
    """Column by meaning; a question and a subject may be missing."""
    named = ", ".join(table.columns)
    for meaning, name in given.items():
        if name not in table.columns:
            raise UserError(f"--column {meaning}={name}: {table.file} has no such column; it has {named}")
    found = dict(given)
    plain = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(table.columns)}
    for meaning, synonyms in COLUMNS.items():
        free = [plain[synonym] for synonym in synonyms if synonym in plain and plain[synonym] not in found.values()]
        if meaning not in found and free:
            found[meaning] = free[0]
    first = table.rows[0].cells
    cell = str(first.get(found.get("image"), ""))
    if "image" not in given and not is_picture(cell) and _Files(table.file.parent).find(cell) is None:
        by_value = [name for name in table.columns if is_picture(str(first.get(name, "")))]
        if by_value:
            found["image"] = by_value[0]
    if "image" not in found:
        raise UserError(
            f"{table.file}: no column names pictures; its columns are {named}; call one of them image, or say which it "
            "is with --column image=NAME"
        )
    if "answer" not in found:
        left = [name for name in table.columns if name not in found.values()]
        if len(left) != 1:
            raise UserError(
                f"{table.file}: no column holds the answers; its columns are {named}; call one of them answer, or say "
                "which it is with --column answer=NAME"
            )
        found["answer"] = left[0]
    return {meaning: found[meaning] for meaning in COLUMNS if meaning in found}


class _Files:
    """Pictures of a table: by their path, else by their name alone wherever they are below its folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.guessed = root, 0
        self._known: dict[str, str | None] = {}
        self._names: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The path as it is to be written, relative to the folder; None if there is no such picture."""
        if name not in self._known:
            self._known[name] = name if os.path.isfile(self.root / name) else self._below(name)
            self.guessed += self._known[name] not in (None, name)
        return self._known[name]

    def _below(self, name: str) -> str | None:
        if self._names is None:
            self._names = {}
            for path in pictures_in(self.root):
                for key in {path.name, path.stem}:
                    self._names.setdefault(key, []).append(str(path.relative_to(self.root)))
        base = re.split(r"[/\\]", name)[-1]
        places = self._names.get(base) or self._names.get(os.path.splitext(base)[0], [])
        return places[0] if len(places) == 1 else None


# conversations


def _conversations(table: Table, on_bad: Any) -> Found:
    examples = []
    subjects = [name for name in COLUMNS["subject"] if name in table.columns]
    for row in table.rows:
        try:
            record = read_record(row.cells, str(table.file), row.line)
            examples.append(_of_record(record, row, subjects))
        except RecordError as error:
            on_bad(error)
    said = [f"{len(table.rows):,} conversations, kept as they are"]
    if subjects:
        said.append(f"subject is the key {subjects[0]!r}")
    return Found(examples, table.file.parent, said)


def _of_record(record: Any, row: Row, subjects: list[str]) -> Example:
    asked = next(message for message in record.messages if message["role"] == "user")
    answers = [text_of(message) for message in record.messages if message["role"] == "assistant"]
    media = tuple(part[part["type"]] for part in media_of(record.messages) if isinstance(part[part["type"]], str))
    subject = next((str(row.cells[name]) for name in subjects if row.cells.get(name) is not None), None)
    place = (record.file, record.line)
    return Example(str(row.line), media, text_of(asked).strip(), answers[0].strip(), subject, place, row.cells)


def classes_of(examples: list[Example]) -> Counter[str]:
    """How often each answer occurs."""
    return Counter(example.answer for example in examples)
