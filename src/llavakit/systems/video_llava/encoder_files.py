"""LanguageBind's own repositories of encoders, with LoRA adapters merged while they are read (spec 3.2 and 8)."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from llavakit.checkpoints.encoders import EncoderFiles
from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import LazyState
from llavakit.errors import CheckpointError, quoted

_ADAPTER = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight$")
_WRAPPED = re.compile(r"^encoder\.base_model\.model\.")
CLIP = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("num_channels", "projection_dim", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range"),
    "initializer_factor",
)
_OTHER = {
    **dict.fromkeys(("text_config", "text_config_dict"), "is the text side, which Video-LLaVA does not use"),
    "vision_config_dict": "repeats vision_config",
    "projection_dim": "is the width of the space that pictures and texts share",
    "logit_scale_init_value": "says how the weights were trained",
}
_TRAINING = {
    **dict.fromkeys(("force_patch_dropout", "lora_dropout"), "acts while the encoder itself is trained"),
    **dict.fromkeys(("num_mel_bins", "target_length"), "belongs to LanguageBind's encoder of sound"),
    "video_decode_backend": "names a reader of video files",
}


class LanguageBindFiles(EncoderFiles):
    """`LanguageBind/LanguageBind_Video*`: a CLIP ViT whose configuration also speaks of time and LoRA."""

    model_type = "languagebind_video"

    def options(self, raw: Fields) -> dict[str, Any]:
        vision = self._vision(raw)
        raw.finish(_OTHER)
        found = {key: vision[key] for key in CLIP if vision.get(key) is not None}
        temporal = bool(vision.one_of("add_time_attn", False, True))
        frames = vision.get("num_frames", 1)
        self._scale(vision)
        vision.finish(_TRAINING)
        if not temporal and self.model_type == "clip_vision_model":
            return {"model_type": "clip_vision_model", **found}
        return {"model_type": "languagebind_video", **found, "num_frames": frames, "temporal_attention": temporal}

    def state(self, raw: Fields, state: LazyState) -> LazyState:
        vision = self._vision(raw)
        state = state.renamed(lambda name: _WRAPPED.sub("encoder.", name).replace(".base_layer.", "."))
        return merged(state, vision.get("lora_r", 0), self._scale(vision))

    @staticmethod
    def _vision(raw: Fields) -> Fields:
        vision = raw.section("vision_config")
        if not len(vision):
            raise CheckpointError(f"{raw.where}: vision_config is missing")
        return vision

    @staticmethod
    def _scale(vision: Fields) -> float:
        """What the product of an adapter's matrices is multiplied with."""
        rank, alpha = vision.get("lora_r") or 0, vision.get("lora_alpha") or 0
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (rank, alpha)) or rank < 0:
            raise CheckpointError(f"{vision.where}: lora_r and lora_alpha are {quoted(rank)} and {quoted(alpha)}")
        return alpha / rank if rank else 0.0


class LanguageBindImageFiles(LanguageBindFiles):
    """`LanguageBind/LanguageBind_Image`: a plain CLIP ViT."""

    model_type = "clip_vision_model"


def merged(state: LazyState, rank: int, scale: float) -> LazyState:
    """The tensors without adapters: W + scale * B @ A for every W that has one.

    Args:
        rank: Of every adapter.

    Raises:
        CheckpointError: If half of an adapter or its weight is missing; when a tensor is read, if shapes do not fit.
    """
    adapters: dict[str, dict[str, str]] = {}
    for name in state:
        if found := _ADAPTER.match(name):
            adapters.setdefault(found[1], {})[found[2]] = name
    if not adapters:
        return state

    def reader(weight: str, pair: dict[str, str]) -> Any:
        def read() -> Tensor:
            base, a, b = state[weight], state[pair["A"]], state[pair["B"]]
            if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != base.shape or a.shape[0] != rank != 0:
                raise CheckpointError(
                    f"{state.origin.get(weight, '')}: the adapter of {quoted(weight)} has shapes {list(a.shape)} and "
                    f"{list(b.shape)}, config.json says lora_r {rank}"
                )
            if b.shape[1] != rank:
                raise CheckpointError(f"{state.origin.get(weight, '')}: {quoted(pair['B'])} is not of rank {rank}")
            return (base.float() + scale * (b.float() @ a.float())).to(base.dtype)

        return read

    changed = {}
    for stem, pair in adapters.items():
        weight = f"{stem}.weight"
        absent = next((half for half in "AB" if half not in pair), None)
        if absent is not None or weight not in state:
            missing = weight if absent is None else f"lora_{absent}"
            raise CheckpointError(f"the adapter of {quoted(weight)} is incomplete: {missing} is missing")
        changed[weight] = reader(weight, pair)
    plain = state.renamed(lambda name: None if _ADAPTER.match(name) else name)
    return plain.joined(LazyState(changed, {name: state.origin.get(name, "") for name in changed}))
