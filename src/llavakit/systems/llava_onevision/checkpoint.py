"""LLaVA-OneVision's published files: the authors' layout and transformers' `LlavaOnevisionForConditionalGeneration`.

`media_of` says what the published settings mean for images, several images and videos; `settings_of` is its inverse.
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

from llavakit.checkpoints.classic import ClassicLayout, mlp_options
from llavakit.checkpoints.files import LazyState, read_folder, read_json
from llavakit.checkpoints.layouts import Layout, rename_with
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.routes import MediaSpec
from llavakit.views.tiles import candidates
from llavakit.vision.known import KNOWN_ENCODERS

HALF = [0.5, 0.5, 0.5]
SIGLIP = "google/siglip-so400m-patch14-384"
SAMPLING = {"type": "uniform", "frames": 32}  # the published harness; training read one frame per second, at most 32
POOL_STRIDE = 2  # the published code never passes on the stride of its configuration
VOCABULARY_MULTIPLE = 64

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


# The authors' layout


class Classic(ClassicLayout):
    """`lmms-lab/llava-onevision-*`: a SigLIP encoder without its last layer, Qwen2, one newline vector."""

    system = "llava-onevision"
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
    own_renames = ((r"^model\.mm_projector\.(\d+)\.(pre_norm|proj)\.", r"model.multi_modal_projector.blocks.\1.\2."),)

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        qwen = "qwen" in f"{raw.get('model_type')} {' '.join(raw.get('architectures') or [])}".lower()
        known_merge = str(raw.get("mm_patch_merge_type") or "flat").startswith(("spatial", "flat"))
        projector = str(raw.get("mm_projector_type", "linear"))
        plain = projector in ("linear", "identity") or projector.startswith("mlp")
        return super().matches(raw, folder) and qwen and known_merge and plain and _is_siglip(raw["mm_vision_tower"])

    def text_config(self, raw: Mapping[str, Any], *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        return super().text_config(raw, without=without | {"rope_scaling"})

    def connector(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return connector_options(str(raw.get("mm_projector_type", "linear")))

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        if raw.get("add_faster_video"):
            raise CheckpointError("config.json: add_faster_video is on; no checkpoint was released with it")
        raw.one_of("use_pos_skipping", False)
        return {
            "vision_config": kept_tower(encoder),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "media": media_of(raw, encoder["image_size"]),
            "template": "qwen_1_5",
            "extras": {"processor": {"sampling": dict(SAMPLING)}},
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

        first = first_block(config.connector)
        return state.renamed(lambda name: renumbered(name, -first)).renamed(keep)

    def expresses(self, config: LlavakitConfig) -> bool:
        encoder = config.vision_config
        return (
            config.system == self.system
            and config.language_adapter is None
            and config.text_config.model_type == "qwen2"
            and encoder.model_type == "siglip_vision_model"
            and config.vision_feature_layer in (-1, encoder.num_hidden_layers)
            and config.connector["type"] in ("mlp", "residual_mlp")
            and settings_of(config.media) is not None
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        connector = config.connector
        projector = {0: "identity", 1: "linear"}.get(connector.get("depth", 2), f"mlp{connector.get('depth', 2)}x_gelu")
        if connector["type"] == "residual_mlp":
            projector = f"mlp{connector.get('depth', 2)}x_res{connector.get('blocks', 1)}x_gelu"
        own = config.vision_config.to_dict()
        known = all(own.get(key) == value for key, value in kept_tower(KNOWN_ENCODERS[SIGLIP]).items())
        return super().write_config(config) | {
            "architectures": ["LlavaQwenForCausalLM"],
            "mm_projector_type": projector,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_vision_tower": SIGLIP if known else "siglip_vision_tower",
            "rope_theta": config.text_config.rope_parameters["rope_theta"],
            "tokenizer_model_max_length": config.text_config.max_position_embeddings,
            "tokenizer_padding_side": "right",
            **settings_of(config.media),
        }

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        first = first_block(config.connector)
        for name, tensor in super().write_state(config, state):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            yield renumbered(name, first).replace("multi_modal_projector.blocks.", "mm_projector."), tensor


def first_block(connector: Mapping[str, Any]) -> int:
    """The published code numbers residual blocks on from the linear layers and activations before them."""
    return 2 * connector.get("depth", 2) - 1


def renumbered(name: str, by: int) -> str:
    return re.sub(r"(?<=multi_modal_projector\.blocks\.)\d+", lambda number: str(int(number[0]) + by), name)


def _is_siglip(encoder: Any) -> bool:
    config = Path(str(encoder)) / "config.json"
    return "siglip" in (read_json(config).get("model_type", "") if config.is_file() else str(encoder)).lower()


def kept_tower(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """A published SigLIP configuration as LLaVA-OneVision runs it: without the last layer and the pooling head."""
    layers = encoder.get("num_hidden_layers", 12) - 1
    return {**encoder, "num_hidden_layers": layers, "vision_use_head": False}


def connector_options(name: str) -> dict[str, Any]:
    """Connector of a published `mm_projector_type`.

    Raises:
        CheckpointError: If it is unknown.
    """
    residual = re.fullmatch(r"mlp(\d+)x_res(\d+)x_gelu", name)
    if residual:
        return {"type": "residual_mlp", "depth": int(residual[1]), "blocks": int(residual[2])}
    return mlp_options(name)


# transformers' layout


class Hf(Layout):
    """`llava-hf/llava-onevision-*`: reads old and new key forms, writes the form that transformers and vLLM read.

    transformers unpads with its own rounding, so models read from there get `rounding: hf`, and give the same token
    counts as transformers.
    """

    system = "llava-onevision"
    form = "hf"

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") == "llava_onevision"

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        from transformers import LlavaOnevisionConfig

        config = LlavaOnevisionConfig.from_dict(raw)
        settings = {
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": config.vision_aspect_ratio,
            "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
        }
        media = media_of(settings, config.vision_config.image_size, rounding="hf")
        _normalise_like(folder, media)
        native = LlavakitConfig(
            text_config=config.text_config,
            vision_config=config.vision_config,
            connector={"type": "mlp", "act": config.projector_hidden_act, "bias": config.multimodal_projector_bias},
            media=media,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_token_id=config.image_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
            template="qwen_1_5",
            system=self.system,
            extras={"processor": {"sampling": dict(SAMPLING)}},
        )
        rules = (
            (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
            (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
            (r"^(?:model\.)?image_newline$", "model.image_newline"),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
        )
        return native, read_folder(folder).renamed(rename_with(rules))

    def expresses(self, config: LlavakitConfig) -> bool:
        settings = settings_of(config.media)
        return (
            settings is not None
            and settings["mm_patch_merge_type"] == "spatial_unpad"
            and settings["image_aspect_ratio"].startswith("anyres_max_")
            and settings["mm_spatial_pool_mode"] == "bilinear"
            and "mm_newline_position" not in settings
            and config.media["multi_image"]["arrange"].get("single_newline", True)
            and config.connector["type"] == "mlp"
            and config.connector.get("depth", 2) == 2
            and config.language_adapter is None
        )

    @staticmethod
    def _rows(config: LlavakitConfig) -> int:
        """Vocabulary of the exported model: grown to a multiple of 64 where `<image>` and `<video>` have no row."""
        rows = config.text_config.vocab_size
        if config.image_token_id + 1 < rows:
            return rows
        return -(-(max(rows, config.image_token_id + 2)) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        from transformers import LlavaOnevisionConfig

        settings = settings_of(config.media)
        exported = LlavaOnevisionConfig(
            text_config=config.text_config.to_dict() | {"vocab_size": self._rows(config)},
            vision_config=config.vision_config.to_dict(),
            image_token_index=config.image_token_id,
            video_token_index=config.image_token_id + 1,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            projector_hidden_act=config.connector.get("act", "gelu"),
            multimodal_projector_bias=config.connector.get("bias", True),
            tie_word_embeddings=config.tie_word_embeddings,
            image_grid_pinpoints=[[height, width] for width, height in settings["image_grid_pinpoints"]],
            vision_aspect_ratio=settings["image_aspect_ratio"],
        ).to_dict()
        exported["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
        exported["text_config"]["architectures"] = ["Qwen2ForCausalLM"]
        return exported

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        rename = rename_with(
            (
                (r"^model\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
                (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
                (r"^model\.image_newline$", "image_newline"),
                (r"^model\.language_model\.", "language_model.model."),
                (r"^lm_head\.", "language_model.lm_head."),
            )
        )
        rows = self._rows(config)
        for name in state:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            tensor = state[name]
            if name.endswith(("embed_tokens.weight", "lm_head.weight")) and tensor.shape[0] < rows:
                mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(rows - tensor.shape[0], -1)])
            yield rename(name), tensor

    def write_processor(self, processor: Any, config: LlavakitConfig, folder: Path) -> None:
        """Tokenizer with `<image>` and `<video>`, and `processor_config.json`.

        The file is written by hand: transformers cannot build its video processor without torchvision.
        """
        tokenizer = copy.deepcopy(processor.tokenizer)
        if "<video>" not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
        tokenizer.save_pretrained(folder)
        raw = read_json(folder / "config.json")
        raw["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
        if raw["video_token_index"] >= raw["text_config"]["vocab_size"]:
            raise CheckpointError(
                f"{folder}: the token <video> has no row in the embedding; give it the id after <image>"
            )
        _write_json(folder / "config.json", raw)
        views = config.media["image"]["views"]
        pixels = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": views["image_mean"],
            "image_std": views["image_std"],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": views["size"], "width": views["size"]},
        }
        grid = config.vision_config.image_size // config.vision_config.patch_size
        own = {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": grid * grid,
            "vision_aspect_ratio": raw["vision_aspect_ratio"],
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_processor": {
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "do_pad": True,
                "image_grid_pinpoints": raw["image_grid_pinpoints"],
                **pixels,
            },
            "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", **pixels},
        }
        _write_json(folder / "processor_config.json", own)
        template = Path(__file__).with_name("hf_chat_template.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _normalise_like(folder: Path, media: Mapping[str, Any]) -> None:
    """Mean and deviation of the files' own preprocessor, where they bring one."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        options = read_json(folder / name)
        options = options.get("image_processor", options)
        for section in media.values():
            views = section["views"].get("frame", section["views"])
            views |= {key: options[key] for key in ("image_mean", "image_std") if options.get(key)}
