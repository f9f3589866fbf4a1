"""Which layers of a model get a LoRA adapter: those that a recipe names and that training can reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.errors import RecipeError
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.registry import nearest
from llavakit.training.dataset import StageCollator, stand_ins
from llavakit.training.parameter_groups import EVERYTHING, is_lora, part_of, public_name, top_level_parts
from llavakit.training.recipe import Stage


@dataclass(frozen=True)
class Targets:
    """Full names of the layers that get an adapter.

    Attributes:
        linear: Linear layers.
        attention: `nn.MultiheadAttention` modules. They read the weights of their projections without calling them, so
            the module as a whole is adapted.
    """

    linear: list[str]
    attention: list[str]


def targets_of(model: LlavakitForConditionalGeneration, stage: Stage) -> Targets:
    """The layers inside `lora.parts` that `train` does not name more exactly; the head only where it is named.

    Layers of an encoder behind the features that connectors read are left out, since nothing would reach them.

    Raises:
        RecipeError: If a name fits nothing, or a layer cannot be adapted.
    """
    lora = stage.lora
    _check_parts(model, stage)
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    wanted = [name for name, module in model.named_modules() if _is_wanted(name, module, stage, attentions)]
    unreached = _unreached(model, wanted)
    wanted = [name for name in wanted if name not in unreached]
    for name in wanted:
        _check_attention(name, attentions, stage)
    linear = [name for name in wanted if name not in attentions and _attention_around(name, attentions) is None]
    attention = [name for name in wanted if name in attentions]
    if not linear and not attention:
        raise RecipeError(
            f"lora: no layer in {', '.join(lora.parts)} can be adapted with targets {lora.targets or 'all'}; "
            "adapted are linear layers and attention modules that do not train in full"
        )
    return Targets(linear, attention)


def _check_parts(model: LlavakitForConditionalGeneration, stage: Stage) -> None:
    names = [public_name(name) for name, _ in model.named_parameters()]
    full = [part for part, options in stage.train.items() if not options.freeze]
    if EVERYTHING in full:
        raise RecipeError("train.all: with lora, name the parts that train in full")
    for part in stage.lora.parts:
        if part in full:
            raise RecipeError(f"train.{part}: trains in full, so lora has nothing to adapt there; take it out of train")
        if part == "lm_head" and model.config.tie_word_embeddings:
            raise RecipeError(
                "lora.parts: lm_head is tied to the embeddings, so an adapter on it cannot be kept; "
                "train language_model.embed_tokens in full instead"
            )
        if part != EVERYTHING and not any(part_of(name, [part]) for name in names):
            hint = nearest(part, [EVERYTHING, *top_level_parts(model)])
            raise RecipeError(f"lora.parts: the model has no part {part!r}{hint}")


def _is_wanted(name: str, module: nn.Module, stage: Stage, attentions: Mapping[str, nn.Module]) -> bool:
    if not isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        return False
    lora, public = stage.lora, public_name(name)
    if part_of(public, [*stage.train, *lora.parts]) not in lora.parts:
        return False  # it trains in full, or is to stay as it is
    if name.startswith("lm_head") and "lm_head" not in lora.parts:
        return False
    whole = part_of(public, stage.train)
    if whole is not None and not stage.train[whole].freeze:
        raise RecipeError(f"lora.parts: {public} trains in full (train.{whole}), so there is nothing to adapt")
    if lora.targets is None:  # an attention module includes its projections
        return _attention_around(name, attentions) is None
    return name.rpartition(".")[2] in lora.targets


def _attention_around(name: str, attentions: Mapping[str, nn.Module]) -> str | None:
    return next((path for path in attentions if name.startswith(f"{path}.")), None)


def _check_attention(name: str, attentions: Mapping[str, nn.Module], stage: Stage) -> None:
    around = _attention_around(name, attentions)
    if around is not None:
        raise RecipeError(
            f"lora.targets: {public_name(name)} is read by its attention module and never called, so it cannot be "
            f"adapted alone; name {around.rpartition('.')[2]!r} instead"
        )
    module = attentions.get(name)
    if module is None:
        return
    if not module._qkv_same_embed_dim:
        raise RecipeError(
            f"lora.parts: the attention module {public_name(name)} has queries, keys and values of different widths, "
            "which PEFT cannot adapt; train the part in full, or name single layers of it"
        )
    if stage.shard:
        raise RecipeError(
            f"shard: the attention module {public_name(name)} cannot be adapted in shards; train the part in full, "
            "or leave it out of lora.parts"
        )


def _unreached(model: LlavakitForConditionalGeneration, names: Iterable[str]) -> set[str]:
    """Layers of encoders that no gradient reaches, found by one pass over a blank media item of every route."""
    routes = model.model.media.routes.values()
    # What only regions need is not seen on media without any.
    skipped = {encoder for route in routes for encoder in route.encoders if route.planner.takes_regions}
    encoders = {encoder for route in routes for encoder in route.encoders} - skipped
    weights = {
        name: _weight(model.get_submodule(name)) for name in names if part_of(public_name(name), encoders) is not None
    }
    if not weights:
        return set()
    before = {name: weight.requires_grad for name, weight in weights.items()}
    reached: set[str] = set()
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.random.fork_rng(), torch.enable_grad():
            for sample in stand_ins(model).values():
                reached |= _reached(model, sample, weights)
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
    return set(weights) - reached


def _reached(model: LlavakitForConditionalGeneration, sample: dict, weights: Mapping[str, Tensor]) -> set[str]:
    batch = StageCollator(0)([sample])
    given = ("attention_mask", "pixel_values", "visual_sizes", "visual_modalities", "visual_regions")
    embeds, _, _ = model.model.embed(batch["input_ids"], **{key: batch[key] for key in given if key in batch})
    if not embeds.requires_grad:
        return set()
    gradients = torch.autograd.grad(embeds.float().sum(), list(weights.values()), allow_unused=True)
    return {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}


def _weight(module: nn.Module) -> Tensor:
    return module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight


class GradientCheck:
    """Makes sure, once, that every adapter learns: one without a gradient would be saved as if it had been trained.

    Adapters of encoders and connectors are looked at in the first step with media that go through them.

    Args:
        model: The model without PEFT.
        wrapped: The model with its adapters, as it is trained.

    Attributes:
        pending: Adapters that were not seen with a gradient yet, by the layer's name in a recipe.
    """

    def __init__(self, model: LlavakitForConditionalGeneration, wrapped: nn.Module) -> None:
        self.pending = {name: parameter for name, parameter in wrapped.named_parameters() if is_lora(name)}
        self._media: dict[str, set[str]] = {}
        self._routes = model.model.media.routes
        for modality, route in self._routes.items():
            for part in (*route.encoders, route.connector):
                self._media.setdefault(part, set()).add(modality)
        self._used: set[str] = set()

    def after_batch(self, inputs: Mapping[str, Any], last: bool) -> None:
        """Look at the gradients after a backward pass.

        Args:
            inputs: The batch.
            last: Whether it is the last one of an optimiser step.

        Raises:
            RecipeError: After the step, if an adapter had to get a gradient and has none.
        """
        modalities = inputs.get("visual_modalities")
        for number in set() if modalities is None else set(modalities.tolist()):
            modality = MODALITIES[number]
            modality = modality if modality in self._routes else "image"
            if not self._routes[modality].planner.takes_regions or inputs.get("visual_regions") is not None:
                self._used.add(modality)
        self.pending = {name: parameter for name, parameter in self.pending.items() if parameter.grad is None}
        if not last:
            return
        for name in self.pending:
            layer = public_name(name.partition(".lora_")[0])
            part = part_of(layer, self._media)
            if part is None or self._media[part] & self._used:
                raise RecipeError(
                    f"lora: the adapter of {layer} got no gradient in the first step, so it would never learn; "
                    "leave the layer out of lora.parts or lora.targets"
                )
        self._used.clear()
