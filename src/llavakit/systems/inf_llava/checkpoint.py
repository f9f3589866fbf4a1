"""INF-LLaVA's published files: the classic layout, whose config.json does not say that pictures are cut in two ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import read_folder, read_json
from llavakit.checkpoints.layouts import Renames
from llavakit.errors import UserError
from llavakit.model.configuration import LlavakitConfig

CONNECTOR = "dual_perspective"
OWN = "model.multi_modal_projector"
PUBLISHED = {"crops_per_side": 3, "heads": 8}  # literals of the original code
LLAMA_3_VOCABULARY = 128_000


class Published(ClassicLayout):
    """`WeihuangLin/INF-LLaVA-sft` and `INF_star-LLaVA-sft`.

    The number of crops and the size of the picture are literals in the original code and in no file. llavakit's exports
    hold them under `dual_perspective` (`crops_per_side`, `heads`, `image_size`); without it the published numbers are
    taken, with pictures of full size also at inference.
    """

    system = "inf-llava"
    model_types = ("llava_llama",)
    own_renames: Renames = ((r"^model\.spatial_embed\.", f"{OWN}.dem."),)
    own_renames_out: Renames = ((rf"^{OWN}\.dem\.", "model.spatial_embed."),)

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and ("dual_perspective" in raw or _enhances(folder))

    @staticmethod
    def _dual(raw: Fields) -> dict[str, Any]:
        own = raw.section("dual_perspective")
        own.one_of("ffn_ratio", 16)
        dual = {key: own.get(key, default) for key, default in PUBLISHED.items()}
        dual["image_size"] = own.get("image_size")
        own.finish({})
        return dual

    def connector(self, raw: Fields) -> dict[str, Any]:
        dual = self._dual(raw)
        own = {"type": CONNECTOR, "crops": dual["crops_per_side"], "heads": dual["heads"]}
        return {**super().connector(raw), **own}

    def extend_config(self, raw: Fields, encoder: Mapping[str, Any]) -> dict[str, Any]:
        raw.one_of("mm_patch_merge_type", "flat")
        dual, size = self._dual(raw), encoder["image_size"]
        views = {
            "type": "dual_perspective",
            "size": size,
            "crops": dual["crops_per_side"],
            "image_size": dual["image_size"] or dual["crops_per_side"] * size,
            "aspect": raw.one_of("image_aspect_ratio", "pad", "square") or "square",
        }
        llama_3 = raw.get("vocab_size", 0) >= LLAMA_3_VOCABULARY
        return {"media": {"image": {"views": views}}, "template": "inf_llama_3" if llama_3 else "v1"}

    def expresses(self, config: LlavakitConfig) -> bool:
        views = (config.media or {}).get("image", {}).get("views", {})
        return (
            config.connector["type"] == CONNECTOR
            and views.get("type") == "dual_perspective"
            and config.text_config.model_type == "llama"
            and config.language_adapter is None
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        views, connector = config.media["image"]["views"], config.connector
        crops = connector.get("crops", 3)
        return super().write_config(config) | {
            "image_aspect_ratio": views.get("aspect", "pad"),
            "mm_patch_merge_type": "flat",
            "dual_perspective": {
                "crops_per_side": crops,
                "heads": connector.get("heads", 8),
                "image_size": views.get("image_size", crops * views["size"]),
                "ffn_ratio": 16,
            },
        }


def _enhances(folder: Path) -> bool:
    """Whether the files hold the enhancement module."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            return any("spatial_embed." in tensor for tensor in read_json(folder / name).get("weight_map", ()))
    stem = "mm_projector" if any(folder.glob("mm_projector.*")) else None
    try:
        state = read_folder(folder, stem) if stem else read_folder(folder)
    except UserError:
        return False  # another layout says what is wrong with the files
    return any("spatial_embed." in name for name in state)
