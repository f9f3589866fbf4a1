"""What Surgical-LLaVA costs at published dimensions (spec section 12; the language model is LLaMA-7B)."""

from __future__ import annotations

from functools import cache

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llavakit.connectors.base import Features
from llavakit.proof.cost import (
    CostReport,
    count,
    language_model,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
)
from llavakit.systems.surgical_llava.connector import SLOTS, SpatioTemporal, pool
from llavakit.vision.known import KNOWN_ENCODERS

WIDTH, HIDDEN, FRAMES, PATCHES = 1024, 4096, 100, 256
VIDEO_LLAVA = 2056  # tokens of a clip there: 8 frames of 257
VICUNA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


@cache
def _decoder() -> torch.nn.Module:
    return language_model(LlamaConfig(**VICUNA))


def prefill(tokens: int) -> int:
    """FLOPs of a prompt, with the logits of its last position alone."""
    head = count(lambda: _decoder().lm_head(torch.empty(1, 1, HIDDEN, device="meta")))
    return (prefill_flops(_decoder(), tokens, head=False) + head).total


def figures() -> dict[str, int]:
    """Every figure of section 12."""
    known = KNOWN_ENCODERS["openai/clip-vit-large-patch14"]
    clip = CLIPVisionConfig(**{key: value for key, value in known.items() if key != "model_type"})
    connector = on_meta(lambda: SpatioTemporal(vision_width=WIDTH, hidden_size=HIDDEN))
    frames = torch.empty(FRAMES, PATCHES, WIDTH, device="meta")
    features = Features(frames.flatten(0, 1), [(1, 16, 16)] * FRAMES, [0] * FRAMES)
    tokens = len(pool(frames, SLOTS))
    frame = vision_flops(clip).total
    return {
        "frame": frame,
        "frames": FRAMES * frame,
        "frame_23": vision_flops(clip, layer=-2).total,
        "pooling": 2 * frames.numel(),  # every value is added once to each of two means
        "tokens": tokens,
        "projection": count(lambda: connector(features, [None])).total,
        "projection_parameters": parameters(connector),
        "prefill": prefill(tokens),
        "prefill_video_llava": prefill(VIDEO_LLAVA),
        "tokens_without_pooling": FRAMES * PATCHES,
        "stored_bytes": tokens * WIDTH * torch.float16.itemsize,
        "stored_bytes_without_pooling": frames.numel() * torch.float16.itemsize,
    }


def cost() -> CostReport:
    """Section 12 as a report."""
    report, found = CostReport("surgical-llava"), figures()
    group = "encoder"
    report.add("CLIP ViT-L/14, one frame, all 24 layers", found["frame"], "FLOPs", group=group)
    report.add("one frame, the 23 layers that are read", found["frame_23"], "FLOPs", group=group)
    report.add("100 frames, all layers", found["frames"], "FLOPs", group=group)
    group = "connector"
    report.add("pooling", found["pooling"], "additions", group=group)
    report.add("tokens of a clip", found["tokens"], "tokens", group=group)
    report.add("without pooling", found["tokens_without_pooling"], "tokens", group=group)
    report.add("projection", found["projection"], "FLOPs", group=group)
    report.add("projection", found["projection_parameters"], "parameters", group=group)
    group = "language model"
    report.add("prefill of the clip's tokens", found["prefill"], "FLOPs", group=group)
    report.add("prefill of Video-LLaVA's 2056 tokens", found["prefill_video_llava"], "FLOPs", group=group)
    group = "on disk"
    report.add("pooled features of a clip, float16", found["stored_bytes"], "bytes", group=group)
    report.add("features of all its frames", found["stored_bytes_without_pooling"], "bytes", group=group)
    report.notes.append("Short clips cost the same: free slots are filled with zeros.")
    return report
