"""LoRA adapters: reading PEFT's files and merging them into the weights that they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llavakit.checkpoints.files import LazyState
from llavakit.errors import CheckpointError


def strip_trainable_prefix(name: str) -> str:
    """Names in `mm_projector.bin` and `non_lora_trainables.bin` without what training wrapped around them."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def merge_lora(state: LazyState, adapter: LazyState, config: Mapping[str, Any], where: str) -> LazyState:
    """Add B A x alpha / r to the weights that a LoRA adapter changes (PEFT's file layout).

    Raises:
        CheckpointError: If the adapter changes a weight that the base does not have, or is of another kind.
    """
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        raise CheckpointError(f"{where}/adapter_config.json: only plain LoRA adapters can be merged")
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    merged, origin = {}, {}
    for name in adapter:
        if ".lora_A." not in name:
            continue
        target = strip_trainable_prefix(
            name.replace(".lora_A.weight", ".weight").replace(".lora_A.default.weight", ".weight")
        )
        if target not in state:
            raise CheckpointError(f"{where}: the adapter changes {target!r}, which the base model does not have")

        def read(name: str = name, target: str = target) -> Tensor:
            down, up = adapter[name].float(), adapter[name.replace(".lora_A.", ".lora_B.")].float()
            weight = state[target]
            return (weight.float() + scale * (up @ down)).to(weight.dtype)

        merged[target], origin[target] = read, adapter.origin.get(name, "")
    return state.joined(LazyState(merged, origin))
