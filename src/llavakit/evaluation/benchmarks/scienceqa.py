"""ScienceQA: multiple-choice science questions, about half of them with an image.

Published files: `problems.json` with all problems, `pid_splits.json` with the splits, and LLaVA's question JSONL made
from them. Source: spec of LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    LETTER,
    PairedBenchmark,
    Question,
    folder_of,
    image_of,
    need_gold,
    percent,
    text_of,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean, scienceqa_index
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.processors import LETTERS
from llavakit.evaluation.records import Record, as_records, pair, read_answers, read_json, read_records, read_text

OPTIONS = tuple(LETTERS[:5])


class ScienceQA(PairedBenchmark):
    """Accuracy over all questions and over those with an image ("IMG", the figure that papers report)."""

    title = "ScienceQA"
    max_new_tokens = 1024
    gold_file = "problems.json, or JSONL of question_id, answer and has_image"
    picture_fields = ()  # every problem has a picture of its own, and many call it image.png

    def questions(
        self, path: str | Path, images: str | Path | None = None, *, split: str | None = None, **options: Any
    ) -> list[Question]:
        """Questions of `problems.json`, of LLaVA's conversation list, or of a JSONL with `text`; image first.

        Args:
            split: Which problems of `problems.json`; default "test".
        """
        folder = folder_of(path, images)
        return [self.question(record, folder) for record in _read(path, split)]

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A problem, a conversation, or a question with its text."""
        if "conversations" in record.data:
            turns = record.get("conversations", list)
            if not turns or not isinstance(turns[0], dict) or not isinstance(turns[0].get("value"), str):
                raise record.error("conversations.0.value", "is missing; give the question's text")
            name, text = record.get("id", (str, int)), turns[0]["value"]
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
        media = (image_of(folder / image),) if image else ()
        return Question(name, text, media, {"prompt": ("<image>\n" if image else "") + text})

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        split: str | None = None,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Accuracy by the published letter rule; a letter beyond the question's own options is wrong.

        Args:
            gold: `problems.json`, or a JSONL of `question_id`, `answer` (letter or index), and `has_image` or `image`.
            split: Which problems of `problems.json`; default "test".
        """
        questions = _read(need_gold(gold, self.title, self.gold_file), split)
        hits: list[bool] = []
        pictured: list[bool | None] = []
        pairs = list(pair(questions, read_answers(predictions), missing=missing, extra=extra))
        for question, prediction in pairs:
            text, right = text_of(prediction), _answer(question)
            choices = len(question.get("choices", list, OPTIONS))
            hits.append(text is not None and scienceqa_index(text, choices, OPTIONS) == right)
            pictured.append(hits[-1] if _has_image(question, prediction) else None)
        image_hits = [hit for hit in pictured if hit is not None]
        metrics = {
            "accuracy": percent(mean(hits)),
            "correct": sum(hits),
            "count": len(hits),
            "image_accuracy": percent(mean(image_hits)),
            "image_correct": sum(image_hits),
            "image_count": len(image_hits),
        }
        measures = {"accuracy": Measure.mean(hits), "image_accuracy": Measure.mean(pictured)}
        return Metrics(metrics, self.cases(pairs, measures))


def _read(path: str | Path, split: str | None) -> list[Record]:
    """Records of a JSONL or list, or the problems of one split of `problems.json`.

    Raises:
        UserError: If a split is named and the file has none.
    """
    try:
        whole = parse_json(read_text(path)) if Path(path).suffix == ".json" else None
    except JsonError:
        whole = None
    if not isinstance(whole, dict) or not all(isinstance(problem, dict) for problem in whole.values()):
        if split is not None:
            raise UserError(f"{path}: is not problems.json, so it has no split {split!r}")
        return read_records(path)
    split = "test" if split is None else split
    splits = Path(path).with_name("pid_splits.json")
    if splits.is_file():
        known = read_json(splits)
        if not isinstance(known, dict) or not isinstance(known.get(split), list):
            names = ", ".join(known) if isinstance(known, dict) else "none"
            raise UserError(f"{splits}: has no split {split!r}; it has {names}")
        chosen = list(map(str, known[split]))
        unknown = next((name for name in chosen if name not in whole), None)
        if unknown is not None:
            raise UserError(f"{splits}: problem {unknown!r} of the split {split!r} is not in {path}")
    else:
        chosen = [name for name, problem in whole.items() if problem.get("split", split) == split]
    rows = []
    for name in chosen:
        image = whole[name].get("image")
        # every problem has a folder of its own for its image
        rows.append({**whole[name], "question_id": name, "image": f"{name}/{image}" if image else None})
    if not rows:
        raise UserError(f"{path}: has no problem of the split {split!r}")
    return as_records(path, rows)


def _answer(question: Record) -> int:
    """The index of the right option."""
    answer = question.get("answer", (str, int))
    if isinstance(answer, str):
        if answer not in OPTIONS:
            raise question.error("answer", f"must be an option letter ({', '.join(OPTIONS)}) or index, is {answer!r}")
        return OPTIONS.index(answer)
    if not 0 <= answer < len(OPTIONS):
        raise question.error("answer", f"must be the index of an option (0 to {len(OPTIONS) - 1}), is {answer}")
    return answer


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
