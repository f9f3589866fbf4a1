"""Rows: the decoder states of requests that are decoded together, one row each.

The engine schedules requests and decides which row holds which. What a row holds (keys and values, caches of unequal
length, weights made for one request) depends on how the decoder is run: a plain decoder's rows are
`llavakit.generation.rows.PlainRows`; a language adapter may define its own (`LanguageAdapter.rows`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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


def decode_given(
    make: Callable[..., DecodingRows], states: Any, length: int, replies: Sequence[Sequence[int]], together: int
) -> list[list[Tensor]]:
    """Logits [1, vocabulary] behind every token of given replies but the last.

    Token by token in rows, as the replies would have been generated: an adapter may treat a stretch of several tokens
    as something else, such as another turn of the user.

    Args:
        make: Gives rows, called with `rows`.
        states, length: Of the prompt, see `DecodingRows.insert`.
        together: Most replies in one step.
    """
    found: list[list[Tensor]] = [[] for _ in replies]
    longest_first = sorted(range(len(replies)), key=lambda number: -len(replies[number]))
    for begin in range(0, len(replies), together):
        group = longest_first[begin : begin + together]
        rows = make(rows=len(group))
        for row in range(len(group)):
            rows.insert(row, states, length)
        for step in range(len(replies[group[0]]) - 1):
            active = [number for number in group if step < len(replies[number]) - 1]
            logits = rows.step([int(replies[number][step]) for number in active])
            for number, own in zip(active, logits.split(1), strict=True):
                found[number].append(own)
    return found


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
