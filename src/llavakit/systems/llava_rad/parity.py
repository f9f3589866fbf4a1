"""LLaVA-Rad's golden components."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.messages import from_llava
from llavakit.data.preparation import prepare
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import (
    fitting,
    greedy,
    picture,
    prompt_text,
    published_model,
    text_processor,
    training_sample,
    view_processor,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result, declined, examples, take
from llavakit.proof.timm import FIXED, published_vit, vit_options
from llavakit.systems.llava_rad import parity_eval
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def vision_encoder(case: Case) -> Iterator[Example]:
    """Hidden states of the trunk by layer, with and without its class token."""
    case.informational("config.published", *(f"config.{name}" for name in FIXED))
    encoder = published_vit(case.config, case.weights()).model.vision_tower
    pixels, geometry = fitting(case.tensors["pixel_values"], encoder), geometry_of(encoder.config)

    def layer(name: str, number: int, strategy: str) -> Result:
        with torch.no_grad():
            return Result(tensors={name: encode_views(encoder, pixels, number, strategy, geometry)})

    def whole(name: str) -> Result:
        with torch.no_grad():
            return Result(tensors={name: encoder(pixels).last_hidden_state})

    for name in case.wanted.tensors:
        if found := re.fullmatch(r"features_layer(-?\d+)_(patch|cls_patch)", name):
            strategy = {"patch": "default", "cls_patch": "full"}[found[2]]
            compute = partial(layer, name, int(found[1]), strategy)
        else:
            compute = partial(whole, name)
        yield Example(name, compute, tensors=(name,))


def image_preprocessing(case: Case) -> Result:
    """The short side to the encoder's size, then the middle."""
    config = case.config
    case.informational("config.published_size", "config.resize", "config.crop")
    views = {"type": "square", "rounded": True, "size": config["image_size"]}
    views |= {f"image_{name}": config[name] for name in ("mean", "std") if name in config}
    processor = view_processor({"image": {"views": views}}, {"image_size": config["image_size"], "patch_size": 1})
    names = sorted(case.tensors, key=lambda name: int(name.rpartition("_")[2]))
    images = [case.tensors[name] for name in names]
    colour = [views_of(processor, "image", picture(image).convert("RGB"))[0] for image in images]
    gray = [views_of(processor, "image", picture(image[..., 0]).convert("RGB"))[0] for image in images]
    return Result(tensors={"pixel_values": torch.stack(colour), "pixel_values_gray": torch.stack(gray)})


def end_to_end(case: Case) -> Iterator[Example]:
    """Logits, loss and greedy replies of a whole model in the published layout."""
    config, inputs = case.config, case.tensors
    case.informational("config.tokens_per_image", *(f"config.vision.{name}" for name in FIXED))
    raw = {
        "model_type": "llava",
        "mm_projector_type": config.get("mm_projector_type", "mlp2x_gelu"),
        "mm_vision_select_layer": config.get("select_layer", -2),
        "mm_vision_tower_checkpoint": None,
        **config["text"],
    }
    encoder = vit_options(config["vision"], "config.vision")
    model = published_model(raw, case.weights(), encoder)

    def entries(count: int) -> dict[int, list[Entry]]:
        return {IMAGE_PLACEHOLDER: [Entry(views=[view]) for view in inputs["pixel_values"][:count]]}

    def forward(ids: str, short: str, **more: Any) -> Result:
        batch = ClassicBatch(model, inputs[ids], entries(len(inputs[ids])), **more)
        with torch.no_grad():
            out = batch.forward()
        tensors = {f"{short}logits": out.logits}
        if more.get("labels") is not None:
            tensors |= {"loss": out.loss.reshape(1), "expanded_labels": batch.targets}
        if not short:
            tensors["expanded_attention_mask"] = batch.attention
        return Result(tensors=tensors, mask={f"{short}logits": batch.meaningful()})

    more = {name: inputs.get(name) for name in ("attention_mask", "labels")}
    own = ("logits", "loss", "expanded_*")
    yield Example("batch", lambda: forward("input_ids", "", **more), tensors=own)
    if "same_length_ids" in inputs:
        name = "same_length_logits"
        yield Example(name, lambda: forward("same_length_ids", "same_length_"), tensors=(name,))
    if "generate_prompts" in (case.inputs or {}):
        prompts = case.inputs["generate_prompts"]
        lengths = [len(row) for row in case.wanted.json["generate_new_ids"]]

        def replies() -> list[list[int]]:
            batch = ClassicBatch(model, [list(row) for row in prompts], entries(len(prompts)))
            new = greedy(model, batch.samples, max(lengths))
            return [row[:length] for row, length in zip(new, lengths, strict=True)]

        yield Example("generate_new_ids", replies, "generate_new_ids")


def training_data(case: Case) -> Iterator[Example]:
    """Ids and labels of both stages' samples."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(case.sibling("tokenizer.json")), **SPECIAL)
    case.informational("config.tokenizer")

    def sample(template: str, pair: Sequence[str]) -> dict[str, Any]:
        question, findings = pair
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": findings}]
        messages = from_llava({"image": "-", "conversations": turns})
        found = training_sample(text_processor(tokenizer, template), messages)
        kept = {name: found[name] for name in ("input_ids", "labels")}
        return kept | {"mismatch_warning": found["fully_masked"]}

    for stage in ("stage_1_template", "stage_2_template"):
        template = case.config[stage]
        yield from examples(partial(sample, template), case.inputs["pairs"], template)


def data(case: Case) -> Iterator[Example]:
    """What the authors' loaders keep of a file, and the prompts of the test loader."""
    config = case.config
    case.informational("config.training_loader")
    template = config["conv_mode"]

    def selected(selection: str) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as place:
            source, output = Path(place) / "annotations.json", Path(place) / "records.json"
            source.write_text(json.dumps(take(case.inputs["records"])), encoding="utf-8")
            prepare("mimic_cxr_findings", source, output, selection=selection)
            return json.loads(output.read_text(encoding="utf-8"))

    def prompts() -> list[str]:
        asked = [record["conversations"][:1] for record in selected(config["test_loader"])]
        messages = [from_llava({"image": "-", "conversations": turns}) for turns in asked]
        return [prompt_text(template, turns, add_generation_prompt=True) for turns in messages]

    for name in case.wanted.json["loaders"]:
        yield Example(name, partial(selected, name), f"loaders.{name}")
    yield Example("test_prompts", prompts, "test_prompts")


ADAPTERS = {
    **parity_eval.ADAPTERS,
    "vision_encoder": vision_encoder,
    "image_preprocessing": image_preprocessing,
    "end_to_end": end_to_end,
    "training_data": training_data,
    "data": data,
    "inference_batching": declined(
        "the original sorts by length and batches equal lengths because it cannot pad; llavakit decodes any lengths "
        "together, and tests hold the replies to those of single requests"
    ),
}
