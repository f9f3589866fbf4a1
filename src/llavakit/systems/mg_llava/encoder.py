"""The high-resolution encoder: a ConvNeXt whose last stage is the feature map, and whose regions read all stages.

Parameter names are those of transformers' ConvNeXT, so files of transformers, open_clip and timm load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import ConvNextConfig, ConvNextModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention

from llavakit.errors import UserError
from llavakit.vision.roi_align import PyramidReader, roi_mean

STAGES = ("all", "each", "last")


@strict
class ConvNextPyramidConfig(ConvNextConfig):
    """Configuration of `ConvNextPyramid`: transformers' ConvNeXT, and how regions are read.

    Args:
        region_stages: "all" reads regions on the stages resized to the first one's cells, side by side on channels;
            "each" does the same on every stage's own cells; "last" on the last stage alone.
        region_bins: Points per axis that a region is averaged over; None is 56, and 7 on the last stage alone.
    """

    model_type = "convnext_pyramid"

    region_stages: str = "all"
    region_bins: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        if self.region_stages not in STAGES:
            raise UserError(f"region_stages: must be one of {', '.join(STAGES)}, not {self.region_stages!r}")

    @property
    def stride(self) -> int:
        """Pixels per feature of the last stage."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def feature_stride(self) -> tuple[int, int, int]:
        """See `llavakit.vision.geometry`."""
        return (1, self.stride, self.stride)

    @property
    def prefix_tokens(self) -> int:
        """A map has no class token."""
        return 0

    @property
    def feature_width(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    @property
    def region_width(self) -> int:
        """Channels of a region's vector."""
        return self.hidden_sizes[-1] if self.region_stages == "last" else sum(self.hidden_sizes)

    @property
    def bins(self) -> int:
        """Points per axis that a region is averaged over."""
        return self.region_bins or (7 if self.region_stages == "last" else 56)


class ConvNextPyramid(ConvNextModel):
    """ConvNeXT trunk without final norm and head (spec section 3.1)."""

    config_class = ConvNextPyramidConfig

    def __init__(self, config: ConvNextPyramidConfig) -> None:
        super().__init__(config)
        del self.layernorm  # behind the last stage; nothing reads it

    def stages(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The map of every stage [views, channels, height, width], finest first."""
        maps = self.embeddings(pixel_values)
        for stage in self.encoder.stages:
            maps = stage(maps)
            yield maps

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithNoAttention:
        """The maps of all stages."""
        stages = tuple(self.stages(pixel_values))
        return BaseModelOutputWithNoAttention(last_hidden_state=stages[-1], hidden_states=stages)

    def features(self, pixel_values: Tensor, layer: int | Sequence[int] = -1, strategy: str = "default") -> Tensor:
        """The last stage, [views, tokens, channels]."""
        _check_layer(layer)
        maps = pixel_values
        for maps in self.stages(pixel_values):  # noqa: B007
            pass
        return maps.flatten(2).transpose(1, 2)

    def pyramid(self, pixel_values: Tensor) -> Tensor:
        """All stages resized to the first one's cells, side by side: [views, sum of channels, height, width], float32.

        What regions are read from, as a tensor; `pool_regions` never forms it.
        """
        first, *rest = (maps.float() for maps in self.stages(pixel_values))
        return torch.cat([first, *(F.interpolate(maps, size=first.shape[-2:], mode="bilinear") for maps in rest)], 1)

    def pool_regions(
        self,
        pixel_values: Tensor,
        regions: Sequence[Sequence[Sequence[float]]],
        layer: int | Sequence[int] = -1,
        strategy: str = "default",
    ) -> tuple[Tensor, list[Tensor]]:
        """`features`, and one vector [regions of the view, region width] per region; stages are read one at a time.

        Args:
            regions: For every view its boxes (left, top, right, bottom) in pixels of the view.
        """
        _check_layer(layer)
        boxes = [torch.tensor(own, dtype=torch.float32, device=pixel_values.device).reshape(-1, 4) for own in regions]
        kind, bins, patch = self.config.region_stages, self.config.bins, self.config.patch_size
        pyramids = [PyramidReader(own, bins, 1 / patch) for own in boxes]
        alone: list[list[Tensor]] = [[] for _ in boxes]
        last = len(self.encoder.stages) - 1
        maps = pixel_values
        for number, maps in enumerate(self.stages(pixel_values)):
            for own, view, pyramid, vectors in zip(maps, boxes, pyramids, alone, strict=True):
                if kind == "all":
                    pyramid.read(own)
                elif kind == "each" or number == last:
                    vectors.append(roi_mean(own, view, bins, 1 / (patch * 2**number)))
        pooled = [pyramid.vectors() for pyramid in pyramids] if kind == "all" else [torch.cat(own, 1) for own in alone]
        vectors = [own.to(maps.dtype) for own in pooled]
        return maps.flatten(2).transpose(1, 2), vectors


def _check_layer(layer: int | Sequence[int]) -> None:
    if layer != -1:
        raise UserError(f"encoder 'convnext_pyramid': layer is {layer!r}, it must be -1, the last stage")
