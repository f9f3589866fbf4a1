"""Benchmarks for data of one's own: a JSONL of questions with answers, and one rule.

Record: `question_id`, `text`, `answer` (or a list `answers`), optionally `image`, `video` or `volume`, and `type` for
a table by question type. One file serves as questions and as gold. The phantom worlds write this format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llavakit.evaluation import processors
from llavakit.evaluation.benchmarks.base import PairedBenchmark, Scored, by_field, percent
from llavakit.evaluation.metrics.answers import anls, any_match, mean, number_in, relaxed_match
from llavakit.evaluation.records import Record, choose

PROCESSORS: dict[str, Callable[[str], str]] = {
    "plain": processors.plain_answer,
    "vqa": processors.vqa_answer,
    "medical": processors.medical_answer,
    "none": str,
}


def answers_of(question: Record) -> list[str | int | float]:
    """The gold answers of a record: `answers`, or the one `answer`; texts or numbers.

    Raises:
        RecordError: If there is none, or one is neither.
    """
    if "answers" not in question.data:
        return [question.get("answer", (str, int, float))]
    answers = question.get("answers", list)
    if not answers or not all(isinstance(a, (str, int, float)) and not isinstance(a, bool) for a in answers):
        raise question.error("answers", "must be a non-empty list of texts or numbers")
    return answers


def texts_of(question: Record) -> list[str]:
    """The gold answers as texts; a whole number has no decimal point, however JSON writes it."""
    return [_as_text(answer) for answer in answers_of(question)]


def _as_text(answer: str | int | float) -> str:
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


class ListedBenchmark(PairedBenchmark):
    """A JSONL of questions with their answers, scored by one rule, in total and by `type`."""

    questions_are_gold = True
    keep = ("type",)
    tables = {"by_type": "type"}


class ExactMatch(ListedBenchmark):
    """Share of answers that equal a gold answer after normalisation; a gold number is compared as a number."""

    title = "Exact match"

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        process: str = "plain",
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Accuracy in total and by `type`.

        Args:
            gold: JSONL of `question_id`, `answer` or `answers`, optionally `type`.
            process: Normalisation of both sides: "plain" (case, spaces, final full stop), "vqa", "medical" or "none".
        """
        normalise = PROCESSORS[choose(process, "process", tuple(PROCESSORS))]

        def value(question: Record, text: str) -> float:
            if any_match(text, texts_of(question), normalise):
                return True
            number = number_in(text.strip().rstrip("."))
            numbers = [answer for answer in answers_of(question) if not isinstance(answer, str)]
            return number is not None and number in numbers

        return self.score_pairs(self.pairs(predictions, gold, missing, extra), value)

    def summary(self, scored: Scored) -> dict[str, Any]:
        """Accuracy, right answers and questions, in total and by `type`."""
        metrics = _row([value for _, value in scored])
        by_type = {name: _row(values) for name, values in by_field(scored, "type").items()}
        return metrics | ({"by_type": by_type} if by_type else {})


class Phantom(ExactMatch):
    """Questions about the phantom worlds."""

    title = "Phantom questions"


class ANLS(ListedBenchmark):
    """Average normalised Levenshtein similarity (DocVQA, InfographicVQA, ST-VQA)."""

    title = "ANLS"
    metric = "anls"

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        threshold: float = 0.5,
        collapse: bool = True,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Mean over questions of the best similarity over answers, 0 below `threshold`; in percent.

        Args:
            collapse: Take runs of white space for one space, as DocVQA's evaluation does; false for ST-VQA as LLaVA
                evaluates it.
        """
        pairs = self.pairs(predictions, gold, missing, extra)
        return self.score_pairs(pairs, lambda q, text: anls(text, texts_of(q), threshold, collapse=collapse))


class RelaxedAccuracy(ListedBenchmark):
    """Numbers may be off by five percent (ChartQA)."""

    title = "Relaxed accuracy"
    metric = "relaxed_accuracy"

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        tolerance: float = 0.05,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Share of answers within `tolerance` of a gold number, or equal to a gold text; in percent."""

        def value(question: Record, text: str) -> float:
            return any(relaxed_match(text, answer, tolerance) for answer in texts_of(question))

        return self.score_pairs(self.pairs(predictions, gold, missing, extra), value)


def _row(values: Sequence[float]) -> dict[str, Any]:
    return {"accuracy": percent(mean(values)), "correct": int(sum(values)), "count": len(values)}
