"""Messages: the one form in which conversations travel inside llavakit.

A conversation is a list of `{"role": ..., "content": [parts]}`. A part is a dict with a `type`:

    {"type": "text", "text": "..."}
    {"type": "image" | "video" | "volume", KIND: path, URL, bytes or loaded medium}
    {"type": "boxes", "boxes": [[x1, y1, x2, y2], ...]}     regions of the medium before it

This module knows the shapes that conversations come in (OpenAI requests, LLaVA's `conversations/from/value`) and
turns them into that form and back. It opens no media and knows no template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llavakit.errors import UserError

Part = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("image", "video", "volume")
LITERALS = {"<image>": "image", "<video>": "video", "<image3d>": "volume"}

_OPENAI = {"image_url": "image", "video_url": "video", "input_image": "image", "input_text": "text"}
_FROM = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TO = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}
_MEDIA_KEYS = {
    "image": "image",
    "images": "image",
    "video": "video",
    "videos": "video",
    "volume": "volume",
    "volumes": "volume",
    "image3d": "volume",
}
_LITERAL = re.compile("|".join(map(re.escape, LITERALS)))


def is_medium(part: Part) -> bool:
    """Whether a part takes a placeholder in the prompt."""
    return part["type"] in MEDIA


def media_of(messages: Iterable[Message]) -> list[Part]:
    """The media of normalised messages in order of appearance."""
    return [part for message in messages for part in message["content"] if is_medium(part)]


def text_of(message: Message) -> str:
    """The text of a normalised message without its media."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def normalise(messages: Any, *, where: str = "messages") -> list[Message]:
    """Messages in the one inner form; messages that have it already come back equal.

    Args:
        messages: List of `{"role", "content"}`; the content is a string (one text part) or a list of parts, in which
            OpenAI's `image_url` and `video_url` are taken as image and video.
        where: Name of the field in error messages.

    Raises:
        UserError: If a field is missing or of the wrong type; the message names it by its dotted path.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise UserError(f"{where}: must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise UserError(f"{where}: must hold at least one message")
    normalised = [_message(message, f"{where}.{index}") for index, message in enumerate(messages)]
    for index, message in enumerate(normalised[1:], start=1):
        if message["role"] == "system":
            raise UserError(f"{where}.{index}.role: a system message must be the first")
    return normalised


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}.role: must be one of {', '.join(ROLES)}, not {role!r}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif content is None and role == "assistant":
        content = []
    if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
        raise UserError(f"{where}.content: must be a string or a list of parts, not {type(content).__name__}")
    return {"role": role, "content": [_part(part, f"{where}.content.{n}") for n, part in enumerate(content)]}


def _part(part: Any, where: str) -> Part:
    if not isinstance(part, Mapping):
        raise UserError(f"{where}: must be an object with a type, not {type(part).__name__}")
    kind = part.get("type")
    if kind in ("text", "input_text"):
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}.text: must be a string, not {type(part.get('text')).__name__}")
        return {"type": "text", "text": part["text"]}
    if kind == "boxes":
        return {"type": "boxes", "boxes": _boxes(part.get("boxes"), f"{where}.boxes")}
    if kind in _OPENAI:
        value = part.get(kind, part.get("image_url"))
        value = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(value, str):
            raise UserError(f"{where}.{kind}: must be an object with a url")
        return {"type": _OPENAI[kind], _OPENAI[kind]: value}
    if kind in MEDIA:
        inner = dict(part)
        for alias in ("url", "path"):  # transformers' spelling of the same part
            if alias in inner:
                inner.setdefault(kind, inner.pop(alias))
        return inner
    known = ("text", *MEDIA, "boxes", "image_url", "video_url")
    raise UserError(f"{where}.type: must be one of {', '.join(known)}, not {kind!r}")


def _boxes(boxes: Any, where: str) -> list[list[float]]:
    if not isinstance(boxes, Sequence) or isinstance(boxes, str):
        raise UserError(f"{where}: must be a list of boxes [x1, y1, x2, y2]")
    for index, box in enumerate(boxes):
        numbers = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
        if not numbers:
            raise UserError(f"{where}.{index}: must be four numbers [x1, y1, x2, y2]")
    return [list(map(float, box)) for box in boxes]


def split_literals(value: str, literals: Mapping[str, str] = LITERALS) -> list[Part]:
    """Text with `<image>`, `<video>` and `<image3d>` as parts; media parts carry no medium yet.

    What stands between two media stays exactly as it is: an empty text part marks that nothing stands there, so
    that a template adds no newline of its own.
    """
    parts: list[Part] = []
    position = 0
    for match in _LITERAL.finditer(value):
        if match.group() not in literals:
            continue
        if match.start() > position or parts:
            parts.append({"type": "text", "text": value[position : match.start()]})
        parts.append({"type": literals[match.group()]})
        position = match.end()
    if parts and value[position : position + 1] not in ("", " ", "\n"):
        parts.append({"type": "text", "text": ""})
    if position < len(value) or not parts:
        parts.append({"type": "text", "text": value[position:]})
    return parts


def from_llava(record: Mapping[str, Any], *, where: str = "") -> list[Message]:
    """Messages of a LLaVA record.

    Media are the values of `image`, `images`, `video`, `volume` or `image3d` (one or a list), taken in order by the
    literals in the text. `<image>` stands for the next medium of any kind, since published video and volume records
    write it too.

    Args:
        record: `{"conversations": [{"from", "value"}], ...}`; further keys are ignored.
        where: Prefix of field names in error messages.

    Raises:
        UserError: If a field is missing, a speaker is unknown, or literals and media differ in number.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}conversations: must be a list of turns with from and value")
    media = _record_media(record, where)
    messages: list[Message] = []
    taken = 0
    for index, turn in enumerate(turns):
        field = f"{where}conversations.{index}"
        if not isinstance(turn, Mapping):
            raise UserError(f"{field}: must be an object with from and value, not {type(turn).__name__}")
        role = _FROM.get(turn.get("from"))
        if role is None:
            raise UserError(f"{field}.from: must be human or gpt, not {turn.get('from')!r}")
        value = turn.get("value")
        if not isinstance(value, str):
            raise UserError(f"{field}.value: must be a string, not {type(value).__name__}")
        parts = split_literals(value)
        for part in parts:
            if not is_medium(part):
                continue
            if taken < len(media):
                if part["type"] not in ("image", media[taken]["type"]):
                    raise UserError(
                        f"{field}.value: medium {taken + 1} is written as {part['type']}, but the record gives "
                        f"{media[taken]['type']}"
                    )
                part |= media[taken]
            taken += 1
        messages.append({"role": role, "content": parts})
    if taken != len(media):
        raise UserError(f"{where}conversations: {taken} <image> in the text, but {len(media)} media in the record")
    return messages


def _record_media(record: Mapping[str, Any], where: str) -> list[Part]:
    media: list[Part] = []
    for key, kind in _MEDIA_KEYS.items():
        value = record.get(key)
        if value is None:
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if any(item is None or item == "" for item in values):
            raise UserError(f"{where}{key}: must name a file, or the key must be left out")
        media += [{"type": kind, kind: item} for item in values]
    return media


def media_first(
    messages: Sequence[Message], *, before: str = "", after: str = "", collapse: bool = False
) -> list[Message]:
    """Messages in which the media of a turn stand in front of its text, each on a line of its own.

    Args:
        before, after: Text around every medium (`<Image>` and `</Image>`).
        collapse: Whether several media of a turn become one, as in the original LLaVA (the others are lost).
    """
    moved = []
    for message in normalise(messages):
        media = [part for part in message["content"] if is_medium(part)][: 1 if collapse else None]
        if media:
            text = text_of(message).strip()
            content: list[Part] = []
            for number, part in enumerate(media, start=1):
                end = after + ("\n" if number < len(media) or text else "")
                content += [{"type": "text", "text": before}, part, {"type": "text", "text": end}]
            content.append({"type": "text", "text": text})
            boxes = [part for part in message["content"] if part["type"] == "boxes"]
            message = message | {"content": [part for part in content if part.get("text") != ""] + boxes}
        moved.append(message)
    return moved


def to_llava(messages: Sequence[Message]) -> dict[str, Any]:
    """A LLaVA record of messages: `conversations` and, per kind of medium, one value or a list."""
    literal = {"image": "<image>", "video": "<video>", "volume": "<image3d>"}
    messages = normalise(messages)
    record: dict[str, Any] = {}
    for kind in MEDIA:
        values = [part.get(kind) for part in media_of(messages) if part["type"] == kind]
        if any(value is not None for value in values):
            record[kind] = values[0] if len(values) == 1 else values
    record["conversations"] = [
        {
            "from": _TO[message["role"]],
            "value": "".join(
                part["text"] if part["type"] == "text" else literal.get(part["type"], "") for part in message["content"]
            ),
        }
        for message in messages
    ]
    return record
