"""What a judge's reply says: the parsers of the published harness under their names, and LLaVA-Critic's own.

Every parser takes any text and raises nothing: a reply that cannot be read is data. The published ones keep their
quirks, since figures compare only with them. Source: lmms-eval; spec section 7.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

FAILED = [-1, -1]
SKIPPED = -999  # what the harness writes where there was no review


# Two scores in the first line, the reference's and the answer's


def wilder_scores(review: str) -> list[float]:
    """LLaVA-Wilder: the first line must be exactly two numbers with one blank or comma between; else [-1, -1]."""
    fields = review.split("\n")[0].strip().replace(",", " ").split(" ")
    try:
        return [float(field) for field in fields] if len(fields) == 2 else list(FAILED)
    except ValueError:
        return list(FAILED)


def in_the_wild_scores(review: str) -> list[float]:
    """LLaVA in the wild: the first two numbers of the first line that holds anything; else [-1, -1]."""
    line = re.sub("[,;]", " ", review.strip().split("\n")[0])
    numbers = [found[0] for found in re.finditer(r"-?\d+(\.\d+)?", line)]
    return [float(number) for number in numbers[:2]] if len(numbers) > 1 else list(FAILED)


def relative_score(scores: Iterable[Sequence[float]]) -> float | None:
    """100 x mean of the answers' scores / mean of the references', as the harness rounds it.

    Replies that could not be read stay in the means with -1; reviews marked -999 do not. None without a review, or
    where the references' mean is 0.
    """
    kept = [pair for pair in scores if SKIPPED not in pair]
    if not kept:
        return None
    reference, answer = (round(sum(column) / len(kept), 3) for column in zip(*kept, strict=True))
    return round(answer / reference * 100, 1) if reference else None


# An arena with a baseline


class ArenaVerdict(NamedTuple):
    """A WildVision verdict.

    Attributes:
        raw: -2 to 2 from the evaluated model's side, which is B.
        winner: "model_a" (the baseline), "model_b" or "tie".
        judgement: "Worse++", "Worse", "Tie", "Better", "Better++", or "Unclear" (a tie).
        label: The one bracketed label of the reply; None for none or several different ones.
        unlabelled: Whether the reply has no bracketed label at all.
    """

    raw: int
    winner: str
    judgement: str
    label: str | None
    unlabelled: bool


_ARENA = (
    ("A>B", -1, "Worse"),
    ("A>>B", -2, "Worse++"),
    ("A=B", 0, "Tie"),
    ("B>A", 1, "Better"),
    ("B>>A", 2, "Better++"),
)


def arena_verdict(reply: str) -> ArenaVerdict:
    """WildVision: the bracketed label; without exactly one the whole reply is searched for labels in a fixed order."""
    labels = set(re.findall(r"\[\[([AB<>=]+)\]\]", reply))
    label = labels.pop() if len(labels) == 1 else None
    unlabelled = label is None and not labels
    text = reply if label is None else label
    raw, judgement = next(((raw, word) for mark, raw, word in _ARENA if mark in text), (0, "Unclear"))
    return ArenaVerdict(raw, ("model_a", "tie", "model_b")[(raw > 0) - (raw < 0) + 1], judgement, label, unlabelled)


# Single scores


def video_dc_score(review: str) -> int:
    """Video detail captions: `score` of a Python literal of a dictionary, cut to a whole number; else 0."""
    try:
        return int(ast.literal_eval(review)["score"])
    except Exception:  # a reply is any text; there is no telling what a literal of it runs into
        return 0


def mmvet_grade(ask: Callable[[float], str]) -> float:
    """MM-Vet as the harness grades: what is asked until a number between 0 and 1 opens the reply.

    A number outside is asked for again. Where the first word is no number, the temperature rises by 0.5, one reply is
    asked for and thrown away, and the next one counts, until the temperature is 2. An empty reply grades 0.

    Args:
        ask: Gives the judge's reply at a temperature.
    """
    temperature = 0.0
    while reply := ask(temperature):
        try:
            grade = float(reply.split(" ")[0])
        except ValueError:
            temperature += 0.5
            ask(temperature)
            if temperature >= 2.0:
                return 0.0
        else:
            if 0.0 <= grade <= 1.0:
                return grade
    return 0.0


# VL-RewardBench

_BETTER = re.compile(r"(?:Overall Judgment|Therefore).*Answer\s*(\d+)\s*is\s*(?:the\s*)?(?:slightly\s*)?better", re.I)
_GROUPS = {"mathverse": "reasoning", "mmmu": "reasoning"} | dict.fromkeys(
    ("hallucination", "rlhf", "rlaif"), "hallucination"
)


def reward_choice(judgement: str) -> int | None:
    """The number of the answer that is called better, whatever number that is; None if none is."""
    found = _BETTER.search(judgement.replace("\n", "").replace("*", ""))
    return int(found[1][:18]) if found else None


def reward_group(name: str) -> str:
    """The group of a record by its id: reasoning, hallucination or general."""
    return _GROUPS.get(name.split("-")[0].split("_")[0].lower(), "general")


# LLaVA-Critic's own replies, for which no code was published

_CHOICE = r"(?:the\s+)?(?:response\s+|answer\s+|assistant\s+)?(first|second|1|2|A|B)(?:\s+(?:response|answer))?"
_RESPONSE = re.compile(rf"better\s+response\W*?:\s*\**\s*(?:\[\s*{_CHOICE}\s*\]|{_CHOICE}\s*[.*]*\s*$)", re.I | re.M)
_EQUAL = re.compile(r"\bequally\s+(?:good|well|bad)\b", re.I)
_SCORE = re.compile(r"\b(?:final\s+)?score\s*\**\s*:\s*\**\s*\[?\s*(-?\d+(?:\.\d+)?)", re.I)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
FIRST, SECOND, TIE = "first", "second", "tie"


def critic_verdict(reply: str) -> str | None:
    """ "first", "second" or "tie": the last statement of the reply counts; None if it makes none."""
    found = [(match.start(), (match[1] or match[2]).lower()) for match in _RESPONSE.finditer(reply)]
    found += [(match.start(), TIE) for match in _EQUAL.finditer(reply)]
    if not found:
        return None
    last = max(found)[1]
    return last if last == TIE else FIRST if last in (FIRST, "1", "a") else SECOND


def critic_score(reply: str) -> float | None:
    """The number after the last `Score:` or `Final Score:`, else the first number; None if it is not from 0 to 100."""
    named = _SCORE.findall(reply)
    found = named[-1] if named else next(iter(_NUMBER.findall(reply)), None)
    score = None if found is None else float(found)
    return score if score is not None and 0 <= score <= 100 else None


def unswapped(verdict: str | None, swapped: bool) -> str | None:
    """A verdict about answers that were shown in the other order, as one about the original order."""
    return {FIRST: SECOND, SECOND: FIRST}.get(verdict, verdict) if swapped else verdict
