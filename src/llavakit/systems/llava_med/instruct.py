"""Dialogues about figures from their captions: what a teacher is asked, and what is kept of its reply.

A teacher that sees no picture gets a figure's caption and the sentences of the article that mention the figure, and
writes a conversation as if both speakers saw the figure. What gives the caption away is cut or dropped; the phrases are
data (`phrases.yaml`). Every step is a function of a record alone. Source: `llava/instruct` of v1.0; spec section 5.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from llavakit.errors import FieldError, quoted

Record = Mapping[str, Any]

DOMAINS = ("chest_xray", "ct_scan", "mri", "histology", "gross")
USER, ASSISTANT = "User:", "Assistant:"
IMAGE = "<image>"
SYSTEM = (
    "You are an AI assistant that knows biomedical images well. You are given the caption of a figure from a research "
    "article and, where there are any, the sentences of the article that mention the figure. You do not see the figure "
    "itself.\n"
    "Write a conversation between a person (User) and you (Assistant) about the figure, as if both of you saw it.\n"
    "- Ask and answer about what can be seen: modality, organ, findings and where they are, comparison, appearance.\n"
    "- Do not quote facts, numbers, dates, names or abbreviations that only the text reveals and no picture shows.\n"
    "- Never say mentioned, caption, context, description, title or article; say in the image.\n"
    "- Ask different kinds of visual questions; write at least two or three turns.\n"
    "- Answer with care. Make no diagnosis and give no medical advice; for those, refer to a physician.\n"
    "Begin every question with User: and every answer with Assistant:, with an empty line between turns."
)


# Requests


def mentions_of(record: Record) -> list[str]:
    """The sentences that mention a figure, from strings or objects with `tokens`.

    Raises:
        FieldError: If `in_text_mention` has another form.
    """
    found = record.get("in_text_mention")
    if found is None:
        return []
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise FieldError("in_text_mention", f"must be a list of sentences, not {quoted(found)}")
    sentences = [entry.get("tokens") if isinstance(entry, Mapping) else entry for entry in found]
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            problem = f"must be a sentence or an object with the text tokens, not {quoted(found[number])}"
            raise FieldError(f"in_text_mention.{number}", problem)
    return sentences


def context_of(record: Record, *, mentions: bool = True) -> str:
    """What a teacher is told of a figure.

    Args:
        mentions: Whether the sentences that mention the figure are part of it.

    Raises:
        FieldError: If the record has no label or caption.
    """
    label, caption = (_text(record, name) for name in ("fig_label", "fig_caption"))
    text = f"Figure Caption:\n{label}: {caption}"
    sentences = mentions_of(record) if mentions else []
    return text + "\n\nFigure Context:" + "".join(f"\n\t- {sentence}" for sentence in sentences) if sentences else text


def conversation_text(turns: Sequence[Mapping[str, str]]) -> str:
    """Turns of a LLaVA record as a teacher is to write them."""
    names = {"human": USER, "gpt": ASSISTANT}
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get("from") not in names or not isinstance(turn.get("value"), str):
            raise FieldError(f"conversations.{number}", "must have from (human or gpt) and the text value")
    return "\n\n".join(f"{names[turn['from']]} {turn['value']}" for turn in turns)


def request(
    record: Record, examples: Iterable[Record] = (), *, mentions: bool = True, system: str = SYSTEM
) -> list[dict[str, str]]:
    """The messages that ask a teacher for a conversation.

    Args:
        record: `pair_id`, `fig_label`, `fig_caption`, `in_text_mention`.
        examples: Further figures with `conversations`, shown as turns that the teacher answered before.
        mentions: Whether the sentences that mention a figure are shown.
        system: The rules.

    Raises:
        FieldError: If a record lacks what is shown of it.
    """
    messages = [{"role": "system", "content": system}]
    for example in examples:
        messages.append({"role": "user", "content": context_of(example, mentions=mentions)})
        messages.append({"role": "assistant", "content": conversation_text(example.get("conversations") or [])})
    return [*messages, {"role": "user", "content": context_of(record, mentions=mentions)}]


def domain_of(record: Any) -> str | None:
    """The first of the five domains whose flag is true; None if there is none."""
    flags = record.get("domain") if isinstance(record, Mapping) else None
    return next((name for name in DOMAINS if flags.get(name)), None) if isinstance(flags, Mapping) else None


def in_turn(domains: Sequence[str | None], most: int | None = None) -> list[int]:
    """Numbers of records, one of each domain after the other, until there are `most`.

    Args:
        domains: Domain of every record; those of none come last.
    """
    waiting: dict[str | None, deque[int]] = {name: deque() for name in (*DOMAINS, None)}
    for number, domain in enumerate(domains):
        waiting[domain].append(number)
    others = waiting.pop(None)
    chosen: list[int] = []
    while any(waiting.values()):
        chosen += [queue.popleft() for queue in waiting.values() if queue]
    return [*chosen, *others][:most]


# Replies


def formatted(record: Record, reply: str, *, image_behind: bool = False) -> dict[str, Any] | None:
    """A LLaVA record of a teacher's reply; None if no piece of the reply is a question and its answer.

    Args:
        record: `pair_id` and `domain`.
        image_behind: Whether the picture follows the first question instead of preceding it.
    """
    turns = []
    for piece in reply.split(USER):
        both = piece.split(ASSISTANT)
        if len(both) == 2:
            question, answer = (text.strip() for text in both)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if not turns:
        return None
    name = _text(record, "pair_id")
    turns[0]["value"] = _placed(turns[0]["value"], image_behind)
    return {"id": name, "image": f"{name}.jpg", "domain": record.get("domain"), "conversations": turns}


def with_image(record: Record, *, image_behind: bool = False) -> dict[str, Any]:
    """The record with its picture at the first question, if no question has it."""
    turns = [dict(turn) for turn in record["conversations"]]
    if not any(IMAGE in turn["value"] for turn in turns if turn["from"] == "human"):
        turns[0]["value"] = _placed(turns[0]["value"], image_behind)
    return {**record, "conversations": turns}


def _placed(question: str, behind: bool) -> str:
    return f"{question}\n{IMAGE}" if behind else f"{IMAGE}\n{question}"


@dataclass(frozen=True)
class Phrases:
    """What gives away that a teacher read a caption; see `phrases.yaml`."""

    refusals: tuple[str, ...]
    lead_ins: tuple[str, ...]
    inline: tuple[str, ...]
    sources: tuple[str, ...]


@functools.cache
def phrases() -> Phrases:
    """The phrases of `phrases.yaml`, alternatives written out."""
    from llavakit.data.strict_yaml import parse_yaml

    text = files(__package__).joinpath("phrases.yaml").read_text(encoding="utf-8")
    return Phrases(**{name: tuple(_expanded(entries)) for name, entries in parse_yaml(text).items()})


def _expanded(entries: Iterable[str]) -> Iterator[str]:
    for entry in entries:
        parts = [part.split("|") if number % 2 else [part] for number, part in enumerate(re.split(r"[{}]", entry))]
        yield from map("".join, itertools.product(*parts))


def cleaned_answer(answer: str) -> str | None:
    """An answer without what gives a caption away; None if it is to be dropped.

    As published, what follows a lead-in that is cut becomes lower case behind its first letter.
    """
    known, lowered = phrases(), answer.lower()
    if any(phrase in lowered for phrase in known.refusals):
        return None
    lead = next((phrase for phrase in known.lead_ins if lowered.startswith(phrase)), None)
    if lead is not None:
        answer = answer[len(lead) :].capitalize()
    else:
        for phrase in known.inline:
            answer = answer.replace(phrase, "")
    return None if any(word in answer for word in known.sources) else answer


def cleaned(record: Record) -> dict[str, Any] | None:
    """The record with the question-answer pairs that are kept; None if none is.

    A pair goes with its question, and with it the picture if it stood there: `with_image` puts it back.
    """
    turns, kept = record["conversations"], []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text = cleaned_answer(answer["value"])
        if text is not None:
            kept += [dict(question), {**answer, "value": text}]
    return {**record, "conversations": kept} if kept else None


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise FieldError(name, f"must be a text, not {quoted(value)}" if name in record else "is missing; give a text")
    return value
