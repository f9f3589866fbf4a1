"""LLaVA-Mini's published files: the classic layout with a compressor and pre-fusion blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.layouts import Renames
from llavakit.model.configuration import LlavakitConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

CONNECTOR = "compressor_prefusion"
OWN = "model.multi_modal_projector"
FRAMES = {"type": "midpoints_per_second", "max_frames": 180}  # what the published server looks at
LLAMA_3_VOCABULARY = 128_000


def media_of(size: int, ratio: int = 1, pad: bool = False) -> dict[str, Any]:
    """`config.media` for encoder inputs of `size` pixels and `ratio` x `ratio` blocks beside the whole image."""
    view = {"type": "pad" if pad else "square", "size": size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    views = view if ratio == 1 else {"type": "grid_and_whole", "grid": ratio, "view": view}
    return {"image": {"views": views}, "video": {"views": {"type": "frames", "nearest": size, "frame": views}}}


class LlavaMiniLayout(ClassicLayout):
    """`ICTNLP/llava-mini-llama-3.1-8b`, and Vicuna models trained with the same code."""

    system = "llava-mini"
    model_types = ("llava_mini_llama",)
    own_renames: Renames = (
        (r"^model\.compressor\.", f"{OWN}.compressor."),
        (r"^model\.prefusion_layers\.", f"{OWN}.prefusion.layers."),
    )
    own_renames_out: Renames = (
        (rf"^{OWN}\.compressor\.", "model.compressor."),
        (rf"^{OWN}\.prefusion\.layers\.", "model.prefusion_layers."),
    )

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and "compressor_size" in raw

    def connector(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        options = {"compressor_size": raw["compressor_size"], "prefusion_layer_num": raw.get("prefusion_layer_num", 4)}
        return {**super().connector(raw), "type": CONNECTOR, **options}

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        raw.one_of("mm_patch_merge_type", "flat")
        pad = raw.one_of("image_aspect_ratio", "pad", "square") == "pad"
        media = media_of(encoder["image_size"], raw.get("resolution_ratio") or 1, pad=pad)
        llama_3 = raw.get("vocab_size", 0) >= LLAMA_3_VOCABULARY
        return {
            "media": media,
            "template": "llava_llama_3_1" if llama_3 else "v1",
            "extras": {"processor": {"sampling": FRAMES}},
        }

    def expresses(self, config: LlavakitConfig) -> bool:
        views = (config.media or {}).get("image", {}).get("views", {})
        inner = views.get("view", views)
        return (
            config.connector["type"] == CONNECTOR
            and config.text_config.model_type == "llama"
            and config.language_adapter is None
            and inner.get("type") in ("square", "pad")
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        views = config.media["image"]["views"]
        return super().write_config(config) | {
            "architectures": ["LlavaMiniLlamaForCausalLM"],
            "compressor_size": config.connector.get("compressor_size", 1),
            "prefusion_layer_num": config.connector.get("prefusion_layer_num", 4),
            "resolution_ratio": views.get("grid", 1),
            "image_aspect_ratio": "pad" if views.get("view", views)["type"] == "pad" else "square",
            "mm_patch_merge_type": "flat",
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": 4096,
        }
