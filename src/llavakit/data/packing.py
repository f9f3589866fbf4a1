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
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        length = lengths[index]
        if length > row_length:
            raise ValueError(f"sample {index} has {length} tokens, a row holds {row_length}")
        for row, free in enumerate(room):
            if length <= free:
                rows[row].append(index)
                room[row] -= length
                break
        else:
            rows.append([index])
            room.append(row_length - length)
    return sorted(sorted(row) for row in rows)
