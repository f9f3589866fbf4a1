"""Base of the layouts of transformers' own vision-language classes (LLaVA, LLaVA-OneVision).

    vision_tower.*              (CLIP and SigLIP one level deeper: vision_tower.vision_model.*)
    multi_modal_projector.linear_1.*, linear_2.*
    language_model.model.*, language_model.lm_head.*

Newer files without these levels (`model.vision_tower.*`, `lm_head.*`) are read too; the older names are written,
because transformers and vLLM both read them. A layout names its class and brings what is its own: media, processor.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from llavakit.checkpoints.fields import Fields, check_known
from llavakit.checkpoints.files import LazyState, read_folder, read_json
from llavakit.checkpoints.layouts import Layout, Renames, rename_with
from llavakit.checkpoints.preprocessor import PROCESSOR
from llavakit.checkpoints.prompts import made_up, same_inputs
from llavakit.checkpoints.text import has_chat_template
from llavakit.conversation.template import OWN
from llavakit.errors import CheckpointError
from llavakit.language.head import head_has_bias, scale_and_cap
from llavakit.model.configuration import LlavakitConfig
from llavakit.vision.geometry import geometry_of

ROWS = 64  # a grown vocabulary is a multiple of this
_WRAPPED = ("clip_vision_model", "siglip_vision_model")  # encoders with a level `vision_model` in their files
_CAUSAL = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


PROCESSOR_INERT = {
    **dict.fromkeys(("image_processor", "tokenizer", "chat_template"), "is read where pictures and texts are"),
    **dict.fromkeys(
        ("processor_class", "image_token", "image_seq_length"), "names what transformers' class does anyway"
    ),
}


class TransformersLayout(Layout):
    """A folder of one of transformers' vision-language classes.

    Attributes:
        model_type: Of its config.json.
        class_name: transformers' class.
        config_keys: Keys of config.json that its configuration class reads and llavakit uses.
        own_tensors: Names of tensors beside encoder, connector and decoder.
        placeholders: Number of special tokens that stand for media.
    """

    form = "hf"
    model_type: ClassVar[str]
    class_name: ClassVar[str]
    config_keys: ClassVar[tuple[str, ...]] = (
        *("text_config", "vision_config", "image_token_index", "image_token_id", "projector_hidden_act"),
        *("multimodal_projector_bias", "vision_feature_layer", "vision_feature_select_strategy"),
        *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    inert = {
        "image_seq_length": "follows from encoder and processor",
        "hidden_size": "is that of the language model",
        "vocab_size": "is that of the language model",
    }
    own_tensors: ClassVar[tuple[str, ...]] = ()
    placeholders: ClassVar[int] = 1

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") == self.model_type and ("text_config" in raw or "vision_config" in raw)

    # what a layout adds

    @abstractmethod
    def media(self, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        """`config.media` of a folder."""

    @abstractmethod
    def own_objections(self, config: LlavakitConfig) -> list[str]:
        """Options of a model that transformers' class does not have, each with what it would have to be."""

    @abstractmethod
    def own_config(self, config: LlavakitConfig) -> dict[str, Any]:
        """Keys of config.json beside those that all layouts share."""

    def template(self, folder: Path, config: PreTrainedConfig) -> str:
        """The template of a folder that brings a chat template of its own: that one."""
        if has_chat_template(folder):
            return OWN
        return self.usual_template(folder, config)

    @abstractmethod
    def usual_template(self, folder: Path, config: PreTrainedConfig) -> str:
        """The template of the published models, for folders without a chat template."""

    def prompts(
        self, processor: Any, config: LlavakitConfig, folder: Path
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Inputs on which logits are compared: for llavakit's model and, the same, for transformers' class.

        With a processor both sides prepare pictures and prompts themselves, from `folder`, and are compared here.

        Raises:
            CheckpointError: If the two processors differ.
        """
        from transformers import AutoProcessor

        if processor is None:
            return [made_up(config)]

        return same_inputs(processor, AutoProcessor.from_pretrained(folder))

    # reading

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        given = {key: raw[key] for key in self.config_keys if key in raw}
        config = CONFIG_MAPPING[self.model_type](**given)
        for part in ("text_config", "vision_config"):
            if given.get(part):
                check_known(getattr(config, part), given[part], f"config.json: {part}")
        state = read_folder(folder).renamed(rename_with(self.renames_in()))
        native = LlavakitConfig(
            text_config=config.text_config,
            vision_config=config.vision_config,
            connector={"type": "mlp", "act": config.projector_hidden_act, "bias": config.multimodal_projector_bias},
            media=self.media(folder, config),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=_read_strategy(config),
            image_token_id=config.image_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
            template=self.template(folder, config),
            system=self.system,
            **{key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw},
            **self.extras(config),
        )
        return native, state

    def extras(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Further fields of llavakit's configuration."""
        return {}

    def part_config(self, folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
        config = CONFIG_MAPPING[self.model_type](**{key: raw[key] for key in self.config_keys if key in raw})
        return getattr(config, name).to_dict()

    def renames_in(self) -> Renames:
        """transformers' names, old and new, to llavakit's."""
        return (
            (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
            (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
            *((rf"^(?:model\.)?{name}$", f"model.{name}") for name in self.own_tensors),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
        )

    # writing

    def objections(self, config: LlavakitConfig) -> list[str]:
        """Why a model cannot be written for transformers' class; empty if it can."""
        found = self.own_objections(config)
        connector = config.connector
        if connector["type"] != "mlp":
            found.append(f"connector.type: is {connector['type']!r}, transformers' class has 'mlp'")
        elif connector.get("depth", 2) != 2:
            found.append(f"connector.depth: is {connector['depth']}, transformers' class has 2 layers")
        for name in ("extra_encoders", "extra_connectors", "language_adapter"):
            if getattr(config, name):
                found.append(f"{name}: transformers' class has none")
        if config.vision_config is None:
            return [*found, "vision_config: is missing, transformers' class has an encoder"]
        strategy = config.vision_feature_select_strategy
        if strategy == "default" and geometry_of(config.vision_config).prefix_tokens > 1:
            found.append("vision_feature_select_strategy: transformers drops one token, this encoder has several")
        if head_has_bias(config.text_config):
            found.append(
                f"text_config.model_type: the head of {config.text_config.model_type!r} has a bias, "
                "that of transformers' class has none"
            )
        if scale_and_cap(config.text_config) != (1.0, None):
            found.append(
                f"text_config.model_type: {config.text_config.model_type!r} scales or caps its logits, "
                "transformers' class does neither"
            )
        return found

    def rows(self, config: LlavakitConfig) -> int:
        """Vocabulary of the exported model, grown where the placeholders have no row."""
        vocabulary = config.text_config.vocab_size
        if config.image_token_id + self.placeholders <= vocabulary:
            return vocabulary
        # one more for a padding token
        return -(-(config.image_token_id + self.placeholders + 1) // ROWS) * ROWS

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        text = config.text_config.to_dict() | {"vocab_size": self.rows(config)}
        exported = CONFIG_MAPPING[self.model_type](
            text_config=text,
            vision_config=config.vision_config.to_dict(),
            image_token_index=config.image_token_id,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=write_strategy(config),
            projector_hidden_act=config.connector.get("act", "gelu"),
            multimodal_projector_bias=config.connector.get("bias", True),
            tie_word_embeddings=config.tie_word_embeddings,
            **self.own_config(config),
        ).to_dict()
        exported["architectures"] = [self.class_name]
        kind = config.text_config.model_type
        if kind in _CAUSAL:  # vLLM asks for it
            exported["text_config"]["architectures"] = [_CAUSAL[kind]]
        ends = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return exported | {key: value for key, value in ends.items() if value is not None}

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        wrapped = config.vision_config.model_type in _WRAPPED
        rename = rename_with(
            (
                (r"^model\.vision_tower\.(?:vision_model\.)?", f"vision_tower.{'vision_model.' * wrapped}"),
                (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
                *((rf"^model\.{name}$", name) for name in self.own_tensors),
                (r"^model\.language_model\.", "language_model.model."),
                (r"^lm_head\.", "language_model.lm_head."),
            )
        )
        rows = self.rows(config)
        for name in state:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            tensor = state[name]
            if name.endswith(("embed_tokens.weight", "lm_head.weight", ".wte.weight")) and tensor.shape[0] < rows:
                mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(rows - tensor.shape[0], -1)])
            yield rename(name), tensor


def _read_strategy(config: PreTrainedConfig) -> str:
    """transformers' "default" drops one token; that is llavakit's "default" for encoders with one class token."""
    strategy = config.vision_feature_select_strategy
    if strategy == "default" and geometry_of(config.vision_config).prefix_tokens != 1:
        return "drop_first"
    return strategy


def write_strategy(config: LlavakitConfig) -> str:
    """transformers' name for which tokens are kept; an encoder without a class token keeps all."""
    strategy = config.vision_feature_select_strategy
    if strategy == "drop_first":
        return "default"
    return strategy if geometry_of(config.vision_config).prefix_tokens else "full"


def check_processor(folder: Path, config: PreTrainedConfig, inert: Mapping[str, str] = PROCESSOR_INERT) -> None:
    """Refuse a processor_config.json with unknown keys, or with other image tokens than the model's encoder gives.

    Raises:
        CheckpointError: It names the option.
    """
    if not (folder / PROCESSOR).is_file():
        return
    fields = Fields(read_json(folder / PROCESSOR), str(folder / PROCESSOR))
    fields.one_of("image_token", "<image>")
    patch = fields.one_of("patch_size", None, getattr(config.vision_config, "patch_size", None))
    strategy = fields.one_of("vision_feature_select_strategy", None, config.vision_feature_select_strategy)
    extra = fields.get("num_additional_image_tokens")
    if patch and strategy and extra is not None and extra != geometry_of(config.vision_config).prefix_tokens:
        raise CheckpointError(
            f"{fields.where}: num_additional_image_tokens is {extra!r}, "
            f"the encoder has {geometry_of(config.vision_config).prefix_tokens}"
        )
    fields.finish(inert)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as transformers writes it."""
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
