"""The processor: messages in, expanded ids and views out.

It owns everything that turns files into model inputs (planners, sampling of frames, template, tokenizer) and is
saved with the checkpoint. There are two entry points: `encode` takes messages and is what training, chat and serving
use; `__call__` is transformers' interface (text with `<image>` and a list of images).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images, to_numpy_array
from transformers.processing_utils import ImagesKwargs, MultiModalData

from llavakit import media as readers
from llavakit.conversation.encode import IMAGE_PLACEHOLDER, chat_template_for, encode
from llavakit.conversation.messages import media_of, normalise
from llavakit.conversation.timing import with_time_instruction
from llavakit.errors import MediaError, UserError, quoted
from llavakit.media.frame_sampling import counted_times, read_span
from llavakit.media.regions import Region
from llavakit.model.configuration import NO_PLACEHOLDER, LlavakitConfig
from llavakit.model.routes import MODALITIES, MediaSpec
from llavakit.registry import nearest
from llavakit.splice.scatter import expand
from llavakit.views.plan import MediaSize

IMAGE_TOKEN = "<image>"
TIMINGS = ("timestamps", "counted")


def architecture_of(config: LlavakitConfig) -> dict[str, Any]:
    """The part of a configuration that decides sizes, plans and token counts."""
    return {
        "vision_config": config.vision_config.to_dict() if config.vision_config is not None else None,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "connector": config.connector,
        "media": config.media,
        "extra_encoders": config.extra_encoders,
        "extra_connectors": config.extra_connectors,
    }


class LlavakitImagesKwargs(ImagesKwargs, total=False):
    """Options of one call beside transformers' own; see `LlavakitImageProcessorPil.preprocess`."""

    modality: str
    modalities: list[str]


class LlavakitImageProcessorPil(BaseImageProcessor):
    """Images to views by the planner of the configuration; the image half of `LlavakitProcessor`.

    Args:
        architecture: See `architecture_of`.
    """

    model_input_names = ["pixel_values", "visual_sizes", "visual_modalities"]
    valid_kwargs = LlavakitImagesKwargs

    def __init__(self, architecture: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architecture = dict(architecture or {})
        self._spec: MediaSpec | None = None

    @property
    def spec(self) -> MediaSpec:
        """Plans and layouts; built on first use."""
        if self._spec is None:
            self._spec = MediaSpec(LlavakitConfig(**self.architecture))
        return self._spec

    @property
    def takes_media(self) -> bool:
        """Whether the model has a vision side."""
        return self.architecture.get("media") != {}

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if not key.startswith("_spec")}

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        modality: str = "image",
        modalities: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Views of every image.

        Args:
            modality: Of all images: "image", or "multi_image" for images among several of one prompt.
            modalities: Of each image, instead.

        Returns:
            `pixel_values`: views of all images, stacked if they share a shape, else a list;
            `visual_sizes`: original (depth, height, width) of every image [images, 3];
            `visual_modalities`: kind of every image [images].
        """
        views: list[np.ndarray] = []
        sizes: list[MediaSize] = []
        images = make_flat_list_of_images(images)
        modalities = [modality] * len(images) if modalities is None else modalities
        for image, own in zip(images, modalities, strict=True):
            image = readers.load_image(_as_pil(image))
            size = MediaSize(1, image.height, image.width)
            plan = self.spec.plan(own, size)
            views += self.spec.route(own).planner.cut(image, plan)
            sizes.append(size)
        kinds = np.array([MODALITIES.index(own) for own in modalities])
        data = {"visual_sizes": np.array(sizes), "visual_modalities": kinds}
        stacked = len({view.shape for view in views}) <= 1
        if stacked:
            return BatchFeature({"pixel_values": np.stack(views), **data}, tensor_type=return_tensors)
        features = BatchFeature(data, tensor_type=return_tensors)
        features["pixel_values"] = [torch.from_numpy(view) for view in views] if return_tensors == "pt" else views
        return features


def _as_pil(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, (np.ndarray, torch.Tensor)):
        array = to_numpy_array(image)
        if array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
            array = array.transpose(1, 2, 0)
        if array.dtype != np.uint8:
            array = (array * 255).round() if array.max() <= 1.0 else array
        return Image.fromarray(array.astype(np.uint8).repeat(3 if array.shape[-1] == 1 else 1, axis=-1))
    return image


def _source_of(part: Mapping[str, Any]) -> Any:
    """What a media part names.

    Raises:
        MediaError: If it names nothing.
    """
    modality = part["type"]
    if part.get(modality) is None:
        example = f'{{"type": "{modality}", "{modality}": ...}}'
        raise MediaError(f"a part of type {modality} names no {modality}; write {example} with a path, URL or content")
    return part[modality]


def check_reading(reading: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Options of the media readers, as they are.

    Raises:
        UserError: If a modality or an option is unknown.
    """
    if not reading:
        return None
    from llavakit.media import video as read_video
    from llavakit.media import volume as read_volume

    known = {"image": readers.load_image, "video": read_video.load_video, "volume": read_volume.load_volume}
    for modality, options in reading.items():
        if modality not in known:
            raise UserError(f"reading.{modality}: unknown modality{nearest(modality, list(known))}")
        own = ("source", "sampling", "keep_integers", "span")  # the processor's business
        names = [name for name in inspect.signature(known[modality]).parameters if name not in own]
        for name in options:
            if name not in names:
                raise UserError(f"reading.{modality}.{name}: unknown option{nearest(name, names)}")
    return dict(reading)


def check_timing(value: str | None) -> str | None:
    """The option `time_instruction`, as it is.

    Raises:
        UserError: If it has another value.
    """
    if value not in (None, *TIMINGS):
        raise UserError(f"time_instruction: must be {' or '.join(TIMINGS)}, not {quoted(value)}")
    return value


class LlavakitProcessor(ProcessorMixin):
    """Messages to model inputs.

    Args:
        image_processor: Holds planners and sizes.
        tokenizer: The language model's tokenizer; `<image>` is added if it has none.
        template: Name of the conversation template; see `llavakit.conversation.templates`.
        sampling: How frames of a video are chosen, see `llavakit.media.load_video`.
        reading: Options of the media readers by type, e.g. `{"volume": {"window": [-1000, 1000]}}`.
        time_instruction: Whether a video's length and the times of its frames are written behind it, as LLaVA-Video was
            trained: by the file's "timestamps", or "counted" as its training code counted them; None does not.
    """

    def __init__(
        self,
        image_processor: LlavakitImageProcessorPil | None = None,
        tokenizer: Any = None,
        template: str = "v1",
        sampling: dict[str, Any] | None = None,
        reading: dict[str, Any] | None = None,
        chat_template: str | None = None,
        time_instruction: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.template = template
        self.time_instruction = check_timing(time_instruction)
        self.sampling = sampling
        self.reading = check_reading(reading)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = self._placeholder(image_processor, tokenizer)
        chat_template = chat_template or chat_template_for(template, tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @staticmethod
    def _placeholder(image_processor: LlavakitImageProcessorPil, tokenizer: Any) -> int:
        """Id of `<image>`, which is added to the vocabulary if need be; a model without media has none."""
        if not image_processor.takes_media:
            return NO_PLACEHOLDER
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
            )
        return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @classmethod
    def from_config(cls, config: LlavakitConfig, tokenizer: Any, **options: Any) -> LlavakitProcessor:
        """The processor of a model configuration."""
        image_processor = LlavakitImageProcessorPil(architecture_of(config))
        return cls(image_processor, tokenizer, template=options.pop("template", config.template), **options)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Both halves by their own classes: the Auto class of older transformers asks for torchvision."""
        image_processor = LlavakitImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        return [image_processor, tokenizer]

    @property
    def spec(self) -> MediaSpec:
        """Plans and layouts of the configuration."""
        return self.image_processor.spec

    def use_template(self, template: str) -> None:
        """Write prompts by another template.

        Raises:
            UserError: If there is none of this name, or the tokenizer brings none of its own ("tokenizer").
        """
        self.template, self.chat_template = template, chat_template_for(template, self.tokenizer)

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change how media are read, and the template, by dotted names.

        Args:
            changes: `{"sampling.type": "rate", "sampling.fps": 2, "reading.volume.orientation": "RAS"}`. A new type of
                sampling forgets the options of the old one. `{"template": "v1"}` is `use_template`.

        Raises:
            UserError: If a name is unknown.
        """
        sampling = {} if "sampling.type" in changes else dict(self.sampling or {})
        reading = {modality: dict(options) for modality, options in (self.reading or {}).items()}
        for name, value in changes.items():
            match name.split("."):
                case ["template"]:
                    self.use_template(value)
                case ["time_instruction"]:
                    self.time_instruction = check_timing(value)
                case ["sampling", option]:
                    sampling[option] = value
                case ["reading", modality, option]:
                    reading.setdefault(modality, {})[option] = value
                case _:
                    known = "template, sampling.OPTION, reading.MODALITY.OPTION or time_instruction"
                    raise UserError(f"{name}: unknown; write {known}")
        self.sampling, self.reading = sampling or None, check_reading(reading) or None

    # llavakit's interface: messages

    def read_media(self, part: Mapping[str, Any]) -> tuple[Any, MediaSize]:
        """Open the media item of a content part: a path, bytes or an object that is open already.

        Of a video with `start` or `end` (seconds) only that stretch is sampled.

        Returns:
            Image, frames or volume, and its size.
        """
        modality, source = part["type"], _source_of(part)
        options = (self.reading or {}).get(modality, {})
        if modality == "image":
            image = readers.load_image(source, **options)
            return image, MediaSize(1, image.height, image.width)
        if modality == "video":
            video = self._video(part)
            return video.frames, video.size
        volume = readers.load_volume(source, keep_integers=True, **options)  # planners convert slice by slice
        return volume.values, MediaSize(*volume.values.shape)

    def _video(self, part: Mapping[str, Any]) -> Any:
        options = (self.reading or {}).get("video", {})
        if (span := read_span(part.get("start"), part.get("end"))) is not None:
            options = options | {"span": span}
        return readers.load_video(_source_of(part), sampling=self.sampling, **options)

    def timed(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """Messages with the time instruction behind their video, and the video; both as they are without one.

        Raises:
            UserError: If there are further media items; the instruction speaks of one video.
        """
        media = media_of(messages := normalise(messages))
        if self.time_instruction is None or not any(part["type"] == "video" for part in media):
            return messages, None
        if len(media) > 1:
            raise UserError(f"time_instruction: takes one video, this conversation has {len(media)} media items")
        if media[0].get("start") is not None or media[0].get("end") is not None:
            raise UserError("time_instruction: takes whole videos, not a stretch of one")
        video = self._video(media[0])
        times = video.timestamps
        if self.time_instruction == "counted":
            times = counted_times(video.indices, video.average_rate, self.sampling)
        return with_time_instruction(messages, video.duration, times), video

    def size_of(self, part: Mapping[str, Any]) -> MediaSize:
        """Size of the media item of a content part; of an image without decoding it."""
        if part["type"] != "image":
            return self.read_media(part)[1]
        options = (self.reading or {}).get("image", {})
        if options:
            names = inspect.signature(readers.image_size).parameters
            options = {key: options[key] for key in options if key in names}
        return readers.image_size(_source_of(part), **options)

    def views_of(self, modality: str, item: Any, size: MediaSize, regions: Sequence[Region] = ()) -> list[torch.Tensor]:
        """Encoder inputs of a media item, float32 [channels, (depth,) height, width] each."""
        plan = self.spec.plan(modality, size, tuple(regions))
        return [torch.from_numpy(view) for view in self.spec.route(modality).planner.cut(item, plan)]

    def _check_modalities(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what the model does not take before anything is rendered or read."""
        for part in media_of(messages):
            self.spec.route(part["type"])

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        pixels: bool = True,
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """One sample: expanded ids, labels and views.

        Args:
            messages: OpenAI-style messages with media parts.
            add_generation_prompt: End with the opening of an assistant turn.
            pixels: Cut and normalise the views; False gives ids and sizes alone, and decodes no image.
            before_media: Called with every media part before it is read; what it raises ends the work.
            options: Passed on to `llavakit.conversation.encode.encode`.

        Returns:
            `input_ids`, `labels` (lists), `pixel_values` (list of views), `visual_sizes` (list of triples),
            `visual_modalities` (list of indices into `MODALITIES`), `visual_regions` (one float64 tensor
            [regions, 4] per media item, corners in pixels of the original picture; empty if there are no regions), and
            `notes` on what was left out of the messages, and `fully_masked` (whether the label policy masked the whole
            sample on a token-count mismatch; policy "rounds" only). If the label policy weights tokens, also
            `label_weights`, the loss weight of every id.

        Raises:
            UserError: If messages, media or regions do not fit the model.
        """
        messages = normalise(messages)
        self._check_modalities(messages)
        if before_media is not None and self.time_instruction is not None:
            for part in media_of(messages):
                before_media(part)
            before_media = None
        messages, video = self.timed(messages)
        encoded = encode(
            messages, self.template, self.tokenizer, add_generation_prompt=add_generation_prompt, **options
        )
        several = sum(part["type"] == "image" for part in encoded.media) > 1
        layouts, views, sizes, modalities, regions = [], [], [], [], []
        text_length = len(encoded.ids) - len(encoded.media)
        for part in encoded.media:
            modality = "multi_image" if several and part["type"] == "image" else part["type"]
            if before_media is not None:
                before_media(part)
            if video is not None:
                item, size = video.frames, video.size
            else:
                item, size = self.read_media(part) if pixels else (None, self.size_of(part))
            sizes.append(size)
            modalities.append(MODALITIES.index(modality))
            try:
                own = tuple(self.spec.route(modality).select_regions(size, part.get("regions", ()), text_length))
                layouts.append(self.spec.layout(modality, size, own))
                regions.append(torch.tensor([region.box for region in own], dtype=torch.float64).reshape(-1, 4))
                if pixels:
                    views += self.views_of(modality, item, size, own)
            except MediaError as error:  # planners know a media item by its size and values alone
                raise MediaError(f"{readers.name_of(part[part['type']])}: {error}") from None
        spliced = expand(
            encoded.ids,
            encoded.labels,
            layouts,
            placeholder=IMAGE_PLACEHOLDER,
            image_token_id=self.image_token_id,
            weights=encoded.weights,
        )
        weights = {} if spliced.weights is None else {"label_weights": spliced.weights}
        return weights | {
            "input_ids": spliced.ids,
            "labels": spliced.labels,
            "pixel_values": views,
            "visual_sizes": sizes,
            "visual_modalities": modalities,
            "notes": encoded.notes,
            "visual_regions": regions if any(map(len, regions)) else [],
            "fully_masked": encoded.fully_masked,
        }

    # transformers' interface: text and images

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Ids and views of texts with `<image>` and their images; see `ProcessorMixin.__call__`.

        Images of a text that has several are cut as such ("multi_image"). The tokenizer adds no begin token to a text
        that opens with one, as a rendered chat template does.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        bos = self.tokenizer.bos_token
        if bos and texts and all(isinstance(one, str) and one.startswith(bos) for one in texts):
            kwargs.setdefault("add_special_tokens", False)
        counts = [one.count(IMAGE_TOKEN) for one in texts if isinstance(one, str)]
        if images is not None and sum(counts) == len(make_flat_list_of_images(images)):
            modalities = [("multi_image" if count > 1 else "image") for count in counts for _ in range(count)]
            given = kwargs.get("images_kwargs", {})
            if not {"modality", "modalities"} & set(given):
                kwargs["images_kwargs"] = {**given, "modalities": modalities}
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        size = MediaSize(*(int(side) for side in image_inputs["visual_sizes"][image_idx]))
        runs = self.spec.layout(MODALITIES[int(image_inputs["visual_modalities"][image_idx])], size)
        return "".join(IMAGE_TOKEN * run.visual + self.tokenizer.decode(list(run.ids)) for run in runs)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Token and view counts of images by (height, width); used by vLLM."""
        if image_sizes is None:
            return MultiModalData()
        sizes = [MediaSize(1, int(height), int(width)) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[sum(run.visual for run in self.spec.layout("image", size)) for size in sizes],
            num_image_patches=[len(self.spec.plan("image", size).views) for size in sizes],
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


__all__ = ["LlavakitImageProcessorPil", "LlavakitProcessor"]
