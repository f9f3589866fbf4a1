"""What trains, and how fast: parts by name to parameters, and parameters to optimiser groups.

A part is named as users see it (`vision_tower`, `multi_modal_projector`, `language_model`, `lm_head`,
`image_newline`, `language_adapter`, an extra encoder or connector) or by any dotted path inside one
(`language_model.layers.0`, `language_adapter.predictor`). Where several names match, the longest one counts;
`all` matches everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from llavakit.errors import RecipeError
from llavakit.registry import nearest
from llavakit.training.recipe import Lora, PartTraining, Stage

EVERYTHING = "all"


def core(model: nn.Module) -> nn.Module:
    """llavakit's model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def public_name(name: str) -> str:
    """The name of a parameter as a recipe writes it: without the wrappers of PEFT and of the class with the head."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    for infix in (".modules_to_save.default", ".original_module", ".base_layer"):
        name = name.replace(infix, "")
    return name.removeprefix("vision_model.").replace("_tower.vision_model.", "_tower.")


def part_of(name: str, parts: Iterable[str]) -> str | None:
    """The longest of `parts` that contains the parameter with this public name."""
    found = [part for part in parts if name == part or name.startswith(f"{part}.")]
    return max(found, key=len) if found else EVERYTHING if EVERYTHING in parts else None


def top_level_parts(model: nn.Module) -> list[str]:
    """The names that `train` may use, without those inside parts."""
    return list(dict.fromkeys(public_name(name).partition(".")[0] for name, _ in core(model).named_parameters()))


def freeze_all_but(model: nn.Module, train: Mapping[str, PartTraining]) -> None:
    """Switch gradients on for the parameters of `train` and off for all others.

    Raises:
        RecipeError: If the model has no part of a name.
    """
    names = [public_name(name) for name, _ in model.named_parameters()]
    for part in train:
        if part != EVERYTHING and not any(part_of(name, [part]) for name in names):
            tied = " (it is tied to the embeddings)" if part == "lm_head" else ""
            hint = nearest(part, [EVERYTHING, *top_level_parts(model)])
            raise RecipeError(f"train.{part}: the model has no such part{tied}{hint}")
    for name, parameter in model.named_parameters():
        part = part_of(public_name(name), train)
        parameter.requires_grad_(part is not None and not train[part].freeze)


def linear_layers(model: nn.Module, lora: Lora) -> list[str]:
    """Full names of the linear layers that get an adapter: those inside `lora.parts`, the head excepted.

    Raises:
        RecipeError: If there is none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(public_name(name), lora.parts) is not None
        and (not name.startswith("lm_head") or "lm_head" in lora.parts)
        and (lora.targets is None or name.rpartition(".")[2] in lora.targets)
    ]
    if not found:
        raise RecipeError(f"lora: no linear layer is in {', '.join(lora.parts)} with targets {lora.targets or 'all'}")
    return found


# Counting and grouping


def trainable_by_part(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by top-level part; those of LoRA as `lora`."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "lora" if ".lora_" in name else public_name(name).partition(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def no_decay_parameters(model: nn.Module, *, decay_rms_norms: bool = False) -> set[str]:
    """Names of parameters without weight decay: biases and the weights of norms (llava-1.5 spec section 5).

    Args:
        decay_rms_norms: Count RMS norms as ordinary weights, as OneVision's trainer does; LayerNorms never decay.
    """
    found = {name for name, _ in model.named_parameters() if "bias" in name}
    for prefix, module in model.named_modules():
        kind = type(module).__name__
        rms = "RMSNorm" in kind
        if (
            isinstance(module, (nn.LayerNorm, nn.RMSNorm))
            or (rms and not decay_rms_norms)
            or kind.endswith("LayerNorm")
        ):
            if rms and decay_rms_norms:
                continue
            found |= {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)}
    return found


@dataclass(frozen=True)
class Rates:
    """Rates of a stage: the base ones and those of parts.

    Attributes:
        learning_rate, weight_decay: For parts that name none of their own.
        parts: As in `Stage.train`.
    """

    learning_rate: float
    weight_decay: float = 0.0
    parts: Mapping[str, PartTraining] | None = None
    decay_rms_norms: bool = False

    @classmethod
    def of(cls, stage: Stage) -> Rates:
        """The rates of a stage."""
        return cls(stage.learning_rate, stage.weight_decay, stage.train, stage.decay_rms_norms)


def optimizer_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Parameter groups: first the base rates, then one pair per part with rates of its own.

    Each pair is (decayed, not decayed); empty groups are left out. Every group has `params`, `lr`, `weight_decay`
    and `names`, in the order of the model.
    """
    no_decay = no_decay_parameters(model, decay_rms_norms=rates.decay_rms_norms)
    parts = {
        name: options
        for name, options in (rates.parts or {}).items()
        if options.learning_rate is not None or options.weight_decay is not None
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for part in ["", *parts]:
        options = parts.get(part, PartTraining())
        rate = rates.learning_rate if options.learning_rate is None else options.learning_rate
        decay = rates.weight_decay if options.weight_decay is None else options.weight_decay
        for decayed in (True, False):
            groups[part, decayed] = {
                "params": [],
                "names": [],
                "lr": rate,
                "weight_decay": decay if decayed else 0.0,
            }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(public_name(name), list(rates.parts or {}))
        own = part if part in parts and ".lora_" not in name else ""
        group = groups[own, name not in no_decay]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def progress_hooks(model: nn.Module) -> list[Callable[[float], None]]:
    """`set_progress` of every part that wants to know how much of the stage is done, from 0 to 1, before each batch."""
    return [module.set_progress for module in model.modules() if callable(getattr(module, "set_progress", None))]
