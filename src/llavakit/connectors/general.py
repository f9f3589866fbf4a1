"""The connectors that more than one system uses: mlp (linear), pooling, resampler.

Parameter names follow transformers' LLaVA (`linear_1`, `linear_2`), so plain checkpoints need no renaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from llavakit.connectors.base import Connector, Features, Grid, Prompt, check_heads
from llavakit.errors import UserError
from llavakit.views.plan import Plan


class MLP(Connector):
    """Linear, then `depth - 1` times (activation, Linear), on every token (LLaVA-1.5 section 3.3).

    Args:
        depth: Number of linear layers; 1 is the linear connector of the first LLaVA, 0 the identity.
        act: Activation; "gelu" is the exact (erf) form.
        bias: Whether the layers have a bias.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        hidden_size: int,
        text_config: Any = None,
        depth: int = 2,
        act: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        if depth == 0 and vision_width != hidden_size:
            raise UserError(f"connector 'mlp' with depth 0 needs equal widths, got {vision_width} and {hidden_size}")
        self.depth = depth
        for number in range(1, depth + 1):
            width = vision_width if number == 1 else hidden_size
            self.add_module(f"linear_{number}", nn.Linear(width, hidden_size, bias=bias))
        self.act = ACT2FN[act]

    def start_at(self, vector: Tensor) -> None:
        if not self.depth or self.get_submodule(f"linear_{self.depth}").bias is None:
            raise UserError("connector 'mlp' without a last layer that has a bias cannot start at one vector")
        last = self.get_submodule(f"linear_{self.depth}")
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(vector)

    def project(self, tokens: Tensor) -> Tensor:
        """[..., vision_width] to [..., hidden_size]."""
        for number in range(1, self.depth + 1):
            tokens = self.get_submodule(f"linear_{number}")(self.act(tokens) if number > 1 else tokens)
        return tokens

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        return Features(self.project(features.values), features.grids, features.media_index)


class Pooling(MLP):
    """Average pooling of the grid, then the MLP.

    Args:
        stride: Cells that are averaged along (depth, rows, columns), or one number for rows and columns; what is
            left over at the far edges is dropped.
    """

    def __init__(self, *, stride: int | Sequence[int] = 2, **options: Any) -> None:
        super().__init__(**options)
        self.stride = _triple(stride)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        return [_pooled(grid, _triple(options.get("stride", 2))) for grid in grids]

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        pooled: dict[int, Tensor] = {}
        for entries, tokens, grid in features.groups():
            maps = tokens.transpose(1, 2).unflatten(2, grid)
            stride = tuple(min(s, g) for s, g in zip(self.stride, grid, strict=True))
            # PyTorch averages no 16-bit volumes on a CPU.
            wide = maps.float() if maps.element_size() < 4 else maps
            tokens = F.avg_pool3d(wide, stride, stride).to(maps.dtype).flatten(2).transpose(1, 2)
            pooled |= dict(zip(entries, tokens, strict=True))
        grids = [_pooled(grid, self.stride) for grid in features.grids]
        joined = Features.join(pooled, grids, features.media_index)
        return super().forward(joined, plans)


def _triple(stride: int | Sequence[int]) -> tuple[int, int, int]:
    return (1, stride, stride) if isinstance(stride, int) else tuple(stride)


def _pooled(grid: Grid, stride: tuple[int, int, int]) -> Grid:
    return tuple(max(cells // step, 1) for cells, step in zip(grid, stride, strict=True))


def sincos_table(rows: int, cols: int, width: int) -> Tensor:
    """Fixed 2D positions [rows x cols, width], float32.

    The first half of the channels encodes the column, the second half the row; each half is sines, then cosines,
    with frequencies 10000^(-k / (width / 4)).
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float32) / (width / 4.0))

    def encode(positions: Tensor) -> Tensor:
        angles = positions[:, None].float() * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.cat([encode(col.flatten()), encode(row.flatten())], dim=1)


class Resampler(Connector):
    """Learned queries attend to all features of a view: a fixed number of tokens whatever the view's size.

    Queries sit on a square grid with fixed sine-cosine positions; the keys of a view get the same table, resized to
    the view's own grid, so that views of any aspect ratio work. Queries and inputs are normalised, the output is
    normalised and projected; there is no residual and no MLP (Qwen-VL's resampler, LLaVA-UHD section 3.3).

    Args:
        queries: Number of tokens per view; a square number.
        heads: Attention heads.
    """

    def __init__(
        self, *, vision_width: int, hidden_size: int, text_config: Any = None, queries: int = 64, heads: int = 8
    ) -> None:
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        self.side = _side(queries)
        self.query = nn.Parameter(torch.zeros(queries, hidden_size))
        same = vision_width == hidden_size
        self.kv_proj = nn.Identity() if same else nn.Linear(vision_width, hidden_size, bias=False)
        check_heads("resampler", hidden_size, heads)
        self.attn = nn.MultiheadAttention(hidden_size, heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(hidden_size, eps=1e-6) for _ in range(3))
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def init_parameters(self) -> None:
        """Queries small, the output projection of unit gain."""
        init.trunc_normal_(self.query, std=0.02)
        init.normal_(self.proj.weight, std=self.hidden_size**-0.5)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        side = _side(options.get("queries", 64))
        return [(1, side, side) for _ in grids]

    @property
    def positions(self) -> Tensor:
        """The fixed table of the queries [queries, hidden]."""
        return sincos_table(self.side, self.side, self.hidden_size)

    def key_positions(self, rows: int, cols: int) -> Tensor:
        """The queries' table resized to a grid of features [rows x cols, hidden]."""
        if (rows, cols) == (self.side, self.side):
            return self.positions
        table = self.positions.T.reshape(1, -1, self.side, self.side)
        return F.interpolate(table, size=(rows, cols), mode="bicubic").flatten(2)[0].T

    def attend(self, values: Tensor, keys: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Queries over the features of views of one grid, [views, queries, hidden].

        Args:
            values, keys: [views, rows x cols, hidden]; keys hold positions.
            mask: True at keys that a query must not see [queries, rows x cols].
        """
        query = self.ln_q(self.query) + self.positions.to(self.query)
        out, _ = self.attn(query.expand(len(values), -1, -1), keys, values, need_weights=False, attn_mask=mask)
        return out

    def resample(self, tokens: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """[views, tokens, vision_width] of one grid to [views, queries, hidden]."""
        rows, cols = grid[0] * grid[1], grid[2]
        values = self.ln_kv(self.kv_proj(tokens))
        keys = values + self.key_positions(rows, cols).to(values)
        return self.proj(self.ln_post(self.attend(values, keys, (rows, cols), mask)))

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        resampled: dict[int, Tensor] = {}
        for entries, tokens, grid in features.groups():
            resampled |= dict(zip(entries, self.resample(tokens, grid), strict=True))
        return Features.join(resampled, [(1, self.side, self.side)] * len(features.grids), features.media_index)


def _side(queries: int) -> int:
    side = round(queries**0.5)
    if side * side != queries:
        raise UserError(f"connector 'resampler': queries must be a square number, got {queries}")
    return side
