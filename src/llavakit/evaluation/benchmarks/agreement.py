"""Agreement of scores with other scores: a judge with people, a metric with a judge.

Gold: JSONL of `question_id` and `score`, optionally `group` (the items of one question or image). Predictions: JSONL of
`question_id` and `score`, or `text` that begins with a number. Needs scipy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavakit.evaluation.benchmarks.base import Benchmark, need_gold, percent
from llavakit.evaluation.metrics.agreement import correlations, pairwise_accuracy
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.records import Record, pair, read_records

_NUMBER = re.compile(r"\s*(-?\d+(?:\.\d+)?)")


class Agreement(Benchmark):
    """Correlations of two raters, and how often they order two items alike where the gold orders them at all."""

    title = "Agreement"

    def score(self, predictions: str | Path, gold: str | Path | None, *, extra: str = "error") -> dict[str, Any]:
        """Pearson, Spearman and Kendall (tau-b), between -1 and 1, and pairwise accuracy in percent.

        Where the gold has `group`, pairs are formed within a group, and the mean over groups is given.
        """
        rows = read_records(need_gold(gold, self.title, "JSONL of question_id and score"))
        pairs = list(pair(rows, read_records(predictions), extra=extra))
        first = [_score(answer) for _, answer in pairs]
        second = [_score(question) for question, _ in pairs]
        groups: dict[str, list[int]] = {}
        for place, (question, _) in enumerate(pairs):
            groups.setdefault(str(question.data.get("group")), []).append(place)
        alike = [_pairwise(first, second, places) for places in groups.values()]
        return {
            **correlations(first, second),
            "pairwise_accuracy": percent(mean(value for value in alike if value is not None)),
            "count": len(pairs),
        }


def _pairwise(first: Sequence[float], second: Sequence[float], places: Sequence[int]) -> float | None:
    return pairwise_accuracy([first[place] for place in places], [second[place] for place in places])


def _score(record: Record) -> float:
    if "score" in record.data:
        return float(record.get("score", (int, float)))
    found = _NUMBER.match(record.get("text", str))
    if found is None:
        raise record.error("text", "must begin with a number; or give score")
    return float(found[1])
