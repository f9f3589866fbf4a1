"""What Dynamic-LLaVA saves at published dimensions: counted, and by the paper's own formula.

Decoder layers only, without the head, batch 1; numbers in brackets in a row's name say what was counted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from llavakit.proof.cost import CostReport, Flops, language_model, module_flops, on_meta, parameters, prefill_flops

IMAGE = 576
FULL_LAYERS = 2
RATE = 0.2
KEPT = int(IMAGE * RATE)

# (prompt tokens, output tokens, kept output tokens) of LVIS-VQA single round, multi round, ShareGPT4V-VQA
RUNS = ((56, 159, 84), (205, 351, 182), (51, 1555, 784))


def paper_flops(layers: int, hidden: int, tokens_before: int, tokens_after: int, full_layers: int) -> int:
    """FLOPs by the paper's Eq. 13: 32 N C^2 + 4 N^2 C per layer, which assumes a feed-forward width of 4 C."""

    def layer(tokens: int) -> int:
        return 32 * tokens * hidden**2 + 4 * tokens**2 * hidden

    return full_layers * layer(tokens_before) + (layers - full_layers) * layer(tokens_after)


@dataclass(frozen=True)
class Size:
    """A published decoder."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int

    def config(self, layers: int) -> Any:
        """Its configuration with the given number of layers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            vocab_size=32000,
        )


SIZES = (Size("7B", 4096, 11008, 32, 32), Size("13B", 5120, 13824, 40, 40))

_PAPER = {
    ("7B", "full"): "10.1 T",
    ("7B", "sparse"): "2.5 T",
    ("13B", "full"): "19.6 T",
    ("13B", "sparse"): "4.7 T",
    ("7B", 159): ("2.75 T", "1.52 T"),
    ("7B", 351): ("6.12 T", "3.33 T"),
    ("7B", 1555): ("28.70 T", "14.97 T"),
    ("13B", 159): ("5.36 T", "2.95 T"),
    ("13B", 351): ("11.92 T", "6.40 T"),
    ("13B", 1555): ("55.40 T", "27.96 T"),
}


@functools.cache
def layer_flops(size: Size, tokens: int) -> Flops:
    """One decoder layer on a prompt of `tokens` positions."""
    return prefill_flops(language_model(size.config(1)), tokens, head=False)


def decoder_flops(size: Size, before: int, after: int) -> Flops:
    """All layers: the first two on `before` tokens, the others on `after`."""
    return layer_flops(size, before) * FULL_LAYERS + layer_flops(size, after) * (size.layers - FULL_LAYERS)


def _saved(full: float, sparse: float) -> float:
    return 100 * (1 - sparse / full)


def cost() -> CostReport:
    """Section 12 of the spec: prefill, decoding without a cache, cache bytes, by counting and by the paper."""
    report = CostReport("dynamic-llava")
    for size in SIZES:
        _prefill(report, size)
        _uncached(report, size)
        _cache(report, size)
        _by_the_paper(report, size)
    report.notes = [
        "Counted: decoder layers without the head, 2 FLOPs per multiply-add, the full square of attention.",
        "The paper's convention (its Eq. 13) counts image or output tokens alone and a feed-forward width of 4 C;"
        " its text columns are means over samples.",
        "With a cache, decoding FLOPs hardly change: the saving is memory, and layers 0 and 1 keep everything.",
    ]
    return report


def _prefill(report: CostReport, size: Size) -> None:
    from llavakit.systems.dynamic_llava.predictors import ImagePredictor, TextPredictor

    group = f"{size.name}: prefill, counted"
    predictors = on_meta(lambda: ImagePredictor(size.hidden)), on_meta(lambda: TextPredictor(size.hidden))
    image = module_flops(predictors[0], (1, IMAGE, size.hidden))
    text = module_flops(predictors[1], (1, 1, size.hidden))
    full, sparse = decoder_flops(size, IMAGE, IMAGE), decoder_flops(size, IMAGE, KEPT)
    report.add(f"{IMAGE} image tokens in every layer (LLaVA-1.5)", full.total, "FLOPs", group=group)
    report.add("  of which products with weights", full.linear, "FLOPs", group=group)
    report.add("  of which attention", full.attention, "FLOPs", group=group)
    report.add(f"{KEPT} image tokens from layer {FULL_LAYERS} on", sparse.total, "FLOPs", group=group)
    report.add("image predictor", image.total, "FLOPs", group=group)
    report.add("  of which products with weights", image.linear, "FLOPs", group=group)
    report.add("  of which attention", image.attention, "FLOPs", group=group)
    report.add("saved, predictor included", _saved(full.total, (sparse + image).total), "%", "about 75 %", group)
    full, sparse = decoder_flops(size, IMAGE + 60, IMAGE + 60), decoder_flops(size, IMAGE + 60, KEPT + 60)
    report.add("with 60 text tokens, in every layer (LLaVA-1.5)", full.total, "FLOPs", group=group)
    report.add("with 60 text tokens, sparse, predictor included", (sparse + image).total, "FLOPs", group=group)
    report.add("saved with 60 text tokens", _saved(full.total, (sparse + image).total), "%", group=group)
    report.add("text predictor, one generated token", text.total, "FLOPs", group=group)
    report.add("image predictor", parameters(predictors[0]), "parameters", group=group)
    report.add("text predictor", parameters(predictors[1]), "parameters", group=group)


def _uncached(report: CostReport, size: Size) -> None:
    group = f"{size.name}: last forward without a cache, counted"
    for prompt, outputs, kept in RUNS:
        context = IMAGE + prompt + outputs
        full = decoder_flops(size, context, context).total
        image_only = decoder_flops(size, context, context - IMAGE + KEPT).total
        both = decoder_flops(size, context, context - IMAGE + KEPT - outputs + kept).total
        name = f"prompt {prompt}, outputs {outputs}"
        report.add(f"{name}: full", full, "FLOPs", group=group)
        report.add(f"{name}: image tokens dropped", image_only, "FLOPs", group=group)
        report.add(f"{name}: {kept} outputs kept too", both, "FLOPs", group=group)
        report.add(f"{name}: saved", _saved(full, both), "%", "about 50 %", group)


def _cache(report: CostReport, size: Size) -> None:
    group = f"{size.name}: keys and values, fp16"

    def mebibytes(before: int, after: int) -> float:
        entries = before * FULL_LAYERS + after * (size.layers - FULL_LAYERS)
        return entries * 4 * size.hidden / 2**20

    for prompt, outputs, kept in RUNS:
        context = IMAGE + prompt + outputs
        after = context - IMAGE + KEPT
        report.add(f"outputs {outputs}: full", mebibytes(context, context), "MiB", group=group)
        report.add(f"outputs {outputs}: image tokens dropped", mebibytes(context, after), "MiB", group=group)
        both = mebibytes(context, after - outputs + kept)
        report.add(f"outputs {outputs}: {kept} outputs kept too", both, "MiB", group=group)
        dense, sparse = mebibytes(outputs, outputs), mebibytes(outputs, kept)
        report.add(f"outputs {outputs}: output tokens alone, full", dense, "MiB", group=group)
        report.add(f"outputs {outputs}: output tokens alone, {kept} kept", sparse, "MiB", group=group)
        report.add(f"outputs {outputs}: saved of output tokens", _saved(dense, sparse), "%", "about 50 %", group)


def _by_the_paper(report: CostReport, size: Size) -> None:
    group = f"{size.name}: by the paper's formula"

    def flops(before: int, after: int) -> int:
        return paper_flops(size.layers, size.hidden, before, after, FULL_LAYERS)

    report.add(f"{IMAGE} image tokens", flops(IMAGE, IMAGE), "FLOPs", _PAPER[size.name, "full"], group)
    sparse = flops(IMAGE, KEPT)
    report.add(f"{KEPT} from layer {FULL_LAYERS} on", sparse, "FLOPs", _PAPER[size.name, "sparse"], group)
    for _, outputs, kept in RUNS:
        dense, sparse = _PAPER[size.name, outputs]
        report.add(f"{outputs} output tokens", flops(outputs, outputs), "FLOPs", dense, group)
        report.add(f"{kept} from layer {FULL_LAYERS} on", flops(outputs, kept), "FLOPs", sparse, group)
