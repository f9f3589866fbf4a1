"""GQA: compositional questions with one-word answers, exact match.

Published files: `testdev_balanced_questions.json` with everything, and LLaVA's question JSONL. Source: spec of
LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import (
    SHORT_ANSWER,
    PairedBenchmark,
    Question,
    Scored,
    image_of,
    percent,
    write_json,
)
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.processors import gqa_answer
from llavakit.evaluation.records import Record, as_records, read_answers, read_json, read_records


def gqa_submission(answers: Iterable[Record]) -> list[dict[str, Any]]:
    """The predictions list of the official evaluation script."""
    return [
        {"questionId": record.get("question_id", (str, int)), "prediction": gqa_answer(record.get("text", str))}
        for record in answers
    ]


class GQA(PairedBenchmark):
    """Exact-match accuracy, also of binary and of open questions.

    An answer is right if it equals the gold answer after trailing full stops are removed and letters lower-cased.
    """

    title = "GQA"
    gold_file = "testdev_balanced_questions.json, or JSONL of question_id and answer"
    suffix = SHORT_ANSWER

    def read_gold(self, path: str | Path) -> list[Record]:
        """The official dictionary of questions as records, or a JSONL."""
        try:
            whole = read_json(path)
        except RecordError:
            return read_records(path)
        if not isinstance(whole, dict) or "question_id" in whole:
            return read_records(path)
        if not all(isinstance(question, dict) for question in whole.values()):
            raise UserError(f"{path}: must be the official questions JSON (id -> question), or JSONL")
        return as_records(path, ({**question, "question_id": name} for name, question in whole.items()))

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A question of the official JSON."""
        text = f"{record.get('question', str)}\n{SHORT_ANSWER}"
        return Question(record.id, text, (image_of(folder / f"{record.get('imageId', str)}.jpg"),), {"prompt": text})

    def value(self, question: Record, text: str) -> float:
        """Whether the answer is right."""
        return gqa_answer(text) == question.get("answer", str)

    def summary(self, scored: Scored) -> dict[str, Any]:
        """Accuracy in total, and of binary and open questions where the gold file tells them apart."""
        metrics = super().summary(scored)
        kinds = {kind: [value for question, value in scored if _kind(question) == kind] for kind in ("binary", "open")}
        correct = {"correct": int(sum(value for _, value in scored))}
        return metrics | correct | {kind: percent(mean(values)) for kind, values in kinds.items() if values}

    def measures(self, scored: Scored) -> dict[str, Measure]:
        """Accuracy in total, and of binary and open questions."""

        def of(kind: str) -> Measure:
            return Measure.mean([value if _kind(question) == kind else None for question, value in scored])

        return super().measures(scored) | {kind: of(kind) for kind in ("binary", "open")}

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """The predictions file of the official `eval.py`."""
        return write_json(output, gqa_submission(read_answers(predictions)))


def _kind(question: Record) -> str | None:
    """Whether a question is binary or open, None if its record does not say."""
    types = question.data.get("types")
    return None if not isinstance(types, dict) else "open" if types.get("structural") == "query" else "binary"
