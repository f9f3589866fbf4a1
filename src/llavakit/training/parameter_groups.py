"""What trains, and how fast: parts by name to parameters, and parameters to optimiser groups.

A part is named as users see it (`vision_tower`, `multi_modal_projector`, `language_model`, `lm_head`,
`image_newline`, `language_adapter`, an extra encoder or connector) or by any dotted path inside one
(`language_model.layers.0`, `language_adapter.predictor`). Where several names match, the longest one counts;
`all` matches everything. Of an embedding table single rows can train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.errors import RecipeError
from llavakit.registry import nearest
from llavakit.training.recipe import PartTraining, Stage

EVERYTHING = "all"


def core(model: nn.Module) -> nn.Module:
    """llavakit's model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def public_name(name: str) -> str:
    """The name of a parameter as a recipe writes it: without the wrappers of PEFT and of the class with the head."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    return name.replace(".base_layer", "").removeprefix("vision_model.").replace("_tower.vision_model.", "_tower.")


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
            if part == "lm_head" and _head_trains_along(model, train):
                continue
            tied = " (it is tied to the embeddings)" if part == "lm_head" else ""
            hint = nearest(part, [EVERYTHING, *top_level_parts(model)])
            raise RecipeError(f"train.{part}: the model has no such part{tied}{hint}")
    switch_on(model, train)


def _head_trains_along(model: nn.Module, train: Mapping[str, PartTraining]) -> bool:
    """Whether a head without settings of its own is the table of embeddings, and that trains."""
    head = getattr(core(model), "lm_head", None)
    if head is None or train["lm_head"] != PartTraining():
        return False
    table = core(model).get_input_embeddings().weight
    if head.weight is not table:
        return False
    return any(trains(name, train) for name, parameter in model.named_parameters() if parameter is table)


def switch_on(model: nn.Module, train: Mapping[str, PartTraining]) -> None:
    """What `freeze_all_but` does to names that were checked; adapters of LoRA always train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora(name) or trains(name, train))


def is_lora(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def trains(name: str, train: Mapping[str, PartTraining]) -> bool:
    """Whether a parameter trains in full."""
    part = part_of(public_name(name), train)
    return part is not None and not train[part].freeze


def check_trainable(model: nn.Module, stage: Stage) -> None:
    """Make sure that exactly what the stage names is trained.

    Raises:
        RuntimeError: Otherwise: some library changed it on the way.
    """
    for name, parameter in model.named_parameters():
        wanted = is_lora(name) if stage.lora is not None and is_lora(name) else trains(name, stage.train)
        if parameter.requires_grad != wanted:
            state = "trains" if parameter.requires_grad else "does not train"
            raise RuntimeError(f"stage {stage.name!r}: parameter {name} {state}, which the stage does not say")


# Single rows of a table


def train_rows(model: nn.Module, stage: Stage, tokenizer: Any) -> None:
    """Let only some rows of a table train: gradients of the others are zero.

    Raises:
        RecipeError: If a part is no table of the vocabulary, or a token is not in the vocabulary.
    """
    for part, options in stage.train.items():
        if options.rows is None or options.freeze:
            continue
        where = f"train.{part}.rows"
        inside = [(name, p) for name, p in model.named_parameters() if part_of(public_name(name), stage.train) == part]
        vocabulary = getattr(getattr(core(model).config, "text_config", None), "vocab_size", None)
        if len(inside) != 1 or inside[0][1].dim() != 2 or len(inside[0][1]) != vocabulary:
            tables = "language_model.embed_tokens, lm_head"
            raise RecipeError(f"{where}: {part} is no table with one row per token; name one, such as {tables}")
        if stage.shard:
            raise RecipeError(f"{where}: single rows cannot train in shards; leave out shard")
        parameter = inside[0][1]
        parameter.trained_rows = len(set(options.rows))
        if tokenizer is None and parameter.is_meta:  # rows are counted; which ones they are makes no difference
            continue
        numbers = [_row(token, tokenizer, where, vocabulary) for token in options.rows]
        mask = torch.zeros(vocabulary, 1, dtype=torch.bool)
        mask[numbers] = True
        parameter.register_hook(_masking(mask))


def _masking(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(~mask.to(gradient.device), 0.0)


def _row(token: str, tokenizer: Any, where: str, vocabulary: int) -> int:
    known = tokenizer.get_vocab()
    if token not in known:
        raise RecipeError(f"{where}: the tokenizer has no token {token!r}{nearest(token, list(known))}")
    if known[token] >= vocabulary:
        raise RecipeError(f"{where}: token {token!r} has number {known[token]}, the model has {vocabulary} rows")
    return known[token]


def trained_values(parameter: nn.Parameter) -> int:
    """How many values of a trainable parameter train: all, or those of its rows that were chosen."""
    rows = getattr(parameter, "trained_rows", None)
    return parameter.numel() if rows is None else rows * parameter.shape[1]


# Counting and grouping


def trainable_by_part(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by top-level part; those of LoRA as `lora`."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "lora" if is_lora(name) else public_name(name).partition(".")[0]
            counts[part] = counts.get(part, 0) + trained_values(parameter)
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
        decay_rms_norms: See `no_decay_parameters`.
        decay_everything: Whether biases and norms decay too.
    """

    learning_rate: float
    weight_decay: float = 0.0
    parts: Mapping[str, PartTraining] | None = None
    decay_rms_norms: bool = False
    decay_everything: bool = False

    @classmethod
    def of(cls, stage: Stage) -> Rates:
        """The rates of a stage."""
        return cls(stage.learning_rate, stage.weight_decay, stage.train, stage.decay_rms_norms, stage.decay_everything)


def optimizer_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Parameter groups: first the base rates, then one pair per part with rates of its own.

    Each pair is (decayed, not decayed); empty groups are left out. Every group has `params`, `lr`, `weight_decay`
    and `names`, in the order of the model.
    """
    no_decay = set() if rates.decay_everything else no_decay_parameters(model, decay_rms_norms=rates.decay_rms_norms)
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
        own = part if part in parts and not is_lora(name) else ""
        # decay would also change the rows that do not train
        group = groups[own, name not in no_decay and not hasattr(parameter, "trained_rows")]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def progress_hooks(model: nn.Module) -> list[Callable[[float], None]]:
    """`set_progress` of every part that wants to know how much of the stage is done, from 0 to 1, before each batch."""
    return [module.set_progress for module in model.modules() if callable(getattr(module, "set_progress", None))]
