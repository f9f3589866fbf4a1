"""Files of the captioner (Med-XPT's stand-in): those of ClipCap, with MedCLIP's picture side beside them.

ClipCap publishes `*.pt` files of tensors alone (`clip_project.*`, `gpt.*`); how many heads they have is in its code.
llavakit's exports add a config.json and the encoder. KG-LLaVA's own files are LoRA folders of LLaVA-1.5, which the
layout of that code reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from llavakit.checkpoints.encoder_names import to_disk
from llavakit.checkpoints.files import LazyState, read_file, read_folder, read_json
from llavakit.checkpoints.layouts import Layout, rename_with
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.systems.kg_llava.medclip import VISION, WIDTH

KIND = "clip_caption"
MAPPER, TOWER, DECODER = "model.multi_modal_projector.", "model.vision_tower.", "model.language_model."
HEADS = 8
HEAD_WIDTH = 64  # of GPT-2
_OWN = (
    (r"^clip_project\.linear\.", f"{MAPPER}linear."),
    (r"^clip_project\.prefix_const$", f"{MAPPER}prefix_const"),
    (r"^clip_project\.transformer\.", f"{MAPPER}transformer."),
    (r"^gpt\.transformer\.", DECODER),
    (r"^gpt\.lm_head\.", "lm_head."),
    (r"^vision_model\.", TOWER),
)
_PUBLISHED = (
    (rf"^{re.escape(MAPPER)}", "clip_project."),
    (rf"^{re.escape(DECODER)}", "gpt.transformer."),
    (r"^lm_head\.", "gpt.lm_head."),
    (rf"^{re.escape(TOWER)}", "vision_model."),
)
_BUFFERS = re.compile(r"\.attn\.(?:masked_)?bias$")


def in_memory(state: LazyState) -> LazyState:
    """ClipCap's tensors under llavakit's names; buffers of GPT-2 and a tied head are left out."""
    state = state.renamed(lambda name: None if _BUFFERS.search(name) or name == "gpt.lm_head.weight" else name)
    return state.renamed(rename_with(_OWN, keep_unmatched=False))


class ClipCaption(Layout):
    """ClipCap's files with a transformer mapper."""

    system = "kg-llava"
    form = "original"
    inert: ClassVar[Mapping[str, str]] = {
        "model_type": "chose the layout that reads the file",
        "architectures": "names the original's class",
        "transformers_version": "says which release wrote the file",
    }

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") == KIND

    def implied_config(self, folder: Path, base: Path | None) -> dict[str, Any] | None:
        files = sorted(folder.glob("*.pt")) if folder.is_dir() else []
        if len(files) != 1:
            return None
        state = read_file(files[0])
        if not any(name.startswith("clip_project.") for name in state):
            return None
        if "clip_project.prefix_const" not in state:
            raise CheckpointError(f"{files[0]}: its mapper is an MLP; llavakit reads ClipCap's transformer mapper")
        length, width = state["clip_project.prefix_const"].shape
        spread, dimension = state["clip_project.linear.weight"].shape
        vocabulary, _ = state["gpt.transformer.wte.weight"].shape
        layers, blocks = (
            _count(state, pattern) for pattern in (r"clip_project\.transformer\.layers", r"gpt\.transformer\.h")
        )
        inner = state["clip_project.transformer.layers.0.mlp.fc1.weight"].shape[0]
        mapper = {"prefix_length": length, "clip_length": spread // width, "num_layers": layers, "heads": HEADS}
        mapper |= {
            "mlp_ratio": inner / width,
            "qkv_bias": "clip_project.transformer.layers.0.attn.to_queries.bias" in state,
        }
        gpt2 = {"vocab_size": vocabulary, "n_embd": width, "n_layer": blocks, "n_head": max(1, width // HEAD_WIDTH)}
        gpt2["n_positions"] = state["gpt.transformer.wpe.weight"].shape[0]
        return {"model_type": KIND, "dim_clip": dimension, "mapper": mapper, "gpt2": gpt2}

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        config = self.read_config(raw, sources)
        state = self.read_own(folder, raw)
        tower = sources.get("encoder")
        if tower is not None and not any(name.startswith(TOWER) for name in state):
            picture = read_folder(tower).renamed(lambda name: name if name.startswith("vision_model.") else None)
            state = state.joined(in_memory(picture))
        return config, state

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        """llavakit's configuration; MedCLIP's published size where nothing says another."""
        vision, width = raw.get("vision") or dict(VISION), raw.get("dim_clip") or WIDTH
        tower = sources.get("encoder")
        if tower is not None:
            described = read_json(tower / "config.json")
            vision, width = described.get("vision_config") or vision, described.get("projection_dim", width)
        size = vision.get("image_size", VISION["image_size"])
        return LlavakitConfig(
            text_config={"model_type": "gpt2", **(raw.get("gpt2") or {})},
            vision_config={"model_type": "medclip_vision", "swin": dict(vision), "projection_dim": width},
            vision_feature_layer=-1,
            connector={"type": "prefix_mapper", **(raw.get("mapper") or {})},
            media={"image": {"views": {"type": "grey_square", "size": size}, "arrange": {"type": "flat"}}},
            template=raw.get("template") or "plain",
            image_token_id=int((raw.get("gpt2") or {}).get("vocab_size", 50257)),
            system=self.system,
        )

    def read_own(self, folder: Path, raw: Mapping[str, Any]) -> LazyState:
        files = sorted(folder.glob("*.pt"))
        return in_memory(read_file(files[0]) if len(files) == 1 else read_folder(folder))

    def expresses(self, config: LlavakitConfig) -> bool:
        views = (config.media or {}).get("image", {}).get("views", {})
        return (
            config.vision_config is not None
            and config.vision_config.model_type == "medclip_vision"
            and config.vision_config.pooled
            and config.connector.get("type") == "prefix_mapper"
            and config.text_config.model_type == "gpt2"
            and set(config.media) == {"image"}
            and views.get("type") == "grey_square"
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        gpt2 = {key: value for key, value in config.text_config.to_diff_dict().items() if key != "model_type"}
        return {
            "model_type": KIND,
            "dim_clip": config.vision_config.projection_dim,
            "vision": dict(config.vision_config.swin),
            "mapper": {key: value for key, value in config.connector.items() if key not in ("type", "encoder")},
            "gpt2": gpt2,
            "template": config.template,
        }

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        lazy = to_disk(config, state).renamed(rename_with(_PUBLISHED))
        return ((name, lazy[name]) for name in lazy)


def _count(state: LazyState, pattern: str) -> int:
    numbers = [int(found[1]) for name in state if (found := re.match(rf"{pattern}\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)
