"""ReflectiVA's published files: classic LLaVA on Llama 3.1 that names the text around its paragraphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.fields import Fields
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig
from llavakit.systems.reflectiva.prompts import DEFAULT, FRAMES

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
KEY = "template_paragraph"


class ReflectivaLayout(ClassicLayout):
    """`aimagelab/ReflectiVA`: flat language-model keys, projector, and the vision tower in the same file."""

    system = "reflectiva"
    model_types = ("llava_llama",)

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and KEY in raw

    def extend_config(self, raw: Fields, encoder: Mapping[str, Any]) -> dict[str, Any]:
        frame = raw.get(KEY) or DEFAULT
        if frame not in FRAMES:
            raise CheckpointError(f"config.json: {KEY} is {quoted(frame)}; known: {', '.join(FRAMES)}")
        raw.one_of("image_aspect_ratio", "pad")
        raw.one_of("mm_patch_merge_type", "flat")
        views = {"type": "pad", "size": encoder["image_size"], "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
        return {
            "media": {"image": {"views": views, "arrange": {"type": "flat"}}},
            "template": "reflectiva",
            "extras": {KEY: frame},
        }

    def wraps_images(self, raw: Fields) -> bool:
        return bool(raw.one_of("mm_use_im_start_end", False))

    def expresses(self, config: LlavakitConfig) -> bool:
        media = config.media or {}
        image = media.get("image", {})
        return (
            config.connector["type"] == "mlp"
            and config.text_config.model_type == "llama"
            and config.language_adapter is None
            and image.get("views", {}).get("type") == "pad"
            and image.get("arrange", {"type": "flat"})["type"] == "flat"
            and (config.extras or {}).get(KEY, DEFAULT) in FRAMES
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        own = {
            "image_aspect_ratio": "pad",
            "mm_patch_merge_type": "flat",
            "tokenizer_padding_side": "right",
            KEY: (config.extras or {}).get(KEY, DEFAULT),
        }
        return super().write_config(config) | own
