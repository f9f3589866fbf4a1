"""Rounds of preference learning: a policy answers, a judge compares, and the policy learns from what was preferred.

Every question gets K answers; a judge sees all ordered pairs of different ones (K (K - 1) calls), so that its favour
for one place cancels; the best and the worst answer make a preference record; DPO learns from these, with the policy
that gave the answers as its reference. The next round begins with the new policy. Source: LLaVA-Critic, section 4.2.

    OUTPUT/round-1/policy.jsonl        what the policy said, by request, to go on from; judge.jsonl likewise
           round-1/preferences.jsonl   records for `objective: dpo`, with where they come from
           round-1/training/           the training run
           round-1/round.json          the round's figures; with it the round is finished
           final/                      the last policy
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from llavakit.conversation.messages import Message, is_media, media_of, text_of
from llavakit.data.mixture import Mixture, read_specs
from llavakit.data.records import Record
from llavakit.errors import RecipeError, UserError
from llavakit.evaluation.benchmarks.base import write_lines
from llavakit.evaluation.comparisons import Comparison, Verdict
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.rewards import best_and_worst, ordered_pairs, pairwise_rewards
from llavakit.generation.asking import Asker
from llavakit.generation.load import load
from llavakit.generation.remote import CallFailed
from llavakit.generation.request import SamplingParams
from llavakit.registry import COMPARISONS
from llavakit.training.dataset import source_options
from llavakit.training.recipe import Recipe, Section, Source, parse_recipe
from llavakit.training.run import publish, train

_ADVANTAGE = {"first": -1.0, "tie": 0.0, "second": 1.0}  # of the answer that is shown second


class Sampling(Section):
    """How the policy answers."""

    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(512, ge=1)


class JudgeOptions(Section):
    """Who compares; see `llavakit.evaluation.judges.Judge`.

    Attributes:
        model: A model folder, an address (`http://host:8000/v1#NAME`), or the name of a model at `base_url`.
        price_in, price_out: Price of a million tokens; with them the cost is shown.
        max_cost: No call that could cost more in all is made.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = None
    temperature: float = Field(0.0, ge=0)
    concurrency: int | None = Field(None, ge=1)
    retries: int | None = Field(None, ge=0)
    timeout: float | None = Field(None, gt=0)
    price_in: float | None = Field(None, ge=0)
    price_out: float | None = Field(None, ge=0)
    max_cost: float | None = Field(None, ge=0)


class RoundsRecipe(Section):
    """Several rounds.

    Attributes:
        policy: Checkpoint that the first round begins with.
        judge: Who compares; a name alone is its `model`.
        prompts: Records whose last question is answered; answers that they have are not looked at.
        comparison: How the judge is asked, by registered name (`labelled`, ...).
        answers: K, answers to every question.
        sampling: How the policy answers.
        stage: Options of the training stage, as in a recipe's `stages`; its objective is `dpo` unless it names one.
        rounds: Number of rounds.
        output: Folder of all results.
    """

    policy: str
    judge: JudgeOptions | str
    prompts: list[Source] = Field(min_length=1)
    comparison: str = "labelled"
    answers: int = Field(5, ge=2, le=64)
    sampling: Sampling = Field(default_factory=Sampling)
    stage: dict[str, Any]
    rounds: int = Field(1, ge=1, le=100)
    output: str = "runs/preference"
    seed: int = Field(0, ge=0, lt=2**31)

    @property
    def judging(self) -> JudgeOptions:
        """The judge's options."""
        return JudgeOptions(model=self.judge) if isinstance(self.judge, str) else self.judge

    def training(self, policy: str, pairs: Path, output: Path, number: int) -> Recipe:
        """The recipe that trains one round.

        Raises:
            RecipeError: If the stage's options do not fit.
        """
        stage = {"name": "preference", "objective": {"type": "dpo"}, **self.stage}
        raw = {"model": policy, "data": [{"path": str(pairs), "name": "pairs"}], "stages": [stage]}
        return parse_recipe(raw | {"output": str(output), "seed": self.seed + number}, where="stage")


@dataclass(frozen=True)
class Question:
    """A conversation up to the question that is answered.

    Attributes:
        record: Where it is from.
        messages: Everything up to the last question.
    """

    record: Record
    messages: list[Message]

    @property
    def name(self) -> str:
        """The record's `id`, or its place."""
        return str(self.record.raw.get("id", f"{self.record.file}:{self.record.line}"))

    @property
    def text(self) -> str:
        """The last question, as a judge reads it."""
        return text_of(self.messages[-1]).strip()


@dataclass
class RoundResult:
    """The figures of a round.

    Attributes:
        number: From 1.
        questions: Questions that were asked.
        pairs: Preference records that came of them.
        left_out: Questions without a record, by reason.
        verdicts: Verdicts of the judge by what they say.
        agreement: Share of pairs that the judge decided alike in both orders, among those decided twice; None for none.
        gap: Mean difference of the rewards of chosen and rejected answers.
        policy_calls, judge_calls: What was asked, kept from an earlier run, failed, and used.
        final: The policy after the round.
    """

    number: int
    questions: int = 0
    pairs: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    agreement: float | None = None
    gap: float | None = None
    policy_calls: dict[str, Any] = field(default_factory=dict)
    judge_calls: dict[str, Any] = field(default_factory=dict)
    final: str = ""


def calls_of(recipe: RoundsRecipe, questions: int) -> dict[str, int]:
    """Calls of all rounds: answers, and comparisons at most (equal answers are not compared)."""
    return {
        "answers": questions * recipe.answers * recipe.rounds,
        "comparisons": questions * len(ordered_pairs(recipe.answers)) * recipe.rounds,
    }


def run_rounds(recipe: RoundsRecipe, console: Console | None = None, judge: Any = None) -> list[RoundResult]:
    """Run all rounds, or what is left of them: no call that was answered is made again.

    Args:
        console: Where progress is shown.
        judge: A responder that compares, instead of the recipe's.

    Raises:
        UserError: One clear line; what was finished stays finished.
        APIRefused: If the judge answers no call, or the ceiling is reached; the same call goes on from there.
    """
    console = console or Console(stderr=True)
    output = Path(recipe.output)
    comparison: Comparison = COMPARISONS.build({"type": recipe.comparison})
    questions = list(read_questions(recipe))
    recipe.training(recipe.policy, output / "pairs.jsonl", output, 1)  # a misspelt stage is said before the first call
    _same_settings(recipe, output)
    for what, count in calls_of(recipe, len(questions)).items():
        console.print(f"{what}: at most {count:,} calls in {recipe.rounds} rounds of {len(questions):,} questions")
    results, policy = [], recipe.policy
    for number in range(1, recipe.rounds + 1):
        folder = output / f"round-{number}"
        finished = folder / "round.json"
        if finished.is_file():
            results.append(RoundResult(**json.loads(finished.read_text(encoding="utf-8"))))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            results.append(_run_round(recipe, number, policy, questions, comparison, folder, console, judge))
            written = json.dumps(vars(results[-1]), ensure_ascii=False, indent=1) + "\n"
            partial_file = finished.with_suffix(".partial")
            partial_file.write_text(written, encoding="utf-8")
            partial_file.replace(finished)
        policy = results[-1].final
    publish(Path(policy), output / "final")
    console.print(table(results))
    return results


def read_questions(recipe: RoundsRecipe) -> Iterator[Question]:
    """The questions of all sources.

    Raises:
        UserError: If a file is missing, or a record has no question.
    """
    specs = []
    for source in recipe.prompts:
        specs += read_specs(source_options(source), where=f"prompts.{source.name}")
    for record in Mixture(specs, seed=recipe.seed, needs_answer=False):
        last = max((place for place, turn in enumerate(record.messages) if turn["role"] == "user"), default=None)
        if last is None:
            raise UserError(f"{record.file}:{record.line}: has no question; a user's turn is needed")
        yield Question(record, record.messages[: last + 1])


def _same_settings(recipe: RoundsRecipe, output: Path) -> None:
    """Refuse to go on in a folder that was begun with other settings; more rounds may follow.

    Raises:
        RecipeError: If it was.
    """
    settings = recipe.model_dump(mode="json", exclude={"rounds", "output"})
    address, _, name = recipe.judging.model.partition("#")
    settings["judge"] = name or address  # a server may move, and prices change
    file = output / "settings.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        other = next((name for name in settings if known.get(name) != settings[name]), None)
        if other is not None:
            raise RecipeError(f"{output}: was begun with another {other}; take another output, or remove the folder")
        return
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _run_round(
    recipe: RoundsRecipe,
    number: int,
    policy: str,
    questions: Sequence[Question],
    comparison: Comparison,
    folder: Path,
    console: Console,
    judge: Any,
) -> RoundResult:
    console.rule(f"round {number} of {recipe.rounds}")
    result = RoundResult(number, questions=len(questions))
    answers = _answers(recipe, policy, questions, folder, result)
    rows = _preferences(recipe, number, policy, questions, answers, comparison, folder, judge, result)
    pairs = write_lines(folder / "preferences.jsonl", rows)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.left_out.items())
        raise UserError(f"{pairs}: holds no preference ({reasons}); nothing can be learned in round {number}")
    trained = train(recipe.training(policy, pairs, folder / "training", number), console=console)
    result.final = str(trained.final)
    return result


def _answers(
    recipe: RoundsRecipe, policy: str, questions: Sequence[Question], folder: Path, result: RoundResult
) -> list[list[str | None]]:
    """K answers to every question; None where there is none."""
    sampling = SamplingParams(**recipe.sampling.model_dump())
    seeds = random.Random(f"{recipe.seed} {result.number}")
    asked = [(question, attempt, seeds.getrandbits(31)) for question in questions for attempt in range(recipe.answers)]
    with Asker(load(policy), sampling=sampling, cache=folder / "policy.jsonl") as asker:

        def answer(ask: tuple[Question, int, int], asker: Asker = asker) -> str:
            question, attempt, seed = ask
            return asker.answer(question.messages, attempt=attempt, seed=seed).content

        found = asker.map(answer, asked)
        result.policy_calls = asker.report()
    del asker, answer
    gc.collect()  # the judge, and then training, need the memory
    texts = [None if isinstance(answer, CallFailed) else answer.strip() for answer in found]
    return [texts[begin : begin + recipe.answers] for begin in range(0, len(texts), recipe.answers)]


def _preferences(
    recipe: RoundsRecipe,
    number: int,
    policy: str,
    questions: Sequence[Question],
    answers: Sequence[Sequence[str | None]],
    comparison: Comparison,
    folder: Path,
    judge: Any,
    result: RoundResult,
) -> list[dict[str, Any]]:
    """Preference records of what the judge compared."""
    asked = [
        (row, first, second)
        for row, own in enumerate(answers)
        for first, second in ordered_pairs(len(own))
        if own[first] is not None and own[second] is not None and own[first] != own[second]
    ]
    with _judge(recipe, comparison, folder, judge) as asker:

        def compare(pair: tuple[int, int, int]) -> Verdict | None:
            row, first, second = pair
            question, own = questions[row], answers[row]
            media = media_of(question.messages)
            return comparison.verdict(asker.ask(comparison.messages(media, question.text, own[first], own[second])))

        found = dict(zip(asked, asker.map(compare, asked), strict=True))
        result.judge_calls = asker.report()
    gc.collect()
    said = Counter("failed" if isinstance(one, CallFailed) else one or "unreadable" for one in found.values())
    result.verdicts = dict(said)
    decided = {pair: _ADVANTAGE[one] for pair, one in found.items() if isinstance(one, str)}
    both = [
        (decided[row, first, second], decided[row, second, first])
        for row, first, second in decided
        if first < second and (row, second, first) in decided
    ]
    result.agreement = sum(a == -b for a, b in both) / len(both) if both else None
    rows, gaps, left_out = [], [], Counter()
    for row, (question, own) in enumerate(zip(questions, answers, strict=True)):
        known = [place for place, text in enumerate(own) if text]
        rewards = pairwise_rewards([[_advantage(decided, row, i, j) for j in known] for i in known])
        chosen = best_and_worst(rewards)
        if chosen is None:
            reason = "fewer than two answers" if len(known) < 2 else "no answer is preferred"
            left_out["all answers are equal" if known and len({own[k] for k in known}) == 1 else reason] += 1
            continue
        best, worst = (known[place] for place in chosen)
        gaps.append(max(rewards) - min(rewards))
        rows.append(
            {
                "id": question.name,
                "prompt": [_written(message, question) for message in question.messages],
                "chosen": own[best],
                "rejected": own[worst],
                "provenance": {
                    "round": number,
                    "policy": policy,
                    "judge": recipe.judging.model if judge is None else judge.name,
                    "comparison": recipe.comparison,
                    "answers": [own[place] for place in known],
                    "rewards": rewards,
                },
            }
        )
    result.pairs, result.left_out = len(rows), dict(left_out)
    result.gap = sum(gaps) / len(gaps) if gaps else None
    return rows


def _advantage(decided: Mapping[tuple[int, int, int], float], row: int, first: int, second: int) -> float:
    """How much better the second answer is; a pair that was decided in one order alone would not be fair."""
    return decided[row, first, second] if {(row, first, second), (row, second, first)} <= decided.keys() else 0.0


@contextlib.contextmanager
def _judge(recipe: RoundsRecipe, comparison: Comparison, folder: Path, judge: Any) -> Iterator[Judge]:
    options = recipe.judging.model_dump(exclude_none=True)
    model = options.pop("model")
    with Judge(
        model if judge is None else judge, max_tokens=comparison.max_tokens, cache=folder / "judge.jsonl", **options
    ) as asker:
        yield asker


def _written(message: Message, question: Question) -> dict[str, Any]:
    """A message as a record holds it.

    Raises:
        UserError: If a media item is no file.
    """
    parts = []
    for part in message["content"]:
        value = part.get(part["type"])
        if is_media(part):  # paths are absolute, since these records lie in another folder than the prompts
            files = value if isinstance(value, list) else [value]
            if not all(isinstance(file, (str, Path)) for file in files):
                raise UserError(f"{question.name}: its {part['type']} is no file; prompts name media by their files")
            absolute = [os.path.abspath(file) for file in files]
            part = {**part, part["type"]: absolute if isinstance(value, list) else absolute[0]}
        parts.append(part)
    return {**message, "content": parts}


def table(results: Sequence[RoundResult]) -> Table:
    """The rounds for a terminal."""
    found = Table(title="preference rounds")
    for column in ("round", "questions", "pairs", "reward gap", "judge agrees with itself", "judge calls", "cost"):
        found.add_column(column, justify="right")
    for one in results:
        agreement = "" if one.agreement is None else f"{100 * one.agreement:.1f} %"
        calls = one.judge_calls.get("asked", 0) + one.judge_calls.get("kept", 0)
        gap = "" if one.gap is None else f"{one.gap:.2f}"
        cost = one.judge_calls.get("cost")
        found.add_row(
            str(one.number),
            f"{one.questions:,}",
            f"{one.pairs:,}",
            gap,
            agreement,
            f"{calls:,}",
            "" if cost is None else f"{cost:.2f}",
        )
    return found
