"""Approximate search in memory: vectors put into partitions around centres, of which a query looks into the nearest.

The vectors that are looked at are compared exactly, so what is found has its true score; what lies in another partition
is missed. Building takes a sample for the centres and then one pass over the vectors, in little memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llavakit.errors import UserError
from llavakit.retrieval.entries import NO_NEIGHBOUR
from llavakit.retrieval.exact import unit

FILE = "partitions.safetensors"
SAMPLE, ROUNDS = 128, 15  # vectors per centre, and steps of k-means
LARGEST_SAMPLE = 25_000
SHARE = 16  # one in so many partitions is looked into, and never fewer than FEWEST
FEWEST = 8
_ROWS = 4096  # that are compared with all centres at a time

Blocks = Callable[[], Iterable[tuple[int, np.ndarray]]]


def build(blocks: Blocks, count: int, path: Path, *, spherical: bool = True) -> None:
    """Centres and the partition of every vector, written to a file.

    Args:
        blocks: Gives the vectors in order, as `Store.blocks` does; it is called twice.
        count: Number of vectors.
        spherical: Whether vectors have unit length; centres then have it too.
    """
    centres = max(1, round(count**0.5))
    draws = np.random.default_rng(0)
    wanted = np.sort(draws.choice(count, min(count, LARGEST_SAMPLE, SAMPLE * centres), replace=False))
    sample = None
    for start, rows in blocks():
        first, last = np.searchsorted(wanted, (start, start + len(rows)))
        sample = np.empty((len(wanted), rows.shape[1]), np.float32) if sample is None else sample
        sample[first:last] = rows[wanted[first:last] - start]
    table = _centres(sample, centres, draws, spherical)
    del sample
    labels = np.empty(count, np.int32)
    for start, rows in blocks():
        labels[start : start + len(rows)] = _nearest(rows, table)
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(centres + 1))
    scratch = path.with_name(path.name + ".new")
    save_file({"centres": table, "order": order, "bounds": bounds}, scratch)
    scratch.replace(path)


def _centres(sample: np.ndarray, count: int, draws: np.random.Generator, spherical: bool) -> np.ndarray:
    """k-means on a sample, some rows at a time; a centre that lost its vectors moves to a vector far from its own."""
    table = sample[draws.choice(len(sample), count, replace=False)].copy()
    for _ in range(ROUNDS):
        sums, sizes = np.zeros((count, sample.shape[1])), np.zeros(count, np.int64)
        farthest = (-np.inf, 0)
        for begin in range(0, len(sample), _ROWS):
            rows = sample[begin : begin + _ROWS]
            labels = _nearest(rows, table)
            order = np.argsort(labels, kind="stable")
            full, begins, own = np.unique(labels[order], return_index=True, return_counts=True)
            sums[full] += np.add.reduceat(rows[order], begins)
            sizes[full] += own
            far = np.einsum("nd,nd->n", rows, rows) - 2 * np.einsum("nd,nd->n", rows, table[labels])
            farthest = max(farthest, (float(far.max()), begin + int(far.argmax())))
        table[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
        empty = np.flatnonzero(sizes == 0)
        if len(empty):  # one a round goes to the vector that lies farthest from its centre
            table[empty[0]] = sample[farthest[1]]
        table = unit(table) if spherical else table
    return table


def _nearest(rows: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The centre of every row."""
    half = np.einsum("nd,nd->n", table, table) / 2
    found = [(rows[b : b + _ROWS] @ table.T - half).argmax(1) for b in range(0, len(rows), _ROWS)]
    return np.concatenate(found).astype(np.int32)


class Partitions:
    """Vectors in the order of their partitions.

    Args:
        path: What `build` wrote.
        blocks: The vectors in order; those behind the ones that were there at building are always looked at.
        count, dimension: Of the vectors.

    Raises:
        UserError: If the file does not belong to the vectors.
    """

    def __init__(self, path: Path, blocks: Iterable[tuple[int, np.ndarray]], count: int, dimension: int) -> None:
        try:
            state = load_file(path)
            self.centres, self.order, self.bounds = state["centres"], state["order"], state["bounds"]
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); build the index again") from None
        if self.centres.shape[1] != dimension or len(self.order) > count or self.bounds[-1] != len(self.order):
            raise UserError(f"{path}: belongs to another store; build the index again")
        known = len(self.order)
        place = np.empty(count, np.int64)
        place[self.order], place[known:] = np.arange(known), np.arange(known, count)
        self.order = np.concatenate([self.order, np.arange(known, count)])
        self.known = known
        self.rows = np.empty((count, dimension), np.float32)
        for start, rows in blocks:
            self.rows[place[start : start + len(rows)]] = rows

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `exact.best`, among the partitions nearest to every query."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        numbers = np.full((len(queries), k), NO_NEIGHBOUR, np.int64)
        probes = min(len(self.centres), max(FEWEST, len(self.centres) // SHARE))
        for row, query in enumerate(queries):
            near = np.sort(np.argpartition(self.centres @ query, -probes)[-probes:])
            spans = [(self.bounds[one], self.bounds[one + 1]) for one in near]
            spans.append((self.known, len(self.order)))
            found = np.concatenate([self.rows[begin:end] @ query for begin, end in spans])
            places = np.concatenate([self.order[begin:end] for begin, end in spans])
            if len(found) > k:
                kept = np.argpartition(found, -k)[-k:]
                found, places = found[kept], places[kept]
            best = np.lexsort((-places, -found))
            scores[row, : len(best)], numbers[row, : len(best)] = found[best], places[best]
        return scores, numbers
