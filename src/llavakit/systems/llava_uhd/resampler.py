"""The spatially constrained resampler of the released checkpoint (LLaVA-UHD sections 3.4 and 3.6).

A query sees only its own region of the feature map, read by RoIAlign at a few points. The points depend on the
grid alone, so reading them is one matrix per grid.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from llavakit.connectors.general import Resampler
from llavakit.vision.roi_align import axis_weights

POOL_SHAPES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))  # columns, rows


def pool_shape(rows: int, cols: int) -> tuple[int, int]:
    """(rows, columns) of the points that a region is read at: the shape nearest to the map's in log ratio."""
    wanted = math.log(cols / rows)
    best = min(POOL_SHAPES, key=lambda shape: abs(wanted - math.log(shape[0] / shape[1])))
    return best[1], best[0]


def even_weights(cells: int, regions: int, points: int) -> Tensor:
    """RoIAlign along one axis that `regions` divide evenly, [regions, points, cells]."""
    edges = torch.arange(regions + 1) * cells / regions
    return axis_weights(edges[:-1], edges[1:], points, cells)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept after an answer is used in training and attacks, too
def region_weights(rows: int, cols: int, side: int) -> Tensor:
    """Weights [side x side regions, points, rows x cols] of all regions of a map."""
    high, wide = pool_shape(rows, cols)
    vertical, horizontal = even_weights(rows, side, high), even_weights(cols, side, wide)
    whole = torch.einsum("ray,cbx->rcabyx", vertical, horizontal)
    return whole.reshape(side * side, high * wide, rows * cols)


class SpatialResampler(Resampler):
    """`Resampler` whose query number (r, c) attends only to region (r, c) of the view's features."""

    def attend(self, values: Tensor, keys: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        weights = region_weights(*grid, self.side).to(values)
        regions, points, _ = weights.shape
        read = weights.flatten(0, 1)
        local_keys, local_values = ((read @ x).unflatten(1, (regions, points)).flatten(0, 1) for x in (keys, values))
        query = self.ln_q(self.query) + self.positions.to(self.query)
        query = query.expand(len(values), -1, -1).flatten(0, 1).unsqueeze(1)
        out, _ = self.attn(query, local_keys, local_values, need_weights=False)
        return out.view(len(values), regions, -1)
