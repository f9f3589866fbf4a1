"""Errors of a report counted by a judge, by a rubric that a YAML file describes.

    name: chexprompt
    system: You judge reports as an expert radiologist ...
    prompt: |
      ... {examples} ... {reference} ... {candidate}
    examples: |                 # optional
      ...
    errors: {A: false_positive_finding, B: omission_finding}   # types, by the letter that the judge writes
    severities: {significant: "Number of clinically significant errors by type:", insignificant: "..."}
    format: lists               # `HEADING [(A, 1), (B, 0)]` per severity; or json: {"significant": {"A": 1, "B": 0}}
    stop: Explanation           # lists: what follows is not read
    sampling: {temperature: 0, max_tokens: 128, top_p: 0.9}

A reply that cannot be read is asked for once more; what remains unreadable, and calls that failed, are no counts: they
are left out of every mean and reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.data.strict_yaml import YamlError, parse_yaml
from llavakit.errors import UserError, quoted
from llavakit.evaluation.metrics.resampling import Sums
from llavakit.evaluation.records import read_text
from llavakit.registry import RUBRICS, nearest

if TYPE_CHECKING:
    from llavakit.evaluation.judges import Judge

Counts = dict[str, int]
FORMATS = ("lists", "json")
SAMPLING = {"temperature": (int, float), "max_tokens": (int,), "top_p": (int, float)}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Rubric:
    """What a judge is told, and how its reply is read.

    Attributes:
        name: Prefix of the metrics.
        system, prompt: Messages; `{reference}`, `{candidate}` and `{examples}` are replaced in the prompt.
        errors: Types of errors by the letter that the judge writes.
        severities: Heading of the counts by severity; the first one decides whether a report is free of errors.
        format: "lists" or "json".
        examples: Worked examples.
        stop: Word that ends what is read of a reply in lists; None reads all.
        sampling: temperature, max_tokens, top_p.
    """

    name: str
    system: str
    prompt: str
    errors: Mapping[str, str]
    severities: Mapping[str, str]
    format: str = "lists"
    examples: str = ""
    stop: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, reference: str, candidate: str) -> list[dict[str, str]]:
        """The conversation that asks for one report's errors."""
        texts = {"reference": reference, "candidate": candidate, "examples": self.examples.strip("\n")}
        prompt = re.sub(r"\{(reference|candidate|examples)\}", lambda match: texts[match[1]], self.prompt)
        own = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        return [*own, {"role": "user", "content": prompt.strip("\n")}]

    def parse(self, reply: str) -> list[Counts | None] | None:
        """Counts by type for every severity as the judge wrote them, None for one that cannot be read.

        None in all if the reply has not the form; never an exception.
        """
        return self._lists(reply) if self.format == "lists" else self._json(reply)

    def counts(self, reply: str) -> list[Counts] | None:
        """Counts of every severity by exactly the rubric's types, none negative; else None."""
        found = self.parse(reply)
        names = set(self.errors.values())
        if found is None or any(own is None or set(own) != names or min(own.values()) < 0 for own in found):
            return None
        return found  # type: ignore[return-value]

    def _lists(self, reply: str) -> list[Counts | None] | None:
        headings = list(self.severities.values())
        if not all(heading in reply for heading in headings):
            return None
        text = reply if self.stop is None else reply.split(self.stop)[0]
        # as CheXprompt reads: without a space behind it, the first heading becomes part of the first type's name
        marks = [f"{headings[0]} ", *(f"\n{heading}" for heading in headings[1:])]
        parts = [text.split(following)[0] for following in marks[1:]] + [text]
        return [self._pairs(part.split(mark)[-1]) for part, mark in zip(parts, marks, strict=True)]

    def _pairs(self, text: str) -> Counts | None:
        """Counts of `[(A, 1), (B, 0)]`; what follows a second comma in a pair is not read."""
        counts: Counts = {}
        for pair in text.split("),"):
            key, *numbers = pair.translate(str.maketrans("", "", "()[]")).split(",")
            try:
                counts[self.errors.get(key.strip(), key.strip())] = int(numbers[0])
            except (IndexError, ValueError):
                return None
        return counts

    def _json(self, reply: str) -> list[Counts | None] | None:
        start, end = reply.find("{"), reply.rfind("}")
        try:
            whole = json.loads(reply[start : end + 1]) if 0 <= start < end else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(whole, dict) or set(whole) != set(self.severities):
            return None
        return [self._object(whole[name]) for name in self.severities]

    def _object(self, value: Any) -> Counts | None:
        if not isinstance(value, dict) or not all(type(count) is int for count in value.values()):
            return None
        return {self.errors.get(key, key): count for key, count in value.items()}


def read_rubric(source: str | Path) -> Rubric:
    """A rubric by registered name, or from a YAML file.

    Raises:
        UserError: If there is none, or the file lacks a field or has an unknown one.
    """
    path = RUBRICS.get(str(source)) if str(source) in RUBRICS else Path(source)
    if not Path(path).is_file():
        raise UserError(f"{source}: no rubric of that name and no such file{nearest(str(source), list(RUBRICS))}")
    try:
        raw = parse_yaml(read_text(path))
    except YamlError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be an object with name, prompt, errors and severities")
    known = {"name": str, "system": str, "prompt": str, "errors": dict, "severities": dict}
    known |= {"format": str, "examples": str, "stop": str, "sampling": dict}
    for key, value in raw.items():
        if key not in known:
            raise UserError(f"{path}: unknown field {quoted(key)}{nearest(str(key), list(known))}")
        if not isinstance(value, known[key]):
            raise UserError(f"{path}: {key}: is {quoted(value)}; it must be {_KINDS[known[key]]}")
    for key in ("name", "prompt", "errors", "severities"):
        if not raw.get(key):
            raise UserError(f"{path}: {key}: is missing")
    rubric = Rubric(**{"system": "", **raw})
    _check(rubric, path)
    return rubric


_KINDS = {str: "a text", dict: "an object"}


def _check(rubric: Rubric, path: Path) -> None:
    def refuse(where: str, problem: str) -> None:
        raise UserError(f"{path}: {where}: {problem}")

    for mark in ("{reference}", "{candidate}"):
        if mark not in rubric.prompt:
            refuse("prompt", f"must contain {mark}")
    if rubric.format not in FORMATS:
        refuse("format", f"is {quoted(rubric.format)}; it must be {' or '.join(FORMATS)}")
    for where, names in (
        ("name", [rubric.name]),
        ("errors", rubric.errors.values()),
        ("severities", rubric.severities),
    ):
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                refuse(where, f"{quoted(name)} must be a word of letters, digits and underscores")
    if len(set(rubric.errors.values())) < len(rubric.errors):
        refuse("errors", "two letters have the same type")
    if not all(isinstance(letter, str) for letter in rubric.errors):
        refuse("errors", "letters must be texts; write digits and yes or no in quotation marks")
    if rubric.format == "lists":
        headings = list(rubric.severities.values())
        if not all(isinstance(heading, str) and heading for heading in headings) or len(set(headings)) < len(headings):
            refuse("severities", "each needs a heading of its own")
    for key, value in rubric.sampling.items():
        if key not in SAMPLING:
            refuse("sampling", f"unknown option {quoted(key)}{nearest(str(key), list(SAMPLING))}")
        if isinstance(value, bool) or not isinstance(value, SAMPLING[key]):
            refuse(f"sampling.{key}", f"is {quoted(value)}; it must be a number")


@dataclass(frozen=True)
class Judgement:
    """What a judge said of the reports of one file.

    Attributes:
        counts: Per report, counts by type for every severity; None where there are none.
        unreadable, failed: Reports whose replies could not be read, and whose calls failed.
    """

    rubric: Rubric
    counts: Sequence[Sequence[Counts] | None]
    unreadable: int
    failed: int

    def sums(self) -> dict[str, Sums]:
        """Mean errors per report by severity and type, all errors, and the share of reports without severe ones."""
        rubric, infinite = self.rubric, float("inf")

        def mean(value: Any) -> Sums:
            return Sums.mean([None if own is None else value(own) for own in self.counts], high=infinite)

        found = {f"{rubric.name}_errors": mean(lambda own: sum(sum(part.values()) for part in own))}
        for place, severity in enumerate(rubric.severities):
            name = f"{rubric.name}_{severity}"
            found[name] = mean(lambda own, place=place: sum(own[place].values()))
            for kind in rubric.errors.values():
                found[f"{name}_{kind}"] = mean(lambda own, place=place, kind=kind: own[place][kind])
        free = [None if own is None else float(not any(own[0].values())) for own in self.counts]
        return found | {f"{rubric.name}_error_free": Sums.mean(free)}


def judge_reports(judge: Judge, rubric: Rubric, texts: Sequence[str], references: Sequence[str]) -> Judgement:
    """Have a judge count the errors of every text.

    Raises:
        UserError: If no reply can be read.
    """
    from llavakit.generation.remote import CallFailed

    asked = [rubric.messages(reference, text) for text, reference in zip(texts, references, strict=True)]
    fields = {"top_p": rubric.sampling["top_p"]} if "top_p" in rubric.sampling else {}
    replies = judge.ask_all(asked, **fields)
    found = [None if isinstance(reply, CallFailed) else rubric.counts(reply) for reply in replies]
    again = [
        n for n, own in enumerate(found) if own is None and not isinstance(replies[n], CallFailed)
    ]  # a second asking of what could not be read
    for n, reply in zip(again, judge.ask_all([asked[n] for n in again], attempt=1, **fields), strict=True):
        if not isinstance(reply, CallFailed):
            found[n] = rubric.counts(reply)
    failures = [reply for reply in replies if isinstance(reply, CallFailed)]
    if not any(own is not None for own in found):
        if failures:
            raise UserError(f"{rubric.name}: {failures[0]} (so did all {len(failures)} calls)")
        raise UserError(
            f"{rubric.name}: no reply of {judge.responder.name} has the form; the first is {quoted(replies[0])}"
        )
    return Judgement(rubric, found, sum(own is None for own in found) - len(failures), len(failures))
