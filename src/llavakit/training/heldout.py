"""Questions that were held out: answered by the model so far while it trains, and at the end, on a page.

    heldout:
      questions: heldout.jsonl    # of a benchmark whose question file holds the answers
      images: pictures            # default: the folder of the questions
      task: exact_match
      every: 60                   # steps between two answers; default: a fifth of the stage
      limit: 200                  # most questions that are asked at the end

Greedy answers draw no random numbers, and the model is in the same state after them, so training with and without them
ends in the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llavakit.errors import RecipeError, UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.records import read_records
from llavakit.evaluation.score import benchmark
from llavakit.training.fingerprint import spread
from llavakit.training.recipe import HeldOut

if TYPE_CHECKING:
    from llavakit.model.processing import LlavakitProcessor

LONGEST = 64  # tokens of an answer that is shown while training
SHOWN = 160  # characters of it


@dataclass(frozen=True)
class Questions:
    """Held-out questions with their answers, at most as many as the recipe wants, evenly spread over the file.

    Attributes:
        rows: As they are in the file.
        asked: As they are put to a model.
        images: Folder of their media.
    """

    rows: list[dict[str, Any]]
    asked: list[Question]
    images: Path

    def truth(self, number: int) -> str:
        """The answer of a question."""
        answer = self.rows[number].get("answer", self.rows[number].get("answers"))
        return " / ".join(map(str, answer)) if isinstance(answer, list) else str(answer)


def read_questions(options: HeldOut) -> Questions:
    """The questions of a recipe.

    Raises:
        RecipeError: If there are none, or the benchmark's questions come without answers.
    """
    try:
        try:
            chosen = benchmark(options.task)
        except UserError as error:
            raise UserError(f"task: {error}") from None
        if not chosen.questions_are_gold:
            raise UserError(f"task: the questions of {options.task!r} come without answers; take exact_match, say")
        images = Path(options.images) if options.images is not None else Path(options.questions).parent
        try:
            asked = chosen.questions(options.questions, images)
        except UserError as error:
            raise UserError(f"questions: {error}") from None
        if not asked:
            raise UserError(f"questions: {options.questions} holds none")
        for part in asked[0].media:
            if isinstance(part[part["type"]], str) and not Path(part[part["type"]]).exists():
                raise UserError(f"images: there is no file {part[part['type']]!r}")
    except UserError as error:
        raise RecipeError(f"heldout.{error}") from None
    rows = [record.data for record in read_records(options.questions)]
    if len(rows) != len(asked):
        raise RecipeError(f"heldout.task: {options.task!r} asks several questions per record; take exact_match, say")
    kept = spread(len(asked), options.limit)
    return Questions([rows[n] for n in kept], [asked[n] for n in kept], images)


class Samples(TrainerCallback):
    """Every so often one question is answered by the model so far, beside the truth.

    Args:
        every: Steps between two answers.
        module: The model that trains, adapters inside.
        processor: Its own, with the template that it will be asked in.
    """

    def __init__(
        self,
        title: str,
        questions: Questions,
        every: int,
        module: nn.Module,
        processor: LlavakitProcessor,
        console: Console,
    ) -> None:
        self.title, self.questions, self.every, self.console = title, questions, every, console
        self.module, self.processor = module, processor

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the next question."""
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        number = (state.global_step // self.every - 1) % len(self.questions.asked)
        question = self.questions.asked[number]
        said = answer_now(self.module, self.processor, question)
        asked = " ".join(question.text.splitlines()[0].split())
        self.console.print(
            f"{self.title}: step {state.global_step}, held out: {escape(_short(asked))} -> "
            f"[bold]{escape(_short(said))}[/bold] (truth: {escape(_short(self.questions.truth(number)))})",
            highlight=False,
            soft_wrap=True,
        )


def answer_now(module: nn.Module, processor: LlavakitProcessor, question: Question) -> str:
    """The answer of a model that is being trained, which is left as it was; what goes wrong is the answer."""
    from llavakit.generation.chat import Chat
    from llavakit.generation.request import RequestFailed

    training = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            chat = Chat(module, processor, max_batch=1)
            (answer,) = chat.answer_all([question.messages()], max_new_tokens=LONGEST)
    except RequestFailed as error:  # out of memory, for one: no reason to lose the training
        answer = UserError(str(error))
    finally:
        module.train(training)
    return f"({answer})" if isinstance(answer, UserError) else answer.content


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Questions as a file, whole or not at all; one that holds them already is left alone."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        scratch = path.with_name(f".{path.name}")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    return path
