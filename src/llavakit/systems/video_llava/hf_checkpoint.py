"""Video-LLaVA as transformers' `VideoLlavaForConditionalGeneration`, which encodes every frame alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig

from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import read_json
from llavakit.checkpoints.layouts import Renames
from llavakit.checkpoints.preprocessor import IMAGE_INERT, TOLERANCE, pictures, planner_options, processor_options
from llavakit.checkpoints.prompts import REFUSED, conversations, encoded, export_tokenizer
from llavakit.checkpoints.text import chat_template_of
from llavakit.checkpoints.transformers_layout import (
    PROCESSOR_INERT,
    TransformersLayout,
    check_processor,
    write_json,
)
from llavakit.conversation.messages import normalise
from llavakit.conversation.template import VIDEO_MARK, get_template, template_for
from llavakit.errors import CheckpointError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.routes import MODALITIES, MediaSpec
from llavakit.systems.video_llava.checkpoint import VIDEO, VIDEO_TOWER
from llavakit.systems.video_llava.encoder_files import CLIP
from llavakit.views.plan import MediaSize

FRAMES = 8
TEMPLATE = "video_llava"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
_OWN_PROCESSOR = PROCESSOR_INERT | {
    "video_processor": "is compared with the processor of pictures",
    "video_token": "names what transformers' class does anyway",
}
_VIDEO_INERT = IMAGE_INERT | {
    "video_processor_type": "names transformers' class",
    "do_sample_frames": "frames are sampled where videos are read",
    "fps": "frames are sampled where videos are read",
    "num_frames": "frames are sampled where videos are read",
    "return_metadata": "says how transformers' class runs",
}


def export_text(restarts: bool) -> str:
    """The template with which transformers' processor writes what llavakit's template writes.

    Args:
        restarts: See `Template.whole`.
    """
    text = get_template(TEMPLATE).whole(begins=False, restarts=restarts)
    for own, theirs in (
        ("{{ wrapped }}", "{{ '<video>' if part['type'] == 'video' else wrapped }}"),
        (
            "content | replace('<image>', '<image>' + gap) if gap",
            "content | replace('<image>', '<image>' + gap) | replace('<video>', '<video>' + gap) if gap",
        ),
    ):
        if own not in text:
            raise AssertionError(f"the template has no {own!r}")
        text = text.replace(own, theirs)
    return text


class VideoLlavaTransformersLayout(TransformersLayout):
    """`LanguageBind/Video-LLaVA-7B-hf`.

    transformers' class has no attention over time: these are other models than the authors' files, and those with it
    cannot be written so.
    """

    system = "video-llava"
    model_type = "video_llava"
    class_name = "VideoLlavaForConditionalGeneration"
    config_keys = (*TransformersLayout.config_keys, "video_token_index", "video_token_id")
    inert = TransformersLayout.inert | {"video_seq_length": "follows from encoder and processor"}
    placeholders = 2

    # reading

    def media(self, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        check_processor(folder, config, inert=_OWN_PROCESSOR)
        views = planner_options(folder) or {"type": "square", "size": config.vision_config.image_size}
        _check_video_processor(folder)
        return {
            "image": {"views": views},
            "video": {"encoder": VIDEO_TOWER, "views": {"type": "clip", "frames": None, "frame": dict(views)}},
        }

    def template(self, folder: Path, config: PreTrainedConfig) -> str:
        own = chat_template_of(folder)
        return TEMPLATE if own in (export_text(False), export_text(True)) else super().template(folder, config)

    def usual_template(self, folder: Path, config: PreTrainedConfig) -> str:
        return TEMPLATE

    def extras(self, config: PreTrainedConfig) -> dict[str, Any]:
        own = config.vision_config.to_dict()
        options = {key: own[key] for key in CLIP if own.get(key) is not None}
        encoder = {"model_type": VIDEO, **options, "num_frames": FRAMES, "temporal_attention": False}
        tower = {"config": encoder, "layer": config.vision_feature_layer, "strategy": "full"}
        sampling = {"type": "every", "frames": FRAMES}
        return {"extra_encoders": {VIDEO_TOWER: tower}, "extras": {"processor": {"sampling": sampling}}}

    def renames_in(self) -> Renames:
        return (
            (r"^(?:model\.)?image_tower\.(?:vision_model\.)?", "model.vision_tower."),
            (r"^(?:model\.)?video_tower\.(?:vision_model\.)?", f"model.{VIDEO_TOWER}."),
            *super().renames_in(),
        )

    # writing

    def objections(self, config: LlavakitConfig) -> list[str]:
        none = "extra_encoders: transformers' class has none"  # what the other classes say
        return [objection for objection in super().objections(config) if objection != none]

    def own_objections(self, config: LlavakitConfig) -> list[str]:
        tower = f"extra_encoders.{VIDEO_TOWER}"
        extra = config.extra_encoders.get(VIDEO_TOWER, {})
        if list(config.extra_encoders) != [VIDEO_TOWER] or (extra.get("config") or {}).get("model_type") != VIDEO:
            return [f"extra_encoders: transformers' class has one {VIDEO}, called {VIDEO_TOWER}"]
        found, encoder = [], config.encoder_config(VIDEO_TOWER)[0]
        if encoder.temporal_attention:
            found.append(
                f"{tower}.config.temporal_attention: transformers' class does not look along time, so these weights "
                "would be lost"
            )
        own, other = encoder.to_dict(), config.vision_config.to_dict() if config.vision_config else {}
        different = next((key for key in CLIP if own.get(key) != other.get(key)), None)
        if different is not None:
            found.append(f"{tower}.config.{different}: transformers' class builds both encoders alike")
        if extra.get("strategy") != "full" or extra.get("layer", -2) != config.vision_feature_layer:
            found.append(f"{tower}: transformers' class reads the layer of the pictures, with class tokens")
        if set(config.media) != {"image", "video"}:
            return [*found, "media: transformers' class takes images and videos"]
        image, video = (config.media[name] for name in ("image", "video"))
        _, objection = processor_options(image["views"])
        if objection:
            found.append(objection)
        elif image["views"]["type"] != "square":
            found.append("media.image.views.type: transformers' VideoLlavaImageProcessor has 'square'")
        for name, section in (("image", image), ("video", video)):
            if (section.get("arrange") or {"type": "flat"})["type"] != "flat":
                found.append(f"media.{name}.arrange.type: transformers' class has 'flat'")
        views = video["views"]
        if views.get("type") != "clip" or views.get("frame") != image["views"] or views.get("mirror"):
            found.append("media.video.views: transformers' class cuts frames like pictures")
        return found

    def own_config(self, config: LlavakitConfig) -> dict[str, Any]:
        spec, size = MediaSpec(config), MediaSize(FRAMES, 336, 336)
        return {
            "video_token_index": config.image_token_id + 1,
            "image_seq_length": spec.count("image", size._replace(depth=1)),
            "video_seq_length": spec.count("video", size),
        }

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        for name, tensor in super().write_state(config, state):
            name = name.replace("vision_tower.", "image_tower.", 1) if name.startswith("vision_tower.") else name
            video = f"model.{VIDEO_TOWER}."
            yield f"video_tower.vision_model.{name.removeprefix(video)}" if name.startswith(video) else name, tensor

    def write_processor(self, processor: Any, config: LlavakitConfig, folder: Path) -> None:
        """Tokenizer with `<image>` and `<video>`, and `processor_config.json`.

        The file is written by hand: transformers cannot build its video processor without torchvision.
        """
        rows = self.rows(config)
        tokenizer = export_tokenizer(processor.tokenizer, rows, specials=(VIDEO_MARK,))
        tokenizer.save_pretrained(folder)
        raw = read_json(folder / "config.json")
        raw["video_token_index"] = tokenizer.convert_tokens_to_ids(VIDEO_MARK)
        if raw["video_token_index"] >= rows:
            raise CheckpointError(
                f"{folder}: the token {VIDEO_MARK} has no row in the embedding; give it the id after <image>"
            )
        write_json(folder / "config.json", raw)
        options, _ = processor_options(config.media["image"]["views"])
        options.pop("do_pad")  # these classes have none
        own = {
            "processor_class": "VideoLlavaProcessor",
            "image_token": "<image>",
            "video_token": VIDEO_MARK,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": raw["vision_feature_select_strategy"],
            "num_additional_image_tokens": 1,
            "image_processor": {"image_processor_type": "VideoLlavaImageProcessor", **options},
            "video_processor": {"video_processor_type": "VideoLlavaVideoProcessor", **options},
        }
        write_json(folder / "processor_config.json", own)
        same = processor.template == TEMPLATE
        template = next(
            (text for text in map(export_text, (False, True)) if same and _writes_alike(processor, text)),
            processor.chat_template,
        )
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def prompts(
        self, processor: Any, config: LlavakitConfig, folder: Path
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Pictures by transformers' image processor and texts by the written template, compared with llavakit's.

        The processor as a whole needs torchvision.
        """
        if processor is None:
            return [self._as_theirs(_made_up(config), config, config.image_token_id + 1)]
        images, pairs = AutoImageProcessor.from_pretrained(folder, backend="pil"), []
        token = read_json(folder / "config.json")["video_token_index"]
        if not _writes_alike(processor, chat_template_of(folder)):
            raise CheckpointError(f"{REFUSED} template: transformers' processor writes another prompt")
        for messages in _conversations():
            sample = encoded(processor, messages)
            if sample is None:
                continue
            shown = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
            if shown:
                found = images(shown, return_tensors="pt")
                theirs = found.get("pixel_values", found.get("pixel_values_images"))
                mine = torch.stack([view for view in sample["pixel_values"] if view.dim() == 3])
                if theirs.shape != mine.shape or (theirs - mine).abs().max() > TOLERANCE:
                    raise CheckpointError(f"{REFUSED} transformers' processor gives other pixels for the same picture")
            pairs.append(self._as_theirs(sample, config, token))
        return pairs

    def _as_theirs(
        self, sample: Mapping[str, Any], config: LlavakitConfig, video_token: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs of both models from a sample: transformers has a token of its own for videos, and frames first."""
        ids = torch.tensor([list(sample["input_ids"])])
        mask = torch.ones_like(ids)
        shared = {"attention_mask": mask}
        if not len(sample["pixel_values"]):
            return shared | {"input_ids": ids}, shared | {"input_ids": ids}
        spec, other = MediaSpec(config), ids.clone()
        places = iter((ids[0] == config.image_token_id).nonzero()[:, 0].tolist())
        for size, number in zip(sample["visual_sizes"], sample["visual_modalities"], strict=True):
            modality = MODALITIES[number]
            for _ in range(spec.count(modality, MediaSize(*size))):
                place = next(places)
                if modality == "video":
                    other[0, place] = video_token
        views = list(sample["pixel_values"])
        ours = {
            "input_ids": ids,
            "pixel_values": views,
            "visual_sizes": torch.tensor(sample["visual_sizes"]),
            "visual_modalities": torch.tensor(sample["visual_modalities"]),
        }
        theirs: dict[str, Any] = {"input_ids": other}
        if any(view.dim() == 3 for view in views):
            parameters = inspect.signature(getattr(transformers, self.class_name).forward).parameters
            name = "pixel_values" if "pixel_values" in parameters else "pixel_values_images"  # of older releases
            theirs[name] = torch.stack([view for view in views if view.dim() == 3])
        if any(view.dim() == 4 for view in views):
            theirs["pixel_values_videos"] = torch.stack([view.transpose(0, 1) for view in views if view.dim() == 4])
        return shared | ours, shared | theirs


def _check_video_processor(folder: Path) -> None:
    """Refuse a processor of videos that does not cut frames as that of pictures does.

    Raises:
        CheckpointError: It names the option.
    """
    nested = folder / "processor_config.json"
    path, options, pictures_of = folder / VIDEO_PROCESSOR, None, None
    if path.is_file():
        options = read_json(path)
        beside = folder / "preprocessor_config.json"
        pictures_of = read_json(beside) if beside.is_file() else {}
    elif nested.is_file():
        raw = read_json(nested)
        options, pictures_of, path = raw.get("video_processor"), raw.get("image_processor") or {}, nested
    if not isinstance(options, Mapping):
        return
    fields = Fields(options, str(path))
    for name in (
        *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
        *("do_normalize", "image_mean", "image_std"),
    ):
        fields.one_of(name, pictures_of[name] if name in pictures_of else fields.get(name))
    fields.one_of("do_pad", False)
    fields.finish(_VIDEO_INERT)


def _conversations() -> list[list[dict[str, Any]]]:
    lying, standing = pictures()
    frames = [lying, lying.transpose(0), lying]
    video, text = {"type": "video", "video": frames}, {"type": "text", "text": "What moves?"}
    mixed = [video, {"type": "image", "image": standing}, text]
    return [
        *conversations(),
        [{"role": "user", "content": [video, text]}],
        [{"role": "user", "content": mixed}],
    ]


def _writes_alike(processor: Any, template: str) -> bool:
    """Whether a template of transformers writes what llavakit's does, with a mark of its own for videos."""
    tokenizer = processor.tokenizer
    own = template_for(processor.template, tokenizer)
    for messages in _conversations():
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        wanted, _ = own.render(normalise(messages), add_generation_prompt=True)
        begin = tokenizer.bos_token or ""
        if text.removeprefix(begin).replace(VIDEO_MARK, "<image>") != wanted.removeprefix(begin):
            return False
        videos = sum(part["type"] == "video" for turn in messages for part in turn["content"])
        if text.count(VIDEO_MARK) != videos:
            return False
    return True


def _made_up(config: LlavakitConfig) -> dict[str, Any]:
    """A sample with a picture and a clip of noise, for models without a tokenizer."""
    spec, sizes = MediaSpec(config), (MediaSize(1, 61, 97), MediaSize(3, 61, 97))
    generator, ids, views = torch.Generator().manual_seed(0), [1, 2], []
    for modality, size in zip(("image", "video"), sizes, strict=True):
        (view,) = spec.plan(modality, size).views
        depth = (view.depth,) if modality == "video" else ()
        views.append(torch.randn(3, *depth, view.height, view.width, generator=generator))
        ids += [*[config.image_token_id] * spec.count(modality, size), 3]
    return {"input_ids": ids, "pixel_values": views, "visual_sizes": sizes, "visual_modalities": [0, 1]}
