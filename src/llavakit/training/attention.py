"""Attention for packed rows on CPUs: every sample attends to itself, and nothing else is computed.

transformers' SDPA path gives packed rows a full mask, so a row costs as much as one long sample. FlashAttention
solves that on GPUs; here the samples of a row go through SDPA's causal kernel one by one. `switch_on` makes a model
use it, `segments_of` finds the samples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llavakit_packed"
_packed: ContextVar[bool] = ContextVar("packed", default=False)


def segments_of(position_ids: Tensor) -> list[list[int]]:
    """Where samples begin and end: per row the positions at which `position_ids` [rows, length] starts again.

    The first number of every row is 0, the last its length.
    """
    length = position_ids.shape[1]
    starts = torch.diff(position_ids, dim=1) != 1
    return [[0, *(torch.nonzero(row).squeeze(-1) + 1).tolist(), length] for row in starts]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_segments: list[list[int]] | None = None,
    packed_forks: Sequence[Fork] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[rows, heads, length, width] to [rows, length, heads, width]."""
    if packed_forks is not None:
        return _attend_forks(query, key, value, packed_forks, dropout, scaling), None
    if packed_segments is None:
        if _packed.get():
            raise NotImplementedError(f"{type(module).__name__} does not hand packed segments to its attention")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    options = {"dropout_p": dropout, "scale": scaling, "is_causal": True, "enable_gqa": key.shape[1] != query.shape[1]}
    rows = []
    for row, bounds in enumerate(packed_segments):
        sizes = [end - begin for begin, end in pairwise(bounds)]
        parts = (tensor[row : row + 1].split(sizes, dim=2) for tensor in (query, key, value))
        rows.append(torch.cat([F.scaled_dot_product_attention(*own, **options) for own in zip(*parts, strict=True)], 2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


class Fork(NamedTuple):
    """Two continuations of one prefix, side by side in a row: prefix, first, second.

    Attributes:
        begin: Where the prefix begins.
        prefix: Where it ends and the first continuation begins.
        first: Where that ends and the second begins, which does not see it.
        end: Where the second ends.
    """

    begin: int
    prefix: int
    first: int
    end: int


def _attend_forks(
    query: Tensor, key: Tensor, value: Tensor, forks: Sequence[Fork], dropout: float, scaling: float | None
) -> Tensor:
    """One row of forks; the prefix of each is computed once."""
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    parts = []
    for begin, prefix, first, end in forks:
        own = [tensor[:, :, begin:first] for tensor in (query, key, value)]
        parts.append(F.scaled_dot_product_attention(*own, is_causal=True, **options))
        seen = [torch.cat([t[:, :, begin:prefix], t[:, :, first:end]], dim=2) for t in (key, value)]
        shape = (end - first, prefix - begin + end - first)
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(prefix - begin)
        parts.append(F.scaled_dot_product_attention(query[:, :, first:end], *seen, attn_mask=mask, **options))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def packed_attention() -> Iterator[None]:
    """While the rows of a forward pass are packed."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def switch_on(model: nn.Module) -> bool:
    """Let the decoder of a model use it, if it can; returns whether it does.

    It can if it runs on a CPU through SDPA, without a language adapter, and its layers hand options down to their
    attention, which a try on two tokens shows.
    """
    decoder = model.model.language_model
    if decoder.config._attn_implementation == NAME:
        return True
    if model.model.language_adapter is not None or decoder.config._attn_implementation != "sdpa":
        return False
    if next(decoder.parameters()).device.type != "cpu" or getattr(decoder.config, "sliding_window", None):
        return False
    decoder.set_attn_implementation(NAME)
    embeds = torch.zeros(1, 2, decoder.config.hidden_size, dtype=decoder.dtype)
    try:
        with torch.no_grad(), packed_attention():
            decoder(
                inputs_embeds=embeds,
                position_ids=torch.zeros(1, 2, dtype=torch.long),
                packed_segments=[[0, 1, 2]],
                use_cache=False,
            )
    except (NotImplementedError, TypeError):
        decoder.set_attn_implementation("sdpa")
        return False
    return True
