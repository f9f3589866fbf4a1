"""Label policies: which token ids of a rendered conversation the model is to learn.

"spans" learns every token that covers a character of the assistant's stretches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llavakit.conversation.template import Span, Template
from llavakit.errors import UserError
from llavakit.registry import nearest

IGNORE = -100


def label(
    policy: str,
    template: Template,
    tokenizer: Any,
    text: str,
    spans: Sequence[Span],
    ids: Sequence[int],
    offsets: Sequence[Span],
    *,
    max_length: int | None = None,
) -> tuple[list[int], bool]:
    """Labels of a conversation, and whether the policy gave the whole sample up."""
    if policy == "spans":
        return by_spans(spans, ids, offsets), False
    raise UserError(f"unknown label policy {policy!r}{nearest(policy, ['spans'])}")


def by_spans(spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
    """The id of every token that covers at least one character of a span, else -100.

    Placeholders (negative ids) are never learnt.
    """
    labels = [IGNORE] * len(ids)
    number = 0
    for place, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        if number < len(spans) and token >= 0 and end > start and end > spans[number][0]:
            labels[place] = token
    return labels
