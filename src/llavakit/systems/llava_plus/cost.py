"""What LLaVA-Plus costs at published dimensions (spec section 12; 7B v0 on 224 px)."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.proof.cost import (
    CostReport,
    count,
    language_model,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
    vision_model,
)
from llavakit.vision.known import KNOWN_ENCODERS

VICUNA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32001,
}
PATCHES = 256
CALL, RESULT = 75, 40  # tokens of an ordinary tool turn: what is written, and two boxes that are told
QUESTION = 80


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("llava-plus")
    known = KNOWN_ENCODERS["openai/clip-vit-large-patch14"]
    clip = CLIPVisionConfig(**{key: value for key, value in known.items() if key != "model_type"})
    group = "vision: CLIP ViT-L/14 at 224 px"
    report.add("parameters", parameters(vision_model(clip)), "parameters", group=group)
    report.add("24 layers", vision_flops(clip).total, "FLOPs", group=group)
    report.add("the 23 layers that are read", vision_flops(clip, layer=-2).total, "FLOPs", group=group)
    projector = on_meta(lambda: MLP(vision_width=1024, hidden_size=4096, depth=1))
    features = Features(torch.empty(PATCHES, 1024, device="meta"), [(1, 16, 16)], [0])
    report.add("parameters", parameters(projector), "parameters", group="linear projector")
    report.add("one image", count(lambda: projector(features, [])).total, "FLOPs", group="linear projector")
    model = language_model(LlamaConfig(**VICUNA))
    group = "LLaMA-7B, logits at every position"
    report.add("parameters", parameters(model), "parameters", group=group)
    for text in (80, 400):
        flops = prefill_flops(model, PATCHES + text).total
        report.add(f"prefill of {PATCHES} + {text} tokens", flops, "FLOPs", group=group)
    report.add("prefill of 2048 tokens", prefill_flops(model, 2048).total, "FLOPs", group=group)
    group = "prompts of a turn with a tool"
    first = PATCHES + QUESTION
    second = first + CALL + RESULT + QUESTION
    report.add("the first prompt", first, "tokens", group=group)
    report.add("the second prompt", second, "tokens", group=group)
    report.add("of them computed anew with a prefix cache", second - first - CALL, "tokens", group=group)
    return report
