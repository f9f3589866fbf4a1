"""LLaVA-OneVision's published files in the authors' layout; transformers' is `hf_checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from llavakit.checkpoints.classic import mlp_options
from llavakit.checkpoints.files import LazyState
from llavakit.checkpoints.siglip_qwen import SIGLIP, SiglipQwenLayout, kept_tower, media_of, settings_of
from llavakit.model.configuration import LlavakitConfig

__all__ = ["SAMPLING", "SIGLIP", "OnevisionLayout", "connector_options", "kept_tower", "media_of", "settings_of"]

SAMPLING = {"type": "uniform", "frames": 32}  # the published harness; training read one frame per second, at most 32


class OnevisionLayout(SiglipQwenLayout):
    """`lmms-lab/llava-onevision-*`: a SigLIP encoder without its last layer, Qwen2, one newline vector."""

    system = "llava-onevision"
    known_changes = {
        "media.image.arrange.rounding": "the authors' code unpads with int(), so a few sizes get other token counts",
        "media.multi_image.arrange.single_newline": "the authors' code ends every image among several with a newline",
    }
    own_renames = ((r"^model\.mm_projector\.(\d+)\.(pre_norm|proj)\.", r"model.multi_modal_projector.blocks.\1.\2."),)

    def system_fields(self) -> dict[str, Any]:
        return super().system_fields() | {"extras": {"processor": {"sampling": dict(SAMPLING)}}}

    # the connector with residual blocks

    def connector(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return connector_options(str(raw.get("mm_projector_type", "linear")))

    def writes_connector(self, connector: Mapping[str, Any]) -> bool:
        return connector["type"] in ("mlp", "residual_mlp")

    def projector_name(self, connector: Mapping[str, Any]) -> str:
        if connector["type"] == "residual_mlp":
            return f"mlp{connector.get('depth', 2)}x_res{connector.get('blocks', 1)}x_gelu"
        return super().projector_name(connector)

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        first = first_block(config.connector)
        return super().drop_unused(config, state.renamed(lambda name: renumbered(name, -first)))

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        first = first_block(config.connector)
        for name, tensor in super().write_state(config, state):
            yield renumbered(name, first).replace("multi_modal_projector.blocks.", "mm_projector."), tensor


def first_block(connector: Mapping[str, Any]) -> int:
    """The published code numbers residual blocks on from the linear layers and activations before them."""
    return 2 * connector.get("depth", 2) - 1


def renumbered(name: str, by: int) -> str:
    return re.sub(r"(?<=multi_modal_projector\.blocks\.)\d+", lambda number: str(int(number[0]) + by), name)


def connector_options(name: str) -> dict[str, Any]:
    """Connector of a published `mm_projector_type`.

    Raises:
        CheckpointError: If it is unknown.
    """
    residual = re.fullmatch(r"mlp(\d+)x_res(\d+)x_gelu", name)
    if residual:
        return {"type": "residual_mlp", "depth": int(residual[1]), "blocks": int(residual[2])}
    return mlp_options(name)
