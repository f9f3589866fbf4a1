"""Benchmarks without a name of their own: a JSONL of questions with answers, and one rule.

Record: `question_id`, `text`, `answer` (or a list `answers`), optionally `image`, `video` or `volume`, and `type` for
a table by question type. One file serves as questions and as gold. The phantom worlds write this format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llavakit.evaluation import processors
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    Question,
    need_gold,
    percent,
    stored_questions,
    text_of,
)
from llavakit.evaluation.metrics import anls, any_match, mean, relaxed_match
from llavakit.evaluation.records import Record, choose, pair, read_answers, read_records

PROCESSORS: dict[str, Callable[[str], str]] = {
    "plain": processors.plain_answer,
    "vqa": processors.vqa_answer,
    "medical": processors.medical_answer,
    "none": str,
}


def _answers(question: Record) -> Sequence[str]:
    if "answers" in question.data:
        answers = question.get("answers", list)
        if not answers or not all(isinstance(answer, (str, int, float)) for answer in answers):
            raise question.error("answers", "must be a non-empty list of texts")
        return [str(answer) for answer in answers]
    return [str(question.get("answer", (str, int, float)))]


class _Listed(Benchmark):
    """Mean of a per-question score, in total and by `type`."""

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of the JSONL, as they stand there."""
        return stored_questions(path, images, keep=("type",))

    def _score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        value: Callable[[str, Sequence[str]], float],
        missing: str,
        extra: str,
    ) -> tuple[list[float], dict[str, list[float]]]:
        gold = need_gold(gold, self.title, "JSONL of question_id and answer")
        values: list[float] = []
        by_type: dict[str, list[float]] = {}
        for question, prediction in pair(read_records(gold), read_answers(predictions), missing=missing, extra=extra):
            answers, text = _answers(question), text_of(prediction)
            values.append(0.0 if text is None else value(text, answers))
            kind = question.data.get("type")
            if kind is not None:
                by_type.setdefault(str(kind), []).append(values[-1])
        return values, by_type


class ExactMatch(_Listed):
    """Share of answers that equal the gold answer after normalisation."""

    title = "Exact match"
    columns = ("accuracy", "correct", "count")

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
        values, by_type = self._score(
            predictions, gold, lambda text, answers: float(any_match(text, answers, normalise)), missing, extra
        )
        metrics: dict[str, Any] = _row(values)
        if by_type:
            metrics["by_type"] = {kind: _row(found) for kind, found in by_type.items()}
        return metrics


class Phantom(ExactMatch):
    """Questions about the phantom worlds."""

    title = "Phantom questions"


class ANLS(_Listed):
    """Average normalised Levenshtein similarity (DocVQA, InfoVQA, ST-VQA)."""

    title = "ANLS"
    columns = ("anls", "count")

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        threshold: float = 0.5,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Mean over questions of the best similarity over answers, 0 below `threshold`; in percent."""
        values, by_type = self._score(
            predictions, gold, lambda text, answers: anls(text, answers, float(threshold)), missing, extra
        )
        return _means("anls", values, by_type)


class RelaxedAccuracy(_Listed):
    """Numbers may be off by five percent (ChartQA)."""

    title = "Relaxed accuracy"
    columns = ("relaxed_accuracy", "count")

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

        def value(text: str, answers: Sequence[str]) -> float:
            return float(any(relaxed_match(text, answer, float(tolerance)) for answer in answers))

        return _means("relaxed_accuracy", *self._score(predictions, gold, value, missing, extra))


def _row(values: Sequence[float]) -> dict[str, Any]:
    return {"accuracy": percent(mean(values)), "correct": int(sum(values)), "count": len(values)}


def _means(name: str, values: Sequence[float], by_type: dict[str, list[float]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {name: percent(mean(values)), "count": len(values)}
    if by_type:
        metrics["by_type"] = {kind: percent(mean(found)) for kind, found in by_type.items()}
    return metrics
