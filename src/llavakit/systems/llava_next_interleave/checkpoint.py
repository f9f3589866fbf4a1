"""LLaVA-NeXT-Interleave's published files in the authors' layout.

The hub's config.json changed over time. The current one says `pad` and `flat`: one view of 729 tokens per picture,
without a newline. An earlier one says `anyres` and `spatial_unpad`: a picture that is alone is tiled, a picture among
several has 730 tokens. Both are read as they say. transformers' conversions (`llava-hf/llava-interleave-*`) are folders
of `LlavaForConditionalGeneration`, which llavakit reads and writes as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llavakit.checkpoints.llava_class import LlavaClassLayout
from llavakit.checkpoints.siglip_qwen import SiglipQwenLayout, media_of, settings_of

SAMPLING = {"type": "strided", "frames": 16}  # the published demo
POOL_MODE = "mm_spatial_pool_mode"

Settings = Mapping[str, Any]


class InterleaveLayout(SiglipQwenLayout):
    """`lmms-lab/llava-next-interleave-*`: a SigLIP encoder without its last layer, Qwen1.5, no newline by default.

    Frames of a video are laid out like pictures, 729 tokens each, unless the files name a pooling
    (`mm_spatial_pool_mode`, as for the paper's study of pooled videos).
    """

    system = "llava-next-interleave"
    known_changes = {
        "media.image.arrange.rounding": "the authors' code unpads with int(), so a few sizes get other token counts",
        "media.multi_image.arrange.single_newline": "the authors' code writes the newline of an image among several by "
        "how its caller stacks the images",
    }

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        """Whether the settings are those of the released files: no budget of tiles, and Qwen1.5's ungrouped heads
        where pictures are tiled."""
        merge, ratio = str(raw.get("mm_patch_merge_type") or "flat"), raw.get("image_aspect_ratio")
        flat = merge == "flat" and ratio == "pad"
        heads = raw.get("num_attention_heads")
        tiled = merge == "spatial_unpad" and ratio == "anyres" and raw.get("num_key_value_heads", heads) == heads
        return (flat or tiled) and super().matches(raw, folder)

    def media(self, raw: Settings, size: int, **options: Any) -> dict[str, Any]:
        media = media_of(raw, size, **options)
        if not raw.get(POOL_MODE):
            media["video"]["arrange"].pop("pool")
        return media

    def settings(self, media: Mapping[str, Any]) -> dict[str, Any] | None:
        arrange = media.get("video", {}).get("arrange", {})
        if arrange.get("type") != "frames" or arrange.get("pool"):
            return settings_of(media)
        pooled = arrange | {"pool": {"mode": "bilinear", "stride": 2}}
        found = settings_of({**media, "video": media["video"] | {"arrange": pooled}})
        return found and {name: value for name, value in found.items() if name != POOL_MODE}

    def system_fields(self) -> dict[str, Any]:
        return {"template": "qwen_1_5_interleaved", "extras": {"processor": {"sampling": dict(SAMPLING)}}}


class InterleaveTransformersLayout(LlavaClassLayout):
    """`llava-hf/llava-interleave-*`: `LlavaForConditionalGeneration` with the same encoder and decoder.

    The class takes images alone; frames of a video are images there, laid out as llavakit lays out a video.
    """

    system = "llava-next-interleave"

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        vision, text = raw.get("vision_config") or {}, raw.get("text_config") or {}
        return (
            super().matches(raw, folder)
            and vision.get("model_type") == "siglip_vision_model"
            and text.get("model_type") == "qwen2"
            and vision.get("vision_use_head") is False
            and raw.get("vision_feature_layer") == -1
            and raw.get("vision_feature_select_strategy") == "full"
        )

    def further_media(self, views: Mapping[str, Any]) -> dict[str, Any]:
        shared = {name: views[name] for name in ("size", "image_mean", "image_std") if name in views}
        frame = {"type": "squash", **shared}
        arrange = {"type": "frames", "newline": "no_token"}
        return {"video": {"views": {"type": "frames", "frame": frame}, "arrange": arrange}}

    def usual_template(self, folder: Path, config: PreTrainedConfig) -> str:
        return "qwen_1_5_interleaved"

    def extras(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"extras": {"processor": {"sampling": dict(SAMPLING)}}}
