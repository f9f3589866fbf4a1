"""The connector: low and high features fused without more tokens, then one token per box (spec sections 3.2 to 3.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from llavakit.connectors.base import Connector, Features, Grid, Prompt, tokens_in
from llavakit.connectors.general import MLP
from llavakit.errors import UserError
from llavakit.systems.mg_llava.views import HIGH, LOW
from llavakit.views.plan import Plan

VARIANTS = ("add", "concat_gated", "concat", "concat_raw")


class ConvGate(nn.Module):
    """Features of two encoders on one grid as one map.

    The high features go through two 1 x 1 convolutions to the low width, the low ones through a depthwise and a 1 x 1
    convolution with a residual; a gate made of the means of both, one number per picture, scales the high ones.

    Args:
        low, high: Channels of the encoders.
        variant: "add" adds the gated high features to the low ones, as released; "concat_gated" lays them side by
            side; "concat" does so without a gate; "concat_raw" lays the encoders' features side by side as they are.
    """

    def __init__(self, low: int, high: int, variant: str = "add") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise UserError(f"variant: must be one of {', '.join(VARIANTS)}, not {variant!r}")
        self.variant = variant
        self.width = {"add": low, "concat_raw": low + high}.get(variant, 2 * low)
        if variant == "concat_raw":
            return
        self.slow_conv, self.slow_proj = nn.Conv2d(high, high, 1), nn.Conv2d(high, low, 1)
        self.fast_conv, self.fast_proj = nn.Conv2d(low, low, 7, padding=3, groups=low), nn.Conv2d(low, low, 1)
        if variant != "concat":
            self.gate = nn.Sequential(nn.Linear(2 * low, low // 2), nn.GELU(), nn.Linear(low // 2, 1))

    def init_parameters(self) -> None:
        """The projections start at zero, so that the result is that of the low encoder alone."""
        if self.variant == "concat_raw":
            return
        for conv in (self.slow_conv, self.fast_conv):
            init.xavier_uniform_(conv.weight)
        for conv in (self.slow_proj, self.fast_proj):
            init.zeros_(conv.weight)
        for conv in (self.slow_conv, self.fast_conv, self.slow_proj, self.fast_proj):
            init.zeros_(conv.bias)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """[batch, tokens, width].

        Args:
            low: [batch, low, rows, columns].
            high: [batch, high, rows, columns].
        """
        if self.variant == "concat_raw":
            return torch.cat([low, high], dim=1).flatten(2).transpose(1, 2)
        high = self.slow_proj(F.gelu(self.slow_conv(high))).flatten(2).transpose(1, 2)
        low = (low + self.fast_proj(F.gelu(self.fast_conv(low)))).flatten(2).transpose(1, 2)
        if self.variant != "concat":
            means = torch.cat([low, high], dim=-1).mean(dim=1, keepdim=True)
            high = self.gate(means).tanh() * high
        return low + high if self.variant == "add" else torch.cat([low, high], dim=-1)


class ObjectProjector(nn.Module):
    """Vectors of regions to tokens: two layers, behind one linear layer per stage if `levels` are given.

    Args:
        width: Channels of a region's vector.
        hidden_size: Width of the language model.
        levels: Channels of the stages in the vector; each goes through a layer of its own to `level_width`, and the
            results are added.
    """

    def __init__(
        self, width: int, hidden_size: int, levels: Sequence[int] | None = None, level_width: int = 1024
    ) -> None:
        super().__init__()
        if levels is not None and sum(levels) != width:
            raise UserError(f"levels: {list(levels)} are {sum(levels)} channels, the regions' vectors have {width}")
        self.channels = list(levels or ())
        self.levels = nn.ModuleList(nn.Linear(own, level_width) for own in self.channels)
        self.mlp = MLP(vision_width=level_width if self.channels else width, hidden_size=hidden_size)

    def forward(self, vectors: Tensor) -> Tensor:
        """[regions, width] to [regions, hidden_size]."""
        if self.channels:
            parts = vectors.split(self.channels, dim=-1)
            vectors = sum(level(part) for level, part in zip(self.levels, parts, strict=True))
        return self.mlp.project(vectors)


class ConvGateMLP(Connector):
    """`ConvGate` and an MLP on the tokens of the low view, then one token per region of the high view.

    Args:
        variant: See `ConvGate`.
        levels, level_width: See `ObjectProjector`.
    """

    encoders = 2

    def __init__(
        self,
        *,
        vision_width: tuple[int, int],
        region_width: tuple[int, int],
        hidden_size: int,
        text_config: Any = None,
        variant: str = "add",
        levels: Sequence[int] | None = None,
        level_width: int = 1024,
    ) -> None:
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        self.fuse = ConvGate(*vision_width, variant)
        self.mlp = MLP(vision_width=self.fuse.width, hidden_size=hidden_size)
        self.objects = ObjectProjector(region_width[HIGH], hidden_size, levels, level_width)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        low = [grid for view, grid in zip(plan.views, grids, strict=True) if view.encoder == LOW]
        high = [grid for view, grid in zip(plan.views, grids, strict=True) if view.encoder == HIGH]
        if len(low) != 1 or len(high) != 1:
            raise UserError(
                f"connector 'conv_gate' reads one low and one high view, the planner gives {len(low)} and {len(high)}; "
                "use the planner 'low_and_high'"
            )
        if low != high:
            raise UserError(
                f"connector 'conv_gate' needs both encoders on one grid, they have {low[0][1]} x {low[0][2]} and "
                f"{high[0][1]} x {high[0][2]} features; change size or low_size of the planner"
            )
        objects = [(1, 1, len(view.regions)) for view in plan.views if view.encoder == HIGH]
        return [*low, *(grid for grid in objects if tokens_in(grid))]

    def forward(
        self, features: tuple[Features, Features], plans: Sequence[Plan], prompt: Prompt | None = None
    ) -> Features:
        low, high = features
        fused: dict[int, Tensor] = {}
        details = high.split()
        for entries, tokens, grid in low.groups():
            maps = [
                x.transpose(1, 2).unflatten(2, grid[1:]) for x in (tokens, torch.stack([details[n] for n in entries]))
            ]
            fused |= dict(zip(entries, self.mlp.project(self.fuse(*maps)), strict=True))
        parts: dict[int, Tensor] = {}
        grids: list[Grid] = []
        media_index: list[int] = []
        boxes = high.regions or [None] * len(high.grids)
        for number, vectors in enumerate(boxes):
            parts[len(grids)] = fused[number]
            grids.append(low.grids[number])
            if vectors is not None and len(vectors):
                parts[len(grids)] = self.objects(vectors)
                grids.append((1, 1, len(vectors)))
            media_index += [number] * (len(grids) - len(media_index))
        return Features.join(parts, grids, media_index)
