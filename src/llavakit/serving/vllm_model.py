"""llavakit's model inside vLLM: its Transformers back end, told how llavakit cuts images and lays out their tokens.

Decoder, scheduler, paged cache and tensor parallelism are vLLM's. Encoders, connectors and arrangements are
llavakit's own modules. The back end by itself knows images that give views of one shape; here an image is a list of
views of any shapes, and the stretch of prompt that it becomes comes from its plan as ids. Imported by vLLM alone,
through the entry of `vllm_plugin`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargsItems
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageSize, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from llavakit.errors import UserError
from llavakit.model.processing import IMAGE_TOKEN, LlavakitProcessor
from llavakit.serving.vllm_plugin import NATIVE, refuse
from llavakit.views.plan import MediaSize

SHAPES = (1, 2, 3, 4, 6, 8, 12)  # aspect ratios among which the image with the most tokens is looked for
SHORT_SIDES = (336, 672, 1344)


class ProcessingInfo(MultiModalProcessingInfo):
    """What vLLM may ask of a model before it has weights."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images per prompt: one if several would be laid out in another way than each alone, else any number.

        Raises:
            UserError: If vLLM cannot run this model.
        """
        config = self.get_hf_config()
        refuse(config, str(self.ctx.model_config.model))
        media = config.media
        return {"image": None if media.get("multi_image", media["image"]) == media["image"] else 1}

    def get_image_size_with_most_features(self) -> ImageSize:
        """A size whose images take the most positions; which shape that is depends on the planner."""
        sides = [(short, short * ratio) for short in SHORT_SIDES for ratio in SHAPES]
        sizes = [ImageSize(width, height) for a, b in sides for width, height in ((a, b), (b, a))]
        return max(sizes, key=lambda size: (self._get_num_image_tokens(size), -size.width * size.height))

    def _get_num_image_tokens(self, size: ImageSize) -> int:
        """Positions that an image takes, literal separators included."""
        spec = self.get_hf_processor().spec
        return spec.count("image", MediaSize(1, size.height, size.width))


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Images to views and sizes, and placeholders to the ids of their layouts."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor: LlavakitProcessor = self.info.get_hf_processor()
        made = [processor.image_processor.preprocess([image], return_tensors="pt") for image in hf_data["images"]]
        return BatchFeature(
            {
                # a list of views for every image: they may differ in shape
                "pixel_values": [list(image["pixel_values"]) for image in made],
                "visual_sizes": torch.cat([image["visual_sizes"] for image in made]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "visual_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor: LlavakitProcessor = self.info.get_hf_processor()
        token = self.info.get_hf_config().image_token_id

        def replacement(number: int) -> PromptUpdateDetails:
            size = MediaSize(*out_mm_kwargs["image"][number]["visual_sizes"].data.tolist())
            runs = processor.spec.layout("image", size)
            ids = [id_ for run in runs for id_ in ([token] * run.visual + list(run.ids))]
            return PromptUpdateDetails.select_token_id(ids, token)

        return [PromptReplacement("image", [processor.image_token_id], replacement)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder)
class LlavakitForVllm(TransformersMultiModalForCausalLM):
    """`LlavakitModel` with vLLM's attention in its decoder and vLLM's head over it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.modules():
            if isinstance(layer, Attention) and not layer.attn_backend.supports_head_size(layer.head_size):
                known = ", ".join(map(str, layer.attn_backend.get_supported_head_sizes()))
                raise UserError(
                    f"{self.model_config.model}: attention heads have {layer.head_size} channels, vLLM's kernels here "
                    f"take {known}; {NATIVE}"
                )
        self.configure_mm_token_handling(self.text_config.vocab_size, [self.config.image_token_id])

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Text in place of a media item, for chat templates that take plain strings."""
        return IMAGE_TOKEN if modality == "image" else None

    def recursive_replace(self) -> None:
        """Everything but the connectors gets vLLM's layers.

        A connector computes with its own modules: `nn.MultiheadAttention`, for one, reads the weight of its output
        layer itself, which vLLM's layers may keep in another form.
        """
        names = ("multi_modal_projector", *(self.config.extra_connectors or {}))
        connectors = {name: self.model._modules.pop(name) for name in names}
        super().recursive_replace()
        for name, connector in connectors.items():
            self.model.add_module(name, connector)

    def embed_multimodal(
        self, pixel_values: Iterable[Iterable[Tensor]] = (), visual_sizes: Tensor | None = None, **kwargs: Any
    ) -> list[Tensor]:
        """Visual vectors [visual tokens, hidden] of every image.

        Args:
            pixel_values: The views of every image.
            visual_sizes: Original (depth, height, width) of every image [images, 3].
        """
        views = [view for image in pixel_values for view in image]
        if not views:
            return []
        return list(self.model.get_image_features(views, visual_sizes=visual_sizes, return_dict=True).pooler_output)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits, without the placeholder where it lies inside the vocabulary: no reply may ask for an image."""
        logits = super().compute_logits(hidden_states)
        token = self.config.image_token_id
        if logits is not None and token < logits.shape[-1]:
            logits[:, token] = -torch.inf
        return logits
