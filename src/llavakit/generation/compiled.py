"""One decoding step as a compiled graph over rows of fixed size.

Meant for one conversation decoded over and over (a chat, a benchmark of one request at a time): compilation takes
from half a minute to minutes, then every token costs less. Shapes never change: all rows are computed at every
step and attention looks at the whole capacity, so choose `max_batch` and `max_length` of the engine as small as the
use allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llavakit.generation.cache import RowCache


def compiled_step(
    decoder: Any, head: Callable[[Tensor], Tensor], cache: RowCache
) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """Compile decoder and head for one more token per row of a fixed cache.

    Args:
        decoder: The base model without head.
        cache: Rows that were allocated with `fixed`.

    Returns:
        A function of the tokens' embeddings [rows, 1, hidden], the masks and the positions [rows, 1] that gives
        logits [rows, vocabulary]; compiled at its first call.
    """
    if not cache.fixed:
        raise ValueError("a compiled step needs rows of fixed size")

    def step(inputs_embeds: Tensor, masks: Any, position_ids: Tensor) -> Tensor:
        hidden = decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return head(hidden[:, -1])

    return torch.compile(step, fullgraph=True, dynamic=False)
