"""Low-rank adapters through PEFT: adding, quantising what they adapt, saving, merging.

Parts under `train` are trained in full beside the adapters, without any wrapper. On disk they are what PEFT calls
`modules_to_save`, so that PEFT reads the folder; bare parameters (`image_newline`) and parts of modules have a file of
their own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llavakit.checkpoints import adapters
from llavakit.checkpoints.adapter_base import TRAINED, record_base
from llavakit.checkpoints.files import LazyState, read_file, read_folder
from llavakit.errors import CheckpointError, UserError
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.training.lora_targets import targets_of
from llavakit.training.parameter_groups import (
    check_trainable,
    freeze_all_but,
    switch_on,
    train_rows,
)
from llavakit.training.recipe import Stage

_PREFIX = "base_model.model."
_LORA = ".lora_"


def prepare(model: nn.Module, stage: Stage, tokenizer: Any = None) -> nn.Module:
    """Freeze or wrap the model for a stage; returns what the trainer trains.

    Args:
        tokenizer: Knows the tokens whose rows `train` names.

    Raises:
        RecipeError: If a name does not fit the model.
        UserError: If a package is missing.
    """
    freeze_all_but(model, stage.train)
    if stage.lora is not None:
        model = add_lora(model, stage)
    train_rows(model, stage, tokenizer)
    check_trainable(model, stage)
    return model


def add_lora(model: nn.Module, stage: Stage) -> nn.Module:
    """The model with LoRA adapters on the linear layers and attention modules of `stage.lora.parts`.

    Raises:
        UserError: If PEFT is not installed.
        RecipeError: If a name does not fit.
    """
    package = adapters.peft()
    lora = stage.lora
    targets = targets_of(model, stage)
    if lora.quantize:
        quantise(model, targets.linear, lora.quantize)
    config = package.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets.linear + targets.attention,
        bias="none",
    )
    config._register_custom_module({nn.MultiheadAttention: _exact_attention()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
        wrapped = package.get_peft_model(model, config)
    switch_on(wrapped, stage.train)  # PEFT has frozen everything
    return wrapped


def quantise(model: nn.Module, names: Iterable[str], kind: str) -> None:
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


def _exact_attention() -> type:
    """PEFT's layer for `nn.MultiheadAttention`, but with a base that never changes.

    PEFT adds the adapter to the weights before every pass and subtracts it afterwards, and each time the frozen weights
    are rounded: they drift (in bfloat16 visibly), and a run that was interrupted ends in other weights than one that
    was not. Here the very weights from before the pass are put back.
    """
    from peft.tuners.lora.layer import MultiheadAttention

    class ExactMultiheadAttention(MultiheadAttention):
        def merge(self, *args: Any, **kwargs: Any) -> None:
            base = self.get_base_layer()
            self._frozen = base.in_proj_weight, base.out_proj.get_base_layer().weight
            super().merge(*args, **kwargs)

        def unmerge(self) -> None:
            super().unmerge()
            base = self.get_base_layer()
            base.in_proj_weight, base.out_proj.get_base_layer().weight = self._frozen

    return ExactMultiheadAttention


# On disk


def _own_name(name: str) -> str:
    """A parameter's name in the model without PEFT."""
    return name.removeprefix(_PREFIX).replace(".base_layer", "")


def _in_full(model: nn.Module) -> tuple[list[str], list[str]]:
    """What trains in full: modules all of whose parameters do, outermost only, and the names of other parameters.

    Names are those of the model without PEFT. Modules that hold an adapter are no whole modules.
    """
    parameters = {_own_name(name): (_LORA in name, p.requires_grad) for name, p in model.named_parameters()}
    trained = [name for name, (lora, requires) in parameters.items() if requires and not lora]
    mixed = {path for name, (lora, requires) in parameters.items() if lora or not requires for path in _paths(name)}
    modules: dict[str, None] = {}
    rest = []
    for name in trained:
        whole = next((path for path in _paths(name) if path not in mixed and path != "model"), None)
        if whole is None:
            rest.append(name)
        else:
            modules[whole] = None
    return list(modules), rest


def _paths(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _adapter_tensors(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA tensors under the names of PEFT's files."""
    return adapters.peft().get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)


def save_adapter(
    model: Any, state: Mapping[str, Tensor], processor: LlavakitProcessor, folder: Path, base: Path, place: Path
) -> None:
    """PEFT's adapter files, the trained parameters that are not in them, the base's record, and the processor.

    Args:
        model: The PEFT model.
        state: Its whole state (`distributed.full_state`).
        folder: Where to write.
        base: Folder of the model that is adapted.
        place: Where `folder` will be in the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules, rest = _in_full(model)
    own = {_own_name(name): name for name in state if _LORA not in name}
    tensors = {name: tensor for name, tensor in _adapter_tensors(model, state).items() if _LORA in name}
    for module in modules:
        inside = [name for name in own if name.startswith(f"{module}.")]
        tensors |= {f"{_PREFIX}{name}": state[own[name]] for name in inside}
    _write_tensors(tensors, folder / "adapter_model.safetensors")
    if rest:
        _write_tensors({name: state[own[name]] for name in rest}, folder / TRAINED)
    options = model.peft_config["default"].to_dict() | {
        "inference_mode": True,
        "modules_to_save": sorted(modules) or None,
    }
    if modules and getattr(model.get_base_model().config, "tie_word_embeddings", False):
        options["ensure_weight_tying"] = True  # the head learns what the embeddings learn
    options |= {"base_model_name_or_path": str(base.absolute())}
    text = json.dumps(options, indent=2, sort_keys=True, default=sorted)  # sets: in one order, whatever the process
    (folder / adapters.CONFIG).write_text(text + "\n", encoding="utf-8")
    record_base(folder, base, place)
    processor.save_pretrained(folder)


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: Any, folder: Path) -> None:
    """Put the adapter of a folder into a model that is prepared for the same stage.

    Raises:
        CheckpointError: If a tensor is missing, superfluous or does not fit.
    """
    stored = read_folder(folder, "adapter_model")
    lora = {name: stored[name] for name in stored if _LORA in name}
    wanted = set(_adapter_tensors(model, model.state_dict()))
    _same(folder, wanted, set(lora))
    adapters.peft().set_peft_model_state_dict(model, lora)
    full = {name.removeprefix(_PREFIX): stored[name] for name in stored if _LORA not in name}
    if (folder / TRAINED).is_file():
        trained = read_file(folder / TRAINED)
        full |= {name: trained[name] for name in trained}
    parameters = {_own_name(name): p for name, p in model.named_parameters() if _LORA not in name}
    _same(folder, {name for name, p in parameters.items() if p.requires_grad}, set(full))
    for name, tensor in full.items():
        parameters[name].copy_(tensor)


def _same(folder: Path, wanted: set[str], found: set[str]) -> None:
    for name in sorted(wanted - found):
        raise CheckpointError(f"{folder}: tensor {name!r} is missing; the recipe trains it")
    for name in sorted(found - wanted):
        raise CheckpointError(f"{folder}: tensor {name!r} is unknown to the recipe's adapter")


def merged_state(model: Any, state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> LazyState:
    """The weights of a PEFT model under the model's own names, adapters merged; see `checkpoints.adapters.merge`.

    Args:
        model: The PEFT model.
        state: Its whole state (`distributed.full_state`).
        base: Weights before they were quantised, under the model's own names; those in `state` are used otherwise.
    """
    own = {_own_name(name): state[name] for name in state if _LORA not in name}
    if base is not None:
        trained = {_own_name(name) for name, p in model.named_parameters() if p.requires_grad and _LORA not in name}
        own = {name: own[name] if name in trained else tensor for name, tensor in base.items()}
    net = model.get_base_model()
    with torch.device("meta"):
        skeleton = LlavakitForConditionalGeneration(net.config)
    if net.config.tie_word_embeddings:
        own.pop("lm_head.weight", None)
    lora = {name: tensor for name, tensor in _adapter_tensors(model, state).items() if _LORA in name}
    return adapters.merge(LazyState.of(own), LazyState.of(lora), model.peft_config["default"], skeleton, "adapter")
