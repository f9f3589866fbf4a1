"""LLaVA-Rad's published files: a LoRA folder beside the training checkpoint of its encoder.

`microsoft/llava-rad` holds an adapter for Vicuna, the connector, and the encoder as open_clip trained it
(`biomedclipcxr_518_checkpoint.pt`, text side included). config.json names the encoder's two files. llavakit's exports
hold the whole model, the encoder under timm's names as the original code keeps it in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.encoder_names import to_disk
from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import LazyState, read_file, read_json
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig
from llavakit.vision.open_clip import read_open_clip, timm_vit

TOWER = "model.vision_tower."
TRUNK = "vit_base_patch14_dinov2"  # timm's name of the only encoder that was published
ENCODER = {
    "model_type": "dinov2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "qkv_bias": True,
    "layer_norm_eps": 1e-6,
}


class Published(ClassicLayout):
    """`microsoft/llava-rad`."""

    system = "llava-rad"
    model_types = ("llava", "llava_llama")
    tower_prefixes: ClassVar[Mapping[str, str]] = {"vision_tower": "model.vision_tower.vision_tower.vit."}
    own_tower = "biomedclip_cxr_518"

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return super().matches(raw, folder) and "mm_vision_tower_checkpoint" in raw

    # configuration

    def encoder_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> dict[str, Any]:
        if raw.get("mm_vision_tower") != self.own_tower or "encoder" in sources:
            return super().encoder_config(raw, sources)
        folder = sources.get("folder")
        weights = _beside(folder, raw, "mm_vision_tower_checkpoint")
        found = dict(ENCODER) if weights is None else read_open_clip(read_file(weights)).config
        described = _beside(folder, raw, "mm_vision_tower_config")
        if described is not None:
            vision = read_json(described).get("vision_cfg")
            vision = vision if isinstance(vision, Mapping) else {}
            trunk, size = vision.get("timm_model_name"), vision.get("image_size")
            if trunk != TRUNK or size != found["image_size"]:
                raise CheckpointError(
                    f"{described}: vision_cfg has timm_model_name {quoted(trunk)} and image_size {quoted(size)}; the "
                    f"encoder is {TRUNK} at {found['image_size']} pixels"
                )
        return found

    def extend_config(self, raw: Fields, encoder: Mapping[str, Any]) -> dict[str, Any]:
        raw.one_of("image_aspect_ratio", "square")
        raw.one_of("mm_patch_merge_type", "flat")
        raw.get("mm_vision_tower_config"), raw.get("mm_vision_tower_checkpoint")  # read with the encoder
        views = {"type": "square", "size": encoder["image_size"], "rounded": True}
        return {"media": {"image": {"views": views}}, "template": "v1"}

    def expresses(self, config: LlavakitConfig) -> bool:
        views = (config.media or {}).get("image", {}).get("views", {})
        return (
            config.vision_config is not None
            and config.vision_config.model_type == "dinov2"
            and config.connector.get("type") == "mlp"
            and set(config.media) == {"image"}
            and views.get("type") == "square"
            and views.get("rounded", False)
            and config.text_config.model_type == "llama"
            and config.language_adapter is None
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        return super().write_config(config) | {
            "mm_vision_tower": self.own_tower,
            "mm_vision_tower_config": None,
            "mm_vision_tower_checkpoint": None,
            "image_aspect_ratio": "square",
        }

    # tensors

    def read_own(self, folder: Path, raw: Mapping[str, Any]) -> LazyState:
        """With the encoder, which is a file of the folder; its text side is left out."""
        state = super().read_own(folder, raw)
        tower = self._own_tower(folder, raw)
        return _placed(state if tower is None else state.joined(tower), None)

    def _with_encoder(
        self, state: LazyState, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> LazyState:
        stored = any(name.startswith(TOWER) for name in state)
        tower = None if stored or "encoder" in sources else self._own_tower(folder, raw)
        return super()._with_encoder(state if tower is None else state.joined(tower), folder, raw, sources)

    def _own_tower(self, folder: Path, raw: Mapping[str, Any]) -> LazyState | None:
        file = _beside(folder, raw, "mm_vision_tower_checkpoint")
        if file is None:
            return None
        return read_open_clip(read_file(file)).state.renamed(lambda name: TOWER + name)

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        return _placed(state, config.vision_config.num_attention_heads)

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        lazy = to_disk(config, state)
        rest = lazy.renamed(lambda name: None if name.startswith(TOWER) else name)
        trunk = lazy.renamed(lambda name: name.removeprefix(TOWER) if name.startswith(TOWER) else None)
        return super().write_state(config, rest.joined(timm_vit(trunk).renamed(lambda name: TOWER + name)))


def _placed(state: LazyState, heads: int | None) -> LazyState:
    """An encoder under timm's names as transformers' class."""
    if f"{TOWER}patch_embed.proj.weight" not in state:
        return state
    trunk = state.renamed(lambda name: name.removeprefix(TOWER) if name.startswith(TOWER) else None)
    rest = state.renamed(lambda name: None if name.startswith(TOWER) else name)
    return rest.joined(read_open_clip(trunk, heads=heads).state.renamed(lambda name: TOWER + name))


def _beside(folder: Path | None, raw: Mapping[str, Any], key: str) -> Path | None:
    """The file of the folder that config.json names under a key; None if there is none."""
    name = raw.get(key)
    if folder is None or name is None:
        return None
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise CheckpointError(f"config.json: {key} is {quoted(name)}, it should be the name of a file in the folder")
    return folder / name if (folder / name).is_file() else None
