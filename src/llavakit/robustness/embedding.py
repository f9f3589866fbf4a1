"""The embedding of a picture by which robust encoders are trained and compared, as a function of pixels in 0..1.

Of a CLIP encoder it is the class token after the last norm, through the projection into the joint space where the
encoder has one; of a SigLIP encoder its pooled output. Normalisation of pixels is part of the function, so that the
radius of an attack is measured in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llavakit.errors import UserError
from llavakit.robustness.balls import at_least_single
from llavakit.robustness.losses import unit
from llavakit.views.pixels import CLIP_MEAN, CLIP_STD


class Embedder:
    """Pixels to embeddings.

    Args:
        encoder: A vision encoder of transformers whose output has `image_embeds` or `pooler_output`.
        mean, std: Normalisation per channel.
        normalise: Whether embeddings get length one (TeCoA) or keep theirs (FARE).

    Raises:
        UserError: If the encoder gives no embedding of a whole picture.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        normalise: bool = False,
    ) -> None:
        kind = encoder.config.model_type
        if kind == "siglip_vision_model" and not getattr(encoder.config, "vision_use_head", True):
            raise UserError("the SigLIP encoder has no pooling head, so it gives no embedding of a whole picture")
        self.encoder, self.normalise = encoder, normalise
        self.mean, self.std = (torch.tensor(tuple(values)).view(-1, 1, 1) for values in (mean, std))
        # training wraps and hooks whole encoders; only plain ones are stepped here
        self.stepped = kind == "clip_vision_model"

    def __call__(self, pixels: Tensor, encoder: nn.Module | None = None) -> Tensor:
        """Embeddings [pictures, width] of pixels [pictures, channels, height, width] in 0..1.

        Args:
            encoder: In whatever a trainer wrapped the encoder; it is then called as a whole.
        """
        pixels = at_least_single(pixels)
        values = (pixels - self.mean.to(pixels)) / self.std.to(pixels)
        if encoder is None and self.stepped:
            embedding = _class_embedding(self.encoder, values)
        else:
            found = (self.encoder if encoder is None else encoder)(values)
            embedding = getattr(found, "image_embeds", None)
            embedding = found.pooler_output if embedding is None else embedding
        if embedding is None:
            raise UserError(f"an encoder {self.encoder.config.model_type!r} gives no embedding of a whole picture")
        return unit(embedding) if self.normalise else embedding

    def width(self) -> int:
        """Numbers of an embedding."""
        projection = getattr(self.encoder, "visual_projection", None)
        return projection.out_features if projection is not None else self.encoder.config.hidden_size


def _class_embedding(encoder: nn.Module, values: Tensor) -> Tensor:
    """What a CLIP encoder says of a whole picture; the last layer computes the class token alone.

    Nothing else of the last layer reaches the embedding. Keys and values of all tokens are needed, queries, the output
    projection and the MLP are not.
    """
    inner = getattr(encoder, "vision_model", encoder)
    hidden = inner.pre_layrnorm(inner.embeddings(values))
    layers = inner.encoder.layers
    for layer in layers[:-1]:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    for layer in layers[-1:]:
        hidden = _class_token(layer, hidden)
    pooled = inner.post_layernorm(hidden[:, 0])
    projection = getattr(encoder, "visual_projection", None)
    return pooled if projection is None else projection(pooled)


def _class_token(layer: nn.Module, hidden: Tensor) -> Tensor:
    attention = layer.self_attn
    normed, first = layer.layer_norm1(hidden), hidden[:, :1]

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    query, key, value = attention.q_proj(normed[:, :1]), attention.k_proj(normed), attention.v_proj(normed)
    mixed = torch.nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value))
    first = first + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return first + layer.mlp(layer.layer_norm2(first))
