"""Encoding: messages to token ids and labels, with one tokenisation for both.

A prompt is tokenised in pieces: the text between two media is a text of its own, as in the original LLaVA
(`tokenizer_image_token`), so a piece starts a new word and a begin token is kept only in front of the first. Every
media item is one placeholder id, which the processor expands when it knows how many tokens the media item takes. Labels
follow from the characters that a token covers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llavakit.conversation.labels import by_marks, by_rounds, by_spans, check_policy
from llavakit.conversation.messages import Message, Part, is_media, normalise
from llavakit.conversation.template import PLACEHOLDER, Span, Template, get_template
from llavakit.errors import UserError

IMAGE_PLACEHOLDER = -200


@dataclass
class Encoded:
    """A conversation as the model reads it, media not yet expanded.

    Attributes:
        ids: Token ids; `IMAGE_PLACEHOLDER` stands for one media item of any kind.
        labels: The id where the model is to learn it, else -100.
        media: The media parts in the order of their placeholders; `boxes` that belong to one are in it.
        text: The rendered text.
        blanked: Whether the label policy gave the whole sample up (policy "rounds" only).
    """

    ids: list[int]
    labels: list[int]
    media: list[Part] = field(default_factory=list)
    text: str = ""
    fully_masked: bool = False


def encode(
    messages: Sequence[Message],
    template: str | Template,
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    placement: str | None = None,
    labels: str | None = None,
    max_length: int | None = None,
) -> Encoded:
    """Token ids, labels and media of a conversation.

    Args:
        messages: Messages in any form that `normalise` takes.
        template: Template or its registered name.
        tokenizer: A transformers tokenizer with offsets (every "fast" one).
        add_generation_prompt: Whether the prompt ends where the assistant is to answer.
        continue_final_message: Whether the prompt ends inside the last message, for the assistant to go on with it.
            With neither the conversation is a training sample.
        placement: "front", "lead" or "keep" instead of the template's own.
        labels: Label policy instead of the template's own.
        max_length: Cut text-only conversations to so many tokens (others are cut once their media are expanded).

    Raises:
        UserError: If the messages or the template do not fit.
    """
    template = get_template(template)
    policy = labels or template.labels
    check_policy(policy, template)
    messages = _turns(normalise(messages), template)
    training = not (add_generation_prompt or continue_final_message)
    text, spans = template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        training=training,
        placement=placement,
    )
    media = collect_media(messages)
    if text.count(PLACEHOLDER) != len(media):
        raise UserError(
            f"template {template.name!r} wrote {text.count(PLACEHOLDER)} placeholders for {len(media)} media; "
            "it does not take media in this place"
        )
    ids, offsets = tokenize(text, tokenizer)
    once = template.bos == "once" or (template.bos == "once_in_training" and training)
    if once and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids, offsets = ids[1:], offsets[1:]
    if template.bos == "before_text" and text.startswith(PLACEHOLDER) and ids[:1] == [tokenizer.bos_token_id]:
        ids, offsets = ids[1:], offsets[1:]
    if max_length is not None and not media:
        ids, offsets = ids[:max_length], offsets[:max_length]
    fully_masked = False
    if policy == "spans":
        supervised = by_spans(spans, ids, offsets)
    elif policy == "marks":
        supervised = by_marks(template.marks, tokenizer, text, spans, ids, offsets)
    else:
        supervised, fully_masked = by_rounds(
            template.rounds,
            text,
            ids,
            lambda piece: len(tokenize(piece, tokenizer)[0]),
            real=sum(token != tokenizer.pad_token_id for token in ids),
            limit=tokenizer.model_max_length if max_length is None else max_length,
            continues_words=marks_first_word(tokenizer),
        )
    return Encoded(ids, supervised, media, text, fully_masked)


def chat_template_for(template: str | Template, tokenizer: Any) -> str:
    """The Jinja text to save beside a tokenizer: transformers and servers that use it get the ids of `encode`.

    They tokenise the rendered text as a whole, placeholders included, and add no special tokens.
    """
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] != [None]
    return get_template(template).whole(begins=begins, restarts=marks_first_word(tokenizer))


def escape_special_tokens(messages: Sequence[Message], tokenizer: Any) -> list[Message]:
    """Messages in which nothing that a user or a tool wrote is a special token (`</s>`, `<|im_end|>`).

    An invisible word joiner goes behind the first character of each, so that text from outside cannot end a turn
    or open another. For servers; training text is left alone.
    """
    specials = sorted((token for token in tokenizer.all_special_tokens if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def part_of(part: Part) -> Part:
        if part["type"] != "text":
            return part
        return part | {"text": pattern.sub(lambda found: found[0][0] + "\u2060" + found[0][1:], part["text"])}

    return [
        message | {"content": list(map(part_of, message["content"]))}
        if message["role"] in ("user", "tool")
        else message
        for message in normalise(messages)
    ]


def _turns(messages: list[Message], template: Template) -> list[Message]:
    first = 1 if messages[0]["role"] == "system" else 0
    if not template.keeps_first_answer and messages[first:] and messages[first]["role"] == "assistant":
        return messages[:first] + messages[first + 1 :]
    return messages


def collect_media(messages: Sequence[Message]) -> list[Part]:
    """The media of normalised messages, each with the boxes that were given for it.

    Raises:
        UserError: If boxes stand in a message without a media item.
    """
    media: list[Part] = []
    for index, message in enumerate(messages):
        own = [dict(part) for part in message["content"] if is_media(part)]
        seen = 0
        for part in message["content"]:
            seen += is_media(part)
            if part["type"] == "boxes":
                if not own:
                    raise UserError(f"messages.{index}.content: boxes need an image in the same message")
                owner = own[max(seen - 1, 0)]
                owner["boxes"] = owner.get("boxes", []) + part["boxes"]
        media += own
    return media


def tokenize(text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Ids of a rendered text and the characters [start, end) that each covers.

    Pieces between placeholders are tokenised one by one; the begin token stays in front of the first piece only.

    Raises:
        UserError: If the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer of this model")
    ids: list[int] = []
    offsets: list[Span] = []
    position = 0
    has_bos = False
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            ids.append(IMAGE_PLACEHOLDER)
            offsets.append((position, position + len(PLACEHOLDER)))
            position += len(PLACEHOLDER)
        piece_ids, piece_offsets = _piece(piece, tokenizer)
        if number == 0:
            has_bos = bool(piece_ids) and piece_ids[0] == tokenizer.bos_token_id
        begin = int(has_bos and number > 0)
        ids += piece_ids[begin:]
        offsets += [(position + start, position + end) for start, end in piece_offsets[begin:]]
        position += len(piece)
    return ids, offsets


def _piece(piece: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    # SentencePiece puts a word mark in front of every text; its stand-in "Metaspace, prepend first" leaves it out
    # where the text begins with a space, so such a text gets one more.
    extra = int(piece[:1] in (" ", "▁") and marks_first_word(tokenizer))
    encoded = tokenizer(" " * extra + piece, return_offsets_mapping=True, return_attention_mask=False)
    offsets = [(max(start - extra, 0), end and max(end - extra, 1)) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), offsets


def marks_first_word(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a word mark in front of a text only if it does not begin with a space already."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = getattr(backend, "pre_tokenizer", None)
    return getattr(steps, "prepend_scheme", None) == "first"
