"""TextVQA: questions about text in images, soft accuracy over ten annotators.

The published figures of LLaVA-1.5 use prompts WITH recognised text as a hint (`Reference OCR token: ...`); without it
they are lower and must be labelled so. Source: spec of LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
)
from llavakit.evaluation.benchmarks.vqa import annotated, annotations
from llavakit.evaluation.metrics import mean, vqa_accuracy
from llavakit.evaluation.processors import stored_question
from llavakit.evaluation.records import Record, pair, read_answers


def prompt(question: str, tokens: Sequence[str] = ()) -> str:
    """The three-line prompt with recognised words, or the two-line prompt without."""
    hint = [f"Reference OCR token: {', '.join(tokens)}"] if tokens else []
    return "\n".join([question, *hint, SHORT_ANSWER])


class TextVQA(Benchmark):
    """Soft accuracy by the answer processor of the EvalAI server."""

    title = "TextVQA"
    columns = ("accuracy", "count")

    def questions(
        self, path: str | Path, images: str | Path | None = None, *, ocr: bool = True, **options: Any
    ) -> list[Question]:
        """Questions of LLaVA's JSONL, or of the official JSON (`data` with `image_id` and `question`).

        Args:
            ocr: Put a record's `ocr_tokens` into the prompt, where it has any.
        """
        if is_lines(path):
            return stored_questions(path, images, SHORT_ANSWER)
        folder, found = folder_of(path, images), []
        for record in annotations(path, "data"):
            tokens = record.get("ocr_tokens", list, []) if ocr else []
            text = prompt(record.get("question", str), tokens)
            name = record.get("image_id", str)
            image = {"type": "image", "image": str(folder / f"{name}.jpg")}
            found.append(Question(name, text, (image,), {"prompt": text}))
        return found

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Soft accuracy.

        A prediction with a `prompt` is looked up by its image id and the question in the prompt, as published;
        one without by `question_id`.

        Args:
            gold: The official JSON (`data`), or a JSONL with `answers`.
        """
        gold = need_gold(gold, self.title, "TextVQA_0.5.1_val.json, or JSONL of question_id and answers")
        answers = read_answers(predictions)
        questions = annotations(gold, "data")
        by_prompt = all("prompt" in record.data for record in answers) and all(
            "image_id" in record.data for record in questions
        )
        pairs = pair(
            questions,
            answers,
            key=_prompt_key if by_prompt else lambda record: record.id,
            gold_key=_annotation_key if by_prompt else None,
            missing=missing,
            extra=extra,
        )
        scores = [
            0.0 if prediction is None else vqa_accuracy(text_of(prediction) or "", annotated(question))
            for question, prediction in pairs
        ]
        return {"accuracy": percent(mean(scores)), "count": len(scores)}


def _prompt_key(prediction: Record) -> tuple[str, str]:
    question = stored_question(prediction.get("prompt", str))
    if question is None:
        raise prediction.error("prompt", "has no question in a known place; two or three lines are expected")
    return prediction.id, question


def _annotation_key(annotation: Record) -> tuple[str, str]:
    return str(annotation.get("image_id", (str, int))), annotation.get("question", str).lower()
