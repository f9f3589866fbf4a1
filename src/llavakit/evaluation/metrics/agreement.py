"""Agreement of two raters of the same items: correlations by scipy, and pairwise preference.

A correlation of a constant sequence is undefined and given as None.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

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
