"""Clips of annotated operations: what is true of them, in facts, in words, and as questions with exact answers.

Nothing here is drawn by chance: the same annotation gives the same dialogue.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llavakit.systems.surgical_llava.annotations import PHASES, TOOLS, VERBS, Operation, Span, Triplet, merged

TARGETS = (
    *("gallbladder", "cystic plate", "cystic duct", "cystic artery", "cystic pedicle", "blood vessel", "fluid"),
    *("abdominal wall cavity", "liver", "adhesion", "omentum", "peritoneum", "gut", "specimen bag"),
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
MOST_EVENTS = 20  # that a caption tells one by one


@dataclass
class Clip:
    """A stretch of one phase of an operation.

    Attributes:
        start, end: Seconds of the video.
        before, after: Phases around this one in the operation; empty at its ends and where phases are not annotated.
    """

    operation: Operation
    start: float
    end: float
    spans: list[Span] = field(default_factory=list)
    before: str = ""
    after: str = ""

    @property
    def id(self) -> str:
        """Name of the operation and second of the beginning."""
        fraction = f"{self.start % 1:.3f}"[1:].rstrip("0").rstrip(".")
        return f"{self.operation.name}_{math.floor(self.start):04d}{fraction}"

    @property
    def phase(self) -> str:
        return self.spans[0].phase

    @cached_property
    def triplets(self) -> tuple[Triplet, ...]:
        """What is done, in order of time."""
        return tuple(dict.fromkeys(triplet for span in self.spans for triplet in span.triplets))

    @cached_property
    def tools(self) -> tuple[str, ...]:
        """Instruments that are there, in order of time."""
        return tuple(dict.fromkeys(tool for span in self.spans for tool in span.tools))

    @property
    def facts(self) -> dict[str, Any]:
        """What is annotated."""
        facts: dict[str, Any] = {"phase": self.phase, "before": self.before, "after": self.after}
        facts |= {"tools": list(self.tools), "triplets": [list(triplet) for triplet in self.triplets]}
        return {name: value for name, value in facts.items() if value}

    @property
    def caption(self) -> str:
        """The facts as ordered events, times from the beginning of the clip on."""
        events = []
        for span in self.spans[:MOST_EVENTS]:
            told = [span.phase] if span.phase else []
            told += [clause(triplet).replace("the ", "") for triplet in span.triplets]
            idle = [tool for tool in span.tools if tool not in {triplet[0] for triplet in span.triplets}]
            told += [f"{tool} present" for tool in idle]
            begin, end = span.start - self.start, span.end - self.start
            events.append(f"from {begin:g} s to {end:g} s: {'; '.join(told) or 'no instrument'}")
        left = len(self.spans) - MOST_EVENTS
        return "\n".join(events) + (f"\nand {left} more changes" if left > 0 else "")


def cut_clips(operation: Operation, longest: float, shortest: float) -> Iterator[Clip]:
    """The clips of an operation: every phase in equal parts of at most `longest` seconds; short phases are left out."""
    phases: list[list[Span]] = []
    for span in operation.spans:
        joined = phases and phases[-1][-1].phase == span.phase and span.start - phases[-1][-1].end < 1e-6
        if joined:
            phases[-1].append(span)
        else:
            phases.append([span])
    for number, spans in enumerate(phases):
        begin, end = spans[0].start, spans[-1].end
        if end - begin < shortest - 1e-6:
            continue
        parts = max(math.ceil((end - begin) / longest - 1e-6), 1)
        for part in range(parts):
            start, stop = (begin + (end - begin) * place / parts for place in (part, part + 1))
            inside = [
                Span(max(span.start, start), min(span.end, stop), *span.content)
                for span in spans
                if span.start < stop - 1e-6 and span.end > start + 1e-6
            ]
            before = phases[number - 1][0].phase if number else ""
            after = phases[number + 1][0].phase if number + 1 < len(phases) else ""
            yield Clip(operation, round(start, 3), round(stop, 3), merged(inside), before, after)


# Words


def third_person(verb: str) -> str:
    """ "dissect" as "dissects"."""
    return f"{verb}es" if verb.endswith(("s", "sh", "ch")) else f"{verb}s"


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _forms(verb: str) -> str:
    """A pattern for the inflections of a verb."""
    stem = verb.removesuffix("e")
    double = stem[-1] if verb in ("clip", "cut") else ""
    return rf"{re.escape(stem)}{double}(?:e|es|ed|ing|s)?" + (rf"|{re.escape(stem)}(?:s)?" if double else "")


class Vocabulary:
    """The labels that a text names.

    Args:
        labels: Labels beside those of Cholec80 and CholecT50.
    """

    def __init__(self, labels: Iterable[str] = ()) -> None:
        nouns = dict.fromkeys([*PHASES, *TOOLS, *TARGETS, *labels])
        patterns = {label: rf"{re.escape(label)}(?:s|es)?" for label in nouns if label not in VERBS}
        patterns["scissors"] = "scissors?"
        patterns |= {verb: _forms(verb) for verb in VERBS}
        self._labels = sorted(patterns, key=len, reverse=True)
        groups = "|".join(f"(?P<l{n}>{patterns[label]})" for n, label in enumerate(self._labels))
        self._pattern = re.compile(rf"(?<!\w)(?:{groups})(?!\w)")

    def __call__(self, text: str) -> set[str]:
        """The labels in a text; the longest where one is part of another."""
        text = " ".join(text.lower().replace("-", " ").replace("_", " ").split())
        return {self._labels[int(found.lastgroup[1:])] for found in self._pattern.finditer(text)}


# Questions with exact answers


def is_plural(tool: str) -> bool:
    """Whether the name of an instrument is a plural: "scissors"."""
    return tool.endswith("s") and not tool.endswith("ss")


def clause(triplet: Triplet) -> str:
    """ "the hook dissects the cystic duct"."""
    tool, verb, target = triplet
    return f"the {tool} {verb if is_plural(tool) else third_person(verb)} the {target}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def questions(clip: Clip) -> list[tuple[str, str]]:
    """Questions about a clip and their answers, which hold no label that the clip's facts lack."""
    asked: list[tuple[str, str]] = []
    if clip.phase:
        asked.append(("Which phase of the operation is shown?", f"The phase is {clip.phase}."))
    if clip.tools:
        present = listed([f"the {tool}" for tool in clip.tools])
        verb = "is" if len(clip.tools) == 1 and not is_plural(clip.tools[0]) else "are"
        asked.append(("Which instruments are present?", _sentence(f"{present} {verb} present")))
        count = NUMBERS[len(clip.tools)] if len(clip.tools) < len(NUMBERS) else str(len(clip.tools))
        noun = "instrument is" if len(clip.tools) == 1 else "instruments are"
        asked.append(("How many instruments are present?", _sentence(f"{count} {noun} present")))
    for tool in dict.fromkeys(triplet[0] for triplet in clip.triplets):
        own = [clause(triplet) for triplet in clip.triplets if triplet[0] == tool]
        asked.append((f"What {'do' if is_plural(tool) else 'does'} the {tool} do?", _sentence(listed(own))))
    for target in dict.fromkeys(triplet[2] for triplet in clip.triplets):
        own = [clause(triplet) for triplet in clip.triplets if triplet[2] == target]
        asked.append((f"What is done to the {target}?", _sentence(listed(own))))
    if clip.before:
        asked.append(("Which phase came before?", f"The phase before was {clip.before}."))
    if clip.after:
        asked.append(("Which phase comes next?", f"The next phase is {clip.after}."))
    return asked
