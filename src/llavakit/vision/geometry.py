"""Geometry of vision encoders: pixels in, grid of features out, as arithmetic on the configuration.

Any transformers vision encoder can be used. Families whose geometry follows from their configuration are listed
here; llavakit's own encoders declare theirs as the configuration attributes `feature_stride`, `prefix_tokens` and
`feature_width`, and may define `feature_grid` and `region_width` (see `Geometry`); any other encoder is built
once on the meta device and asked.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from llavakit.connectors.base import Grid
from llavakit.errors import UserError
from llavakit.views.plan import View


@dataclass(frozen=True)
class Geometry:
    """What an encoder does to sizes.

    Attributes:
        stride: Pixels per feature along (depth, height, width); depth 1 for a 2D encoder.
        prefix_tokens: Class and register tokens in front of the grid.
        width: Channels of the features.
        volumetric: Whether the encoder takes [batch, channels, depth, height, width].
        region_width: Channels of the vector that a region of a view is pooled to; `width` for most encoders.
        own_grid: The configuration's `feature_grid(depth, height, width, keep_prefix)`, for encoders whose grid does
            not follow from stride and prefix (a class token per frame).
    """

    stride: tuple[int, int, int]
    prefix_tokens: int
    width: int
    volumetric: bool = False
    region_width: int = 0
    own_grid: Callable[[int, int, int, bool], Grid] | None = None

    def grid(self, view: View, keep_prefix: bool = False) -> Grid:
        """The feature grid of one view; with `keep_prefix` a single row that counts the prefix tokens too."""
        if self.own_grid is not None:
            return tuple(self.own_grid(view.depth, view.height, view.width, keep_prefix))
        depth, height, width = self.stride
        grid = (max(view.depth // depth, 1), view.height // height, view.width // width)
        if keep_prefix and self.prefix_tokens:
            return (1, 1, grid[0] * grid[1] * grid[2] + self.prefix_tokens)
        return grid

    def for_strategy(self, strategy: str) -> Geometry:
        """The geometry of what `encode_views` selects by this strategy.

        "drop_first" leaves a grid only where the encoder has just one token in front of its grid; else a single row.
        """
        if strategy != "drop_first" or self.prefix_tokens == 1:
            return self

        def row(depth: int, height: int, width: int, keep_prefix: bool) -> Grid:
            *_, tokens = self.grid(View(height, width, depth), keep_prefix=True)
            rest = self.grid(View(height, width, depth))
            return (1, 1, (tokens if self.prefix_tokens else rest[0] * rest[1] * rest[2]) - 1)

        return replace(self, own_grid=row)


def _patch(config: Any, prefix: int) -> Geometry:
    return Geometry((1, config.patch_size, config.patch_size), prefix, config.hidden_size)


def _convnext(config: Any) -> Geometry:
    stride = config.patch_size * 2 ** (len(config.depths) - 1)
    return Geometry((1, stride, stride), 0, config.hidden_sizes[-1])


_FAMILIES = {
    "clip_vision_model": lambda c: _patch(c, 1),
    "siglip_vision_model": lambda c: _patch(c, 0),
    "dinov2": lambda c: _patch(c, 1),
    "dinov2_with_registers": lambda c: _patch(c, 1 + c.num_register_tokens),
    "convnext": _convnext,
    "convnextv2": _convnext,
}


def geometry_of(config: Any) -> Geometry:
    """The geometry of the encoder that a transformers vision configuration describes.

    Raises:
        UserError: If the encoder cannot be built from its configuration alone.
    """
    if hasattr(config, "feature_stride"):
        stride = tuple(config.feature_stride)
        return Geometry(
            stride,
            config.prefix_tokens,
            config.feature_width,
            volumetric=stride[0] > 1 or getattr(config, "volumetric", False),
            region_width=getattr(config, "region_width", 0),
            own_grid=getattr(config, "feature_grid", None),
        )
    if config.model_type in _FAMILIES:
        return _FAMILIES[config.model_type](config)
    return _probe(config.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str))


@functools.lru_cache(maxsize=32)
def _probe(model_type: str, serialised: str) -> Geometry:
    from transformers import CONFIG_MAPPING, AutoModel

    config = CONFIG_MAPPING[model_type](**json.loads(serialised))
    try:
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        with torch.device("meta"):
            encoder = AutoModel.from_config(config)
            hidden = encoder(torch.zeros(1, getattr(config, "num_channels", 3), size, size)).last_hidden_state
    except Exception as error:
        raise UserError(f"vision encoder {model_type!r} cannot be used: {type(error).__name__}: {error}") from error
    if hidden.dim() == 4:
        return Geometry((1, size // hidden.shape[2], size // hidden.shape[3]), 0, hidden.shape[1])
    rows = int(hidden.shape[1] ** 0.5)
    return Geometry((1, size // rows, size // rows), hidden.shape[1] - rows * rows, hidden.shape[2])
