"""Benchmarks in which a judge reviews answers, and one that tests the judge itself.

Gold: JSONL of `question_id`, `text` (the question) and `image`, with what the benchmark shows beside the answer
(`reference` or `baseline`). Predictions: answers (`text`), which a judge reviews, or reviews that were made already
(`review`: the judge's reply). A judge call that failed is no verdict: it is counted in `failed_calls` and left out; the
next call asks it again. A reply that cannot be read is counted in `unparsed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    PairedBenchmark,
    Question,
    folder_of,
    media_parts,
    need_gold,
    percent,
    stored_questions,
    text_of,
    write_lines,
)
from llavakit.evaluation.benchmarks.judged import JudgeOptions, judged, make_judge, review_measures
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, pair, read_records
from llavakit.systems.llava_critic import prompts, verdicts
from llavakit.systems.llava_critic.verdicts import FIRST, SECOND, TIE, ArenaVerdict


class Reviewed(Benchmark):
    """Answers that a judge reviews one by one, with the media of the question.

    A subclass gives the judge's prompt (`prompt`) and what the replies say (`summary`).
    """

    max_new_tokens = 1024
    questions_are_gold = True
    gold_file: ClassVar[str] = "JSONL of question_id, text and image"

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions; no response-format sentence."""
        return stored_questions(path, images)

    def prompt(self, question: Record, answer: str) -> str:
        """What the judge is asked about an answer."""
        raise NotImplementedError(f"{type(self).__name__} must define prompt")

    def summary(self, replies: Sequence[tuple[Record, str]]) -> dict[str, Any]:
        """Metrics of questions and the judge's replies, at least one."""
        raise NotImplementedError(f"{type(self).__name__} must define summary")

    def measures(self, replies: Sequence[str]) -> dict[str, Measure]:
        """The metrics of `summary` that have an interval, the main one first."""
        raise NotImplementedError(f"{type(self).__name__} must define measures")

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        images: str | Path | None = None,
        reviews: str | Path | None = None,
        missing: str = "error",
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """Metrics of reviews.

        Args:
            images: Folder that image names are relative to; by default that of the gold file.
            reviews: Where to write the judge's replies; default: beside the predictions.
            judging: Who reviews, a LLaVA-Critic or any other model, and the judge's options. By default greedy, up to
                4096 tokens.
        """
        questions = read_records(need_gold(gold, self.title, self.gold_file))
        pairs = list(pair(questions, read_records(predictions), missing=missing, extra=extra))
        if all(answer is None or "review" in answer.data for _, answer in pairs):
            known = [(question, answer.get("review", str)) for question, answer in pairs if answer is not None]
            return self._summed(known)
        asker = need_judge(judging, predictions)
        folder = folder_of(gold, images)
        asked = [(question, self.prompt(question, text_of(answer) or "")) for question, answer in pairs]
        replies = asker.ask_all(prompts.judge_messages(text, media_parts(own, folder)) for own, text in asked)
        failures = [reply for reply in replies if isinstance(reply, Exception)]
        found = judged(asker, failures, len(pairs))
        known = [(own, reply) for (own, _), reply in zip(asked, replies, strict=True) if isinstance(reply, str)]
        rows = [{"question_id": own.data["question_id"], "review": reply} for own, reply in known]
        write_lines(reviews or Path(predictions).with_suffix(".reviews.jsonl"), rows)
        return self._summed(known, found)

    def _summed(self, replies: Sequence[tuple[Record, str]], judge: Mapping[str, Any] | None = None) -> Metrics:
        if not replies:
            raise UserError(f"{self.title}: there is no review to summarise")
        metrics = self.summary(replies) | {"count": len(replies)} | dict(judge or {})
        return Metrics(metrics, self.cases([(own, None) for own, _ in replies], self.measures([r for _, r in replies])))


def need_judge(options: JudgeOptions, predictions: str | Path) -> Any:
    """The judge of a score's options.

    Raises:
        UserError: If none is named.
    """
    if options.get("judge") is None:
        raise UserError(f"{predictions}: holds answers, not reviews; name who reviews them (--judge MODEL)")
    return make_judge(options, predictions, temperature=0.0, max_tokens=4096)


class CriticScore(Reviewed):
    """LLaVA-Critic's released pointwise prompt: every answer scored out of 100."""

    title = "Critic, pointwise"

    def prompt(self, question: Record, answer: str) -> str:
        """The released prompt."""
        return prompts.pointwise_prompt(question.get("text", str), answer)

    def summary(self, replies: Sequence[tuple[Record, str]]) -> dict[str, Any]:
        """Mean of the scores that could be read, None without one."""
        scores = [verdicts.critic_score(reply) for _, reply in replies]
        known = [score for score in scores if score is not None]
        return {"score": mean(known), "unparsed": len(scores) - len(known)}

    def measures(self, replies: Sequence[str]) -> dict[str, Measure]:
        """The mean."""
        return {"score": Measure.mean([verdicts.critic_score(reply) for reply in replies], scale=1.0)}


class Wilder(Reviewed):
    """LLaVA-Wilder: the answer's score in percent of the reference answer's, which the judge sees first."""

    title = "LLaVA-Wilder"
    gold_file = "JSONL of question_id, text, image and reference"

    def prompt(self, question: Record, answer: str) -> str:
        """The published prompt."""
        return prompts.wilder_prompt(question.get("text", str), question.get("reference", str), answer)

    def summary(self, replies: Sequence[tuple[Record, str]]) -> dict[str, Any]:
        """The relative score as published, where replies that cannot be read count as -1."""
        scores = [verdicts.wilder_scores(reply) for _, reply in replies]
        return {"relative_score": verdicts.relative_score(scores), "unparsed": scores.count(verdicts.FAILED)}

    def measures(self, replies: Sequence[str]) -> dict[str, Measure]:
        """The relative score."""
        scores = [verdicts.wilder_scores(reply) for reply in replies]
        return {"relative_score": review_measures(scores)["relative_score"]}


class WildVision(Reviewed):
    """WildVision: how often the judge prefers the answer to a baseline's."""

    title = "WildVision"
    gold_file = "JSONL of question_id, text, image and baseline"

    def prompt(self, question: Record, answer: str) -> str:
        """The published user turn, behind what the judge is to do."""
        shown = prompts.arena_prompt(question.get("text", str), question.get("baseline", str), answer)
        return f"{prompts.ARENA_TASK}\n\n{shown}"

    def summary(self, replies: Sequence[tuple[Record, str]]) -> dict[str, Any]:
        """See `arena_summary`."""
        return arena_summary([verdicts.arena_verdict(reply) for _, reply in replies])

    def measures(self, replies: Sequence[str]) -> dict[str, Measure]:
        """Both rates and the mean."""
        found = [verdicts.arena_verdict(reply) for reply in replies]
        halves = [{"model_b": 1.0, "model_a": 0.0}.get(verdict.winner, 0.5) for verdict in found]
        return {
            "elo_win_rate": Measure.mean(halves),
            "win_rate": Measure.mean([verdict.winner == "model_b" for verdict in found]),
            "mean_raw": Measure.mean([verdict.raw for verdict in found], scale=1.0),
        }


def arena_summary(found: Sequence[ArenaVerdict]) -> dict[str, Any]:
    """Win rates over the baseline in percent and the mean of the verdicts, between -2 and 2.

    `elo_win_rate` is what the published Bradley-Terry fit of two models comes to: ties count half. Where all battles
    end alike for one side the fit has no solution, and the published code gives 50; so does this.
    """
    wins, losses = (sum(verdict.winner == side for verdict in found) for side in ("model_b", "model_a"))
    ties = len(found) - wins - losses
    one_sided = not ties and 0 in (wins, losses)
    return {
        "elo_win_rate": 50.0 if one_sided else 100 * (wins + ties / 2) / len(found),
        "win_rate": 100 * wins / len(found),
        "mean_raw": sum(verdict.raw for verdict in found) / len(found),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "unparsed": sum(verdict.judgement == "Unclear" for verdict in found),
    }


class VideoCaptions(Reviewed):
    """Video detail captions: the mean of a judge's scores from 0 to 5, from reviews that were made already."""

    title = "Video detail captions"

    def prompt(self, question: Record, answer: str) -> str:
        """There is no published one for a judge that runs here."""
        raise question.error("review", "is missing in the predictions; this benchmark is scored from reviews")

    def summary(self, replies: Sequence[tuple[Record, str]]) -> dict[str, Any]:
        """The mean; a reply that cannot be read scores 0."""
        return {"score": mean(verdicts.video_dc_score(reply) for _, reply in replies)}

    def measures(self, replies: Sequence[str]) -> dict[str, Measure]:
        """The mean."""
        return {"score": Measure.mean([verdicts.video_dc_score(reply) for reply in replies], scale=1.0)}


class CriticPairs(Benchmark):
    """Answers against those of another model: LLaVA-Critic's released pairwise prompt, each pair in both orders."""

    title = "Critic, pairwise"
    max_new_tokens = 1024
    questions_are_gold = True

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions; no response-format sentence."""
        return stored_questions(path, images)

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        against: str | Path | None = None,
        images: str | Path | None = None,
        verdicts_file: str | Path | None = None,
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """Win rate in percent of the pairs that were judged, ties half.

        A pair wins if the verdicts of both orders together favour it; a pair of which one call failed is left out.

        Args:
            gold: JSONL of question_id, text and image.
            against: Predictions of the other model, to the same questions.
            verdicts_file: Where to write the verdicts, JSONL of question_id, verdict (`first` is the prediction) and
                both replies; default: beside the predictions.
        """
        if against is None:
            raise UserError(f"{self.title}: name the other model's answers (-o against=FILE)")
        questions = read_records(need_gold(gold, self.title, Reviewed.gold_file))
        own = list(pair(questions, read_records(predictions), extra=extra))
        others = {question.id: answer for question, answer in pair(questions, read_records(against), extra=extra)}
        asker = need_judge(judging, predictions)
        folder = folder_of(gold, images)
        asked = []
        for question, answer in own:
            both = text_of(answer) or "", text_of(others[question.id]) or ""
            media = media_parts(question, folder)
            for shown in (both, both[::-1]):
                text = prompts.pairwise_prompt(question.get("text", str), *shown)
                asked.append(prompts.judge_messages(text, media))
        replies = asker.ask_all(asked)
        failures = [reply for reply in replies if isinstance(reply, Exception)]
        found = judged(asker, failures, len(asked))
        rows, unparsed = [], 0
        for (question, _), *both in zip(own, replies[::2], replies[1::2], strict=True):
            row: dict[str, Any] = {"question_id": question.data["question_id"], "verdict": None}
            if all(isinstance(reply, str) for reply in both):
                read = [verdicts.unswapped(verdicts.critic_verdict(reply), order) for order, reply in enumerate(both)]
                unparsed += read.count(None)
                row |= {"verdict": joint_verdict(read), "replies": both}
            rows.append(row)
        write_lines(verdicts_file or Path(predictions).with_suffix(".verdicts.jsonl"), rows)
        counts = {name: sum(row["verdict"] == name for row in rows) for name in (FIRST, SECOND, TIE)}
        total = sum(counts.values())
        metrics = {
            "win_rate": percent((counts[FIRST] + counts[TIE] / 2) / total) if total else None,
            "wins": counts[FIRST],
            "losses": counts[SECOND],
            "ties": counts[TIE],
            "count": total,
            "failed": len(rows) - total,
            "unparsed": unparsed,
            **found,
        }
        halves = [{FIRST: 1.0, TIE: 0.5, SECOND: 0.0}.get(row["verdict"]) for row in rows]
        return Metrics(metrics, self.cases(own, {"win_rate": Measure.mean(halves)}))


def joint_verdict(both: Sequence[str | None]) -> str:
    """One verdict from those of both orders; a tie and a reply that could not be read favour nobody."""
    balance = sum((verdict == FIRST) - (verdict == SECOND) for verdict in both)
    return FIRST if balance > 0 else SECOND if balance < 0 else TIE


class RewardBench(PairedBenchmark):
    """VL-RewardBench: which of two answers a judge calls better, against people's ranking.

    Its file: JSONL of `id`, `query`, `image`, `response` (two) and `human_ranking`. The model that is evaluated is the
    judge. A reply that calls neither better counts as wrong; the published harness asks another model, or guesses.
    """

    title = "VL-RewardBench"
    max_new_tokens = 2048
    questions_are_gold = True
    gold_file = "JSONL of id, query, image, response and human_ranking"

    def read_gold(self, path: str | Path) -> list[Record]:
        """The records with their id as `question_id`."""
        found = read_records(path)
        return [
            Record(record.file, record.line, record.data | {"question_id": record.get("id", str)}) for record in found
        ]

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """The published prompt; which answer is shown first follows from their lengths."""
        text = prompts.reward_prompt(record.get("query", str), responses_of(record))
        return Question(record.id, text, media_parts(record, folder), {"prompt": text})

    def value(self, question: Record, text: str) -> float:
        """1 for the answer that people rank first."""
        return float(verdicts.reward_choice(text) == right_choice(question))

    def summary(self, scored: Sequence[tuple[Record, float]]) -> dict[str, Any]:
        """Mean over the groups that occur, the mean over all, and the groups."""
        return reward_summary([(verdicts.reward_group(record.id), value) for record, value in scored])

    def measures(self, scored: Sequence[tuple[Record, float]]) -> dict[str, Measure]:
        """Both means."""
        values = [value for _, value in scored]
        return {"macro_accuracy": Measure.macro(values, self._groups(scored)), "accuracy": Measure.mean(values)}

    def rows(self, scored: Sequence[tuple[Record, float]]) -> dict[str, list[Any]]:
        """The groups."""
        return {"by_group": self._groups(scored)}

    @staticmethod
    def _groups(scored: Sequence[tuple[Record, float]]) -> list[str]:
        return [verdicts.reward_group(record.id) for record, _ in scored]


def reward_summary(scored: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Means in percent of (group, value): over groups, over all, and of each group."""
    groups: dict[str, list[float]] = {}
    for group, value in scored:
        groups.setdefault(group, []).append(value)
    means = {group: mean(values) for group, values in groups.items()}
    return {
        "macro_accuracy": percent(mean(means.values())),
        "accuracy": percent(mean(value for _, value in scored)),
        "count": len(scored),
        "by_group": {group: percent(value) for group, value in means.items()},
    }


def responses_of(record: Record) -> list[str]:
    """The two answers of a record."""
    responses = record.get("response", list)
    if len(responses) != 2 or not all(isinstance(text, str) for text in responses):
        raise record.error("response", "must be two texts")
    return responses


def right_choice(record: Record) -> int:
    """The number under which the answer that people rank first is shown."""
    ranking = record.get("human_ranking", list)
    if sorted(ranking, key=str) != [0, 1]:
        raise record.error("human_ranking", "must be [0, 1] or [1, 0]")
    return ranking.index(int(prompts.reward_swapped(responses_of(record)))) + 1
