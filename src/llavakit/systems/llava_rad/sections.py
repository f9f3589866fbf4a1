"""Findings sections out of raw radiology reports: by rules, and by a teacher where rules do not find one.

    llavakit synthesize findings_by_rules reports.jsonl annotations.jsonl
    llavakit synthesize findings_by_teacher reports.jsonl annotations.jsonl --teacher gpt-4o

A report is `report` (its whole text), `id`, and optionally `image` and `view`. The records have the form of the
published annotations (`generate_method` says which way the findings were found), which `llavakit prepare
mimic_cxr_findings` reads. Test references should be those of the rules alone, as in the paper, so that no teacher's
words are scored. The authors' rules and prompts are not published; these are llavakit's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import FieldError, UserError, quoted
from llavakit.evaluation.metrics.mentions import sentences
from llavakit.synthesis.pipeline import Pipeline, Refused, Teacher
from llavakit.systems.llava_rad.records import ASK

BY_RULES, BY_TEACHER = "rule-based", "teacher"
FINDINGS = ("FINDINGS",)
REASONS = (
    "INDICATION",
    "REASON FOR EXAM",
    "REASON FOR EXAMINATION",
    "CLINICAL INFORMATION",
    "CLINICAL HISTORY",
    "HISTORY",
)
_OTHERS = (
    *("IMPRESSION", "CONCLUSION", "COMPARISON", "COMPARISONS", "TECHNIQUE", "EXAMINATION", "EXAM", "PROCEDURE"),
    *("FINAL REPORT", "WET READ", "RECOMMENDATION", "RECOMMENDATIONS", "NOTIFICATION", "ADDENDUM", "STUDY", "VIEWS"),
    *("FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION", "IMPRESSION AND FINDINGS"),
)
_HEADING = re.compile(
    rf"(?:^|(?<=\n))[ \t]*({'|'.join(sorted(map(re.escape, (*FINDINGS, *REASONS, *_OTHERS)), key=len, reverse=True))})"
    r"[ \t]*(?::|(?=\n))",
    re.IGNORECASE,
)
_ADMINISTRATIVE = re.compile(
    r"\b(?:dr|md|telephone|phone|paged?|pager|e-?mail|notified|communicated|discussed with|discussed by|dictated|"
    r"electronically signed|attending|resident|radiologist|at the time of|\d{1,2}:\d\d|a\.m|p\.m)\b",
    re.IGNORECASE,
)
_STUDY = r"(?:study|studies|exam(?:ination)?s?|radiographs?|films?|x-rays?|cts?|imaging|images?)"
_EARLIER = r"(?:prior|previous|earlier|most recent|preceding)"
# Phrases that a report keeps its sense without.
_COMPARING = re.compile(
    r"\b(?:as |when )?(?:in comparison (?:to|with)|compar(?:ed|ing) (?:to|with)|since|from|again(?:st)?)\s+"
    rf"(?:the |a )?{_EARLIER}(?: (?:chest|portable|frontal|pa|ap))*(?: {_STUDY})?"
    r"(?: (?:from|of|dated|on) (?:___|[\d/.-]+))?\s*,?"
    rf"|\bin (?:the )?interval\b|\bas before\b|\bagain (?=seen|noted|demonstrated)"
    r"|\b(?:unchanged|stable) (?:since|from) ___",
    re.IGNORECASE,
)
_STILL = re.compile(rf"\b(?:{_EARLIER}|compar\w+|since|interval)\b", re.IGNORECASE)


def headings(report: str) -> dict[str, str]:
    """Sections of a report by heading in capitals, in order; text in front of the first heading is left out.

    A heading is one of the usual words at the start of a line, with a colon or alone on the line. Of two sections with
    one heading the first counts.
    """
    found: dict[str, str] = {}
    marks = list(_HEADING.finditer(report.replace("\r\n", "\n")))
    text = report.replace("\r\n", "\n")
    for n, mark in enumerate(marks):
        end = marks[n + 1].start() if n + 1 < len(marks) else len(text)
        found.setdefault(mark[1].upper(), " ".join(text[mark.end() : end].split()))
    return found


def findings_section(report: str) -> str | None:
    """The findings section; None if the report has none, or one that is mixed with the impression."""
    return headings(report).get("FINDINGS") or None


def reason(report: str) -> str | None:
    """Why the study was made; None if the report does not say."""
    sections = headings(report)
    return next((sections[name] for name in REASONS if sections.get(name)), None)


def cleaned(findings: str) -> str:
    """Findings without administrative sentences and without comparisons to earlier studies.

    Phrases that only compare are cut out of their sentence; a sentence that still speaks of an earlier study goes.
    """
    kept = []
    for sentence in sentences(findings):
        if _ADMINISTRATIVE.search(sentence):
            continue
        text = " ".join(_COMPARING.sub(" ", sentence).split()).strip(" ,")
        text = re.sub(r"\s+([,.;:])", r"\1", text)
        if text and not _STILL.search(text) and re.search(r"\w", text):
            kept.append(f"{text[:1].upper()}{text[1:]}.")
    return " ".join(kept)


class FindingsByRules(Pipeline):
    """Findings that rules find.

    Args:
        clean: Whether administrative sentences and comparisons to earlier studies are taken out.
    """

    asks = False

    def __init__(self, *, clean: bool = True) -> None:
        if not isinstance(clean, bool):
            raise UserError(f"{type(self).__name__}: clean must be true or false, not {quoted(clean)}")
        self.clean = clean

    def check(self, item: Any) -> None:
        """Refuse a report without its text or id."""
        super().check(item)
        if not isinstance(item.get("report"), str) or not item["report"].strip():
            raise FieldError("report", "is missing; give the whole text of the report")
        if isinstance(item.get("id"), bool) or not isinstance(item.get("id"), (str, int)):
            raise FieldError("id", "is missing; give a name or number")
        for name in ("image", "view"):
            if not isinstance(item.get(name), str | None):
                raise FieldError(name, "must be a text or null")

    def work(self, item: Mapping[str, Any], teacher: Teacher | None) -> Iterable[Mapping[str, Any]]:
        """The record of a report whose findings have a section of their own."""
        found = self._by_rules(item["report"])
        if found is None:
            raise Refused("the report has no findings section of its own")
        return [_record(item, found, reason(item["report"]), BY_RULES)]

    def _by_rules(self, report: str) -> str | None:
        found = findings_section(report)
        if found is not None and self.clean:
            found = cleaned(found)
        return found or None


class FindingsByTeacher(FindingsByRules):
    """Findings that rules find, and where they fail those that a teacher takes out of the report.

    Args:
        clean: As for the rules.
        always: Ask the teacher about every report.
    """

    asks = True
    temperature = 0.0

    def __init__(self, *, clean: bool = True, always: bool = False) -> None:
        super().__init__(clean=clean)
        if not isinstance(always, bool):
            raise UserError(f"{type(self).__name__}: always must be true or false, not {quoted(always)}")
        self.always = always

    def work(self, item: Mapping[str, Any], teacher: Teacher | None) -> Iterable[Mapping[str, Any]]:
        """The record of a report."""
        report = item["report"]
        found = None if self.always else self._by_rules(report)
        if found is not None:
            return [_record(item, found, reason(report), BY_RULES)]
        told = teacher.ask_parsed(request(report), lambda reply: parse(reply, report), (0.0, 0.5))
        if told is None:
            raise Refused("the teacher's replies are not of the form, or hold words that the report does not")
        if not told["findings"]:
            raise Refused("the teacher finds no findings in the report")
        return [_record(item, told["findings"], told["reason"] or reason(report), BY_TEACHER)]


SYSTEM = (
    "You sort radiology reports of chest radiographs into sections. Take the sentences that say what is seen on the "
    "present radiograph as its findings, in the report's own words. Leave out: comparisons to earlier studies, "
    "recommendations, names, dates and other administrative text, and conclusions that repeat a finding. Take the "
    "reason for the examination as it is given. Add nothing.\n"
    'Reply with one JSON object: {"findings": "...", "reason": "..."}; null for what the report does not have.'
)


def request(report: str) -> list[dict[str, str]]:
    """What a teacher is asked."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Report:\n{report.strip()}"}]


def parse(reply: str, report: str) -> dict[str, str | None] | None:
    """Findings and reason of a teacher's reply; None if it is not of the form, or has words the report does not have.

    A fifth of the words may be new: sentences are put together, and words change their form.
    """
    start, end = reply.find("{"), reply.rfind("}")
    try:
        found = parse_json(reply[start : end + 1])
    except JsonError:
        return None
    if not isinstance(found, dict) or not {"findings"} <= set(found) <= {"findings", "reason"}:
        return None
    values = {name: found.get(name) for name in ("findings", "reason")}
    if not all(isinstance(value, str | None) for value in values.values()):
        return None
    known = set(re.findall(r"\w+", report.lower()))
    said = re.findall(r"\w+", json.dumps(list(values.values()), ensure_ascii=False).replace("null", "").lower())
    if said and sum(word in known for word in said) < 0.8 * len(said):
        return None
    return {name: " ".join(value.split()) or None if value is not None else None for name, value in values.items()}


def _record(item: Mapping[str, Any], findings: str, why: str | None, method: str) -> dict[str, Any]:
    """A record in the form of the published annotations."""
    named = {name: item[name] for name in ("image", "view") if item.get(name) is not None}
    turns = [{"from": "human", "value": f"<image>\n{ASK}."}, {"from": "gpt", "value": findings}]
    return {"id": item["id"], **named, "generate_method": method, "reason": why, "conversations": turns}
