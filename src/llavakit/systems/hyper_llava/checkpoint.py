"""HyperLLaVA's files: LLaVA-1.5's layout with the experts' tensors and options.

Nobody published a checkpoint; names and keys are llavakit's. Files without these keys are LLaVA-1.5's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.layouts import Renames
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.systems.hyper_llava.adapter import NAME as ADAPTER
from llavakit.systems.hyper_llava.adapter import PLACES
from llavakit.systems.hyper_llava.connector import VARIANTS

CONNECTOR = "visual_expert_mlp"
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# key of config.json -> option of connector and adapter, default
SHARED = {
    "hyper_embed_dim": ("embed_dim", 64),
    "hyper_hidden": ("hyper_hidden", 64),
    "hyper_bottleneck": ("bottleneck", 16),
    "hyper_activation": ("activation", "swiglu"),
}
LANGUAGE = {"language_expert_split": "split", "language_guidance_layer": "guidance_layer"}


def shared_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What connector and adapter have in common, with defaults."""
    return {name: options.get(name, default) for name, default in SHARED.values()}


class HyperLlavaLayout(ClassicLayout):
    """LLaVA-1.5's files with `visual_expert` and `language_expert_layers` in config.json."""

    system = "hyper-llava"
    model_types = ("llava_llama", "llava")
    own_renames: Renames = (
        (r"^model\.visual_expert\.first\.", "model.multi_modal_projector.expert_1."),
        (r"^model\.visual_expert\.second\.", "model.multi_modal_projector.expert_2."),
        (r"^model\.language_expert\.hyper\.", "model.language_adapter.hyper."),
        (r"^model\.language_expert\.layers\.", "model.language_adapter.experts."),
    )
    own_renames_out: Renames = (
        (r"^model\.multi_modal_projector\.expert_1\.", "model.visual_expert.first."),
        (r"^model\.multi_modal_projector\.expert_2\.", "model.visual_expert.second."),
        (r"^model\.language_adapter\.hyper\.", "model.language_expert.hyper."),
        (r"^model\.language_adapter\.experts\.", "model.language_expert.layers."),
    )

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and bool({"visual_expert", "language_expert_layers"} & set(raw))

    @staticmethod
    def _shared(raw: Fields) -> dict[str, Any]:
        return {name: raw.get(key, default) for key, (name, default) in SHARED.items()}

    def connector(self, raw: Fields) -> dict[str, Any]:
        plain, variant = super().connector(raw), raw.one_of("visual_expert", *VARIANTS, "none") or "first"
        if variant == "none":
            return plain
        if plain != {"type": "mlp", "depth": 2}:
            raise CheckpointError(
                f"config.json: mm_projector_type is {raw['mm_projector_type']!r}; a visual expert needs mlp2x_gelu"
            )
        return {"type": CONNECTOR, "variant": variant, **self._shared(raw)}

    def extend_config(self, raw: Fields, encoder: Mapping[str, Any]) -> dict[str, Any]:
        raw.one_of("mm_patch_merge_type", "flat")
        planner = raw.one_of("image_aspect_ratio", "pad", "square") or "pad"
        views = {"type": planner, "size": encoder["image_size"], "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
        layers = raw.one_of("language_expert_layers", *PLACES, "none") or "posterior"
        own = {name: raw.get(key) for key, name in LANGUAGE.items()}
        adapter = {"type": ADAPTER, "layers": layers, **self._shared(raw)}
        adapter |= {name: value for name, value in own.items() if value is not None}
        return {
            "media": {"image": {"views": views, "arrange": {"type": "flat"}}},
            "template": "v1",
            "language_adapter": None if layers == "none" else adapter,
        }

    def objections(self, config: LlavakitConfig) -> list[str]:
        connector, adapter = config.connector, config.language_adapter or {"type": ADAPTER}
        image = (config.media or {}).get("image", {})
        found = []
        if connector["type"] not in ("mlp", CONNECTOR) or connector.get("depth", 2) != 2:
            found.append(f"its connector is {connector['type']!r}")
        if adapter["type"] != ADAPTER:
            found.append(f"its language adapter is {adapter['type']!r}")
        if image.get("views", {}).get("type") not in ("pad", "square"):
            found.append("its pictures are neither padded nor cut to a square")
        if image.get("arrange", {"type": "flat"})["type"] not in ("flat", "wrapped"):
            found.append("its visual tokens are not laid out flat")
        if config.text_config.model_type != "llama":
            found.append(f"its decoder is a {config.text_config.model_type}")
        if config.language_adapter and connector["type"] == CONNECTOR and not found:
            ours, theirs = shared_options(connector), shared_options(adapter)
            found += [
                f"{name} is {ours[name]!r} in the connector and {theirs[name]!r} in the language adapter"
                for name in ours
                if ours[name] != theirs[name]
            ]
        return found

    def expresses(self, config: LlavakitConfig) -> bool:
        return not self.objections(config)

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        connector, adapter = config.connector, config.language_adapter or {}
        visual = connector.get("variant", "first") if connector["type"] == CONNECTOR else "none"
        options = shared_options(connector if visual != "none" else adapter)
        own = {key: adapter[name] for key, name in LANGUAGE.items() if adapter.get(name) is not None}
        return (
            super().write_config(config)
            | own
            | {
                "image_aspect_ratio": config.media["image"]["views"]["type"],
                "mm_patch_merge_type": "flat",
                "visual_expert": visual,
                "language_expert_layers": adapter.get("layers", "posterior") if adapter else "none",
                **{key: options[name] for key, (name, _) in SHARED.items()},
            }
        )
