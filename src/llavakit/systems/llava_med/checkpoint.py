"""LLaVA-Med's published files, one layout per generation.

v1.5 (`microsoft/llava-med-v1.5-mistral-7b`) is LLaVA's own form with Mistral, its encoder in the files. v1.0 are weight
differences to LLaMA-7B (`microsoft/llava-med-7b-delta` and archives by benchmark): a linear connector, images between
two marks, no encoder. Its config.json says 0 and 1 for the tokens that begin and end a text, which are 1 and 2; no
other files of this form do, so that is how they are told from the first LLaVA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout, unwrapped
from llavakit.checkpoints.fields import Fields
from llavakit.model.configuration import LlavakitConfig
from llavakit.views.pixels import CLIP_MEAN

GREY = int(255 * sum(CLIP_MEAN) / len(CLIP_MEAN))  # around pictures of one channel
WRITTEN_IDS = {"bos_token_id": 0, "eos_token_id": 1}  # in config.json of v1.0
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # of its tokenizer


class MistralLayout(ClassicLayout):
    """v1.5. Other published files with Mistral cut pictures into tiles; these pad them."""

    system = "llava-med"
    model_types = ("llava_mistral",)

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and raw.get("image_aspect_ratio") == "pad"

    def extend_config(self, raw: Fields, encoder: Mapping[str, Any]) -> dict[str, Any]:
        raw.one_of("image_aspect_ratio", "pad")
        raw.one_of("mm_patch_merge_type", "flat")
        views = {"type": "pad", "size": encoder["image_size"], "grey_background": GREY}
        return {"media": {"image": {"views": views}}, "template": "mistral_instruct"}

    def expresses(self, config: LlavakitConfig) -> bool:
        return _plain(config, "pad") and config.text_config.model_type == "mistral"

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        own = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
        return super().write_config(config) | own | {"architectures": ["LlavaMistralForCausalLM"]}


class FirstLayout(ClassicLayout):
    """v1.0."""

    system = "llava-med"
    model_types = ("llava",)

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        linear = raw.get("mm_projector_type") in (None, "linear") and raw.get("mm_use_im_start_end") is True
        ids = all(raw.get(name) == number for name, number in WRITTEN_IDS.items())
        return super().matches(raw, folder) and linear and ids

    def text_config(self, raw: Mapping[str, Any], *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        return super().text_config(raw, without=without | frozenset(WRITTEN_IDS)) | TOKEN_IDS

    def extend_config(self, raw: Fields, encoder: Mapping[str, Any]) -> dict[str, Any]:
        ratio = raw.one_of("image_aspect_ratio", "square", "pad") or "square"
        raw.one_of("mm_patch_merge_type", "flat")
        views = {"type": ratio, "size": encoder["image_size"]}
        own = {"template": "llava_med_simple_unopened", "codec": "llava_med_role"}
        return {"media": {"image": {"views": views}}, **own, **TOKEN_IDS}

    def expresses(self, config: LlavakitConfig) -> bool:
        wrapped = config.media.get("image", {}).get("arrange", {}).get("type") == "wrapped"
        linear = config.connector.get("depth", 2) == 1
        return _plain(config, "square", "pad") and wrapped and linear and config.text_config.model_type == "llama"

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        ratio = config.media["image"]["views"]["type"]
        return super().write_config(config) | {"image_aspect_ratio": ratio} | WRITTEN_IDS


def _plain(config: LlavakitConfig, *planners: str) -> bool:
    """Whether a model has CLIP's encoder, an MLP and pictures cut by one of these planners, and nothing else."""
    image = (config.media or {}).get("image", {})
    return (
        config.vision_config is not None
        and config.vision_config.model_type == "clip_vision_model"
        and config.connector.get("type") == "mlp"
        and set(config.media) == {"image"}
        and image.get("views", {}).get("type") in planners
        and unwrapped(image.get("arrange"))["type"] == "flat"
        and config.language_adapter is None
    )
