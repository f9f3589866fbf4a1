"""Ratings of several models from battles that a judge or people decided.

Predictions: JSONL of `model_a`, `model_b` and `verdict`, which is `first`, `second` or `tie`; a null verdict is a call
that failed and counts for nothing. `critic-pairwise` and other judges write verdicts of one pair of models; put the
names of both beside each to have their battles rated together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.errors import UserError, quoted
from llavakit.evaluation.benchmarks.base import Benchmark, percent
from llavakit.evaluation.cases import Metrics, bounds_of
from llavakit.evaluation.metrics.elo import Battle, bootstrap, bradley_terry, online_elo, win_rates
from llavakit.evaluation.records import Record, read_records

_WINNERS = {"first": "a", "second": "b", "tie": "tie"}


class Arena(Benchmark):
    """Elo and Bradley-Terry ratings with bootstrap intervals."""

    title = "Arena"

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        k: float = 4.0,
        start: float = 1000.0,
        samples: int = 200,
        seed: int = 0,
        extra: str = "error",
    ) -> dict[str, Any]:
        """Per model: Bradley-Terry rating with its 95 % interval, Elo in the order of the file, win rate, battles.

        Ratings are None where the battles do not decide them (a model that never lost a point).
        """
        if gold is not None:
            raise UserError(f"{self.title}: takes no gold file; the battles are the predictions")
        records = read_records(predictions)
        battles = [_battle(record) for record in records if record.data.get("verdict") is not None]
        if not battles:
            raise UserError(f"{predictions}: holds no decided battle")
        models = sorted({name for first, second, _ in battles for name in (first, second)})
        ratings, elo = bradley_terry(models, battles, start), online_elo(models, battles, k, start)[0]
        intervals, rates = bootstrap(models, battles, samples, seed), win_rates(models, battles)
        shift = start - 1000.0
        rows = {}
        for model in sorted(models, key=lambda name: -(ratings or elo)[name]):
            low, high = (None, None) if intervals is None else (value + shift for value in intervals[model])
            rows[model] = {
                "rating": None if ratings is None else ratings[model],
                "low": low,
                "high": high,
                "elo": elo[model],
                "win_rate": percent(rates[model]),
                "battles": sum(model in (first, second) for first, second, _ in battles),
            }
        bounds = {model: {"rating": bounds_of(row)} for model, row in rows.items()}
        found = {"count": len(battles), "failed": len(records) - len(battles), "models": rows}
        kept = [(record, None) for record in records if record.data.get("verdict") is not None]
        return Metrics(found, self.cases(kept, {}), {"models": bounds})


def _battle(record: Record) -> Battle:
    first, second, verdict = (record.get(name, str) for name in ("model_a", "model_b", "verdict"))
    if verdict not in _WINNERS:
        raise record.error("verdict", f"must be first, second or tie, is {quoted(verdict)}")
    if first == second:
        raise record.error("model_b", f"is {quoted(second)} like model_a; a battle is between two")
    return first, second, _WINNERS[verdict]
