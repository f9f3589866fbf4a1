"""VQA as Robust CLIP's evaluation scores it: OpenFlamingo's cut of replies, then the official rule on both sides."""

from __future__ import annotations

import re

from llavakit.evaluation.benchmarks.base import SHORT_ANSWER
from llavakit.evaluation.benchmarks.vqa import VQAv2, annotated
from llavakit.evaluation.metrics.answers import vqa_accuracy
from llavakit.evaluation.processors import vqa_official_answer
from llavakit.evaluation.records import Record

_NEXT_QUESTION = re.compile("Question|Answer|Short")


def short_reply(text: str) -> str:
    """A reply up to where a next question would begin, and up to its first comma with a space."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0].split(", ", 1)[0]


def reply_accuracy(text: str, answers: list[str]) -> float:
    """Agreement of a cut reply with the annotators, in 0..1; both are always normalised."""
    return vqa_accuracy(short_reply(text), answers, vqa_official_answer)


class RobustVQA(VQAv2):
    """Soft accuracy over ten annotators as OpenFlamingo's evaluation computes it."""

    title = "VQA (Robust CLIP)"
    suffix = SHORT_ANSWER

    def value(self, question: Record, text: str) -> float:
        """How many annotators agree with the cut reply."""
        return reply_accuracy(text, annotated(question))
