"""Activations that the backward pass computes again instead of keeping them, by choice per part.

    gradient_checkpointing: light                     # of every layer keep what matrix products and attention give
    gradient_checkpointing: true                      # of every layer keep its input alone
    gradient_checkpointing: {language_model: light}   # parts by name; the others keep everything

`light` computes again what costs next to nothing (norms, activations, sums, rotations) and is half of what a layer
keeps; `true` computes the whole layer again, a third more work. Parts that no gradient reaches keep nothing anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llavakit.errors import RecipeError
from llavakit.registry import nearest
from llavakit.training.parameter_groups import core
from llavakit.training.recipe import Recomputed

DECODER = "language_model"
_DEAR = ("mm", "addmm", "bmm", "baddbmm", "convolution")
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_KEPT = {getattr(torch.ops.aten, name).default for name in (*_DEAR, *_ATTENTION) if hasattr(torch.ops.aten, name)}


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def parts_to_recompute(
    model: nn.Module, chosen: Recomputed | dict[str, Recomputed]
) -> dict[str, tuple[Any, Recomputed]]:
    """The parts that compute activations again, by name, and how.

    Args:
        model: As the trainer trains it.
        chosen: `Stage.gradient_checkpointing`.

    Raises:
        RecipeError: If it names a part that has no layers.
    """
    network = getattr(core(model), "model", None)
    if not hasattr(network, DECODER):  # an encoder alone
        if isinstance(chosen, dict):
            raise RecipeError("gradient_checkpointing: the module has no parts; write true or light")
        return {"all": (core(model), chosen)} if chosen else {}
    able = {
        name: part for name, part in network.named_children() if getattr(part, "supports_gradient_checkpointing", False)
    }
    if not isinstance(chosen, dict):
        reached = [name for name, part in able.items() if any(p.requires_grad for p in part.parameters())]
        chosen = dict.fromkeys([*reached, DECODER], chosen)
    for name in chosen:
        if name not in able:
            hint = nearest(name, list(able))
            raise RecipeError(f"gradient_checkpointing.{name}: the model has no such part with layers{hint}")
    return {name: (able[name], choice) for name, choice in chosen.items() if choice}


def recompute(model: nn.Module, chosen: Recomputed | dict[str, Recomputed]) -> None:
    """Switch it on.

    Raises:
        RecipeError: See `parts_to_recompute`.
    """
    for part, choice in parts_to_recompute(model, chosen).values():
        options: dict[str, Any] = {"use_reentrant": False}
        if choice == "light":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        switch = getattr(part, "activation_checkpointing_enable", None)
        if switch is not None:
            switch(activation_checkpointing_kwargs=options)
        else:  # transformers before 5.20
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
