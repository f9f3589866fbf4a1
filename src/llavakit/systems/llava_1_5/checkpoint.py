"""LLaVA-1.5's published files: the authors' layout and transformers' `LlavaForConditionalGeneration`."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llavakit.checkpoints.classic import ClassicLayout, unwrapped
from llavakit.checkpoints.files import LazyState
from llavakit.checkpoints.llava_class import LlavaClassLayout
from llavakit.checkpoints.text import special_ids, tokenizer_folder
from llavakit.conversation.template import OWN
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig
from llavakit.systems.llava_1_5.names import inferred_template, model_name

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# Files of forks hold one of these beside the keys of this code base.
KEYS_OF_FORKS = (
    *("sparse_config", "compressor_size", "mm_image_tower", "mm_video_tower", "mm_vision_tower_checkpoint"),
    "template_paragraph",
)
YI_VOCABULARY = 64_000  # of v1.6-34b's decoder, whose tokenizer need not list its ChatML tokens as added ones


def pinpoints_of(value: Any) -> list[list[int]]:
    """Resolutions (width, height) from a list, or from the text of one."""
    return [list(point) for point in (ast.literal_eval(value) if isinstance(value, str) else value)]


def views_of(raw: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Planner options from `image_aspect_ratio` and its companions."""
    ratio = raw.get("image_aspect_ratio") or "square"
    pinpoints = raw.get("image_grid_pinpoints")
    common = {"size": size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    if ratio == "anyres":
        if not pinpoints:
            raise CheckpointError("config.json: image_aspect_ratio is anyres, and image_grid_pinpoints is missing")
        return {"type": "anyres", "pinpoints": pinpoints_of(pinpoints), **common}
    if ratio not in ("pad", "square"):
        raise CheckpointError(f"config.json: image_aspect_ratio is {quoted(ratio)}; known: pad, square, anyres")
    return {"type": ratio, **common}


def template_of(config: LlavakitConfig, started_from: str, sources: Mapping[str, Path]) -> str:
    """The template of the authors' files, by the decoder and its tokenizer; their code goes by the folder's name.

    Args:
        started_from: The model that training started from, as config.json names it.
        sources: Folders whose tokenizer's files are looked at.
    """
    if config.text_config.model_type == "mistral":
        return "mistral_instruct"
    folder = tokenizer_folder(sources.get("folder"), sources.get("base"))
    known = special_ids(folder) if folder is not None else {}
    if "<|im_end|>" in known or config.text_config.vocab_size == YI_VOCABULARY:
        return "chatml_direct"
    if "<|eot_id|>" in known:
        return "llava_llama_3"
    name = started_from.lower()
    if re.search(r"llama-?2", name) and "vicuna" not in name:
        return "llava_llama_2"
    if config.media["image"]["arrange"]["type"] == "wrapped":
        return inferred_template(model_name(started_from))
    return "v1"


class LlavaLayout(ClassicLayout):
    """`liuhaotian/llava-v1.5-*` (and the v1.6 files that the same code reads)."""

    system = "llava-1.5"
    model_types = ("llava", "llava_llama", "llava_mistral")
    general = True

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        plain = str(raw.get("mm_projector_type", "linear"))
        own = plain in ("linear", "identity") or plain.startswith("mlp")
        other = any(key in raw for key in KEYS_OF_FORKS) or "siglip" in str(raw.get("mm_vision_tower", "")).lower()
        return super().matches(raw, folder) and own and not other

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        merge = raw.get("mm_patch_merge_type") or "flat"
        views = views_of(raw, encoder["image_size"])
        return {"media": {"image": {"views": views, "arrange": {"type": merge}}}}

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        config = super().read_config(raw, sources)
        config.template = template_of(config, str(raw.get("_name_or_path") or ""), sources)
        return config

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        """Without the newline vector where images are not laid out with it."""
        arrange = unwrapped(config.media["image"]["arrange"])["type"]
        return state.renamed(
            lambda name: None if name == "model.image_newline" and arrange != "spatial_unpad" else name
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        image = config.media["image"]
        planner = image["views"]["type"]
        fields: dict[str, Any] = {
            "image_aspect_ratio": "square" if planner == "square" else planner,
            "mm_patch_merge_type": unwrapped(image.get("arrange"))["type"],
        }
        if planner == "anyres":
            fields["image_grid_pinpoints"] = image["views"]["pinpoints"]
        if config.text_config.model_type == "mistral":
            fields |= {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}
        return super().write_config(config) | fields


class LlavaTransformersLayout(LlavaClassLayout):
    """`llava-hf/llava-1.5-*` and every other folder of `LlavaForConditionalGeneration` that no other system claims.

    The published 1.5 files cut the middle of a picture where the authors' code pads.
    """

    system = "llava-1.5"
    general = True

    def usual_template(self, folder: Path, config: PreTrainedConfig) -> str:
        template = {"llama": "v1", "mistral": "mistral_instruct"}.get(config.text_config.model_type)
        return template or OWN
