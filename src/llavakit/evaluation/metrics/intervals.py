"""95 % intervals of metrics over cases, and tests of two systems on the same cases.

Shares get Wilson's interval, everything else a seeded bootstrap. Where several cases share a picture they are no
independent evidence: pictures are resampled, and Wilson's interval is taken at the effective number of cases (n over
the design effect of the pictures; Kish 1965, Dean and Pagano 2015), which keeps it honest near 0 and 100 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from llavakit.evaluation.metrics.resampling import Sums, divide, exchange, percentiles, ratio, resample

RESAMPLES, SEED = 1000, 0
_Z = NormalDist().inv_cdf(0.975)
_DRAWN = 2_000_000  # cases of resamples that are drawn at a time
_EQUAL = 1e-9

Interval = tuple[float, float]


def wilson(right: float, count: float) -> Interval:
    """The 95 % interval of a share by Wilson; all shares are possible where nothing was counted."""
    if not count:
        return 0.0, 1.0
    share, spread = right / count, _Z * _Z / count
    centre = share + spread / 2
    half = _Z * math.sqrt((share * (1 - share) + spread / 4) / count)
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Exact two-sided McNemar test of two systems that are right or wrong on the same items.

    Returns:
        `only_first`, `only_second`: items that one alone has right; `p`.
    """
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    one, two = pairs.count((True, False)), pairs.count((False, True))
    tail = sum(math.comb(one + two, k) for k in range(min(one, two) + 1))
    return {"only_first": one, "only_second": two, "p": min(1.0, 2 * tail / 2 ** (one + two))}


@dataclass(frozen=True)
class Measure:
    """A metric of cases as a function of sums over them, in the unit in which it is printed.

    Attributes:
        table: Statistics of every case, float64 [cases, statistics].
        value: From sums [..., statistics] to values [...]; NaN where the metric is not defined.
        scale: What values are multiplied by: 100 for percent.
    """

    table: np.ndarray
    value: Callable[[np.ndarray], np.ndarray] = ratio
    scale: float = 100.0

    @classmethod
    def mean(cls, values: Sequence[float | None], scale: float = 100.0) -> Measure:
        """The mean of a value per case; cases whose value is None are left out."""
        return cls(Sums.mean(values).table, ratio, scale)

    @classmethod
    def macro(cls, values: Sequence[float | None], groups: Sequence[Hashable], scale: float = 100.0) -> Measure:
        """The mean over groups of the mean of each; None is no group."""
        names = list(dict.fromkeys(group for group in groups if group is not None))
        mine = np.array([[group == name for name in names] for group in groups], float).reshape(len(groups), len(names))
        both = Sums.mean(values).table
        table = np.concatenate([mine * both[:, :1], mine * both[:, 1:]], axis=1)
        return cls(table, mean_ratio, scale)

    @property
    def sums(self) -> Sums:
        """The metric in its unit, for `resampling`."""
        return Sums(self.table, lambda sums: self.scale * self.value(sums), -math.inf, math.inf)

    @property
    def whole(self) -> float | None:
        """The metric of all cases, None if it is not defined."""
        found = self.sums.whole
        return found if math.isfinite(found) else None

    @property
    def is_share(self) -> bool:
        """Whether it is the share of cases that are right, of those that count."""
        if self.value is not ratio or self.table.shape[1] != 2:
            return False
        return bool(np.isin(self.table, (0.0, 1.0)).all() and (self.table[:, 0] <= self.table[:, 1]).all())

    def of(self, chosen: np.ndarray) -> Measure:
        """The metric of some of the cases."""
        return Measure(self.table[chosen], self.value, self.scale)

    def by_group(self, groups: np.ndarray) -> Measure:
        """The metric whose cases are groups of cases (pictures); `groups` numbers them from 0 [cases]."""
        table = np.zeros((int(groups.max(initial=-1)) + 1, self.table.shape[1]))
        np.add.at(table, groups, self.table)
        return Measure(table, self.value, self.scale)


def mean_ratio(sums: np.ndarray) -> np.ndarray:
    """Mean of the ratios that are defined: first all numerators, then all denominators."""
    above, below = np.split(sums, 2, axis=-1)
    return divide(divide(above, below, empty=0.0).sum(-1), (below != 0).sum(-1))


def numbered(labels: Sequence[Hashable]) -> np.ndarray:
    """Labels as numbers from 0, in the order of their first use [cases]."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], int)


def intervals(
    measures: Mapping[str, Measure], groups: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Interval | None]:
    """95 % intervals of several metrics of the same cases.

    Args:
        groups: Number of every case's picture from 0 [cases]; as many as cases where none is shared.

    Returns:
        Per metric low and high in its unit. None where nothing can be said: the metric is not defined, there are fewer
        than two pictures to resample, or every resample gives the same value.
    """
    found: dict[str, Interval | None] = {}
    drawn: dict[str, Sums] = {}
    for name, measure in measures.items():
        found[name] = None
        if measure.whole is None:
            continue
        if measure.is_share:
            found[name] = _share(measure, groups)
        else:
            drawn[name] = measure.by_group(groups).sums
    if drawn:
        spread = bootstrap(list(drawn.values()), resamples, seed)
        for name, values in zip(drawn, spread, strict=True):
            low, _, high, _ = percentiles(values)
            if math.isfinite(low) and high - low > _EQUAL * max(1.0, abs(high)):
                found[name] = (low, high)
    return found


def bootstrap(metrics: Sequence[Sums], resamples: int = RESAMPLES, seed: int = SEED) -> list[np.ndarray]:
    """Values of metrics of the same cases in the same seeded resamples, [resamples] each; NaN of fewer than 2 cases."""
    cases = len(metrics[0].table)
    if cases < 2:
        return [np.full(resamples, np.nan) for _ in metrics]
    random = np.random.RandomState(seed)
    step = max(1, min(resamples, _DRAWN // cases))
    blocks = []
    for start in range(0, resamples, step):
        rows = random.randint(0, cases, (min(step, resamples - start), cases))
        blocks.append(resample(metrics, rows))
    return [np.concatenate(values) for values in zip(*blocks, strict=True)]


def _share(measure: Measure, groups: np.ndarray) -> Interval:
    """Wilson's interval at the effective number of cases."""
    counted = measure.table[:, 1] > 0
    right, groups = measure.table[counted, 0], groups[counted]
    effective = effective_number(right, groups)
    low, high = wilson(float(right.mean()) * effective, effective)
    return measure.scale * low, measure.scale * high


def effective_number(values: np.ndarray, groups: np.ndarray) -> float:
    """How many independent cases say as much about the mean as these do: n over the design effect, at most n.

    Args:
        values: One per case, at least one.
        groups: Number of every case's picture from 0.
    """
    count, pictures = len(values), len(np.unique(groups))
    if pictures == count:
        return float(count)
    off = values - values.mean()
    if pictures < 2 or not off.any():
        return float(pictures)  # nothing says how alike cases of a picture are, so each picture counts as one
    sums = np.bincount(groups, off)
    effect = pictures / (pictures - 1) * float(sums @ sums) / float(off @ off)
    return count / max(effect, 1.0)


@dataclass(frozen=True)
class Paired:
    """Two systems on the same cases, in the unit of the metric.

    Attributes:
        value: First minus second; None if one is not defined.
        interval: Its 95 % interval, None where nothing can be said.
        p: Of the test, two-sided; None where there is none.
        test: "McNemar, exact", or "exchange" (of all answers about a picture).
        only_first, only_second: Cases that one alone has right, of a share.
    """

    value: float | None
    interval: Interval | None
    p: float | None
    test: str
    only_first: int | None = None
    only_second: int | None = None


def paired(first: Measure, second: Measure, groups: np.ndarray, *, seed: int = SEED) -> Paired:
    """The difference of two systems on the same cases.

    A difference of shares has the interval of Bonett and Price (2012), which holds near 0 and 1 and where the systems
    never differ, at the effective number of cases; and McNemar's exact test where no picture is shared. Everything
    else has a paired bootstrap of pictures and a test by 10,000 random exchanges of the systems' answers, picture by
    picture (`resampling.exchange`).
    """
    one, other = first.whole, second.whole
    value = None if one is None or other is None else one - other
    shares = first.is_share and second.is_share and bool((first.table[:, 1] == second.table[:, 1]).all())
    if value is None:
        return Paired(None, None, None, "exchange")
    counts: dict[str, Any] = {}
    if shares:
        counted = first.table[:, 1] > 0
        a, b, own = first.table[counted, 0], second.table[counted, 0], groups[counted]
        found = mcnemar(a > 0, b > 0)
        counts = {name: found[name] for name in ("only_first", "only_second")}
        low, high = (first.scale * bound for bound in _difference_of_shares(a - b, own))
        if len(np.unique(own)) == len(own):
            return Paired(value, (low, high), found["p"], "McNemar, exact", **counts)
    sums = [measure.by_group(groups).sums for measure in (first, second)]
    (p,) = exchange(sums[:1], sums[1:], seed=seed)
    if not shares:
        spread = np.subtract(*bootstrap(sums, seed=seed))
        low, _, high, _ = percentiles(spread)
    interval = (low, high) if math.isfinite(low) and (shares or high > low) else None
    return Paired(value, interval, p if math.isfinite(p) else None, "exchange", **counts)


def _difference_of_shares(differences: np.ndarray, groups: np.ndarray) -> Interval:
    """Interval of the mean of differences that are -1, 0 or 1."""
    share = effective_number(differences, groups) / len(differences)
    count = share * len(differences) + 2
    ahead, behind = ((share * float((differences == side).sum()) + 1) / count for side in (1, -1))
    half = _Z * math.sqrt((ahead + behind - (ahead - behind) ** 2) / count)
    return max(-1.0, ahead - behind - half), min(1.0, ahead - behind + half)
