"""Agreement of two raters of the same items: correlations by scipy, kappa, and pairwise preference.

A correlation of a constant sequence is undefined and given as None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from llavakit.errors import UserError, quoted
from llavakit.evaluation.packages import need


def correlations(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Correlations of two sequences of scores [items].

    Returns:
        pearson; spearman (ranks, ties share the mean rank); kendall (tau-b, which corrects for ties).

    Raises:
        UserError: If scipy is not installed.
    """
    stats = need("scipy.stats")
    if len(set(first)) < 2 or len(set(second)) < 2:
        return dict.fromkeys(("pearson", "spearman", "kendall"))
    return {
        "pearson": float(stats.pearsonr(first, second).statistic),
        "spearman": float(stats.spearmanr(first, second).statistic),
        "kendall": float(stats.kendalltau(first, second).statistic),
    }


def pairwise_accuracy(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Share of the pairs that `second` orders in which `first` orders them alike; None if `second` ties all of them.

    A pair that `first` ties counts as not ordered alike.
    """
    ordered = [(i, j) for i, j in combinations(range(len(second)), 2) if second[i] != second[j]]
    if not ordered:
        return None
    return sum((first[i] - first[j]) * (second[i] - second[j]) > 0 for i, j in ordered) / len(ordered)


def kendall(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Kendall's tau of two sequences of scores, without and with a correction for ties.

    Returns:
        tau_a: (concordant - discordant) / all pairs, None for fewer than two items; tau_b: the same over the geometric
        mean of the pairs that each sequence orders, None if one of them orders none.
    """
    pairs = list(combinations(range(len(second)), 2))
    signs = [(_sign(first[i] - first[j]), _sign(second[i] - second[j])) for i, j in pairs]
    difference = sum(x * y for x, y in signs)
    ordered = [sum(abs(own) for own in column) for column in zip(*signs, strict=True)] or [0, 0]
    return {
        "tau_a": difference / len(pairs) if pairs else None,
        "tau_b": difference / math.sqrt(ordered[0] * ordered[1]) if all(ordered) else None,
    }


def kappa(
    first: Sequence[Any], second: Sequence[Any], scale: Sequence[Any] | None = None, weights: str = "none"
) -> float:
    """Cohen's kappa of two raters, from -1 to 1; NaN where chance alone would agree fully (one class, always).

    Args:
        scale: All classes that raters could give, in their order; default: those that occur. With weights the distance
            of two classes is that of their places on the whole scale, whether or not what lies between them occurs.
        weights: "none" (all disagreements alike), "linear" or "quadratic" in the distance.

    Raises:
        UserError: If a rating is not on the scale, or the weights are unknown.
    """
    scale = sorted(set(first) | set(second)) if scale is None else list(scale)
    place = {kind: n for n, kind in enumerate(scale)}
    for rating in (*first, *second):
        if rating not in place:
            raise UserError(f"kappa: {quoted(rating)} is not on the scale {quoted(scale)}")
    if weights not in _DISTANCES:
        raise UserError(f"kappa: weights are {', '.join(_DISTANCES)}, not {quoted(weights)}")
    table = np.zeros((len(scale), len(scale)))
    for own, other in zip(first, second, strict=True):
        table[place[own], place[other]] += 1
    if not table.sum():
        return math.nan
    table /= table.sum()
    places = np.arange(len(scale))
    distance = _DISTANCES[weights](np.abs(places[:, None] - places[None]))
    by_chance = float((np.outer(table.sum(1), table.sum(0)) * distance).sum())
    return math.nan if by_chance <= _ROUNDING else 1.0 - float((table * distance).sum()) / by_chance


_ROUNDING = 1e-12
_DISTANCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda steps: (steps > 0).astype(float),
    "linear": lambda steps: steps.astype(float),
    "quadratic": lambda steps: steps.astype(float) ** 2,
}


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def verdict_accuracy(judge: Sequence[str], people: Sequence[str], tie: str = "tie") -> dict[str, float | None]:
    """How often verdicts on pairs of answers agree with people's; None where there is no such pair.

    Returns:
        with_ties: three ways, all pairs; without_human_ties: pairs that people decided, where a judge's tie is wrong;
        without_any_ties: pairs that both decided.
    """
    pairs = list(zip(judge, people, strict=True))
    kept = {
        "with_ties": pairs,
        "without_human_ties": [pair for pair in pairs if pair[1] != tie],
        "without_any_ties": [pair for pair in pairs if tie not in pair],
    }
    return {name: sum(own == other for own, other in some) / len(some) if some else None for name, some in kept.items()}
