"""SEED-Bench: multiple-choice questions about images and (middle frames of) videos.

Published file: `SEED-Bench.json` with `questions` and `question_type`; LLaVA's question JSONL is made from it. Source:
spec of LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    LETTER,
    Benchmark,
    Question,
    folder_of,
    is_lines,
    need_gold,
    percent,
    stored_questions,
    text_of,
    write_lines,
)
from llavakit.evaluation.metrics import grouped_mean, mean
from llavakit.evaluation.records import Record, as_records, pair, read_answers, read_json


def _annotation(path: str | Path) -> tuple[list[Record], dict[Any, str]]:
    """The question records and the names of question types by id."""
    whole = read_json(path)
    if not isinstance(whole, dict) or not isinstance(whole.get("questions"), list):
        raise UserError(f"{path}: field questions is missing; give SEED-Bench.json")
    names = {number: name for name, number in whole.get("question_type", {}).items()}
    return as_records(path, whole["questions"]), names


def accuracies(
    pairs: Iterable[tuple[Record, str | None]], names: Mapping[Any, str]
) -> tuple[dict[str, float], dict[str, float], float | None]:
    """Accuracy (fractions) per question type in order of type id, per data type, and in total.

    Args:
        pairs: Question and predicted text; right is only the letter itself.
        names: Question type id -> name.
    """
    rows = [
        (question.get("question_type_id", int), question.get("data_type", str), text == question.get("answer", str))
        for question, text in pairs
    ]
    by_type = grouped_mean((kind, hit) for kind, _, hit in sorted(rows, key=lambda row: row[0]))
    by_data = grouped_mean((data, hit) for _, data, hit in rows)
    return {names.get(kind, str(kind)): value for kind, value in by_type.items()}, by_data, mean(h for *_, h in rows)


def seed_submission(answers: Iterable[Record], questions: Iterable[Record]) -> list[dict[str, Any]]:
    """The leaderboard's JSONL rows, in order of the questions.

    Raises:
        RecordError: If a question has no answer.
    """
    texts = {record.id: record.get("text", str) for record in answers}
    rows = []
    for question in questions:
        if question.id not in texts:
            raise question.error("question_id", f"{question.id!r} has no prediction; SEED takes complete files only")
        rows.append({"question_id": question.data["question_id"], "prediction": texts[question.id]})
    return rows


class SEEDBench(Benchmark):
    """Accuracy in total, of image questions, of video questions, and by question type."""

    title = "SEED-Bench"
    columns = ("accuracy", "image", "video", "count")

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of LLaVA's JSONL, or of `SEED-Bench.json`.

        Images lie in `SEED-Bench-image`, the middle frames of videos in `SEED-Bench-video-image`.
        """
        if is_lines(path):
            return stored_questions(path, images, LETTER)
        folder, found = folder_of(path, images), []
        for record in _annotation(path)[0]:
            lines = [record.get("question", str)]
            lines += [f"{letter.upper()}. {record.get(f'choice_{letter}', (str, int, float))}" for letter in "abcd"]
            text = "\n".join([*lines, LETTER])
            if record.get("data_type", str) == "image":
                image = folder / "SEED-Bench-image" / record.get("data_id", str)
            else:
                image = folder / "SEED-Bench-video-image" / f"{record.id}.png"
            name = record.get("question_id", (str, int))
            found.append(Question(name, text, ({"type": "image", "image": str(image)},), {"prompt": text}))
        return found

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Exact match of the letter.

        Args:
            gold: `SEED-Bench.json`.
        """
        questions, names = _annotation(need_gold(gold, self.title, "SEED-Bench.json"))
        pairs = [
            (question, text_of(prediction))
            for question, prediction in pair(questions, read_answers(predictions), missing=missing, extra=extra)
        ]
        by_type, by_data, total = accuracies(pairs, names)
        return {
            "accuracy": percent(total),
            **{name: percent(value) for name, value in by_data.items()},
            "count": len(pairs),
            "by_type": {name: percent(value) for name, value in by_type.items()},
        }

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """The leaderboard's JSONL."""
        if questions is None:
            raise UserError(f"{self.title}: give SEED-Bench.json as the question file")
        return write_lines(output, seed_submission(read_answers(predictions), _annotation(questions)[0]))
