"""Attention pooling: learned queries over all tokens of an image, or of all slices of a volume (spec 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from llavakit.connectors.base import Features, Grid, Prompt, check_heads
from llavakit.connectors.general import MLP
from llavakit.views.plan import Plan


class AttentionPooling(MLP):
    """One cross-attention (no norm, residual or positions), then the MLP.

    All views of a media item are one sequence. As published the output does not depend on the order of tokens, so the
    depth of a slice is lost; `slices` mends that.

    Args:
        queries: Number of tokens of a media item.
        heads: Attention heads.
        slices: Number of slices with a learned embedding each; 0, as published, for none.
        options: Of the MLP.
    """

    def __init__(
        self, *, vision_width: int, queries: int = 256, heads: int = 8, slices: int = 0, **options: Any
    ) -> None:
        super().__init__(vision_width=vision_width, **options)
        check_heads("attention_pooling", vision_width, heads)
        self.query = nn.Parameter(torch.randn(queries, vision_width))
        self.attn = nn.MultiheadAttention(vision_width, heads, batch_first=True)
        self.slice_embedding = nn.Parameter(torch.zeros(slices, vision_width)) if slices else None

    def init_parameters(self) -> None:
        """Queries of unit variance, slice embeddings small."""
        init.normal_(self.query)
        if self.slice_embedding is not None:
            init.normal_(self.slice_embedding, std=0.02)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        return [(1, 1, options.get("queries", 256))]

    def pool(self, tokens: Tensor) -> Tensor:
        """[media, tokens, vision_width] to [media, queries, vision_width]."""
        query = self.query.expand(len(tokens), -1, -1)
        return self.attn(query, tokens, tokens, need_weights=False)[0]

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        parts = features.split()
        by_length: dict[int, list[int]] = {}
        media = []
        for number, entries in enumerate(features.by_media(len(plans))):
            own = [parts[entry] for entry in entries]
            if self.slice_embedding is not None and len(own) > 1:
                own = [part + self.slice_embedding[depth] for depth, part in enumerate(own)]
            media.append(torch.cat(own))
            by_length.setdefault(len(media[-1]), []).append(number)
        pooled: dict[int, Tensor] = {}
        for numbers in by_length.values():
            pooled |= dict(zip(numbers, self.pool(torch.stack([media[n] for n in numbers])), strict=True))
        values = self.project(torch.cat([pooled[number] for number in range(len(plans))]))
        count = self.query.shape[0]
        return Features(values, [(1, 1, count)] * len(plans), list(range(len(plans))))
