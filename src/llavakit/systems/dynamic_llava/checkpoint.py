"""Dynamic-LLaVA's published files: LLaVA-1.5's layout with two or three predictors and a `sparse_config`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import LazyState
from llavakit.checkpoints.layouts import Renames
from llavakit.model.configuration import LlavakitConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

ADAPTER = "dynamic_sparsification"
PREDICTORS = {
    "image_score_predictor": "image_predictor",
    "output_text_score_predictor": "text_predictor",
    "instruct_score_predictor": "instruct_predictor",
}
# The published defaults; only the scripts turn the instruction predictor off.
SPARSE_DEFAULTS: dict[str, Any] = {
    "use_vision_predictor": True,
    "vision_keep_rate": 0.2,
    "use_text_predictor": True,
    "use_output_text_predictor": True,
    "output_text_keep_rate": 0.5,
    "output_text_len_for_training": 50,
    "use_instruct_predictor": True,
    "instruct_keep_rate": 0.7,
    "instruct_len_for_training": 25,
    "sparse_layer": 2,
    "d_model": 512,
    "nhead": 8,
    "dim_feedforward": 2048,
    "num_layers": 2,
    "mask_loss_weight": 100.0,
}


def adapter_options(sparse_config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.language_adapter` from a published `sparse_config`."""
    fields = sparse_config if isinstance(sparse_config, Fields) else Fields(sparse_config, "sparse_config")
    known = {key: fields.get(key, default) for key, default in SPARSE_DEFAULTS.items()}
    fields.finish()
    return {"type": ADAPTER, **known}


def unused_predictors(adapter: Mapping[str, Any]) -> tuple[str, ...]:
    """Name prefixes of predictors that these options do not build; checkpoints may hold them all the same."""
    text = adapter.get("use_text_predictor", True)
    built = {
        "image_predictor": adapter.get("use_vision_predictor", True),
        "text_predictor": text and adapter.get("use_output_text_predictor", True),
        "instruct_predictor": text and adapter.get("use_instruct_predictor", False),
    }
    return tuple(f"model.language_adapter.{name}." for name, is_built in built.items() if not is_built)


class DynamicLlavaLayout(ClassicLayout):
    """`Osilly/Dynamic-LLaVA-*`; training may have left LLaVA-1.5's `model_type` in config.json."""

    system = "dynamic-llava"
    model_types = ("dynamic_llava_llama", "llava_llama", "llava")
    own_renames: Renames = tuple(
        (rf"^model\.{published}\.", f"model.language_adapter.{ours}.") for published, ours in PREDICTORS.items()
    )
    own_renames_out: Renames = tuple(
        (rf"^model\.language_adapter\.{ours}\.", f"model.{published}.") for published, ours in PREDICTORS.items()
    )

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and "sparse_config" in raw

    def expresses(self, config: LlavakitConfig) -> bool:
        adapter = config.language_adapter or {}
        image = (config.media or {}).get("image", {})
        flat = image.get("arrange", {"type": "flat"})["type"] == "flat" and image["views"]["type"] in ("pad", "square")
        return flat and adapter.get("type") == ADAPTER and config.connector["type"] == "mlp"

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        planner = raw.one_of("image_aspect_ratio", "pad", "square") or "pad"
        raw.one_of("mm_patch_merge_type", "flat")
        views = {"type": planner, "size": encoder["image_size"], "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
        return {
            "media": {"image": {"views": views, "arrange": {"type": "flat"}}},
            "template": "v1",
            "language_adapter": adapter_options(raw.section("sparse_config")),
        }

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        unused = unused_predictors(config.language_adapter)
        return state.renamed(lambda name: None if name.startswith(unused) else name)

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        adapter = config.language_adapter
        defaults = SPARSE_DEFAULTS | {"use_instruct_predictor": False}
        return super().write_config(config) | {
            "architectures": ["DynamicLlavaLlamaForCausalLM"],
            "image_aspect_ratio": "pad" if config.media["image"]["views"]["type"] == "pad" else "square",
            "mm_patch_merge_type": "flat",
            "sparse_config": {key: adapter.get(key, default) for key, default in defaults.items()},
        }
