"""Messages: the form of conversations inside llavakit.

A conversation is a list of `{"role": ..., "content": [parts]}`. A part is a dict with a `type`:

    {"type": "text", "text": "..."}
    {"type": "image" | "video" | "volume", KIND: path, URL, bytes or loaded media item}
                                        of a video also "start" and "end", the seconds of the stretch that is meant
    {"type": "boxes", "boxes": [[x1, y1, x2, y2], ...], "labels": [...], "scores": [...]}
                                        regions of the image before it, corners in pixels; labels and scores optional

An assistant's turn may also bring `token_ids`, the ids it was generated as; llavakit's own templates then read these.
A message with `"placement": "keep"` has its media stay where they are in its text, wherever a template of llavakit's
would move them.

This module converts the forms in which conversations arrive (OpenAI requests, LLaVA's `conversations/from/value`) into
this one and back. It opens no media and knows no template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llavakit.errors import FieldError, quoted
from llavakit.media.regions import read_regions

Part = dict[str, Any]
Message = dict[str, Any]


ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("image", "video", "volume")
KEEP = "keep"  # the placement that moves nothing
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


def is_media(part: Part) -> bool:
    """Whether a part takes a placeholder in the prompt."""
    return part["type"] in MEDIA


def media_of(messages: Iterable[Message]) -> list[Part]:
    """The media of normalised messages in order of appearance."""
    return [part for message in messages for part in message["content"] if is_media(part)]


def text_of(message: Message) -> str:
    """The text of a normalised message without its media."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def normalise(messages: Any, *, where: str = "messages") -> list[Message]:
    """Messages in llavakit's form; messages that have it already are returned equal.

    Args:
        messages: List of `{"role", "content"}`; the content is a string (one text part) or a list of parts, in which
            OpenAI's `image_url` and `video_url` are taken as image and video.
        where: Name of the field in error messages.

    Raises:
        FieldError: If a field is missing or of the wrong type; the message names it by its dotted path.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise FieldError(where, f"must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise FieldError(where, "must hold at least one message")
    normalised = [_message(message, f"{where}.{index}") for index, message in enumerate(messages)]
    for index, message in enumerate(normalised[1:], start=1):
        if message["role"] == "system":
            raise FieldError(f"{where}.{index}.role", "a system message must be the first")
    return normalised


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise FieldError(where, f"must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise FieldError(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {quoted(role)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": _text(content, f"{where}.content")}]
    elif content is None and role == "assistant":
        content = []
    if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
        raise FieldError(f"{where}.content", f"must be a string or a list of parts, not {type(content).__name__}")
    parts = [_part(part, f"{where}.content.{n}") for n, part in enumerate(content)]
    found = {"role": role, "content": parts}
    if message.get("placement") is not None:
        if message["placement"] != KEEP:
            raise FieldError(f"{where}.placement", f"must be {KEEP!r} or left out, not {quoted(message['placement'])}")
        found["placement"] = KEEP
    given = message.get("token_ids")
    if given is None:
        return found
    if role != "assistant" or not _is_ids(given):
        raise FieldError(f"{where}.token_ids", "must be a list of token ids, of an assistant's turn alone")
    return found | {"token_ids": list(given)}


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value
    )


def _part(part: Any, where: str) -> Part:
    if not isinstance(part, Mapping):
        raise FieldError(where, f"must be an object with a type, not {type(part).__name__}")
    modality = part.get("type")
    if not isinstance(modality, str):
        raise FieldError(f"{where}.type", f"must be a string, not {type(modality).__name__}")
    if modality in ("text", "input_text"):
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text")}
    if modality == "boxes":
        return boxes_part(part, where)
    if modality in _OPENAI:
        value = part.get(modality, part.get("image_url"))
        value = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(value, str):
            raise FieldError(f"{where}.{modality}", "must be an object with a url")
        return {"type": _OPENAI[modality], _OPENAI[modality]: value}
    if modality in MEDIA:
        # Tables fill the keys that a part does not have with None.
        inner = {key: value for key, value in part.items() if value is not None}
        for alias in ("url", "path"):  # transformers' spelling of the same part
            if alias in inner:
                inner.setdefault(modality, inner.pop(alias))
        for bound in ("start", "end"):
            if modality != "video" and bound in inner:
                raise FieldError(f"{where}.{bound}", f"is a time in a video; {modality} parts have none, leave it out")
        return inner
    known = ("text", *MEDIA, "boxes", "image_url", "video_url")
    raise FieldError(f"{where}.type", f"must be one of {', '.join(known)}, not {quoted(modality)}")


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise FieldError(where, f"must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FieldError(where, "holds half a surrogate pair, which is no character") from None
    return text


def boxes_part(value: Mapping[str, Any], where: str) -> Part:
    """A content part with checked `boxes` and, where they are given, `labels` and `scores`.

    Raises:
        FieldError: See `llavakit.media.regions.read_regions`.
    """
    regions = read_regions(value, where)
    part: Part = {"type": "boxes", "boxes": [list(region.box) for region in regions]}
    for name in ("labels", "scores"):
        if value.get(name) is not None:
            part[name] = [getattr(region, name[:-1]) for region in regions]
    return part


def literals_in(messages: Iterable[Message]) -> list[str]:
    """The media literals (`<image>`) that normalised messages hold as text."""
    texts = (part["text"] for message in messages for part in message["content"] if part["type"] == "text")
    return [literal for text in texts for literal in _LITERAL.findall(text)]


def split_literals(value: str, literals: Mapping[str, str] = LITERALS) -> list[Part]:
    """Text with `<image>`, `<video>` and `<image3d>` as parts; media parts carry no media item yet.

    The text around media stays exactly as it is: an empty text part follows a media item after which a template
    would otherwise begin a new line.
    """
    parts: list[Part] = []
    position = 0
    for match in _LITERAL.finditer(value):
        if match.group() in literals:
            parts += _text_after(parts, value[position : match.start()])
            parts.append({"type": literals[match.group()]})
            position = match.end()
    rest = value[position:]
    if rest or not parts:
        parts += _text_after(parts, rest) or [{"type": "text", "text": ""}]
    return parts


def _text_after(parts: Sequence[Part], text: str) -> list[Part]:
    """A stretch of literal text as parts, after the parts that stand before it."""
    if not parts:
        return [{"type": "text", "text": text}] if text else []
    kept_on_line = [] if text[:1] in (" ", "\n") else [{"type": "text", "text": ""}]
    return [*kept_on_line, {"type": "text", "text": text}] if text else kept_on_line


def from_llava(record: Mapping[str, Any]) -> list[Message]:
    """Messages of a LLaVA record.

    `boxes` holds the regions of the image (`{"boxes", "labels", "scores"}`), or a list with one such object per image.
    Media are the values of `image`, `images`, `video`, `volume` or `image3d` (one or a list), taken in order by the
    literals in the text. `<image>` takes the next image or, if none is left, the next video or volume:
    published video and volume records write it too. In a record without media a literal inside a text is text.

    Args:
        record: `{"conversations": [{"from", "value"}], ...}`; further keys are ignored.

    Raises:
        FieldError: If a field is missing, a speaker is unknown, or literals and media differ in number.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise FieldError("conversations", "must be a list of turns with from and value")
    waiting = _record_media(record)
    boxes = record_boxes(record, sum(part["type"] == "image" for part in waiting))
    total = len(waiting)
    taken = 0
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        field = f"conversations.{index}"
        if not isinstance(turn, Mapping):
            raise FieldError(field, f"must be an object with from and value, not {type(turn).__name__}")
        speaker = turn.get("from")
        role = _FROM.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise FieldError(f"{field}.from", f"must be human or gpt, not {quoted(speaker)}")
        value = turn.get("value")
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # answers that are numbers, as files of questions have them
        value = _text(value, f"{field}.value")
        if not total and value.strip() in LITERALS:
            raise FieldError(f"{field}.value", f"is {value.strip()} alone, but the record has no media")
        parts: list[Part] = []
        for part in split_literals(value) if total else [{"type": "text", "text": value}]:
            if is_media(part):
                taken += 1
                part = _take(waiting, part["type"]) or part
            parts.append(part)
            if part["type"] == "image" and boxes:
                parts.append(boxes.pop(0))
        messages.append({"role": role, "content": parts})
    if taken != total:
        texts = "".join(str(turn["value"]) for turn in turns)
        used = " and ".join(literal for literal in LITERALS if literal in texts) or "<image>"
        problem = f"{taken} {used} in the text, but {total} media in the record"
        answers = [n for n, said in enumerate(messages) if said["role"] == "assistant" and media_of([said])]
        if taken > total and answers:
            raise FieldError(
                f"conversations.{answers[0]}.value",
                f"{problem}, and this answer holds one of them; if it is meant as text, write it otherwise ([image])",
            )
        raise FieldError("conversations", problem)
    if waiting:
        raise FieldError("conversations", f"no place in the text for the {waiting[0]['type']} of the record")
    return messages


def _record_media(record: Mapping[str, Any]) -> list[Part]:
    media: list[Part] = []
    for key, modality in _MEDIA_KEYS.items():
        value = record.get(key)
        if value is None:
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if any(item is None or (isinstance(item, str) and not item) for item in values):
            raise FieldError(key, "must name a file, or the key must be left out")
        media += [{"type": modality, modality: item} for item in values]
    return media


def record_boxes(record: Mapping[str, Any], images: int) -> list[Part]:
    """One `boxes` part per image of a record, or none if it has no `boxes`."""
    value = record.get("boxes")
    if value is None:
        return []
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise FieldError(
            "boxes", 'must be {"boxes": [[x1, y1, x2, y2], ...]}, or a list with one such object per image'
        )
    if len(entries) != images:
        raise FieldError("boxes", f"has {len(entries)} entries, but the record has {images} images")
    where = ["boxes"] if isinstance(value, Mapping) else [f"boxes.{number}" for number in range(images)]
    return [boxes_part(entry, place) for entry, place in zip(entries, where, strict=True)]


def behind_images(content: Iterable[Mapping[str, Any]], boxes: Iterable[Part]) -> list[Part]:
    """Content parts with one of the `boxes` parts behind every image."""
    waiting = iter(boxes)
    return [own for part in content for own in ([part, next(waiting)] if part["type"] == "image" else [part])]


def _take(waiting: list[Part], modality: str) -> Part | None:
    fitting = [place for place, part in enumerate(waiting) if part["type"] == modality]
    if not fitting and modality == "image" and waiting:
        fitting = [0]
    return waiting.pop(fitting[0]) if fitting else None


def limit_images(messages: Sequence[Message], most: int) -> tuple[list[Message], int]:
    """Normalised messages whose turns open with at most `most` images in an unbroken run, and how many are left out.

    Of a longer run as many images are kept, spread evenly, and the turn's text loses the space at its end (Video-LLaVA,
    whose code draws them at random). Turns that open with text stay as they are; of images with text between them all
    are kept, and only that space goes.
    """
    limited, dropped = [], 0
    for message in messages:
        parts = message["content"]
        places = [place for place, part in enumerate(parts) if part["type"] == "image"]
        run = parts[places[0] : places[-1] + 1] if places else []
        unbroken = all(part["type"] == "image" or part.get("text") == "" for part in run)
        if len(places) > most and is_media(parts[0]):
            kept = {places[number * (len(places) - 1) // max(most - 1, 1)] for number in range(most)}
            kept = kept if unbroken else set(places)
            dropped += len(places) - len(kept)
            content = [dict(part) for place, part in enumerate(parts) if place not in places or place in kept]
            if content[-1]["type"] == "text":
                content[-1]["text"] = content[-1]["text"].rstrip()
            message = message | {"content": content}
        limited.append(message)
    return limited, dropped


def media_first(
    messages: Sequence[Message], *, before: str = "", after: str = "", collapse: bool = False
) -> list[Message]:
    """Messages in which the media of a turn come before its text, each on a line of its own.

    Args:
        before, after: Text around every media item (`<Image>` and `</Image>`).
        collapse: Whether several media of a turn become one, as in the original LLaVA (the others are lost).
    """
    moved = []
    for message in normalise(messages):
        media = [part for part in message["content"] if is_media(part)][: 1 if collapse else None]
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
    """A LLaVA record of messages: `conversations` and, per modality, one value or a list."""
    literal = {"image": "<image>", "video": "<video>", "volume": "<image3d>"}
    messages = normalise(messages)
    record: dict[str, Any] = {}
    for modality in MEDIA:
        values = [part.get(modality) for part in media_of(messages) if part["type"] == modality]
        if any(value is not None for value in values):
            record[modality] = values[0] if len(values) == 1 else values
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
