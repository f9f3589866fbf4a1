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

POOL_SHAPES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))  # columns, rows


def pool_shape(rows: int, cols: int) -> tuple[int, int]:
    """(rows, columns) of the points that a region is read at: the shape nearest to the map's in log ratio."""
    wanted = math.log(cols / rows)
    best = min(POOL_SHAPES, key=lambda shape: abs(wanted - math.log(shape[0] / shape[1])))
    return best[1], best[0]


def axis_weights(cells: int, regions: int, points: int) -> Tensor:
    """RoIAlign along one axis: weights [regions, points, cells] of the cells that every point averages.

    Regions divide the axis evenly. As in torchvision's `roi_align` with `aligned=False`, `sampling_ratio=-1`: a region
    is at least one cell long, cell centres lie at whole numbers, and a point is the mean of ceil(length / points)
    samples.
    """
    weights = torch.zeros(regions, points, cells)
    for region in range(regions):
        start, end = region * cells / regions, (region + 1) * cells / regions
        length = max(end - start, 1.0)
        samples = math.ceil(length / points)
        for point in range(points):
            for sample in range(samples):
                place = start + (point + (sample + 0.5) / samples) * length / points
                if place > cells:
                    continue
                low = int(max(place, 0.0))
                if low >= cells - 1:
                    weights[region, point, cells - 1] += 1 / samples
                else:
                    share = max(place, 0.0) - low
                    weights[region, point, low] += (1 - share) / samples
                    weights[region, point, low + 1] += share / samples
    return weights


@functools.lru_cache(maxsize=64)
def region_weights(rows: int, cols: int, side: int) -> Tensor:
    """Weights [side x side regions, points, rows x cols] of all regions of a map."""
    high, wide = pool_shape(rows, cols)
    vertical, horizontal = axis_weights(rows, side, high), axis_weights(cols, side, wide)
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
