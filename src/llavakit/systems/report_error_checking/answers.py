"""What replies mean, what several members decide together, and how good that is. Source: spec sections 4.3, 6, 7.

An answer that cannot be read is `None`: it is no vote, and it is wrong wherever answers are counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.metrics.intervals import wilson
from llavakit.evaluation.records import choose

RULES = ("majority", "any", "all", "mean")
TYPES = ("insert", "remove", "substitute")
PREVALENCES = (0.01, 0.05, 0.5)
_SIMPLE = (re.compile(r"\s*[\(\[]?([YNyn])(?:[\)\].:,]|\s|$)"), re.compile(r"\s*(yes|no)\b", re.IGNORECASE))
_COMPLEX = (
    re.compile(r"\s*[\(\[]?([A-Ca-c])(?:[\)\].:,]|\s|$)"),
    re.compile(rf"\s*({'|'.join(TYPES)})\b", re.IGNORECASE),
)


def simple_answer(text: str) -> str | None:
    """ "Y" or "N" at the beginning of a reply, as a letter or word."""
    found = next(filter(None, (pattern.match(text) for pattern in _SIMPLE)), None)
    return None if found is None else found[1][0].upper()


def complex_answer(text: str) -> str | None:
    """The type of mistake at the beginning of a reply, as a letter or word."""
    found = next(filter(None, (pattern.match(text) for pattern in _COMPLEX)), None)
    if found is None:
        return None
    said = found[1].lower()
    return said if said in TYPES else TYPES["abc".index(said)]


def vote(answers: Sequence[str | None], rule: str = "majority", tie: str = "Y") -> str | None:
    """What members decide at the SIMPLE level; None if no answer of theirs can be read.

    Args:
        answers: One of every member, "Y", "N" or None.
        rule: "majority" of the answers that can be read, "any" (one Y suffices), or "all" (every member said Y).
        tie: What equal numbers of Y and N are.
    """
    choose(rule, "rule", RULES[:3])
    choose(tie, "tie", ("Y", "N"))
    yes, no = (sum(answer == letter for answer in answers) for letter in "YN")
    if not yes + no:
        return None
    if rule == "any":
        return "Y" if yes else "N"
    if rule == "all":
        return "Y" if yes == len(answers) else "N"
    return tie if yes == no else "Y" if yes > no else "N"


def mean_vote(probabilities: Sequence[float | None], threshold: float = 0.5) -> str | None:
    """ "Y" if the mean probability of a mistake over the members that have one reaches the threshold."""
    known = [value for value in probabilities if value is not None]
    if not known:
        return None
    return "Y" if math.fsum(known) / len(known) >= threshold else "N"


def type_vote(answers: Sequence[str | None]) -> str | None:
    """What most members say at the COMPLEX level; of equals, what the first of them said."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=lambda answer: counts[answer], default=None)  # insertion order decides between equals


def ratio(part: float, whole: float) -> float:
    """A share; 0 of nothing."""
    return part / whole if whole else 0.0


def simple_metrics(gold: Sequence[str], decisions: Sequence[str | None]) -> dict[str, Any]:
    """Counts and shares at the SIMPLE level; a mistake is the positive class.

    What is not decided is wrong: with gold Y a false negative, with gold N in none of tp, tn and fp.
    """
    pairs = list(zip(gold, decisions, strict=True))
    tp, tn, fp = (pairs.count(pair) for pair in (("Y", "Y"), ("N", "N"), ("N", "Y")))
    fn = sum(right == "Y" and said != "Y" for right, said in pairs)
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "tp": tp,
        "tn": tn,
        "fp": fp,
        "fn": fn,
        "unparsed": sum(said is None for _, said in pairs),
        "accuracy": ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "specificity": ratio(tn, tn + fp),
        "f1": ratio(2 * precision * recall, precision + recall),
        "wilson95": wilson(tp + tn, len(pairs)),
    }


def precision_at(prevalence: float, recall: float, specificity: float) -> float:
    """Precision where mistakes are as frequent as `prevalence`."""
    true, false = prevalence * recall, (1 - prevalence) * (1 - specificity)
    return ratio(true, true + false)


def complex_metrics(gold: Sequence[str], decisions: Sequence[str | None]) -> dict[str, Any]:
    """Accuracy, F1 of every type and their mean, and the confusion matrix (gold, then decision)."""
    pairs = Counter(zip(gold, decisions, strict=True))
    f1 = {}
    for name in TYPES:
        right = pairs[name, name]
        said = sum(count for (_, decision), count in pairs.items() if decision == name)
        f1[name] = ratio(2 * right, said + sum(count for (truth, _), count in pairs.items() if truth == name))
    right = sum(pairs[name, name] for name in TYPES)
    return {
        "accuracy": ratio(right, len(gold)),
        "wilson95": wilson(right, len(gold)),
        "macro_f1": math.fsum(f1.values()) / len(TYPES),
        "per_class_f1": f1,
        "unparsed": sum(decision is None for decision in decisions),
        "confusion": {
            truth: {decision or "unparsed": pairs[truth, decision] for decision in (*TYPES, None)} for truth in TYPES
        },
    }


def rescued(reader: Sequence[bool], system: Sequence[bool]) -> dict[str, Any]:
    """How many of the items that a reader got wrong the system got right.

    Raises:
        UserError: If they are about different numbers of items.
    """
    if len(reader) != len(system):
        raise UserError(f"reader: has {len(reader)} items, the system {len(system)}")
    wrong = [right for read, right in zip(reader, system, strict=True) if not read]
    return {"reader_wrong": len(wrong), "rescued": sum(wrong), "rate": ratio(sum(wrong), len(wrong))}
