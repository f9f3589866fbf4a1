"""What was written is read back and compared before it is published.

Every tensor is noted by a checksum when it is read from its source, and compared under llavakit's names with what the
new folder gives. So are the configurations, by what they mean: a planner or an arrangement is compared as it runs, not
as it is spelt. What a layout cannot hold is an error that names the option, not a silent loss.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llavakit.checkpoints.files import LazyState
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.routes import MediaSpec, Route
from llavakit.registry import CONNECTORS
from llavakit.views.plan import View

_FIELDS = ("text_config", "vision_config", "vision_feature_layer")
_VIEW = View(96, 96)  # on which selections of tokens are compared
_FORMAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


class Checksum(NamedTuple):
    """A tensor by type, shape and content."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    crc: int


def checksum(tensor: Tensor) -> Checksum:
    """The checksum of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return Checksum(tensor.dtype, tuple(tensor.shape), zlib.crc32(flat.view(torch.uint8).numpy()))


class Noted(Mapping[str, Tensor]):
    """Tensors by name; what is read is noted."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.sums: dict[str, Checksum] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        self.sums[name] = checksum(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def compare_tensors(
    noted: Noted, again: LazyState, tied: set[str], *, rounded: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse a new folder whose tensors are not those that were read.

    Args:
        noted: The source, after writing.
        again: The new folder's tensors under llavakit's names. Embedding and head may have grown.
        tied: Names that need not be in the files.
        rounded: The source once more, where the new folder holds differences, which give it back but for rounding.

    Raises:
        CheckpointError: It names the first tensor that differs.
    """
    missing = next((name for name in noted if name not in again and name not in tied), None)
    extra = next((name for name in again if name not in noted), None)
    if missing or extra:
        raise CheckpointError(
            f"tensor {quoted(missing or extra)} {'is lost' if missing else 'is new'} when what was written is read back"
        )
    for name, wanted in noted.sums.items():
        if name in tied and name not in again:
            continue
        tensor = again[name]
        if wanted.shape and tensor.shape[:1] > torch.Size(wanted.shape[:1]):
            tensor = tensor[: wanted.shape[0]]
        same = checksum(tensor) == wanted or (rounded is not None and _nearly(tensor, rounded[name]))
        if not same:
            raise CheckpointError(f"tensor {quoted(name)} differs when what was written is read back")


def _nearly(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are the same but for a few roundings of the largest values."""
    if tensor.dtype != wanted.dtype or tensor.shape != wanted.shape or not tensor.is_floating_point():
        return False
    one, other = tensor.float(), wanted.float()
    return bool((one - other).abs().max() <= 8 * torch.finfo(tensor.dtype).eps * other.abs().max())


def compare_configs(
    source: LlavakitConfig, again: LlavakitConfig, *, grown: bool = False, known: Mapping[str, str] | None = None
) -> list[str]:
    """Refuse a new folder that means another model.

    Args:
        grown: Whether the vocabulary may have grown.
        known: Options that a layout may change all the same, each with what that means.

    Returns:
        What it means for the options that did change.

    Raises:
        CheckpointError: It names the first option that differs, and both values.
    """
    ours, theirs = _meaning(source), _meaning(again)
    if grown:
        for side in (ours, theirs):
            side["text_config"].pop("vocab_size", None)
    notes: list[str] = []
    for path, mine, other in _differences(ours, theirs, ""):
        if path not in (known or {}):
            raise CheckpointError(f"{path}: is {quoted(mine)}, and would be {quoted(other)} in this layout")
        notes.append(known[path])
    return notes


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}, key=str):
            yield from _differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))
    elif ours != theirs:
        yield path, ours, theirs


def _meaning(config: LlavakitConfig) -> dict[str, Any]:
    """What a configuration means, as plain values."""
    found: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(config, name)
        found[name] = _plain(value.to_dict()) if hasattr(value, "to_dict") else value
    found["vision_feature_layer"] = _layers(config)
    spec = MediaSpec(config)
    found["media"] = {modality: _route(route, config) for modality, route in spec.routes.items()}
    found["extra_encoders"] = {
        name: _plain({**extra, "config": config.encoder_config(name)[0]})  # with its defaults filled in
        for name, extra in config.extra_encoders.items()
    }
    if found["media"].get("multi_image") == found["media"].get("image"):
        found["media"].pop("multi_image", None)  # an image among several is one like any other anyway
    found["language_adapter"] = _plain(config.language_adapter)
    return found


def _layers(config: LlavakitConfig) -> list[int]:
    """Numbers of the layers that are read, counted from the embedding."""
    layers = config.vision_feature_layer
    depth = getattr(config.vision_config, "num_hidden_layers", None)
    return [
        depth + 1 + layer if layer < 0 and depth is not None else layer
        for layer in (layers if isinstance(layers, (list, tuple)) else [layers])
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if key not in _FORMAL and item is not None}
        return {str(key): _plain(item) for key, item in kept.items()}  # JSON knows text keys alone
    if isinstance(value, PreTrainedConfig):
        return _plain(value.to_dict())
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _route(route: Route, config: LlavakitConfig) -> dict[str, Any]:
    cls = CONNECTORS.get(route.connector_options["type"])
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not parameter.empty
    }
    geometries = zip(route.geometries, route.keep_prefix, strict=True)
    return {
        "tokens": [list(geometry.grid(_VIEW, keep)) for geometry, keep in geometries],
        "views": part_values(route.planner),
        "arrange": part_values(route.arrangement),
        "encoder": list(route.encoders),
        "connector": _plain(defaults | route.connector_options),
    }


def part_values(part: Any) -> Any:
    """A planner or an arrangement as the values that it works with."""
    if isinstance(part, np.ndarray):
        return part.tolist()
    if isinstance(part, (list, tuple)):
        return [part_values(item) for item in part]
    if isinstance(part, Mapping):
        return {key: part_values(item) for key, item in part.items()}
    if isinstance(part, (int, float, str, bool, type(None))):
        return part
    values = {
        name: part_values(value) for name, value in getattr(part, "__dict__", {}).items() if not name.startswith("_")
    }
    return {"type": type(part).__name__, **values}
