"""VQAv2 and VizWiz: open questions with ten annotated answers, scored by the official VQA rule.

Published figures of LLaVA-1.5 are test-dev results of the evaluation server; `submission` writes the file for it.
`score` computes the same rule locally on a split whose annotations are public (val).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import (
    SHORT_ANSWER,
    UNANSWERABLE,
    PairedBenchmark,
    Question,
    image_of,
    write_json,
)
from llavakit.evaluation.metrics.answers import vqa_accuracy
from llavakit.evaluation.processors import vqa_answer, vqa_official_answer
from llavakit.evaluation.records import Record, as_records, choose, index, read_json, read_records


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


class _Annotated(PairedBenchmark):
    """Soft accuracy of processed answers over (usually ten) annotators."""

    tables = {"by_answer_type": "answer_type"}

    def read_gold(self, path: str | Path) -> list[Record]:
        """The official annotations, or a JSONL with `answers`."""
        return annotations(path, "annotations")

    def value(self, question: Record, text: str) -> float:
        """How many annotators agree with the answer."""
        return official_accuracy(vqa_answer(text), annotated(question))


class VQAv2(_Annotated):
    """Soft accuracy over ten annotators, also by answer type."""

    title = "VQAv2"
    gold_file = "the annotations JSON, or JSONL of question_id and answers"
    suffix = SHORT_ANSWER

    def read_questions(self, path: str | Path) -> list[Record]:
        """The official questions JSON; every record knows the images that the file belongs to."""
        whole = read_json(path)
        if not isinstance(whole, dict) or not isinstance(whole.get("questions"), list):
            raise UserError(f"{path}: must be LLaVA's JSONL, or the official JSON with a list `questions`")
        # The test-dev file belongs to the test2015 images.
        subset = str(whole.get("data_subtype", "")).replace("test-dev", "test")
        return [replace(r, data=r.data | {"subset": subset}) for r in as_records(path, whole["questions"])]

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A question of the official JSON."""
        text = f"{record.get('question', str)}\n{SHORT_ANSWER}"
        image = image_of(folder / f"COCO_{record.data['subset']}_{record.get('image_id', int):012d}.jpg")
        return Question(record.get("question_id", int), text, (image,), {"prompt": text})

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


class VizWiz(_Annotated):
    """Soft accuracy over ten annotators; many questions are unanswerable. In the official list the image is the id."""

    title = "VizWiz"
    gold_file = "val.json, or JSONL of question_id and answers"
    suffix = f"{UNANSWERABLE}\n{SHORT_ANSWER}"

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A question of the official JSON list."""
        text = f"{record.get('question', str)}\n{self.suffix}"
        name = record.get("image", str)
        return Question(name, text, (image_of(folder / name),), {"prompt": text})

    def gold_key(self, question: Record) -> str:
        """The id, or the image's name in the official list."""
        return question.id if "question_id" in question.data else question.get("image", str)

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
