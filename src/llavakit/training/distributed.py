"""Several processes: sharding the model with FSDP2, and what must happen in one of them or in all.

`shard` works on GPUs (NCCL) and on CPUs (gloo). Start with `torchrun --nproc-per-node N -m llavakit.cli train ...` and
`shard: true` in the stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from llavakit.errors import RecipeError, UserError

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the first process."""
    return world_size() == 1 or dist.get_rank() == 0


def refuse_other_sharding() -> None:
    """A launcher that wants accelerate to shard too would have two libraries do it.

    Raises:
        RecipeError: If this process was started by one.
    """
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise RecipeError(
                f"{variable}: accelerate does not shard here; start with torchrun and write shard: true in the stage"
            )


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """The value that the first process has, in all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], Any]) -> Any:
    """What a function returns in the first process, in all of them; its `UserError` is raised in all of them too."""
    value, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            value = function()
        except UserError as raised:
            error = raised
    value, error = from_main((value, error))
    if error is not None:
        raise error
    return value


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of decoder and encoders: members of the longest `ModuleList` inside each.

    They hold nearly all weights, and one after another they are gathered, used and let go.
    """
    blocks: list[nn.Module] = []
    for part in model.model.children():
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        if lists:
            blocks += max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
    return blocks


def shard(model: nn.Module, *, bf16: bool = False) -> nn.Module:
    """Shard a model in place with FSDP2: every layer of decoder and encoders, then the rest as one group.

    Connectors, embeddings and head stay in the root group, so that tied weights are sharded once.

    Args:
        model: `LlavakitForConditionalGeneration`, or a PEFT model around one.
        bf16: Compute in bfloat16; the shards and the reduction of gradients stay as they are.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    for block in repeated_blocks(inner):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(model, FSDPModule)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors, whole; with several processes every one of them must ask."""
    if not is_sharded(model):
        return model.state_dict()
    return get_model_state_dict(model, options=_FULL)


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, whole, by names of parameters."""
    return get_optimizer_state_dict(model, _plain(optimizer), options=_FULL)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Shard a whole optimiser state again."""
    set_optimizer_state_dict(model, _plain(optimizer), dict(state), options=_FULL)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


class Sharded(nn.Module):
    """A sharded model as the trainer holds it: a separate object, so that it is not wrapped in DDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.module(*args, **kwargs)
