"""The connector: dual-perspective enhancement of the views' features, the mean with the whole view, and the MLP."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from llavakit.connectors.base import Features, Grid, Prompt, check_heads
from llavakit.connectors.general import MLP
from llavakit.errors import UserError
from llavakit.systems.inf_llava.cropping import merge_blocks, merge_interleaved, split_blocks, split_interleaved
from llavakit.views.plan import Plan

NOT_ATTENDED = -1e9  # score of a masked key; a query without any key attends to all alike


class CrossAttention(nn.Module):
    """Attention whose normalised output adds the *unprojected* query: LayerNorm(project(attended) + query).

    Args:
        width: Channels of queries, keys and values.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        check_heads("dual_perspective", width, heads)
        self.heads = heads
        first = nn.Linear(width, width)
        self.linears = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(3))])
        self.ln = nn.LayerNorm(width)

    def init_parameters(self) -> None:
        """The four projections start equal, as published."""
        for linear in self.linears[1:]:
            init.copy_(linear.weight, self.linears[0].weight)
            init.copy_(linear.bias, self.linears[0].bias)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        parts = zip(self.linears, (query, key, value), strict=False)
        return [linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear, x in parts]

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights [batch, heads, queries, keys]."""
        q, k, _ = self._heads(query, key, key)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(1) == 0, NOT_ATTENDED)
        return scores.softmax(-1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, queries, width].

        Args:
            query: [batch, queries, width].
            key, value: [batch, keys, width].
            mask: 0 where a query must not look [batch, queries, keys].
        """
        if mask is None:
            attended = F.scaled_dot_product_attention(*self._heads(query, key, value))
        else:
            attended = self.weights(query, key, mask) @ self._heads(query, key, value)[2]
        return self.ln(self.linears[3](attended.transpose(1, 2).flatten(2)) + query)


class DualEnhancement(nn.Module):
    """Blocks and interleaved pieces enhance each other; the result has the grid of one view.

    Each perspective is laid out as a map and cut again in the other's way, so that a group of one view's size attends
    to the same places of the other perspective: n * n groups instead of all pairs.

    Args:
        width: Channels of the features.
        crops: n.
        heads: Attention heads.
    """

    def __init__(self, width: int, crops: int = 3, heads: int = 8) -> None:
        super().__init__()
        self.crops = crops
        self.attention = CrossAttention(width, heads)
        self.ffn_crop, self.ffn_stride = (
            nn.Sequential(nn.Linear(width, width // 16), nn.GELU(), nn.Linear(width // 16, width // 2))
            for _ in range(2)
        )
        self.ln_fuse = nn.LayerNorm(width)

    def forward(self, local: Tensor, sampled: Tensor) -> Tensor:
        """[batch, rows, columns, width] from the features of blocks and of interleaved pieces.

        Args:
            local, sampled: [batch, n * n, rows, columns, width].
        """
        n, (rows, columns) = self.crops, local.shape[2:4]
        local_map, sampled_map = merge_blocks(local, n), merge_interleaved(sampled, n)
        enhanced_sampled = merge_blocks(self._attend(split_blocks(sampled_map, n), local), n)
        enhanced_local = merge_interleaved(self._attend(split_interleaved(local_map, n), sampled), n)
        fused = torch.cat([self.ffn_crop(enhanced_local), self.ffn_stride(enhanced_sampled)], dim=-1)
        fused = self.ln_fuse(fused + enhanced_sampled + enhanced_local)
        pooled = F.interpolate(fused.movedim(-1, 1).float(), size=(rows, columns), mode="bilinear")
        return pooled.movedim(1, -1).to(fused.dtype)

    def _attend(self, query: Tensor, key: Tensor) -> Tensor:
        """Every group of the query to the same group of the key, [batch, groups, rows, columns, width]."""
        flat = self.attention(*(x.flatten(2, 3).flatten(0, 1) for x in (query, key, key)))
        return flat.view(query.shape)


class DualPerspectiveMLP(MLP):
    """(whole view + enhancement of the two perspectives) / 2, then the MLP: as many tokens as one view has.

    Args:
        crops: n of the planner `dual_perspective`.
        heads: Attention heads of the enhancement.
        options: See `MLP`.
    """

    def __init__(self, *, vision_width: int, crops: int = 3, heads: int = 8, **options: Any) -> None:
        super().__init__(vision_width=vision_width, **options)
        self.crops = crops
        self.dem = DualEnhancement(vision_width, crops, heads)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        crops = options.get("crops", 3)
        if len(grids) != count_of(crops) or len(set(grids)) != 1:
            raise UserError(
                f"connector 'dual_perspective' with crops {crops} reads {count_of(crops)} views of one size, the "
                f"planner gives {len(grids)}; give both the same crops"
            )
        return [grids[0]]

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        n, count = self.crops**2, count_of(self.crops)
        enhanced: dict[int, Tensor] = {}
        grids: dict[int, Grid] = {}
        for entries, tokens, grid in features.groups():
            views = tokens.unflatten(0, (-1, count)).unflatten(2, grid[1:])  # [media, views, rows, columns, width]
            local, sampled = views[:, :n], views[:, n : 2 * n]
            whole = sampled[:, n // 2] if self.crops % 2 else views[:, -1]
            mixed = (whole + self.dem(local, sampled)) / 2
            own = [features.media_index[entry] for entry in entries[::count]]
            enhanced |= dict(zip(own, mixed.flatten(1, 2), strict=True))
            grids |= dict.fromkeys(own, grid)
        joined = Features.join(enhanced, [grids[number] for number in range(len(grids))], list(range(len(grids))))
        return super().forward(joined, plans)


def count_of(crops: int) -> int:
    """Views of one picture: both perspectives, and the whole where no interleaved piece equals it."""
    return 2 * crops**2 + (crops % 2 == 0)
