"""Box files: what a detector found in the pictures of a data set, one entry per id.

    {"id": "000123", "boxes": [[x1, y1, x2, y2], ...], "scores": [0.91, ...], "labels": ["red car", ...]}

Corners are in pixels of the original picture. The file is a JSON list, JSON lines, or an object that is keyed by id. It
belongs to a source of training records (looked up by `id`) or to the questions of a benchmark (by `question_id`).
`llavakit boxes` writes such files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavakit.conversation.messages import Part, behind_images, boxes_part, media_of
from llavakit.data import strict_json
from llavakit.data.readers import BYTE_ORDER_MARK, open_source
from llavakit.data.records import Record, belongs_to
from llavakit.errors import FieldError, RecordError, UserError, quoted

KNOWN = ("id", "boxes", "scores", "labels", "image", "tags")
MOST_IN_FIRST_LINE = 1 << 20


class BoxFile:
    """Boxes by id; entries are read when they are asked for.

    Args:
        path: See the module's docstring.

    Raises:
        UserError: If there is no such file.
        RecordError: If an entry is no object, has no id, or an id occurs twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = str(path)
        if not Path(path).is_file():
            raise UserError(f"{path}: there is no such box file")
        self._entries: Any = _keyed(Path(path)) or open_source(path)
        self._numbers: dict[str, int] = {}
        for number in range(len(self._entries)):
            name = self._id(self._entries[number], number)
            if name in self._numbers:
                first = self._line(self._numbers[name])
                raise RecordError(self.file, self._line(number), "id", f"{quoted(name)} was used in {first} already")
            self._numbers[name] = number

    def _line(self, number: int) -> int:
        return number + 1 if isinstance(self._entries, list) else self._entries.line(number)

    def _id(self, entry: Any, number: int) -> str:
        if not isinstance(entry, Mapping):
            raise RecordError(self.file, self._line(number), "entry", f"must be an object, not {quoted(entry)}")
        if isinstance(entry.get("id"), bool) or not isinstance(entry.get("id"), (str, int)):
            raise RecordError(self.file, self._line(number), "id", "must be the id of a record, a string or a number")
        return str(entry["id"])

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Any:
        return iter(self._numbers)

    def __contains__(self, key: object) -> bool:
        return str(key) in self._numbers

    def part(self, key: str | int) -> Part:
        """The content part `boxes` of an id.

        Raises:
            FieldError: If the id has no entry.
            RecordError: If the entry is broken; it names this file.
        """
        if key not in self:
            raise FieldError("id", f"{quoted(str(key))} has no entry in {self.file}")
        number = self._numbers[str(key)]
        with belongs_to(self.file, self._line(number)):
            entry = self._entries[number]
            if "frames" in entry:
                raise FieldError("frames", "boxes of the frames of a video are not read")
            for name in entry:
                if name not in KNOWN:
                    raise FieldError(name, f"unknown; an entry has {', '.join(KNOWN)}")
            for name in ("labels", "scores"):
                if entry.get(name) is None:
                    raise FieldError(name, "is missing; boxes are chosen by label and score, one of each per box")
            return boxes_part(entry, "entry")


def _keyed(path: Path) -> list[dict[str, Any]] | None:
    """The entries of an object that is keyed by id; None if the file is of another form."""
    with path.open("rb") as stream:
        first = stream.readline(MOST_IN_FIRST_LINE).removeprefix(BYTE_ORDER_MARK).strip()
    if not first.startswith(b"{"):
        return None
    try:
        line = strict_json.parse_json(first, finite=False)
        if isinstance(line, Mapping) and ("id" in line or "boxes" in line):
            return None
    except strict_json.JsonError:
        pass  # an object over several lines, or a broken one
    whole = strict_json.read_json(path, kind=dict, error=UserError)
    return [{"id": name, **entry} if isinstance(entry, Mapping) else entry for name, entry in whole.items()]


def with_boxes(record: Record, boxes: BoxFile) -> Record:
    """A record whose picture has the boxes of its id; a record without pictures stays as it is.

    Raises:
        RecordError: If the record has several pictures, boxes of its own, no id, or an id without an entry.
    """
    if not isinstance(record, Record):
        raise UserError(f"{boxes.file}: a box file belongs to conversations; this stage learns from other records")
    images = [part for part in media_of(record.messages) if part["type"] == "image"]
    if not images:
        return record
    with belongs_to(record.file, record.line):
        if any(part["type"] == "boxes" for message in record.messages for part in message["content"]):
            raise FieldError("boxes", f"the record has boxes of its own; leave them out, or {boxes.file}")
        if len(images) > 1:
            raise FieldError(
                "id",
                f"the record has {len(images)} pictures, {boxes.file} has boxes of one; write them into the record",
            )
        key = record.raw.get("id")
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise FieldError("id", f"is missing; boxes are looked up by it in {boxes.file}")
        part = boxes.part(key)
    messages = [message | {"content": behind_images(message["content"], [part])} for message in record.messages]
    return replace(record, messages=messages)
