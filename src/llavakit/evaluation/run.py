"""A model on a benchmark: questions in batches, answers to a predictions file as they come, then the score.

    evaluate(model, "pope", "coco_pope_random.json", images="val2014", output="pope.jsonl")

The predictions file is the state of the run. Killed at any moment, it is resumed by the same call: a line that was
cut short is dropped and questions that have an answer are not asked again. A question whose image cannot be read
does not stop the others; it is reported at the end and asked again by the next call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.records import Record, read_records
from llavakit.evaluation.score import benchmark, checked, score

if TYPE_CHECKING:
    from llavakit.generation.responder import Answer, Responder


def _key(question_id: Any, stored: Any) -> tuple[str, str]:
    """What makes a question done: its id, and where ids repeat (rounds, two questions per image) its prompt."""
    return str(question_id), str(stored.get("prompt", "")) + str(stored.get("round_id", ""))


class PredictionsFile:
    """The predictions of one run, appended line by line.

    Args:
        path: JSONL file, created with its folder.
        model_id: Name of the model, stored with every line; a file of another model is refused.
        resume: Whether to go on with a file that has predictions.

    Raises:
        UserError: If the file belongs to another model, or exists and `resume` is false.
        RecordError: If a line other than the last is broken.
    """

    def __init__(self, path: str | Path, model_id: str, resume: bool = True) -> None:
        self.path, self.model_id = Path(path), model_id
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done: set[tuple[str, str]] = set()
        if self.path.exists() and self.path.stat().st_size:
            if not resume:
                raise UserError(f"{self.path}: exists; choose another output, or resume it")
            self._repair()
            for record in read_records(self.path):
                self._accept(record)
        self._file = self.path.open("a", encoding="utf-8")

    def _accept(self, record: Record) -> None:
        other = record.data.get("model_id", self.model_id)
        if other != self.model_id:
            raise record.error("model_id", f"is {other!r}, this run is of {self.model_id!r}; choose another output")
        self.done.add(_key(record.id, record.data))

    def _repair(self) -> None:
        """Cut off a last line that a kill left incomplete."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        try:
            complete = isinstance(json.loads(data[end:]), dict)
        except ValueError:
            complete = False
        if complete:
            with self.path.open("ab") as file:
                file.write(b"\n")
        else:
            os.truncate(self.path, end)

    def append(self, answers: Sequence[tuple[Question, Answer]]) -> None:
        """Add answers; they are on disk when this returns. The text is what is scored, reasoning is kept beside it."""
        for question, answer in answers:
            row = {
                "question_id": question.question_id,
                **question.stored,
                "text": answer.content.strip(),
                "model_id": self.model_id,
            }
            if answer.reasoning:
                row["reasoning"] = answer.reasoning
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.done.add(_key(question.question_id, question.stored))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def evaluate(
    model: Responder,
    task: str,
    questions: str | Path,
    output: str | Path,
    *,
    images: str | Path | None = None,
    gold: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    resume: bool = True,
    model_id: str | None = None,
    question_options: dict[str, Any] | None = None,
    score_options: dict[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask a model every question of a benchmark and score the answers.

    Args:
        model: What `llavakit.load` gives, or any other responder.
        task: Name of the benchmark.
        questions: Its question file.
        output: Predictions file; an interrupted one is continued.
        images: Folder that image names are relative to; by default that of the question file.
        gold: Gold file; without it, only predictions are made, unless the question file is the gold file too
            (`Benchmark.questions_are_gold`).
        batch_size: Questions per model call.
        max_new_tokens: Longest answer; by default as published for the benchmark.
        limit: Ask only the first so many questions; there is no score then.
        model_id: Name stored with the predictions; by default the model's `name`.
        question_options, score_options: Options of the benchmark's `questions` and `score`.

    Returns:
        {"task", "predictions": path, "asked", "metrics"}; metrics is None if there is nothing to score against.

    Raises:
        UserError: After the others were answered, if a question failed; the message has the first failure.
    """
    chosen = benchmark(task)
    asked = chosen.questions(questions, images, **checked(chosen.questions, question_options or {}, task))
    if not asked:
        raise UserError(f"{questions}: holds no question")
    _unique(asked, str(questions))
    asked = asked[:limit]
    file = PredictionsFile(output, model_id or model.name, resume)
    length = max_new_tokens or chosen.max_new_tokens
    try:
        todo = [question for question in asked if _key(question.question_id, question.stored) not in file.done]
        failures = _ask(model, todo, file, batch_size, length, console)
    finally:
        file.close()
    if failures:
        question, error = failures[0]
        raise UserError(
            f"{questions}: question {question.question_id!r} failed: {error} ({len(failures)} of {len(asked)} failed; "
            f"the others are in {output}, the same call asks only what is missing)"
        )
    result: dict[str, Any] = {"task": task, "predictions": str(output), "asked": len(todo), "metrics": None}
    if gold is None and chosen.questions_are_gold:
        gold = questions
    if gold is not None and limit is None:
        result["metrics"] = score(task, output, gold, **(score_options or {}))["metrics"]
    return result


def _ask(
    model: Responder,
    questions: Sequence[Question],
    file: PredictionsFile,
    batch_size: int,
    max_new_tokens: int,
    console: Console | None,
) -> list[tuple[Question, UserError]]:
    """Ask in batches; a question that cannot be answered stops no other."""
    failures: list[tuple[Question, UserError]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("answering", total=len(questions))
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            found = model.answer_all([question.messages() for question in batch], max_new_tokens=max_new_tokens)
            pairs = list(zip(batch, found, strict=True))
            failures += [(question, answer) for question, answer in pairs if isinstance(answer, UserError)]
            file.append([(question, answer) for question, answer in pairs if not isinstance(answer, UserError)])
            progress.advance(bar, len(batch))
    return failures


def _unique(questions: Sequence[Question], file: str) -> None:
    seen: set[tuple[str, str]] = set()
    for number, question in enumerate(questions, 1):
        key = _key(question.question_id, question.stored)
        if key in seen:
            raise RecordError(file, number, "question_id", f"{question.question_id!r} is used twice")
        seen.add(key)
