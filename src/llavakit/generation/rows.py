"""Rows of a plain decoder: one `RowCache`, one forward pass for all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llavakit.errors import UserError
from llavakit.generation.cache import RowCache
from llavakit.generation.compiled import compiled_step
from llavakit.generation.lean import LeanDecoder, product
from llavakit.language.rows import DecodingRows


class PlainRows(DecodingRows):
    """Requests on a decoder without adapter.

    Args:
        model: The `LlavakitForConditionalGeneration`.
        states: States of the first request, see `llavakit.generation.cache.stack_layers`.
        rows: Rows to begin with.
        max_rows, max_length: Most rows, and most positions of one.
        expected: Positions that rows will probably get to.
        compile: Decode with a compiled graph over all rows.
    """

    def __init__(
        self,
        model: Any,
        states: Tensor,
        *,
        rows: int,
        max_rows: int,
        max_length: int,
        expected: int = 0,
        compile: bool = False,
    ) -> None:
        self.core, self.head = model.model, model.lm_head
        config = self.core.config.text_config
        self.window = sliding_window(config)
        self.mixed = len(set(getattr(config, "layer_types", None) or ())) > 1
        self.cache = RowCache(
            states,
            rows=rows,
            max_rows=max_rows,
            max_length=max_length,
            expected=expected,
            window=self.window,
            fixed=compile,
        )
        decoder = self.core.language_model
        self.compiled = compiled_step(decoder, self.head, self.cache) if compile else None
        self.lean = LeanDecoder(decoder) if not compile and LeanDecoder.fits(decoder) else None

    def insert(self, row: int, states: Tensor, length: int) -> None:
        self.cache.insert(row, states)

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)

    def clear(self, row: int) -> None:
        self.cache.clear(row)

    def read(self, row: int, length: int | None = None) -> Tensor:
        return self.cache.read(row, length)

    def step(self, tokens: list[int]) -> Tensor:
        cache = self.cache
        cache.begin_step(len(tokens))
        padded = tokens + [0] * (cache.rows - len(tokens))  # fixed rows are computed whether they are in use or not
        embeds = self.core.embed_ids(torch.tensor(padded, device=self.core.device).unsqueeze(-1))
        positions = cache.position_ids
        if self.compiled is not None:
            logits = self.compiled(embeds, self._masks(), positions)[: len(tokens)]
        else:
            logits = product(self.head, self.run(embeds, self._masks(), positions)[:, -1]).contiguous()
        cache.end_step(len(tokens))
        return logits

    def run(self, embeds: Tensor, masks: Any, positions: Tensor) -> Tensor:
        """The decoder on one new token per row: [rows, 1, hidden] to hidden states behind the last norm.

        Args:
            masks: Additive mask [rows, 1, 1, width], or one for every kind of layer.
            positions: [rows, 1].
        """
        if self.lean is not None:
            return self.lean(embeds, positions, self.cache).unsqueeze(1)
        return self.core.language_model(
            inputs_embeds=embeds,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _masks(self) -> Any:
        if self.mixed:
            return {"full_attention": self.cache.mask, "sliding_attention": self.cache.window_mask}
        return self.cache.window_mask if self.window is not None else self.cache.mask


def sliding_window(text_config: Any) -> int | None:
    """Window of a decoder's sliding layers, None if it has none.

    Raises:
        UserError: If it has layers that rows cannot hold.
    """
    kinds = set(getattr(text_config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"the engine cannot run decoder layers of type {', '.join(sorted(unknown))}; use generate")
    window = getattr(text_config, "sliding_window", None)
    return window if not kinds or "sliding_attention" in kinds else None
