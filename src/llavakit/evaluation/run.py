"""A model on a benchmark: questions in batches, answers to a predictions file as they come, then the score.

    evaluate(model, "pope", "coco_pope_random.json", images="val2014", output="pope.jsonl")

The predictions file is the state of the run. Killed at any moment, it is resumed by the same call: a line that was
cut short is dropped, and questions that have an answer of the same model, with the same settings, to the same text and
media are not asked again. A question whose image cannot be read does not stop the others; it is reported at the end
and asked again by the next call.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llavakit.conversation.messages import behind_images
from llavakit.data.boxes import BoxFile
from llavakit.data.records import belongs_to
from llavakit.errors import RecordError, UserError, quoted
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.predictions import Key, PredictionsFile, Run, question_key
from llavakit.evaluation.score import benchmark, checked, score

if TYPE_CHECKING:
    from llavakit.generation.responder import Answer, Responder

    Answered = tuple[Question, Answer | UserError]

T = TypeVar("T")


def evaluate(
    model: Responder | Workers,
    task: str,
    questions: str | Path,
    output: str | Path,
    *,
    images: str | Path | None = None,
    boxes: str | Path | None = None,
    gold: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    shard: str | None = None,
    resume: bool = True,
    scored: bool = True,
    change: Callable[[list[Question]], list[Question]] | None = None,
    model_id: str | None = None,
    question_options: dict[str, Any] | None = None,
    score_options: dict[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask a model every question of a benchmark and score the answers.

    Args:
        model: What `llavakit.load` gives, any other responder, or `Workers` that hold one each.
        task: Name of the benchmark.
        questions: Its question file.
        output: Predictions file; an interrupted one is continued. One that an earlier state of the model in the same
            place has written (retrained, or with other settings) is set aside, and all questions are asked.
        images: Folder that image names are relative to; by default that of the question file.
        boxes: Box file, see `llavakit.data.boxes`; looked up by the questions' ids.
        gold: Gold file; without it, only predictions are made, unless the question file is the gold file too
            (`Benchmark.questions_are_gold`).
        batch_size: Questions per model call.
        max_new_tokens: Longest answer; by default as published for the benchmark.
        limit: Ask only this many questions, the first ones; there is no score then.
        shard: "K/N": ask only the K-th of N blocks, see `block_of`; there is no score then. `score` takes the
            predictions files of all blocks together.
        change: What is asked instead of the questions: some of them, or the same ones about other pictures.
        scored: Whether answers are scored where there is something to score against.
        model_id: Name stored with the predictions, which then belong to this name too; by default the model's `name`.
        question_options, score_options: Options of the benchmark's `questions` and `score`.

    Returns:
        {"task", "predictions": path, "asked", "metrics", "n", "intervals"}, the last two as `score` gives them; metrics
        is None, and they are missing, if there is nothing to score against.

    Raises:
        UserError: If the predictions file belongs to another model. After the others were answered, if a question
            failed; the message has the first failure.
    """
    chosen = benchmark(task)
    whole = chosen.questions(questions, images, **checked(chosen.questions, question_options or {}, task))
    checked(chosen.score, score_options or {}, task)  # before anything is asked
    if not whole:
        raise UserError(f"{questions}: holds no question")
    if boxes is not None:
        whole = _with_boxes(whole, BoxFile(boxes), str(questions))
    _unique(whole, str(questions))
    asked = (whole if shard is None else block_of(whole, *_shard(shard)))[:limit]
    if change is not None:
        asked = change(list(asked))
    if not asked:
        raise UserError(f"shard={shard}: there is no question in it; {questions} holds {len(whole)}")
    length = max_new_tokens or chosen.max_new_tokens
    console = console or Console(stderr=True)
    workers = model if isinstance(model, Workers) else InProcess(model)
    file = PredictionsFile(output, workers.run_of(length, model_id), resume, task)
    if file.aside is not None:
        note = f"the model or its settings changed: {file.aside} keeps the answers of before"
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    try:
        todo = file.open_questions(asked, whole)
        failures = _ask(workers, todo, file, batch_size, length, console)
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
    if scored and gold is not None and limit is None and shard is None:
        options = dict(score_options or {})
        if images is not None and "images" in inspect.signature(chosen.score).parameters:
            options.setdefault("images", str(images))
        result |= score(task, output, gold, **options)
    return result


def block_of(items: Sequence[T], number: int, blocks: int) -> Sequence[T]:
    """The consecutive block with this number (from 1) of items that are cut into blocks of ceil(items / blocks).

    As the authors of LLaVA split work: the last blocks may be shorter, or empty.
    """
    size = -(-len(items) // blocks)
    return items[(number - 1) * size : number * size]


def _shard(shard: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    number, blocks = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= blocks:
        raise UserError(f"shard={quoted(shard)}: must be K/N with K from 1 to N, as in 2/8")
    return number, blocks


def _with_boxes(questions: Sequence[Question], boxes: BoxFile, file: str) -> list[Question]:
    """Questions whose picture has the boxes of their id; those without pictures stay as they are.

    Raises:
        RecordError: If an id has no entry, or a question has several pictures or boxes of its own.
    """
    found = []
    for number, question in enumerate(questions, 1):
        kinds = [part["type"] for part in question.media]
        if "image" not in kinds:
            found.append(question)
            continue
        if kinds.count("image") > 1 or "boxes" in kinds:
            own = "boxes of its own" if "boxes" in kinds else f"{kinds.count('image')} pictures"
            raise RecordError(file, number, "boxes", f"the question has {own}, {boxes.file} has boxes of one picture")
        with belongs_to(file, number, "question_id"):
            part = boxes.part(question.question_id)
        found.append(replace(question, media=tuple(behind_images(question.media, [part]))))
    return found


def run_of(model: Responder, max_new_tokens: int, model_id: str | None = None) -> Run:
    """The run of a model: what decides its answers, by content."""
    from llavakit.generation.identity import digest_of, identity_of

    identity = identity_of(model) | {"max_new_tokens": max_new_tokens}
    if model_id is not None:
        identity["model_id"] = model_id
    place = os.path.realpath(model.name) if os.path.exists(model.name) else None
    return Run(model_id or model.name, digest_of(identity), identity, place)


class Workers(ABC):
    """Who answers questions, in one process or many."""

    @abstractmethod
    def run_of(self, max_new_tokens: int, model_id: str | None) -> Run:
        """See `run_of`."""

    @abstractmethod
    def answer(self, batches: Iterable[Sequence[Question]], max_new_tokens: int) -> Iterator[Sequence[Answered]]:
        """The answers to batches of questions, batch after batch in their order."""


class InProcess(Workers):
    """One model, in this process."""

    def __init__(self, model: Responder) -> None:
        self.model = model

    def run_of(self, max_new_tokens: int, model_id: str | None) -> Run:
        return run_of(self.model, max_new_tokens, model_id)

    def answer(self, batches: Iterable[Sequence[Question]], max_new_tokens: int) -> Iterator[Sequence[Answered]]:
        return (self.answer_batch(batch, max_new_tokens) for batch in batches)

    def answer_batch(self, batch: Sequence[Question], max_new_tokens: int) -> list[Answered]:
        """Each question with its answer, or with the reason why there is none."""
        ranked = [_ranked(self.model, question) for question in batch if question.replies]
        written = [question for question in batch if not question.replies]
        found = _answers(self.model, written, max_new_tokens) if written else []
        return [*zip(written, found, strict=True), *ranked]


class OnRay(Workers):
    """A model in each of several workers of Ray, see `llavakit.generation.actors`.

    Args:
        model: Folder, hub id or address.
        workers: How many.
        options: Of `llavakit.load`.

    Raises:
        UserError: If Ray is missing, or the model cannot be loaded.
    """

    def __init__(self, model: str | Path, workers: int, **options: Any) -> None:
        from llavakit.generation.actors import Actors

        self._actors = Actors(functools.partial(_loaded, model, options), workers)

    def run_of(self, max_new_tokens: int, model_id: str | None) -> Run:
        return self._actors.first("run_of", max_new_tokens, model_id)

    def answer(self, batches: Iterable[Sequence[Question]], max_new_tokens: int) -> Iterator[Sequence[Answered]]:
        return self._actors.map("answer_batch", ((batch, max_new_tokens) for batch in batches))

    def close(self) -> None:
        """End the workers."""
        self._actors.close()


def _loaded(model: str | Path, options: Mapping[str, Any]) -> InProcess:
    from llavakit.generation.load import load

    return InProcess(load(model, **options))


def _ask(
    workers: Workers,
    questions: Sequence[Question],
    file: PredictionsFile,
    batch_size: int,
    max_new_tokens: int,
    console: Console,
) -> list[tuple[Question, UserError]]:
    """Ask in batches; a question that cannot be answered stops no other."""
    failures: list[tuple[Question, UserError]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("answering", total=len(questions))
        batches = (questions[start : start + batch_size] for start in range(0, len(questions), batch_size))
        for pairs in workers.answer(batches, max_new_tokens):
            failures += [(question, answer) for question, answer in pairs if isinstance(answer, UserError)]
            file.append([(question, answer) for question, answer in pairs if not isinstance(answer, UserError)])
            progress.advance(bar, len(pairs))
    return failures


def _ranked(model: Responder, question: Question) -> tuple[Question, Answer | UserError]:
    """The likeliest of a question's replies; the likelihoods of all are stored with it."""
    from llavakit.generation.response import Answer
    from llavakit.generation.scoring import best

    try:
        scores = model.score(question.messages(), question.replies)
    except UserError as error:
        return question, error
    rows = [{"sum": score.sum, "tokens": len(score.logprobs), "characters": score.characters} for score in scores]
    stored = replace(question, stored={**question.stored, "likelihoods": rows})
    return stored, Answer(content=question.replies[best(scores)])


def _answers(model: Responder, questions: Sequence[Question], max_new_tokens: int) -> list[Answer | UserError]:
    """The last answer to every question; questions of several turns are asked turn by turn, all of them together."""
    turns = [question.turns() for question in questions]
    conversations: list[list[dict[str, Any]]] = [[] for _ in questions]
    answers: dict[int, Answer | UserError] = {}
    for number in range(max(map(len, turns))):
        open_ = [n for n, own in enumerate(turns) if number < len(own) and not isinstance(answers.get(n), UserError)]
        for n in open_:
            said = [answers[n].message() | _ids(answers[n])] if number else []
            conversations[n] = [*conversations[n], *said, turns[n][number]]
        found = model.answer_all([conversations[n] for n in open_], max_new_tokens=max_new_tokens)
        answers |= dict(zip(open_, found, strict=True))
    return [answers[n] for n in range(len(questions))]


def _ids(answer: Answer) -> dict[str, Any]:
    """The ids of an answer that the next turn reads as it was generated, where the message holds the whole text."""
    return {"token_ids": answer.token_ids} if answer.token_ids and answer.content == answer.text else {}


def _unique(questions: Sequence[Question], file: str) -> None:
    seen: set[Key] = set()
    for number, question in enumerate(questions, 1):
        key = question_key(question.question_id, question.stored)
        if key in seen:
            raise RecordError(file, number, "question_id", f"{question.question_id!r} is used twice")
        seen.add(key)
