"""Packing: samples of different length into rows of equal length.

Everything is arithmetic on lengths, deterministic, and independent of what the samples hold.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of sample numbers whose lengths add up to at most `row_length` each.

    Samples are taken by length, longest first (equal ones in order), and go into the first row that has room. Rows
    come in the order of their smallest sample number, and so do the samples of a row.

    Raises:
        ValueError: If a sample is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if order and lengths[order[0]] > row_length:
        raise ValueError(f"sample {order[0]} has {lengths[order[0]]} tokens, a row holds {row_length}")
    # A tree over as many empty rows as there are samples, every node with the most room below it: the first row
    # with room is found in log(n) steps.
    leaves = 1 << (max(len(order), 1) - 1).bit_length()
    room = [row_length] * (2 * leaves)
    rows: list[list[int]] = [[] for _ in range(leaves)]
    for index in order:
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < lengths[index]
        rows[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted(sorted(row) for row in rows if row)


def in_order(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of consecutive samples, each as full as it gets; the fewest rows that keep the order.

    Raises:
        ValueError: If a sample is longer than a row.
    """
    rows: list[list[int]] = []
    free = 0
    for index, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(f"sample {index} has {length} tokens, a row holds {row_length}")
        if not rows or length > free:
            rows.append([])
            free = row_length
        rows[-1].append(index)
        free -= length
    return rows


class Piece(int):
    """The number of a sample of which a row holds the tokens [begin, end); it counts as the number itself."""

    begin: int
    end: int

    def __new__(cls, sample: int, begin: int, end: int) -> Piece:
        """A piece of a sample."""
        piece = super().__new__(cls, sample)
        piece.begin, piece.end = begin, end
        return piece

    def __reduce__(self) -> tuple[type[Piece], tuple[int, int, int]]:
        """For the workers of data loaders."""
        return type(self), (int(self), self.begin, self.end)


def chunks(samples: Sequence[int], lengths: Sequence[int], chunk: int) -> list[list[Piece]]:
    """Full chunks of a stream of samples, one behind another; samples are cut at the ends, the rest is dropped.

    Args:
        samples: Numbers of the samples, in the order of the stream.
        lengths: Their lengths.
        chunk: Tokens of a chunk.
    """
    rows: list[list[Piece]] = []
    row: list[Piece] = []
    free = chunk
    for sample, length in zip(samples, lengths, strict=True):
        begin = 0
        while begin < length:
            end = min(length, begin + free)
            row.append(Piece(sample, begin, end))
            free -= end - begin
            begin = end
            if not free:
                rows.append(row)
                row, free = [], chunk
    return rows


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """The better of `first_fit_decreasing` and `in_order`.

    Repacking a planned batch row by row never needs more rows than the plan.
    """
    fitted, kept = first_fit_decreasing(lengths, row_length), in_order(lengths, row_length)
    return kept if len(kept) <= len(fitted) else fitted
