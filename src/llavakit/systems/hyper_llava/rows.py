"""Requests that are decoded together although each has weights of its own: one batched product per expert layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llavakit.errors import UserError
from llavakit.generation.cache import stack_layers
from llavakit.generation.rows import PlainRows
from llavakit.language.layers import run_layers
from llavakit.systems.hyper_llava.cache import ExpertCache


class ExpertRows(PlainRows):
    """Rows of `LanguageExperts`: keys and values as in a plain decoder, and the generated weights of every row.

    Args:
        model: The `LlavakitForConditionalGeneration`.
        states: Cache of the first request after prefill.
        size: `rows`, `max_rows` and `max_length` of `PlainRows`.
    """

    def __init__(self, model: Any, states: ExpertCache, **size: int) -> None:
        super().__init__(model, stack_layers(states), **size)
        self.adapter = self.core.language_adapter
        kind = self.core.language_model.config._attn_implementation
        if kind not in ("sdpa", "eager"):
            raise UserError(
                f"the engine needs attn_implementation 'sdpa' or 'eager', the model was loaded with {kind!r}"
            )
        like = states.weights[0]
        self.weights = like.new_zeros(len(states.weights), size["rows"], like.shape[1])

    def _reserve(self, rows: int) -> None:
        layers, held, width = self.weights.shape
        if rows > held:
            grown = self.weights.new_zeros(layers, max(rows, 2 * held), width)
            grown[:, :held] = self.weights
            self.weights = grown

    def insert(self, row: int, states: ExpertCache, length: int) -> None:
        super().insert(row, stack_layers(states), length)
        self._reserve(row + 1)
        self.weights[:, row] = torch.cat(states.weights)

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        self._reserve(target + 1)
        self.weights[:, target] = self.weights[:, source]

    def clear(self, row: int) -> None:
        super().clear(row)
        self.weights[:, row] = 0

    def run(self, embeds: Tensor, masks: Any, positions: Tensor) -> Tensor:
        decoder, adapter = self.core.language_model, self.adapter
        layers = decoder.layers[: decoder.config.num_hidden_layers]
        own = list(self.weights[:, : len(embeds)])
        hidden = embeds
        for start, stop in ((0, adapter.first), (adapter.first, adapter.end), (adapter.end, len(layers))):
            expert = start == adapter.first and stop == adapter.end
            inside = {"mlp_add": adapter.add(own), "mlp_inputs": [(one,) for one in own]} if expert else {}
            part = layers[start:stop]
            hidden = run_layers(
                part, hidden, decoder.rotary_emb, positions, attention_mask=masks, cache=self.cache, **inside
            )
        return decoder.norm(hidden)
