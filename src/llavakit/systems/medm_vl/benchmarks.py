"""CT-RATE's multiple choice, as MedM-VL evaluates it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Pair
from llavakit.evaluation.benchmarks.generic import ListedBenchmark, texts_of
from llavakit.evaluation.metrics.answers import choice_in_reply
from llavakit.evaluation.records import Record


class CTRateChoice(ListedBenchmark):
    """Whether the first bracketed group of the gold answer, such as "(b)", occurs in the reply.

    Questions whose gold answer has no bracketed group are no multiple choice and left out.
    """

    title = "CT-RATE multiple choice"

    def value(self, question: Record, text: str) -> float:
        """Whether the right option occurs in the reply."""
        found = choice_in_reply(text, texts_of(question)[0])
        return found is not None and found[1]

    def score_pairs(self, pairs: Sequence[Pair], value: Any) -> dict[str, Any]:
        """The summary of the questions that are multiple choice."""
        chosen = [(question, answer) for question, answer in pairs if choice_in_reply("", texts_of(question)[0])]
        if not chosen:
            raise UserError('no gold answer has a bracketed option such as "(b)"')
        return super().score_pairs(chosen, value)
