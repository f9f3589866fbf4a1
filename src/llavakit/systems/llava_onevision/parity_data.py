"""LLaVA-OneVision's golden components of text and data: prompts, labels, records, sampling, optimiser groups."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.layouts import rename_with
from llavakit.conversation.encode import tokenize
from llavakit.conversation.messages import Message, from_llava, is_media, to_llava
from llavakit.conversation.messages import media_of as media_in
from llavakit.conversation.timing import listed_times
from llavakit.data.collate import Collator
from llavakit.data.edits import build_edits
from llavakit.data.mixing import choose, published_strategy
from llavakit.data.records import Record
from llavakit.data.sampler import banded_by_length, modality_grouped, widely_grouped
from llavakit.media.frame_sampling import choose as choose_frames
from llavakit.media.frame_sampling import counted_times
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.entries import (
    check_keys,
    picture,
    prompt_text,
    text_processor,
    training_sample,
    turns_to_messages,
    view_processor,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.systems.llava_onevision.checkpoint import OnevisionLayout, media_of
from llavakit.training.dataset import WORDS_PER_IMAGE, Samples
from llavakit.training.parameter_groups import Rates, freeze_all_but, optimizer_groups, part_of, public_name
from llavakit.training.recipe import PartTraining

TEMPLATE = "qwen_1_5"
PARTS = {
    "mm_vision_tower": ("vision_tower",),
    "mm_mlp_adapter": ("multi_modal_projector",),
    "mm_language_model": ("language_model", "lm_head", "image_newline"),
    "mm_vision_resampler": (),
}


# Text


def prompts(case: Case) -> Iterator[Example | Result]:
    """Prompt strings of every template."""

    def written(query: Mapping[str, Any]) -> Result:
        turns = [(role, text or "") for role, text in query["turns"]]
        opened = turns[-1:] == [(1, "")]
        messages = turns_to_messages(turns[:-1] if opened else turns)
        prompt = prompt_text(query["template"], messages, placement="keep", add_generation_prompt=opened)
        names = ("roles", "sep", "sep2", "sep_style", "stop_token_ids")
        return Result(
            json={"prompt": prompt}, ignored={f"prompts.*.{name}": "internal to the original" for name in names}
        )

    yield from examples(written, case.inputs["queries"], "prompts")


def load_tokenizer(case: Case) -> Any:
    """The case's tokenizer with Qwen2's special tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(case.sibling("tokenizer.json", "preprocess/tokenizer.json")),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def tokenizer_image_token(case: Case) -> dict[str, Any]:
    """Ids of prompts with placeholders."""
    tokenizer = load_tokenizer(case)
    return {"ids": [tokenize(text, tokenizer)[0] for text in case.inputs["prompts"]]}


EDITS = build_edits(["lead_with_media", {"type": "remove_text", "texts": ["QA_GT_caption_based_noisy"]}])


def edited(messages: list[Message]) -> list[Message]:
    """Messages as the edits of a recipe's source leave them: one media item leads, VideoInstruct's left-overs go."""
    for edit in EDITS:
        messages = edit(messages)
    return messages


def messages_of(turns: Sequence[Mapping[str, str]], has_media: bool) -> list[Message]:
    """Edited messages of LLaVA turns; their media are names only."""
    count = sum(turn["value"].count("<image>") for turn in turns) if has_media else 0
    messages = from_llava({"conversations": list(turns)} | ({"image": ["-"] * count} if count else {}))
    return edited(messages) if has_media else messages


def preprocess(case: Case) -> Iterator[Example]:
    """Placement of media, ids and labels of training samples."""
    tokenizer = load_tokenizer(case)

    def sample(request: Mapping[str, Any]) -> dict[str, Any]:
        messages = messages_of(request["conversations"], request["has_image"])
        encoded = training_sample(text_processor(tokenizer, request.get("template") or TEMPLATE), messages)
        return {
            "after_multimodal": [turn["value"] for turn in to_llava(messages)["conversations"]],
            "input_ids": encoded["input_ids"],
            "labels": encoded["labels"],
        }

    yield from examples(sample, case.inputs)


# Data


def timed_processor(sampling: Mapping[str, Any], rate: float, media: Mapping[str, Any], size: int) -> Any:
    """A processor that writes a video's times as training counted them."""
    vision = {"image_size": size, "patch_size": size}
    options = {"sampling": dict(sampling), "reading": {"video": {"rate": rate}}, "time_instruction": "counted"}
    return view_processor(media, vision, **options)


def step_sampling(fps: float, bound: int, force: bool) -> dict[str, Any]:
    """The original's options of sampling."""
    return {"type": "step", "fps": fps, "max_frames": bound, "force": force}


def video_sampling(case: Case) -> Iterator[Example]:
    """Frames and their times."""

    def sampled(query: Mapping[str, Any]) -> dict[str, Any]:
        total, rate = query["total_frames"], query["avg_fps"]
        sampling = step_sampling(query["video_fps"], query["frames_upbound"], query["force_sample"])
        indices = choose_frames(sampling, total=total, average_rate=rate, timestamps=[n / rate for n in range(total)])
        return {
            "frame_idx": indices,
            "video_time": total / rate,
            "frame_time": listed_times(counted_times(indices, rate, sampling)),
            "num_frames": len(indices),
        }

    yield from examples(sampled, case.inputs["queries"], "results")


def dataset_sampling(case: Case) -> dict[str, Any]:
    """Which entries of every data file are kept."""
    case.informational("inputs.*.datasets.*.ext")
    found = {}
    for name, mixture in case.inputs.items():
        shuffle = random.Random(mixture.get("seed", 0))
        found[name] = [
            f"{number}-{entry}"
            for number, source in enumerate(mixture["datasets"])
            for entry in choose(range(source["n"]), published_strategy(source.get("sampling_strategy", "all")), shuffle)
        ]
    return found


def length_grouped_sampler(case: Case) -> dict[str, Any]:
    """Orders of samples."""
    found = {}
    for name, run in case.inputs.items():
        lengths, sizes = run["lengths"], (run["batch_size"], run["world_size"])
        everywhere = torch.Generator().manual_seed(run["seed"])
        own = torch.Generator().manual_seed(run["generator_seed"]) if run.get("generator_seed") is not None else None
        if run.get("variable_length"):
            order = banded_by_length(lengths, *sizes, own or everywhere)
        elif run.get("group_by_modality"):
            order = modality_grouped(lengths, *sizes, everywhere, order_generator=own)
        elif run.get("group_by_modality_auto"):
            order = modality_grouped(
                lengths, *sizes, everywhere, order_generator=own, group=widely_grouped, drop_remainder=True
            )
        else:
            order = widely_grouped(lengths, *sizes, own or everywhere)
        found[name] = order
    return found


ARGUMENTS = (
    *("image_aspect_ratio", "image_grid_pinpoints", "video_fps", "frames_upbound", "force_sample"),
    "add_time_instruction",
)


class Items:
    """The original's dataset over a case's records.

    Args:
        case: Golden case `dataset_items`.
    """

    def __init__(self, case: Case) -> None:
        inputs = case.inputs
        self.records, self.rates = inputs["records"], take(inputs.get("fps", {}))
        self.files = case.tensors.copy()  # also those of records that are not fetched
        self.tokenizer = load_tokenizer(case)
        self.options = check_keys(case.config["data_args"], ARGUMENTS, "config.data_args")
        self.size = case.config["size"]
        self.media = media_of(self.options, self.size)
        self.processor = view_processor(self.media, {"image_size": self.size, "patch_size": self.size})

    def item(self, index: int) -> tuple[dict[str, Any], list[Tensor]]:
        """Ids, labels and facts of a record, and its view tensors."""
        record = self.records[index]
        messages = from_llava(record)
        media, texts = media_in(messages), messages
        if "video" in record:
            views, size, timed = self._video(record["video"], messages)
            if self.options.get("add_time_instruction"):
                texts = timed
            images = [(views, size, "video")]
        elif "image" in record:
            images = [(*image, "image") for image in self._images([part["image"] for part in media])]
        else:
            images = [(torch.zeros(1, 3, self.size, self.size), [self.size, self.size], "text")]
        if media:
            texts = edited(texts)
        encoded = training_sample(text_processor(self.tokenizer, TEMPLATE), texts)
        facts = {
            "index": index,
            "id": record.get("id", index),
            "input_ids": encoded["input_ids"],
            "labels": encoded["labels"],
            "images": [{"shape": views.shape, "size": size, "modality": kind} for views, size, kind in images],
        }
        return facts, [views for views, _, _ in images]

    def _images(self, names: Sequence[str]) -> list[tuple[Tensor, list[int]]]:
        """Views of every image of a message and its (width, height)."""
        images = [picture(self.files[name]).convert("RGB") for name in names]
        content = [{"type": "image", "image": image} for image in images]
        views = self.processor.encode([{"role": "user", "content": content}])["pixel_values"]
        anyres = len(images) == 1 and str(self.options["image_aspect_ratio"]).startswith("anyres")
        found = [torch.stack(views)] if anyres else views
        return [(own, list(image.size)) for own, image in zip(found, images, strict=True)]

    def _video(self, name: str, messages: Sequence[Message]) -> tuple[Tensor, Any, list[Message]]:
        """Views of the sampled frames, the size that the original notes, and messages with the time instruction."""
        bound, force = self.options.get("frames_upbound", 0), self.options.get("force_sample", False)
        if name in self.files:
            frames, rate = list(self.files[name]), self.rates[name]
            sampling = step_sampling(self.options.get("video_fps", 1), bound, force)
            size: Any = frames[0].numel()  # of a decoded frame the original notes the number of values
        else:  # a folder of frames, two per second, of which ten are taken
            files = sorted(file for file in self.files if str(Path(file).parent) == name.rstrip("/"))
            frames, rate = [self.files[file] for file in files], 2.0
            sampling = {"type": "uniform", "frames": bound if force else 10}
            size = [frames[0].shape[1], frames[0].shape[0]]
        processor = timed_processor(sampling, rate, self.media, self.size)
        pictures = [picture(frame) for frame in frames]
        shown = [
            turn | {"content": [part | {"video": pictures} if is_media(part) else part for part in turn["content"]]}
            for turn in messages
        ]
        timed, _ = processor.timed(shown)
        return torch.stack(views_of(processor, "video", pictures)), size, timed


def dataset_items(case: Case) -> Iterator[Example]:
    """Records and pixels to samples, and the batch of all of them."""
    data = Items(case)
    fetch = case.inputs["fetch"]
    records = [Record([], "case", number, record) for number, record in enumerate(take(data.records))]
    lengths = Samples(records, text_processor(data.tokenizer, TEMPLATE))

    def item(place: int, index: int) -> Result:
        own, views = data.item(index)
        return Result(json=own, tensors={f"item{place}/image{number}": view for number, view in enumerate(views)})

    def batch() -> dict[str, Any]:
        samples = [data.item(index)[0] for index in fetch]
        images = [image for sample in samples for image in sample["images"]]
        collated = Collator(data.tokenizer.pad_token_id, mask_by_pad_id=True)(
            [{"input_ids": sample["input_ids"], "labels": sample["labels"]} for sample in samples]
        )
        return {
            **{name: tensor.tolist() for name, tensor in collated.items()},
            "modalities": [image["modality"] for image in images],
            "image_sizes": [image["size"] for image in images],
            "images": [image["shape"] for image in images],
        }

    for place, index in enumerate(fetch):
        yield Example(f"item{place}", partial(item, place, index), f"item{place}", (f"item{place}/*",))
    yield from examples(lambda n: abs(lengths.words(n, WORDS_PER_IMAGE)), range(len(records)), "lengths")
    yield from examples(lengths.words, range(len(records)), "modality_lengths")
    yield Example("batch", batch, "batch")


# Optimiser groups


class _WithEncoder(OnevisionLayout):
    """The published layout with the encoder's configuration given instead of named."""

    def __init__(self, encoder: Mapping[str, Any]) -> None:
        self.encoder = dict(encoder)

    def encoder_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> dict[str, Any]:
        return self.encoder


def param_groups(case: Case) -> dict[str, Any]:
    """Which parameters train, at which rates, by their original names."""
    settings = {"model_type": "llava_qwen", **case.config["model_config"]}
    encoder = {"model_type": "siglip_vision_model", **case.config["vision"]}
    config = _WithEncoder(encoder).read_config(settings, {})
    rename = rename_with(OnevisionLayout().renames_out(config))
    found = {}
    for name, run in case.inputs.items():
        own = {
            "multi_modal_projector": run.get("mm_projector_lr"),
            "vision_tower": run.get("mm_vision_tower_lr"),
        }
        tuned = [part for word in run["mm_tunable_parts"].split(",") for part in PARTS[word.strip()]]
        order = sorted(tuned, key=lambda part: list(own).index(part) if part in own else len(own))
        train = {part: PartTraining(learning_rate=own.get(part)) for part in order}
        model = LlavakitForConditionalGeneration(config)
        freeze_all_but(model, train)
        decay = run.get("weight_decay") or 0.0
        rates = Rates(run["learning_rate"], decay, train, decay_rms_norms=True)
        # the original's optimiser has a pair of groups for every rate, also without parameters that train at it
        rated = ["", *(part for part, rate in own.items() if rate is not None)]
        pairs: dict[str, list[dict[str, Any]]] = {part: [] for part in rated}
        for group in optimizer_groups(model, rates):
            part = part_of(public_name(group["names"][0]), rated[1:]) or ""
            params = sorted(rename(parameter) for parameter in group["names"])
            pairs[part].append({"lr": group["lr"], "weight_decay": group["weight_decay"], "params": params})
        for part, groups in pairs.items():
            empty = {"lr": own.get(part) or run["learning_rate"], "params": []}
            groups += [] if groups else [empty | {"weight_decay": decay}, empty | {"weight_decay": 0.0}]
        found[name] = [group for groups in pairs.values() for group in groups]
    return found


ADAPTERS = {
    "prompts": prompts,
    "tokenizer_image_token": tokenizer_image_token,
    "preprocess": preprocess,
    "video_sampling": video_sampling,
    "dataset_sampling": dataset_sampling,
    "length_grouped_sampler": length_grouped_sampler,
    "dataset_items": dataset_items,
    "param_groups": param_groups,
}
