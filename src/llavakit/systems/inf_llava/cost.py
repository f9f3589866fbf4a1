"""What INF-LLaVA costs at its published dimensions (spec section 12, Llama-3-8B)."""

from __future__ import annotations

import functools

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
)
from llavakit.systems.inf_llava.connector import DualEnhancement
from llavakit.vision.known import KNOWN_ENCODERS

WIDTH, HIDDEN, SIDE, CROPS, PUBLISHED_VIEWS = 1024, 4096, 24, 3, 19
LLAMA_3 = {
    "hidden_size": HIDDEN,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128257,
}


@functools.cache
def vision(pixels: int) -> int:
    """All 24 layers of CLIP ViT-L/14 on a square of `pixels` x `pixels`."""
    known = KNOWN_ENCODERS["openai/clip-vit-large-patch14-336"]
    config = CLIPVisionConfig(**{key: value for key, value in known.items() if key != "model_type"})
    return vision_flops(config, pixels, pixels).total


def _linear(module: torch.nn.Module, tokens: int) -> int:
    return count(lambda: module(torch.empty(tokens, WIDTH, device="meta"))).total


def golden_flops() -> dict[str, object]:
    """Every figure of section 12."""
    dem, cells = on_meta(lambda: DualEnhancement(WIDTH, CROPS)), (CROPS * SIDE) ** 2
    projections = 2 * sum(_linear(linear, cells) for linear in dem.attention.linears)
    groups, tokens = CROPS**2, SIDE**2
    # per group and direction: scores, and the weighted sum; the counter does not see into fused attention
    products = 2 * groups * 2 * 2 * tokens * tokens * WIDTH
    ffn = _linear(dem.ffn_crop, cells) + _linear(dem.ffn_stride, cells)
    whole = 2 * 2 * 2 * cells * cells * WIDTH
    mlp = on_meta(lambda: MLP(vision_width=WIDTH, hidden_size=HIDDEN))
    features = Features(torch.empty(tokens, WIDTH, device="meta"), [(1, SIDE, SIDE)], [0])
    connector = count(lambda: mlp(features, [])).total
    llm = prefill_flops(language_model(LlamaConfig(**LLAMA_3)), tokens).total
    view = vision(336)
    dem_total = projections + products + ffn
    return {
        "vit_24x24": view,
        "vit_19_views": PUBLISHED_VIEWS * view,
        "vit_full_1008_72x72": vision(1008),
        "dem_n3": {"attention_projections": projections, "attention_products": products, "ffn": ffn},
        "dem_n3_total": dem_total,
        "full_resolution_cross_attention_total": projections + whole,
        "dem_parameters": parameters(dem),
        "projector_576": connector,
        "projector_parameters": parameters(mlp),
        "llm_576": llm,
        "total_576_tokens": PUBLISHED_VIEWS * view + dem_total + connector + llm,
        "baseline_llava15_336": view + connector + llm,
    }


def cost() -> CostReport:
    """Section 12 as a report."""
    report, found = CostReport("inf-llava"), golden_flops()
    group = "encoder"
    report.add("CLIP ViT-L/14, one view of 336 x 336", found["vit_24x24"], "FLOPs", group=group)
    report.add("19 views, as published", found["vit_19_views"], "FLOPs", group=group)
    report.add("18 views, as llavakit encodes them", (PUBLISHED_VIEWS - 1) * found["vit_24x24"], "FLOPs", group=group)
    report.add("one view of 1008 x 1008, for comparison", found["vit_full_1008_72x72"], "FLOPs", group=group)
    group = "dual-perspective enhancement"
    for name, value in found["dem_n3"].items():
        report.add(name.replace("_", " "), value, "FLOPs", group=group)
    report.add("together", found["dem_n3_total"], "FLOPs", group=group)
    report.add("cross attention without groups", found["full_resolution_cross_attention_total"], "FLOPs", group=group)
    report.add("parameters", found["dem_parameters"], "parameters", group=group)
    group = "whole model on one image"
    report.add("projector", found["projector_576"], "FLOPs", group=group)
    report.add("projector", found["projector_parameters"], "parameters", group=group)
    report.add("Llama-3-8B, prefill of 576 tokens", found["llm_576"], "FLOPs", group=group)
    report.add("INF-LLaVA-8B", found["total_576_tokens"], "FLOPs", group=group)
    report.add("LLaVA-1.5's recipe with the same language model", found["baseline_llava15_336"], "FLOPs", group=group)
    report.notes.append("The language model sees 576 tokens, as in LLaVA-1.5; the encoder is 45 % of the whole.")
    return report
