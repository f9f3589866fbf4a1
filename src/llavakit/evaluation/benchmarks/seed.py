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
    Pair,
    PairedBenchmark,
    Question,
    image_of,
    need_gold,
    percent,
    text_of,
    write_lines,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import grouped_mean, mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, as_records, read_answers, read_json


def _annotation(path: str | Path) -> tuple[list[Record], dict[Any, str]]:
    """The question records and the names of question types by id."""
    whole = read_json(path)
    if not isinstance(whole, dict) or not isinstance(whole.get("questions"), list):
        raise UserError(f"{path}: field questions is missing; give SEED-Bench.json")
    types = whole.get("question_type", {})
    if not isinstance(types, dict) or not all(isinstance(number, int) for number in types.values()):
        raise UserError(f"{path}: field question_type must be an object of names and numbers")
    names = {number: name for name, number in types.items()}
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


class SEEDBench(PairedBenchmark):
    """Accuracy in total, of image questions, of video questions, and by question type.

    Images are in `SEED-Bench-image`, the middle frames of videos in `SEED-Bench-video-image`.
    """

    title = "SEED-Bench"
    gold_file = "SEED-Bench.json"
    suffix = LETTER
    picture_fields = ("data_id",)

    def read_gold(self, path: str | Path) -> list[Record]:
        """The questions of `SEED-Bench.json`."""
        return _annotation(path)[0]

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A question of `SEED-Bench.json`."""
        lines = [record.get("question", str)]
        lines += [f"{letter.upper()}. {record.get(f'choice_{letter}', (str, int, float))}" for letter in "abcd"]
        text = "\n".join([*lines, LETTER])
        if record.get("data_type", str) == "image":
            image = folder / "SEED-Bench-image" / record.get("data_id", str)
        else:
            image = folder / "SEED-Bench-video-image" / f"{record.id}.png"
        return Question(record.get("question_id", (str, int)), text, (image_of(image),), {"prompt": text})

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Exact match of the letter."""
        _, names = _annotation(need_gold(gold, self.title, self.gold_file))
        pairs: list[Pair] = self.pairs(predictions, gold, missing, extra)
        by_type, by_data, total = accuracies([(question, text_of(answer)) for question, answer in pairs], names)
        metrics = {
            "accuracy": percent(total),
            **{name: percent(value) for name, value in by_data.items()},
            "count": len(pairs),
            "by_type": {name: percent(value) for name, value in by_type.items()},
        }
        right = [text_of(answer) == question.data["answer"] for question, answer in pairs]
        measures = {"accuracy": Measure.mean(right)}
        for kind in by_data:
            own = [
                hit if question.data["data_type"] == kind else None
                for (question, _), hit in zip(pairs, right, strict=True)
            ]
            measures[kind] = Measure.mean(own)
        types = [
            names.get(question.data["question_type_id"], question.data["question_type_id"]) for question, _ in pairs
        ]
        return Metrics(metrics, self.cases(pairs, measures, {"by_type": types}))

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """The leaderboard's JSONL."""
        if questions is None:
            raise UserError(f"{self.title}: give SEED-Bench.json as the question file")
        return write_lines(output, seed_submission(read_answers(predictions), _annotation(questions)[0]))
