"""Records: one entry of a data file as checked messages, or one clear error.

Two forms are read: LLaVA's (`conversations` with `from` and `value`, media under `image`, `video` or `volume`) and
OpenAI's (`messages` with content parts, media in the parts or under `images` and the like). This module opens no
media, except to check them when asked to.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.conversation.messages import (
    MEDIA,
    FieldError,
    Message,
    from_llava,
    is_media,
    literals_in,
    media_of,
    normalise,
    text_of,
)
from llavakit.errors import RecordError, UserError

_COLUMNS = {"image": ("images", "image"), "video": ("videos", "video"), "volume": ("volumes", "volume", "image3d")}


@dataclass(frozen=True)
class Record:
    """A checked entry of a data file.

    Attributes:
        messages: Normalised messages; media are absolute paths, bytes or objects that are open already.
        file: The data file.
        line: Line number (JSONL) or number in the list, counted from 1.
        raw: The entry as it stands in the file, for keys that only a system knows.
        notes: How the entry was read where a user may have meant something else, in words.
    """

    messages: list[Message]
    file: str
    line: int
    raw: Mapping[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()


def read_record(
    raw: Any,
    file: str = "<memory>",
    line: int = 1,
    *,
    media_root: str | Path | None = None,
    needs_answer: bool = True,
    check_files: bool = True,
) -> Record:
    """A checked record.

    Args:
        raw: The decoded entry.
        file, line: Where it stands, for messages.
        media_root: Folder that relative media paths start from; default the folder of `file`.
        needs_answer: Whether a record without an assistant turn is an error (training), or not (questions).
        check_files: Whether every media item must exist as a file.

    Raises:
        RecordError: With the field that is wrong and what would be right.
    """
    try:
        if not isinstance(raw, Mapping):
            raise FieldError("record", f"must be an object, not {type(raw).__name__}")
        form = _form(raw)
        messages = from_llava(raw) if form == "conversations" else _from_messages(raw)
        _check_turns(messages, form, needs_answer)
        root = Path(media_root) if media_root is not None else Path(file).parent
        for place, part in _media_places(messages, form):
            part[part["type"]] = _locate(part[part["type"]], root, place, check_files)
    except FieldError as error:
        raise RecordError(file, line, error.field, error.problem) from None
    return Record(messages, file, line, raw, _notes(messages))


def _notes(messages: list[Message]) -> tuple[str, ...]:
    literals = [] if media_of(messages) else literals_in(messages)
    return (f"the record has no media, so {literals[0]} in it is text",) if literals else ()


def _form(raw: Mapping[str, Any]) -> str:
    for form in ("conversations", "messages"):
        if form in raw:
            return form
    raise FieldError("record", f"needs conversations or messages; it has {', '.join(map(str, raw)) or 'nothing'}")


def _from_messages(raw: Mapping[str, Any]) -> list[Message]:
    messages = normalise(raw["messages"])
    waiting = {modality: _column(raw, modality) for modality in MEDIA}
    for index, message in enumerate(messages):
        for number, part in enumerate(message["content"]):
            modality = part["type"]
            if is_media(part) and part.get(modality) is None:
                if not waiting[modality]:
                    raise FieldError(f"messages.{index}.content.{number}", f"names no {modality} file")
                part[modality] = waiting[modality].pop(0)
    for modality, left in waiting.items():
        if left:
            raise FieldError(
                "messages", f"{len(left)} more {modality}s in the record than {modality} parts in the messages"
            )
    return messages


def _column(raw: Mapping[str, Any], modality: str) -> list[Any]:
    value = next((raw[name] for name in _COLUMNS[modality] if raw.get(name) is not None), [])
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_turns(messages: list[Message], form: str, needs_answer: bool) -> None:
    value = "value" if form == "conversations" else "content"
    before = None
    for index, message in enumerate(messages):
        side = "user" if message["role"] == "tool" else message["role"]
        if side == before:
            raise FieldError(f"{form}.{index}", f"a second turn of the {side} in a row; turns must alternate")
        if side == "assistant" and not text_of(message).strip() and not _is_caption(messages):
            raise FieldError(f"{form}.{index}.{value}", "the answer is empty; give one or leave the turn out")
        before = side
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise FieldError(form, "holds no answer of the assistant to learn from")
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise FieldError(form, "holds no turn of the user")


def _is_caption(messages: list[Message]) -> bool:
    """Whether the conversation is a media item with one answer; caption templates learn the end of an empty one."""
    return [message["role"] for message in messages] == ["user", "assistant"] and bool(media_of(messages))


def _media_places(messages: list[Message], form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, message in enumerate(messages):
        for number, part in enumerate(message["content"]):
            if is_media(part):
                modality = part["type"]
                yield (modality if form == "conversations" else f"messages.{index}.content.{number}.{modality}"), part


def _locate(media_item: Any, root: Path, place: str, check_files: bool) -> Any:
    """A media item as an absolute path or bytes; objects that are open already come back as they are."""
    if isinstance(media_item, Mapping) and (
        "bytes" in media_item or "path" in media_item
    ):  # undecoded Hugging Face feature
        media_item = media_item["bytes"] if media_item.get("bytes") is not None else media_item.get("path")
    if isinstance(media_item, (list, tuple)):
        return [_locate(item, root, place, check_files) for item in media_item]  # a video given by its frames
    if not isinstance(media_item, (str, os.PathLike)):
        if media_item is None:
            raise FieldError(place, "names no file")
        return media_item
    name = os.fspath(media_item)
    if name.startswith("data:"):
        return _inline(name, place)
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    if "://" in name:
        raise FieldError(place, f"must be a local file, not the address {name!r}")
    path = root / name
    if check_files and not path.exists():
        raise FieldError(place, f"there is no file {str(path)!r}")
    return str(path)


def _inline(address: str, place: str) -> bytes:
    head, _, body = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise FieldError(place, "must be base64 (data:TYPE;base64,...)") from None


def check_media(record: Record) -> None:
    """Decode the images of a record and see that its other media exist.

    Raises:
        RecordError: If a file is missing, truncated or no image.
    """
    from llavakit.media import load_image

    for message in record.messages:
        for part in message["content"]:
            if part["type"] == "image":
                try:
                    load_image(part["image"])
                except (UserError, OSError, ValueError, SyntaxError) as error:
                    raise RecordError(record.file, record.line, "image", str(error)) from error


class BadRecords:
    """The records that were left out, for the list at the end of a run.

    Args:
        log: A JSONL file that every process appends to, so that workers and ranks share one list. Without it only
            records that this process met are known.
    """

    def __init__(self, log: str | Path | None = None) -> None:
        self.log = Path(log) if log is not None else None
        self._own: dict[tuple[str, int], RecordError] = {}
        self._notes: dict[tuple[str, str], set[int]] = {}

    def add(self, error: RecordError) -> None:
        """Note a record; a second error of the same record changes nothing."""
        key = (error.file, error.line)
        if key in self._own:
            return
        self._own[key] = error
        if self.log is not None:
            entry = {"file": error.file, "line": error.line, "field": error.field, "problem": error.problem}
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def note(self, file: str, line: int, notes: Iterable[str]) -> None:
        """Note how a record was read; the report counts the records of a file with the same note."""
        for note in notes:
            self._notes.setdefault((file, note), set()).add(line)

    def errors(self) -> list[RecordError]:
        """All records that were left out, by file and line."""
        found = dict(self._own)
        if self.log is not None and self.log.exists():
            for text in self.log.read_text(encoding="utf-8").splitlines():
                entry = json.loads(text)
                found.setdefault((entry["file"], entry["line"]), RecordError(**entry))
        return [found[key] for key in sorted(found)]

    def __len__(self) -> int:
        return len(self.errors())

    def __bool__(self) -> bool:
        """Whether there is anything to report."""
        return bool(len(self) or self._notes)

    def report(self, most: int = 20) -> str:
        """What was left out or noted, in words; the first `most` records by name."""
        errors, notes = self.errors(), self._note_lines()
        if not errors:
            return "\n".join(["no record was left out", *notes])
        lines = [f"{len(errors)} record{'s were' if len(errors) > 1 else ' was'} left out:"]
        lines += [f"  {error}" for error in errors[:most]]
        if len(errors) > most:
            lines.append(f"  and {len(errors) - most} more")
        return "\n".join(lines + notes)

    def _note_lines(self) -> list[str]:
        found = []
        for (file, note), lines in sorted(self._notes.items(), key=lambda item: (item[0][0], min(item[1]))):
            more = f" (and {len(lines) - 1} more such)" if len(lines) > 1 else ""
            found.append(f"{file}:{min(lines)}: {note}{more}")
        return found
