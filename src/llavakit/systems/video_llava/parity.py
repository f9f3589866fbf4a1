"""Video-LLaVA's golden components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.proof.classic_batch import ClassicBatch, Entry, as_rows
from llavakit.proof.entries import (
    fitting,
    picture,
    published_encoder,
    published_model,
    view_processor,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result
from llavakit.systems.video_llava import parity_text
from llavakit.systems.video_llava.checkpoint import image_views, video_views
from llavakit.views.plan import MediaSize
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

SIZE = 224  # literal of the published processors
KINDS = {"languagebind_image": "LanguageBindImage", "languagebind_video": "LanguageBindVideo"}


# Encoders


def encoder_config(config: Mapping[str, Any], kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of one of LanguageBind's repositories."""
    return {"model_type": kind, "vision_config": {**config, **changes}}


def encoder(case: Case) -> Result:
    """Hidden states, selected features and the pooled vector of an encoder."""
    kind = KINDS[case.component]
    net = published_encoder(encoder_config(case.config, kind), case.weights())
    pixels = fitting(case.tensors["pixel_values"], net)
    clips = pixels.dim() == 5
    with torch.no_grad():
        out = net(pixels, output_hidden_states=True)
        found = {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooler_output}
        for name in case.wanted.tensors:
            if name.startswith("hidden_states."):
                found[name] = out.hidden_states[int(name.removeprefix("hidden_states."))]
            elif name == "features" and kind == "LanguageBindVideo" and not clips:
                found[name] = out.hidden_states[-2]
            elif name == "features":
                tokens = encode_views(net, pixels, -2, "full" if clips else "default", geometry_of(net.config))
                found[name] = tokens.unflatten(1, (pixels.shape[2], -1)) if clips else tokens
    return Result(tensors=found)


def lora_merge(case: Case) -> Result:
    """An encoder whose files hold adapters beside its weights."""
    config = dict(case.config)
    config.pop("targets", None)  # the files say which modules have an adapter
    net = published_encoder(encoder_config(config, "LanguageBindVideo"), case.weights())
    state = net.state_dict()
    with torch.no_grad():
        out = net(fitting(case.tensors["pixel_values"], net))
    found = {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooler_output}
    merged = (name for name in case.wanted.tensors if name.startswith("merged."))
    return Result(tensors=found | {name: state[name.removeprefix("merged.")] for name in merged})


# The whole model


def model_of(case: Case) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a published checkpoint."""
    vision = case.config["vision"]
    encoders = {
        "mm_image_tower": encoder_config(vision, "LanguageBindImage", add_time_attn=False),
        "mm_video_tower": encoder_config(vision, "LanguageBindVideo"),
    }
    raw = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", **case.config["language_model"]}
    return published_model(raw, case.weights(), encoders=encoders)


def entry_of(item: Tensor) -> Entry:
    """A picture [3, height, width] or a clip [3, frames, height, width]."""
    if item.dim() == 3:
        return Entry("image", MediaSize(1, *item.shape[1:]), [item])
    return Entry("video", MediaSize(*item.shape[1:]), [item])


def frames_apart(model: LlavakitForConditionalGeneration, entries: Sequence[Entry]) -> list[Entry]:
    """An entry of ready visual vectors for every picture and for every frame of a clip."""
    with torch.no_grad():
        vectors = model.get_image_features(
            [view for entry in entries for view in entry.views],
            visual_sizes=torch.tensor([entry.size for entry in entries]),
            visual_modalities=torch.tensor([MODALITIES.index(entry.modality) for entry in entries]),
        ).pooler_output
    parts = (own.chunk(entry.size.depth) for own, entry in zip(vectors, entries, strict=True))
    return [Entry(vectors=part) for own in parts for part in own]


def joined_frames(
    rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None, entries: Sequence[Entry]
) -> tuple[list[list[int]], list[list[int]] | None] | None:
    """Rows in which the placeholders of a clip's frames are one; None if text stands between two of them."""
    waiting = iter(entries)
    kept_rows, kept_labels = [], []
    for number, row in enumerate(rows):
        keep, place = [], 0
        while place < len(row):
            keep.append(place)
            entry = next(waiting, None) if row[place] == IMAGE_PLACEHOLDER else None
            frames = entry.size.depth if entry is not None else 1
            if frames > 1 and list(row[place : place + frames]) != [IMAGE_PLACEHOLDER] * frames:
                return None
            place += frames
        if IMAGE_PLACEHOLDER not in row:
            next(waiting, None)  # the picture of zeros of a sample without media
        kept_rows.append([row[place] for place in keep])
        kept_labels.append([labels[number][place] for place in keep] if labels is not None else [])
    return kept_rows, None if labels is None else kept_labels


def end_to_end(case: Case) -> Iterator[Example]:
    """Spliced embeddings, labels, mask, logits and loss."""
    case.informational("config.images")
    inputs, model, settings = case.tensors, model_of(case), case.config["language_model"]
    names = sorted((name for name in inputs if name.startswith("images.")), key=lambda name: int(name.split(".")[1]))
    entries = [entry_of(inputs[name]) for name in names]
    seen = as_rows(inputs.get("attention_mask")) or [[1] * len(row) for row in as_rows(inputs["input_ids"])]

    def real(rows: Any) -> list[list[int]] | None:
        rows = as_rows(rows)
        pick = lambda row, mask: [value for value, kept in zip(row, mask, strict=True) if kept]  # noqa: E731
        return rows and [pick(row, mask) for row, mask in zip(rows, seen, strict=True)]

    rows, labels = real(inputs["input_ids"]), real(inputs.get("labels"))
    joined = joined_frames(rows, labels, entries)
    media = entries if joined else frames_apart(model, entries)
    rows, labels = joined or (rows, labels)
    batch = ClassicBatch(
        model,
        rows,
        {IMAGE_PLACEHOLDER: media},
        labels=labels,
        max_length=settings.get("tokenizer_model_max_length"),
        padding_side=settings.get("tokenizer_padding_side", "right"),
    )

    def outputs() -> Result:
        with torch.no_grad():
            embeds = batch.embeds()
            if joined:
                out = batch.forward()
            else:
                targets = None if labels is None else batch.targets
                out = model(inputs_embeds=embeds, attention_mask=batch.attention, labels=targets)
        tensors = {
            "inputs_embeds": embeds * batch.meaningful(),
            "spliced_labels": batch.targets,
            "spliced_attention_mask": batch.attention,
            "logits": out.logits,
        }
        if out.loss is not None:
            tensors["loss"] = out.loss.reshape(1)
        return Result(tensors=tensors, mask={"logits": batch.meaningful()})

    yield Example("forward pass", outputs, tensors=("*",))
    if joined:  # frames that are apart are no clip that a message can name
        yield from batch.through_engine()


# Pixels


def without_antialias(case: Case) -> None:
    """Refuse what the published environment does not do."""
    if case.config.get("antialias", False):
        raise ValueError("config.antialias: the published environment resizes without")


def image_processor(case: Case) -> Iterator[Example]:
    """Views of pictures, sampled, and their means and deviations."""
    without_antialias(case)
    places = torch.tensor(case.config["sample_rows_and_columns"])

    def view(number: int, options: Mapping[str, Any]) -> Result:
        aspect = options.get("image_aspect_ratio")
        if aspect not in (None, "pad", "square"):
            raise ValueError(f"image_aspect_ratio {aspect!r}")
        media = {"image": {"views": image_views(SIZE, aspect == "pad")}}
        (pixels,) = views_of(
            view_processor(media, {"image_size": SIZE, "patch_size": 14}),
            "image",
            picture(case.tensors[f"image.{number}"]),
        )
        tensors = {
            f"sampled.{number}": pixels[:, places][:, :, places],
            f"mean.{number}": pixels.mean((1, 2)),
            f"std.{number}": pixels.std((1, 2)),
        }
        return Result(tensors=tensors)

    case.informational("config.images.*width", "config.images.*height")
    for number, options in enumerate(case.config["images"]):
        names = tuple(f"{kind}.{number}" for kind in ("sampled", "mean", "std"))
        yield Example(f"images.{number}", lambda number=number, options=options: view(number, options), tensors=names)


def video_processor(case: Case) -> Iterator[Example]:
    """Clips of the frames that are sampled, sampled in their rows and columns, and their means."""
    without_antialias(case)
    case.informational(*(f"config.videos.*{name}" for name in ("width", "height", "total_frames", "frame_indices")))
    places = torch.tensor(case.config["sample_rows_and_columns"])

    def clip(number: int, options: Mapping[str, Any]) -> Result:
        frames = options["num_frames"]
        views = video_views(SIZE, frames) | {"mirror": options.get("flipped", False)}
        processor = view_processor(
            {"video": {"views": views}},
            {"image_size": SIZE, "patch_size": 14},
            sampling={"type": "uniform", "frames": frames},
        )
        (pixels,) = views_of(processor, "video", [picture(frame) for frame in case.tensors[f"video.{number}"]])
        sampled = pixels[:, :, places][:, :, :, places]
        return Result(tensors={f"sampled.{number}": sampled, f"mean.{number}": pixels.mean((2, 3))})

    for number, options in enumerate(case.config["videos"]):
        names = (f"sampled.{number}", f"mean.{number}")
        yield Example(f"videos.{number}", lambda number=number, options=options: clip(number, options), tensors=names)


ADAPTERS = {
    "languagebind_image": encoder,
    "languagebind_video": encoder,
    "lora_merge": lora_merge,
    "end_to_end": end_to_end,
    "image_processor": image_processor,
    "video_processor": video_processor,
    **parity_text.ADAPTERS,
}
