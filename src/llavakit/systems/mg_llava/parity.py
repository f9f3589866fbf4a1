"""MG-LLaVA's golden components: fusion, regions, boxes, pixels, splice, logits; text and scores in their own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, CLIPVisionConfig

from llavakit.checkpoints.layouts import rename_with
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.data.collate import Collator
from llavakit.errors import UserError
from llavakit.media.regions import Region, read_regions, to_corners
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.prompt import positions_of
from llavakit.model.routes import read_region_tensor
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import TINY, byte_tokenizer, check_keys, fitting, loaded, picture, published_model
from llavakit.proof.golden import Case, Example, Result, examples
from llavakit.registry import PLANNERS
from llavakit.systems.mg_llava import parity_text
from llavakit.systems.mg_llava.boxes import NOTHING, suppress
from llavakit.systems.mg_llava.checkpoint import DETAIL, OWN, RENAMES
from llavakit.systems.mg_llava.connector import VARIANTS, ConvGate, ObjectProjector
from llavakit.systems.mg_llava.cost import golden_flops
from llavakit.systems.mg_llava.encoder import ConvNextPyramid, ConvNextPyramidConfig
from llavakit.views.plan import MediaSize, Plan, View
from llavakit.vision.detection import Detector, entry, parse_tags
from llavakit.vision.roi_align import pyramid_mean, roi_align, roi_mean

FRAME = 768  # side of the square that the original's boxes are in

# Parts


def renamed(weights: Mapping[str, Tensor], published: str, ours: str) -> dict[str, Tensor]:
    """Weights of a part under its own names.

    Args:
        published: What the case left out in front of the published names.
        ours: What llavakit's names begin with.
    """
    rename = rename_with(RENAMES)
    return {rename(f"{published}{name}").removeprefix(ours): tensor for name, tensor in weights.items()}


def conv_gate_fusion(case: Case) -> Result:
    """The fusion module in any of its variants."""
    config = case.config
    case.informational("config.batch")
    fuse = ConvGate(config["low_dim"], config["high_dim"], VARIANTS[config["variant"]])
    weights = case.weights()
    net = loaded(fuse, renamed(weights, "fuse_module.", f"{OWN}.fuse.")) if weights else fuse.eval()
    low = fitting(case.tensors["low"], net).transpose(1, 2).unflatten(2, (config["grid"], -1))
    with torch.no_grad():
        return Result(tensors={"out": net(low, fitting(case.tensors["high"], net))})


def roi_components(case: Case) -> Result:
    """RoIAlign in full and averaged."""
    if case.config["aligned"] or case.config["sampling_ratio"] > 0:
        raise UserError("config: llavakit reads aligned=False with sampling_ratio=-1, as published")
    (features,), boxes, tensors = case.tensors["feat"], case.tensors["boxes"], {}
    for call in case.config["calls"]:
        name, size, scale = call["name"], call["output_size"], call["spatial_scale"]
        aligned = roi_align(features, boxes, size if isinstance(size, int) else tuple(size), scale)
        if call["keep"]:
            tensors[name] = aligned
        square = isinstance(size, int)
        tensors[f"{name}_mean"] = roi_mean(features, boxes, size, scale) if square else aligned.mean((2, 3))
    return Result(tensors=tensors)


def object_tokens(case: Case) -> Result:
    """Feature maps and boxes to tokens."""
    config = case.config
    regions = ConvNextPyramidConfig(
        region_stages="last" if config["last_only"] else "all", region_bins=config["box_feat_size"]
    )
    weights = renamed(case.weights(), "", f"{OWN}.objects.")
    projector = loaded(ObjectProjector(config["aux_dim"], config["llm_hidden_size"]), weights)
    tensors = {}
    for number in range(config["n_images"]):
        features = case.tensors["aux"][number]
        scale = features.shape[-1] / config.get("box_frame", FRAME)
        vectors = pyramid_mean([features], case.tensors[f"boxes{number}"], regions.bins, scale)
        with torch.no_grad():
            tensors[f"tokens{number}"] = projector(fitting(vectors, projector))
    return Result(tensors=tensors)


def convnext_options(convnext: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the encoder's configuration."""
    own = check_keys(convnext, ("depths", "dims", "layer_scale_init"), "config.convnext")
    depths, widths = list(own["depths"]), list(own["dims"])
    return {"depths": depths, "hidden_sizes": widths, "num_stages": len(depths), "patch_size": 4}


def convnext_pyramid(case: Case) -> Result:
    """The high-resolution encoder's stages as one map, and the last of them."""
    config = ConvNextPyramidConfig(**convnext_options(case.config))
    weights = renamed(case.weights(), "visual_encoder_aux.", f"model.{DETAIL}.")
    net = loaded(ConvNextPyramid(config), weights)
    pixels = fitting(case.tensors["pixels"], net)
    with torch.no_grad():
        *_, last = net.stages(pixels)
        return Result(tensors={"pyramid": net.pyramid(pixels), "last": last})


# Boxes


SETTINGS = ("image_size_aux", "iou_threshold", "limit_mode", "limit_num", "max_length", "pad_image_to_square")


def planner_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a case as the planner's; boxes outside the picture are dropped, as published."""
    own = check_keys(settings, SETTINGS, "config")
    return {
        "type": "low_and_high",
        "size": own["image_size_aux"],
        "aspect": "pad" if own["pad_image_to_square"] else "square",
        "iou_threshold": own["iou_threshold"],
        "limit_mode": own["limit_mode"],
        "limit_num": own["limit_num"],
        "max_text_length": own["max_length"],
        "outside": "drop",
    }


def detections(box_data: Mapping[str, Any] | None, where: str) -> list[Region]:
    """The regions of an entry of a box file; none of an empty one."""
    return read_regions(box_data, where) if box_data else []


def box_pipeline(case: Case) -> Iterator[Example]:
    """A box file's entries to the model's boxes."""

    def run(sample: Mapping[str, Any]) -> Result:
        settings = dict(case.config) | dict(sample["override"])
        planner = PLANNERS.build(planner_options(settings))
        width, height = sample["image_size"]
        size, length = MediaSize(1, height, width), sample["text_length"]
        text_alone = length - 1  # the original's text holds a placeholder
        chosen = planner.select_regions(size, detections(sample["box_data"], "box_data"), text_alone)
        boxes = planner.plan(size, chosen).views[1].regions
        cut = Collator(0, settings["max_length"])([{"input_ids": range(length)}])
        return Result(
            json={
                "boxes": [list(box) for box in boxes],
                "labels": [region.label for region in planner.in_frame(size, chosen)],
                "text_length": cut["input_ids"].shape[1],
            }
        )

    yield from examples(run, case.inputs["samples"], "samples")


def nms(case: Case) -> Iterator[Example]:
    """Suppression per label."""

    def run(sample: Mapping[str, Any]) -> Result:
        rows = zip(sample["boxes"], sample["labels"], sample["scores"], strict=True)
        given = [Region(*map(float, box), label, float(score)) for box, label, score in rows]
        kept = suppress(given, sample["iou_threshold"])
        columns = {"boxes": [list(r.box) for r in kept], "labels": [r.label for r in kept]}
        return Result(json=columns | {"scores": [r.score for r in kept]})

    yield from examples(run, case.inputs["samples"], "samples")


def pixels(case: Case) -> Result:
    """Both views of a picture, and the fate of a box in it."""
    settings = dict(case.config)
    low = settings.pop("low_size")
    views = planner_options(settings) | {"low_size": low}
    side = views["size"]
    convnext = {"depths": [1], "hidden_sizes": [4], "num_stages": 1, "patch_size": side}
    config = LlavakitConfig(
        text_config={"model_type": "llama", "vocab_size": 8, **TINY},
        vision_config={"model_type": "clip_vision_model", **TINY, "image_size": low, "patch_size": low},
        extra_encoders={DETAIL: {"config": {"model_type": "convnext_pyramid", **convnext}, "layer": -1}},
        connector={"type": "conv_gate", "encoder": ["vision_tower", DETAIL]},
        media={"image": {"views": views}},
    )
    processor = LlavakitProcessor.from_config(config, byte_tokenizer(), template="plain")
    image = picture(case.tensors["image"]).convert("RGB")
    boxes = {"type": "boxes", "boxes": [[1, 2, 9, 9]], "labels": ["box"], "scores": [1.0]}
    message = {"role": "user", "content": [{"type": "image", "image": image}, boxes]}
    sample = processor.encode([message], add_generation_prompt=True)
    (size,) = sample["visual_sizes"]
    regions = read_region_tensor(sample["visual_regions"][0]) if sample["visual_regions"] else ()
    plan = processor.spec.plan("image", size, regions)
    low_view, high_view = sample["pixel_values"]
    return Result(
        tensors={
            "pixel_values_aux": high_view,
            "pixel_values": low_view,
            "boxes": torch.tensor(plan.views[1].regions, dtype=torch.float32),
        }
    )


class Constant:
    """A detector's network and processor that find what a case says, and remember what they were asked."""

    def __init__(self, boxes: Any, scores: Any, labels: Any) -> None:
        self.found = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}
        self.config, self.device, self.asked = SimpleNamespace(model_type="owlv2"), "cpu", {}

    def __call__(self, text: Any = None, **inputs: Any) -> BatchFeature:
        self.asked |= {"prompts": text[0]} if text else {}
        return BatchFeature()

    def post_process_grounded_object_detection(self, outputs: Any, threshold: float, target_sizes: Any) -> list[Any]:
        """The case's boxes."""
        self.asked |= {"threshold": threshold, "target_sizes": [list(size) for size in target_sizes]}
        return [self.found]


def box_generator(case: Case) -> Iterator[Example]:
    """From tags and a detector's boxes to an entry of a box file; the networks are constants."""

    def run(sample: Mapping[str, Any]) -> Result:
        width, height = sample["image_size"]
        constant = Constant(sample["det_boxes"], sample["det_scores"], sample["det_labels"])
        regions = Detector(constant, constant)(Image.new("RGB", (width, height)), parse_tags(sample["ram_output"]))
        found = entry("case", regions)
        return Result(json=constant.asked | {name: found[name] for name in ("boxes", "labels", "scores")})

    yield from examples(run, case.inputs["samples"], "samples")


# Splice and whole model


def splice(case: Case) -> Result:
    """Image tokens, then object tokens, in place of every placeholder.

    The original adds a masked row behind a sample without a picture; such rows are laid between the product's.
    """
    inputs, table = case.tensors, case.weights()["embed"]
    if case.config["n_bbox"] != len(inputs["input_ids"]):
        raise UserError("config.n_bbox: there must be one tensor of boxes per row")
    model = LlavakitForConditionalGeneration(
        LlavakitConfig(
            text_config={"model_type": "llama", "vocab_size": table.shape[0], **TINY, "hidden_size": table.shape[1]},
            vision_config={"model_type": "clip_vision_model", "image_size": 2, "patch_size": 2, **TINY},
            media={"image": {"views": {"type": "squash", "size": 2}}},
            image_token_id=table.shape[0],
        )
    ).to(table.dtype)
    model.get_input_embeddings().weight.data = table
    images, entries, alone = iter(inputs["pixel_values"]), [], []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        objects = inputs[f"bbox{row}"]
        count = ids.count(IMAGE_PLACEHOLDER)
        alone.append(count == 0)
        entries += [Entry(vectors=torch.cat([next(images), objects])) for _ in range(count or 1)]
    batch = ClassicBatch(
        model,
        inputs["input_ids"],
        {IMAGE_PLACEHOLDER: entries},
        attention_mask=inputs.get("attention_mask"),
        labels=inputs.get("labels"),
    )
    with torch.no_grad():
        embeds = batch.embeds()
    found = {
        "inputs_embeds": embeds * batch.meaningful(),
        "labels": batch.targets,
        "attention_mask": batch.attention,
        "position_ids": positions_of(batch.attention),
    }
    real = [row for row, lone in enumerate(alone) for row in ([row, None] if lone else [row])]
    tensors = {name: _with_empty_rows(tensor, real) for name, tensor in found.items()}
    there = torch.tensor([row is not None for row in real])
    mask = {name: there.reshape(-1, *[1] * (tensor.dim() - 1)) for name, tensor in tensors.items()}
    return Result(tensors=tensors, mask=mask | {"position_ids": tensors["attention_mask"].bool()})


def _with_empty_rows(tensor: Tensor, rows: list[int | None]) -> Tensor:
    return torch.stack([torch.zeros_like(tensor[0]) if row is None else tensor[row] for row in rows])


def end_to_end(case: Case) -> Iterator[Example]:
    """Spliced embeddings, labels, mask, logits and loss of a whole model."""
    config, inputs = case.config, case.tensors
    frame = config.get("box_frame", FRAME)
    clip = check_keys(config["clip"], CLIPVisionConfig().to_dict(), "config.clip")
    raw = {
        "model_type": "mg_llava",
        "llm": {"model_type": "llama", **config["llama"]},
        "visual_encoder": {"model_type": "clip_vision_model", **clip},
        "visual_encoder_aux": {"model_type": "convnext", **convnext_options(config["convnext"])},
        "image_size": inputs["pixel_values"].shape[-1],
        "image_size_aux": inputs["pixel_values_aux"].shape[-1],
        "box_rules": {"frame": frame, "rounded": False},
    }
    model = published_model(raw, case.weights())
    low, high = inputs["pixel_values"], inputs["pixel_values_aux"]
    entries = []
    for number, (small, large) in enumerate(zip(low, high, strict=True)):
        rows, columns = large.shape[-2:]
        fractions = (inputs[f"boxes{number}"].double() / frame).tolist()
        boxes = tuple(to_corners(box, "fraction_corners", (columns, rows)) for box in fractions)
        views = (View(*small.shape[-2:]), View(rows, columns, encoder=1, regions=boxes or (NOTHING.box,)))
        size = MediaSize(1, frame, frame)
        own = {"plan": Plan("image", size, views), "regions": inputs[f"boxes{number}"].double()}
        entries.append(Entry("image", size, [small, large], **own))
    batch = ClassicBatch(
        model,
        inputs["input_ids"],
        {IMAGE_PLACEHOLDER: entries},
        attention_mask=inputs.get("attention_mask"),
        labels=inputs.get("labels"),
    )
    yield from batch.examples()


def collate(case: Case) -> Result:
    """Padded ids and labels."""
    batch = Collator(0)([dict(sample) for sample in case.inputs["samples"]])
    mask = batch.pop("attention_mask")
    return Result(
        tensors=batch | {"position_ids": positions_of(mask)},
        mask={"position_ids": mask.bool()},
        ignored={"attention_mask": "the original attends to padding; llavakit masks it"},
    )


def flops(case: Case) -> Result:
    """Section 12."""
    return Result(json=golden_flops(), ignored={"convention": "words"})


ADAPTERS = {
    "conv_gate_fusion": conv_gate_fusion,
    "roi_align": roi_components,
    "object_tokens": object_tokens,
    "convnext_pyramid": convnext_pyramid,
    "box_pipeline": box_pipeline,
    "box_generator": box_generator,
    "nms": nms,
    "pixels": pixels,
    "splice": splice,
    "end_to_end": end_to_end,
    "collate": collate,
    "flops": flops,
    **parity_text.ADAPTERS,
}
