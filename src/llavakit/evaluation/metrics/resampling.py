"""Intervals and paired tests of metrics that are functions of sums over cases.

BLEU of a resample needs counts of n-grams, not texts; F1 needs hits and misses; a mean needs a sum. A metric is
therefore given once as a table of statistics per case and a function of their sums, and resamples are one matrix
product: 500 resamples of thousands of reports take a fraction of a second, with the numbers that computing each
resample from its texts would give.

    sums = Sums.mean(scores)
    estimate(sums, draw(len(scores)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llavakit.errors import UserError

RESAMPLES, SEED = 500, 3  # as LLaVA-Rad's evaluation
SWAPS = 10_000
_BLOCK = 250  # rows of a matrix product
_EQUAL = 1e-9  # relative; differences below are rounding of sums in another order


@dataclass(frozen=True)
class Sums:
    """A metric of a set of cases as a function of sums.

    Attributes:
        table: Statistics of every case, float64 [cases, statistics].
        value: From sums [..., statistics] to values [...]; NaN where the metric is not defined.
        low, high: Range of the metric.
    """

    table: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def mean(cls, values: Sequence[float | None], low: float = 0.0, high: float = 1.0) -> Sums:
        """The mean of a value per case; cases whose value is None or NaN are left out, a mean of none is undefined."""
        column = np.array([np.nan if value is None else value for value in values], float)
        known = np.isfinite(column)
        return cls(np.stack([np.where(known, column, 0.0), known], axis=1).astype(float), ratio, low, high)

    @property
    def each(self) -> np.ndarray:
        """The metric of every case alone [cases]."""
        return self._clipped(self.value(self.table))

    @property
    def whole(self) -> float:
        """The metric of all cases."""
        return float(self._clipped(self.value(self.table.sum(0)[None]))[0])

    def of(self, weights: np.ndarray) -> np.ndarray:
        """The metric of resamples [resamples].

        Args:
            weights: How often each case is in each resample [resamples, cases].
        """
        return self.at(weights @ self.table)

    def at(self, sums: np.ndarray) -> np.ndarray:
        """The metric of given sums."""
        return self._clipped(self.value(sums))

    def _clipped(self, values: np.ndarray) -> np.ndarray:
        return np.clip(values, self.low, self.high)  # what rounding puts outside; NaN stays


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum over the second; NaN where the second is 0."""
    return divide(sums[..., 0], sums[..., 1])


def divide(a: np.ndarray, b: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """a / b, `empty` where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.full(a.shape, empty), where=b != 0)


class Estimate(NamedTuple):
    """A metric with its bootstrap distribution.

    Attributes:
        value: Of all cases; NaN if undefined.
        median, low, high: Of the resamples, `low` and `high` at 2.5 and 97.5 %; NaN if no resample has a value.
        unscored: Resamples in which the metric is not defined; the percentiles leave them out.
    """

    value: float
    median: float
    low: float
    high: float
    unscored: int


def draw(cases: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Rows of every resample [resamples, cases]: `scipy.stats.bootstrap`'s with `RandomState(seed)`.

    Raises:
        UserError: If there are fewer than two cases.
    """
    if cases < 2:
        raise UserError(f"a bootstrap interval needs at least 2 cases, there {'is' if cases == 1 else 'are'} {cases}")
    return np.random.RandomState(seed).randint(0, cases, (resamples, cases))


def _weights(rows: np.ndarray, cases: int) -> Iterator[np.ndarray]:
    """How often each case is in each resample, some resamples at a time."""
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        offsets = np.arange(len(block))[:, None] * cases
        counts = np.bincount((block + offsets).ravel(), minlength=len(block) * cases)
        yield counts.reshape(len(block), cases).astype(float)


def resample(metrics: Sequence[Sums], rows: np.ndarray) -> list[np.ndarray]:
    """Values of several metrics of the same cases in the same resamples, [resamples] each."""
    if not metrics:
        return []
    blocks = [[one.of(weights) for one in metrics] for weights in _weights(rows, len(metrics[0].table))]
    return [np.concatenate(values) for values in zip(*blocks, strict=True)]


def percentiles(values: np.ndarray) -> tuple[float, float, float, int]:
    """2.5 %, median and 97.5 % of the defined values, and how many are not defined."""
    known = values[np.isfinite(values)]
    if not len(known):
        return (np.nan, np.nan, np.nan, len(values))
    low, median, high = (float(value) for value in np.percentile(known, [2.5, 50, 97.5]))
    return low, median, high, len(values) - len(known)


def estimate(metric: Sums, rows: np.ndarray) -> Estimate:
    """A metric with its interval; `rows` are `draw`'s."""
    return estimates([metric], rows)[0]


def estimates(metrics: Sequence[Sums], rows: np.ndarray) -> list[Estimate]:
    """Several metrics of the same cases with their intervals."""
    found = []
    for metric, values in zip(metrics, resample(metrics, rows), strict=True):
        low, median, high, unscored = percentiles(values)
        found.append(Estimate(metric.whole, median, low, high, unscored))
    return found


class Difference(NamedTuple):
    """Two systems on the same cases.

    Attributes:
        value: First minus second, of all cases.
        low, high: 95 % interval of the difference, both systems resampled together.
        p: Share of random exchanges of the systems' outputs, case by case, that differ at least as much; two-sided, the
            observed one counted. 1 for equal systems; NaN if undefined.
        unscored: Resamples without a difference.
    """

    value: float
    low: float
    high: float
    p: float
    unscored: int


def compare(
    first: Sequence[Sums], second: Sequence[Sums], rows: np.ndarray, *, swaps: int = SWAPS, seed: int = SEED
) -> list[Difference]:
    """Paired difference of two systems in every metric: interval by bootstrap, p by approximate randomisation.

    In the test each case's outputs change sides with probability one half (Noreen 1989); cases, metrics and exchanges
    are the same for all metrics.
    """
    spread = [percentiles(a - b) for a, b in zip(resample(first, rows), resample(second, rows), strict=True)]
    ps = exchange(first, second, swaps=swaps, seed=seed)
    return [
        Difference(a.whole - b.whole, low, high, p, unscored)
        for a, b, (low, _, high, unscored), p in zip(first, second, spread, ps, strict=True)
    ]


def exchange(first: Sequence[Sums], second: Sequence[Sums], *, swaps: int = SWAPS, seed: int = SEED) -> list[float]:
    """The p values of `compare`; NaN where a metric is not defined."""
    observed = [a.whole - b.whole for a, b in zip(first, second, strict=True)]
    reached = np.ones(len(first))
    tried = np.ones(len(first))
    cases, rng = len(first[0].table) if first else 0, np.random.RandomState(seed)
    # Sums after an exchange are those of the first plus what the exchanged cases change, and the reverse.
    gaps = [b.table - a.table for a, b in zip(first, second, strict=True)]
    totals = [(a.table.sum(0), b.table.sum(0)) for a, b in zip(first, second, strict=True)]
    for start in range(0, swaps, _BLOCK):
        count = min(_BLOCK, swaps - start)
        changed = (rng.random_sample((count, cases)) < 0.5).astype(float)
        for n, (a, b) in enumerate(zip(first, second, strict=True)):
            moved = changed @ gaps[n]
            found = np.abs(a.at(totals[n][0] + moved) - b.at(totals[n][1] - moved))
            known = np.isfinite(found)
            tried[n] += known.sum()
            reached[n] += (found[known] >= abs(observed[n]) - _EQUAL * max(1.0, abs(a.whole))).sum()
    return [
        float(hit / of) if np.isfinite(value) else np.nan
        for value, hit, of in zip(observed, reached, tried, strict=True)
    ]
