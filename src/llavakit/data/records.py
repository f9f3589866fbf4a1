"""Records: one entry of a data file as checked messages, or one clear error.

Two forms are read: LLaVA's (`conversations` with `from` and `value`, media under `image`, `video` or `volume`) and
OpenAI's (`messages` with content parts, media in the parts or under `images` and the like; the text may say `<image>`
where a media item belongs, as in files of LLaMA-Factory and ms-swift). Media are opened in one place, `open_media`,
and whatever goes wrong with a record is a `RecordError`.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.conversation.messages import (
    MEDIA,
    FieldError,
    Message,
    Part,
    behind_images,
    from_llava,
    is_media,
    literals_in,
    media_of,
    normalise,
    record_boxes,
    split_literals,
    text_of,
)
from llavakit.errors import RecordError, UserError, quoted

# Keys of other tools that change what a record teaches and that nothing here honours.
_UNREAD = {
    "tools": "cannot be learned from yet; write them into the system text",
    "audios": "sound cannot be read; take the key out",
    "audio": "sound cannot be read; take the key out",
}
_UNREAD_TURN = {
    "tool_calls": "calls cannot be learned from yet; write the call into the text",
    "function_call": "calls cannot be learned from yet; write the call into the text",
}
_COLUMNS = {"image": ("images", "image"), "video": ("videos", "video"), "volume": ("volumes", "volume", "image3d")}


@dataclass(frozen=True)
class Record:
    """A checked entry of a data file.

    Attributes:
        messages: Normalised messages; media are absolute paths, bytes or objects that are open already.
        file: The data file.
        line: Line number (JSONL) or number in the list, counted from 1.
        raw: The entry as written in the file, for keys that only a system knows.
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
    urls: bool = False,
) -> Record:
    """A checked record.

    Args:
        raw: The decoded entry.
        file, line: Where it stands, for messages.
        media_root: Folder that relative media paths start from; default the folder of `file`.
        needs_answer: Whether a record without an assistant turn is an error (training), or not (questions).
        check_files: Whether every media item must exist as a file.
        urls: Whether media may be http(s) URLs, which stay as they are.

    Raises:
        RecordError: With the field that is wrong and what would be right.
    """
    with belongs_to(file, line):
        if not isinstance(raw, Mapping):
            raise FieldError("record", f"must be an object, not {type(raw).__name__}")
        if raw.get("conversatons") is not None and raw.get("conversations") is None:  # so spelt in released files
            raw = {**raw, "conversations": raw["conversatons"]}
        form = _form(raw)
        _refuse_unread(raw, form)
        messages = from_llava(raw) if form == "conversations" else _from_messages(raw)
        messages = _with_system(raw, messages, form)
        _check_turns(messages, form, needs_answer)
        root = Path(media_root) if media_root is not None else Path(file).parent
        for place, part in _media_places(messages, form):
            part[part["type"]] = _locate(part[part["type"]], root, place, check_files, urls)
    return Record(messages, file, line, raw, _notes(messages))


def _notes(messages: list[Message]) -> tuple[str, ...]:
    literals = [] if media_of(messages) else literals_in(messages)
    return (f"the record has no media, so {literals[0]} in it is text",) if literals else ()


@contextmanager
def belongs_to(file: str, line: int, field: str = "record") -> Iterator[None]:
    """Whatever is raised inside belongs to this record: readers, tokenizers and planners meet whatever a file holds.

    Args:
        file, line: Where the record stands.
        field: What is named if the exception does not say it itself.

    Raises:
        RecordError: With the cause.
    """
    try:
        yield
    except RecordError:
        raise
    except FieldError as error:
        raise RecordError(file, line, error.field, error.problem) from error
    except (UserError, OSError) as error:  # OSError: a file that vanished or is cut off
        raise RecordError(file, line, field, " ".join(str(error).split())) from error
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RecordError(file, line, field, f"cannot be used ({said})") from error


def _form(raw: Mapping[str, Any]) -> str:
    found = [form for form in ("conversations", "messages") if raw.get(form) is not None]
    if len(found) == 2:
        raise FieldError("record", "has conversations and messages; leave one of them out")
    if found:
        return found[0]
    raise FieldError("record", f"needs conversations or messages; it has {', '.join(map(str, raw)) or 'nothing'}")


def _refuse_unread(raw: Mapping[str, Any], form: str) -> None:
    """Refuse what would change the record's meaning if it were left out."""
    for key, problem in _UNREAD.items():
        if raw.get(key):
            raise FieldError(key, problem)
    turns = raw[form] if isinstance(raw[form], (list, tuple)) else ()
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            continue
        for key, problem in _UNREAD_TURN.items():
            if turn.get(key):
                raise FieldError(f"{form}.{index}.{key}", problem)
        for key in ("weight", "loss", "train"):
            if turn.get(key) is not None and turn[key] != 1:
                raise FieldError(f"{form}.{index}.{key}", "single turns cannot be left unlearned; take the key out")


def _with_system(raw: Mapping[str, Any], messages: list[Message], form: str) -> list[Message]:
    """The messages with the text of the record's `system` key in front."""
    system = raw.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise FieldError("system", f"must be a string, not {type(system).__name__}")
    if messages[0]["role"] == "system":
        raise FieldError("system", f"there is one in {form} too; leave one of them out")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]


def _from_messages(raw: Mapping[str, Any]) -> list[Message]:
    messages = normalise(raw["messages"])
    waiting = {modality: _column(raw, modality) for modality in MEDIA}
    if any(waiting.values()) and all(part.get(part["type"]) is not None for part in media_of(messages)):
        messages = [message | {"content": _split(message["content"])} for message in messages]
        for modality, given in waiting.items():
            places = sum(part["type"] == modality and modality not in part for part in media_of(messages))
            if places > len(given):
                name = "image3d" if modality == "volume" else modality
                raise FieldError(
                    "messages", f"{places} <{name}> in the text, but {len(given)} {modality}s in the record"
                )
    messages = _with_record_boxes(raw, messages)
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


def _with_record_boxes(raw: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages with the boxes of the record's `boxes` key behind their images."""
    parts = [part["type"] for message in messages for part in message["content"]]
    boxes = record_boxes(raw, parts.count("image"))
    if not boxes:
        return messages
    if "boxes" in parts:
        raise FieldError("boxes", "there are some in the messages too; leave one of them out")
    waiting = iter(boxes)
    return [message | {"content": behind_images(message["content"], waiting)} for message in messages]


def _split(content: Sequence[Part]) -> list[Part]:
    """Content parts with `<image>` and the like in the text as media parts that wait for their file."""
    return [own for part in content for own in (split_literals(part["text"]) if part["type"] == "text" else [part])]


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


def _locate(media_item: Any, root: Path, place: str, check_files: bool, urls: bool = False) -> Any:
    """A media item as an absolute path or bytes; objects that are open already come back as they are."""
    if isinstance(media_item, Mapping):  # undecoded Hugging Face feature
        content, name = media_item.get("bytes"), media_item.get("path")
        if not isinstance(content, (bytes, type(None))) or not isinstance(name, (str, type(None))):
            raise FieldError(place, "must hold bytes, or a path that is a string")
        media_item = name if content is None else content
    if isinstance(media_item, (list, tuple)):
        return [_locate(item, root, place, check_files, urls) for item in media_item]  # a video given by its frames
    if media_item is None:
        raise FieldError(place, "names no file")
    if isinstance(media_item, (bool, int, float)):
        raise FieldError(place, f"must name a file, not {quoted(media_item)}")
    if not isinstance(media_item, (str, os.PathLike)):
        return media_item
    name = os.fspath(media_item)
    if not name:
        raise FieldError(place, "names no file")
    if name.startswith("data:"):
        return _inline(name, place)
    if urls and name.startswith(("http://", "https://")):
        return name
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    if "://" in name:
        raise FieldError(place, f"must be a local file, not the address {name!r}")
    path = root / name
    if check_files and not os.path.exists(path):  # unlike Path.exists it takes names that no file can have
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


def open_media(record: Record, read: Callable[[Part], Any]) -> Iterator[tuple[Part, Any]]:
    """The media of a record, opened one after another.

    Args:
        read: Opens the media item of a content part, such as `LlavakitProcessor.read_media`.

    Yields:
        Content part, and what `read` returned for it.

    Raises:
        RecordError: For whatever `read` raises; a file may be missing, cut off or no media item at all.
    """
    for part in media_of(record.messages):
        with belongs_to(record.file, record.line, part["type"]):
            item = read(part)
        yield part, item


def check_media(record: Record, read: Callable[[Part], Any] | None = None) -> None:
    """Open the media of a record.

    Args:
        read: See `open_media`; default: llavakit's readers with their own options.

    Raises:
        RecordError: If a file is missing, cut off or no media item.
    """
    for _ in open_media(record, read or _read_plainly):
        pass


def _read_plainly(part: Part) -> Any:
    from llavakit import media

    readers = {"image": media.load_image, "video": media.load_video, "volume": media.load_volume}
    return readers[part["type"]](part[part["type"]])


class BadRecords:
    """The records that were left out, for the list at the end of a run.

    Args:
        log: A JSONL file that every process appends to, so that workers and ranks share one list. Without it only
            the records of this process are known.
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
        self._write(file=error.file, line=error.line, field=error.field, problem=error.problem)

    def note(self, file: str, line: int, notes: Iterable[str]) -> None:
        """Note how a record was read; the report counts the records of a file with the same note."""
        for note in notes:
            lines = self._notes.setdefault((file, note), set())
            if line not in lines:
                lines.add(line)
                self._write(file=file, line=line, note=note)

    def _write(self, **entry: Any) -> None:
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def _logged(self) -> Iterator[dict[str, Any]]:
        """What all processes wrote."""
        if self.log is None or not self.log.exists():
            return
        for text in self.log.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except ValueError:  # a kill tore the line; the record will be met again
                continue

    def errors(self) -> list[RecordError]:
        """All records that were left out, by file and line."""
        found = dict(self._own)
        for entry in self._logged():
            if "note" not in entry:
                found.setdefault((entry["file"], entry["line"]), RecordError(**entry))
        return [found[key] for key in sorted(found)]

    def _all_notes(self) -> dict[tuple[str, str], set[int]]:
        """Lines of the records by file and note, of all processes."""
        found = {key: set(lines) for key, lines in self._notes.items()}
        for entry in self._logged():
            if "note" in entry:
                found.setdefault((entry["file"], entry["note"]), set()).add(entry["line"])
        return found

    def __len__(self) -> int:
        return len(self.errors())

    def __bool__(self) -> bool:
        """Whether there is anything to report."""
        return bool(len(self) or self._all_notes())

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
        for (file, note), lines in sorted(self._all_notes().items(), key=lambda item: (item[0][0], min(item[1]))):
            more = f" (and {len(lines) - 1} more such)" if len(lines) > 1 else ""
            found.append(f"{file}:{min(lines)}: {note}{more}")
        return found
