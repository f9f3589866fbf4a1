"""MedM-VL's published files: keys by part (`llm`, `encoder_image`, `connector_image`, `..._image3d`).

Two generations of config.json exist: with the prefix `lvlm_` and without. The files name their parts by hub id; the
configurations of the published ones are written out here, others are read from `--base` and `--vision-encoder`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llavakit.checkpoints.classic import mlp_options
from llavakit.checkpoints.fields import Fields, check_known
from llavakit.checkpoints.files import LazyState, read_folder, read_json
from llavakit.checkpoints.layouts import Layout, rename_with
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig
from llavakit.vision.geometry import geometry_of
from llavakit.vision.known import KNOWN_ENCODERS

KNOWN_LLMS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-3B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
}
LLM_TYPES = {"llama": "llama", "llama3": "llama", "qwen2": "qwen2", "phi": "phi", "phi3": "phi3"}
TEMPLATES = {
    "llama": "vicuna_llama",
    "llama3": "vicuna_llama_3",
    "qwen2": "vicuna_qwen_2",
    "phi": "vicuna_phi",
    "phi3": "vicuna_phi",
    "pretrain": "caption",
    "pretrain_image3d": "caption",
}
CONNECTORS = {"mlp": "mlp", "spatial_pooling": "pooling", "attn_pooling": "attention_pooling"}
VOLUME_TOWER, VOLUME_CONNECTOR = "volume_tower", "volume_projector"
PUBLISHED_QUERIES = 256
# The text side of the contrastive model that the published files still hold; no answer depends on it.
_UNUSED = re.compile(
    r"encoder_image(?:3d)?\.encoder\.(?:language_encoder\.|mm_vision_proj\.|mm_language_proj\.|logit_scale$)"
)
VOLUME_SIZE = (32, 256, 256)  # of both published 3D encoders


def unprefixed(raw: Mapping[str, Any]) -> Fields:
    """The fields of either generation under the names of the first."""
    raw = raw if isinstance(raw, Fields) else Fields(raw)
    return raw.renamed(lambda key: key.removeprefix("lvlm_"))


class Published(Layout):
    """`shiym2000/MedM-VL-*`."""

    system = "medm-vl"
    form = "original"
    inert = {
        key: "says how the weights were trained or where the authors' code looked for files"
        for name in (
            *("llm_attn_implementation", "llm_max_length", "llm_padding_side", "llm_initializer_range"),
            *("connector_image_path", "connector_image3d_path", "cache_dir_hf", "tokenizer_use_fast"),
            *("llm_name_or_path", "encoder_image_name_or_path", "encoder_image3d_name_or_path"),
        )
        for key in (name, f"lvlm_{name}")
    }

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") == "lvlm" or "encoder_image_type" in raw or "lvlm_encoder_image_type" in raw

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        config = self.read_config(raw, sources)
        used = read_folder(folder).renamed(lambda name: None if _UNUSED.match(name) else name)
        return config, used.renamed(rename_with(self.renames_in(config)))

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        """llavakit's configuration of either generation of config.json."""
        fields = unprefixed(raw)
        for slot in ("image", "image3d"):
            fields.one_of(f"connector_{slot}_config", {})
        text = self._part(fields, "llm", KNOWN_LLMS, sources.get("base"))
        text["model_type"] = LLM_TYPES.get(fields.get("llm_type", ""), text.get("model_type", "qwen2"))
        flat = fields.get("encoder_image_type")
        deep = fields.get("encoder_image3d_type")
        slots: dict[str, Any] = {}
        if flat:
            slots["image"] = self._slot(fields, "image", sources.get("encoder"))
        if deep:
            slots["volume"] = self._slot(fields, "image3d", sources.get("encoder"))
        if not slots:
            raise CheckpointError("config.json: names no encoder; it should hold encoder_image_type or its 3D form")
        first = slots.get("image") or slots["volume"]
        encoder, layer, strategy, connector = first
        media: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        if flat:
            size = encoder["image_size"]
            views = {"type": "squash", "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            media["image"] = {"views": views}
            # as published, a volume goes through the 2D slot if there is one
            media["volume"] = {"views": {"type": "volume_slices", "size": size, "stored": self._stored(raw)}}
        else:
            intensity = "standard" if encoder["model_type"] == "medm_clip_vision" else "minmax"
            size = list(encoder.get("image_size", VOLUME_SIZE))
            views = {"type": "volume_box", "size": size, "intensity": intensity, "stored": self._stored(raw)}
            media["volume"] = {"views": views}
        if flat and deep:
            tower3, layer3, strategy3, connector3 = slots["volume"]
            extra = {
                "extra_encoders": {VOLUME_TOWER: {"config": tower3, "layer": layer3, "strategy": strategy3}},
                "extra_connectors": {VOLUME_CONNECTOR: {**connector3, "encoder": VOLUME_TOWER}},
            }
        config = LlavakitConfig(
            text_config=text,
            vision_config=encoder,
            connector=connector,
            media=media,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            image_token_id=text["vocab_size"],
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
            template=TEMPLATES.get(fields.get("llm_type"), "vicuna_qwen_2"),
            system=self.system,
            **extra,
        )
        check_known(config.text_config, text, "config.json: llm_config")
        check_known(config.vision_config, encoder, "config.json: encoder_config")
        if fields.get("hidden_size") not in (None, config.hidden_size):
            raise CheckpointError(
                f"config.json: hidden_size is {quoted(fields['hidden_size'])}, "
                f"that of the language model is {config.hidden_size}"
            )
        return config

    @staticmethod
    def _stored(raw: Mapping[str, Any]) -> str:
        """The paper's weights were trained on volumes stored as grey levels; later code windows Hounsfield units."""
        return "hounsfield" if any(key.startswith("lvlm_") for key in raw) else "grey"

    @staticmethod
    def _part(fields: Mapping[str, Any], part: str, known: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        nested = fields.get(f"{part}_config")
        if isinstance(nested, Mapping) and nested:
            return dict(nested)
        name = str(fields.get(f"{part}_name_or_path", ""))
        for place in (folder, Path(name) if name else None):
            if place is not None and (place / "config.json").is_file():
                found = read_json(place / "config.json")
                return dict(found.get("vision_config", found) if part.startswith("encoder") else found)
        if name in known:
            return dict(known[name])
        option = "--base" if part == "llm" else "--vision-tower"
        raise CheckpointError(
            f"config.json: {part}_name_or_path {name!r} is neither a local folder nor known; "
            f"name its folder with {option}"
        )

    def _slot(
        self, fields: Mapping[str, Any], slot: str, folder: Path | None
    ) -> tuple[dict[str, Any], int, str, dict[str, Any]]:
        kind = fields[f"encoder_{slot}_type"]
        if kind in ("m3dclip", "medmclip"):
            nested = fields.get(f"encoder_{slot}_config") or {}
            encoder = dict(nested) if isinstance(nested, Mapping) else {}
            encoder["model_type"] = "m3d_clip_vision" if kind == "m3dclip" else "medm_clip_vision"
        else:
            encoder = self._part(fields, f"encoder_{slot}", KNOWN_ENCODERS, folder)
            encoder["model_type"] = f"{kind}_vision_model"
        layer = int(fields.get(f"encoder_{slot}_select_layer", -1))
        feature = fields.one_of(f"encoder_{slot}_select_feature", "patch", "cls_patch") or "patch"
        if kind == "siglip":  # without a class token, the authors' "patch" drops the first patch
            strategy = "drop_first" if feature == "patch" else "full"
        else:
            strategy = "default" if feature == "patch" else "full"
        connector = self._connector(fields, slot, encoder)
        return encoder, layer, strategy, connector

    @staticmethod
    def _connector(fields: Mapping[str, Any], slot: str, encoder: Mapping[str, Any]) -> dict[str, Any]:
        kind = fields.get(f"connector_{slot}_type", "mlp")
        if kind not in CONNECTORS:
            raise CheckpointError(f"config.json: connector_{slot}_type {kind!r}; known: {', '.join(CONNECTORS)}")
        options = mlp_options(fields.get(f"connector_{slot}_name", "mlp2x_gelu")) | {"type": CONNECTORS[kind]}
        if kind == "spatial_pooling":
            options["stride"] = [2, 2, 2]
        if kind == "attn_pooling":
            size, patch = encoder.get("image_size"), encoder.get("patch_size")
            square = isinstance(size, int) and isinstance(patch, int)
            options["queries"] = (size // patch) ** 2 if square else PUBLISHED_QUERIES
        return options

    # names

    def _prefixes(self, config: LlavakitConfig) -> list[tuple[str, str, str]]:
        """(published slot, attribute of the encoder, attribute of the connector)."""
        volume_only = "image" not in config.media
        slots = [("image3d" if volume_only else "image", "vision_tower", "multi_modal_projector")]
        if config.extra_encoders:
            slots.append(("image3d", VOLUME_TOWER, VOLUME_CONNECTOR))
        return slots

    def renames_in(self, config: LlavakitConfig) -> tuple[tuple[str, str], ...]:
        """Published names to llavakit's."""
        rules: list[tuple[str, str]] = []
        for slot, encoder, connector in self._prefixes(config):
            rules.append((rf"^encoder_{slot}\.encoder\.(?:vision_model|vision_encoder)\.", f"model.{encoder}."))
            rules.append((rf"^encoder_{slot}\.encoder\.", f"model.{encoder}."))
            for n in range(6):
                rules.append((rf"^connector_{slot}\.connector\.{2 * n}\.", f"model.{connector}.linear_{n + 1}."))
            rules.append((rf"^connector_{slot}\.", f"model.{connector}."))
        return (*rules, (r"^llm\.lm_head\.", "lm_head."), (r"^llm\.model\.", "model.language_model."))

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        rules: list[tuple[str, str]] = []
        inner = {"m3d_clip_vision": "vision_encoder.", "medm_clip_vision": ""}
        for slot, encoder, connector in self._prefixes(config):
            kind = config.encoder_config(encoder)[0].model_type
            level = inner.get(kind, "vision_model.")
            rules.append((rf"^model\.{encoder}\.(?:vision_model\.)?", f"encoder_{slot}.encoder.{level}"))
            for n in range(6):
                rules.append((rf"^model\.{connector}\.linear_{n + 1}\.", f"connector_{slot}.connector.{2 * n}."))
            rules.append((rf"^model\.{connector}\.", f"connector_{slot}."))
        rules += [(r"^lm_head\.", "llm.lm_head."), (r"^model\.language_model\.", "llm.model.")]
        rename = rename_with(tuple(rules))
        for name in state:
            yield rename(name), state[name]

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        """The first generation, which holds the parts' own configurations."""
        types = {
            own: published for published, own in LLM_TYPES.items() if published in ("llama", "qwen2", "phi", "phi3")
        }
        fields: dict[str, Any] = {
            "model_type": "lvlm",
            "hidden_size": config.hidden_size,
            "llm_type": types.get(config.text_config.model_type, "qwen2"),
            "llm_config": config.text_config.to_dict(),
            "llm_max_length": 2048,
            "llm_padding_side": "right",
        }
        kinds = {"m3d_clip_vision": "m3dclip", "medm_clip_vision": "medmclip"}
        names = {own: published for published, own in CONNECTORS.items()}
        for slot, encoder, connector in self._prefixes(config):
            encoder, layer, strategy = config.encoder_config(encoder)
            options = config.connector_options(connector)
            kind = kinds.get(encoder.model_type, encoder.model_type.removesuffix("_vision_model"))
            keeps_all = strategy == "full" or (strategy == "default" and not geometry_of(encoder).prefix_tokens)
            fields |= {
                f"encoder_{slot}_type": kind,
                f"encoder_{slot}_config": encoder.to_dict(),
                f"encoder_{slot}_select_layer": layer,
                f"encoder_{slot}_select_feature": "cls_patch" if keeps_all else "patch",
                f"connector_{slot}_type": names[options["type"]],
                f"connector_{slot}_name": f"mlp{options.get('depth', 2)}x_gelu",
            }
        return fields
