"""Encoders that checkpoints name and do not contain: their configuration and tensors from a folder of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import LazyState, holds_weights, read_folder, read_json
from llavakit.checkpoints.layouts import rename_with
from llavakit.errors import CheckpointError, quoted
from llavakit.registry import ENCODER_FILES
from llavakit.vision.open_clip import is_open_clip, open_clip_projection, read_open_clip_folder

# The text side of contrastive models, which their files hold beside the encoder.
_TEXT_SIDE = re.compile(r"(?:text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$)")


class EncoderFiles:
    """A form in which encoders are published on their own, other than transformers' and open_clip's.

    Subclasses are registered in `llavakit.registry.ENCODER_FILES` under the `model_type` of their config.json.
    """

    def options(self, raw: Fields) -> dict[str, Any]:
        """Options of the encoder's configuration, with llavakit's or transformers' `model_type`.

        Args:
            raw: The object in config.json; every key must be read, or be known to carry no meaning.
        """
        raise NotImplementedError(f"{type(self).__name__} must define options")

    def state(self, raw: Fields, state: LazyState) -> LazyState:
        """The tensors under the names of the encoder's class; the default leaves them as they are.

        Args:
            state: Without a text side.
        """
        return state


def _published_form(folder: Path) -> tuple[EncoderFiles, Fields] | None:
    """The registered form of a folder's files and the object in its config.json."""
    path = folder / "config.json"
    raw = read_json(path) if path.is_file() else {}
    if raw.get("model_type") not in ENCODER_FILES:
        return None
    return ENCODER_FILES.get(raw["model_type"])(), Fields(raw, str(path))


def is_published_form(folder: Path) -> bool:
    """Whether `read_encoder` knows more of a folder's files than transformers does."""
    return is_open_clip(folder) or _published_form(folder) is not None


def read_encoder(folder: Path) -> LazyState:
    """The tensors of an encoder's folder under the names of transformers' class; without a text side.

    Args:
        folder: In transformers' or open_clip's files, or in a form that a system brings.
    """
    if is_open_clip(folder):
        return read_open_clip_folder(folder).state
    state = read_folder(folder).renamed(lambda name: None if _TEXT_SIDE.match(name) else name)
    state = state.renamed(rename_with(((r"^(?:vision_model|dinov2|vit)\.", ""),)))
    found = _published_form(folder)
    return state if found is None else found[0].state(found[1], state)


def encoder_options(folder: Path) -> dict[str, Any] | None:
    """Options of an encoder's configuration, from transformers' or open_clip's files; None if the folder has none."""
    if is_open_clip(folder):
        return read_open_clip_folder(folder).config
    if not (folder / "config.json").is_file():
        return None
    found = _published_form(folder)
    if found is not None:
        return found[0].options(found[1])
    config = read_json(folder / "config.json")
    nested = config.get("vision_config", config)
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{folder / 'config.json'}: vision_config is {quoted(nested)}, it should be an object")
    return {**nested, "model_type": vision_model_type(config)}


def read_projection(folder: Path) -> Tensor | None:
    """The projection [joint width, encoder width] of a CLIP encoder into the space of images and texts; None without.

    Args:
        folder: In transformers' or open_clip's files.
    """
    if is_open_clip(folder):
        return open_clip_projection(folder)
    if not holds_weights(folder):
        return None
    state = read_folder(folder)
    return state.get("visual_projection.weight")


def holds_encoder(folder: Path) -> bool:
    """Whether a folder holds an encoder's weights."""
    return is_open_clip(folder) or holds_weights(folder)


def check_same(state: LazyState, other: LazyState, folder: Path) -> None:
    """Refuse an encoder that was named beside another one in the files."""
    differs = next((name for name in other if name in state and not _alike(state[name], other[name])), None)
    if differs is not None:
        raise CheckpointError(
            f"{folder}: holds an encoder of its own, which is not that of --vision-tower ({quoted(differs)} differs); "
            "leave the option out, or exchange the encoder with convert --exchange-vision-tower"
        )


def _alike(stored: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in the lesser of their precisions."""
    if stored.shape != other.shape:
        return False
    dtype = min(stored.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(stored.to(dtype), other.to(dtype))


def vision_model_type(config: Mapping[str, Any]) -> str:
    """The vision part's model type of a CLIP-like config.json."""
    kind = config.get("model_type", "clip")
    return kind if kind.endswith("_vision_model") or "vision_config" not in config else f"{kind}_vision_model"
