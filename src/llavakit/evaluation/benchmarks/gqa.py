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
    Benchmark,
    Question,
    folder_of,
    is_lines,
    need_gold,
    percent,
    stored_questions,
    text_of,
    write_json,
)
from llavakit.evaluation.metrics import mean
from llavakit.evaluation.processors import gqa_answer
from llavakit.evaluation.records import Record, as_records, pair, read_answers, read_json, read_records


def gqa_submission(answers: Iterable[Record]) -> list[dict[str, Any]]:
    """The predictions list of the official evaluation script."""
    return [
        {"questionId": record.get("question_id", (str, int)), "prediction": gqa_answer(record.get("text", str))}
        for record in answers
    ]


def _questions(path: str | Path) -> list[Record]:
    """The official dictionary of questions as records, or a JSONL."""
    try:
        whole = read_json(path)
    except RecordError:
        return read_records(path)
    if isinstance(whole, list) or "question_id" in whole:
        return read_records(path)
    if not all(isinstance(question, dict) for question in whole.values()):
        raise UserError(f"{path}: must be the official questions JSON (id -> question), or JSONL")
    return as_records(path, ({**question, "question_id": name} for name, question in whole.items()))


class GQA(Benchmark):
    """Exact-match accuracy, also of binary and of open questions."""

    title = "GQA"
    columns = ("accuracy", "binary", "open", "count")

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of LLaVA's JSONL, or of the official JSON."""
        if is_lines(path):
            return stored_questions(path, images, SHORT_ANSWER)
        folder, found = folder_of(path, images), []
        for record in _questions(path):
            text = f"{record.get('question', str)}\n{SHORT_ANSWER}"
            image = {"type": "image", "image": str(folder / f"{record.get('imageId', str)}.jpg")}
            found.append(Question(record.id, text, (image,), {"prompt": text}))
        return found

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Exact match after trailing full stops are stripped and letters lower-cased.

        Args:
            gold: The official questions JSON, or a JSONL of `question_id` and `answer`.
        """
        gold = need_gold(gold, self.title, "testdev_balanced_questions.json, or JSONL of question_id and answer")
        hits: list[bool] = []
        kinds: dict[str, list[bool]] = {"binary": [], "open": []}
        for question, prediction in pair(_questions(gold), read_answers(predictions), missing=missing, extra=extra):
            text = text_of(prediction)
            hit = text is not None and gqa_answer(text) == question.get("answer", str)
            hits.append(hit)
            types = question.data.get("types")
            if isinstance(types, dict):
                kinds["open" if types.get("structural") == "query" else "binary"].append(hit)
        metrics = {"accuracy": percent(mean(hits)), "correct": sum(hits), "count": len(hits)}
        return metrics | {kind: percent(mean(values)) for kind, values in kinds.items() if values}

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """The predictions file of the official `eval.py`."""
        return write_json(output, gqa_submission(read_answers(predictions)))
