"""Language models in transformers' layout, without a vision side.

Any causal language model that transformers has a class for is read as the decoder of a llavakit model that takes no
media. Its own chat template is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llavakit.checkpoints.fields import check_known
from llavakit.checkpoints.files import LazyState, read_folder
from llavakit.checkpoints.layouts import Layout
from llavakit.conversation.template import OWN
from llavakit.model.configuration import NO_PLACEHOLDER, LlavakitConfig

DECODER = "model.language_model."
HEAD = "lm_head."


class CausalLayout(Layout):
    """`AutoModelForCausalLM` folders: Llama, Qwen, Mistral, Phi, Gemma, GPT-2 and their like."""

    system = "language model"
    form = "hf"

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        kind = raw.get("model_type")
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "vision_config" in raw:
            return False
        # BERT and its like are encoders unless they say otherwise
        return "is_decoder" not in CONFIG_MAPPING[kind].__dataclass_fields__ or bool(raw.get("is_decoder"))

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        options = dict(raw)
        config = LlavakitConfig(text_config=options, media={}, template=OWN, image_token_id=NO_PLACEHOLDER, system=None)
        check_known(config.text_config, options, "config.json")
        return config, read_folder(folder).renamed(self._inward(config))

    def part_config(self, folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
        return dict(raw)

    def expresses(self, config: LlavakitConfig) -> bool:
        return config.vision_config is None and config.language_adapter is None

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        cls = _published(config.text_config)[0]
        return config.text_config.to_dict() | {"architectures": [cls]}

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        _, prefix, head = _published(config.text_config)
        for name, tensor in state.items():
            if name.startswith(HEAD):
                yield f"{head}.{name.removeprefix(HEAD)}", tensor
            else:
                yield f"{prefix}.{name.removeprefix(DECODER)}", tensor

    @staticmethod
    def _inward(config: LlavakitConfig) -> Any:
        _, prefix, head = _published(config.text_config)

        def rename(name: str) -> str:
            if name.startswith(f"{head}."):
                return HEAD + name.removeprefix(f"{head}.")
            return DECODER + name.removeprefix(f"{prefix}.")  # some files leave the prefix out

        return rename


def _published(text_config: Any) -> tuple[str, str, str]:
    """Class, prefix of the decoder's tensors and name of the head, asked of a one-layer copy without memory."""
    return _ask(type(text_config), str(text_config.model_type))


@functools.cache
def _ask(cls: type, model_type: str) -> tuple[str, str, str]:
    small = CONFIG_MAPPING[model_type](num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return type(model).__name__, model.base_model_prefix, names[id(head)]
