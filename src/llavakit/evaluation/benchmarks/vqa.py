"""VQAv2 and VizWiz: open questions with ten annotated answers, scored by the official VQA rule.

Published figures of LLaVA-1.5 are test-dev results of the evaluation server; `submission` writes the file for it.
`score` computes the same rule locally on a split whose annotations are public (val).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import (
    SHORT_ANSWER,
    UNANSWERABLE,
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
from llavakit.evaluation.metrics import grouped_mean, mean, vqa_accuracy
from llavakit.evaluation.processors import vqa_answer, vqa_official_answer
from llavakit.evaluation.records import Record, as_records, choose, index, pair, read_answers, read_json, read_records


def official_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official VQA accuracy of a submitted answer.

    Answers are normalised only where the annotators disagree; where all say the same, texts are compared as they are.
    """
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    process = vqa_official_answer if len(set(answers)) > 1 else str.strip
    return vqa_accuracy(prediction, answers, process)


def annotated(record: Record) -> list[str]:
    """The annotated answers of a record: a list of texts, or of objects with `answer`."""
    answers = record.get("answers", list)
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise record.error("answers", "must be a non-empty list of texts, or of objects with a text `answer`")
    return texts


def read_predictions(path: str | Path, broken: str) -> tuple[list[Record], int]:
    """The records of a predictions file and how many broken lines were skipped (`broken` is "error" or "skip")."""
    skipped: list[RecordError] = []
    choose(broken, "broken", ("error", "skip"))
    records = read_records(path, skipped.append if broken == "skip" else None)
    return records, len(skipped)


def vqav2_submission(answers: Iterable[Record], split: Iterable[Record]) -> list[dict[str, Any]]:
    """One entry per question of the test split; a question without an answer gets an empty one."""
    texts = {record.id: vqa_answer(record.get("text", str)) for record in answers}
    return [
        {"question_id": question.get("question_id", (str, int)), "answer": texts.get(question.id, "")}
        for question in split
    ]


def vizwiz_submission(answers: Iterable[Record], split: Iterable[Record]) -> list[dict[str, Any]]:
    """One entry per question of the test split, keyed by its image.

    Raises:
        RecordError: If a question has no answer.
    """
    found = index(answers, lambda record: record.id)
    entries = []
    for question in split:
        name = question.id if "question_id" in question.data else question.get("image", str)
        if name not in found:
            raise question.error("question_id", f"{name!r} has no prediction; VizWiz takes complete files only")
        entries.append({"image": question.get("image", str), "answer": vqa_answer(found[name].get("text", str))})
    return entries


class VQAv2(Benchmark):
    """Soft accuracy over ten annotators, also by answer type."""

    title = "VQAv2"
    columns = ("accuracy", "count")

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of LLaVA's JSONL, or of the official questions JSON."""
        if is_lines(path):
            return stored_questions(path, images, SHORT_ANSWER)
        whole, folder = read_json(path), folder_of(path, images)
        # The test-dev file belongs to the test2015 images.
        subset = str(whole.get("data_subtype", "")).replace("test-dev", "test")
        found = []
        for record in as_records(path, whole["questions"]):
            text = f"{record.get('question', str)}\n{SHORT_ANSWER}"
            image = folder / f"COCO_{subset}_{record.get('image_id', int):012d}.jpg"
            name = record.get("question_id", int)
            found.append(Question(name, text, ({"type": "image", "image": str(image)},), {"prompt": text}))
        return found

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Soft accuracy of the processed answers.

        Args:
            gold: The official annotations JSON, or a JSONL of `question_id` and `answers`.
        """
        gold = need_gold(gold, self.title, "the annotations JSON, or JSONL of question_id and answers")
        scores, types = [], []
        for question, prediction in pair(
            annotations(gold, "annotations"), read_answers(predictions), missing=missing, extra=extra
        ):
            text = text_of(prediction)
            scores.append(0.0 if text is None else official_accuracy(vqa_answer(text), annotated(question)))
            types.append(question.data.get("answer_type"))
        metrics: dict[str, Any] = {"accuracy": percent(mean(scores)), "count": len(scores)}
        if any(types):
            by_type = grouped_mean(zip(types, scores, strict=True))
            metrics["by_answer_type"] = {name: percent(value) for name, value in by_type.items()}
        return metrics

    def submission(
        self,
        predictions: str | Path,
        output: str | Path,
        questions: str | Path | None = None,
        *,
        broken: str = "error",
    ) -> Path:
        """The EvalAI upload: JSON list of `question_id` and `answer` for the whole test split."""
        if questions is None:
            raise UserError(f"{self.title}: give the test split's question file; the upload must hold all of it")
        answers, _ = read_predictions(predictions, broken)
        return write_json(output, vqav2_submission(answers, annotations(questions, "questions")))


class VizWiz(Benchmark):
    """Soft accuracy over ten annotators; many questions are unanswerable."""

    title = "VizWiz"
    columns = ("accuracy", "count")

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of LLaVA's JSONL, or of the official JSON list (there the image is the id)."""
        if is_lines(path):
            return stored_questions(path, images, f"{UNANSWERABLE}\n{SHORT_ANSWER}")
        folder, found = folder_of(path, images), []
        for record in read_records(path):
            text = f"{record.get('question', str)}\n{UNANSWERABLE}\n{SHORT_ANSWER}"
            name = record.get("image", str)
            found.append(Question(name, text, ({"type": "image", "image": str(folder / name)},), {"prompt": text}))
        return found

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Soft accuracy of the processed answers.

        Args:
            gold: The official JSON list with `image` and `answers`, or a JSONL with `question_id` and `answers`.
        """
        gold = need_gold(gold, self.title, "val.json, or JSONL of question_id and answers")
        pairs = pair(
            annotations(gold, "annotations"),
            read_answers(predictions),
            gold_key=lambda record: record.id if "question_id" in record.data else record.get("image", str),
            missing=missing,
            extra=extra,
        )
        scores = [
            0.0 if prediction is None else official_accuracy(vqa_answer(text_of(prediction) or ""), annotated(question))
            for question, prediction in pairs
        ]
        return {"accuracy": percent(mean(scores)), "count": len(scores)}

    def submission(
        self,
        predictions: str | Path,
        output: str | Path,
        questions: str | Path | None = None,
        *,
        broken: str = "error",
    ) -> Path:
        """The EvalAI upload: JSON list of `image` and `answer`."""
        if questions is None:
            raise UserError(f"{self.title}: give the test split's question file; answers are keyed by its images")
        answers, _ = read_predictions(predictions, broken)
        return write_json(output, vizwiz_submission(answers, read_records(questions)))


def annotations(path: str | Path, name: str) -> list[Record]:
    """The records in the list `name` of an official JSON file, or those of a JSONL or JSON list."""
    if Path(path).suffix == ".json":
        try:
            whole = read_json(path)
        except RecordError:
            return read_records(path)
        if isinstance(whole, dict):
            if not isinstance(whole.get(name), list):
                raise UserError(f"{path}: field {name} is missing; give the official file or a JSONL")
            return as_records(path, whole[name])
    return read_records(path)
