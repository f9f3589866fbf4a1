"""Generated weights beside the keys and values: one set per row, for the segment that is being answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


class ExpertCache(DynamicCache):
    """A growing cache that also holds the weights that its rows use until their next prompt.

    Attributes:
        weights: Generated weights of every expert layer [batch, size]; None before the first prompt.
        ends_in_prompt: Per row whether its last token was prompt, so that its segment may not be complete; None if
            nothing of the kind is known.
        guides: Column of each row's guidance.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights: list[Tensor] | None = None
        self.ends_in_prompt: list[bool] | None = None
        self.guides: list[int] = []

    def hold(self, weights: list[Tensor], ends_in_prompt: list[bool], guides: list[int]) -> None:
        """Keep what the present segments use."""
        self.weights, self.ends_in_prompt, self.guides = weights, ends_in_prompt, guides

    def _select(self, indices: Tensor) -> None:
        if self.weights is None:
            return
        self.weights = [own.index_select(0, indices.to(own.device)) for own in self.weights]
        self.guides = _chosen(self.guides, indices)
        if self.ends_in_prompt is not None:
            self.ends_in_prompt = _chosen(self.ends_in_prompt, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beam search's survivors."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.guides)).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Shorten all rows; weights whose guidance is cut off are forgotten."""
        super().crop(*args, **kwargs)
        if self.guides and max(self.guides) >= self.get_seq_length():
            self.reset_weights()

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.reset_weights()

    def reset_weights(self) -> None:
        """Forget the generated weights."""
        self.weights, self.ends_in_prompt, self.guides = None, None, []


def _chosen(values: Sequence[Any], indices: Tensor) -> list[Any]:
    return [values[index] for index in indices.tolist()]
