"""MG-LLaVA's published files: one state dict of the trained parts, without a configuration and without the encoders.

    projector.model.{0,2}             two-layer MLP on image tokens
    bbox_projector.model.{0,2}        two-layer MLP on the vectors of boxes
    multi_level_linear.{0..3}         one layer per stage in front of it (unreleased variant)
    fuse_module.*                     Conv-Gate
    llm.*                             the language model, if it was trained
    visual_encoder.*, visual_encoder_aux.*    the encoders; not in the released files

The language model's configuration and tokenizer come from `--base`, the encoders from `--vision-tower`. What llavakit
writes holds everything, with a config.json of its own (`model_type: mg_llava`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.causal import CausalLayout
from llavakit.checkpoints.encoders import check_same, encoder_options, holds_encoder, read_encoder
from llavakit.checkpoints.fields import Fields, check_known
from llavakit.checkpoints.files import LazyState, holds_weights, read_folder, read_json
from llavakit.checkpoints.layouts import Layout, Renames, rename_with
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import MAIN_ENCODER, LlavakitConfig
from llavakit.systems.mg_llava.connector import VARIANTS
from llavakit.vision.known import KNOWN_ENCODERS

CONVNEXT = "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
DETAIL = "detail_encoder"  # attribute of the high-resolution encoder
OWN = "model.multi_modal_projector"
TOWERS = {"visual_encoder": MAIN_ENCODER, "visual_encoder_aux": DETAIL}  # in the files -> here
TEMPLATES = {
    "vicuna": "mg_vicuna",
    "llama3_chat": "mg_llama_3",
    "phi3_chat": "mg_phi_3",
    "qwen_chat": "mg_qwen",
}
LLAMA_3_VOCABULARY, YI_VOCABULARY = 128_256, 64_000
# in config.json -> option of the planner `low_and_high`
BOX_RULES = {
    "iou_threshold": "iou_threshold",
    "limit_mode": "limit_mode",
    "limit_num": "limit_num",
    "max_length": "max_text_length",
    "near_margin": "near_margin",
    "frame": "box_frame",
    "rounded": "rounded",
    "outside": "outside",
}
PUBLISHED_BOXES = {
    "iou_threshold": 0.2,
    "limit_mode": "per_category",
    "limit_num": 100,
    "max_length": 1472,
    "near_margin": 50,
    "frame": 768,
    "rounded": True,
    "outside": "refuse",
}
_TIMM = (
    (r"vision_stem\.0\.", "embeddings.patch_embeddings."),
    (r"vision_stem\.1\.", "embeddings.layernorm."),
    (r"vision_stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"vision_stages\.(\d+)\.blocks\.(\d+)\.gamma", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (r"vision_stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"encoder.stages.\1.layers.\2.dwconv."),
    (r"vision_stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (r"vision_stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
)
_BLOCK, _TIMM_BLOCK = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"vision_stages.\1.blocks.\2."
_TIMM_OUT = (
    (r"embeddings\.patch_embeddings\.", "vision_stem.0."),
    (r"embeddings\.layernorm\.", "vision_stem.1."),
    (r"encoder\.stages\.(\d+)\.downsampling_layer\.", r"vision_stages.\1.downsample."),
    (_BLOCK + "layer_scale_parameter", _TIMM_BLOCK + "gamma"),
    (_BLOCK + r"dwconv\.", _TIMM_BLOCK + "conv_dw."),
    (_BLOCK + r"layernorm\.", _TIMM_BLOCK + "norm."),
    (_BLOCK + r"pwconv([12])\.", _TIMM_BLOCK + r"mlp.fc\3."),
)

RENAMES: Renames = (
    (r"^projector\.model\.0\.", f"{OWN}.mlp.linear_1."),
    (r"^projector\.model\.2\.", f"{OWN}.mlp.linear_2."),
    (r"^bbox_projector\.model\.0\.", f"{OWN}.objects.mlp.linear_1."),
    (r"^bbox_projector\.model\.2\.", f"{OWN}.objects.mlp.linear_2."),
    (r"^multi_level_linear\.", f"{OWN}.objects.levels."),
    (r"^fuse_module\.", f"{OWN}.fuse."),
    (r"^llm\.model\.", "model.language_model."),
    (r"^llm\.lm_head\.", "lm_head."),
    (r"^visual_encoder\.(?:vision_model\.)?", f"model.{MAIN_ENCODER}."),
    *((rf"^visual_encoder_aux\.{pattern}", f"model.{DETAIL}.{target}") for pattern, target in _TIMM),
)
RENAMES_OUT: Renames = (
    (rf"^{OWN}\.mlp\.linear_1\.", "projector.model.0."),
    (rf"^{OWN}\.mlp\.linear_2\.", "projector.model.2."),
    (rf"^{OWN}\.objects\.mlp\.linear_1\.", "bbox_projector.model.0."),
    (rf"^{OWN}\.objects\.mlp\.linear_2\.", "bbox_projector.model.2."),
    (rf"^{OWN}\.objects\.levels\.", "multi_level_linear."),
    (rf"^{OWN}\.fuse\.", "fuse_module."),
    (r"^model\.language_model\.", "llm.model."),
    (r"^lm_head\.", "llm.lm_head."),
    (rf"^model\.{MAIN_ENCODER}\.(?:vision_model\.)?", "visual_encoder.vision_model."),
    *((rf"^model\.{DETAIL}\.{pattern}", f"visual_encoder_aux.{target}") for pattern, target in _TIMM_OUT),
)


class MgLayout(Layout):
    """`PhoenixZ/MG-LLaVA`, and what llavakit writes in its names."""

    system = "mg-llava"
    form = "original"

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") == "mg_llava"

    def implied_config(self, folder: Path, base: Path | None) -> dict[str, Any] | None:
        """A folder with one .pth in which `bbox_projector` is trained; everything else is as published."""
        path = _pth(folder)
        trained = path is not None and any(name.startswith("bbox_projector.") for name in read_pth(path))
        return {"model_type": "mg_llava"} if trained else None

    # configuration

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        """llavakit's configuration from config.json; what it lacks comes from the published model and the sources."""
        raw = raw if isinstance(raw, Fields) else Fields(raw)
        text = self._text_config(raw, sources)
        low, high = (self._encoder(raw, name, sources) for name in TOWERS)
        if high["model_type"] not in ("convnext", "convnext_pyramid"):
            kind = quoted(high["model_type"])
            raise CheckpointError(f"{raw.where}: visual_encoder_aux is a {kind}, it should be a convnext")
        high = {**high, "model_type": "convnext_pyramid"}
        for key in ("region_stages", "region_bins"):
            if raw.get(key) is not None:
                high[key] = raw[key]
        template = raw.one_of("template", *TEMPLATES) or _template_of(text)
        size = raw.get("image_size_aux", 768)
        views = {
            "type": "low_and_high",
            "size": size,
            "low_size": raw.get("image_size", low.get("image_size", 336)),
            "aspect": "pad" if raw.get("pad_image_to_square", True) else "square",
            **self._boxes(raw),
        }
        connector = {"type": "conv_gate", "variant": VARIANTS[raw.one_of("fuse_variant", 0, 1, 2, 3) or 0]}
        connector["encoder"] = list(TOWERS.values())
        if raw.get("multi_level") is not None:
            connector |= {"levels": list(raw["multi_level"]), "level_width": raw.get("multi_level_width", 1024)}
        config = LlavakitConfig(
            text_config=text,
            vision_config=low,
            extra_encoders={DETAIL: {"config": high, "layer": -1}},
            connector=connector,
            vision_feature_layer=raw.get("visual_select_layer", -2),
            media={"image": {"views": views}},
            image_token_id=text["vocab_size"],
            template=TEMPLATES[template],
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
            system=self.system,
            **{key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if text.get(key) is not None},
        )
        check_known(config.text_config, text, f"{raw.where}: llm")
        check_known(config.vision_config, low, f"{raw.where}: visual_encoder")
        check_known(config.encoder_config(DETAIL)[0], high, f"{raw.where}: visual_encoder_aux")
        return config

    @staticmethod
    def _boxes(raw: Fields) -> dict[str, Any]:
        own = raw.section("box_rules")
        rules = {option: own.get(key, PUBLISHED_BOXES[key]) for key, option in BOX_RULES.items()}
        own.finish({})
        return rules

    @staticmethod
    def _text_config(raw: Fields, sources: Mapping[str, Path]) -> dict[str, Any]:
        text = raw.get("llm")
        if text is None:
            if "base" not in sources:
                raise CheckpointError(
                    "the files do not describe the language model; name its folder with --base (its configuration and "
                    "tokenizer are read from there)"
                )
            text = read_json(sources["base"] / "config.json")
        if not isinstance(text, Mapping) or not isinstance(text.get("vocab_size"), int):
            raise CheckpointError(f"{raw.where}: llm is {quoted(text)}, it should be a configuration with a vocab_size")
        return dict(text)

    @staticmethod
    def _encoder(raw: Fields, name: str, sources: Mapping[str, Path]) -> dict[str, Any]:
        given = raw.get(name)
        if isinstance(given, Mapping):
            return dict(given)
        folder = _given(TOWERS[name], sources) or (Path(given) if isinstance(given, str) else None)
        options = encoder_options(folder) if folder is not None and folder.is_dir() else None
        if options is not None:
            return options
        known = {"visual_encoder": "openai/clip-vit-large-patch14-336", "visual_encoder_aux": CONVNEXT}[name]
        if given not in (None, known):
            raise CheckpointError(f"{raw.where}: {name} {quoted(given)} is neither a configuration nor a local folder")
        return dict(KNOWN_ENCODERS[known])

    def part_config(self, folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
        return dict(raw["llm"]) if name == "text_config" else self._encoder(Fields(raw), "visual_encoder", {})

    # tensors

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        config, state = self.read_config(raw, sources), self.read_own(folder, raw)
        if not any(name.startswith("model.language_model.") for name in state):
            if "base" not in sources:
                raise CheckpointError(f"{folder}: holds no language model; name its folder with --base")
            _, base = CausalLayout().read(sources["base"], read_json(sources["base"] / "config.json"), {})
            state = base.joined(state)
        for name, tower in TOWERS.items():
            state = self._with_encoder(state, name, tower, folder, raw, sources)
        return config, state

    def _with_encoder(
        self,
        state: LazyState,
        name: str,
        tower: str,
        folder: Path,
        raw: Mapping[str, Any],
        sources: Mapping[str, Path],
    ) -> LazyState:
        """The tensors with those of an encoder: the files' own, or those of a folder that was named."""
        own = f"model.{tower}."
        given = _given(tower, sources)
        stored = any(tensor.startswith(own) for tensor in state)
        if stored and given is None:
            return state
        if given is None and isinstance(raw.get(name), str) and Path(raw[name]).is_dir():
            given = Path(raw[name])
        if given is None or not holds_encoder(given):
            raise CheckpointError(
                f"{folder}: holds no tensors of the encoder {tower} ({name}); name the encoders' folders with "
                f"--vision-tower {MAIN_ENCODER}=FOLDER,{DETAIL}=FOLDER"
            )
        # the norm behind the last stage is not used
        encoder = read_encoder(given).renamed(
            lambda tensor: None if tower == DETAIL and tensor.startswith("layernorm.") else own + tensor
        )
        if stored and "exchange" not in sources:
            check_same(state, encoder, folder)
            return state
        return state.renamed(lambda tensor: None if tensor.startswith(own) else tensor).joined(encoder)

    def read_own(self, folder: Path, raw: Mapping[str, Any]) -> LazyState:
        state = read_folder(folder) if holds_weights(folder) else read_pth(_pth(folder) or folder)
        return state.renamed(rename_with(RENAMES))

    # writing

    def objections(self, config: LlavakitConfig) -> list[str]:
        views = (config.media or {}).get("image", {}).get("views", {})
        found = []
        if config.connector["type"] != "conv_gate":
            found.append(f"connector.type is {config.connector['type']!r}, mg-llava has 'conv_gate'")
        if set(config.media) != {"image"} or views.get("type") != "low_and_high":
            found.append("media takes more than images cut by 'low_and_high'")
        if list(config.extra_encoders) != [DETAIL]:
            found.append(f"extra_encoders are {list(config.extra_encoders)}, mg-llava has {DETAIL!r}")
        elif config.encoder_config(DETAIL)[0].model_type != "convnext_pyramid":
            found.append(f"extra_encoders.{DETAIL} is no 'convnext_pyramid'")
        if config.language_adapter is not None:
            found.append("language_adapter: mg-llava has none")
        if config.template not in TEMPLATES.values():
            found.append(f"template {config.template!r}: mg-llava has {', '.join(TEMPLATES.values())}")
        return found

    def expresses(self, config: LlavakitConfig) -> bool:
        return not self.objections(config)

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        views, connector = dict(config.media["image"]["views"]), config.connector
        high = config.encoder_config(DETAIL)[0].to_dict()
        names = {ours: theirs for theirs, ours in TEMPLATES.items()}
        size = views.get("size", 768)
        defaults = {**PUBLISHED_BOXES, "frame": size}
        fields = {
            "model_type": "mg_llava",
            "llm": config.text_config.to_dict(),
            "visual_encoder": config.vision_config.to_dict(),
            "visual_encoder_aux": high,
            "visual_select_layer": config.vision_feature_layer,
            "template": names[config.template],
            "image_size": views.get("low_size", 336),
            "image_size_aux": size,
            "pad_image_to_square": views.get("aspect", "pad") == "pad",
            "fuse_variant": VARIANTS.index(connector.get("variant", "add")),
            "box_rules": {key: views.get(option, defaults[key]) for key, option in BOX_RULES.items()},
        }
        if connector.get("levels"):
            fields |= {
                "multi_level": list(connector["levels"]),
                "multi_level_width": connector.get("level_width", 1024),
            }
        return fields

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        rename = rename_with(RENAMES_OUT)
        for name in state:
            new = rename(name)
            if new is not None:
                yield new, state[name]


def _given(tower: str, sources: Mapping[str, Path]) -> Path | None:
    """The folder of an encoder that the user named."""
    return sources.get(f"encoder.{tower}") or (sources.get("encoder") if tower == MAIN_ENCODER else None)


def _template_of(text: Mapping[str, Any]) -> str:
    """The template that a language model was trained with, from its configuration."""
    if text.get("model_type") == "phi3":
        return "phi3_chat"
    by_vocabulary = {LLAMA_3_VOCABULARY: "llama3_chat", YI_VOCABULARY: "qwen_chat"}
    return by_vocabulary.get(text["vocab_size"], "vicuna")


def _pth(folder: Path) -> Path | None:
    """The one .pth of a folder: a file, or a folder that DeepSpeed wrote.

    Raises:
        CheckpointError: If there are several.
    """
    found = sorted(folder.glob("*.pth"))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: holds {found[0].name} and {found[1].name}; leave one state dict in the folder"
        )
    return found[0] if found else None


def read_pth(path: Path) -> LazyState:
    """The tensors of a .pth that mmengine wrote, as a file or as a folder of DeepSpeed's.

    Raises:
        CheckpointError: If it is not readable without running code, or holds no state dict.
    """
    if path.is_dir():
        found = sorted(path.glob("**/mp_rank_*_model_states.pt"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path}: holds {len(found)} files mp_rank_*_model_states.pt, it should hold one; join the parts of a "
                "sharded run with DeepSpeed's zero_to_fp32.py"
            )
        path = found[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable state dict ({type(error).__name__}: {error})") from None
    for key in ("state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = state if isinstance(state, dict) else {}
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        wrong = next((name for name, value in tensors.items() if not isinstance(value, Tensor)), None)
        raise CheckpointError(f"{path}: should hold a state dict, {quoted(wrong)} in it is no tensor")
    return LazyState.of(tensors).renamed(lambda name: name.removeprefix("module."))
