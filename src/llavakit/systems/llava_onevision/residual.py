"""The connector that the published code calls `mlpNx_resMx_gelu`; no released checkpoint uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llavakit.connectors.base import Features, Prompt
from llavakit.connectors.general import MLP
from llavakit.views.plan import Plan


class Residual(nn.Module):
    """LayerNorm, then its output plus an MLP of it. The sum starts from the normalised tokens, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        normed = self.pre_norm(tokens)
        return normed + self.proj(normed)


class ResidualMLP(MLP):
    """The `mlp` connector, then residual blocks of the language model's width.

    Args:
        blocks: Number of residual blocks.
    """

    def __init__(self, *, blocks: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.blocks = nn.ModuleList(Residual(self.hidden_size) for _ in range(blocks))

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        tokens = self.project(features.values)
        for block in self.blocks:
            tokens = block(tokens)
        return Features(tokens, features.grids, features.media_index)
