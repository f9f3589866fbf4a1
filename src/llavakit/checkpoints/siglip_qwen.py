"""The layout of the LLaVA-NeXT code base's files: SigLIP without its last layer, an MLP, a Qwen decoder.

Several systems published in it and differ in settings alone. `media_of` says what the published settings mean for
images, several images and videos; `settings_of` is its inverse. A system's own layout subclasses `SiglipQwenLayout`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipVisionConfig

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.files import LazyState, read_json
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.routes import MediaSpec
from llavakit.views.tiles import candidates
from llavakit.vision.known import KNOWN_ENCODERS

HALF = [0.5, 0.5, 0.5]
SIGLIP = "google/siglip-so400m-patch14-384"
POOL_STRIDE = 2  # the published code never passes on the stride of its configuration

Settings = Mapping[str, Any]


# Published settings and their meaning


def media_of(raw: Settings, size: int, *, rounding: str = "int", single_newline: bool = True) -> dict[str, Any]:
    """`config.media` of published settings.

    Args:
        raw: `mm_patch_merge_type`, `image_aspect_ratio`, `image_grid_pinpoints`, `mm_spatial_pool_mode`,
            `mm_newline_position`, with the published code's defaults.
        size: Side of the encoder's input in pixels.
        rounding: "int" unpads like the published code, "hf" like transformers.
        single_newline: Whether an image among several ends with the newline: 730 tokens, else 729.

    Raises:
        CheckpointError: If a setting is none that checkpoints were released with.
    """
    merge = str(raw.get("mm_patch_merge_type") or "flat")
    ratio = str(raw.get("image_aspect_ratio") or "square")
    common = {"size": size, "image_mean": HALF, "image_std": HALF}
    if ratio in ("highres", "crop_split"):
        raise CheckpointError(f"config.json: image_aspect_ratio {ratio!r} is not supported; known: anyres_max_N, pad")
    if merge != "flat" and not merge.startswith("spatial"):
        raise CheckpointError(f"config.json: mm_patch_merge_type {merge!r} is unknown; known: flat, spatial, ...")
    if ratio.startswith("anyres"):
        listed = candidates(raw.get("image_grid_pinpoints") or "(1x1),...,(6x6)", size)
        views = {"type": "anyres", "pinpoints": [list(canvas) for canvas in listed], **common}
    else:
        views = {"type": "pad" if ratio == "pad" else "squash", **common}
    return {
        "image": {"views": views, "arrange": _arrangement(merge, ratio, rounding)},
        "multi_image": {
            "views": {"type": "pad", **common},
            "arrange": _arrangement(merge, "", "int", single_newline=single_newline),
        },
        "video": {
            "views": {"type": "frames", "frame": {"type": "squash", **common}},
            "arrange": {
                "type": "frames",
                "newline": _newline(merge, raw),
                "pool": {"mode": raw.get("mm_spatial_pool_mode") or "bilinear", "stride": POOL_STRIDE},
            },
        },
    }


def _arrangement(merge: str, ratio: str, rounding: str, *, single_newline: bool = True) -> dict[str, Any]:
    if merge == "flat":
        return {"type": "flat"}
    unpad, maxpool = "unpad" in merge, "maxpool2x2" in merge
    arrange: dict[str, Any] = {"type": "spatial_unpad" if unpad else "spatial"}
    budget = re.match(r"anyres_max_(\d+)", ratio)
    if budget and unpad and not maxpool:
        arrange["max_tiles"] = int(budget[1])
    if maxpool:
        arrange["maxpool"] = True
    if "nobase" in merge:
        arrange["base"] = False
    if rounding != "int" and unpad:
        arrange["rounding"] = rounding
    if not single_newline and unpad:
        arrange["single_newline"] = False
    return arrange


def _newline(merge: str, raw: Settings) -> str:
    position = raw.get("mm_newline_position") or "one_token"
    known = ("one_token", "grid", "frame", "no_token")
    if position not in known:
        raise CheckpointError(f"config.json: mm_newline_position {position!r} is unknown; known: {', '.join(known)}")
    return "no_token" if merge == "flat" or (position == "one_token" and "unpad" not in merge) else position


def settings_of(media: Mapping[str, Any]) -> dict[str, Any] | None:
    """The published settings that mean `media`, None if there are none.

    What is the caller's choice in the published code is not looked at: rounding, and the newline of an image among
    several.
    """
    if set(media) != {"image", "multi_image", "video"}:
        return None
    image, video = media["image"], media["video"]
    views, arrange = image["views"], image.get("arrange", {"type": "flat"})
    if "size" not in views:
        return None
    merge = "flat"
    if arrange["type"] in ("spatial", "spatial_unpad"):
        merge = "spatial" + "_maxpool2x2" * bool(arrange.get("maxpool")) + "_unpad" * arrange["type"].endswith("unpad")
        merge += "_nobase" * (not arrange.get("base", True))
    ratio = {"pad": "pad", "squash": "square"}.get(views["type"], views["type"])
    if ratio == "anyres" and arrange.get("max_tiles") is not None:
        ratio = f"anyres_max_{arrange['max_tiles']}"
    own = video.get("arrange", {"type": "flat"})
    settings: dict[str, Any] = {
        "image_aspect_ratio": ratio,
        "mm_patch_merge_type": merge,
        "mm_spatial_pool_mode": (own.get("pool") or {}).get("mode", "bilinear"),
    }
    if ratio.startswith("anyres"):
        settings["image_grid_pinpoints"] = [list(canvas) for canvas in candidates(views["pinpoints"], views["size"])]
    if own.get("newline", "no_token") != "one_token" and "unpad" in merge:
        settings["mm_newline_position"] = own.get("newline", "no_token")
    try:
        meant = media_of(settings, views["size"])
    except CheckpointError:
        return None
    return settings if _comparable(meant) == _comparable(media) else None


def _comparable(media: Mapping[str, Any]) -> dict[str, Any]:
    plain = copy.deepcopy(dict(media))
    for section in plain.values():
        for choice in ("rounding", "single_newline"):
            section.get("arrange", {}).pop(choice, None)
        views = section["views"]
        if "pinpoints" in views:
            views["pinpoints"] = candidates(views["pinpoints"], views["size"])
    return json.loads(json.dumps(plain))


# The layout


class SiglipQwenLayout(ClassicLayout):
    """Base of the systems' layouts.

    A subclass has `system`, says which files are its own (`matches`), and may read and write the media in its own way.
    """

    own_tower = "siglip_vision_tower"
    model_types = ("llava_qwen", "llava", "qwen2")
    inert = ClassicLayout.inert | {
        "rope_scaling": "the published model class overrules any scaling of positions",
        "mm_spatial_pool_stride": "the published code never passes it on",
        "faster_token_stride": "belongs to add_faster_video, which is refused",
        "pos_skipping_range": "says how the weights were trained",
        "add_time_instruction": "changes the text of training data, not the model",
        "force_sample": "changes which frames of training data are taken, not the model",
        "image_grid_pinpoints": "read where image_aspect_ratio is anyres",
    }

    # what a system may change

    def media(self, raw: Settings, size: int, **options: Any) -> dict[str, Any]:
        """`config.media` of published settings; options as for `media_of`."""
        return media_of(raw, size, **options)

    def settings(self, media: Mapping[str, Any]) -> dict[str, Any] | None:
        """The published settings that mean `media`, None if there are none."""
        return settings_of(media)

    def system_fields(self) -> dict[str, Any]:
        """Further fields of the configuration: the template, how videos are sampled."""
        return {"template": "qwen_1_5"}

    # reading

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        qwen = "qwen" in f"{raw.get('model_type')} {' '.join(raw.get('architectures') or [])}".lower()
        known_merge = str(raw.get("mm_patch_merge_type") or "flat").startswith(("spatial", "flat"))
        projector = str(raw.get("mm_projector_type", "linear"))
        plain = projector in ("linear", "identity") or projector.startswith("mlp")
        return super().matches(raw, folder) and qwen and known_merge and plain and _is_siglip(raw["mm_vision_tower"])

    def text_config(self, raw: Mapping[str, Any], *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        return super().text_config(raw, without=without | {"rope_scaling"})

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        if raw.get("add_faster_video"):
            raise CheckpointError("config.json: add_faster_video is on; no checkpoint was released with it")
        raw.one_of("use_pos_skipping", False)
        return {
            "vision_config": kept_tower(encoder),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "media": self.media(raw, encoder["image_size"]),
            **self.system_fields(),
        }

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        config, state = super().read(folder, raw, sources)
        if config.media["image"]["arrange"]["type"] == "spatial_unpad" and "model.image_newline" not in state:
            # files of the first stage hold the connector alone: the vector starts as it does in training
            generator = torch.Generator().manual_seed(0)
            newline = torch.randn(config.hidden_size, generator=generator) * config.hidden_size**-0.5
            state = state.joined({"model.image_newline": newline})
        return config, state

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        """Without the encoder's deleted layer and pooling head, which an encoder's own folder still holds, and without
        the newline where no arrangement writes it."""
        layers = config.vision_config.num_hidden_layers
        newline = MediaSpec(config).uses_newline

        def keep(name: str) -> str | None:
            layer = re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", name)
            dropped = name.startswith("model.vision_tower.head.") or (layer and int(layer[1]) >= layers)
            return None if dropped or (name == "model.image_newline" and not newline) else name

        return state.renamed(keep)

    # writing

    def expresses(self, config: LlavakitConfig) -> bool:
        encoder = config.vision_config
        return (
            config.system == self.system
            and config.language_adapter is None
            and config.text_config.model_type == "qwen2"
            and encoder.model_type == "siglip_vision_model"
            and config.vision_feature_layer in (-1, encoder.num_hidden_layers)
            and self.writes_connector(config.connector)
            and self.settings(config.media) is not None
        )

    def writes_connector(self, connector: Mapping[str, Any]) -> bool:
        """Whether the files have a name for a connector."""
        return connector["type"] == "mlp"

    def projector_name(self, connector: Mapping[str, Any]) -> str:
        """`mm_projector_type` of a connector."""
        depth = connector.get("depth", 2)
        return {0: "identity", 1: "linear"}.get(depth, f"mlp{depth}x_gelu")

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        own = config.vision_config.to_dict()
        known = all(own.get(key) == value for key, value in kept_tower(KNOWN_ENCODERS[SIGLIP]).items())
        return super().write_config(config) | {
            "architectures": ["LlavaQwenForCausalLM"],
            "mm_projector_type": self.projector_name(config.connector),
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_vision_tower": SIGLIP if known else self.own_tower,
            "rope_theta": config.text_config.rope_parameters["rope_theta"],
            "tokenizer_model_max_length": config.text_config.max_position_embeddings,
            "tokenizer_padding_side": "right",
            **self.settings(config.media),
        }

    def own_encoder(self, config: LlavakitConfig) -> dict[str, Any]:
        return super().own_encoder(config) | {"num_hidden_layers": config.vision_config.num_hidden_layers + 1}

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        for name, tensor in super().write_state(config, state):
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                yield name, tensor


def _is_siglip(encoder: Any) -> bool:
    config = Path(str(encoder)) / "config.json"
    return "siglip" in (read_json(config).get("model_type", "") if config.is_file() else str(encoder)).lower()


def kept_siglip() -> SiglipVisionConfig:
    """SigLIP so400m as these systems run it: 26 of 27 layers, no pooling head."""
    return SiglipVisionConfig(**{k: v for k, v in kept_tower(KNOWN_ENCODERS[SIGLIP]).items() if k != "model_type"})


def kept_tower(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """A published SigLIP configuration as these systems run it: without the last layer and the pooling head."""
    layers = encoder.get("num_hidden_layers", 12) - 1
    return {**encoder, "num_hidden_layers": layers, "vision_use_head": False}
