"""The findings of a report about a phantom patient, read from its text by rules, and their F1 against a reference.

Every finding with its side, zone and size is one fact, and so is every kind that the report denies: one wrong word
about a finding makes one fact of another. Words of other reports than the phantom world's are read too (mild, mid,
basal), but only its five kinds.
"""

from __future__ import annotations

import re
from collections import Counter

from llavakit.evaluation.metrics.mentions import Mention, mentions

Fact = tuple[str | None, ...]

_ENLARGED = r"(?:heart|cardiac silhouette|heart size) (?:is|are|appears) (?:not )?(?:\w+ )?enlarged"
LEXICON = {
    "cardiomegaly": rf"cardiomegaly|enlarged heart|{_ENLARGED}",
    "normal heart": (
        r"(?:heart|heart size|cardiac silhouette) (?:is|appears) (?:\w+ )?normal|normal (?:heart|heart size)"
    ),
    "nodule": r"(?:(?P<number>two|three|four|five|several) )?nodules?",
    "consolidation": r"consolidations?",
    "effusion": r"(?:pleural )?effusions?",
    "pneumothorax": r"pneumothora(?:x|ces)",
}
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "several": 2}
_VALUES = {
    "side": {"left": "left|left-sided", "right": "right|right-sided"},
    "zone": {"upper": "upper|apical", "middle": "middle|mid", "lower": "lower|basal|basilar"},
    "size": {"small": "small|tiny|mild|minor|slight", "large": "large|big|severe|massive|extensive"},
}
_PATTERNS = {
    kind: {value: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for value, words in values.items()}
    for kind, values in _VALUES.items()
}


def facts(text: str) -> Counter[Fact]:
    """What a report says: (kind, side, zone, size) of every finding, ("no", kind) of every kind that it denies.

    A number of nodules counts for those that no other sentence describes. What is left open counts as found.
    """
    found: Counter[Fact] = Counter()
    announced = 0
    for mention, words in _with_their_words(mentions(text, LEXICON)):
        if mention.name == "normal heart":
            found["no", "cardiomegaly"] += mention.polarity != "denied"
        elif mention.polarity == "denied":
            found["no", mention.name] = 1
        else:
            number = re.match(r"\w+(?= )", mention.words) if mention.name == "nodule" else None
            values = tuple(_value(kind, words) for kind in _PATTERNS)
            if number is not None and not any(values):
                announced = max(announced, _NUMBERS[number[0].lower()])
            else:
                found[mention.name, *values] += 1
    described = sum(count for fact, count in found.items() if fact[0] == "nodule")
    if announced > described:
        found["nodule", None, None, None] += announced - described
    return +found


def _with_their_words(found: list[Mention]) -> list[tuple[Mention, str]]:
    """Every mention with the part of its clause that is about it: up to the next "and" where another one is near."""
    pairs = []
    for n, mention in enumerate(found):
        clause = mention.clause
        start = clause.find(mention.words)
        before, behind = clause[:start], clause[start + len(mention.words) :]
        if n and found[n - 1].clause == clause:
            before = re.split(r"\band\b|,", before)[-1]
        if n + 1 < len(found) and found[n + 1].clause == clause:
            behind = re.split(r"\band\b|,", behind)[0]
        pairs.append((mention, f"{before} {behind}"))
    return pairs


def _value(kind: str, words: str) -> str | None:
    return next((value for value, pattern in _PATTERNS[kind].items() if pattern.search(words)), None)


def finding_f1(text: str, reference: str) -> float:
    """F1 of the facts of a report against those of a reference; 1 if both say nothing."""
    ours, theirs = facts(text), facts(reference)
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0
