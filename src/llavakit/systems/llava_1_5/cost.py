"""What LLaVA-1.5 costs at its published dimensions (spec section 12)."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.proof.cost import (
    CostReport,
    cache_bytes,
    count,
    language_model,
    lora_parameters,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
    vision_model,
)
from llavakit.registry import PLANNERS
from llavakit.splice.tiles import SpatialUnpad
from llavakit.views.plan import MediaSize
from llavakit.vision.known import KNOWN_ENCODERS

VICUNA = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PATCHES = 576


def encoder() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 px."""
    return CLIPVisionConfig(
        **{k: v for k, v in KNOWN_ENCODERS["openai/clip-vit-large-patch14-336"].items() if k != "model_type"}
    )


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("llava-1.5")
    clip = encoder()
    group = "vision: CLIP ViT-L/14"
    report.add("parameters", parameters(vision_model(clip)), "parameters", group=group)
    report.add("336 px, 24 layers", vision_flops(clip).total, "FLOPs", group=group)
    report.add("336 px, the 23 layers that are read", vision_flops(clip, layer=-2).total, "FLOPs", group=group)
    small = encoder()
    small.image_size = 224
    report.add("224 px, 24 layers", vision_flops(small).total, "FLOPs", group=group)
    for size, dims in VICUNA.items():
        config = LlamaConfig(**dims, vocab_size=32000)
        model = language_model(config)
        projector = on_meta(lambda h=config.hidden_size: MLP(vision_width=1024, hidden_size=h))
        features = Features(torch.empty(PATCHES, 1024, device="meta"), [(1, 24, 24)], [0])
        group = f"Vicuna-{size}"
        report.add("connector", parameters(projector), "parameters", group=group)
        flops = count(lambda p=projector, f=features: p(f, []))
        report.add("connector on 576 tokens", flops.total, "FLOPs", group=group)
        report.add("language model", parameters(model), "parameters", group=group)
        for tokens in (64, 256, 640) if size == "7B" else (640,):
            report.add(f"prefill of {tokens} tokens", prefill_flops(model, tokens).total, "FLOPs", group=group)
        report.add("cache of one token, 16 bit", cache_bytes(config, 1), "bytes", group=group)
        report.add("cache of one image, 16 bit", cache_bytes(config, PATCHES), "bytes", group=group)
        report.add("trained in stage 1", parameters(projector), "parameters", group=group)
        if size == "7B":
            report.add("LoRA of rank 128", lora_parameters(model, 128), "parameters", group=group)
    group = "tokens of an image"
    report.add("336 px", PATCHES, "tokens", group=group)
    report.add("224 px", (224 // clip.patch_size) ** 2, "tokens", group=group)
    plan = PLANNERS.build({"type": "anyres", "size": 336, "pinpoints": PINPOINTS}).plan(MediaSize(1, 672, 672))
    layout = SpatialUnpad().layout(plan, [(1, 24, 24)] * len(plan.views))
    report.add("672 x 672 tiled, unpadded", sum(run.visual for run in layout), "tokens", group=group)
    return report
