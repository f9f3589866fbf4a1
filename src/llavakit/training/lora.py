"""Low-rank adapters through PEFT: adding, quantising what they adapt, saving, merging.

Knows PEFT's names. Parts under `train` are trained in full beside the adapter: modules through PEFT's
`modules_to_save`, bare parameters (`image_newline`) by their gradient and a file of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llavakit.checkpoints.files import read_folder
from llavakit.errors import CheckpointError, RecipeError, UserError
from llavakit.model.processing import LlavakitProcessor
from llavakit.training.parameter_groups import EVERYTHING, freeze_all_but, linear_layers, public_name
from llavakit.training.recipe import Lora, Stage

EXTRAS = "trained_parameters.safetensors"
_PREFIX = "base_model.model."


def quantise(model: nn.Module, names: list[str], kind: str) -> None:
    """Replace linear layers by bitsandbytes' 4-bit (nf4) or 8-bit ones, frozen.

    Raises:
        UserError: If bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UserError("lora.quantize: needs the package bitsandbytes; pip install bitsandbytes") from None
    for name in names:
        old = model.get_submodule(name)
        shape = (old.in_features, old.out_features, old.bias is not None)
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*shape, compute_dtype=old.weight.dtype, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        model.set_submodule(name, new.to(old.weight.device))  # moving is what quantises
    # how PEFT sees which kind of layer it wraps
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def add_lora(model: nn.Module, stage: Stage) -> nn.Module:
    """The model with LoRA adapters on the linear layers of `stage.lora.parts`.

    Raises:
        UserError: If PEFT is not installed.
        RecipeError: If a name does not fit.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("lora: needs the package peft; install llavakit[train]") from None
    lora = stage.lora
    freeze_all_but(model, stage.train)  # checks the names
    full = [part for part, options in stage.train.items() if not options.freeze]
    if EVERYTHING in full:
        raise RecipeError("train.all: with lora, name the parts that train in full")
    whole = [part for part in lora.parts if part in full]
    if whole:
        raise RecipeError(f"train.{whole[0]}: trains in full, so lora has nothing to adapt there; take it out of train")
    targets = linear_layers(model, lora)
    if lora.quantize:
        quantise(model, targets, lora.quantize)
    modules = {public_name(name): name for name, _ in model.named_modules() if name}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=[modules[part].removeprefix("model.") for part in full if part in modules] or None,
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
        wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if public_name(name) in full:  # a bare parameter, which PEFT does not wrap
            parameter.requires_grad_(True)
    return wrapped


def prepare(model: nn.Module, stage: Stage) -> nn.Module:
    """Freeze or wrap the model for a stage; returns what the trainer trains."""
    if stage.lora is not None:
        return add_lora(model, stage)
    freeze_all_but(model, stage.train)
    return model


def extra_names(model: nn.Module) -> list[str]:
    """Trainable parameters that PEFT's adapter file does not hold."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and ".modules_to_save." not in name
    ]


def save_adapter(model: Any, state: Mapping[str, Tensor], processor: LlavakitProcessor, folder: Path) -> None:
    """PEFT's adapter files, the trained parameters that are not in them, and the processor.

    Args:
        model: The PEFT model.
        state: Its whole state (`distributed.full_state`).
    """
    model.save_pretrained(folder, state_dict=dict(state))
    extras = {name: state[name].detach().contiguous() for name in extra_names(model)}
    if extras:
        save_file(extras, folder / EXTRAS, metadata={"format": "pt"})
    processor.save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: Any, folder: Path) -> None:
    """Put the adapter of a folder into a model that has the same adapter.

    Raises:
        CheckpointError: If a tensor does not fit.
    """
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, dict(read_folder(folder, "adapter_model")))
    if result.unexpected_keys:
        raise CheckpointError(f"{folder}: tensor {result.unexpected_keys[0]!r} is unknown to the recipe's adapter")
    extras = load_file(folder / EXTRAS) if (folder / EXTRAS).is_file() else {}
    parameters = dict(model.named_parameters())
    for name in extra_names(model):
        parameters[name].copy_(extras[name])


def merged_state(
    state: Mapping[str, Tensor], lora: Lora, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights of a PEFT model under the model's own names, adapters added: W + alpha / rank x B A.

    Args:
        state: The PEFT model's whole state.
        base: Weights before they were quantised, under the model's own names; those in `state` are used otherwise.
    """
    merged: dict[str, Tensor] = {}
    for full, tensor in state.items():
        name = full.removeprefix(_PREFIX)
        if ".lora_" in name or ".original_module." in name or ".base_layer.weight_format" in name:
            continue
        own = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
        if base is not None and own not in base:
            continue  # statistics of a quantised weight
        if base is not None and ".base_layer." in name:
            tensor = base[own]
        down = state.get(full.replace(".base_layer.weight", ".lora_A.default.weight"))
        if ".base_layer.weight" in name and down is not None:
            up = state[full.replace(".base_layer.weight", ".lora_B.default.weight")]
            change = lora.alpha / lora.rank * (up.float() @ down.float())
            tensor = (tensor.float() + change).to(tensor.dtype)
        merged[own] = tensor
    return merged
