"""LLaVA-OneVision's golden components of text and data: prompts, labels, records, sampling, optimiser groups."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.layouts import rename_with
from llavakit.conversation.encode import encode, tokenize
from llavakit.conversation.messages import Message, from_llava, split_literals, to_llava
from llavakit.conversation.messages import media_of as media_in
from llavakit.conversation.template import get_template
from llavakit.data.collate import Collator
from llavakit.data.mixing import choose
from llavakit.data.records import Record
from llavakit.data.sampler import modality_grouped, widely_grouped
from llavakit.media.frame_sampling import uniform
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.entries import text_processor
from llavakit.proof.golden import Case, Result, take
from llavakit.registry import PLANNERS
from llavakit.systems.llava_onevision.checkpoint import Classic, media_of
from llavakit.systems.llava_onevision.data import (
    lead_with_media,
    listed_times,
    sampled_times,
    with_time_instruction,
    without_noise,
)
from llavakit.systems.llava_onevision.parity_views import image_of
from llavakit.training.dataset import WORDS_PER_IMAGE, Samples
from llavakit.training.parameter_groups import Rates, freeze_all_but, optimizer_groups
from llavakit.training.recipe import PartTraining
from llavakit.views.plan import MediaSize

TEMPLATE = "qwen_1_5"
PARTS = {
    "mm_vision_tower": ("vision_tower",),
    "mm_mlp_adapter": ("multi_modal_projector",),
    "mm_language_model": ("language_model", "lm_head", "image_newline"),
    "mm_vision_resampler": (),
}


# Text


def prompts(case: Case) -> Result:
    """Prompt strings of every template."""
    written = []
    for query in case.inputs["queries"]:
        turns = query["turns"]
        messages = [
            {"role": ("user", "assistant")[role], "content": split_literals(text)} for role, text in turns if text
        ]
        open_end = turns[-1][0] == 1 and not turns[-1][1]
        template = get_template(query["template"])
        text, _ = template.render(messages, add_generation_prompt=open_end, placement="keep")
        written.append({"prompt": text})
    reason = "internal to the original"
    names = ("roles", "sep", "sep2", "sep_style", "stop_token_ids")
    return Result(json={"prompts": written}, ignored={f"prompts.*.{name}": reason for name in names})


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


def messages_of(turns: Sequence[Mapping[str, str]], has_media: bool) -> list[Message]:
    """Cleaned messages of LLaVA turns; their media are names only."""
    count = sum(turn["value"].count("<image>") for turn in turns) if has_media else 0
    messages = from_llava({"conversations": list(turns)} | ({"image": ["-"] * count} if count else {}))
    return without_noise(lead_with_media(messages)) if has_media else messages


def preprocess(case: Case) -> dict[str, Any]:
    """Placement of media, ids and labels of training samples."""
    tokenizer = load_tokenizer(case)
    found = {}
    for name, sample in case.inputs.items():
        messages = messages_of(sample["conversations"], sample["has_image"])
        encoded = encode(messages, sample.get("template", TEMPLATE), tokenizer)
        found[name] = {
            "after_multimodal": [turn["value"] for turn in to_llava(messages)["conversations"]],
            "input_ids": encoded.ids,
            "labels": encoded.labels,
        }
    return found


# Data


def video_sampling(case: Case) -> dict[str, Any]:
    """Frames and their times."""
    results = []
    for query in case.inputs["queries"]:
        total, rate = query["total_frames"], query["avg_fps"]
        indices, times = sampled_times(total, rate, query["video_fps"], query["frames_upbound"], query["force_sample"])
        results.append(
            {
                "frame_idx": indices,
                "video_time": total / rate,
                "frame_time": listed_times(times),
                "num_frames": len(indices),
            }
        )
    return {"results": results}


def dataset_sampling(case: Case) -> dict[str, Any]:
    """Which entries of every data file are kept."""
    case.informational("inputs.*.datasets.*.ext")
    found = {}
    for name, mixture in case.inputs.items():
        shuffle = random.Random(mixture.get("seed", 0))
        found[name] = [
            f"{number}-{entry}"
            for number, source in enumerate(mixture["datasets"])
            for entry in choose(range(source["n"]), source.get("sampling_strategy", "all"), shuffle)
        ]
    return found


def length_grouped_sampler(case: Case) -> dict[str, Any]:
    """Orders of samples."""
    found = {}
    for name, run in case.inputs.items():
        lengths, sizes = run["lengths"], (run["batch_size"], run["world_size"])
        everywhere = torch.Generator().manual_seed(run["seed"])
        own = torch.Generator().manual_seed(run["generator_seed"]) if run.get("generator_seed") is not None else None
        if run.get("group_by_modality"):
            order = modality_grouped(lengths, *sizes, everywhere, order_generator=own)
        elif run.get("group_by_modality_auto"):
            order = modality_grouped(
                lengths, *sizes, everywhere, order_generator=own, group=widely_grouped, drop_remainder=True
            )
        else:
            order = widely_grouped(lengths, *sizes, own or everywhere)
        found[name] = order
    return found


class Items:
    """The original's dataset over a case's records.

    Args:
        case: Golden case `dataset_items`.
    """

    def __init__(self, case: Case) -> None:
        inputs = case.inputs
        self.records, self.rates = inputs["records"], inputs.get("fps", {})
        self.files = case.tensors
        self.tokenizer = load_tokenizer(case)
        self.options = case.config["data_args"]
        self.size = case.config["size"]
        media = media_of(self.options, self.size)
        self.planners = {kind: PLANNERS.build(media[kind]["views"]) for kind in media}

    def item(self, index: int) -> tuple[dict[str, Any], list[Tensor]]:
        """Ids, labels and facts of a record, and its view tensors."""
        record = self.records[index]
        messages = from_llava(record)
        media, texts = media_in(messages), messages
        if "video" in record:
            views, size, times = self._video(record["video"])
            if self.options.get("add_time_instruction"):
                texts = with_time_instruction(messages, *times)
            images = [(views, size, "video")]
        elif "image" in record:
            images = [(*self._image(part["image"], len(media) > 1), "image") for part in media]
        else:
            images = [(torch.zeros(1, 3, self.size, self.size), [self.size, self.size], "text")]
        if media:
            texts = without_noise(lead_with_media(texts))
        encoded = encode(texts, TEMPLATE, self.tokenizer)
        facts = {
            "index": index,
            "id": record.get("id", index),
            "input_ids": encoded.ids,
            "labels": encoded.labels,
            "images": [{"shape": views.shape, "size": size, "modality": kind} for views, size, kind in images],
        }
        return facts, [views for views, _, _ in images]

    def _image(self, name: str, several: bool) -> tuple[Tensor, list[int]]:
        image = image_of(self.files[name])
        planner = self.planners["multi_image" if several else "image"]
        views = planner.cut(image, planner.plan(MediaSize(1, image.height, image.width)))
        stacked = torch.stack([torch.from_numpy(view) for view in views])
        anyres = not several and str(self.options["image_aspect_ratio"]).startswith("anyres")
        return (stacked if anyres else stacked[0]), list(image.size)

    def _video(self, name: str) -> tuple[Tensor, Any, tuple[float, list[float]]]:
        """Views of the sampled frames, the size that the original notes, and (duration, times of frames)."""
        bound, force = self.options.get("frames_upbound", 0), self.options.get("force_sample", False)
        if name in self.files:
            frames = list(self.files[name])
            rate = self.rates[name]
            indices, times = sampled_times(len(frames), rate, self.options.get("video_fps", 1), bound, force)
            size: Any = frames[0].numel()  # of a decoded frame the original notes the number of values
        else:  # a folder of frames, two per second, of which ten are taken
            files = sorted(file for file in self.files if str(Path(file).parent) == name.rstrip("/"))
            frames, rate = [self.files[file] for file in files], 2.0
            indices = uniform(len(frames), bound if force else 10)
            times = [index / rate for index in indices]
            size = [frames[0].shape[1], frames[0].shape[0]]
        pictures = [image_of(frames[index]) for index in indices]
        planner = self.planners["video"]
        plan = planner.plan(MediaSize(len(pictures), pictures[0].height, pictures[0].width))
        views = torch.stack([torch.from_numpy(view) for view in planner.cut(pictures, plan)])
        return views, size, (len(frames) / rate, times)


def dataset_items(case: Case) -> Result:
    """Records and pixels to samples, and the batch of all of them."""
    case.informational("inputs.*/*")
    data = Items(case)
    facts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    samples = []
    for place, index in enumerate(case.inputs["fetch"]):
        own, views = data.item(index)
        facts[f"item{place}"] = own
        tensors |= {f"item{place}/image{number}": view for number, view in enumerate(views)}
        samples.append(own)
    records = [Record([], "case", number, record) for number, record in enumerate(take(data.records))]
    lengths = Samples(records, text_processor(data.tokenizer, TEMPLATE))
    images = [image for sample in samples for image in sample["images"]]
    collated = Collator(data.tokenizer.pad_token_id, mask_by_pad_id=True)(
        [{"input_ids": sample["input_ids"], "labels": sample["labels"]} for sample in samples]
    )
    facts |= {
        "lengths": [abs(lengths.words(number, WORDS_PER_IMAGE)) for number in range(len(records))],
        "modality_lengths": [lengths.words(number) for number in range(len(records))],
        "batch": {
            **{name: tensor.tolist() for name, tensor in collated.items()},
            "modalities": [image["modality"] for image in images],
            "image_sizes": [image["size"] for image in images],
            "images": [image["shape"] for image in images],
        },
    }
    return Result(json=facts, tensors=tensors)


# Optimiser groups


def param_groups(case: Case) -> dict[str, Any]:
    """Which parameters train, at which rates, by their original names."""
    from llavakit.systems.llava_onevision.parity import tiny_config

    config = tiny_config(case.config["model_config"], case.config["vision"])
    rename = rename_with(Classic().renames_out(config))
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
        rates = Rates(run["learning_rate"], run.get("weight_decay", 0.0), train, decay_rms_norms=True)
        found[name] = [
            {
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "params": sorted(rename(parameter) for parameter in group["names"]),
            }
            for group in optimizer_groups(model, rates)
        ]
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
