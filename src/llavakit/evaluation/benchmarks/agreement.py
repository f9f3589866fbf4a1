"""Agreement of scores with other scores: a judge with people, a metric with a judge.

Gold: JSONL of `question_id` and `score`, optionally `group` (the items of one question or image) and `model` (whose
answer was scored). Predictions: JSONL of `question_id` and `score`, or `text` that begins with a number. Needs scipy.

Verdicts on pairs of answers: JSONL of `question_id` and `verdict`, which is `first`, `second` or `tie`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.errors import quoted
from llavakit.evaluation.benchmarks.base import Benchmark, need_gold, percent
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.agreement import correlations, kendall, pairwise_accuracy, verdict_accuracy
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.resampling import divide
from llavakit.evaluation.records import Record, pair, read_records

_NUMBER = re.compile(r"\s*(-?\d+(?:\.\d+)?)")


class Agreement(Benchmark):
    """Correlations of two raters, and how often they order two items alike where the gold orders them at all."""

    title = "Agreement"

    def score(self, predictions: str | Path, gold: str | Path | None, *, extra: str = "error") -> dict[str, Any]:
        """Pearson, Spearman and Kendall (tau-b), between -1 and 1, and pairwise accuracy in percent.

        Where the gold has `group`, pairs are formed within a group, and the mean over groups is given. Where it has
        `model`, `models` holds the mean scores of each, and Kendall's tau of the rankings by them is given.

        An item whose prediction has a null score (a judge call that failed) is left out and counted in `failed`.
        """
        rows = read_records(need_gold(gold, self.title, "JSONL of question_id and score"))
        pairs = list(pair(rows, read_records(predictions), extra=extra))
        given = len(pairs)
        pairs = [(question, answer) for question, answer in pairs if not _failed(answer)]
        first = [_score(answer) for _, answer in pairs]
        second = [_score(question) for question, _ in pairs]
        groups: dict[str, list[int]] = {}
        for place, (question, _) in enumerate(pairs):
            groups.setdefault(str(question.data.get("group")), []).append(place)
        alike = [_pairwise(first, second, places) for places in groups.values()]
        metrics = {
            **correlations(first, second),
            "pairwise_accuracy": percent(mean(value for value in alike if value is not None)),
            **_by_model([question for question, _ in pairs], first, second),
            "count": len(pairs),
            "failed": given - len(pairs),
        }
        table = np.array([(1, x, y, x * x, y * y, x * y) for x, y in zip(first, second, strict=True)], float)
        groups_ = None if len(groups) == 1 else [str(question.data.get("group")) for question, _ in pairs]
        measures = {"pearson": Measure(table.reshape(-1, 6), _pearson, 1.0)}
        return Metrics(metrics, self.cases(pairs, measures, pictures=groups_))


class VerdictAgreement(Benchmark):
    """How often a judge's verdicts on pairs of answers are people's."""

    title = "Verdict agreement"

    def score(self, predictions: str | Path, gold: str | Path | None, *, extra: str = "error") -> dict[str, Any]:
        """Accuracy in percent over all pairs, over those that people decided, and over those that both decided.

        A pair whose predicted verdict is null (a failed call, an unreadable reply) is left out and counted in `failed`.
        """
        rows = read_records(need_gold(gold, self.title, "JSONL of question_id and verdict"))
        pairs = list(pair(rows, read_records(predictions), extra=extra))
        judged = [
            (_verdict(answer), _verdict(question)) for question, answer in pairs if not _failed(answer, "verdict")
        ]
        found = verdict_accuracy([own for own, _ in judged], [other for _, other in judged])
        accuracies = {f"accuracy_{name}": percent(value) for name, value in found.items()}
        kept = [own for own in pairs if not _failed(own[1], "verdict")]
        metrics = accuracies | {"count": len(judged), "failed": len(pairs) - len(judged)}
        values = {name: [verdict_accuracy([own], [other])[name] for own, other in judged] for name in found}
        return Metrics(metrics, self.cases(kept, {f"accuracy_{n}": Measure.mean(own) for n, own in values.items()}))


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Pearson's correlation from n, and the sums of x, y, x², y² and xy."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(n * xx - x * x, 0.0) * np.maximum(n * yy - y * y, 0.0)
    return np.clip(divide(n * xy - x * y, np.sqrt(spread)), -1.0, 1.0)


def _failed(record: Record | None, field: str = "score") -> bool:
    return record is not None and field in record.data and record.data[field] is None


def _verdict(record: Record) -> str:
    verdict = record.get("verdict", str)
    if verdict not in ("first", "second", "tie"):
        raise record.error("verdict", f"must be first, second or tie, is {quoted(verdict)}")
    return verdict


def _by_model(questions: Sequence[Record], first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Mean scores of every model and the agreement of the rankings; nothing where no item names its model."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for question, *both in zip(questions, first, second, strict=True):
        if question.data.get("model") is not None:
            scores.setdefault(str(question.data["model"]), []).append(tuple(both))
    if not scores:
        return {}
    means = {model: [mean(column) for column in zip(*own, strict=True)] for model, own in scores.items()}
    found = kendall(*zip(*means.values(), strict=True))
    return {
        "model_tau_a": found["tau_a"],
        "model_tau_b": found["tau_b"],
        "models": {model: {"score": own, "gold": other} for model, (own, other) in means.items()},
    }


def _pairwise(first: Sequence[float], second: Sequence[float], places: Sequence[int]) -> float | None:
    return pairwise_accuracy([first[place] for place in places], [second[place] for place in places])


def _score(record: Record) -> float:
    if "score" in record.data:
        score = float(record.get("score", (int, float)))
        if not math.isfinite(score):
            raise record.error("score", f"must be a number, is {score}")
        return score
    found = _NUMBER.match(record.get("text", str))
    if found is None:
        raise record.error("text", "must begin with a number; or give score")
    return float(found[1])
