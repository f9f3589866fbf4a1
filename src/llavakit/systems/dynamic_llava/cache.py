"""A key/value cache in which upper layers hold fewer entries than lower ones, and every row its own number.

Layers below the sparse layer are transformers' ordinary growing layers. From there on each row's entries lie without
gaps at the front of a buffer: a new token is written behind them, takes part in attention, and stays or is
overwritten by the next one. So dropping a token costs nothing and leaves nothing, and rows never need padding entries.

The cache stores what it is told to; who is dropped is decided in `adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

STEP = 64  # fewest entries that a buffer grows by


class Rows:
    """What the selective layers of one cache share: how many entries each row has, and how many are arriving.

    Attributes:
        seen: Positions offered so far, padding included.
        lengths: Stored entries of every row.
        arriving: Real tokens of every row in the step that is running.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.lengths: list[int] = []
        self.arriving: list[int] = []

    @property
    def empty(self) -> bool:
        return not any(self.lengths)

    @property
    def even(self) -> bool:
        """Whether all rows have equally many entries and equally many arriving."""
        return len(set(self.lengths)) == 1 and len(set(self.arriving)) == 1

    @property
    def width(self) -> int:
        """Entries of the longest row, arriving ones included."""
        return max(map(sum, zip(self.lengths, self.arriving, strict=True)))

    def begin(self, arriving: Sequence[int], columns: int) -> None:
        """Announce a step: real tokens per row, and positions that the step offers."""
        self.lengths = self.lengths or [0] * len(arriving)
        self.arriving = list(arriving)
        self.seen += columns

    def visible(self, columns: int, device: torch.device) -> Tensor | None:
        """Which entry each of the right-aligned arriving tokens sees [batch, 1, columns, width]; None if all."""
        if columns == 1 and self.even:
            return None
        stored = torch.tensor(self.lengths, device=device)[:, None, None, None]
        arriving = torch.tensor(self.arriving, device=device)[:, None, None, None]
        order = torch.arange(columns, device=device)[:, None] - (columns - arriving)
        return torch.arange(self.width, device=device) <= stored + order.clamp(min=0)


class SelectiveLayer(CacheLayerMixin):
    """One layer of a `SelectiveCache`; `update` returns stored and arriving entries, `settle` says which stay."""

    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, size = key_states.shape
        self.buffers = (key_states.new_zeros(batch, heads, 0, size), value_states.new_zeros(batch, heads, 0, size))
        self.is_initialized = True

    def _stored(self, which: int) -> Tensor | None:
        if self.buffers is None:
            return None
        return self.buffers[which][:, :, : max(self.rows.lengths, default=0)]

    @property
    def keys(self) -> Tensor | None:
        """Stored keys [batch, heads, longest row, head size]."""
        return self._stored(0)

    @property
    def values(self) -> Tensor | None:
        """Stored values [batch, heads, longest row, head size]."""
        return self._stored(1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the arriving entries; rows are right-aligned in `key_states` [batch, heads, columns, head size]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._reserve(self.rows.width)
        first = self.rows.empty
        states = []
        for buffer, arriving in zip(self.buffers, (key_states, value_states), strict=True):
            self._write(buffer, arriving)
            states.append(arriving if first else buffer[:, :, : self.rows.width])
        return states[0], states[1]

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        columns = states.shape[2]
        lengths, arriving = self.rows.lengths, self.rows.arriving
        if self.rows.even:
            buffer[:, :, lengths[0] : lengths[0] + arriving[0]] = states[:, :, columns - arriving[0] :]
            return
        if columns == 1 and all(arriving):
            row = torch.arange(len(lengths), device=states.device)
            buffer[row, :, torch.tensor(lengths, device=states.device)] = states[:, :, 0]
            return
        for row, (length, count) in enumerate(zip(lengths, arriving, strict=True)):
            buffer[row, :, length : length + count] = states[row, :, columns - count :]

    def _reserve(self, width: int) -> None:
        capacity = self.buffers[0].shape[2]
        if width <= capacity:
            return
        wanted = -(-max(width, capacity + capacity // 8) // STEP) * STEP
        grown = []
        for buffer in self.buffers:
            batch, heads, _, size = buffer.shape
            larger = buffer.new_zeros(batch, heads, wanted, size)  # zeros: entries beyond a row must stay finite
            larger[:, :, :capacity] = buffer
            grown.append(larger)
        self.buffers = (grown[0], grown[1])

    def settle(self, kept: Sequence[Tensor]) -> None:
        """Move the arriving entries that stay together; `kept` [stay] per row counts from the first arriving one."""
        for buffer in self.buffers:
            for row, (length, stay) in enumerate(zip(self.rows.lengths, kept, strict=True)):
                buffer[row, :, length : length + len(stay)] = buffer[row, :, length + stay]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Entries of the longest row."""
        return max(self.rows.lengths, default=0)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the same under its older name

    def select_rows(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.buffers is not None:
            self.buffers = tuple(buffer.index_select(0, indices.to(buffer.device)) for buffer in self.buffers)

    def reset(self) -> None:
        self.buffers, self.is_initialized = None, False


class SelectiveCache(Cache):
    """Cache of a decoder that drops tokens before layer `sparse_layer`.

    Args:
        layers: Number of decoder layers.
        sparse_layer: First layer that stores selectively.
    """

    def __init__(self, layers: int, sparse_layer: int) -> None:
        self.rows = Rows()
        self.sparse_layer = sparse_layer
        dense = [DynamicLayer() for _ in range(min(sparse_layer, layers))]
        super().__init__(layers=dense + [SelectiveLayer(self.rows) for _ in range(layers - len(dense))])

    @property
    def selective(self) -> list[SelectiveLayer]:
        """The layers from `sparse_layer` on."""
        return self.layers[self.sparse_layer :]

    def commit(self, stored: Tensor | None = None) -> None:
        """End a step.

        Args:
            stored: Which of the arriving tokens stay [batch, columns], right-aligned; None keeps all.
        """
        rows = self.rows
        if stored is None:
            rows.lengths = [length + count for length, count in zip(rows.lengths, rows.arriving, strict=True)]
            return
        columns = stored.shape[1]
        kept = [
            row[columns - count :].nonzero().squeeze(-1) for row, count in zip(stored.cpu(), rows.arriving, strict=True)
        ]
        if columns > 1:  # a single token is the last entry anyway: it stays or is overwritten
            for layer in self.selective:
                layer.settle(kept)
        rows.lengths = [length + len(stay) for length, stay in zip(rows.lengths, kept, strict=True)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen so far for layer 0, stored entries of the longest row for selective layers."""
        return self.rows.seen if layer_idx == 0 else super().get_seq_length(layer_idx)

    def stored(self) -> list[list[int]]:
        """Entries of every row in every layer [layers][batch]."""
        batch = len(self.rows.lengths)
        return [
            list(self.rows.lengths) if isinstance(layer, SelectiveLayer) else [layer.get_seq_length()] * batch
            for layer in self.layers
        ]

    def bytes(self) -> int:
        """Bytes of all stored keys and values (buffers may be somewhat larger)."""
        total = 0
        for layer, lengths in zip(self.layers, self.stored(), strict=True):
            if layer.keys is not None:
                _, heads, _, size = layer.keys.shape
                total += 2 * sum(lengths) * heads * size * layer.keys.element_size()
        return total

    def _select_rows(self, indices: Tensor) -> None:
        self.rows.lengths = [self.rows.lengths[index] for index in indices.tolist()] if self.rows.lengths else []
        for layer in self.layers:
            if isinstance(layer, SelectiveLayer):
                layer.select_rows(indices)
            elif layer.is_initialized:
                layer.batch_select_indices(indices.to(layer.keys.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beam search's survivors."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select_rows(torch.arange(len(self.rows.lengths)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty the cache."""
        self.rows.clear()
        for layer in self.selective:
            layer.reset()
        for number in range(len(self.layers) - len(self.selective)):
            self.layers[number] = DynamicLayer()  # its own reset keeps zeros in older releases of transformers

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a dropped token cannot be told from one that was never offered.

        Raises:
            NotImplementedError: Always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise NotImplementedError("a selective cache cannot be shortened; decode without an assistant model")
