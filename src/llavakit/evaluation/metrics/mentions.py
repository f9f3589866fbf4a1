"""Findings in report text by rules: what is mentioned, and whether it is found, denied or left open.

    mentions("No effusion; nodule in the left lower lobe.", {"effusion": "effusions?", "nodule": "nodules?"})

A mention takes its polarity from its clause: a denial in front of it ("no", "without", "free of") that nothing ended,
or a verb behind it that is denied ("is not seen", "has resolved"). Denials of something else ("no change in") do not
count. What a lexicon holds is the caller's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Polarity = Literal["found", "denied", "open"]


@dataclass(frozen=True)
class Mention:
    """A finding that a text speaks of.

    Attributes:
        name: Of the lexicon.
        polarity: "found", "denied" or "open" (uncertain).
        words: As they are written.
        clause: Around the words.
    """

    name: str
    polarity: Polarity
    words: str
    clause: str


_FUNCTION = (
    r"no|not|without|of|for|in|the|a|an|and|or|nor|with|is|are|to|any|evidence|definite|free|negative|small|large"
)
# A full stop ends a sentence unless a digit follows; a line break does where a new sentence begins behind it.
_ENDS = re.compile(r"(?<!\bdr)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)[.!?]+(?=\s|$)|\n\s*\n|\x00", re.IGNORECASE)
_BREAK = re.compile(r"\n(?=\s*(?:[-*•]|\d+[.)]|[A-Z]))")


def sentences(text: str) -> Iterator[str]:
    """Sentences of a text, white space as single spaces.

    A line break within a sentence is white space. Before a capital letter or a list mark it ends the sentence, unless
    the line in front of it breaks off after a word that wants another ("There is no").
    """
    marked, start = [], 0
    for found in _BREAK.finditer(text):
        before = text[: found.start()].rstrip()
        goes_on = re.search(rf"(?:\b(?:{_FUNCTION})|[,(])$", before, re.IGNORECASE)
        marked.append(text[start : found.start()] + (" " if goes_on else "\x00"))
        start = found.end()
    whole = "".join([*marked, text[start:]])
    for part in _ENDS.split(whole):
        sentence = " ".join(part.split())
        if sentence:
            yield sentence


_CLAUSES = re.compile(
    r";|\b(?:but|however|although|though|whereas|while|except(?: for)?|apart from|aside from|other than)\b"
    r"|,\s*(?:and\s+)?(?=(?:there|this|that|it|which)\s+(?:is|are|was|were|has|have|may|might|appears?|represents?)\b)",
    re.IGNORECASE,
)
_CHANGE = (
    r"(?:change|increase|decrease|progression|regression|worsening|improvement|difference|growth|interval change)s?"
)
# Denials that deny no finding.
_OTHER_DENIALS = re.compile(
    rf"\b(?:no|without|not)\s+(?:(?:\w+ly|significant|interval|definite|appreciable|substantial|relevant|major|further|"
    rf"other|new|obvious|in|any|evidence|of)\s+){{0,3}}(?:{_CHANGE}|changed|increased|decreased|enlarging|worsened|"
    rf"improved)\b(?:\s+(?:in|of|to|from))?|\bnot only\b|\bno doubt\b",
    re.IGNORECASE,
)
_VERBS = r"is|are|was|were|has|have|had|remains?|appears?|shows?|seen|demonstrates?|reveals?|persists?|represents?"
_SIZES = (
    r"small|large|mild|moderate|severe|tiny|trace|minimal|new|stable|unchanged|persistent|increased|increasing|"
    r"decreased|decreasing|worsening|massive|extensive"
)
_DENIAL = re.compile(
    r"\b(?:no|not|without|free of|clear of|negative for|absence of|absent|lack of|lacks|denies|neither|nor|never|"
    r"resolved|resolution of|(?:does|do|did) not (?:show|demonstrate|reveal)|fails? to (?:show|demonstrate|reveal)|"
    r"exclud(?:es?|ed|ing)|rul(?:es?|ed|ing) out)\b",
    re.IGNORECASE,
)
# What stands between a denial and a finding that the denial no longer covers.
_COVERED_NO_MORE = re.compile(
    rf"\b(?:{_VERBS}|with|due to|secondary to|because|consistent with|suggesting|there)\b"
    rf"|(?:,|\band\b)\s*(?:a|an|the|{_SIZES})\b|:",
    re.IGNORECASE,
)
_OPEN_DENIAL = re.compile(
    r"\b(?:can\s?not|can't|could not|not|difficult to|unable to|impossible to)\s+(?:be\s+)?(?:\w+ly\s+)?"
    r"(?:exclud\w*|rul\w+ out)\b",
    re.IGNORECASE,
)
_OPEN = re.compile(
    r"\b(?:may|might|could|possib\w*|probabl\w*|suspect\w*|suspicious|suspicion|suggest\w*|questionabl\w*|question of|"
    r"likely|concern(?:ing)? for|equivocal|versus|vs|differential|if any)\b",
    re.IGNORECASE,
)
_DENIED_BEHIND = re.compile(
    rf"^(?:(?!\b(?:{_VERBS})\b)[^:])*?\b(?:(?:is|are|was|were|has|have|had)(?:\s+been)?|remains?|appears?)\s+"
    r"(?:(?:not|no longer|never)\b(?!\s+(?:\w+ly\s+)?(?:exclud|rul|chang|increas|decreas|improv|worsen|large|small))"
    r"|(?:\w+ly\s+)?(?:absent|resolved|cleared|excluded|ruled out|negative|gone)\b)"
    r"|^\s*(?:not (?:seen|present|identified|visible|visualized|visualised|evident|detected|noted|found)"
    r"|absent|resolved|excluded|ruled out)\b"
    r"|^\s*:\s*(?:no|none|nil|absent|negative|not seen|not present)\s*$",
    re.IGNORECASE,
)


def mentions(text: str, lexicon: Mapping[str, str | re.Pattern[str]]) -> list[Mention]:
    """What a text says of the names of a lexicon, in order of the text.

    Args:
        lexicon: Pattern of every name, matched ignoring case at the edges of words; where several match the same
            words, the longest counts. A match that itself holds "not" or "no" is denied.
    """
    patterns = {name: re.compile(rf"\b(?:{_text(own)})\b", re.IGNORECASE) for name, own in lexicon.items()}
    found = []
    for sentence in sentences(text):
        for clause in _CLAUSES.split(sentence):
            found += _in_clause(clause, patterns)
    return found


def _text(pattern: str | re.Pattern[str]) -> str:
    return pattern if isinstance(pattern, str) else pattern.pattern


def _in_clause(clause: str, patterns: Mapping[str, re.Pattern[str]]) -> list[Mention]:
    hits = [(match.start(), match.end(), name) for name, own in patterns.items() for match in own.finditer(clause)]
    hits.sort(key=lambda hit: (hit[0], -hit[1]))
    found, reached = [], -1
    for start, end, name in hits:
        if start >= reached:
            found.append(Mention(name, polarity(clause, start, end), clause[start:end], clause.strip()))
            reached = end
    return found


def polarity(clause: str, start: int, end: int) -> Polarity:
    """Whether what stands at `start` to `end` of a clause is found, denied or left open."""
    # Blanks of equal length, so that what is left keeps its place.
    before = _OTHER_DENIALS.sub(lambda match: " " * len(match[0]), clause[:start])
    behind = clause[end:]
    if _OPEN_DENIAL.search(before) or _OPEN_DENIAL.search(behind):
        return "open"
    if re.search(r"\b(?:not|no)\b", clause[start:end], re.IGNORECASE):
        return "denied"
    denials = list(_DENIAL.finditer(before))
    if any(not _COVERED_NO_MORE.search(before[denial.end() :]) for denial in denials):
        return "denied"
    if _DENIED_BEHIND.search(behind):
        return "denied"
    return "open" if _OPEN.search(before) or _OPEN.search(behind) else "found"
