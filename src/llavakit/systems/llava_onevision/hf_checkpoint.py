"""LLaVA-OneVision as transformers' `LlavaOnevisionForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedConfig

from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import read_json
from llavakit.checkpoints.preprocessor import IMAGE_INERT, TOLERANCE, image_options
from llavakit.checkpoints.prompts import REFUSED, conversations, encoded, export_tokenizer
from llavakit.checkpoints.text import chat_template_of
from llavakit.checkpoints.transformers_layout import (
    PROCESSOR_INERT,
    TransformersLayout,
    check_processor,
    write_json,
)
from llavakit.conversation.messages import normalise
from llavakit.conversation.template import OWN, template_for
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.routes import MediaSpec
from llavakit.systems.llava_onevision.checkpoint import SAMPLING, media_of, settings_of
from llavakit.views.plan import MediaSize


class OnevisionTransformersLayout(TransformersLayout):
    """`llava-hf/llava-onevision-*`: reads old and new key forms, writes the form that transformers and vLLM read.

    transformers unpads with its own rounding, so models read from there get `rounding: hf`, and give the same token
    counts as transformers.
    """

    system = "llava-onevision"
    model_type = "llava_onevision"
    class_name = "LlavaOnevisionForConditionalGeneration"
    config_keys = (
        *TransformersLayout.config_keys,
        *("video_token_index", "video_token_id", "image_grid_pinpoints", "vision_aspect_ratio"),
    )
    inert = TransformersLayout.inert | {
        "use_image_newline_parameter": "the class has the newline whatever it says",
    }
    known_changes = {
        "media.image.arrange.rounding": "transformers unpads with a rounding of its own, so a few sizes (about 3 of "
        "100,000) get other token counts",
    }
    own_tensors = ("image_newline",)
    placeholders = 2
    vllm_assumes = {"vision_aspect_ratio": "anyres_max_9"}

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        return raw.get("model_type") == self.model_type

    def media(self, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        check_processor(folder, config, inert=PROCESSOR_INERT | _OWN_PROCESSOR)
        settings = {
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": config.vision_aspect_ratio,
            "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
        }
        media = media_of(settings, config.vision_config.image_size, rounding="hf")
        _cut_like(folder, config, media)
        return media

    def template(self, folder: Path, config: PreTrainedConfig) -> str:
        return "qwen_1_5" if chat_template_of(folder) == _chat_template() else super().template(folder, config)

    def usual_template(self, folder: Path, config: PreTrainedConfig) -> str:
        return "qwen_1_5"

    def extras(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"extras": {"processor": {"sampling": dict(SAMPLING)}}}

    def own_objections(self, config: LlavakitConfig) -> list[str]:
        settings = settings_of(config.media)
        if settings is None:
            return ["media: transformers' class has the published settings of images, several images and videos alone"]
        multi = config.media["multi_image"]
        wanted = {
            "media.image.arrange": settings["mm_patch_merge_type"] == "spatial_unpad",
            "media.image.views": settings["image_aspect_ratio"].startswith("anyres_max_"),
            "media.video.arrange.pool": settings["mm_spatial_pool_mode"] == "bilinear",
            "media.video.arrange.newline": "mm_newline_position" not in settings,
            "media.multi_image.arrange.single_newline": multi.get("arrange", {}).get("single_newline", True),
            "template": config.template in ("qwen_1_5", OWN),
        }
        return [f"{name}: transformers' class has another" for name, fits in wanted.items() if not fits]

    def own_config(self, config: LlavakitConfig) -> dict[str, Any]:
        settings = settings_of(config.media)
        return {
            "video_token_index": config.image_token_id + 1,
            "image_grid_pinpoints": [[height, width] for width, height in settings["image_grid_pinpoints"]],
            "vision_aspect_ratio": settings["image_aspect_ratio"],
        }

    def write_processor(self, processor: Any, config: LlavakitConfig, folder: Path) -> None:
        """Tokenizer with `<image>` and `<video>`, and `processor_config.json`.

        The file is written by hand: transformers cannot build its video processor without torchvision.
        """
        rows = self.rows(config)
        tokenizer = export_tokenizer(processor.tokenizer, rows, specials=("<video>",))
        tokenizer.save_pretrained(folder)
        raw = read_json(folder / "config.json")
        raw["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
        if raw["video_token_index"] >= rows:
            raise CheckpointError(
                f"{folder}: the token <video> has no row in the embedding; give it the id after <image>"
            )
        write_json(folder / "config.json", raw)
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
            "vision_feature_select_strategy": raw["vision_feature_select_strategy"],
            "image_processor": {
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "do_pad": True,
                "image_grid_pinpoints": raw["image_grid_pinpoints"],
                **pixels,
            },
            "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", **pixels},
        }
        write_json(folder / "processor_config.json", own)
        template = _chat_template() if processor.template == "qwen_1_5" else processor.chat_template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def prompts(
        self, processor: Any, config: LlavakitConfig, folder: Path
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Pixels by transformers' image processor and texts by the written template, compared with llavakit's.

        The processor as a whole needs torchvision.
        """
        if processor is None:
            return [self._as_theirs(sample, config) for sample in [_made_up(config)]]
        images, tokenizer = AutoImageProcessor.from_pretrained(folder, backend="pil"), processor.tokenizer
        template, own, pairs = chat_template_of(folder), template_for(processor.template, tokenizer), []
        for messages in conversations():
            sample = encoded(processor, messages)
            if sample is None:
                continue
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
            wanted, _ = own.render(normalise(messages), add_generation_prompt=True)
            if text != wanted:
                raise CheckpointError(f"{REFUSED} template: transformers' processor writes another prompt")
            pictures = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
            if pictures:
                views = images([pictures], return_tensors="pt")["pixel_values"].flatten(0, 1)
                views = views[: len(sample["pixel_values"])]
                mine = torch.stack(sample["pixel_values"])
                if views.shape != mine.shape or (views - mine).abs().max() > TOLERANCE:
                    raise CheckpointError(f"{REFUSED} transformers' processor gives other pixels for the same picture")
            pairs.append(self._as_theirs(sample, config))
        return pairs

    @staticmethod
    def _as_theirs(sample: Mapping[str, Any], config: LlavakitConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs of both models from a sample: transformers pads views of an image and wants (height, width)."""
        ids = torch.tensor([list(sample["input_ids"])])
        shared = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not len(sample["pixel_values"]):
            return shared, shared
        views, sizes = torch.stack(list(sample["pixel_values"])), torch.tensor(sample["visual_sizes"])
        several = len(sizes) > 1
        ours = {
            "pixel_values": views,
            "visual_sizes": sizes,
            "visual_modalities": torch.tensor(sample["visual_modalities"]),
        }
        theirs = {
            "pixel_values": views[:, None] if several else views[None],
            "image_sizes": sizes[:, 1:],
            "batch_num_images": torch.tensor([len(sizes)]),
        }
        return shared | ours, shared | theirs


_OWN_PROCESSOR = {
    "video_processor": "videos are cut like single images, which the published files say too",
    "video_token": "names what transformers' class does anyway",
    "num_image_tokens": "follows from the encoder",
    "vision_aspect_ratio": "is read from config.json, as transformers' class does",
}


def _chat_template() -> str:
    return Path(__file__).with_name("hf_chat_template.jinja").read_text(encoding="utf-8")


def _made_up(config: LlavakitConfig) -> dict[str, Any]:
    """A sample with a picture of noise, for models without a tokenizer."""
    spec, size = MediaSpec(config), MediaSize(1, 61, 97)
    views = spec.plan("image", size).views
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": [1, 2, *[config.image_token_id] * spec.count("image", size), 0, 3],
        "pixel_values": [torch.randn(3, view.height, view.width, generator=generator) for view in views],
        "visual_sizes": [size],
        "visual_modalities": [0],
    }


def _cut_like(folder: Path, config: PreTrainedConfig, media: Mapping[str, Any]) -> None:
    """Mean and deviation of the files' own preprocessor, where they bring one; what else it says is checked.

    Raises:
        CheckpointError: If the preprocessor does what no planner does.
    """
    found = image_options(folder)
    if found is None:
        return
    options, path = found
    fields, side = Fields(options, str(path)), config.vision_config.image_size
    for name in ("do_resize", "do_rescale", "do_normalize"):
        fields.one_of(name, True)
    fields.one_of("size", {"height": side, "width": side})
    fields.one_of("resample", 3)
    fields.one_of("rescale_factor", 1 / 255)
    fields.one_of("image_grid_pinpoints", [list(point) for point in config.image_grid_pinpoints])
    values = {key: fields[key] for key in ("image_mean", "image_std") if fields.get(key)}
    fields.finish(IMAGE_INERT | {"do_pad": "pads views of a batch, which llavakit never needs"})
    for section in media.values():
        views = section["views"].get("frame", section["views"])
        views |= values
