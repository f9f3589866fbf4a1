"""Reading a report: sentences, findings and whether they are asserted. Spec section 4.4.

All offsets are code points of the normalised text, spans are half open.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from llavakit.systems.report_error_checking.tables import Tables

_END = re.compile(r"[.?!]+(?=\s+[A-Z0-9]|\s*\Z)")
Span = tuple[int, int]


def normalised(text: str) -> str:
    """The text with single blanks between words and none around it."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Entity:
    """A finding that is named.

    Attributes:
        sentence: Number of its sentence, from 0.
        start, end: Its span.
        text: As it is written.
        label: Of the lexicon.
        polarity: "positive", "negative" or "uncertain".
    """

    sentence: int
    start: int
    end: int
    text: str
    label: str
    polarity: str

    @property
    def asserted(self) -> bool:
        """Whether it is not denied."""
        return self.polarity != "negative"


@dataclass(frozen=True)
class Reading:
    """A report as the generator understands it.

    Attributes:
        text: Normalised.
        sentences: Spans.
        entities: In order of the text.
    """

    text: str
    sentences: tuple[Span, ...]
    entities: tuple[Entity, ...]

    def sentence(self, number: int) -> str:
        """The text of a sentence."""
        start, end = self.sentences[number]
        return self.text[start:end]

    @functools.cached_property
    def by_sentence(self) -> tuple[frozenset[str], ...]:
        """Asserted labels of every sentence."""
        found: list[set[str]] = [set() for _ in self.sentences]
        for entity in self.entities:
            if entity.asserted:
                found[entity.sentence].add(entity.label)
        return tuple(map(frozenset, found))

    @functools.cached_property
    def asserted(self) -> frozenset[str]:
        """Asserted labels of the report."""
        return frozenset().union(*self.by_sentence)

    @functools.cached_property
    def positive(self) -> dict[int, frozenset[str]]:
        """Positive labels of the sentences that have any."""
        found: dict[int, set[str]] = {}
        for entity in self.entities:
            if entity.polarity == "positive":
                found.setdefault(entity.sentence, set()).add(entity.label)
        return {number: frozenset(labels) for number, labels in found.items()}


def read(text: str, tables: Tables) -> Reading:
    """A report's sentences and findings."""
    text = normalised(text)
    spans = sentences(text, tables)
    return Reading(text, tuple(spans), tuple(_entities(text, spans, tables)))


def sentences(text: str, tables: Tables) -> list[Span]:
    """Spans of the sentences of a normalised text."""
    spans, start = [], 0
    for match in _END.finditer(text):
        if match.group() == "." and _before(text, match.start()) in tables.abbreviations:
            continue
        spans.append((start, match.end()))
        start = match.end()
    spans.append((start, len(text)))
    return [span for span in (_trimmed(text, *own) for own in spans) if span[0] < span[1]]


def _before(text: str, end: int) -> str:
    """The run of letters before a full stop."""
    begin = end
    while begin and not text[begin - 1].isspace():
        begin -= 1
    return text[begin:end].lower().lstrip('("')


def _trimmed(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _entities(text: str, spans: list[Span], tables: Tables) -> list[Entity]:
    pattern, labels = tables.names
    if pattern is None:
        return []
    return [
        Entity(
            sentence=number,
            start=match.start(),
            end=match.end(),
            text=match.group(),
            label=labels[match.lastindex - 1],
            polarity=_polarity(text[start : match.start()], tables),
        )
        for number, (start, end) in enumerate(spans)
        for match in pattern.finditer(text, start, end)
    ]


def _polarity(before: str, tables: Tables) -> str:
    """Polarity of a finding from what its sentence says before it."""
    before = before.lower()
    begins = [match.end() for match in tables.break_pattern.finditer(before)]
    before = before[begins[-1] :] if begins else before
    if tables.negation_pattern.search(before):
        return "negative"
    return "uncertain" if tables.uncertainty_pattern.search(before) else "positive"
