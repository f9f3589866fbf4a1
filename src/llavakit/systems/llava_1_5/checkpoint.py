"""LLaVA-1.5's published files: the authors' layout and transformers' `LlavaForConditionalGeneration`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.files import LazyState, read_folder
from llavakit.checkpoints.layouts import Layout, rename_with
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
EXTRA_ROWS = 64  # the published conversion grows the vocabulary by so many rows: <image>, <pad>, unused


def pinpoints_of(value: Any) -> list[list[int]]:
    """Resolutions (width, height) from a list, or from the text of one."""
    return [list(point) for point in (ast.literal_eval(value) if isinstance(value, str) else value)]


def views_of(raw: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Planner options from `image_aspect_ratio` and its companions."""
    ratio = raw.get("image_aspect_ratio") or "square"
    pinpoints = raw.get("image_grid_pinpoints")
    common = {"size": size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    if ratio == "anyres":
        if not pinpoints:
            raise CheckpointError("config.json: image_aspect_ratio is anyres, and image_grid_pinpoints is missing")
        return {"type": "anyres", "pinpoints": pinpoints_of(pinpoints), **common}
    if ratio not in ("pad", "square"):
        raise CheckpointError(f"config.json: image_aspect_ratio is {quoted(ratio)}; known: pad, square, anyres")
    return {"type": ratio, **common}


class Classic(ClassicLayout):
    """`liuhaotian/llava-v1.5-*` (and the v1.6 files that the same code reads)."""

    system = "llava-1.5"
    model_types = ("llava", "llava_llama", "llava_mistral")

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        plain = str(raw.get("mm_projector_type", "linear"))
        own = plain in ("linear", "identity") or plain.startswith("mlp")
        other = {"sparse_config", "compressor_size"} & set(raw) or "siglip" in str(
            raw.get("mm_vision_tower", "")
        ).lower()
        return super().matches(raw, folder) and own and not other

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        merge = raw.get("mm_patch_merge_type") or "flat"
        template = {"mistral": "mistral_instruct"}.get(self.text_config(raw)["model_type"], "v1")
        views = views_of(raw, encoder["image_size"])
        media = {"image": {"views": views, "arrange": {"type": merge}}}
        return {"media": media, "template": template}

    def drop_unused(self, config: LlavakitConfig, state: LazyState) -> LazyState:
        """Without the newline vector where images are not laid out with it."""
        arrange = config.media["image"]["arrange"]["type"]
        return state.renamed(
            lambda name: None if name == "model.image_newline" and arrange != "spatial_unpad" else name
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        image = config.media["image"]
        planner = image["views"]["type"]
        fields: dict[str, Any] = {
            "image_aspect_ratio": "square" if planner == "square" else planner,
            "mm_patch_merge_type": image.get("arrange", {"type": "flat"})["type"],
        }
        if planner == "anyres":
            fields["image_grid_pinpoints"] = image["views"]["pinpoints"]
        if config.text_config.model_type == "mistral":
            fields |= {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}
        return super().write_config(config) | fields


class Hf(Layout):
    """`llava-hf/llava-1.5-*`: reads old and new key forms, writes the form that transformers and vLLM both read."""

    system = "llava-1.5"
    form = "hf"

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") == "llava" and "text_config" in raw

    def expresses(self, config: LlavakitConfig) -> bool:
        image = config.media.get("image", {})
        plain = image.get("arrange", {"type": "flat"})["type"] == "flat" and image["views"]["type"] in ("pad", "square")
        return (
            plain
            and config.connector["type"] == "mlp"
            and config.connector.get("depth", 2) == 2
            and config.language_adapter is None
            and set(config.media) <= {"image", "multi_image"}
        )

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        from transformers import LlavaConfig, LlavaImageProcessor

        config = LlavaConfig.from_dict(raw)
        size = config.vision_config.image_size
        # the published processor files crop (do_pad false); the training of these weights padded
        pad = True
        for name in ("processor_config.json", "preprocessor_config.json"):
            if (folder / name).is_file():
                options, _ = LlavaImageProcessor.get_image_processor_dict(folder)
                pad = bool(options.get("do_pad", True))
        views = {"type": "pad" if pad else "square", "size": size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
        native = LlavakitConfig(
            text_config=config.text_config,
            vision_config=config.vision_config,
            connector={"type": "mlp", "act": config.projector_hidden_act, "bias": config.multimodal_projector_bias},
            media={"image": {"views": views, "arrange": {"type": "flat"}}},
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_token_id=config.image_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
            template="mistral_instruct" if config.text_config.model_type == "mistral" else "v1",
            system=self.system,
        )
        rules = (
            (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
            (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
        )
        return native, read_folder(folder).renamed(rename_with(rules))

    @staticmethod
    def _grown(config: LlavakitConfig) -> int:
        """Vocabulary of the exported model; room for `<image>` and `<pad>` is made where the model has none."""
        vocabulary = config.text_config.vocab_size
        return vocabulary if config.image_token_id < vocabulary else vocabulary + EXTRA_ROWS

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        from transformers import LlavaConfig

        text = config.text_config.to_dict() | {"vocab_size": self._grown(config)}
        causal = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
        tokens = (576,) if config.vision_config.image_size == 336 else ()
        grid = config.vision_config.image_size // config.vision_config.patch_size
        exported = LlavaConfig(
            text_config=text,
            vision_config=config.vision_config.to_dict(),
            image_token_index=config.image_token_id,
            image_seq_length=tokens[0] if tokens else grid * grid,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            projector_hidden_act=config.connector.get("act", "gelu"),
            multimodal_projector_bias=config.connector.get("bias", True),
            tie_word_embeddings=config.tie_word_embeddings,
        ).to_dict()
        exported["architectures"] = ["LlavaForConditionalGeneration"]
        exported["text_config"]["architectures"] = [causal.get(config.text_config.model_type, "LlamaForCausalLM")]
        return exported

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        rename = rename_with(
            (
                (r"^model\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
                (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
                (r"^model\.language_model\.", "language_model.model."),
                (r"^lm_head\.", "language_model.lm_head."),
            )
        )
        rows = self._grown(config)
        for name in state:
            tensor = state[name]
            if name.endswith(("embed_tokens.weight", "lm_head.weight")) and tensor.shape[0] < rows:
                mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(rows - tensor.shape[0], -1)])
            yield rename(name), tensor

    def write_processor(self, processor: Any, config: LlavakitConfig, folder: Path) -> None:
        from transformers import LlavaImageProcessor, LlavaProcessor

        views = config.media["image"]["views"]
        size = views["size"]
        image_processor = LlavaImageProcessor(
            do_pad=views["type"] == "pad",
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=views.get("image_mean", CLIP_MEAN),
            image_std=views.get("image_std", CLIP_STD),
        )
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1 if config.vision_config.model_type == "clip_vision_model" else 0,
            chat_template=processor.chat_template,
        ).save_pretrained(folder)
