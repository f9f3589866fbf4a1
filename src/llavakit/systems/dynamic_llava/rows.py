"""Requests that are decoded together although each keeps another number of tokens in its upper layers.

Below the sparse layer every row keeps all positions, from there on only those that the predictors kept. Both parts are
rows of unequal length; a new token takes part in attention everywhere and stays in the upper part, or is overwritten
by the next one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from llavakit.generation.cache import RowCache
from llavakit.language.layers import run_layers
from llavakit.language.rows import DecodingRows
from llavakit.systems.dynamic_llava.cache import SelectiveCache
from llavakit.systems.dynamic_llava.decisions import threshold_keep


class SparseRows(DecodingRows):
    """Rows of `DynamicSparsification`.

    Args:
        model: The `LlavakitForConditionalGeneration`.
        states: Cache of the first request after prefill.
        size: `rows`, `max_rows` and `max_length` of a `RowCache`.
    """

    def __init__(self, model: Any, states: SelectiveCache, **size: int) -> None:
        self.core, self.head = model.model, model.lm_head
        self.adapter = self.core.language_adapter
        lower, upper = parts(states)
        self.lower, self.upper = RowCache(lower, **size), RowCache(upper, **size)
        self.cache = Cache(layers=[*self.lower.layers, *self.upper.layers])

    def insert(self, row: int, states: SelectiveCache, length: int) -> None:
        for rows, part in zip((self.lower, self.upper), parts(states), strict=True):
            rows.insert(row, part)
        if not self.lower.layers:  # nothing below the sparse layer says how long the prompt was
            self.lower.set_length(row, length)

    def move(self, source: int, target: int) -> None:
        self.lower.move(source, target)
        self.upper.move(source, target)

    def clear(self, row: int) -> None:
        self.lower.clear(row)
        self.upper.clear(row)

    def step(self, tokens: list[int]) -> Tensor:
        active, decoder, sparse = len(tokens), self.core.language_model, self.adapter.sparse_layer
        layers = decoder.layers[: decoder.config.num_hidden_layers]
        self.lower.begin_step(active)
        self.upper.begin_step(active)
        positions = self.lower.position_ids
        hidden = self.core.embed_ids(torch.tensor(tokens, device=self.core.device).unsqueeze(-1))
        hidden = run_layers(
            layers[:sparse],
            hidden,
            decoder.rotary_emb,
            positions,
            attention_mask=self.lower.mask,
            cache=self.cache,
        )
        kept = None
        if self.adapter.prunes_answers:
            kept = threshold_keep(self.adapter.text_predictor(hidden))[:, 0].tolist()
        hidden = run_layers(
            layers[sparse:],
            hidden,
            decoder.rotary_emb,
            positions,
            attention_mask=self.upper.mask,
            cache=self.cache,
        )
        self.lower.end_step(active)
        self.upper.end_step(active, kept)
        return self.head(decoder.norm(hidden)[:, -1])


def parts(states: SelectiveCache) -> tuple[Tensor, Tensor]:
    """States below and from the sparse layer on, [layers, 2, kv heads, entries, head size] each."""
    lower = [(layer.keys, layer.values) for layer in states.layers[: states.sparse_layer]]
    upper = [(layer.keys, layer.values) for layer in states.selective]
    like = (upper or lower)[0][0]
    return _stacked(lower, like), _stacked(upper, like)


def _stacked(layers: list[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    if not layers:
        _, heads, _, size = like.shape
        return like.new_zeros(0, 2, heads, 0, size)
    return torch.stack([torch.stack(pair).squeeze(1) for pair in layers])
