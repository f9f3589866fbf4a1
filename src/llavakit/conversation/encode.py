"""Encoding: messages to token ids and labels, with one tokenisation for both.

Every media item is one placeholder id, which the processor expands when it knows how many tokens the media item takes.
Labels follow from the characters that a token covers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llavakit.conversation.labels import LabelPolicy, Tokens, label_policy
from llavakit.conversation.messages import Message, Part, is_media, limit_images, normalise, text_of
from llavakit.conversation.template import PLACEHOLDER, SPELT, TYPED, Span, Template, template_for
from llavakit.conversation.tokens import IMAGE_PLACEHOLDER, marks_first_word, special_tokens, tokenize
from llavakit.errors import UserError
from llavakit.media.regions import read_regions

__all__ = ["IMAGE_PLACEHOLDER", "Encoded", "chat_template_for", "encode", "escape_special_tokens", "tokenize"]


@dataclass
class Encoded:
    """A conversation as the model reads it, media not yet expanded.

    Attributes:
        ids: Token ids; `IMAGE_PLACEHOLDER` stands for one media item of any modality.
        labels: The id where the model is to learn it, else -100.
        media: The media parts in the order of their placeholders; an image's `regions` are in its part.
        text: The rendered text; `[image]` where a text spells `<image>`.
        fully_masked: Whether the label policy rejected the whole sample (`rounds` only).
        weights: Loss weight of every token, if the label policy weights them.
        notes: What of the conversation was left out, in words.
    """

    ids: list[int]
    labels: list[int]
    media: list[Part] = field(default_factory=list)
    text: str = ""
    fully_masked: bool = False
    weights: list[float] | None = None
    notes: tuple[str, ...] = ()


def encode(
    messages: Sequence[Message],
    template: str | Template,
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    placement: str | None = None,
    labels: str | Mapping[str, Any] | LabelPolicy | None = None,
    max_length: int | None = None,
) -> Encoded:
    """Token ids, labels and media of a conversation.

    Args:
        messages: Messages in any form that `normalise` takes.
        template: Template or its registered name; "tokenizer" is the tokenizer's own chat template.
        tokenizer: A transformers tokenizer with offsets (every "fast" one).
        add_generation_prompt: Whether the prompt ends where the assistant is to answer.
        continue_final_message: Whether the prompt ends inside the last message, so that the assistant continues it.
            Without either the conversation is a training sample.
        placement: "front", "ahead", "lead", "back" or "keep" instead of the template's own.
        labels: Label policy: a name, `{"type": NAME, OPTION: ...}`, or a policy. Default: the template's own for
            training samples; for prompts "spans", which marks the earlier answers.
        max_length: Cut text-only conversations to this many tokens (others are cut once their media are expanded).

    Raises:
        UserError: If the messages or the template do not fit.
    """
    template = template_for(template, tokenizer).for_tokenizer(tokenizer)
    training = not (add_generation_prompt or continue_final_message)
    policy = label_policy("spans" if labels is None and not training else labels, template)
    messages, notes = normalise(messages), ()
    if not (template.keeps_first_answer if training else template.prompts_keep_first_answer):
        messages, notes = _without_first_answers(messages, template)
    if training and template.most_images is not None:
        messages, dropped = limit_images(messages, template.most_images)
        if dropped:
            notes += (
                f"{dropped} images are left out, {template.name!r} takes {template.most_images} at the head of a turn",
            )
    if training and template.drops_unanswered:
        messages, more = _without_last_question(messages, template)
        notes += more
    text, answers = template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        training=training,
        placement=placement,
        typed=SPELT if template.jinja is None else TYPED,
    )
    media = collect_media(messages)
    if text.count(PLACEHOLDER) != len(media):
        raise UserError(
            f"template {template.name!r} wrote {text.count(PLACEHOLDER)} placeholders for {len(media)} media; "
            "it does not take media in this place"
        )
    given = _given_ids(messages, answers) if template.jinja is None else {}
    ids, offsets = tokenize(
        text,
        tokenizer,
        whole=template.jinja is not None,
        cuts={*_cuts(text, answers, template), *itertools.chain(*given)},
        begins=template.bos != "written",
    )
    ids, offsets = _with_given(ids, offsets, given, keeps_end=not template.as_generated)
    if template.bos == "once" and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids, offsets = ids[1:], offsets[1:]
    if template.bos == "before_text" and text.startswith(PLACEHOLDER) and ids[:1] == [tokenizer.bos_token_id]:
        ids, offsets = ids[1:], offsets[1:]
    if max_length is not None and not media:
        ids, offsets = ids[:max_length], offsets[:max_length]
    found = policy(Tokens(text, answers, ids, offsets, template, tokenizer, max_length))
    return Encoded(ids, found.ids, media, text.replace(SPELT, TYPED), found.fully_masked, found.weights, notes)


def chat_template_for(template: str | Template, tokenizer: Any, *, begins: bool | None = None) -> str:
    """The Jinja text to save with a tokenizer, with which transformers and servers get the ids of `encode`.

    They tokenise the rendered text as a whole, placeholders included, and add no special tokens.

    Args:
        begins: Whether the text opens with the begin token. Default: where the tokenizer puts it in front of a text.
    """
    template = template_for(template, tokenizer)
    if template.jinja is not None:
        return template.jinja
    if begins is None:
        begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] != [None]
    return template.whole(begins=begins, restarts=marks_first_word(tokenizer))


def escape_special_tokens(messages: Sequence[Message], tokenizer: Any) -> list[Message]:
    """Messages in which no text of a user or a tool acts as a special token (`</s>`, `<|im_end|>`).

    An invisible word joiner is inserted after the first character of each, so that text from outside can neither end a
    turn nor open another. For servers; training text is left alone. Further fields of a message (`tool_calls`) are
    kept.
    """
    specials = sorted((token for token in special_tokens(tokenizer) if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def part_of(part: Part) -> Part:
        if part["type"] != "text":
            return part
        return part | {"text": pattern.sub(lambda found: found[0][0] + "\u2060" + found[0][1:], part["text"])}

    escaped = [
        message | {"content": list(map(part_of, message["content"]))}
        if message["role"] in ("user", "tool")
        else message
        for message in normalise(messages)
    ]
    return [{**given, **message} for given, message in zip(messages, escaped, strict=True)]


def _cuts(text: str, answers: Sequence[Span], template: Template) -> Iterator[int]:
    """Where the tokenizer starts anew by the template's rules."""
    if template.pieces:
        yield from itertools.chain(*answers)
        if begin := template.specials.get("bos_token"):
            yield from itertools.chain(*(found.span() for found in re.finditer(re.escape(begin), text)))
    if template.breaks:
        marks = sorted(template.breaks, key=len, reverse=True)
        yield from (found.end() for found in re.finditer("|".join(map(re.escape, marks)), text))


def _given_ids(messages: list[Message], answers: Sequence[Span]) -> dict[Span, list[int]]:
    """The ids that assistant turns bring (`token_ids`), by the characters of the turn.

    Raises:
        UserError: If the template does not say where every turn of the assistant stands.
    """
    turns = [message for message in messages if message["role"] == "assistant"]
    if not any("token_ids" in turn for turn in turns):
        return {}
    for own in (turns, [turn for turn in turns if text_of(turn)]):
        if len(own) == len(answers):
            pairs = zip(answers, own, strict=True)
            return {span: list(turn["token_ids"]) for span, turn in pairs if "token_ids" in turn}
    raise UserError("messages: the template does not mark the assistant's turns, so token_ids have no place in it")


def _with_given(
    ids: list[int], offsets: list[Span], given: Mapping[Span, Sequence[int]], *, keeps_end: bool
) -> tuple[list[int], list[Span]]:
    """Tokens in which those of a span with ids of its own are these.

    Args:
        keeps_end: Whether the span's last token, its end mark, follows ids that do not end with it.
    """
    for (start, end), own in given.items():
        inside = [place for place, (a, b) in enumerate(offsets) if start <= a and b <= end and b > a]
        if not inside:
            continue
        first, last = inside[0], inside[-1] + 1
        if keeps_end and own[-1:] != ids[last - 1 : last]:
            last -= 1
        ids = [*ids[:first], *own, *ids[last:]]
        offsets = [*offsets[:first], *[(start, end)] * len(own), *offsets[last:]]
    return ids, offsets


def _without_first_answers(messages: list[Message], template: Template) -> tuple[list[Message], tuple[str, ...]]:
    """The messages from the first turn of the user on, and what was left out of them."""
    first = begin = 1 if messages[0]["role"] == "system" else 0
    while begin < len(messages) and messages[begin]["role"] == "assistant":
        begin += 1
    if begin == first:
        return messages, ()
    note = f"an assistant turn before the first user turn is left out, as the template {template.name!r} was trained"
    return messages[:first] + messages[begin:], (note,)


def _without_last_question(messages: list[Message], template: Template) -> tuple[list[Message], tuple[str, ...]]:
    """The messages up to the last answer, and what was left out of them."""
    end = len(messages)
    while end and messages[end - 1]["role"] not in ("assistant", "system"):
        end -= 1
    if end == len(messages):
        return messages, ()
    note = f"a user turn after the last answer is left out, as the template {template.name!r} was trained"
    return messages[:end], (note,)


def collect_media(messages: Sequence[Message]) -> list[Part]:
    """The media of normalised messages; an image part with boxes behind it gets them as `regions`.

    Raises:
        UserError: If boxes follow no image of the same message.
    """
    media: list[Part] = []
    for index, message in enumerate(messages):
        before: Part | None = None
        for number, part in enumerate(message["content"]):
            if is_media(part):
                before = dict(part)
                media.append(before)
            elif part["type"] == "boxes":
                where = f"messages.{index}.content.{number}"
                if before is None or before["type"] != "image":
                    raise UserError(f"{where}: boxes must follow the image that they belong to, in the same message")
                before["regions"] = [*before.get("regions", ()), *read_regions(part, where)]
    return media
