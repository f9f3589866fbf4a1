"""Preference records: a prompt with its media, an answer that was chosen and one that was rejected.

    {"prompt": "What is this?", "image": "a.png", "chosen": "A cat.", "rejected": "A dog."}
    {"prompt": [{"role": "user", "content": [...]}], "chosen": [{"role": "assistant", "content": "A cat."}], ...}
    {"chosen": [all turns], "rejected": [all turns], "images": [...]}     # TRL's form without a prompt

The first form is LLaVA's: marks (`<image>`) in its prompt name places where there are as many as images; otherwise the
images come first and the marks are dropped, as the published loader does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavakit.conversation.messages import (
    LITERALS,
    MEDIA,
    FieldError,
    Message,
    is_media,
    media_of,
    normalise,
    split_literals,
    text_of,
)
from llavakit.data.records import Record, belongs_to, read_record
from llavakit.errors import RecordError

_MEDIA_KEYS = ("image", "images", "video", "videos", "volume", "volumes", "image3d")
_KEYS = ("prompt", "chosen", "rejected", "system", *_MEDIA_KEYS)
_REFUSED = {
    "tools": "function calls cannot be learned from yet; write the call into the text",
    "margin": "margins between answers are not used; take the key out",
    "label": "is of unpaired preferences (KTO); give chosen and rejected",
    "completion": "is of unpaired preferences (KTO); give chosen and rejected",
}


@dataclass(frozen=True)
class PreferenceRecord(Record):
    """A checked preference record; `messages` are the prompt alone.

    Attributes:
        chosen, rejected: Texts of the answers.
    """

    chosen: str = ""
    rejected: str = ""

    def answered(self, text: str) -> list[Message]:
        """The prompt with an answer."""
        return [*self.messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]


def read_preference(raw: Any, file: str = "<memory>", line: int = 1, **options: Any) -> PreferenceRecord:
    """A checked preference record. Empty and equal answers are read; nothing can be learned from them.

    Args:
        raw: The decoded entry.
        options: See `llavakit.data.records.read_record`.

    Raises:
        RecordError: With the field that is wrong and what would be right.
    """
    with belongs_to(file, line):
        if not isinstance(raw, Mapping):
            raise FieldError("record", f"must be an object, not {type(raw).__name__}")
        for key, problem in _REFUSED.items():
            if raw.get(key) is not None:
                raise FieldError(key, problem)
        _counts(raw)
        for key in ("chosen", "rejected"):
            if raw.get(key) is None:
                raise FieldError(key, "is missing; a preference record needs prompt, chosen and rejected")
        prompt, chosen, rejected = _split(raw)
        prompt = _with_media_in_front(prompt, raw)
        given = {key: raw[key] for key in ("system", *_MEDIA_KEYS) if raw.get(key) is not None}
        found = read_record({"messages": prompt, **given}, file, line, **options | {"needs_answer": False})
        if found.messages[-1]["role"] == "assistant":
            raise FieldError("prompt", "ends with a turn of the assistant; chosen and rejected answer the user")
        return PreferenceRecord(found.messages, file, line, raw, found.notes, chosen=chosen, rejected=rejected)


def _split(raw: Mapping[str, Any]) -> tuple[list[Any], str, str]:
    """Messages of the prompt, and both answers."""
    prompt = raw.get("prompt")
    if prompt is None:
        return _common_prompt(raw)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": _placed(prompt, raw)}]
    elif not isinstance(prompt, Sequence):
        raise FieldError("prompt", f"must be a text or a list of messages, not {type(prompt).__name__}")
    return list(prompt), _answer(raw, "chosen"), _answer(raw, "rejected")


def _common_prompt(raw: Mapping[str, Any]) -> tuple[list[Any], str, str]:
    for key in ("chosen", "rejected"):
        if not isinstance(raw[key], Sequence) or isinstance(raw[key], str):
            raise FieldError("prompt", "is missing")
    chosen, rejected = list(raw["chosen"]), list(raw["rejected"])
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise FieldError("rejected", "must be the same conversation as chosen up to its last turn (pictures included)")
    answers = {key: _answer({key: turns[-1:]}, key) for key, turns in (("chosen", chosen), ("rejected", rejected))}
    return chosen[:-1], answers["chosen"], answers["rejected"]


def _with_media_in_front(prompt: list[Any], raw: Mapping[str, Any]) -> list[Any]:
    """Messages whose first user turn opens with the media of the record's columns, if none says where they belong."""
    messages = normalise(prompt, where="prompt")
    if media_of(messages) or any(mark in text_of(turn) for turn in messages for mark in LITERALS):
        return prompt
    media = [{"type": modality} for modality, count in _counts(raw).items() for _ in range(count)]
    user = next((place for place, turn in enumerate(messages) if turn["role"] == "user"), None)
    if not media or user is None:
        return prompt
    text = {"type": "text", "text": f"\n{text_of(messages[user])}"}
    return [*messages[:user], messages[user] | {"content": [*media, text]}, *messages[user + 1 :]]


def _counts(raw: Mapping[str, Any]) -> dict[str, int]:
    """Media of the record's columns by modality."""
    aliases = {modality: (modality, f"{modality}s") for modality in MEDIA}
    aliases["volume"] += ("image3d",)
    found = {}
    for modality, names in aliases.items():
        given = [name for name in names if raw.get(name) is not None]
        if len(given) > 1:
            raise FieldError(given[1], f"the record has {given[0]} too; leave one of them out")
        value = raw[given[0]] if given else []
        found[modality] = len(value) if isinstance(value, (list, tuple)) else 1
    return found


def _answer(raw: Mapping[str, Any], key: str) -> str:
    """The text of an answer: a text, a message, or a list of one message."""
    answer = raw[key]
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Mapping):
        answer = [answer]
    if not isinstance(answer, Sequence) or len(answer) != 1 or not isinstance(answer[0], Mapping):
        raise FieldError(key, "must be a text or one message of the assistant")
    if answer[0].get("role") != "assistant":
        raise FieldError(key, f"must be a message of the assistant, not of {answer[0].get('role')!r}")
    if answer[0].get("tool_calls"):
        raise FieldError(f"{key}.tool_calls", _REFUSED["tools"])
    message = normalise([answer[0]])[0]
    if media_of([message]):
        raise FieldError(key, "holds media; both answers share those of the prompt")
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _placed(prompt: str, raw: Mapping[str, Any]) -> list[Any]:
    """Content parts of a prompt that is one text; media wait for their file."""
    parts = [part for part in split_literals(prompt) if is_media(part) or part["text"]]
    count = _counts(raw)
    marks = {modality: sum(part["type"] == modality for part in parts) for modality in MEDIA}
    if not any(count.values()) or marks == count:
        return parts
    if sum(marks.values()) and sum(count.values()) > 1:
        raise FieldError(
            "prompt", f"has {sum(marks.values())} marks for {sum(count.values())} media; give one for each"
        )
    text = "".join(part["text"] for part in parts if not is_media(part)).strip()
    media = [{"type": modality} for modality in MEDIA for _ in range(count[modality])]
    return [*media, {"type": "text", "text": f"\n{text}"}]


def check_answers(record: PreferenceRecord) -> None:
    """Refuse a pair that teaches nothing.

    Raises:
        RecordError: If an answer is empty, or both are the same.
    """
    for key in ("chosen", "rejected"):
        if not getattr(record, key).strip():
            raise RecordError(record.file, record.line, key, "the answer is empty; give one or leave the record out")
    if record.chosen == record.rejected:
        raise RecordError(record.file, record.line, "rejected", "is the same answer as chosen; nothing is preferred")
