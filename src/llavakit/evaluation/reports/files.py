"""Reports from files: JSONL, a JSON list, a JSON object of texts by id, or CSV with a header line.

A record has an id (`id`, `question_id`, `study_id`) and a text. What labellers found may stand beside it: `labels`, a
class of every condition, and `graph`, RadGraph's entities. Order does not matter; ids that repeat, or that one file has
and the other lacks, are refused.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import RecordError, UserError, quoted
from llavakit.evaluation.metrics.reports import BLANK, CONDITIONS, NEGATIVE, POSITIVE, UNCERTAIN
from llavakit.evaluation.records import Record, choose, read_records, read_text

IDS = ("id", "question_id", "study_id")
# Fields of the text; the second kind counts where a record has none of the first, since `text` may be the question.
TEXTS = {
    "prediction": (("prediction",), ("text", "findings", "report")),
    "reference": (("reference", "answer"), ("text", "findings", "report")),
}
CODINGS: dict[str, dict[Any, int]] = {
    "chexbert": {0: BLANK, 1: POSITIVE, 2: NEGATIVE, 3: UNCERTAIN},
    "chexpert": {None: BLANK, 1: POSITIVE, 0: NEGATIVE, -1: UNCERTAIN},
}
LISTED = 5  # ids that a message names


@dataclass(frozen=True)
class Reports:
    """Reports of one file.

    Attributes:
        file: Where they come from.
        ids, texts: Of every report.
        labels: Classes [conditions] per report in CheXbert's coding, None where a report has none.
        graphs: RadGraph's entities per report, None where a report has none.
    """

    file: str
    ids: Sequence[str]
    texts: Sequence[str]
    labels: Sequence[Sequence[int] | None]
    graphs: Sequence[Mapping[str, Any] | None]

    def ordered(self, ids: Sequence[str]) -> Reports:
        """The same reports in the order of `ids`, which are theirs."""
        place = {name: n for n, name in enumerate(self.ids)}
        rows = [place[name] for name in ids]
        columns = ([own[n] for n in rows] for own in (self.texts, self.labels, self.graphs))
        return Reports(self.file, list(ids), *columns)


def read(
    path: str | Path,
    role: str,
    *,
    text_field: str | None = None,
    id_field: str | None = None,
    coding: str | None = None,
    empty: str = "error",
) -> Reports:
    """The reports of a file.

    Args:
        role: "prediction" (an empty text is a report too) or "reference" (must say something).
        text_field, id_field: Names of fields where a record has several that could be meant.
        coding: How `labels` are coded: "chexbert" (0 blank, 1 positive, 2 negative, 3 uncertain) or "chexpert" (1, 0,
            -1, null or empty).
        empty: What a reference without findings is: an "error", or a text like others ("score").

    Raises:
        RecordError: For a record without id or text, a reference without findings, an id that repeats.
        UserError: If the file cannot be read or has no record.
    """
    choose(empty, "empty", ("error", "score"))
    if coding is not None:
        choose(coding, "coding", tuple(CODINGS))
    seen: dict[str, int] = {}
    texts, labels, graphs = [], [], []
    for record in records(path):
        name = _only(record, (id_field,) if id_field else IDS, "the id", "--id-field", (str, int))
        identity = str(record.data[name]).strip()
        if not identity:
            raise record.error(name, "is empty; every report needs an id")
        if identity in seen:
            raise record.error(name, f"{quoted(identity)} is the id of record {seen[identity]} too; ids must differ")
        seen[identity] = record.line
        sure, likely = ((text_field,), ()) if text_field else TEXTS[role]
        fields = sure if any(name in record.data for name in sure) or not likely else likely
        field = _only(record, fields, "the text of the report", "--text-field", (str,))
        text = record.data[field]
        if role == "reference" and empty == "error" and not text.strip():
            hint = "leave it out of both files, or score it with empty=score"
            raise record.error(field, f"report {quoted(identity)} has no findings; {hint}")
        texts.append(text)
        labels.append(_labels(record, coding))
        graphs.append(_graph(record))
    if not texts:
        raise UserError(f"{path}: has no reports")
    return Reports(str(path), list(seen), texts, labels, graphs)


def matched(predictions: Reports, references: Reports, extra: str = "error") -> Reports:
    """Predictions in the order of the references.

    Args:
        extra: What a prediction without a reference is: an "error", or left out ("ignore").

    Raises:
        UserError: If the files do not hold the same ids.
    """
    if extra not in ("error", "ignore"):
        raise UserError(f"extra: must be error or ignore, not {quoted(extra)}")
    own, other = set(predictions.ids), set(references.ids)
    own = own if extra == "error" else own & other
    for ids, have, lack in ((other - own, references, predictions), (own - other, predictions, references)):
        if ids:
            listed = sorted(ids)
            names = ", ".join(quoted(name) for name in listed[:LISTED])
            more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
            raise UserError(f"{lack.file}: has no report {names}{more}, which {have.file} has; ids must be the same")
    return predictions.ordered(references.ids)


def records(path: str | Path) -> list[Record]:
    """The records of a JSONL, JSON or CSV file.

    Raises:
        RecordError: At the first broken record.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return _rows(path)
    whole = _object(path) if path.suffix.lower() == ".json" else None
    if whole is not None and not set(IDS) & set(whole):
        return [
            Record(str(path), number, {"id": name, **value} if isinstance(value, dict) else {"id": name, "text": value})
            for number, (name, value) in enumerate(whole.items(), 1)
        ]
    return read_records(path)


def _object(path: Path) -> dict[str, Any] | None:
    """The one object that a file holds, if it does."""
    try:
        whole = parse_json(read_text(path))
    except JsonError:  # several lines
        return None
    return whole if isinstance(whole, dict) else None


def _rows(path: Path) -> list[Record]:
    """Rows of a CSV file; columns named like conditions are labels."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    found = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise RecordError(str(path), 1, "(header)", "names a column twice")
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                problem = f"has {len(row)} cells, the header has {len(header)}"
                raise RecordError(str(path), reader.line_num, "(row)", problem)
            data: dict[str, Any] = dict(zip(header, row, strict=True))
            named = {name: data.pop(name) for name in CONDITIONS if name in data}
            if named:
                data["labels"] = {name: _number(cell) for name, cell in named.items()}
            found.append(Record(str(path), reader.line_num, data))
    except csv.Error as error:
        raise RecordError(str(path), reader.line_num, "(row)", f"is not CSV: {error}") from None
    return found


def _number(cell: str) -> Any:
    """A cell of a labeller's CSV: a whole number, None if empty; anything else as it is, which no coding knows."""
    try:
        return None if not cell.strip() else int(float(cell)) if float(cell).is_integer() else cell
    except (ValueError, OverflowError):
        return cell


def _only(record: Record, names: Sequence[str], what: str, option: str, kinds: tuple[type, ...]) -> str:
    """The one of several fields that a record has.

    Raises:
        RecordError: If it has none, or several, or a value of another type.
    """
    there = [name for name in names if name in record.data]
    if len(there) > 1:
        raise record.error(there[1], f"and {there[0]} could both be {what}; name the right one with {option}")
    if not there:
        raise record.error(names[0], f"is missing; {what} stands in {' or '.join(names)}, or is named with {option}")
    record.get(there[0], kinds)
    return there[0]


def _labels(record: Record, coding: str | None) -> list[int] | None:
    """Classes in CheXbert's coding.

    Raises:
        RecordError: If a condition or a class is unknown, or nobody said which coding it is.
    """
    given = record.data.get("labels")
    if given is None:
        return None
    if coding is None:
        problem = "need a coding: --coding chexbert (1 positive, 2 negative, 3 uncertain) or chexpert (1, 0, -1)"
        raise record.error("labels", problem)
    if isinstance(given, list) and len(given) == len(CONDITIONS):
        given = dict(zip(CONDITIONS, given, strict=True))
    if not isinstance(given, dict):
        raise record.error("labels", f"must be an object of classes by condition, or a list of {len(CONDITIONS)}")
    for name in given:
        if name not in CONDITIONS:
            raise record.error(f"labels.{name}", f"is no condition; they are {', '.join(CONDITIONS)}")
    classes, absent = CODINGS[coding], None if coding == "chexpert" else BLANK
    found = []
    for name in CONDITIONS:
        value = given.get(name, absent)
        if isinstance(value, (bool, str, list, dict)) or value not in classes:
            known = ", ".join("empty" if key is None else str(key) for key in classes)
            raise record.error(f"labels.{name}", f"is {quoted(value)}; the classes of {coding} are {known}")
        found.append(classes[value])
    return found


def _graph(record: Record) -> Mapping[str, Any] | None:
    """RadGraph's entities, checked; the bare object or one with `entities`.

    Raises:
        RecordError: If they are not whole.
    """
    given = record.data.get("graph")
    if given is None:
        return None
    entities = given.get("entities", given) if isinstance(given, dict) else given
    if not isinstance(entities, dict):
        raise record.error("graph", "must be RadGraph's object of entities by number")
    for name, entity in entities.items():
        where = f"graph.{name}"
        if not isinstance(entity, dict) or not all(isinstance(entity.get(key), str) for key in ("tokens", "label")):
            raise record.error(where, "must have tokens and label, both texts")
        relations = entity.get("relations")
        if not isinstance(relations, list):
            raise record.error(f"{where}.relations", "must be a list of [kind, entity], empty if there are none")
        for relation in relations:
            pair = isinstance(relation, list) and len(relation) == 2 and all(isinstance(own, str) for own in relation)
            if not pair or relation[1] not in entities:
                raise record.error(f"{where}.relations", f"{quoted(relation)} is no pair of a kind and an entity there")
    return entities
