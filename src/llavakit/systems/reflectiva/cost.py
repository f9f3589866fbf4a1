"""What ReflectiVA costs at its published dimensions, and what a shared prefix saves."""

from __future__ import annotations

from functools import cache

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.proof.cost import (
    CostReport,
    cache_bytes,
    count,
    language_model,
    module_flops,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
    vision_model,
)
from llavakit.vision.known import KNOWN_ENCODERS

LLAMA_3_1 = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
PATCHES = 576
PREFIX, PASSAGE, PASSAGES = 640, 300, 40


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("reflectiva")
    named = KNOWN_ENCODERS["openai/clip-vit-large-patch14-336"]
    clip = CLIPVisionConfig(**{key: value for key, value in named.items() if key != "model_type"})
    model = language_model(LLAMA_3_1)
    projector = on_meta(lambda: MLP(vision_width=clip.hidden_size, hidden_size=LLAMA_3_1.hidden_size))
    group = "parameters"
    sizes = [parameters(part) for part in (model, vision_model(clip), projector)]
    for name, size in zip(("language model", "vision tower", "projector"), sizes, strict=True):
        report.add(name, size, "parameters", group=group)
    report.add("together", sum(sizes), "parameters", group=group)

    group = "a picture"
    picture = vision_flops(clip, layer=-2).total
    report.add("vision tower, 24 layers", vision_flops(clip).total, "FLOPs", group=group)
    report.add("vision tower, the 23 layers that are read", picture, "FLOPs", group=group)
    side = clip.image_size // clip.patch_size
    features = Features(torch.empty(PATCHES, clip.hidden_size, device="meta"), [(1, side, side)], [0])
    projected = count(lambda: projector(features, [])).total
    report.add("projector on 576 tokens", projected, "FLOPs", group=group)

    @cache
    def body(tokens: int) -> int:
        return prefill_flops(model, tokens, head=False).total

    head = module_flops(model.lm_head, (1, 1, LLAMA_3_1.hidden_size)).total
    group = "a prompt"
    for tokens in (640, 1024):
        report.add(f"{tokens} positions, all logits", body(tokens) + tokens * head, "FLOPs", group=group)
        report.add(f"{tokens} positions, the last logits", body(tokens) + head, "FLOPs", group=group)
    report.add("1 position", body(1) + head, "FLOPs", group=group)
    report.add("keys and values of a position, 16 bit", cache_bytes(LLAMA_3_1, 1), "bytes", group=group)

    group = f"a question with {PASSAGES} passages of {PASSAGE} tokens behind {PREFIX} positions"
    whole = body(PREFIX + PASSAGE) + head
    original = (PASSAGES + 2) * (whole + picture + projected)
    shared = body(PREFIX) + head + picture + projected + (PASSAGES + 1) * (whole - body(PREFIX))
    report.add(f"{PASSAGES + 2} whole prompts, as the original", original, "FLOPs", group=group)
    report.add("one prefix, passages and answer behind it", shared, "FLOPs", group=group)
    report.add("of the original's", 100 * shared / original, "%", group=group)
    report.notes.append(
        "The original also decodes up to 127 tokens for every judgement and reads the first; they are not counted."
    )
    report.notes.append("The answer is counted as one prompt with one passage.")
    return report
