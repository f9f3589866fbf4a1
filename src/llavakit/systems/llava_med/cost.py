"""What both generations of LLaVA-Med cost at their published dimensions (spec section 12)."""

from __future__ import annotations

import math

import torch
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig

from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.proof.cost import (
    CostReport,
    cache_bytes,
    count,
    language_model,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
)
from llavakit.vision.known import KNOWN_ENCODERS

LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32004
)
MISTRAL_7B = MistralConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    sliding_window=None,
)
GENERATIONS = (
    ("v1.0", "openai/clip-vit-large-patch14", LLAMA_7B, 1, 2),
    ("v1.5", "openai/clip-vit-large-patch14-336", MISTRAL_7B, 2, 0),
)
TEXT = 64
CAPTIONS, DIALOGUES, EPOCHS, BATCH = 600_000, 60_000, 3, 128


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("llava-med")
    for name, tower, language, depth, marks in GENERATIONS:
        known = KNOWN_ENCODERS[tower]
        encoder = CLIPVisionConfig(**{key: value for key, value in known.items() if key != "model_type"})
        side = encoder.image_size // encoder.patch_size
        tokens = side**2
        options = {"vision_width": encoder.hidden_size, "hidden_size": language.hidden_size, "depth": depth}
        connector = on_meta(lambda options=options: MLP(**options))
        features = Features(torch.empty(tokens, encoder.hidden_size, device="meta"), [(1, side, side)], [0])
        decoder = language_model(language)
        group = f"{name}: CLIP ViT-L/14 at {encoder.image_size} px, {language.model_type} 7B"
        report.add("encoder, 24 layers", vision_flops(encoder).total, "FLOPs", group=group)
        report.add("connector", parameters(connector), "parameters", group=group)
        work = count(lambda connector=connector, features=features: connector(features, []))
        report.add(f"connector on {tokens} tokens", work.linear, "FLOPs", group=group)
        report.add("tokens of an image, marks included", tokens + marks, "tokens", group=group)
        report.add("language model", parameters(decoder), "parameters", group=group)
        length = tokens + marks + TEXT
        report.add(f"prefill of {length} tokens", prefill_flops(decoder, length).total, "FLOPs", group=group)
        report.add("cache of a token, 16 bit", cache_bytes(language, 1), "bytes", group=group)
        report.add("cache of an image, 16 bit", cache_bytes(language, tokens + marks), "bytes", group=group)
    group = "training: under a day on 8 GPUs"
    report.add("steps on captions", math.ceil(CAPTIONS / BATCH), "steps", "about 7 h", group=group)
    report.add("steps on dialogues", DIALOGUES * EPOCHS // BATCH, "steps", "about 8 h", group=group)
    return report
