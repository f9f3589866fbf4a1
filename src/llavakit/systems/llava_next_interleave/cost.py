"""What LLaVA-NeXT-Interleave costs at its published dimensions (spec section 12), beside LLaVA-1.5."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config

from llavakit.checkpoints.siglip_qwen import kept_siglip
from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.proof import cost as proof
from llavakit.proof.cost import (
    CostReport,
    cache_bytes,
    count,
    language_model,
    on_meta,
    parameters,
    vision_flops,
    vision_model,
)
from llavakit.systems.llava_next_interleave.checkpoint import InterleaveLayout
from llavakit.views.plan import MediaSize

CURRENT = {"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad"}
EARLIER = {
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
}
QWEN1_5 = {
    "0.5B": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
    },
    "14B": {
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 152064,
    },
}
VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SIDE = 27
VIEW = SIDE * SIDE
IMAGES, DEMO_FRAMES, POOLED_FRAMES = 10, 16, 40


def tokens_of(modality: str, size: MediaSize, **settings: Any) -> int:
    """Visual tokens of one media item."""
    media = InterleaveLayout().media(CURRENT | settings, 384)[modality]
    return proof.views_and_tokens(media, size, SIDE)[1]


def body_flops(size: str, tokens: int) -> int:
    """All decoder layers on a prompt of visual tokens alone, without the head."""
    return proof.body_flops(Qwen2Config, QWEN1_5[size], tokens)


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("llava-next-interleave")
    siglip = kept_siglip()
    group = "vision: SigLIP so400m, 26 layers"
    report.add("parameters", parameters(vision_model(siglip)), "parameters", group=group)
    report.add("one view of 384 px", vision_flops(siglip).total, "FLOPs", group=group)
    one, square = MediaSize(1, 384, 384), MediaSize(1, 768, 768)
    image = tokens_of("multi_image", one)
    demo = tokens_of("video", MediaSize(DEMO_FRAMES, 384, 384))
    pooled = {
        mode: tokens_of("video", MediaSize(POOLED_FRAMES, 384, 384), mm_spatial_pool_mode=mode)
        for mode in ("average", "bilinear")
    }
    group = "visual tokens"
    report.add("one 384 x 384 image", image, "tokens", group=group)
    report.add(
        "one among several, files with a newline", tokens_of("multi_image", one, **EARLIER), "tokens", group=group
    )
    report.add("one alone, 768 x 768, files with tiles", tokens_of("image", square, **EARLIER), "tokens", group=group)
    report.add(f"{IMAGES} images", IMAGES * image, "tokens", group=group)
    report.add(f"{DEMO_FRAMES} frames of the demo, not pooled", demo, "tokens", group=group)
    for mode, tokens in pooled.items():
        report.add(f"{POOLED_FRAMES} frames, {mode} pooling", tokens, "tokens", "nominally 7,290", group)
    prompts = {
        f"one image, {image} tokens": image,
        f"{IMAGES} images": IMAGES * image,
        f"{DEMO_FRAMES} frames": demo,
        f"{POOLED_FRAMES} frames, bilinear": pooled["bilinear"],
    }
    for size, dims in QWEN1_5.items():
        config = Qwen2Config(**dims)
        group = f"Qwen1.5-{size}"
        projector = on_meta(lambda h=config.hidden_size: MLP(vision_width=siglip.hidden_size, hidden_size=h))
        report.add("connector", parameters(projector), "parameters", group=group)
        features = Features(torch.empty(VIEW, siglip.hidden_size, device="meta"), [(1, SIDE, SIDE)], [0])
        flops = count(lambda p=projector, f=features: p(f, [])).total
        report.add("connector on one view", flops, "FLOPs", group=group)
        report.add("language model", parameters(language_model(config)), "parameters", group=group)
        for name, tokens in prompts.items():
            report.add(f"layers on {name}", body_flops(size, tokens), "FLOPs", group=group)
        if size == "7B":
            for name, tokens in prompts.items():
                report.add(f"cache of {name}, 16 bit", cache_bytes(config, tokens), "bytes", group=group)
    group = "one image on LLaVA-1.5-7B"
    report.add("tokens", 576, "tokens", group=group)
    body = proof.body_flops(LlamaConfig, VICUNA, 576)
    report.add("language model's layers", body, "FLOPs", group=group)
    report.notes = [
        "Language model: decoder layers without the head, visual tokens alone, the full square of attention.",
        "The 14B of the paper was not released; its dimensions are Qwen1.5-14B's.",
    ]
    return report
