"""Stepping the layers of a Llama-shaped transformers decoder, for adapters and connectors that run some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from llavakit.errors import UserError

Addition = Callable[[int, Tensor], Tensor | None]

_INSIDE = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def check_decoder(decoder: nn.Module, user: str) -> None:
    """Refuse a decoder that is not Llama-shaped.

    Args:
        user: Who needs it, for the message.

    Raises:
        UserError: Naming the module that is missing.
    """
    lacking = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)]
    if lacking:
        raise UserError(f"{user} needs a Llama-shaped decoder; {decoder.config.model_type} has no {lacking[0]}")


def check_inside(layer: nn.Module, user: str) -> None:
    """Refuse a decoder layer that `run_layers` cannot take apart.

    Raises:
        UserError: Naming what is missing or too much.
    """
    own = {name for name, module in layer.named_children() if next(module.parameters(), None) is not None}
    if own != set(_INSIDE):
        odd = sorted(own ^ set(_INSIDE))[0]
        raise UserError(f"{user} needs decoder layers of {', '.join(_INSIDE)}; {type(layer).__name__} differs in {odd}")


def run_layers(
    layers: Iterable[nn.Module],
    hidden: Tensor,
    rotary_emb: nn.Module,
    position_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    mlp_add: Addition | None = None,
) -> Tensor:
    """Hidden states [batch, length, hidden] behind some layers of a decoder.

    Args:
        layers: Decoder layers, in order.
        rotary_emb: The decoder's rotary embedding.
        position_ids: [batch, length].
        attention_mask: As the layers take it, usually additive [batch, 1, length, keys].
        cache: A transformers `Cache`, or None.
        mlp_add: `mlp_add(number, y)` gives what is added to the output of the MLP inside a layer, or None to leave the
            layer as it is; `number` counts the given layers from 0, `y` [batch, length, hidden] is the MLP's input.
    """
    rotary = rotary_emb(hidden, position_ids)
    inputs = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": cache,
        "use_cache": cache is not None,
        "position_embeddings": rotary,
    }
    for number, layer in enumerate(layers):
        if mlp_add is None:
            hidden = layer(hidden, **inputs)
            continue
        attended = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **inputs)[0]
        read = layer.post_attention_layernorm(attended)
        added = mlp_add(number, read)
        hidden = attended + layer.mlp(read) + (0 if added is None else added)
    return hidden
