"""The 3D encoders of MedM-VL: M3D-CLIP and MedM-CLIP, vision transformers over patches of a volume (spec 3.1).

Both take [volumes, channels, depth, height, width] and keep the parameter names of the published files. Neither
lists an embedding among its hidden states: `layer` counts blocks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init


@strict
class VolumeViTConfig(PreTrainedConfig):
    """What both encoders are configured by.

    Args:
        image_size: (depth, height, width) of a volume in voxels.
        patch_size: (depth, height, width) of a patch.
        qkv_bias: Whether M3D-CLIP's attention has biases in front; the released one has none.
    """

    model_type = "llavakit_volume_vit"

    image_size: list | tuple = (32, 256, 256)
    patch_size: list | tuple = (4, 16, 16)
    num_channels: int = 1
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    qkv_bias: bool = False

    @property
    def feature_stride(self) -> tuple[int, int, int]:
        """Voxels per feature."""
        return tuple(self.patch_size)

    @property
    def prefix_tokens(self) -> int:
        """The class token."""
        return 1

    @property
    def feature_width(self) -> int:
        """Channels of a feature."""
        return self.hidden_size

    @property
    def patches(self) -> int:
        """Patches of a volume."""
        count = 1
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            count *= size // patch
        return count

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        depth, height, width = self.patch_size
        return depth * height * width * self.num_channels


@strict
class M3DClipConfig(VolumeViTConfig):
    """M3D-CLIP's vision encoder."""

    model_type = "m3d_clip_vision"


@strict
class MedMClipConfig(VolumeViTConfig):
    """MedM-CLIP's vision encoder."""

    model_type = "medm_clip_vision"


class VolumeViT(PreTrainedModel):
    """What both encoders share: cutting, selection of features, the contract with llavakit."""

    config_class = VolumeViTConfig
    base_model_prefix = "vision_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True

    def block_outputs(self, pixel_values: Tensor) -> list[Tensor]:
        """Output of every block, [volumes, 1 + patches, hidden] each."""
        raise NotImplementedError(f"{type(self).__name__} must define block_outputs")

    def features(self, pixel_values: Tensor, layer: int | Sequence[int], strategy: str = "default") -> Tensor:
        """Output of a block (or several, joined on channels); "default" drops the class token."""
        outputs = self.block_outputs(pixel_values)
        chosen = [outputs[n] for n in ([layer] if isinstance(layer, int) else layer)]
        joined = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        return joined[:, 1:] if strategy == "default" else joined

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The last block's output."""
        return self.block_outputs(pixel_values)[-1]

    def _cut(self, volume: Tensor) -> Tensor:
        """[volumes, depth cells, row cells, column cells, channels, patch depth, rows, columns]."""
        depth, height, width = self.config.patch_size
        cells = volume.unflatten(2, (-1, depth)).unflatten(4, (-1, height)).unflatten(6, (-1, width))
        return cells.permute(0, 2, 4, 6, 1, 3, 5, 7)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VolumeViTConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = _Attention(width, config.num_attention_heads, config.qkv_bias)
        self.mlp = _MLP(width, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbedding(nn.Module):
    def __init__(self, config: VolumeViTConfig) -> None:
        super().__init__()
        # the published module counts a rearrangement as its entry 0
        self.patch_embeddings = nn.ModuleDict({"1": nn.Linear(config.patch_values, config.hidden_size)})
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.patches, config.hidden_size))


class M3DClipVision(VolumeViT):
    """M3D-CLIP: pre-norm blocks; the class token goes in front after positions were added, so it has none."""

    config_class = M3DClipConfig

    def __init__(self, config: M3DClipConfig) -> None:
        super().__init__(config)
        self.patch_embedding = _PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def init_parameters(self) -> None:
        """Positions small."""
        init.normal_(self.patch_embedding.position_embeddings, std=self.config.initializer_range)

    def block_outputs(self, pixel_values: Tensor) -> list[Tensor]:
        cells = self._cut(pixel_values).permute(0, 1, 2, 3, 5, 6, 7, 4)  # depth, rows, columns, channel
        x = self.patch_embedding.patch_embeddings["1"](cells.flatten(4).flatten(1, 3))
        x = x + self.patch_embedding.position_embeddings
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class MedMClipVision(VolumeViT):
    """MedM-CLIP: post-norm blocks with ReLU; positions cover the class token."""

    config_class = MedMClipConfig

    def __init__(self, config: MedMClipConfig) -> None:
        super().__init__(config)
        width, values = config.hidden_size, config.patch_values
        self.to_patch_embedding = nn.ModuleDict(
            {"1": nn.LayerNorm(values), "2": nn.Linear(values, width), "3": nn.LayerNorm(width)}
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.zeros(1, config.patches + 1, width))
        self.transformer_layers = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    width,
                    config.num_attention_heads,
                    config.intermediate_size,
                    dropout=0.0,
                    layer_norm_eps=config.layer_norm_eps,
                    batch_first=True,
                )
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.post_init()

    def init_parameters(self) -> None:
        """Positions and class token small."""
        init.normal_(self.pos_embedding, std=self.config.initializer_range)
        init.normal_(self.cls_token, std=self.config.initializer_range)

    def block_outputs(self, pixel_values: Tensor) -> list[Tensor]:
        cells = self._cut(pixel_values).permute(0, 1, 2, 3, 6, 7, 5, 4)  # rows, columns, depth, channel
        x = cells.flatten(4).flatten(1, 3)
        for number in ("1", "2", "3"):
            x = self.to_patch_embedding[number](x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        outputs = []
        for layer in self.transformer_layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    def image_embedding(self, pixel_values: Tensor) -> Tensor:
        """The vector that was contrasted with reports [volumes, hidden]."""
        return self.mlp_head(self.block_outputs(pixel_values)[-1][:, 0])
