"""Stepping the layers of a Llama-shaped transformers decoder, for adapters and connectors that run some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from llavakit.errors import UserError

Addition = Callable[..., Tensor | None]

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


def decoder_masks(
    decoder: nn.Module, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Any = None
) -> Mapping[str, Any]:
    """The attention masks that the decoder's own forward pass would make, by kind of layer, for `run_layers`.

    Args:
        hidden: What enters the first layer [batch, length, hidden].
        attention_mask: [batch, positions so far], or None.
        position_ids: [batch, length]; without mask and cache, positions that start again mark packed samples.
    """
    given = {
        "config": decoder.config,
        "inputs_embeds": hidden,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    return {kind: make[kind](**given) for kind in set(map(layer_kind, decoder.layers))}


def layer_kind(layer: nn.Module) -> str:
    """Whether a decoder layer sees everything ("full_attention") or a window ("sliding_attention")."""
    config = layer.self_attn.config
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer.self_attn.layer_idx]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def run_layers(
    layers: Iterable[nn.Module],
    hidden: Tensor,
    rotary_emb: nn.Module,
    position_ids: Tensor,
    *,
    attention_mask: Tensor | Mapping[str, Any] | None = None,
    cache: Any = None,
    mlp_add: Addition | None = None,
    mlp_inputs: Sequence[tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """Hidden states [batch, length, hidden] behind some layers of a decoder.

    Args:
        layers: Decoder layers, in order.
        rotary_emb: The decoder's rotary embedding.
        position_ids: [batch, length].
        attention_mask: As the layers take it, usually additive [batch, 1, length, keys]; or one for every kind of
            layer, see `decoder_masks`.
        cache: A transformers `Cache`, or None.
        mlp_add: `mlp_add(number, y)` gives what is added to the output of the MLP inside a layer, or None to leave the
            layer as it is; `number` counts the given layers from 0, `y` [batch, length, hidden] is the MLP's input.
        mlp_inputs: For every layer tensors that `mlp_add` gets as further arguments. Whatever it reads and gradients
            shall reach must come this way: gradient checkpointing computes a layer again from its arguments.
    """
    rotary = rotary_emb(hidden, position_ids)
    shared = {
        "position_ids": position_ids,
        "past_key_values": cache,
        "use_cache": cache is not None,
        "position_embeddings": rotary,
    }
    by_kind = isinstance(attention_mask, Mapping)
    for number, layer in enumerate(layers):
        inputs = shared | {"attention_mask": attention_mask[layer_kind(layer)] if by_kind else attention_mask}
        if mlp_add is None:
            hidden = layer(hidden, **inputs)
            continue
        given = () if mlp_inputs is None else mlp_inputs[number]
        if torch.is_grad_enabled():
            hidden = _with_hook(layer, hidden, inputs, functools.partial(mlp_add, number), given)
            continue
        attended = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **inputs)[0]
        read = layer.post_attention_layernorm(attended)
        added = mlp_add(number, read, *given)
        hidden = attended + (layer.mlp(read) if added is None else layer.mlp(read) + added)
    return hidden


def _with_hook(
    layer: nn.Module, hidden: Tensor, inputs: Mapping[str, Any], add: Addition, given: tuple[Tensor, ...]
) -> Tensor:
    """One layer with an addition inside, called as a whole: sharding and checkpointing act on a layer's own call."""

    def run(hidden: Tensor, *given: Tensor) -> Tensor:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            added = add(args[0], *given)
            return None if added is None else out + added

        checkpoints, layer.gradient_checkpointing = getattr(layer, "gradient_checkpointing", False), False
        handle = layer.mlp.register_forward_hook(hook)
        try:
            return layer(hidden, **inputs)
        finally:
            handle.remove()
            layer.gradient_checkpointing = checkpoints

    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func(run, hidden, *given)
    return run(hidden, *given)
