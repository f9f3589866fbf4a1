"""LanguageBind's video encoder: a CLIP ViT whose layers look along time before they look at the picture (spec 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPVisionEmbeddings,
)

from llavakit.connectors.base import Grid
from llavakit.errors import UserError


@strict
class LanguageBindVideoConfig(CLIPVisionConfig):
    """Configuration of `LanguageBindVideo`: that of a CLIP vision encoder, and time.

    Args:
        num_frames: Frames of a clip, as many as temporal embeddings were trained.
        temporal_attention: Whether layers look along time. Without it every frame is encoded alone, as in transformers'
            conversion of Video-LLaVA.
    """

    model_type = "languagebind_video"

    num_frames: int = 8
    temporal_attention: bool = True

    @property
    def feature_stride(self) -> tuple[int, int, int]:
        """Frames and pixels per feature."""
        return (1, self.patch_size, self.patch_size)

    @property
    def prefix_tokens(self) -> int:
        """The class token of a frame."""
        return 1

    @property
    def feature_width(self) -> int:
        """Channels of a feature."""
        return self.hidden_size

    @property
    def volumetric(self) -> bool:
        """A view is a clip [channels, frames, height, width]."""
        return True

    def feature_grid(self, depth: int, height: int, width: int, keep_prefix: bool) -> Grid:
        """Every frame has a class token of its own, so with it a frame is a row of 1 + patches."""
        rows, columns = height // self.patch_size, width // self.patch_size
        return (depth, 1, rows * columns + 1) if keep_prefix else (depth, rows, columns)


class TemporalLayer(CLIPEncoderLayer):
    """A CLIP layer with attention over the frames of one place in front of it."""

    def __init__(self, config: LanguageBindVideoConfig) -> None:
        super().__init__(config)
        self.frames = config.num_frames
        self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[clips x frames, tokens, width] to the same."""
        clips = hidden_states.unflatten(0, (-1, self.frames))  # [clips, frames, tokens, width]
        if self.frames > 1:
            clips = clips + self.temporal_embedding.unsqueeze(2)
        places = clips.transpose(1, 2).flatten(0, 1)  # [clips x tokens, frames, width]
        seen, _ = self.temporal_attn(self.temporal_layer_norm1(places))
        clips = clips + seen.unflatten(0, (len(clips), -1)).transpose(1, 2)
        return super().forward(clips.flatten(0, 1), attention_mask, **kwargs)


class _Layers(nn.Module):
    """The level `encoder` in the names of weights."""

    def __init__(self, config: LanguageBindVideoConfig) -> None:
        super().__init__()
        layer = TemporalLayer if config.temporal_attention else CLIPEncoderLayer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))


class LanguageBindVideo(CLIPPreTrainedModel):
    """The encoder, under the published names of its weights.

    Patch dropout, which the published configurations name, acts while the encoder itself is trained; Video-LLaVA
    freezes it, so there is none here.
    """

    config_class = LanguageBindVideoConfig
    config: LanguageBindVideoConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("video",)

    def __init__(self, config: LanguageBindVideoConfig) -> None:
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = _Layers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TemporalLayer):
            init.normal_(module.temporal_embedding, std=self.config.hidden_size**-0.5)

    def _states(self, pixel_values: Tensor, last: int) -> list[Tensor]:
        """Hidden states 0 (the embedding) to `last`, each [frames of all clips, 1 + patches, width]."""
        frames = pixel_values.transpose(1, 2).flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        wanted = self.config.num_frames
        if self.config.temporal_attention and len(frames) % wanted:
            raise UserError(f"{len(frames)} frames cannot be cut into clips of {wanted}, which this encoder takes")
        size = self.config.image_size
        native = frames.shape[-2:] == (size, size)
        states = [self.pre_layrnorm(self.embeddings(frames, interpolate_pos_encoding=not native))]
        for layer in self.encoder.layers[:last]:
            states.append(layer(states[-1], None))
        return states

    def features(self, pixel_values: Tensor, layer: int | Sequence[int], strategy: str = "default") -> Tensor:
        """Features of clips, [clips, frames x tokens, width x layers]; "full" keeps every frame's class token.

        Args:
            pixel_values: [clips, channels, frames, height, width]; frames are a multiple of `num_frames`, and every
                stretch of so many is a clip of its own to temporal attention.

        Raises:
            UserError: If views are pictures or have another number of frames.
        """
        if pixel_values.dim() != 5:
            raise UserError("encoder 'languagebind_video' takes clips, not pictures; cut them with the planner 'clip'")
        frames, wanted = pixel_values.shape[2], self.config.num_frames
        if self.config.temporal_attention and frames % wanted:
            raise UserError(f"a clip of {frames} frames; this encoder takes {wanted}, or a multiple of it")
        count = self.config.num_hidden_layers
        layers = [own if own >= 0 else count + 1 + own for own in ([layer] if isinstance(layer, int) else layer)]
        states = self._states(pixel_values, max(layers))
        chosen = torch.cat([states[own] for own in layers], dim=-1).unflatten(0, (-1, frames))
        return (chosen if strategy == "full" else chosen[:, :, 1:]).flatten(1, 2)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The last layer's states and the pooled vector of every clip.

        Args:
            pixel_values: [clips, channels, frames, height, width]; or frames [frames of all clips, channels, height,
                width], which are cut into clips in their order.

        Returns:
            `last_hidden_state` [frames of all clips, 1 + patches, width]; `pooler_output` [clips, width], the mean over
            frames of the normalised class tokens; `hidden_states` [clips, frames, 1 + patches, width] each.
        """
        frames = pixel_values.shape[2] if pixel_values.dim() == 5 else 1
        states = self._states(pixel_values, self.config.num_hidden_layers)
        pooled = self.post_layernorm(states[-1][:, 0]).unflatten(0, (-1, frames)).mean(1)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=pooled,
            hidden_states=tuple(own.unflatten(0, (-1, frames)) for own in states) if output_hidden_states else None,
        )
