"""TextVQA: questions about text in images, soft accuracy over ten annotators.

The published figures of LLaVA-1.5 use prompts WITH recognised text as a hint (`Reference OCR token: ...`); without it
they are lower and must be labelled so. Source: spec of LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    SHORT_ANSWER,
    Pair,
    PairedBenchmark,
    Question,
    image_of,
    is_lines,
    need_gold,
)
from llavakit.evaluation.benchmarks.vqa import annotated, annotations
from llavakit.evaluation.metrics.answers import vqa_accuracy
from llavakit.evaluation.processors import stored_question
from llavakit.evaluation.records import Record, pair, read_answers


def prompt(question: str, tokens: Sequence[str] = ()) -> str:
    """The three-line prompt with recognised words, or the two-line prompt without."""
    hint = [f"Reference OCR token: {', '.join(tokens)}"] if tokens else []
    return "\n".join([question, *hint, SHORT_ANSWER])


class TextVQA(PairedBenchmark):
    """Soft accuracy by the answer processor of the EvalAI server."""

    title = "TextVQA"
    gold_file = "TextVQA_0.5.1_val.json, or JSONL of question_id and answers"
    suffix = SHORT_ANSWER

    def questions(
        self, path: str | Path, images: str | Path | None = None, *, ocr: bool = True, **options: Any
    ) -> list[Question]:
        """Questions of LLaVA's JSONL, or of the official JSON (`data` with `image_id` and `question`).

        Args:
            ocr: Put a record's `ocr_tokens` into the prompt, where it has any.

        Raises:
            UserError: If `ocr` is false and the questions hold their hints already.
        """
        if not ocr and is_lines(path):
            raise UserError(f"ocr=false: the texts in {path} hold their hints already; give the official JSON")
        return super().questions(path, images, ocr=ocr)

    def read_gold(self, path: str | Path) -> list[Record]:
        """The records of the official JSON (`data`), or a JSONL with `answers`."""
        return annotations(path, "data")

    def question(self, record: Record, folder: Path, *, ocr: bool = True) -> Question:
        """A question of the official JSON."""
        tokens = record.get("ocr_tokens", list, []) if ocr else []
        if not all(isinstance(token, str) for token in tokens):
            raise record.error("ocr_tokens", "must be a list of strings")
        text = prompt(record.get("question", str), tokens)
        name = record.get("image_id", str)
        return Question(name, text, (image_of(folder / f"{name}.jpg"),), {"prompt": text})

    def pairs(self, predictions: str | Path, gold: str | Path | None, missing: str, extra: str) -> list[Pair]:
        """Pairs by image id and the question in the stored prompt, as published; without prompts by `question_id`."""
        questions = self.read_gold(need_gold(gold, self.title, self.gold_file))
        answers = read_answers(predictions)
        by_prompt = all("prompt" in r.data for r in answers) and all("image_id" in r.data for r in questions)
        keys = {"key": _prompt_key, "gold_key": _annotation_key} if by_prompt else {}
        return list(pair(questions, answers, **keys, missing=missing, extra=extra))

    def value(self, question: Record, text: str) -> float:
        """How many annotators agree with the answer."""
        return vqa_accuracy(text, annotated(question))


def _prompt_key(prediction: Record) -> tuple[str, str]:
    question = stored_question(prediction.get("prompt", str))
    if question is None:
        raise prediction.error("prompt", "has no question in a known place; two or three lines are expected")
    return prediction.id, question


def _annotation_key(annotation: Record) -> tuple[str, str]:
    return str(annotation.get("image_id", (str, int))), annotation.get("question", str).lower()
