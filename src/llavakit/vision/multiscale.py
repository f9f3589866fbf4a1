"""S2: one encoder at several resolutions, features concatenated on channels (scaling_on_scales; LLaVA-1.5 spec 3.7).

The input comes at the largest scale. For every scale it is resized (bicubic, no antialias), cut into tiles of the
smallest scale, encoded, glued to one map, area-pooled to the base grid and joined channel-wise, smallest scale first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from llavakit.model.configuration import build_config
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of


@strict
class MultiscaleConfig(PreTrainedConfig):
    """Configuration of `MultiscaleEncoder`.

    Args:
        encoder_config: The encoder that is run at every scale.
        scales: Sides in pixels in any order, kept ascending; the smallest is the encoder's own.
    """

    model_type = "llavakit_multiscale"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    scales: list | tuple = (336, 672, 1008)

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder_config = build_config(self.encoder_config, "clip_vision_model")
        self.scales = sorted(self.scales)
        super().__post_init__(**kwargs)

    @property
    def feature_stride(self) -> tuple[int, int, int]:
        """Pixels of the largest scale per feature of the base grid."""
        base = geometry_of(self.encoder_config).stride
        return (1, base[1] * self.scales[-1] // self.scales[0], base[2] * self.scales[-1] // self.scales[0])

    @property
    def prefix_tokens(self) -> int:
        """The glued maps have no class token."""
        return 0

    @property
    def feature_width(self) -> int:
        """Channels of all scales together."""
        return geometry_of(self.encoder_config).width * len(self.scales)


class MultiscaleEncoder(PreTrainedModel):
    """S2 around any square-input encoder."""

    config_class = MultiscaleConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MultiscaleConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.post_init()

    def features(self, pixel_values: Tensor, layer: int | Sequence[int], strategy: str = "default") -> Tensor:
        """[views, base grid, width x scales] from [views, channels, largest scale, largest scale]."""
        base, geometry = self.config.scales[0], geometry_of(self.config.encoder_config)
        maps = []
        for scale in self.config.scales:
            pixels = pixel_values
            if pixels.shape[-1] != scale:
                pixels = F.interpolate(pixels.float(), size=(scale, scale), mode="bicubic").to(pixel_values.dtype)
            cells = -(-scale // base)
            tiles = pixels.unflatten(2, (cells, -1)).unflatten(4, (cells, -1))  # [n, c, rows, h, cols, w]
            tiles = tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
            tokens = encode_views(self.encoder, tiles, layer, "default", geometry)
            side = base // geometry.stride[1]
            glued = tokens.unflatten(0, (cells, cells, -1)).unflatten(3, (side, side))  # [rows, cols, n, h, w, d]
            glued = glued.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)
            maps.append(glued if cells == 1 else F.interpolate(glued.float(), size=(side, side), mode="area"))
        return torch.cat([m.to(pixel_values.dtype) for m in maps], dim=1).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The last layer's features at all scales."""
        return self.features(pixel_values, -1)
