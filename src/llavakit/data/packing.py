"""Packing: samples of different length into rows of equal length.

Everything is arithmetic on lengths, deterministic, and independent of what the samples hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from llavakit.data.mixing import generator_of
from llavakit.errors import UserError


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


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """The better of `first_fit_decreasing` and `in_order`.

    A batch that was planned as so many rows, and comes row after row, never takes more rows here.
    """
    fitted, kept = first_fit_decreasing(lengths, row_length), in_order(lengths, row_length)
    return kept if len(kept) <= len(fitted) else fitted


class PackedBatchSampler(Sampler[list[int]]):
    """Batches of samples that fill a fixed number of rows.

    The epoch's order is cut into windows; the samples of a window are packed by first-fit-decreasing and the rows
    shuffled. Plan and order depend on (seed, epoch) and the lengths only, so a run can go on at any batch.

    Args:
        lengths: Tokens of every sample (the sign is ignored); longer ones than a row count as a whole row.
        row_length: Tokens of a row.
        rows: Rows of a batch.
        order: (seed, epoch) to sample numbers, such as `SampleDataset.order`; default a shuffle of all.
        seed: Any integer.
        window: Samples that are packed together. Larger windows waste less and mix less.
        drop_last: Whether the last, incomplete batch is left out.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        row_length: int,
        rows: int = 1,
        *,
        order: Callable[[int, int], Sequence[int]] | None = None,
        seed: int = 0,
        window: int = 4096,
        drop_last: bool = False,
    ) -> None:
        if rows < 1 or row_length < 1:
            raise UserError(f"packing: rows and row_length must be positive, not {rows} and {row_length}")
        self.lengths, self.row_length, self.rows = [abs(length) for length in lengths], row_length, rows
        self.seed, self.window, self.drop_last = seed, window, drop_last
        self._order = order
        self.epoch, self.position = 0, 0
        self._plan: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Begin the next iteration in `epoch`, after `position` batches of it."""
        self.epoch, self.position = epoch, position

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where a sampler with this state stood."""
        self.set_epoch(state["epoch"], state["position"])

    def batches(self) -> list[list[int]]:
        """All batches of this epoch; the samples of a batch come row after row."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, self._batches())
        return self._plan[1]

    def _batches(self) -> list[list[int]]:
        generator = generator_of(self.seed, self.epoch)
        if self._order is None:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        else:
            order = list(self._order(self.seed, self.epoch))
        packed: list[list[int]] = []
        for begin in range(0, len(order), self.window):
            part = order[begin : begin + self.window]
            rows = first_fit_decreasing([min(self.lengths[i], self.row_length) for i in part], self.row_length)
            packed += [[part[n] for n in rows[k]] for k in torch.randperm(len(rows), generator=generator).tolist()]
        batches = [packed[n : n + self.rows] for n in range(0, len(packed), self.rows)]
        if self.drop_last and batches and len(batches[-1]) < self.rows:
            batches.pop()
        return [[index for row in batch for index in row] for batch in batches]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches()[self.position :]:
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def __len__(self) -> int:
        return len(self.batches())
