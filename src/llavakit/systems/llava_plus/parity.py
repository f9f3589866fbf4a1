"""LLaVA-Plus's golden components: the network, prompts, labels and records here, sessions in their own file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from llavakit.conversation.messages import from_llava, media_first
from llavakit.conversation.template import get_template
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks import judged
from llavakit.evaluation.reviews import parse_pair
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.processing import LlavakitProcessor
from llavakit.proof.classic_batch import ClassicBatch, Entry, as_rows
from llavakit.proof.entries import (
    byte_tokenizer,
    check_keys,
    picture,
    prompt_text,
    published_model,
    text_processor,
    training_sample,
    turns_to_messages,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result, component, declined, examples, take
from llavakit.systems.llava_plus import pictures, workers
from llavakit.systems.llava_plus.grammar import split
from llavakit.systems.llava_plus.names import is_tagged, template_of
from llavakit.systems.llava_plus.parity_agent import agent, agents, blank, painted
from llavakit.systems.llava_plus.records import grounding_record, merged
from llavakit.tools.rle import decode_mask
from llavakit.views.plan import MediaSize

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CLIP = {"model_type": "clip_vision_model"}
TINY_KEYS = ("image_aspect_ratio", "mm_vision_select_layer", "mm_vision_select_feature")
CAPTIONS = ("plain", "v0_plain")
TRAINED = {"conv_vicuna_v0": "llava_v0", "conv_vicuna_v1": "vicuna_v1", "llava_llama_2": "llava_llama_2"}


# Prompts


def prompt(case: Case) -> list[Example]:
    """Prompt and stop string of templates."""
    return examples(_prompt, case.inputs["items"], "items")


def _prompt(item: Mapping[str, Any]) -> Result:
    item = take(item)
    name, turns = item["template"], []
    template = get_template(name)
    preset = bool(template.values.get("preset"))  # then the message with the picture is not the first
    for number, message in enumerate(item["messages"]):
        who, text = int(message["role"] != "user"), message["text"] or ""
        if number == 0 and message.get("image") and not preset:
            question = text.replace("<image>", "").strip()
            if is_tagged(name):
                turns += [(0, "<Image><image></Image>"), (1, "Received."), (0, question)]
            else:
                turns.append((0, f"<image>\n{question}"))
        else:
            turns.append((who, text))
    opened = bool(turns) and turns[-1] == (1, "")
    messages = turns_to_messages(turns[:-1] if opened else turns)
    text = prompt_text(name, messages, placement="keep", add_generation_prompt=opened)
    ignored = {"*.stop": "the original has no stop string for pictures with captions"} if name in CAPTIONS else {}
    return Result(json={"prompt": text, "stop": template.stop[0]}, ignored=ignored)


def template_names(case: Case) -> dict[str, Any]:
    """Templates by model name."""
    return {"template": {name: template_of(name) for name in take(case.inputs["names"])}}


def parse_display(case: Case) -> list[Example]:
    """The three fields of replies."""

    def fields(text: str) -> list[list[str]] | None:
        found = split(text)
        return None if found is None else [list(found)]

    return examples(fields, case.inputs["texts"], "matches")


# Pictures


def image_sizes(case: Case) -> list[Example]:
    """Sizes in which a picture is sent on."""

    def sizes(size: Sequence[int]) -> dict[str, list[int]]:
        image = blank(size)
        modes = {f"llm_{mode}": pictures.for_model(image, mode) for mode in ("Crop", "Pad", "Resize")}
        shown = modes | {"tool": pictures.for_tool(image), "display_jpeg": pictures.for_chat(image)}
        return {name: list(one.size) for name, one in shown.items()}

    return examples(sizes, take(case.inputs["sizes"]), "sizes")


def stroke_box(case: Case) -> list[Example]:
    """Boxes of strokes, and the question with them."""

    def box(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        found = pictures.stroke_box(decode_mask(painted(item["size"], item["stroke"])))
        return {"box": found, "text": None if found is None else pictures.with_box(item["text"], found)}

    return examples(box, case.inputs["items"], "items")


# Training


def record_merge(case: Case) -> list[Example]:
    """Turns with their fields as lines."""
    return examples(lambda turns: merged(take(turns)), case.inputs["sources"], "out")


def train_tokens(case: Case) -> list[Example]:
    """Ids and labels of training samples."""
    from transformers import PreTrainedTokenizerFast

    config = case.config
    pad = {"unk": SPECIAL["unk_token"]}.get(config["pad_token"], config["pad_token"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(case.sibling("tokenizer.json")), **SPECIAL, pad_token=pad)
    template, length = TRAINED[config["template"]], config.get("model_max_length", 2048)
    tokenizer.model_max_length = length
    processor = text_processor(tokenizer, template)

    def labelled(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        turns, with_image = merged(item["conversations"]), item["has_image"]
        policy: Any = "rounds"
        if template == "llava_v0":
            known = [turn["from"] for turn in turns]
            learned = [n for n, name in enumerate(known) if name != "human" and name.lower() == "human"]
            policy = {"type": "counted_turns", "learned": learned}
        turns = [turn | {"from": turn["from"].lower()} for turn in turns]
        images = sum(turn["value"].count("<image>") for turn in turns) if with_image else 0
        messages = from_llava({"conversations": turns} | ({"image": ["-"] * images} if images else {}))
        messages = media_first(messages, collapse=True) if with_image else messages
        limit = None if with_image else length
        sample = training_sample(processor, messages, placement="keep", labels=policy, max_length=limit)
        text = None
        if with_image:
            rule = get_template(template)
            kept = messages[messages[0]["role"] == "assistant" and not rule.keeps_first_answer :]
            text = rule.render(kept, training=True, placement="keep")[0]
        return {"training_string": text, "input_ids": sample["input_ids"], "labels": sample["labels"]}

    return examples(labelled, case.inputs["items"], "items")


@component(ordered=True)
def build_record(case: Case) -> dict[str, Any]:
    """Records of labelled detections."""
    draws, thoughts = random.Random(case.config["seed"]), case.config["thoughts"]
    items = []
    for item in take(case.inputs["items"]):
        record, filtered = grounding_record(item, thoughts, draws, repeat_marker=True)
        items.append({"filtered": filtered, "record": record})
    return {"items": items}


# Tools


def worker_gdino(case: Case) -> list[Example]:
    """Boxes of a detector."""
    iou = case.config.get("nms_iou", workers.NMS_IOU)

    def found(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        height, width = item["image_hw"]

        def detector(image: Image.Image, caption: str, box: float, text: float) -> workers.Detections:
            return workers.Detections(item["boxes_cxcywh"], item["logits"], item["phrases"])

        skill = workers.detector_skill(detector, nms_iou=iou)
        return dict(skill(image=blank((width, height)), caption="-").data)

    return examples(found, case.inputs["items"], "items")


def worker_ocr(case: Case) -> list[Example]:
    """Lines of a reader."""

    def found(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        lines = [tuple(line) for line in item["readtext"]]
        return dict(workers.reader_skill(lambda image: lines)(image=blank(item["size"])).data)

    return examples(found, case.inputs["items"], "items")


def worker_sam(case: Case) -> list[Example]:
    """Masks of prompts."""

    def found(item: Mapping[str, Any]) -> dict[str, Any]:
        item, seen = take(item), {}
        height, width = item["image_hw"]
        masks = [decode_mask(painted((width, height), own)) for own in item["masks"]]

        def segmenter(boxes: Any = None, points: Any = None, labels: Any = None) -> list[np.ndarray]:
            seen.update({"boxes_px": boxes.tolist()} if boxes is not None else {"points_px": points.tolist()})
            return masks

        result = workers.segmented(segmenter, (height, width), item["params"])
        return {"result": result, "seen": seen}

    case.informational("inputs.items.*.params.image")
    return examples(found, case.inputs["items"], "items")


def worker_semsam(case: Case) -> list[Example]:
    """Points of prompts."""

    def found(item: Mapping[str, Any]) -> Result:
        point = workers.point_of(take(item)["params"])
        return Result(json={"point": point}, ignored={"*n_masks": "how many masks the scripted network gives"})

    return examples(found, case.inputs["items"], "items")


def worker_ram(case: Case) -> list[Example]:
    """Tags."""

    def found(item: Mapping[str, Any]) -> dict[str, Any]:
        result = workers.tagged(take(item)["res"])
        return result | {"grounding_caption": workers.caption_of_tags(result["tags"])}

    return examples(found, case.inputs["items"], "items")


WORKERS = {"ram_grounding_worker": "ram+grounding_dino", "blip2grounding_worker": "blip2+grounding_dino"}


def worker_compose(case: Case) -> list[Example]:
    """Tools of two."""

    def found(item: Mapping[str, Any]) -> dict[str, Any]:
        item, calls = take(item), []
        responses = iter(item["responses"])

        def run(name: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
            calls.append([name, dict(params)])
            return next(responses)

        result = workers.both(WORKERS[item["worker"]], item["params"], run)
        return {"calls": calls, "result": result}

    return examples(found, case.inputs["items"], "items")


# Scores


def judge_score(case: Case) -> dict[str, Any]:
    """Scores of reviews, and their summary."""
    case.informational("inputs.summary.*.question_id")
    inputs = case.inputs
    found: dict[str, Any] = {"scores": [parse_pair(text) for text in take(inputs["reviews"])]}
    rows = take(inputs["summary"])
    summary = judged.summarise((row.get("category"), row.get("tuple", row.get("score"))) for row in rows)
    lines = {"all": summary, **summary.get("by_category", {})}
    found["summary_lines"] = [
        f"{name} {own['relative_score']} {own['reference']} {own['candidate']}" for name, own in sorted(lines.items())
    ]
    return found


# The network


def tiny_model(case: Case) -> Iterator[Example]:
    """Features, logits and loss of a picture and a text."""
    config, inputs = case.config, case.tensors
    vision = CLIP | dict(config["vision"])
    raw = {"model_type": "llava", "_name_or_path": "llava_plus", **config["text"]}
    raw |= {"mm_projector_type": config.get("projector", "linear")}
    raw |= {name: config[name] for name in TINY_KEYS if name in config}

    def own_pixels(own: LlavakitConfig) -> None:
        own.media["image"]["views"] |= views_options(config["image_processor"])

    model = published_model(raw, case.weights(), vision, change=own_pixels)
    processor = LlavakitProcessor.from_config(model.config, byte_tokenizer())
    images = [picture(image) for image in inputs["image"]]
    views = [view for image in images for view in views_of(processor, "image", image)]
    rows, labels = as_rows(case.inputs["input_ids"]), as_rows(case.inputs.get("labels"))
    entries = [
        Entry("image", MediaSize(1, image.height, image.width), [view])
        for image, view in zip(images, views, strict=True)
    ]
    batch = ClassicBatch(model, rows, {-200: entries}, labels=labels)

    def forward() -> Result:
        with torch.no_grad():
            out = batch.forward()
        tensors = {"logits": out.logits} | ({"loss": out.loss.reshape(1)} if out.loss is not None else {})
        return Result(tensors=tensors, mask={"logits": batch.meaningful()})

    def features() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"image_features": torch.stack(model.get_image_features(torch.stack(views)).pooler_output)}

    yield Example("pixel_values", lambda: {"pixel_values": torch.stack(views)}, tensors=("pixel_values",))
    yield Example("image_features", features, tensors=("image_features",))
    yield Example("logits", forward, tensors=("logits", "loss"))
    yield from batch.through_engine()


def views_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' options of CLIP's image processor as a planner's."""
    known = ("size", "crop_size", "do_resize", "do_center_crop", "resample", "image_mean", "image_std")
    more = ("rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb")
    own = check_keys(given, (*known, *more), "config.image_processor")
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not own.get(name, True):
            raise UserError(f"config.image_processor.{name}: every picture is resized, cut and normalised")
    size, crop = own["size"], own["crop_size"]
    short = size["shortest_edge"] if isinstance(size, Mapping) else size
    side = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
    if side[0] != side[1]:
        raise UserError("config.image_processor.crop_size: must be a square")
    found = {"size": short, "crop": side[0]}
    return found | {
        name: own[name] for name in ("image_mean", "image_std", "resample", "rescale_factor") if name in own
    }


ADAPTERS = {
    "agent": agent,
    "agent_many": agents,
    "prompt": prompt,
    "template_names": template_names,
    "parse_display": parse_display,
    "image_sizes": image_sizes,
    "stroke_box": stroke_box,
    "record_merge": record_merge,
    "train_tokens": train_tokens,
    "build_record": build_record,
    "worker_gdino": worker_gdino,
    "worker_ocr": worker_ocr,
    "worker_sam": worker_sam,
    "worker_semsam": worker_semsam,
    "worker_ram": worker_ram,
    "worker_compose": worker_compose,
    "judge_score": judge_score,
    "tiny_model": tiny_model,
    "dispatch": declined(
        "the original's book-keeping of worker processes; here skills run in the server's own process, and tools "
        "elsewhere are reached by MCP, whose servers balance their own load"
    ),
}
