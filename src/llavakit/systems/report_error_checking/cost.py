"""What checking a draft costs at published scale (spec section 12): one prefill of LLaVA-1.5-7B, and of an ensemble."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.proof.cost import (
    CostReport,
    count,
    language_model,
    lora_parameters,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
)
from llavakit.vision.known import KNOWN_ENCODERS

VISUAL, TEXT, MEMBERS = 576, 200, 3
VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def cost() -> CostReport:
    """Section 12 as a report."""
    report = CostReport("report-error-checking")
    clip = CLIPVisionConfig(
        **{k: v for k, v in KNOWN_ENCODERS["openai/clip-vit-large-patch14-336"].items() if k != "model_type"}
    )
    config = LlamaConfig(**VICUNA_7B, vocab_size=32000)
    model = language_model(config)
    projector = on_meta(lambda: MLP(vision_width=clip.hidden_size, hidden_size=config.hidden_size))
    positions = VISUAL + TEXT
    tower = vision_flops(clip).total
    features = Features(torch.empty(VISUAL, clip.hidden_size, device="meta"), [(1, 24, 24)], [0])
    connector = count(lambda: projector(features, [])).total
    layers = prefill_flops(model, positions, head=False).total
    head = 2 * config.hidden_size * config.vocab_size
    group = f"a check by one member: {VISUAL} visual and {TEXT} text tokens"
    report.add("layers", layers, "FLOPs", group=group)
    report.add("logits of the answer", head, "FLOPs", group=group)
    report.add("prefill", layers + head, "FLOPs", group=group)
    report.add("vision tower", tower, "FLOPs", group=group)
    report.add("connector", connector, "FLOPs", group=group)
    group = f"an ensemble of {MEMBERS}"
    one = layers + head + tower + connector
    report.add("members that share nothing", MEMBERS * one, "FLOPs", group=group)
    shared = MEMBERS * (layers + head) + tower + connector
    report.add("members with one vision tower and connector", shared, "FLOPs", group=group)
    group = "a report of an evaluation"
    report.add("questions: own, blank and swapped picture, both levels", 6, "calls", group=group)
    report.add("LoRA of rank 128", lora_parameters(model, 128), "parameters", group="training")
    report.add("connector", parameters(projector), "parameters", group="training")
    report.notes = ["The paper has no claim about cost."]
    return report
