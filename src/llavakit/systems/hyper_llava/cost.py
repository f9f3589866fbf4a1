"""What HyperLLaVA's experts cost at published dimensions (spec section 12).

Products with learned and with generated weights, 2 FLOPs per multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from llavakit.connectors.general import MLP
from llavakit.proof.cost import CostReport, Flops, count, language_model, on_meta, parameters, prefill_flops
from llavakit.systems.hyper_llava.adapter import LanguageExperts
from llavakit.systems.hyper_llava.connector import VisualExpertMLP

HALF = 2  # bytes of a number in half precision


@dataclass(frozen=True)
class Size:
    """Dimensions of one model; `embed_dim`, `hyper_hidden` and `bottleneck` as in `experts`."""

    d_vision: int
    d_model: int
    layers: int
    embed_dim: int = 64
    hyper_hidden: int = 64
    bottleneck: int = 16

    @property
    def expert(self) -> dict[str, int]:
        """The options that connector and adapter share."""
        return {"embed_dim": self.embed_dim, "hyper_hidden": self.hyper_hidden, "bottleneck": self.bottleneck}

    def connector(self, variant: str) -> Any:
        """A connector on the meta device."""
        widths = {"vision_width": self.d_vision, "hidden_size": self.d_model}
        return on_meta(lambda: VisualExpertMLP(**widths, variant=variant, **self.expert))

    def adapter(self, **options: Any) -> LanguageExperts:
        """Language experts on the meta device."""
        text = LlamaConfig(hidden_size=self.d_model, num_hidden_layers=self.layers, num_attention_heads=1, head_dim=2)
        return on_meta(lambda: LanguageExperts(text, **self.expert, **options))


def golden_counts(size: Size) -> dict[str, int]:
    """Learned parameters, generated numbers and FLOPs of one size."""
    first, second, adapter = size.connector("first"), size.connector("second"), size.adapter()
    layer = next(iter(adapter.experts.values()))
    guidance = torch.empty(1, size.d_model, device="meta")
    token = torch.empty(1, 1, size.d_model, device="meta")
    weights = torch.empty(1, adapter.shape.size, device="meta")
    return {
        "generated_per_sample_E1": first.expert_1.shape.size,
        "E1_total": parameters(first.expert_1),
        "E2_total": parameters(second.expert_2),
        "generated_per_sample_per_language_layer": adapter.shape.size,
        "language_shared": parameters(adapter.hyper),
        "language_per_layer": parameters(layer),
        "language_total": parameters(adapter),
        "flops_generate_per_language_layer": count(lambda: layer(guidance, adapter.hyper)).total,
        "flops_apply_per_token_per_language_layer": count(lambda: adapter.shape.apply(token, weights)).total,
    }


SIZES = {"7B": (Size(1024, 4096, 32), 11008, 32), "13B": (Size(1024, 5120, 40), 13824, 40)}


def decoder(size: Size, inner: int, heads: int) -> Any:
    """The plain language model on the meta device."""
    config = LlamaConfig(
        hidden_size=size.d_model,
        intermediate_size=inner,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )
    return language_model(config)


def token_flops(size: Size, inner: int, heads: int) -> Flops:
    """The decoder's layers on one token, without attention to others."""
    return prefill_flops(decoder(size, inner, heads), 1, head=False)


def cost() -> CostReport:
    """Section 12 as a report."""
    report = CostReport("hyper-llava")
    for name, (size, inner, heads) in SIZES.items():
        found, experts = golden_counts(size), size.layers - size.layers // 2
        plain = token_flops(size, inner, heads)
        applied = experts * found["flops_apply_per_token_per_language_layer"]
        generated = experts * found["generated_per_sample_per_language_layer"]
        mlp = on_meta(lambda size=size: MLP(vision_width=size.d_vision, hidden_size=size.d_model))
        group = f"{name}: visual expert"
        report.add("generated per view, first", found["generated_per_sample_E1"], "numbers", group=group)
        report.add("learned, first", found["E1_total"], "parameters", group=group)
        report.add("learned, second", found["E2_total"], "parameters", group=group)
        report.add("LLaVA-1.5's MLP, for comparison", parameters(mlp), "parameters", group=group)
        group = f"{name}: language experts in {experts} layers"
        report.add(
            "generated per segment and layer", found["generated_per_sample_per_language_layer"], "numbers", group=group
        )
        report.add("learned, shared by all layers", found["language_shared"], "parameters", group=group)
        report.add("learned, per layer", found["language_per_layer"], "parameters", group=group)
        report.add("learned, together", found["language_total"], "parameters", group=group)
        report.add("to generate, per layer", found["flops_generate_per_language_layer"], "FLOPs", group=group)
        report.add(
            "to apply, per token and layer", found["flops_apply_per_token_per_language_layer"], "FLOPs", group=group
        )
        group = f"{name}: what a request pays"
        report.add("once per segment", experts * found["flops_generate_per_language_layer"], "FLOPs", group=group)
        report.add("per token", applied, "FLOPs", group=group)
        report.add("the decoder's layers per token (LLaVA-1.5)", plain.linear, "FLOPs", group=group)
        report.add("more per token", 100 * applied / plain.linear, "%", group=group)
        report.add("generated weights beside the cache, half precision", HALF * generated, "bytes", group=group)
        both = found["E1_total"] + found["language_total"]
        group = f"{name}: tuning the experts alone"
        report.add("both experts", both, "parameters", group=group)
        report.add("language model", parameters(decoder(size, inner, heads)), "parameters", group=group)
    report.notes.append(
        "Sizes are the paper's: embedding 64, bottleneck 16. FLOPs per token leave out attention between tokens."
    )
    return report
