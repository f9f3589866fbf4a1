"""The layout of transformers' `LlavaForConditionalGeneration`, which several systems were converted to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llavakit.checkpoints.preprocessor import OLD_PROCESSOR, PROCESSOR, planner_options, processor_options
from llavakit.checkpoints.prompts import VLLM_TEMPLATE, export_template, export_tokenizer, vllm_template
from llavakit.checkpoints.transformers_layout import TransformersLayout, check_processor, write_strategy
from llavakit.conversation.template import OWN
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.routes import MediaSpec
from llavakit.views.pixels import CLIP_MEAN, CLIP_STD
from llavakit.views.plan import MediaSize
from llavakit.vision.geometry import geometry_of

IMAGES = ("image", "multi_image")


class LlavaClassLayout(TransformersLayout):
    """A folder of `LlavaForConditionalGeneration`, whatever its encoder and decoder.

    Pixels, chat template and tokenizer are those of the folder's files, so prompts and pixels equal `AutoProcessor`'s.
    """

    model_type = "llava"
    class_name = "LlavaForConditionalGeneration"
    known_changes = {
        "media.image.views.grey_background": "transformers pads pictures of one channel with the colour of all others"
    }

    def media(self, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        check_processor(folder, config)
        views = planner_options(folder)
        if views is None and config.vision_config.model_type != "clip_vision_model":
            raise CheckpointError(
                f"{folder}: no {OLD_PROCESSOR} or {PROCESSOR}; pictures could be cut and normalised in any way"
            )
        if views is None:
            views = {
                "type": "pad",
                "size": config.vision_config.image_size,
                "image_mean": list(CLIP_MEAN),
                "image_std": list(CLIP_STD),
            }
        return {"image": {"views": views, "arrange": {"type": "flat"}}, **self.further_media(views)}

    def further_media(self, views: Mapping[str, Any]) -> dict[str, Any]:
        """Modalities beside images that the model takes by its authors' code, laid out like images.

        Args:
            views: Planner of images.
        """
        return {}

    def usual_template(self, folder: Path, config: PreTrainedConfig) -> str:
        return OWN

    def own_objections(self, config: LlavakitConfig) -> list[str]:
        image = config.media.get("image", {"views": {}})
        further = self.further_media(image["views"])
        others = {name: options for name, options in config.media.items() if name not in IMAGES}
        lost = [name for name, options in others.items() if _plain(options) != _plain(further.get(name))]
        found = [f"media.{name}: transformers' class takes images alone" for name in lost]
        image = config.media.get("image")
        if image is None:
            return [*found, "media.image: is missing, transformers' class takes images"]
        if config.media.get("multi_image", image) != image:
            found.append("media.multi_image: transformers treats every image alike")
        arrange = image.get("arrange", {"type": "flat"})
        if arrange["type"] != "flat":
            found.append(f"media.image.arrange.type: is {arrange['type']!r}, transformers' class has 'flat'")
        _, objection = processor_options(image["views"])
        if objection:
            found.append(objection)
        stride, patch = geometry_of(config.vision_config).stride[1], getattr(config.vision_config, "patch_size", None)
        if stride != patch:
            found.append(
                f"vision_config.patch_size: transformers counts a token per {patch} pixels, this encoder gives one per "
                f"{stride}"
            )
        return found

    def own_config(self, config: LlavakitConfig) -> dict[str, Any]:
        return {"image_seq_length": MediaSpec(config).count("image", MediaSize(1, 336, 336))}

    def write_processor(self, processor: Any, config: LlavakitConfig, folder: Path) -> None:
        from transformers import LlavaImageProcessor, LlavaProcessor

        options, _ = processor_options(config.media["image"]["views"])
        made = LlavaProcessor(
            LlavaImageProcessor(**options),
            export_tokenizer(processor.tokenizer, self.rows(config)),
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=write_strategy(config),
            num_additional_image_tokens=geometry_of(config.vision_config).prefix_tokens,
        )
        made.chat_template = export_template(made, processor)
        made.save_pretrained(folder)
        other = vllm_template(made.tokenizer, made.chat_template)
        if other is not None:
            (folder / VLLM_TEMPLATE).write_text(other, encoding="utf-8")


def _plain(options: Mapping[str, Any] | None) -> Any:
    """A modality's options without those that say what is so anyway."""
    arrange = (options or {}).get("arrange", {"type": "flat"})
    return options and [options["views"], {k: v for k, v in arrange.items() if v not in (None, "no_token")}]
