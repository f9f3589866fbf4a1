"""ScienceQA: multiple-choice science questions, about half of them with an image.

Published files: `problems.json` with all problems, `pid_splits.json` with the splits, and LLaVA's question JSONL made
from them. Source: spec of LLaVA-1.5, section 7.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    LETTER,
    Benchmark,
    Question,
    folder_of,
    need_gold,
    percent,
    text_of,
)
from llavakit.evaluation.metrics import mean
from llavakit.evaluation.processors import LETTERS, scienceqa_letter
from llavakit.evaluation.records import Record, as_records, pair, read_answers, read_json, read_records, read_text

OPTIONS = tuple(LETTERS[:5])


class ScienceQA(Benchmark):
    """Accuracy over all questions and over those with an image ("IMG", the figure that papers report)."""

    title = "ScienceQA"
    max_new_tokens = 1024
    columns = ("accuracy", "correct", "count", "image_accuracy", "image_correct", "image_count")

    def questions(
        self, path: str | Path, images: str | Path | None = None, *, split: str = "test", **options: Any
    ) -> list[Question]:
        """Questions of `problems.json`, of LLaVA's conversation list, or of a JSONL with `text`; image first."""
        folder = folder_of(path, images)
        questions = []
        for record in _read(path, split):
            if "conversations" in record.data:
                turns = record.get("conversations", list)
                if not turns or not isinstance(turns[0], dict) or not isinstance(turns[0].get("value"), str):
                    raise record.error("conversations.0.value", "is missing; give the question's text")
                name, text = record.data.get("id"), turns[0]["value"]
            elif "choices" in record.data:
                record.get("question", str), record.get("choices", list)
                name, text = record.get("question_id", (str, int)), prompt(record.data)
            else:
                field = "text" if "text" in record.data else "question"
                name, text = record.get("question_id", (str, int)), record.get(field, str)
            text = text.replace("<image>", "").strip()
            if LETTER not in text:
                text = f"{text}\n{LETTER}"
            image = record.get("image", str, None)
            media = ({"type": "image", "image": str(folder / image)},) if image else ()
            stored = {"prompt": ("<image>\n" if image else "") + text}
            questions.append(Question(name, text, media, stored))
        return questions

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        split: str = "test",
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Accuracy by the published letter rule.

        Args:
            gold: `problems.json`, or a JSONL of `question_id`, `answer` (letter or index), and `has_image` or `image`.
            split: Which problems of `problems.json`.
        """
        gold = need_gold(gold, self.title, "problems.json, or JSONL of question_id, answer and has_image")
        hits: list[bool] = []
        image_hits: list[bool] = []
        for question, prediction in pair(_read(gold, split), read_answers(predictions), missing=missing, extra=extra):
            text = text_of(prediction)
            hit = text is not None and scienceqa_letter(text, OPTIONS) == _answer(question)
            hits.append(hit)
            if _has_image(question, prediction):
                image_hits.append(hit)
        return {
            "accuracy": percent(mean(hits)),
            "correct": sum(hits),
            "count": len(hits),
            "image_accuracy": percent(mean(image_hits)),
            "image_correct": sum(image_hits),
            "image_count": len(image_hits),
        }


def _read(path: str | Path, split: str) -> list[Record]:
    """Records of a JSONL or list, or the problems of one split of `problems.json`."""
    try:
        whole = json.loads(read_text(path)) if Path(path).suffix == ".json" else None
    except json.JSONDecodeError:
        whole = None
    if not isinstance(whole, dict) or not all(isinstance(problem, dict) for problem in whole.values()):
        return read_records(path)
    splits = Path(path).with_name("pid_splits.json")
    if splits.is_file():
        known = read_json(splits)
        if split not in known:
            raise UserError(f"{splits}: has no split {split!r}; it has {', '.join(known)}")
        chosen = known[split]
    else:
        chosen = [name for name, problem in whole.items() if problem.get("split", split) == split]
    rows = []
    for name in chosen:
        image = whole[name].get("image")
        # Images lie in a folder per problem.
        rows.append({**whole[name], "question_id": name, "image": f"{name}/{image}" if image else None})
    if not rows:
        raise UserError(f"{path}: has no problem of the split {split!r}")
    return as_records(path, rows)


def _answer(question: Record) -> str:
    answer = question.get("answer", (str, int))
    if isinstance(answer, str):
        if answer not in LETTERS or len(answer) != 1:
            raise question.error("answer", f"must be an option letter or index, is {answer!r}")
        return answer
    if not 0 <= answer < len(OPTIONS):
        raise question.error("answer", f"must be the index of an option (0 to {len(OPTIONS) - 1}), is {answer}")
    return OPTIONS[answer]


def _has_image(question: Record, prediction: Record | None) -> bool:
    for name in ("has_image", "image"):
        if name in question.data:
            return bool(question.data[name])
    return prediction is not None and "<image>" in str(prediction.data.get("prompt", ""))


# Prompts


def prompt(problem: Mapping[str, Any]) -> str:
    """The prompt of LLaVA-1.5's evaluation: context, question, lettered lines."""
    hint = str(problem.get("hint") or "").strip()
    lines = [f"Context: {hint}"] if hint else []
    lines.append(str(problem["question"]).strip())
    lines += [f"{letter}. {choice}" for letter, choice in zip(OPTIONS, problem["choices"], strict=False)]
    return "\n".join(lines)
