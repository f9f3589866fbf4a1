"""LLaVA-Plus's published files: LLaVA's first layout, told apart by the vocabulary of the v0 checkpoint.

The released model has one token, `[PAD]`, behind LLaMA's 32,000, and no marks around images; no other published file of
this layout has. Files whose `_name_or_path` names LLaVA-Plus are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.text import special_ids, tokenizer_folder
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
VOCABULARY = 32_001
NAME = "LLaVA-VL/llava_plus_v0_7b"
_NAMED = re.compile(r"llava[-_ ]?plus", re.IGNORECASE)
PAD = "[PAD]"
_V0, _V1 = "llava_v0", "llava_v1"


class LlavaPlusLayout(ClassicLayout):
    """`LLaVA-VL/llava_plus_v0_7b`, and files of the same code on Vicuna v1 (the paper's 13B)."""

    system = "llava-plus"
    model_types = ("llava", "llava_llama")

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        projector = str(raw.get("mm_projector_type", "linear"))
        plain = projector == "linear" or projector.startswith("mlp")
        named = _NAMED.search(str(raw.get("_name_or_path") or "")) is not None
        released = (
            raw.get("vocab_size") == VOCABULARY
            and projector == "linear"
            and not raw.get("mm_use_im_start_end")
            and "mm_patch_merge_type" not in raw
        )
        return super().matches(raw, folder) and plain and (named or released)

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        ratio = raw.get("image_aspect_ratio") or "square"
        if ratio not in ("square", "pad"):
            raise CheckpointError(f"config.json: image_aspect_ratio is {quoted(ratio)}; known: square, pad")
        views = {"type": ratio, "size": encoder["image_size"], "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
        return {"media": {"image": {"views": views, "arrange": {"type": "flat"}}}, "codec": "llava_plus"}

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        named = str(raw.get("_name_or_path") or "")
        config = super().read_config(raw, sources)
        folder = tokenizer_folder(sources.get("folder"), sources.get("base"))
        known = special_ids(folder) if folder is not None else {}
        first = config.text_config.vocab_size == VOCABULARY or PAD in known or "v0" in named
        config.template = _V0 if first else _V1
        return config

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        views = config.media["image"]["views"]["type"]
        name = NAME if config.template == _V0 else "llava_plus_v1.3"
        return super().write_config(config) | {"image_aspect_ratio": views, "_name_or_path": name}
