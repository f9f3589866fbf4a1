"""LLaVA-UHD's released files: the classic layout with the resampler under `model.mm_projector`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.files import LazyState
from llavakit.checkpoints.layouts import Renames
from llavakit.connectors.general import sincos_table
from llavakit.model.configuration import LlavakitConfig

TYPES = {"adapt_spatial_resampler": "spatial_resampler", "perceiver_resampler": "resampler"}
HEAD_WIDTH = 128
_PROJ, _TABLE = "model.multi_modal_projector.proj", "model.multi_modal_projector.pos_embed"


class Released(ClassicLayout):
    """`guozonghao96/llava-uhd-144-13b`. What the original hard-codes (144 queries, 7 slices, 336 px) is written out."""

    system = "llava-uhd"
    model_types = ("llava_llama", "llava")
    inert = ClassicLayout.inert | {"image_aspect_ratio": "the released code cuts slices whatever it says"}

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and raw.get("mm_projector_type") in TYPES

    def connector(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        kind = TYPES[raw["mm_projector_type"]]
        heads = raw["hidden_size"] // HEAD_WIDTH if kind == "spatial_resampler" else 8
        return {
            "type": kind,
            "queries": raw.get("mm_num_queries", 144 if kind == "spatial_resampler" else 64),
            "heads": raw.get("mm_num_heads", heads),
        }

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        raw.one_of("mm_patch_merge_type", "flat")
        views = {
            "type": "native_slices",
            "size": encoder["image_size"],
            "patch": encoder["patch_size"],
            "max_slices": raw.get("mm_max_slices", 7),
        }
        return {"media": {"image": {"views": views, "arrange": {"type": "spatial_schema"}}}, "template": "v1"}

    def renames_in(self) -> Renames:
        return ((r"^model\.mm_projector\.", "model.multi_modal_projector."), *super().renames_in())

    def renames_out(self, config: LlavakitConfig) -> Renames:
        return ((r"^model\.multi_modal_projector\.", "model.mm_projector."), *super().renames_out(config))

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        """The output matrix multiplies from the right in the original; the position table is computed here."""
        kept = state.renamed(lambda name: None if name in (_PROJ, _TABLE) else name)
        if _PROJ not in state:
            return kept
        matrix = LazyState({f"{_PROJ}.weight": lambda: state[_PROJ].T.contiguous()}, {f"{_PROJ}.weight": ""})
        return kept.joined(matrix)

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        for name, tensor in super().write_state(config, state):
            if name == "model.mm_projector.proj.weight":
                yield "model.mm_projector.proj", tensor.T.contiguous()
            else:
                yield name, tensor
        side = round(config.connector["queries"] ** 0.5)
        table = sincos_table(side, side, config.hidden_size)
        yield "model.mm_projector.pos_embed", table.to(state["model.multi_modal_projector.query"])

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        names = {own: published for published, own in TYPES.items()}
        connector, views = config.connector, config.media["image"]["views"]
        return super().write_config(config) | {
            "mm_projector_type": names[connector["type"]],
            "mm_num_queries": connector["queries"],
            "mm_num_heads": connector["heads"],
            "mm_max_slices": views.get("max_slices", 7),
            "image_aspect_ratio": "pad",
            "mm_patch_merge_type": "flat",
        }
