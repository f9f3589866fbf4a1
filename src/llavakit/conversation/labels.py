"""Label policies: which tokens of a conversation the model learns.

- `spans` (the default of most templates): every token that covers a character of an answer. Options leave passages out
  and weight tokens.
- `marks`: role marks and newlines as well, as LLaVA-OneVision was trained.
- `rounds`: tokens are counted as in the original LLaVA. The labels equal those of `spans` on ordinary conversations,
  but the whole sample is masked where the count does not come out, for instance after an empty answer, or when an
  answer repeats the text that marks its beginning. For comparison with original runs.

A policy is a class in `llavakit.registry.LABEL_POLICIES`; a recipe names it with its options
(`labels: {type: spans, ignore: [["<paragraph>", "</paragraph>"]]}`). An instance takes `Tokens` and gives `Labels`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llavakit.conversation.template import Marks, Rounds, Span, Template
from llavakit.conversation.tokens import marks_first_word, tokenize
from llavakit.errors import UserError, quoted
from llavakit.registry import LABEL_POLICIES

IGNORE = -100


@dataclass(frozen=True)
class Tokens:
    """A rendered conversation and its tokens.

    Attributes:
        text: The rendered text.
        answers: Characters [start, end) of the answers, end marks included.
        ids: Token ids; media items are negative.
        offsets: Characters [start, end) that each token covers.
        template: The template that rendered the text.
        tokenizer: The tokenizer of the ids.
        max_length: Length to which the ids were cut, if they were.
    """

    text: str
    answers: Sequence[Span]
    ids: Sequence[int]
    offsets: Sequence[Span]
    template: Template
    tokenizer: Any
    max_length: int | None = None


@dataclass
class Labels:
    """What is learned of a conversation.

    Attributes:
        ids: The id of every token that is learned, else -100.
        weights: Loss weight of every token; None weights all equally.
        fully_masked: Whether the policy rejected the whole sample.
    """

    ids: list[int]
    weights: list[float] | None = None
    fully_masked: bool = False


class LabelPolicy(Protocol):
    """A rule for labels."""

    def check(self, template: Template) -> None:
        """Refuse a template that this policy has no rule for, with a `UserError`."""

    def __call__(self, tokens: Tokens) -> Labels:
        """The labels of a conversation."""


def label_policy(labels: str | Mapping[str, Any] | LabelPolicy | None, template: Template) -> LabelPolicy:
    """The policy by its registered name, or by `type` and options; None is the template's own.

    Raises:
        UserError: If there is no such policy or option, or the template has no rule for it.
    """
    labels = template.labels if labels is None else labels
    if isinstance(labels, str):
        labels = {"type": labels}
    policy = LABEL_POLICIES.build(labels) if isinstance(labels, Mapping) else labels
    if not callable(policy):
        raise UserError(f"labels: must be a policy's name or a mapping with its type, not {quoted(policy)}")
    policy.check(template)
    return policy


def by_spans(spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
    """The id of every token that covers at least one character of a span, else -100.

    Placeholders (negative ids) and tokens that cover nothing (the begin token) are never learned.
    """
    covered = _covered(spans, offsets)
    return [token if inside and token >= 0 else IGNORE for token, inside in zip(ids, covered, strict=True)]


def _covered(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """Whether each token covers a character of one of the spans, which are sorted and do not overlap."""
    inside = [False] * len(offsets)
    number = 0
    for place, (start, end) in enumerate(offsets):
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        inside[place] = number < len(spans) and end > start and end > spans[number][0]
    return inside


class SpanLabels:
    """Every token that covers a character of an answer.

    Args:
        ignore: Pairs of strings. Nothing from the first through the next occurrence of the second is learned; to the
            end of the text if the second does not follow.
        weights: Loss weight of the tokens that spell a string, by the string; others weigh 1.

    Raises:
        UserError: If an option has another form.
    """

    def __init__(self, *, ignore: Sequence[Sequence[str]] = (), weights: Mapping[str, float] | None = None) -> None:
        if isinstance(ignore, str) or not isinstance(ignore, Sequence) or not isinstance(weights or {}, Mapping):
            raise UserError("labels: ignore must be a list of pairs of strings, weights numbers by string")
        for pair in ignore:
            listed = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not listed or not all(isinstance(mark, str) and mark for mark in pair):
                raise UserError(f"labels.ignore: must hold pairs of strings [begin, end], not {quoted(pair)}")
        for text, weight in (weights or {}).items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < math.inf
            if not isinstance(text, str) or not text or not number:
                entry = f"{quoted(text)}: {quoted(weight)}"
                raise UserError(f"labels.weights: must be numbers of at least 0 by string, not {entry}")
        self.ignore = [(str(begin), str(end)) for begin, end in ignore]
        self.weights = dict(weights or {})

    def check(self, template: Template) -> None:
        """Every template marks its answers."""

    def __call__(self, tokens: Tokens) -> Labels:
        ids = by_spans(tokens.answers, tokens.ids, tokens.offsets)
        for begin, end in self.ignore:
            left_out = _covered(_between(tokens.text, begin, end), tokens.offsets)
            ids = [IGNORE if inside else label for label, inside in zip(ids, left_out, strict=True)]
        if not self.weights:
            return Labels(ids)
        weights = [1.0] * len(ids)
        for text, weight in self.weights.items():
            spans = [found.span() for found in re.finditer(re.escape(text), tokens.text)]
            for place, inside in enumerate(_covered(spans, tokens.offsets)):
                weights[place] = float(weight) if inside else weights[place]
        return Labels(ids, weights)


def _between(text: str, begin: str, end: str) -> list[Span]:
    spans = []
    position = text.find(begin)
    while position >= 0:
        close = text.find(end, position + len(begin))
        spans.append((position, len(text) if close < 0 else close + len(end)))
        position = text.find(begin, spans[-1][1])
    return spans


class MarkLabels:
    """Answers with their header and closing newline, and the template's marks wherever they occur."""

    def check(self, template: Template) -> None:
        """Refuse templates without marks."""
        _need(template.marks, "marks", template)

    def __call__(self, tokens: Tokens) -> Labels:
        marks: Marks = tokens.template.marks
        wide = []
        for start, end in tokens.answers:
            if tokens.text.endswith(marks.header, 0, start):
                start -= len(marks.header)
            if tokens.text.startswith(marks.after, end):
                end += len(marks.after)
            wide.append((start, end))
        supervised = {_single_id(mark, tokens.tokenizer) for mark in marks.everywhere}
        labels = by_spans(wide, tokens.ids, tokens.offsets)
        return Labels([t if t in supervised else label for t, label in zip(tokens.ids, labels, strict=True)])


def _single_id(mark: str, tokenizer: Any) -> int:
    ids = tokenizer.encode(mark, add_special_tokens=False)
    if len(ids) != 1 and (known := tokenizer.get_vocab().get(mark)) is not None:
        return known  # tokenised alone it gets a space in front, as words at the beginning of a text do
    if len(ids) != 1:
        raise UserError(f"label policy 'marks': {mark!r} must be one token of the tokenizer, it is {len(ids)}")
    return ids[0]


class RoundLabels:
    """Labels as the original code counts them: the text is cut into rounds at end marks, see `Rounds`."""

    def check(self, template: Template) -> None:
        """Refuse templates without a rule for rounds."""
        _need(template.rounds, "rounds", template)

    def __call__(self, tokens: Tokens) -> Labels:
        rule: Rounds = tokens.template.rounds
        labels, sound = (_rounds_in_place if rule.in_place else _rounds_by_count)(rule, tokens)
        return Labels(labels if sound else [IGNORE] * len(tokens.ids), fully_masked=not sound)


def _rounds_in_place(rule: Rounds, tokens: Tokens) -> tuple[list[int], bool]:
    """Labels of the answers of all rounds, and whether every round is closed and has one answer."""
    spans, position = [], 0
    for piece in tokens.text.split(rule.end)[:-1]:
        question, *answers = piece.split(rule.answer)
        if len(answers) != 1:
            break
        begin = position + len(question) + len(rule.answer)
        position += len(piece) + len(rule.end)
        spans.append((begin, position))
    return by_spans(spans, tokens.ids, tokens.offsets), position == len(tokens.text)


def _rounds_by_count(rule: Rounds, tokens: Tokens) -> tuple[list[int], bool]:
    """Labels by the token counts of rounds that are tokenised again, and whether the counts fit the whole text.

    A count that does not fit is accepted where the text may have been cut.
    """
    ids, tokenizer = tokens.ids, tokens.tokenizer
    limit = tokenizer.model_max_length if tokens.max_length is None else tokens.max_length
    continues_words = marks_first_word(tokenizer)

    def count(text: str) -> int:
        return len(tokenize(text, tokenizer)[0])

    labels = list(ids)
    place = rule.begin
    labels[:place] = [IGNORE] * min(place, len(ids))
    for number, piece in enumerate(_rounds(rule, tokens.text)):
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
    real = sum(token != tokenizer.pad_token_id for token in ids)
    return [label if label >= 0 else IGNORE for label in labels], place >= limit or place == real


def _rounds(rule: Rounds, text: str) -> Iterator[str]:
    """The rounds of a text; the first round of grouped turns has one turn more, for the system text."""
    turns = text.split(rule.end)
    if rule.grouped == 1:
        yield from turns
        return
    first = rule.grouped + 1
    yield rule.end.join(turns[:first])
    for begin in range(first, len(turns), rule.grouped):
        yield rule.end.join(turns[begin : begin + rule.grouped])


def _need(rule: object, policy: str, template: Template) -> None:
    if rule is None:
        raise UserError(f"template {template.name!r} has no rule for the label policy {policy!r}; use 'spans'")
