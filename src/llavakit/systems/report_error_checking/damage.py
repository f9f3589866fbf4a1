"""Damaging a report: one statement inserted, removed or changed, with what it takes to know and undo it. Spec 4.4."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llavakit.systems.report_error_checking.edits import apply, pick
from llavakit.systems.report_error_checking.reading import Reading, read
from llavakit.systems.report_error_checking.tables import Tables

OPERATIONS = ("insert", "remove", "substitute")
Candidate = tuple[int, int, str, int]  # start, end, subtype, sentence
_VOWELS = frozenset("aeiou")


@dataclass(frozen=True)
class Donor:
    """A sentence that may be put into another report.

    Attributes:
        report_id: Of the report that it is from.
        sentence: Its number there.
        text: The sentence.
    """

    report_id: str
    sentence: int
    text: str


class Donors(Protocol):
    """The sentences that may be put into one report, in order of report and sentence."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Donor: ...


@dataclass(frozen=True)
class Damaged:
    """What became of a report.

    Attributes:
        label: The operation; None if none has a candidate.
        tried: Operations in the order in which they were tried.
        edits: What was changed; spans in the normalised text.
        original, modified: Normalised text, before and after.
        labels_lost, labels_gained: Asserted labels, sorted.
    """

    label: str | None
    tried: tuple[str, ...]
    edits: tuple[dict[str, Any], ...]
    original: str
    modified: str
    labels_lost: tuple[str, ...] = ()
    labels_gained: tuple[str, ...] = ()

    def provenance(self) -> dict[str, Any]:
        """The facts as JSON, without the texts; their digests tell whether a text is the one that is meant."""
        return {
            "tried": list(self.tried),
            "label": self.label,
            "edits": [dict(edit) for edit in self.edits],
            "labels_lost": list(self.labels_lost),
            "labels_gained": list(self.labels_gained),
            "sha256_original": digest(self.original),
            "sha256_modified": digest(self.modified),
        }


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def remove_candidates(report: Reading) -> list[int]:
    """Sentences with an asserted label that no other sentence asserts; none in a report of one sentence."""
    if len(report.sentences) < 2:
        return []
    counts: dict[str, int] = {}
    for labels in report.by_sentence:
        for label in labels:
            counts[label] = counts.get(label, 0) + 1
    return [number for number, labels in enumerate(report.by_sentence) if any(counts[label] == 1 for label in labels)]


def substitute_candidates(report: Reading, tables: Tables) -> list[Candidate]:
    """Words that can be exchanged in sentences with an asserted label, in order."""
    found: list[Candidate] = []
    for number, labels in enumerate(report.by_sentence):
        if not labels:
            continue
        bilateral = "bilateral" in report.sentence(number).lower()
        for subtype, (pattern, others) in tables.words.items():
            if subtype == "laterality" and bilateral:
                continue
            matches = pattern.finditer(report.text, *report.sentences[number])
            spans = (match.span() for match in matches if match.group().lower() in others)
            found += [(start, end, subtype, number) for start, end in spans]
    names = tables.substitutions.get("finding", {})
    for entity in report.entities:
        target = names.get(entity.text.lower()) if entity.asserted else None
        if target is not None and tables.labels.get(target.lower()) not in report.asserted:
            found.append((entity.start, entity.end, "finding", entity.sentence))
    return sorted(found)


def donor_sentences(report: Reading, tables: Tables) -> list[tuple[int, frozenset[str]]]:
    """Sentences that may be put into other reports, with their positive labels."""
    return [
        (number, labels)
        for number, labels in sorted(report.positive.items())
        if not tables.donor_exclusion_pattern.search(report.sentence(number))
    ]


def damage(
    report: Reading, report_id: str, seed: int | str, donors: Donors, tables: Tables, first: int | None = None
) -> Damaged:
    """Damage a report in one place.

    Args:
        donors: Sentences of other reports that may be inserted.
        first: Operation that is tried first; default: the seed decides.
    """
    begin = pick(seed, report_id, "choose", 0, len(OPERATIONS)) if first is None else first
    tried: list[str] = []
    for op in (*OPERATIONS[begin:], *OPERATIONS[:begin]):
        tried.append(op)
        edit = _EDITS[op](report, report_id, seed, donors, tables)
        if edit is None:
            continue
        modified = apply(report.text, [edit])
        after = read(modified, tables).asserted
        return Damaged(
            label=op,
            tried=tuple(tried),
            edits=(edit,),
            original=report.text,
            modified=modified,
            labels_lost=tuple(sorted(report.asserted - after)),
            labels_gained=tuple(sorted(after - report.asserted)),
        )
    return Damaged(None, tuple(tried), (), report.text, report.text)


def _insert(report: Reading, report_id: str, seed: int | str, donors: Donors, tables: Tables) -> dict[str, Any] | None:
    if not len(donors):
        return None
    donor = donors[pick(seed, report_id, "insert", 0, len(donors))]
    count = len(report.sentences)
    slot = pick(seed, report_id, "insert", 1, count + 1)
    if slot < count:
        place, text = report.sentences[slot][0], f"{donor.text} "
    else:
        place, text = len(report.text), f" {donor.text}"
    source = {"kind": "donor_report", "report_id": donor.report_id, "sentence": donor.sentence}
    return _edit("insert", "sentence", "foreign_finding", (place, place), "", text, slot, source)


def _remove(report: Reading, report_id: str, seed: int | str, donors: Donors, tables: Tables) -> dict[str, Any] | None:
    candidates = remove_candidates(report)
    if not candidates:
        return None
    number = candidates[pick(seed, report_id, "remove", 0, len(candidates))]
    spans = report.sentences
    if number + 1 < len(spans):
        span = spans[number][0], spans[number + 1][0]
    else:
        span = spans[number - 1][1], spans[number][1]
    text = report.text[slice(*span)]
    return _edit("remove", "sentence", "finding_sentence", span, text, "", number, {"kind": "none"})


def _substitute(
    report: Reading, report_id: str, seed: int | str, donors: Donors, tables: Tables
) -> dict[str, Any] | None:
    candidates = substitute_candidates(report, tables)
    if not candidates:
        return None
    start, end, subtype, number = candidates[pick(seed, report_id, "substitute", 0, len(candidates))]
    written = report.text[start:end]
    others = tables.substitutions["finding"] if subtype == "finding" else tables.words[subtype][1]
    replacement = in_case_of(written, others[written.lower()])
    article = _article(report.text[:start], replacement)
    if article is not None:
        before, right = article
        start -= len(before)
        written, replacement = before + written, right + replacement
    return _edit("substitute", "entity", subtype, (start, end), written, replacement, number, {"kind": "lexicon"})


def in_case_of(written: str, other: str) -> str:
    """`other` in capitals and small letters as `written` is."""
    if len(written) > 1 and written.isupper():
        return other.upper()
    return other[:1].upper() + other[1:] if written[:1].isupper() else other


def _article(before: str, replacement: str) -> tuple[str, str] | None:
    """The article that stands before a word, and the one that its replacement needs, if that is another."""
    for article, other, vowel in (("a ", "an ", False), ("an ", "a ", True)):
        found = before[-len(article) :]
        if found.lower() != article or before[: -len(article)][-1:].isalnum():
            continue
        if (replacement[0].lower() in _VOWELS) == vowel:
            return None
        capitals = found.strip().isupper() and len(replacement) > 1 and replacement.isupper()
        return found, other.upper() if capitals else in_case_of(found[:1], other)
    return None


def _edit(
    op: str,
    level: str,
    subtype: str,
    span: Sequence[int],
    original: str,
    replacement: str,
    sentence: int,
    source: dict[str, Any],
) -> dict[str, Any]:
    return {
        "op": op,
        "level": level,
        "subtype": subtype,
        "start": span[0],
        "end": span[1],
        "original": original,
        "replacement": replacement,
        "sentence": sentence,
        "source": source,
    }


_EDITS = {"insert": _insert, "remove": _remove, "substitute": _substitute}
