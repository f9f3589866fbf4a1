"""What LLaVA-Rad costs at its published dimensions (spec section 12)."""

from __future__ import annotations

import torch
from transformers import Dinov2Config, LlamaConfig

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
from llavakit.systems.llava_rad.checkpoint import ENCODER

VICUNA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
RANK, TEXT, LLAVA_1_5 = 64, 64, 576 + 64
HALF = 2  # bytes of a value of 16 bits


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("llava-rad")
    config = Dinov2Config(**{key: value for key, value in ENCODER.items() if key != "model_type"})
    encoder = vision_model(config)
    side = config.image_size // config.patch_size
    tokens = side**2
    group = "vision: BiomedCLIP-CXR, ViT-B/14 at 518 px"
    unused = encoder.embeddings.mask_token.numel()  # transformers' class has it; timm's and the published file do not
    report.add("parameters", parameters(encoder) - unused, "parameters", group=group)
    report.add("12 layers", vision_flops(config).total, "FLOPs", group=group)
    report.add("the 11 layers that are read", vision_flops(config, layer=-2).total, "FLOPs", group=group)
    report.add("tokens of an image", tokens, "tokens", group=group)
    group = "Vicuna-7B"
    connector = on_meta(lambda: MLP(vision_width=config.hidden_size, hidden_size=VICUNA_7B.hidden_size))
    features = Features(torch.empty(tokens, config.hidden_size, device="meta"), [(1, side, side)], [0])
    report.add("connector", parameters(connector), "parameters", group=group)
    report.add(f"connector on {tokens} tokens", count(lambda: connector(features, [])).total, "FLOPs", group=group)
    model = language_model(VICUNA_7B)
    for length in (tokens + TEXT, LLAVA_1_5):
        report.add(f"prefill of {length} tokens", prefill_flops(model, length).total, "FLOPs", group=group)
    adapter = lora_parameters(model, RANK)
    report.add(f"LoRA of rank {RANK}", adapter, "parameters", group=group)
    report.add(f"LoRA of rank {RANK}, 16 bit", adapter * HALF, "bytes", group=group)
    report.add("cache of one image, 16 bit", cache_bytes(VICUNA_7B, tokens), "bytes", group=group)
    report.add("language model, 16 bit", parameters(model) * HALF, "bytes", group=group)
    report.add("encoder, 16 bit", (parameters(encoder) - unused) * HALF, "bytes", group=group)
    report.notes.append(
        f"{LLAVA_1_5} tokens are LLaVA-1.5's prompt: the encoder is 3.5 times smaller, the prompt 2.2 times longer."
    )
    return report
