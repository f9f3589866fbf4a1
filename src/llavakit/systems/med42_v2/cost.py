"""What Med42-v2 costs at its published dimensions (spec section 12)."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from llavakit.proof.cost import CostReport, cache_bytes, language_model, parameters, prefill_flops

LLAMA_3: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
CHUNK = 8192
STEPS = {"8B": (5_321, 32), "70B": (3_549, 48)}  # optimiser steps, and chunks in each


def cost() -> CostReport:
    """Section 12 as a report."""
    report = CostReport("med42-v2")
    for size, dims in LLAMA_3.items():
        config = LlamaConfig(**dims)
        group = f"Llama-3-{size}"
        count = parameters(language_model(config))
        report.add("parameters", count, "parameters", group=group)
        layer, headless = (_one_layer(dims, head) for head in (True, False))
        linear = layer.linear + (dims["num_hidden_layers"] - 1) * headless.linear
        attention = dims["num_hidden_layers"] * headless.attention
        report.add(f"linear layers on {CHUNK:,} tokens", linear, "FLOPs", group=group)
        report.add(f"attention on {CHUNK:,} tokens, full square", attention, "FLOPs", group=group)
        report.add("forward", linear + attention, "FLOPs", group=group)
        report.add("cache, 16 bit", cache_bytes(config, 1), "bytes", group=group)
        report.add(f"cache of {CHUNK:,} tokens", cache_bytes(config, CHUNK), "bytes", group=group)
        steps, chunks = STEPS[size]
        report.add("tokens of instruction tuning", steps * chunks * CHUNK, "tokens", "1 billion", group)
        report.add("chunks of instruction tuning", steps * chunks, "chunks", group=group)
        report.add(
            "forward and backward of all chunks", 3 * steps * chunks * (linear + attention), "FLOPs", group=group
        )
        report.add("policy and reference, 16 bit", 4 * count, "bytes", group=group)
    report.notes = [
        "Both sizes see the same 1.395 billion tokens, two epochs.",
        "llavakit keeps the reference's log-probabilities, so one of the two models is in memory while DPO trains.",
    ]
    return report


def _one_layer(dims: dict[str, Any], head: bool) -> Any:
    """FLOPs of one decoder layer, with the head or without."""
    return prefill_flops(language_model(LlamaConfig(**dims | {"num_hidden_layers": 1})), CHUNK, head=head)
