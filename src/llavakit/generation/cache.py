"""Memory of the engine: key/value rows of different lengths, finished prefixes, visual vectors.

`RowCache` is a transformers `Cache` in which every batch row is a request of its own length. It knows of tensors
and positions only; which request sits in which row is the engine's business.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

WIDTH_STEP = 64  # attention looks at a multiple of this many positions, so that views live for many steps
_AHEAD = 256 << 20  # most bytes of rows to lay out for lengths to come
_MOST_PREFIXES = 128  # every new prompt is compared with all of them


def stack_layers(cache: Cache) -> Tensor:
    """Keys and values of a one-row cache as one tensor [layers, 2, kv heads, length, head size].

    Raises:
        ValueError: If layers differ in shape, which rows cannot hold.
    """
    parts = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    if len({part.shape for part in parts}) != 1:
        shapes = sorted({tuple(part.shape) for part in parts})
        raise ValueError(f"the decoder's layers keep different states, shapes {shapes}; the engine needs them equal")
    stacked = torch.stack(parts).squeeze(1)
    return stacked.view(len(cache.layers), 2, *stacked.shape[1:])


def one_row_cache(states: Tensor | None = None, cache: DynamicCache | None = None, *, rows: int = 1) -> DynamicCache:
    """A growing cache for prefill, filled with `states` [layers, 2, kv heads, length, head size] if given.

    Args:
        cache: An empty one to fill; default a new one.
        rows: How many rows begin with these states.
    """
    cache = DynamicCache() if cache is None else cache
    for keys, values in () if states is None else states:
        layer = DynamicLayer()
        layer.update(keys.expand(rows, *keys.shape), values.expand(rows, *values.shape))
        cache.layers.append(layer)
    return cache


class _RowLayer(CacheLayerMixin):
    """One decoder layer of a `RowCache`; writes one new position per row and returns all of them."""

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: RowCache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the rows were allocated together."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = self.cache
        flat_keys, flat_values = rows.flat[self.layer]
        size = key_states.shape[-1]
        flat_keys.index_copy_(0, rows.targets, key_states.reshape(-1, size))
        flat_values.index_copy_(0, rows.targets, value_states.reshape(-1, size))
        return rows.views[self.layer]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width - 1

    def get_max_length(self) -> int:
        return self.cache.capacity


class RowCache(Cache):
    """Key/value rows [layers, 2, rows, kv heads, capacity, head size] that grow in rows and capacity when needed.

    Active rows are always the first ones, so that a step computes views and no gathers. Positions beyond a row's
    length hold finite numbers and are masked.

    Args:
        like: States of one request, from `stack_layers`; gives layers, heads, dtype and device.
        rows: Rows to begin with.
        max_rows: Most rows that will be used at once.
        max_length: Most positions of a row.
        expected: Positions that rows will probably get to. On a CPU they are laid out at once, up to 256 MiB, so that
            nothing is copied when a row has grown.
        window: Sliding window of the decoder's sliding layers, or None.
        fixed: Allocate everything now and look at the whole capacity at every step (for compiled steps).
    """

    def __init__(
        self,
        like: Tensor,
        *,
        rows: int = 1,
        max_rows: int,
        max_length: int,
        expected: int = 0,
        window: int | None = None,
        fixed: bool = False,
    ) -> None:
        layers, _, heads, length, size = like.shape
        super().__init__(layers=[_RowLayer(self, layer) for layer in range(layers)])
        self.max_rows, self.max_length, self.window, self.fixed = max_rows, max_length, window, fixed
        rows = max_rows if fixed else rows
        capacity = max_length if fixed else min(_round_up(length + WIDTH_STEP), max_length)
        if like.device.type == "cpu" and not fixed:
            most = _AHEAD // max(2 * layers * rows * heads * size * like.element_size(), 1)
            capacity = max(capacity, min(_round_up(expected), max_length, most))
        self.store = _zeros(like, layers, 2, rows, heads, capacity, size)
        self.lengths = [0] * max_rows
        self.rows = self.width = 0  # of the present step
        self.positions = torch.zeros(max_rows, dtype=torch.long, device=like.device)
        self._allocated()

    @property
    def capacity(self) -> int:
        """Positions that fit into a row at present."""
        return self.store.shape[4]

    @property
    def dtype(self) -> torch.dtype:
        return self.store.dtype

    def _allocated(self) -> None:
        """Derive everything that depends on where the store lies."""
        _, _, rows, heads, capacity, size = self.store.shape
        device = self.store.device
        self.flat = [(layer[0].view(-1, size), layer[1].view(-1, size)) for layer in self.store]
        # keys and values of a layer, to be written together; a part of a decoder may have no layer at all
        self._both = self.store.view(len(self.store), 2 * rows * heads * capacity, size)
        bases = torch.arange(rows * heads, device=device).view(rows, heads) * capacity
        self._bases = bases
        self._numbers = torch.arange(rows, device=device)
        lowest = torch.finfo(self.dtype).min
        masks = 1 if self.window is None else 2
        # one column more than there are positions: what short rows would hide from their window is written there
        self.masks = torch.full((masks, rows, 1, 1, capacity + 1), lowest, dtype=self.dtype, device=device)
        for row, length in enumerate(self.lengths[:rows]):
            self._open_mask(row, length)
        self._view = (0, 0)

    def _open_mask(self, row: int, length: int) -> None:
        lowest = torch.finfo(self.dtype).min
        self.masks[:, row] = lowest
        self.masks[0, row, ..., :length] = 0
        if self.window is not None:
            self.masks[1, row, ..., max(0, length - self.window + 1) : length] = 0

    def _grow(self, rows: int, length: int) -> None:
        _, _, old_rows, _, capacity, _ = self.store.shape
        if rows <= old_rows and length <= capacity:
            return
        new_rows = old_rows if rows <= old_rows else min(max(rows, 2 * old_rows), self.max_rows)
        new_capacity = capacity if length <= capacity else min(max(_round_up(length), 2 * capacity), self.max_length)
        layers, two, _, heads, _, size = self.store.shape
        store = _zeros(self.store, layers, two, new_rows, heads, new_capacity, size)
        filled = max(self.lengths[:old_rows])
        store[:, :, :old_rows, :, :filled] = self.store[..., :filled, :]
        self.store = store
        self._allocated()

    def insert(self, row: int, states: Tensor) -> None:
        """Fill a row with the states of a prefilled request, [layers, 2, kv heads, length, head size]."""
        length = states.shape[3]
        self._grow(row + 1, length + 1)
        self.store[:, :, row, :, :length] = states
        self.set_length(row, length)

    def move(self, source: int, target: int) -> None:
        """Copy a row's states over another row's."""
        length = self.lengths[source]
        self._grow(target + 1, length + 1)
        self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]
        self.set_length(target, length)

    def set_length(self, row: int, length: int) -> None:
        """Say how many positions of a row are filled."""
        self.lengths[row] = length
        self.positions[row] = length
        self._open_mask(row, length)

    def read(self, row: int, length: int | None = None) -> Tensor:
        """View of the first `length` positions of a row, [layers, 2, kv heads, length, head size]."""
        return self.store[:, :, row, :, : self.lengths[row] if length is None else length]

    def clear(self, row: int) -> None:
        """Overwrite a row with zeros: numbers that are not finite would reach its next owner through the mask."""
        self.store[:, :, row].zero_()
        self.set_length(row, 0)

    def begin_step(self, active: int) -> None:
        """Prepare one step of the first `active` rows (of all, if fixed): where they write and what they see."""
        needed = max(self.lengths[:active]) + 1
        self._grow(active, needed)
        rows = self.max_rows if self.fixed else active
        width = self.capacity if self.fixed else min(_round_up(needed), self.capacity)
        if self._view != (rows, width):
            self._view = (rows, width)
            self.views = [(layer[0, :rows, :, :width], layer[1, :rows, :, :width]) for layer in self.store]
            self._active = self._numbers[:rows], self._bases[:rows]
            self._seen = self.masks[:, :rows, ..., :width]
        self.rows, self.width = rows, width
        numbers, bases = self._active
        positions = self.positions[:rows]
        targets = bases + positions[:, None]
        self.targets = targets.view(-1)
        self._both_targets = torch.cat([targets, targets + self._both.shape[1] // 2], 1).view(-1)
        self.masks[:, numbers, 0, 0, positions] = 0
        if self.window is not None:
            hidden = torch.where(positions < self.window, self.capacity, positions - self.window)
            self.masks[1, numbers, 0, 0, hidden] = torch.finfo(self.dtype).min

    def write(self, layer: int, states: Tensor) -> None:
        """Write one new position per row: its keys, then its values [rows, 2 * kv heads, head size]."""
        self._both[layer].index_copy_(0, self._both_targets, states.view(-1, states.shape[-1]))

    @property
    def position_ids(self) -> Tensor:
        """Positions of the tokens of this step [rows, 1]."""
        return self.positions[: self.rows, None]

    @property
    def mask(self) -> Tensor:
        """Additive mask [rows, 1, 1, width] of layers that see everything."""
        return self._seen[0]

    @property
    def window_mask(self) -> Tensor:
        """Additive mask [rows, 1, 1, width] of sliding layers."""
        return self._seen[-1]

    def mask_of_heads(self, sliding: bool) -> Tensor:
        """The mask of sliding layers, or of those that see everything, for every head [rows * kv heads, 1, width]."""
        mask = self._seen[-1 if sliding else 0]
        return mask.expand(-1, self.store.shape[3], -1, -1).flatten(0, 1)

    def end_step(self, active: int, kept: Sequence[bool] | None = None) -> None:
        """The first `active` rows have become one position longer.

        Args:
            kept: For every row whether its new position stays; one that does not is overwritten by the next step.
        """
        if kept is None:
            self.positions[:active] += 1
            kept = [True] * active
        else:
            self.positions[:active] += torch.tensor(kept, device=self.positions.device)
        for row, stays in enumerate(kept):
            self.lengths[row] += stays


def _round_up(length: int) -> int:
    return -(-length // WIDTH_STEP) * WIDTH_STEP


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of a tensor's kind; on CPUs NumPy's, whose pages are large and cost nothing until they are written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size, alignment = math.prod(shape) * like.element_size(), 64
    memory = torch.from_numpy(np.zeros(size + alignment, dtype=np.uint8))
    start = -memory.data_ptr() % alignment
    return memory[start : start + size].view(like.dtype).view(shape)


class ByteBounded:
    """Least-recently-used mapping with a bound on the bytes of its tensors.

    Args:
        limit: Most bytes to hold; 0 holds nothing.
        entries: Most entries to hold.
    """

    def __init__(self, limit: int, entries: int = 4096) -> None:
        self.limit, self.entries, self.size = limit, entries, 0
        self._entries: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def get(self, key: Any) -> Any:
        """The value of a key, now the most recently used, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Hold a value of `size` bytes; drops the least recently used ones beyond the limits."""
        self.drop(key)
        if size > self.limit:
            return
        self._entries[key] = (value, size)
        self.size += size
        while self.size > self.limit or len(self._entries) > self.entries:
            self.drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.size = 0

    def drop(self, key: Any) -> None:
        """Forget a key if it is held."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= entry[1]


class PrefixStore:
    """States of finished requests, found again by the longest prompt prefix that a new request shares.

    A prompt is compared by its *keys* (see `prompt_keys`): token ids in which visual positions carry the content of
    their media item.
    """

    def __init__(self, limit: int) -> None:
        self._held = ByteBounded(limit, _MOST_PREFIXES)
        self._keys: dict[int, np.ndarray] = {}
        self._next = 0

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._held.size

    @property
    def enabled(self) -> bool:
        return self._held.limit > 0

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._keys.clear()

    def find(self, keys: np.ndarray) -> tuple[int, Tensor | None]:
        """Length of the longest shared prefix and its states [layers, 2, kv heads, length, head size]."""
        best, found = 0, None
        for number in list(self._held):
            held = self._keys[number]
            # a longer one than the best so far agrees behind it too, which is soon seen
            if min(len(held), len(keys)) > best and held[best] == keys[best]:
                shared = shared_prefix(held, keys)
                if shared > best:
                    best, found = shared, number
        return (0, None) if found is None else (best, self._held.get(found)[:, :, :, :best])

    def put(self, keys: np.ndarray, states: Tensor) -> None:
        """Hold a copy of the states of a finished request; entries that it extends are dropped."""
        size = states.numel() * states.element_size()
        if size > self._held.limit:
            return
        for number in list(self._held):
            held = self._keys[number]
            length = min(len(held), len(keys))
            if (length and held[length - 1] != keys[length - 1]) or shared_prefix(held, keys) < length:
                continue  # neither begins with the other
            if length == len(keys):
                return
            self._held.drop(number)
        self._held.put(self._next, states.clone(), size)
        self._keys[self._next] = keys
        self._next += 1
        self._keys = {number: self._keys[number] for number in self._held}


def shared_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning of two key arrays."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def prompt_keys(ids: Sequence[int], image_token_id: int, visuals: Sequence[tuple[int, bytes]]) -> np.ndarray:
    """Token ids with every visual position replaced by a number derived from the media item's content.

    Args:
        visuals: Number of visual tokens and content digest of every media item in prompt order.
    """
    keys = np.array(ids, dtype=np.int64)
    if visuals:
        marks = [-1 - (int.from_bytes(digest[:8], "little") >> 2) for _, digest in visuals]
        keys[keys == image_token_id] = np.repeat(np.array(marks, dtype=np.int64), [count for count, _ in visuals])
    return keys


def content_digest(modality: str, size: Sequence[int], views: Sequence[Tensor], regions: Tensor | None = None) -> bytes:
    """Digest of a media item's modality, original size, pixels and regions."""
    digest = hashlib.blake2b(f"{modality} {tuple(size)}".encode(), digest_size=16)
    for view in [*views, *([] if regions is None else [regions])]:
        digest.update(f"{view.dtype} {tuple(view.shape)}".encode())
        digest.update(view.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.digest()
