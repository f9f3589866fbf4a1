"""What MG-LLaVA costs at its published dimensions (spec section 12, Vicuna-7B, one image, no text)."""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from llavakit.connectors.general import MLP
from llavakit.proof.cost import (
    CostReport,
    count,
    language_model,
    module_flops,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
)
from llavakit.systems.mg_llava.checkpoint import CONVNEXT
from llavakit.systems.mg_llava.connector import ConvGate, ObjectProjector
from llavakit.systems.mg_llava.encoder import ConvNextPyramid, ConvNextPyramidConfig
from llavakit.vision.known import KNOWN_ENCODERS

VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LOW, HIGH, HIDDEN, GRID, PIXELS = 1024, 1536, 4096, 24, 768
BOXES = (0, 10, 50, 100)
PYRAMID_BYTES = 4


def _known(name: str) -> dict[str, object]:
    return {key: value for key, value in KNOWN_ENCODERS[name].items() if key != "model_type"}


@functools.cache
def convnext() -> ConvNextPyramid:
    """The high-resolution encoder on the meta device."""
    return on_meta(lambda: ConvNextPyramid(ConvNextPyramidConfig(**_known(CONVNEXT))))


@functools.cache
def vicuna() -> nn.Module:
    """The language model on the meta device."""
    return language_model(LlamaConfig(**VICUNA_7B))


@functools.cache
def golden_flops() -> dict[str, int]:
    """Every figure of section 12."""
    clip = vision_flops(CLIPVisionConfig(**_known("openai/clip-vit-large-patch14-336"))).total
    pixels = torch.empty(1, 3, PIXELS, PIXELS, device="meta")
    high = count(lambda: convnext().features(pixels)).total
    fuse = on_meta(lambda: ConvGate(LOW, HIGH))
    fusion = module_flops(fuse, (1, LOW, GRID, GRID), (1, HIGH, GRID, GRID)).total
    tokens = GRID * GRID
    mlp = on_meta(lambda: MLP(vision_width=LOW, hidden_size=HIDDEN))
    image = torch.empty(tokens, LOW, device="meta")
    projector = count(lambda: mlp.project(image)).total
    objects = on_meta(lambda: ObjectProjector(convnext().config.region_width, HIDDEN))
    found = {
        "clip_336": clip,
        "convnext_768": high,
        "conv_gate_fusion": fusion,
        "projector_576": projector,
        "fusion_parameters": parameters(fuse),
        "bbox_projector_parameters_4096": parameters(objects),
        "llava15_7b_336": clip + projector + prefill_flops(vicuna(), tokens).total,
    }
    for boxes in BOXES:
        vectors = torch.empty(boxes, convnext().config.region_width, device="meta")
        own = count(lambda vectors=vectors: objects(vectors)).total if boxes else 0
        llm = prefill_flops(vicuna(), tokens + boxes).total
        found[f"mg_7b_{boxes}_boxes"] = clip + high + fusion + projector + own + llm
    return found


def cost() -> CostReport:
    """Section 12 as a report."""
    report, found = CostReport("mg-llava"), golden_flops()
    group = "encoders and connector"
    report.add("CLIP ViT-L/14, 336 x 336", found["clip_336"], "FLOPs", group=group)
    report.add("ConvNeXt-L, 768 x 768", found["convnext_768"], "FLOPs", group=group)
    report.add("Conv-Gate", found["conv_gate_fusion"], "FLOPs", group=group)
    report.add("Conv-Gate", found["fusion_parameters"], "parameters", group=group)
    report.add("projector of 576 image tokens", found["projector_576"], "FLOPs", group=group)
    report.add("projector of boxes", found["bbox_projector_parameters_4096"], "parameters", group=group)
    side = PIXELS // convnext().config.patch_size
    pyramid = convnext().config.region_width * side * side * PYRAMID_BYTES
    report.add("stages as one map, which llavakit never forms", pyramid, "bytes", group=group)
    group = "Vicuna-7B, prefill of one image"
    report.add("LLaVA-1.5-7B", found["llava15_7b_336"], "FLOPs", group=group)
    for boxes in BOXES:
        report.add(f"MG-LLaVA-7B with {boxes} boxes", found[f"mg_7b_{boxes}_boxes"], "FLOPs", group=group)
        report.add(f"sequence with {boxes} boxes", GRID * GRID + boxes, "tokens", group=group)
    report.notes.append("The detector that finds the boxes is not counted.")
    return report
