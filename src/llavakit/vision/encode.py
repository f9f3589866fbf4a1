"""Run any transformers vision encoder and select the features that a connector reads.

Layers that no feature depends on are not run: reading layer -2 of a 24-layer CLIP encoder runs 23 layers and no
post-layernorm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.vision.geometry import Geometry
from llavakit.vision.roi_align import roi_mean

# Bytes of a layer's widest activation in one pass on a CPU. What is larger leaves the caches, and above some megabytes
# the C library gives memory back to the system after every operation; both cost more than a larger matrix product
# saves (benchmarks/inf_llava.py: three views at a time 1.2 times as long as one by one).
CPU_PASS = 2 * 2**20
REGION_BINS = 7  # points per axis that an encoder without `pool_regions` reads a region at


def _layers(encoder: nn.Module) -> nn.ModuleList | None:
    """The layers of a CLIP- or SigLIP-like encoder, or of DINOv2; None if the encoder is built in another way."""
    stack = getattr(encoder, "encoder", None) if hasattr(encoder, "embeddings") else None
    dinov2 = getattr(getattr(encoder, "config", None), "model_type", None) == "dinov2"
    return getattr(stack, "layer" if dinov2 else "layers", None)


def _hidden_states_vit(encoder: nn.Module, pixel_values: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Hidden states of an encoder with `_layers`; index 0 is the embedding, as in `output_hidden_states`."""
    stack = _layers(encoder)
    wanted = [layer if layer >= 0 else len(stack) + 1 + layer for layer in layers]
    size = getattr(encoder.config, "image_size", None)
    native = pixel_values.shape[-2:] == (size, size)
    always = encoder.config.model_type == "dinov2"  # interpolates wherever it has to, without being told
    hidden = encoder.embeddings(pixel_values, **({} if always else {"interpolate_pos_encoding": not native}))
    if hasattr(encoder, "pre_layrnorm"):  # transformers' own spelling, CLIP only
        hidden = encoder.pre_layrnorm(hidden)
    kept = {0: hidden}
    for number, layer in enumerate(stack[: max(wanted)], start=1):
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        kept[number] = hidden
    return [kept[number] for number in wanted]


def hidden_states(encoder: nn.Module, pixel_values: Tensor, layers: Sequence[int], **kwargs: Any) -> list[Tensor]:
    """The hidden states called for, each [views, tokens, width].

    Args:
        encoder: A transformers vision model.
        pixel_values: [views, channels, height, width] (or with depth before height).
        layers: Indices into the tuple of hidden states; 0 is the embedding.
    """
    inner = getattr(encoder, "vision_model", encoder)
    if _layers(inner) is not None:
        return _hidden_states_vit(inner, pixel_values, layers)
    states = encoder(pixel_values, output_hidden_states=True, return_dict=True, **kwargs).hidden_states
    chosen = [states[layer] for layer in layers]
    return [state.flatten(2).transpose(1, 2) if state.dim() == 4 else state for state in chosen]


def passes(encoder: nn.Module, pixel_values: Tensor, geometry: Geometry) -> Sequence[Tensor]:
    """The views in as many parts as they are encoded in: one on an accelerator, parts of a few megabytes on a CPU."""
    if _layers(getattr(encoder, "vision_model", encoder)) is None or pixel_values.device.type != "cpu":
        return [pixel_values]
    steps = geometry.stride[-(pixel_values.dim() - 2) :]
    tokens = math.prod(side // step for side, step in zip(pixel_values.shape[2:], steps, strict=True))
    config = encoder.config
    width = getattr(config, "intermediate_size", None) or config.hidden_size * config.mlp_ratio
    size = (tokens + geometry.prefix_tokens) * width * pixel_values.element_size()
    return pixel_values.split(max(1, CPU_PASS // size))


def encode_views(
    encoder: nn.Module, pixel_values: Tensor, layer: int | Sequence[int], strategy: str, geometry: Geometry
) -> Tensor:
    """Features of views of one size, [views, tokens, width x number of layers].

    Args:
        layer: Which hidden state to read; several are concatenated along channels.
        strategy: "default" drops class and register tokens, "full" keeps them, "drop_first" drops one token, whatever
            it is.

    llavakit's own encoders may define `features(pixel_values, layer, strategy)` themselves.
    """
    if hasattr(encoder, "features"):
        return encoder.features(pixel_values, layer, strategy)
    layers = [layer] if isinstance(layer, int) else list(layer)
    parts = [hidden_states(encoder, part, layers) for part in passes(encoder, pixel_values, geometry)]
    states = parts[0] if len(parts) == 1 else [torch.cat(several) for several in zip(*parts, strict=True)]
    if strategy == "default":
        states = [state[:, geometry.prefix_tokens :] for state in states]
    elif strategy == "drop_first":
        states = [state[:, 1:] for state in states]
    return states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def encode_regions(
    encoder: nn.Module,
    pixel_values: Tensor,
    regions: Sequence[Sequence[Sequence[float]]],
    layer: int | Sequence[int],
    strategy: str,
    geometry: Geometry,
) -> tuple[Tensor, list[Tensor]]:
    """Features of views of one size, and one vector per region of every view.

    llavakit's own encoders may define `pool_regions(pixel_values, regions, layer, strategy)` with the same result; of
    any other encoder the mean of the selected features over the region is taken.

    Args:
        regions: For every view its boxes (left, top, right, bottom) in pixels of the view.

    Returns:
        Tokens as from `encode_views`, and [regions of the view, region width] for every view.
    """
    if hasattr(encoder, "pool_regions"):
        return encoder.pool_regions(pixel_values, regions, layer, strategy)
    tokens = encode_views(encoder, pixel_values, layer, strategy, geometry)
    rows, columns = (side // step for side, step in zip(pixel_values.shape[-2:], geometry.stride[1:], strict=True))
    grids = tokens[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
    pooled = []
    for view, boxes in zip(grids, regions, strict=True):
        corners = torch.tensor(boxes, dtype=torch.float32, device=view.device).reshape(-1, 4)
        pooled.append(roi_mean(view, corners, REGION_BINS, 1 / geometry.stride[1]).to(tokens.dtype))
    return tokens, pooled
