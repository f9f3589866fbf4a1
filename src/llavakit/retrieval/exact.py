"""Exact search: the best inner products of queries with a matrix, by brute force at the speed of a matrix product.

Equal scores come in the order in which faiss's flat index gives them, because published stores hold the same text many
times and the order of equal neighbours is visible in a prompt: among those that fit, later entries first.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llavakit.retrieval.entries import NO_NEIGHBOUR

QUERIES = 256  # of one matrix product
_GROUP = 32  # entries whose maximum is looked at first
_ROUNDING = 4e-6  # of a float32 inner product of unit vectors, generously
_SCORES = 1 << 24  # scores of one matrix product; bounds the memory of a search


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors divided by their length, float32 [n, dimension]; zeros stay."""
    length = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def best(queries: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest inner products of every query.

    Args:
        queries: float32 [queries, dimension].
        blocks: Parts of the matrix in order: the number of the first row, and rows float32 [rows, dimension].
        k: Neighbours of a query.

    Returns:
        Scores float32 [queries, k] and indices int64 [queries, k], best first; missing neighbours have the index
        `NO_NEIGHBOUR` and the score minus infinity.
    """
    found = [_Best(k) for _ in queries]
    for start, rows in blocks:
        step = max(1, min(QUERIES, _SCORES // max(1, len(rows))))
        reach = _ROUNDING * float(np.sqrt(np.einsum("nd,nd->n", rows, rows).max(initial=0.0)))
        for begin in range(0, len(queries), step):
            part = queries[begin : begin + step]
            scores = part @ rows.T
            slack = reach * np.maximum(np.linalg.norm(part, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            row, column = _candidates(scores, k, slack)
            # exact enough to tell rounding from a difference, and the same for equal rows wherever they stand
            precise = _products(part, rows, row, column)
            ends = np.searchsorted(row, np.arange(len(part) + 1))
            for number in range(len(part)):
                span = slice(ends[number], ends[number + 1])
                found[begin + number].add(precise[span], column[span] + start)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.full((len(queries), k), NO_NEIGHBOUR, np.int64)
    for number, part in enumerate(found):
        values, places = part.ordered()
        scores[number, : len(values)], indices[number, : len(places)] = values, places
    return scores, indices


def _candidates(scores: np.ndarray, k: int, slack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and entries that may be among the `k` best, in order: all scores that come near the `k`-th, and few more.

    The maxima of groups of entries say in one pass how high that score is at least, and in which groups to look.
    """
    queries, rows = scores.shape
    width = rows // _GROUP  # of the table whose columns are groups
    if k > width:
        floor = np.partition(scores, -k, axis=1)[:, -k, None] if k < rows else np.full((queries, 1), -np.inf)
        return np.nonzero(scores >= floor - slack)
    whole = width * _GROUP
    groups = scores[:, :whole].reshape(queries, _GROUP, width).max(axis=1)
    floor = np.partition(groups, -k, axis=1)[:, -k, None] - slack
    row, group = np.nonzero(groups >= floor)
    columns = group[:, None] + width * np.arange(_GROUP)
    near = scores[row[:, None], columns] >= floor[row]
    behind, column = np.nonzero(scores[:, whole:] >= floor)
    row = np.concatenate([np.repeat(row, _GROUP)[near.ravel()], behind])
    column = np.concatenate([columns[near], column + whole])
    order = np.lexsort((column, row))
    return row[order], column[order]


def _products(queries: np.ndarray, rows: np.ndarray, which: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Inner products of pairs in double precision, [pairs]."""
    out = np.empty(len(which), np.float64)
    for begin in range(0, len(which), 8192):
        span = slice(begin, begin + 8192)
        out[span] = np.einsum("nd,nd->n", queries[which[span]], rows[place[span]], dtype=np.float64)
    return out


class _Best:
    """The best entries of one query so far."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.scores, self.places = np.empty(0), np.empty(0, np.int64)

    def add(self, scores: np.ndarray, places: np.ndarray) -> None:
        """Take further candidates, in the order of their places and behind those that were taken."""
        scores, places = np.concatenate([self.scores, scores]), np.concatenate([self.places, places])
        if len(scores) > self.k:
            kth = np.partition(scores, -self.k)[-self.k]
            better, equal = scores > kth, scores == kth
            # A full list takes no equal score, and a better one pushes out the earliest of the worst.
            candidates = np.flatnonzero(better | equal)[: self.k]
            spare = self.k - int(better.sum())
            kept = candidates[equal[candidates]]
            keep = np.sort(np.concatenate([np.flatnonzero(better), kept[len(kept) - spare :]]))
            scores, places = scores[keep], places[keep]
        self.scores, self.places = scores, places

    def ordered(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.lexsort((-self.places, -self.scores))
        return self.scores[order], self.places[order]
