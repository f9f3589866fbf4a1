"""Label policies: which token ids of a rendered conversation the model is to learn.

- "spans" (the default of most templates) learns every token that covers a character of an answer.
- "marks" learns role marks and newlines too, as LLaVA-OneVision was trained.
- "rounds" counts tokens as the original LLaVA does. It gives the labels of "spans" on ordinary conversations, but
  gives a whole sample up when its count does not come out: after an empty answer, for instance, or when an answer
  repeats the text that marks its beginning. For comparison with original runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llavakit.conversation.template import Marks, Rounds, Span, Template
from llavakit.errors import UserError
from llavakit.registry import nearest

IGNORE = -100

Tokenize = Callable[[str], int]


def by_spans(spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
    """The id of every token that covers at least one character of a span, else -100.

    Placeholders (negative ids) and tokens that cover nothing (the begin token) are never learnt.
    """
    labels = [IGNORE] * len(ids)
    number = 0
    for place, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        if number < len(spans) and token >= 0 and end > start and end > spans[number][0]:
            labels[place] = token
    return labels


def by_marks(
    marks: Marks, tokenizer: Any, text: str, spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]
) -> list[int]:
    """Labels of `by_spans` with the header and the closing newline of every answer, and all marks everywhere."""
    wide = []
    for start, end in spans:
        if text.endswith(marks.header, 0, start):
            start -= len(marks.header)
        if text.startswith(marks.after, end):
            end += len(marks.after)
        wide.append((start, end))
    supervised = {_single_id(mark, tokenizer) for mark in marks.everywhere}
    return [
        token if token in supervised else label for token, label in zip(ids, by_spans(wide, ids, offsets), strict=True)
    ]


def _single_id(mark: str, tokenizer: Any) -> int:
    ids = tokenizer.encode(mark, add_special_tokens=False)
    if len(ids) != 1 and (known := tokenizer.get_vocab().get(mark)) is not None:
        return known  # alone it gets a blank in front, as words at the beginning of a text do
    if len(ids) != 1:
        raise UserError(f"label policy 'marks': {mark!r} must be one token of the tokenizer, it is {len(ids)}")
    return ids[0]


def by_rounds(
    rule: Rounds, text: str, ids: Sequence[int], count: Tokenize, *, real: int, limit: float, continues_words: bool
) -> tuple[list[int], bool]:
    """Labels as the original code counts them, and whether it gave the whole sample up.

    Args:
        count: Number of tokens of a text tokenised alone.
        real: Number of ids that are not padding.
        limit: Length from which on a wrong count is forgiven, since the text may have been cut.
        continues_words: Whether the tokenizer goes on with a word after a special token.
    """
    labels = list(ids)
    place = rule.begin
    labels[:place] = [IGNORE] * min(place, len(ids))
    for number, piece in enumerate(_rounds(rule, text)):
        question, *answers = piece.split(rule.answer)
        if not piece or len(answers) != 1:
            break
        masked = count(question + rule.answer) + rule.answer_offset
        length = count(piece) + (count(rule.end) if rule.counts_end else 0)
        if number and continues_words:
            masked, length = masked + rule.later_offset, length + rule.later_offset
        end = min(place + masked, len(ids))
        labels[place:end] = [IGNORE] * max(end - place, 0)
        place += length
    labels[place:] = [IGNORE] * max(len(ids) - place, 0)
    fully_masked = place < limit and place != real
    if fully_masked:
        labels = [IGNORE] * len(ids)
    return [label if label >= 0 else IGNORE for label in labels], fully_masked


def _rounds(rule: Rounds, text: str) -> list[str]:
    turns = text.split(rule.end)
    if rule.grouped == 1:
        return turns
    first = rule.grouped + 1
    groups = [turns[:first]] + [turns[n : n + rule.grouped] for n in range(first, len(turns), rule.grouped)]
    return [rule.end.join(group) for group in groups]


def check_policy(policy: str, template: Template) -> None:
    """Refuse a label policy that does not exist or that the template gives no rule for.

    Raises:
        UserError: Naming the policies there are.
    """
    if policy not in ("spans", "marks", "rounds"):
        raise UserError(f"unknown label policy {policy!r}{nearest(policy, ['spans', 'marks', 'rounds'])}")
    if policy != "spans" and getattr(template, policy) is None:
        raise UserError(f"template {template.name!r} has no rule for the label policy {policy!r}; use 'spans'")
