"""Multiple choice ranked by likelihood: the model writes nothing, the options are scored as its reply.

Record: `question_id`, `text`, `options` (two or more texts, as `B. Amoxicillin`: letter and text), `answer` (the
option's index from 0, its letter, or its text), optionally `image` and `group` (the sub-test). One file serves as
questions and as gold. What is scored is the whole option behind the rendered conversation with its opened answer.

Three rankings: the log-likelihood (`sum`, lm-evaluation-harness's `acc`), per character of the option (`acc_norm`), and
per token. They differ: the sum favours short options. Of equal options the first is taken.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.evaluation.benchmarks.base import PairedBenchmark, Question, by_field, field_text, media_parts, percent
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, choose, read_records

RANKINGS = ("sum", "per_character", "per_token")


def ranking_values(likelihoods: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What each ranking orders options by.

    Args:
        likelihoods: Of every option `sum`, `characters` and `tokens`, and where it was measured `unconditional`, the
            sum without the question.

    Returns:
        Values of every option by ranking; with `pmi`, how much the question raises the sum, where that is known of all.
    """
    values = {
        "sum": [own["sum"] for own in likelihoods],
        "per_character": [own["sum"] / own["characters"] for own in likelihoods],
        "per_token": [own["sum"] / own["tokens"] for own in likelihoods],
    }
    if all(own.get("unconditional") is not None for own in likelihoods):
        values["pmi"] = [own["sum"] - own["unconditional"] for own in likelihoods]
    return values


def first_best(values: Sequence[float]) -> int:
    """Number of the highest value; of equals the first."""
    return max(range(len(values)), key=lambda number: values[number])


def shares(sums: Sequence[float]) -> list[float]:
    """Probabilities of options among each other, from their log-likelihoods."""
    top = max(sums)
    weights = [math.exp(value - top) for value in sums]
    return [weight / sum(weights) for weight in weights]


class LikelihoodChoice(PairedBenchmark):
    """Share of questions whose likeliest option is the right one."""

    title = "Likelihood ranking"
    questions_are_gold = True
    gold_file = "JSONL of question_id, text, options and answer"

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions with their options as replies."""
        folder = Path(images) if images is not None else Path(path).parent
        return [self.question(record, folder) for record in read_records(path)]

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A question and its options."""
        text, replies = record.get("text", str), options_of(record)
        right_option(record)
        name = record.get("question_id", (str, int))
        return Question(name, text, media_parts(record, folder), {"prompt": text}, replies=replies)

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        by: str = "sum",
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Accuracy by the chosen ranking, in total, by group and as the mean over groups, and by every ranking.

        Args:
            by: "sum", "per_character" or "per_token".
        """
        choose(by, "by", RANKINGS)
        right: dict[str, list[tuple[Record, float]]] = {name: [] for name in RANKINGS}
        pairs = self.pairs(predictions, gold, missing, extra)
        for question, prediction in pairs:
            for name in RANKINGS:
                value = 0.0 if prediction is None else self._value(question, prediction, name)
                right[name].append((question, value))
        found: dict[str, Any] = {"accuracy": percent(mean(value for _, value in right[by])), "ranked_by": by}
        found |= {f"accuracy_{name}": percent(mean(value for _, value in right[name])) for name in RANKINGS}
        groups = {name: percent(mean(values)) for name, values in by_field(right[by], "group").items()}
        found |= {"count": len(right[by])} | ({"average": mean(groups.values()), "by_group": groups} if groups else {})
        values = {name: [value for _, value in right[name]] for name in RANKINGS}
        rows = [field_text(question, "group") for question, _ in pairs]
        measures = {"accuracy": Measure.mean(values[by])}
        measures |= {f"accuracy_{name}": Measure.mean(values[name]) for name in RANKINGS}
        measures |= {"average": Measure.macro(values[by], rows)}
        return Metrics(found, self.cases(pairs, measures, {"by_group": rows}))

    @staticmethod
    def _value(question: Record, prediction: Record, by: str) -> float:
        likelihoods = prediction.get("likelihoods", list)
        if len(likelihoods) != len(options_of(question)) or not all(map(_is_likelihood, likelihoods)):
            problem = "must hold sum, characters and tokens of every option, and numbers only"
            raise prediction.error("likelihoods", problem)
        return float(first_best(ranking_values(likelihoods)[by]) == right_option(question))


def _is_likelihood(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"sum", "characters", "tokens"} <= set(value):
        return False
    numbers = [value[name] for name in ("characters", "tokens", "sum")]
    if value.get("unconditional") is not None:
        numbers.append(value["unconditional"])
    return all(map(_is_finite, numbers)) and min(numbers[:2]) > 0


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN, and for integers that no float holds


def options_of(record: Record) -> tuple[str, ...]:
    """The options of a record."""
    options = record.get("options", list)
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise record.error("options", "must be texts that are not empty")
    if len(options) < 2:
        raise record.error("options", f"must be at least two to choose from, there is {len(options)}")
    if len(set(options)) < len(options):
        raise record.error("options", "holds the same option twice")
    return tuple(options)


def right_option(record: Record) -> int:
    """Number of the right option from 0; a letter or an option's text is taken too."""
    options, answer = options_of(record), record.get("answer", (int, str))
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise record.error("answer", f"must be an index from 0 to {len(options) - 1}, a letter, or one of the options")
    return answer
