"""Arrangements of tiled images and of videos: one map of all tiles, newlines, budgets, pooled frames.

Each layout exists twice, as counts (`layout`) and as tensors (`arrange`); both go through the same arithmetic of
`llavakit.views.tiles`. Tokens arrive projected. Sources: LLaVA-1.5's repository for v1.6 (spatial, spatial_unpad),
LLaVA-OneVision section 3 (budget, videos).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.connectors.base import Grid, tokens_in
from llavakit.errors import UserError
from llavakit.splice.layout import Arrangement, Run
from llavakit.views import tiles
from llavakit.views.plan import Plan

ROUNDINGS = ("int", "hf")
NEWLINES = ("one_token", "grid", "frame", "no_token")


def with_newlines(features: Tensor, newline: Tensor) -> Tensor:
    """A map [rows, cols, hidden] with the newline [hidden] after every row: [rows * (cols + 1), hidden]."""
    column = newline.to(features).expand(features.shape[0], 1, -1)
    return torch.cat([features, column], dim=1).flatten(0, 1)


class Spatial(Arrangement):
    """The base view, then the tiles of an image as one map in reading order.

    Args:
        unpad: Drop the map's padding and end every row of it with the newline.
        max_tiles: With `unpad`, shrink the map bilinearly to the tokens of this many tiles where it is more than 1.1
            times too long on a side (LLaVA-OneVision's `anyres_max_N`).
        rounding: "int" unpads like the published code, "hf" like transformers.
        maxpool: Halve the map by 2x2 maximum pooling instead; it then stays padded and gets no newlines.
        base: Whether the base view is kept.
        single_newline: With `unpad`, whether an image of one view ends with a newline.
    """

    unpad = False

    def __init__(
        self,
        *,
        unpad: bool | None = None,
        max_tiles: int | None = None,
        rounding: str = "int",
        maxpool: bool = False,
        base: bool = True,
        single_newline: bool = True,
    ) -> None:
        if rounding not in ROUNDINGS:
            raise UserError(f"rounding: must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
        self.unpad = type(self).unpad if unpad is None else unpad
        self.max_tiles, self.rounding, self.maxpool = max_tiles, rounding, maxpool
        self.base, self.single_newline = base, single_newline
        self.uses_newline = self.unpad

    def _map(self, plan: Plan, grids: Sequence[Grid]) -> tuple[int, int]:
        """Rows and columns of the map of all tiles.

        Raises:
            ValueError: If the views are not a base view and one tile per place of the plan's grid.
        """
        own = set(grids[1:])
        if len(grids) != 1 + plan.rows * plan.cols or len(own) != 1 or next(iter(own))[0] != 1:
            raise ValueError(
                f"tiles of {plan.rows} x {plan.cols} need one flat grid each beside the base's, got {grids}"
            )
        _, rows, cols = grids[1]
        return plan.rows * rows, plan.cols * cols

    def _window(self, plan: Plan, rows: int, cols: int) -> tuple[slice, slice]:
        return tiles.unpad((plan.size.width, plan.size.height), rows, cols, self.rounding)

    def _budget(self, rows: int, cols: int, grid: Grid) -> tuple[int, int]:
        return (rows, cols) if self.max_tiles is None else tiles.budgeted(rows, cols, tokens_in(grid), self.max_tiles)

    def map_size(self, plan: Plan, grids: Sequence[Grid]) -> tuple[int, int]:
        """Rows and columns of the map that is laid out after the base view, without newlines."""
        rows, cols = self._map(plan, grids)
        if self.maxpool:
            return rows // 2, cols // 2
        if not self.unpad:
            return rows, cols
        kept_rows, kept_cols = self._window(plan, rows, cols)
        return self._budget(len(range(rows)[kept_rows]), len(range(cols)[kept_cols]), grids[1])

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        if len(grids) == 1:
            return [Run(visual=tokens_in(grids[0]) + (self.unpad and self.single_newline))]
        rows, cols = self.map_size(plan, grids)
        newlines = rows if self.unpad and not self.maxpool else 0
        return [Run(visual=tokens_in(grids[0]) * self.base + rows * cols + newlines)]

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        if len(grids) == 1:
            return (
                torch.cat([tokens[0], newline.to(tokens[0])[None]]) if self.unpad and self.single_newline else tokens[0]
            )
        self._map(plan, grids)
        _, rows, cols = grids[1]
        joined = torch.stack(list(tokens[1:])).view(plan.rows, plan.cols, rows, cols, -1)
        joined = joined.transpose(1, 2).reshape(plan.rows * rows, plan.cols * cols, -1)
        if self.maxpool:
            joined = F.max_pool2d(joined.movedim(-1, 0), 2).movedim(0, -1)
        elif self.unpad:
            joined = joined[self._window(plan, *joined.shape[:2])]
            size = self._budget(*joined.shape[:2], grids[1])
            if size != tuple(joined.shape[:2]):
                joined = F.interpolate(joined.movedim(-1, 0)[None], size=size, mode="bilinear")[0].movedim(0, -1)
        body = with_newlines(joined, newline) if self.unpad and not self.maxpool else joined.flatten(0, 1)
        return torch.cat([tokens[0], body]) if self.base else body


class SpatialUnpad(Spatial):
    """`Spatial` with `unpad`: padding dropped, every row ended by the newline (v1.6, LLaVA-OneVision)."""

    unpad = True


# Videos


def pooled_size(rows: int, cols: int, mode: str, stride: int) -> tuple[int, int]:
    """Rows and columns after pooling: bilinear rounds up, average and max drop what is left over."""
    if mode == "bilinear":
        return -(-rows // stride), -(-cols // stride)
    return rows // stride, cols // stride


def pool(frames: Tensor, mode: str, stride: int) -> Tensor:
    """Pooled frames.

    Args:
        frames: [frames, rows, cols, hidden].
        mode: "bilinear" (align_corners false, no antialias), "average" or "max".
        stride: Factor per side.

    Returns:
        [frames, rows', cols', hidden], see `pooled_size`.
    """
    channels_first = frames.movedim(-1, 1)
    if mode == "bilinear":
        pooled = F.interpolate(channels_first, size=pooled_size(*frames.shape[1:3], mode, stride), mode="bilinear")
    elif mode == "average":
        pooled = F.avg_pool2d(channels_first, stride)
    else:
        pooled = F.max_pool2d(channels_first, stride)
    return pooled.movedim(1, -1)


def _pooling(options: dict[str, Any] | None) -> tuple[str, int] | None:
    if options is None:
        return None
    mode, stride = options.get("mode", "bilinear"), options.get("stride", 2)
    unknown = set(options) - {"mode", "stride"}
    if unknown or mode not in ("bilinear", "average", "max") or not isinstance(stride, int) or stride < 1:
        raise UserError(f"pool: {options!r}; write {{mode: bilinear | average | max, stride: 2}}")
    return mode, stride


class Frames(Arrangement):
    """Frames one after another, each pooled, with newlines where the checkpoint was trained with them.

    An entry with several layers (a video encoder's grid) counts as one frame per layer.

    Args:
        newline: "one_token" one at the very end, "grid" after every row of every frame, "frame" after every frame,
            "no_token" none.
        pool: `{"mode": "bilinear" | "average" | "max", "stride": 2}`, or None.
    """

    def __init__(self, *, newline: str = "no_token", pool: dict[str, Any] | None = None) -> None:
        if newline not in NEWLINES:
            raise UserError(f"newline: must be one of {', '.join(NEWLINES)}, not {newline!r}")
        self.newline, self.pool = newline, _pooling(pool)
        self.uses_newline = newline != "no_token"

    def _pooled(self, grid: Grid) -> Grid:
        return grid if self.pool is None else (grid[0], *pooled_size(grid[1], grid[2], *self.pool))

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        pooled = [self._pooled(grid) for grid in grids]
        newlines = {
            "one_token": 1,
            "grid": sum(depth * rows for depth, rows, _ in pooled),
            "frame": sum(depth for depth, _, _ in pooled),
            "no_token": 0,
        }[self.newline]
        return [Run(visual=sum(tokens_in(grid) for grid in pooled) + newlines)]

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        entries = []
        for grid, values in zip(grids, tokens, strict=True):
            frames = values.view(*grid, -1)
            frames = frames if self.pool is None else pool(frames, *self.pool)
            if self.newline == "grid":
                entries.append(with_newlines(frames.flatten(0, 1), newline))
            elif self.newline == "frame":
                entries.append(with_newlines(frames.flatten(1, 2), newline))
            else:
                entries.append(frames.flatten(0, 2))
        if self.newline == "one_token":
            entries.append(newline.to(entries[0])[None])
        return torch.cat(entries)


class FasterVideo(Arrangement):
    """Every n-th frame pooled by `pool.stride`, the frames between by twice that; rows and frames closed by marks.

    Every row ends with the newline, every frame with the frame mark (the published code's `add_faster_video`, as it
    was meant; no checkpoint was released with it).

    Args:
        every: Frames with a number that is a multiple of this are the detailed ones.
        pool: As for `Frames`.
    """

    uses_newline = True
    newline_vectors = 2

    def __init__(self, *, every: int = 10, pool: dict[str, Any] | None = None) -> None:
        self.every = every
        mode, stride = _pooling(pool or {})
        self.detailed, self.coarse = (mode, stride), (mode, stride * 2)

    def _frames(self, grids: Sequence[Grid]) -> list[tuple[int, int, tuple[str, int]]]:
        sizes = [(rows, cols) for depth, rows, cols in grids for _ in range(depth)]
        return [(*size, self.coarse if frame % self.every else self.detailed) for frame, size in enumerate(sizes)]

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        pooled = [pooled_size(rows, cols, *pooling) for rows, cols, pooling in self._frames(grids)]
        return [Run(visual=sum(rows * (cols + 1) + 1 for rows, cols in pooled))]

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        """As in the base class; `newline` [2, hidden] holds the newline and the frame mark."""
        row_end, frame_end = newline
        frames = [frame for grid, values in zip(grids, tokens, strict=True) for frame in values.view(*grid, -1)]
        parts = []
        for frame, (_, _, pooling) in zip(frames, self._frames(grids), strict=True):
            parts += [with_newlines(pool(frame[None], *pooling)[0], row_end), frame_end.to(frame)[None]]
        return torch.cat(parts)
