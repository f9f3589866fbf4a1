"""Names of encoders' tensors: published ones on disk, those of the installed transformers release in memory.

transformers changes the module names of its encoders from release to release (DINOv2's attention, one more or one
fewer `vision_model.` in CLIP and SigLIP) and joins or splits tensors on the way; what it writes to disk stays the same.
llavakit's files and layouts use the names on disk. Which name is which is asked of transformers, by sending numbered
tensors through the conversion that it applies when it saves.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from llavakit.checkpoints.files import LazyState
from llavakit.model.configuration import LlavakitConfig

_WRAP = "vision_model."
_ROWS = 2  # of every numbered tensor


def names_on_disk(config: LlavakitConfig) -> dict[str, tuple[str, ...]]:
    """Published names of encoders' tensors, with the names in memory of the tensors that are joined there.

    Only tensors whose names differ are listed. Names in memory are without `vision_model.`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for encoder in config.encoder_names():
        own, _, _ = config.encoder_config(encoder)
        pairs = _pairs(own.model_type, json.dumps(own.to_dict(), sort_keys=True, default=str))
        prefix = f"model.{encoder}."
        found |= {prefix + name: tuple(prefix + part for part in parts) for name, parts in pairs.items()}
    return found


@functools.lru_cache(maxsize=32)
def _pairs(model_type: str, serialised: str) -> Mapping[str, tuple[str, ...]]:
    with torch.device("meta"):
        encoder = AutoModel.from_config(CONFIG_MAPPING[model_type](**json.loads(serialised)))
    names = list(encoder.state_dict())
    if not encoder.__module__.startswith("transformers."):
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    numbered = {name: torch.full((_ROWS,), number) for number, name in enumerate(names)}
    found = {}
    for name, tensor in revert_weight_conversion(encoder, numbered).items():
        parts = tuple(names[int(number)].removeprefix(_WRAP) for number in tensor.flatten()[::_ROWS])
        if parts != (name.removeprefix(_WRAP),):
            found[name.removeprefix(_WRAP)] = parts
    return found


def to_disk(config: LlavakitConfig, tensors: Mapping[str, Tensor]) -> LazyState:
    """Tensors under their published names, whichever of the two they had."""
    state = _unwrapped(tensors)
    joined = {name: parts for name, parts in names_on_disk(config).items() if all(part in state for part in parts)}
    taken = {part for parts in joined.values() for part in parts}

    def reader(parts: tuple[str, ...]) -> Callable[[], Tensor]:
        return lambda: state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])

    rest = state.renamed(lambda name: None if name in taken else name)
    origin = {name: state.origin.get(parts[0], "") for name, parts in joined.items()}
    return rest.joined(LazyState({name: reader(parts) for name, parts in joined.items()}, origin))


def to_memory(config: LlavakitConfig, state: LazyState) -> LazyState:
    """Tensors under the names of the installed release without `vision_model.`, whichever of the two they had."""
    state = _unwrapped(state)
    for name, parts in names_on_disk(config).items():
        if name in state:
            state = state.split(name, parts)
    return state


def encoder_to_memory(config: PreTrainedConfig, state: LazyState, prefix: str = "") -> LazyState:
    """Tensors of one encoder under the names of the installed release, whichever of the two they had.

    Args:
        config: The encoder's configuration.
        prefix: In front of its names; other tensors are left alone.
    """
    for name, parts in _pairs(config.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str)).items():
        if prefix + name in state:
            state = state.split(prefix + name, tuple(prefix + part for part in parts))
    return state


def encoder_to_disk(config: PreTrainedConfig, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of one encoder under their published names; see `encoder_to_memory`."""
    out = dict(state)
    for name, parts in _pairs(config.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str)).items():
        if all(prefix + part in out for part in parts):
            taken = [out.pop(prefix + part) for part in parts]
            out[prefix + name] = taken[0] if len(taken) == 1 else torch.cat(taken)
    return out


def _unwrapped(tensors: Mapping[str, Tensor]) -> LazyState:
    state = tensors if isinstance(tensors, LazyState) else LazyState.of(tensors)
    return state.renamed(lambda name: name.replace(f"_tower.{_WRAP}", "_tower."))
