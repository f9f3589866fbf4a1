"""What LLaVA-OneVision costs at its published dimensions (spec section 12), beside LLaVA-1.5."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config

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
from llavakit.systems.llava_onevision.checkpoint import media_of
from llavakit.views.plan import MediaSize
from llavakit.vision.known import KNOWN_ENCODERS

SETTINGS = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9"}
QWEN2 = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "72B": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
PROJECTOR_IN_PAPER = {"0.5B": "1.8 M", "7B": "20.0 M", "72B": "72.0 M"}
VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SIDE = 27
VIEW = SIDE * SIDE
FRAMES = 32
IMAGES = 12  # most images of a training sample
LARGEST, LONGEST = (2304, 2304), (1123, 1362)  # width and height; most pixels kept, most tokens


def views_and_tokens(width: int, height: int, ratio: str = "anyres_max_9") -> tuple[int, int]:
    """Views and visual tokens of one image."""
    media = media_of(SETTINGS | {"image_aspect_ratio": ratio}, 384)["image"]
    return proof.views_and_tokens(media, MediaSize(1, height, width), SIDE)


def video_tokens(frames: int, newline: str = "one_token") -> int:
    """Visual tokens of a video."""
    media = media_of(SETTINGS | {"mm_newline_position": newline}, 384)["video"]
    return proof.views_and_tokens(media, MediaSize(frames, 384, 384), SIDE)[1]


def body_flops(size: str, tokens: int) -> int:
    """All decoder layers on a prompt of visual tokens alone, without the head."""
    return proof.body_flops(Qwen2Config, QWEN2[size], tokens)


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("llava-onevision")
    siglip = kept_siglip()
    view = vision_flops(siglip).total
    group = "vision: SigLIP so400m, 26 layers"
    report.add("parameters", parameters(vision_model(siglip)), "parameters", group=group)
    report.add("one view of 384 px", view, "FLOPs", group=group)
    _tokens(report)
    prompts = {
        f"one view, {VIEW} tokens": VIEW,
        "384 x 384 image": views_and_tokens(384, 384)[1],
        "768 x 768 image": views_and_tokens(768, 768)[1],
        f"{FRAMES} frames": video_tokens(FRAMES),
        "1152 x 1152 image": views_and_tokens(1152, 1152)[1],
        "the longest image": views_and_tokens(*LONGEST)[1],
    }
    for size, dims in QWEN2.items():
        config = Qwen2Config(**dims)
        group = f"Qwen2-{size}"
        projector = on_meta(lambda h=config.hidden_size: MLP(vision_width=siglip.hidden_size, hidden_size=h))
        report.add("connector", parameters(projector), "parameters", PROJECTOR_IN_PAPER[size], group)
        features = Features(torch.empty(VIEW, siglip.hidden_size, device="meta"), [(1, SIDE, SIDE)], [0])
        flops = count(lambda p=projector, f=features: p(f, [])).total
        report.add("connector on one view", flops, "FLOPs", group=group)
        report.add("language model", parameters(language_model(config)), "parameters", group=group)
        for name, tokens in prompts.items():
            report.add(f"layers on {name}", body_flops(size, tokens), "FLOPs", group=group)
        if size == "7B":
            for name, tokens in prompts.items():
                report.add(f"cache of {name}, 16 bit", cache_bytes(config, tokens), "bytes", group=group)
    _compared(report, view)
    report.notes = [
        "Language model: decoder layers without the head, visual tokens alone, the full square of attention.",
        "Paper, table 1: 20.0 M and 72.0 M are what it prints for the connectors of 7B and 72B.",
    ]
    return report


def _tokens(report: CostReport) -> None:
    group = "visual tokens"
    for side in (384, 768, 1152):
        report.add(f"{side} x {side} image", views_and_tokens(side, side)[1], "tokens", group=group)
    views, tokens = views_and_tokens(*LARGEST)
    report.add("2304 x 2304 image", tokens, "tokens", "at most 7,290", group)
    report.add("  its views", views, "views", group=group)
    report.add("  its views through the encoder", views * vision_flops(kept_siglip()).total, "FLOPs", group=group)
    report.add("  without a budget", views_and_tokens(*LARGEST, ratio="anyres")[1], "tokens", group=group)
    report.add("the longest image, 1123 x 1362", views_and_tokens(*LONGEST)[1], "tokens", "at most 7,290", group)
    report.add("one image among several", VIEW + 1, "tokens", group=group)
    report.add(f"{IMAGES} images", IMAGES * (VIEW + 1), "tokens", group=group)
    report.add(f"{FRAMES} frames", video_tokens(FRAMES), "tokens", group=group)
    report.add(f"{FRAMES} frames with a newline per row", video_tokens(FRAMES, "grid"), "tokens", group=group)


def _compared(report: CostReport, view: int) -> None:
    """A 672 x 672 image on both systems, 7B."""
    clip = CLIPVisionConfig(
        **{k: v for k, v in KNOWN_ENCODERS["openai/clip-vit-large-patch14-336"].items() if k != "model_type"}
    )
    group = "a 672 x 672 image, 7B"
    views, tokens = views_and_tokens(672, 672)
    report.add("LLaVA-1.5: tokens", 576, "tokens", group=group)
    report.add("LLaVA-1.5: encoder", vision_flops(clip, layer=-2).total, "FLOPs", group=group)
    body = proof.body_flops(LlamaConfig, VICUNA, 576)
    report.add("LLaVA-1.5: language model's layers", body, "FLOPs", group=group)
    report.add("LLaVA-OneVision: tokens", tokens, "tokens", group=group)
    report.add("LLaVA-OneVision: encoder", views * view, "FLOPs", group=group)
    report.add("LLaVA-OneVision: language model's layers", body_flops("7B", tokens), "FLOPs", group=group)
