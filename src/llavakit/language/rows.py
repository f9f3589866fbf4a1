"""Rows: the decoder states of requests that are decoded together, one row each.

The engine schedules requests and decides which row holds which. What a row holds (keys and values, caches of unequal
length, weights made for one request) depends on how the decoder is run: a plain decoder's rows are
`llavakit.generation.rows.PlainRows`; a language adapter may define its own (`LanguageAdapter.rows`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class DecodingRows(ABC):
    """States of up to `max_rows` requests. Active rows are always the first ones."""

    @abstractmethod
    def insert(self, row: int, states: Any, length: int) -> None:
        """Fill a row with the states of a prefilled prompt; several rows may get the same states.

        Args:
            states: What prefill left behind: for an adapter its cache of one row.
            length: Positions of the prompt.
        """

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Put the states of the last active row in the place of another."""

    @abstractmethod
    def step(self, tokens: list[int]) -> Tensor:
        """One more token for each of the first rows, in order.

        Returns:
            Logits [rows, vocabulary].
        """

    @abstractmethod
    def clear(self, row: int) -> None:
        """Forget what a row holds: its numbers may not be finite."""

    def read(self, row: int, length: int | None = None) -> Any:
        """States of the first `length` positions of a row, for prompts that begin in the same way.

        None if a beginning cannot be cut out; this is the default.
        """
        return None


class SeparateRows(DecodingRows):
    """Every row with a cache of its own and one forward pass per row: works for any adapter, without any speed-up.

    Args:
        model: The `LlavakitForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._caches: dict[int, Any] = {}
        self._lengths: dict[int, int] = {}

    def insert(self, row: int, states: Any, length: int) -> None:
        self._caches[row], self._lengths[row] = copy.deepcopy(states), length

    def move(self, source: int, target: int) -> None:
        self._caches[target], self._lengths[target] = self._caches.pop(source), self._lengths.pop(source)

    def clear(self, row: int) -> None:
        self._caches.pop(row, None)

    def step(self, tokens: list[int]) -> Tensor:
        return torch.cat([self._one(row, token) for row, token in enumerate(tokens)])

    def _one(self, row: int, token: int) -> Tensor:
        self._lengths[row] += 1
        device = self.model.device
        output = self.model(
            input_ids=torch.tensor([[token]], device=device),
            attention_mask=torch.ones(1, self._lengths[row], dtype=torch.long, device=device),
            past_key_values=self._caches[row],
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
