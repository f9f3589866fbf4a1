"""What MedM-VL costs at its published dimensions (spec section 12)."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from llavakit.connectors.general import Pooling
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
from llavakit.systems.medm_vl.checkpoint import KNOWN_LLMS
from llavakit.systems.medm_vl.connector import AttentionPooling
from llavakit.systems.medm_vl.encoders import M3DClipConfig, M3DClipVision
from llavakit.vision.known import KNOWN_ENCODERS

SLICES, PATCHES, QUERIES, WIDTH, HIDDEN = 32, 256, 256, 768, 2048


def _without(options: dict, *keys: str) -> dict:
    return {key: value for key, value in options.items() if key not in keys}


def siglip_head_flops() -> int:
    """The pooling head, which the connector never reads: one query over all tokens, then an MLP."""
    kv = 2 * 2 * PATCHES * WIDTH * WIDTH
    query_and_out = 2 * 2 * WIDTH * WIDTH
    return kv + query_and_out + 2 * 2 * PATCHES * WIDTH + 2 * 2 * WIDTH * 4 * WIDTH


def m3d_flops() -> int:
    """M3D-CLIP's vision transformer on one volume."""
    config = M3DClipConfig()
    tokens = config.patches + 1
    embedding = 2 * config.patches * config.patch_values * WIDTH
    linear = 2 * tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * config.intermediate_size)
    return embedding + config.num_hidden_layers * (linear + 4 * tokens * tokens * WIDTH)


def attention_pooling_flops() -> tuple[int, int]:
    """(attention, MLP) of pooling all slices' tokens to 256."""
    tokens = SLICES * PATCHES
    attention = 2 * WIDTH * WIDTH * (2 * QUERIES + 2 * tokens) + 4 * QUERIES * tokens * WIDTH
    net = on_meta(lambda: AttentionPooling(vision_width=WIDTH, hidden_size=HIDDEN, queries=QUERIES))
    mlp = count(lambda: net.project(torch.empty(QUERIES, WIDTH, device="meta"))).total
    return attention, mlp


def cost() -> CostReport:
    """Section 12 as a report."""
    report = CostReport("medm-vl")
    siglip = SiglipVisionConfig(**_without(KNOWN_ENCODERS["google/siglip-base-patch16-256-multilingual"], "model_type"))
    group = "encoders"
    report.add("SigLIP base 256, with its head", parameters(vision_model(siglip)), "parameters", group=group)
    image = vision_flops(siglip).total
    report.add("SigLIP base on one image, without the head", image, "FLOPs", group=group)
    report.add("SigLIP base on one image, with the head", image + siglip_head_flops(), "FLOPs", group=group)
    report.add("SigLIP base on 32 slices", SLICES * image, "FLOPs", group=group)
    encoder = on_meta(lambda: M3DClipVision(M3DClipConfig()))
    report.add("M3D-CLIP", parameters(encoder), "parameters", group=group)
    report.add("M3D-CLIP on one volume", m3d_flops(), "FLOPs", group=group)
    group = "connectors, 768 to 2048"
    pooled = on_meta(lambda: AttentionPooling(vision_width=WIDTH, hidden_size=HIDDEN, queries=QUERIES))
    attention, mlp = attention_pooling_flops()
    report.add("attention pooling and MLP", parameters(pooled), "parameters", group=group)
    report.add("attention pooling, 8192 to 256 tokens: attention", attention, "FLOPs", group=group)
    report.add("attention pooling, 8192 to 256 tokens: MLP", mlp, "FLOPs", group=group)
    spatial = on_meta(lambda: Pooling(vision_width=WIDTH, hidden_size=HIDDEN, stride=[2, 2, 2]))
    report.add("spatial pooling and MLP", parameters(spatial), "parameters", group=group)
    group = "Qwen2.5-3B"
    qwen = language_model(Qwen2Config(**_without(KNOWN_LLMS["Qwen/Qwen2.5-3B-Instruct"], "model_type")))
    report.add("language model", parameters(qwen), "parameters", group=group)
    head = 2 * HIDDEN * 151936
    for tokens, what in ((320, "256 visual"), (2112, "2048 visual"), (8256, "8192 unpooled slice tokens")):
        flops = prefill_flops(qwen, tokens, head=False).total + head
        report.add(f"prefill of {tokens} tokens ({what} + 64)", flops, "FLOPs", group=group)
    group = "visual tokens"
    for name, tokens in (
        ("2D image", 256),
        ("attention pooling", 256),
        ("spatial pooling", 256),
        ("M3D-CLIP and MLP", 2048),
    ):
        report.add(name, tokens, "tokens", group=group)
    report.notes.append("Prefill counts the head at the last position only.")
    return report
