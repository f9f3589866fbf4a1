"""The layout of the classic LLaVA code base, in a variation of which most systems published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from llavakit.checkpoints.adapters import strip_trainable_prefix
from llavakit.checkpoints.encoders import check_same, encoder_options, holds_encoder, read_encoder
from llavakit.checkpoints.fields import Fields, check_known
from llavakit.checkpoints.files import LazyState, read_file, read_folder, read_json
from llavakit.checkpoints.layouts import Layout, Renames, rename_with
from llavakit.checkpoints.text import special_ids, tokenizer_folder
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig
from llavakit.vision.geometry import geometry_of
from llavakit.vision.known import KNOWN_ENCODERS

_LEVEL = "vision_model."
NORM = "model.norm.weight"
SMALL_NORM = 0.02  # mean size; those of trained models are above 1
DIFFERENCE = 0.1  # of the base model's norm


class ClassicLayout(Layout):
    """The classic code base: `model.mm_projector.*`, `model.vision_tower.vision_tower.*`, flat language-model keys.

    Reads full checkpoints, LoRA folders (adapter plus `non_lora_trainables.bin`) and connector-only files.
    Subclasses override `extend_config`, `own_renames` and the class attributes.

    Attributes:
        tower_prefixes: Attribute of each encoder -> what its tensors' names begin with in the files. A level
            `vision_model.` at its end is written, and need not be there when it is read.
    """

    form = "original"
    inert = dict.fromkeys(
        (
            *("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "freeze_mm_vision_resampler", "mm_projector_lr"),
            *("tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "mm_vision_tower_lr", "mm_tunable_parts"),
        ),
        "says how the weights were trained",
    ) | {
        "mm_use_im_patch_token": "adds a row to the vocabulary that no prompt uses",
        "image_crop_resolution": "belongs to image_aspect_ratio crop_split, which is refused",
        "image_split_resolution": "belongs to image_aspect_ratio crop_split, which is refused",
    }
    tower_prefixes: ClassVar[Mapping[str, str]] = {"vision_tower": "model.vision_tower.vision_tower.vision_model."}
    own_tower: ClassVar[str] = "vision_tower"  # names an encoder that was not published on its own, and its folder
    model_types: ClassVar[tuple[str, ...]] = ()
    text_types: ClassVar[dict[str, str]] = {"mistral": "mistral", "qwen": "qwen2"}
    own_renames: ClassVar[Renames] = ()
    own_renames_out: ClassVar[Renames] = ()

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") in self.model_types and "text_config" not in raw and "mm_vision_tower" in raw

    # configuration

    def text_config(self, raw: Mapping[str, Any], *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The language model's part of a flat config.json.

        Args:
            without: Keys that the authors' code overrules.
        """
        from transformers import CONFIG_MAPPING

        hint = f"{raw.get('model_type', '')} {' '.join(raw.get('architectures') or [])}".lower()
        model_type = next((kind for word, kind in self.text_types.items() if word in hint), "llama")
        known = set(CONFIG_MAPPING[model_type].__dataclass_fields__) | {"rope_theta", "rope_scaling"}
        skip = {"model_type", "architectures", "transformers_version", "dtype"}
        given = {key: raw[key] for key in raw if key in known - skip - without}
        return {"model_type": model_type} | {key: value for key, value in given.items() if value is not None}

    def encoder_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> dict[str, Any]:
        """The encoder's configuration: from a given or named local folder, else from the table of known encoders."""
        named = str(raw["mm_vision_tower"])
        for folder in (sources.get("encoder"), Path(named)):
            options = encoder_options(folder) if folder is not None else None
            if options is not None:
                return options
        if named in KNOWN_ENCODERS:
            return dict(KNOWN_ENCODERS[named])
        raise CheckpointError(
            f"config.json: mm_vision_tower {named!r} is neither a local folder nor a known encoder; "
            f"name its folder with --vision-tower; known: {', '.join(KNOWN_ENCODERS)}"
        )

    def connector(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The connector that `mm_projector_type` names."""
        return mlp_options(str(raw.get("mm_projector_type", "linear")))

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        """What a system adds to or changes in the configuration (media, template, adapter, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define extend_config")

    def wraps_images(self, raw: Fields) -> bool:
        """Whether the tokens `IMAGE_MARKS` stand around every image."""
        return bool(raw.one_of("mm_use_im_start_end", False, True))

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        """llavakit's configuration from a classic config.json."""
        raw = raw if isinstance(raw, Fields) else Fields(raw)
        encoder = self.encoder_config(raw, sources)
        text = self.text_config(raw)
        raw.one_of("use_mm_proj", True)
        feature = raw.one_of("mm_vision_select_feature", "patch", "cls_patch")
        fields: dict[str, Any] = {
            "text_config": text,
            "vision_config": encoder,
            "connector": self.connector(raw),
            "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": "full" if feature == "cls_patch" else "default",
            "image_token_id": text.get("vocab_size", 32000),
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
            "system": self.system,
            "bos_token_id": raw.get("bos_token_id"),
            "eos_token_id": raw.get("eos_token_id"),
            "pad_token_id": raw.get("pad_token_id"),
        }
        fields |= self.extend_config(raw, encoder)
        if self.wraps_images(raw):
            image = fields["media"]["image"]
            image["arrange"] = wrapped(image.get("arrange"), sources.get("folder"), sources.get("base"))
        config = LlavakitConfig(**fields)
        check_known(config.vision_config, encoder, f"configuration of the encoder {quoted(raw.get('mm_vision_tower'))}")
        self._check_width(config, raw.get("mm_hidden_size"))
        return config

    @staticmethod
    def _check_width(config: LlavakitConfig, announced: Any) -> None:
        """Refuse a file that announces features of another width than its encoder has."""
        width = _feature_width(config)
        if announced is not None and announced != width:
            raise CheckpointError(
                f"config.json: mm_hidden_size is {quoted(announced)}, the encoder's features have {width}"
            )

    # tensors

    def renames_in(self) -> Renames:
        """Published names to llavakit's."""
        return (
            *self.own_renames,
            *(
                (rf"^{re.escape(prefix.removesuffix(_LEVEL))}(?:vision_model\.)?", f"model.{name}.")
                for name, prefix in self.tower_prefixes.items()
            ),
            (r"^model\.mm_projector\.(weight|bias)$", r"model.multi_modal_projector.linear_1.\1"),
            *((rf"^model\.mm_projector\.{2 * n}\.", f"model.multi_modal_projector.linear_{n + 1}.") for n in range(6)),
            (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
        )

    def renames_out(self, config: LlavakitConfig) -> Renames:
        """llavakit's names to the published ones."""
        single = config.connector.get("depth", 2) == 1
        return (
            *self.own_renames_out,
            *((rf"^model\.{name}\.(?:vision_model\.)?", prefix) for name, prefix in self.tower_prefixes.items()),
            *(((r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector."),) if single else ()),
            *((rf"^model\.multi_modal_projector\.linear_{n + 1}\.", f"model.mm_projector.{2 * n}.") for n in range(6)),
            (r"^model\.language_model\.", "model."),
        )

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        if raw.get("mm_vision_tower") == self.own_tower and (folder / self.own_tower / "config.json").is_file():
            sources = {"encoder": folder / self.own_tower, **sources}
        config = self.read_config(raw, {"folder": folder, **sources})
        if (folder / "adapter_config.json").is_file():
            state = self._read_lora(folder, sources)
        elif (trained := self.trained_only(folder)) is not None:
            state = read_folder(self._base(folder, sources, raw.get("_name_or_path"))).joined(trained)
        else:
            state = whole_model(folder, read_folder(folder), sources.get("base"))
        state = state.renamed(rename_with(self.renames_in()))
        return config, self.drop_unused(config, self._with_encoder(state, folder, raw, sources))

    def trained_only(self, folder: Path) -> LazyState | None:
        """The tensors of a folder that holds what was trained and no language model; None for other folders."""
        if not any((folder / f"mm_projector.{suffix}").is_file() for suffix in ("bin", "safetensors")):
            return None
        return read_folder(folder, "mm_projector").renamed(strip_trainable_prefix)

    def _with_encoder(
        self, state: LazyState, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> LazyState:
        """The tensors with those of the encoders: the files' own, or those of the folder that was given."""
        for tower in self.tower_prefixes:
            own = f"model.{tower}."
            stored = any(name.startswith(own) for name in state)
            given = self.given_folder(tower, sources)
            if not stored or ("exchange" in sources and given is not None):
                rest = state.renamed(lambda name, own=own: None if name.startswith(own) else name)
                state = rest.joined(self._read_tower(tower, raw, sources))
            elif given is not None and given.parent != folder and holds_encoder(given):
                check_same(state, self._read_tower(tower, raw, sources), folder)
        return state

    def given_folder(self, tower: str, sources: Mapping[str, Path]) -> Path | None:
        """The folder that the user names for an encoder; layouts with several say which of them it is for.

        Args:
            tower: Attribute of the encoder.
        """
        return sources.get("encoder")

    def tower_folder(self, tower: str, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> Path:
        """Where the files of an encoder are that the checkpoint does not hold; layouts with several override it.

        Args:
            tower: Attribute of the encoder.
        """
        return self.given_folder(tower, sources) or Path(str(raw["mm_vision_tower"]))

    def read_own(self, folder: Path, raw: Mapping[str, Any]) -> LazyState:
        if (folder / "adapter_config.json").is_file():
            state = self._trained(folder)
        else:
            trained = self.trained_only(folder)
            state = read_folder(folder) if trained is None else trained
        return state.renamed(rename_with(self.renames_in()))

    def part_config(self, folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
        return self.text_config(raw) if name == "text_config" else self.encoder_config(raw, {})

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        """Tensors that the original never used and llavakit does not build."""
        return state

    def _read_tower(self, tower: str, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LazyState:
        folder = self.tower_folder(tower, raw, sources)
        if not folder.is_dir():
            raise CheckpointError(
                f"the checkpoint holds no vision encoder and {folder} is not a local folder; "
                "name the encoder's folder with --vision-tower"
            )
        return read_encoder(folder).renamed(lambda name: f"model.{tower}.{name}")

    @staticmethod
    def _base(folder: Path, sources: Mapping[str, Path], named: str | None) -> Path:
        base = sources.get("base") or (Path(named) if named else None)
        if base is None or not base.is_dir():
            raise CheckpointError(
                f"{folder}: holds only trained parts; name the folder of the language model with --base "
                f"(the checkpoint names {named!r}, which is not a local folder)"
            )
        return base

    def _read_lora(self, folder: Path, sources: Mapping[str, Path]) -> LazyState:
        """The language model and what was trained in full; the adapter is merged by who opens the folder."""
        adapter = read_json(folder / "adapter_config.json")
        state = read_folder(self._base(folder, sources, adapter.get("base_model_name_or_path")))
        return state.joined(self._trained(folder))

    @staticmethod
    def _trained(folder: Path) -> LazyState:
        """What a LoRA folder holds beside its adapter."""
        extra = folder / "non_lora_trainables.bin"
        if not extra.is_file():
            raise CheckpointError(f"{extra}: missing; a LoRA folder holds the connector there")
        return read_file(extra).renamed(strip_trainable_prefix)

    # writing

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        rename = rename_with(self.renames_out(config))
        for name in state:
            new = rename(name)
            if new is not None:
                yield new, state[name]

    def write_parts(self, config: LlavakitConfig, folder: Path) -> None:
        """An encoder without a published name is described in a folder beside, which `read` looks for."""
        if self.write_config(config).get("mm_vision_tower") == self.own_tower:
            (folder / self.own_tower).mkdir()
            text = json.dumps(self.own_encoder(config), indent=2, default=str)
            (folder / self.own_tower / "config.json").write_text(text + "\n", encoding="utf-8")

    def own_encoder(self, config: LlavakitConfig) -> dict[str, Any]:
        """config.json of an encoder that was not published on its own, as `encoder_config` reads it."""
        return config.vision_config.to_dict()

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        text = config.text_config.to_dict()
        depth = config.connector.get("depth", 2)
        names = {size.get("image_size"): name for name, size in KNOWN_ENCODERS.items() if _same_tower(size, config)}
        fields = {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": self.model_types[0],
            "mm_hidden_size": _feature_width(config),
            "mm_projector_type": "linear" if depth == 1 else f"mlp{depth}x_gelu",
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_vision_select_feature": "cls_patch" if config.vision_feature_select_strategy == "full" else "patch",
            "mm_vision_tower": names.get(getattr(config.vision_config, "image_size", None), self.own_tower),
            "mm_use_im_start_end": config.media.get("image", {}).get("arrange", {}).get("type") == "wrapped",
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
        }
        return {key: value for key, value in text.items() if key not in ("model_type", "_name_or_path")} | fields


def whole_model(folder: Path, state: LazyState, base: Path | None) -> LazyState:
    """The tensors of a folder that holds a whole model, as weights or as differences to those of a base model.

    Differences (`*-delta-*` on the hub) are known by their last norm, which training hardly changes.

    Raises:
        CheckpointError: If a base is given for weights, or differences come without one.
    """
    if NORM not in state:
        return state
    size = state[NORM].float().abs().mean()
    if base is None:
        if size < SMALL_NORM:
            raise CheckpointError(
                f"{folder}: holds weight differences ({NORM} is nearly zero); name the base model with --base"
            )
        return state
    below = read_folder(base)
    if NORM in below and size < DIFFERENCE * below[NORM].float().abs().mean():
        return state.added(below, overlapping=grows)
    if tokenizer_folder(folder) is not None:
        raise CheckpointError(
            f"{folder}: holds a whole model, so --base would be ignored; it is for adapters, connectors alone and "
            "weight differences"
        )
    return state  # the base gives the tokenizer


def grows(name: str) -> bool:
    """Whether a tensor has a row for every token, and so more rows than the base model's where tokens were added."""
    return name in ("model.embed_tokens.weight", "lm_head.weight")


IMAGE_MARKS = ("<im_start>", "<im_end>")


def wrapped(
    inner: Mapping[str, Any] | None, *folders: Path | None, marks: tuple[str, str] = IMAGE_MARKS
) -> dict[str, Any]:
    """The arrangement of a checkpoint whose media stand between two tokens of its tokenizer.

    Args:
        folders: Where the tokenizer's files may be.
        marks: The two tokens.

    Raises:
        CheckpointError: If they do not hold the two tokens.
    """
    known = special_ids(next((folder for folder in folders if tokenizer_folder(folder)), Path()))
    absent = next((mark for mark in marks if mark not in known), None)
    if absent is not None:
        raise CheckpointError(
            f"config.json: mm_use_im_start_end is true, and the tokenizer's files hold no token {absent!r}"
        )
    before, after = ([known[mark]] for mark in marks)
    return {"type": "wrapped", "before": before, "after": after, "inner": dict(inner or {"type": "flat"})}


def unwrapped(arrange: Mapping[str, Any] | None) -> dict[str, Any]:
    """An arrangement without tokens around it."""
    arrange = dict(arrange or {"type": "flat"})
    return dict(arrange.get("inner") or {"type": "flat"}) if arrange["type"] == "wrapped" else arrange


def _feature_width(config: LlavakitConfig) -> int:
    """Channels of the features that the connector reads."""
    layers = config.vision_feature_layer
    count = len(layers) if isinstance(layers, (list, tuple)) else 1
    return geometry_of(config.vision_config).width * count


def _same_tower(known: Mapping[str, Any], config: LlavakitConfig) -> bool:
    own = config.vision_config.to_dict()
    return all(own.get(key) == value for key, value in known.items())


def mlp_options(name: str) -> dict[str, Any]:
    """Options of the `mlp` connector from the classic names `linear`, `mlpNx_gelu`, `identity`.

    Raises:
        CheckpointError: If the name is another.
    """
    if name == "linear":
        return {"type": "mlp", "depth": 1}
    if name == "identity":
        return {"type": "mlp", "depth": 0}
    found = re.fullmatch(r"mlp(\d+)x_gelu", name)
    if not found:
        raise CheckpointError(
            f"config.json: mm_projector_type {name!r} is unknown; known: linear, mlpNx_gelu, identity"
        )
    return {"type": "mlp", "depth": int(found[1])}
