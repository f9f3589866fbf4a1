"""RoIAlign: features of rectangular regions of a map, read at interpolated points.

Equal to torchvision's `roi_align` with its defaults `aligned=False, sampling_ratio=-1`, without torchvision. Bilinear
interpolation is separable, so a region is two small matrices, one per axis, instead of a loop over sample points.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def axis_weights(starts: Tensor, ends: Tensor, bins: int, cells: int) -> Tensor:
    """Weights [regions, bins, cells] with which every bin of a region averages the cells of one axis.

    A region is at least one cell long. Cell centres lie at whole numbers. A bin is the mean of ceil(length / bins)
    samples; a sample more than one cell outside the axis counts as zero, and one within a cell of it is clamped.

    Args:
        starts, ends: [regions], in cells.
    """
    lengths = (ends - starts).clamp(min=1.0)
    samples = (lengths / bins).ceil().long()  # per bin
    most = int(samples.max()) if len(samples) else 1
    sample = torch.arange(most, device=starts.device)
    used = sample < samples[:, None]  # [regions, most]
    step = lengths / bins
    within = (sample + 0.5) * step[:, None] / samples[:, None]  # [regions, most]
    begins = starts[:, None] + torch.arange(bins, device=starts.device) * step[:, None]  # [regions, bins]
    places = begins[..., None] + within[:, None]  # rounded in torchvision's order: samples may lie on the edge
    inside = (places >= -1.0) & (places <= cells) & used[:, None]
    places = places.clamp(min=0.0)
    low = places.floor().long()
    share = torch.where(low >= cells - 1, 0.0, places - low)
    low = low.clamp(max=cells - 1)
    high = (low + 1).clamp(max=cells - 1)
    value = inside / samples[:, None, None]
    weights = starts.new_zeros(*low.shape[:2], cells)
    weights.scatter_add_(2, low, value * (1 - share))
    return weights.scatter_add_(2, high, value * share)


def roi_align(features: Tensor, boxes: Tensor, output_size: int | tuple[int, int], spatial_scale: float) -> Tensor:
    """Features of regions of one map, [regions, channels, rows, columns] in float32.

    Args:
        features: [channels, height, width].
        boxes: [regions, 4]: left, top, right, bottom.
        output_size: Rows and columns that every region is read at.
        spatial_scale: Cells of the map per unit of the boxes.
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    vertical, horizontal = _weights(features, boxes, rows, columns, spatial_scale)
    read = torch.einsum("nyh,chw->ncyw", vertical, features.float())
    return torch.einsum("ncyw,nxw->ncyx", read, horizontal)


def roi_mean(features: Tensor, boxes: Tensor, bins: int, spatial_scale: float) -> Tensor:
    """Mean of `roi_align` over its `bins` x `bins` points, [regions, channels], without forming the points.

    Args:
        features, boxes, spatial_scale: See `roi_align`.
    """
    vertical, horizontal = (w.mean(1) for w in _weights(features, boxes, bins, bins, spatial_scale))
    return torch.einsum("nh,chw,nw->nc", vertical, features.float(), horizontal)


class PyramidReader:
    """`roi_mean` of several maps of one picture, resized to the first one's cells and laid side by side on channels.

    Equal to the mean over the map that is made by resizing all of them (bilinear, `align_corners=False`) and
    concatenating them, without ever forming it: resizing is separable too, so it goes into the regions' weights. Maps
    are read one at a time; none is kept.

    Args:
        boxes: [regions, 4]: left, top, right, bottom.
        bins: Points per axis that a region is read at.
        spatial_scale: Cells of the first map per unit of the boxes.
    """

    def __init__(self, boxes: Tensor, bins: int, spatial_scale: float) -> None:
        self.boxes, self.bins, self.spatial_scale = boxes, bins, spatial_scale
        self._axes: tuple[Tensor, ...] = ()
        self._read: list[Tensor] = []

    def read(self, features: Tensor) -> None:
        """Take the next map, [channels, height, width]."""
        if not self._axes:
            axes = _weights(features, self.boxes, self.bins, self.bins, self.spatial_scale)
            self._axes = tuple(axis.mean(1) for axis in axes)
        rows, columns = (_onto(axis, cells) for axis, cells in zip(self._axes, features.shape[-2:], strict=True))
        self._read.append(torch.einsum("nh,chw,nw->nc", rows, features.float(), columns))

    def vectors(self) -> Tensor:
        """[regions, channels of all maps], float32."""
        return torch.cat(self._read, dim=1)


def pyramid_mean(maps: Iterable[Tensor], boxes: Tensor, bins: int, spatial_scale: float) -> Tensor:
    """What a `PyramidReader` reads of maps, [regions, channels of all maps]."""
    reader = PyramidReader(boxes, bins, spatial_scale)
    for features in maps:
        reader.read(features)
    return reader.vectors()


def _onto(weights: Tensor, cells: int) -> Tensor:
    """Weights [regions, fine cells] of a resized axis as weights [regions, cells] of the axis before it was resized."""
    fine = weights.shape[-1]
    if fine == cells:
        return weights
    return weights @ _resizing(cells, fine).to(weights.device)


@functools.lru_cache(maxsize=32)
def _resizing(cells: int, fine: int) -> Tensor:
    """Bilinear resizing of an axis as a matrix [fine, cells]."""
    return F.interpolate(torch.eye(cells)[None], size=fine, mode="linear")[0].T.contiguous()


def _weights(features: Tensor, boxes: Tensor, rows: int, columns: int, spatial_scale: float) -> tuple[Tensor, Tensor]:
    height, width = features.shape[-2:]
    left, top, right, bottom = (boxes.to(features.device).float() * spatial_scale).unbind(-1)
    return axis_weights(top, bottom, rows, height), axis_weights(left, right, columns, width)
