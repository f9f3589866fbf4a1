"""Dynamic-LLaVA beside the dense model, same weights, same prompt, in one run: wall time, CPU time, cache bytes.

    OMP_NUM_THREADS=1 python benchmarks/dynamic_llava.py [--layers 32] [--width 256] [--repeats 3]

A prompt of 1,200 positions, 576 of them an image, then 200 given tokens one by one, with layers shaped as in the 7B
model and scaled down in width (the predictors too). Three arms take turns:

- dense: the decoder with transformers' `DynamicCache`
- all kept: the adapter with every predictor off, to see what the cache's buffers alone do
- dynamic: 115 image tokens from layer 2 on, and about half of the generated tokens in the caches of layers 2 and up;
  the weights are random, so the text predictor's bias is set to the middle of its scores first

`last forward` is one forward of all 1,400 positions without a cache, as decoding without a cache ends.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import DynamicCache

from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.prompt import PromptInfo

PROMPT, IMAGE, BEFORE, NEW = 1200, 576, 40, 200
ARMS = ("dense", "all kept", "dynamic")


def build(layers: int, width: int) -> LlavakitForConditionalGeneration:
    """A model with random weights; only its decoder and adapter are used."""
    torch.manual_seed(0)
    config = LlavakitConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 43 // 16,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "vocab_size": 2048,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_id=2047,
        language_adapter={
            "type": "dynamic_sparsification",
            "d_model": width // 8,
            "dim_feedforward": width // 2,
        },
    )
    return LlavakitForConditionalGeneration(config).eval()


def center(model: LlavakitForConditionalGeneration, embeds: torch.Tensor) -> None:
    """Shift the text predictor so that it keeps about half of the last `NEW` positions."""
    adapter, seen = model.model.language_adapter, []
    layer = model.model.language_model.layers[adapter.sparse_layer]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1)
    hook.remove()
    logits = adapter.text_predictor(seen[0][:, -NEW:])
    adapter.text_predictor.output_mlp[-1].bias[0] -= (logits[..., 0] - logits[..., 1]).median()


@dataclass
class Measured:
    """Best of the repeats, [wall, CPU] seconds, and bytes."""

    prefill: list[tuple[float, float]] = field(default_factory=list)
    decode: list[tuple[float, float]] = field(default_factory=list)
    last: list[tuple[float, float]] = field(default_factory=list)
    bytes: int = 0
    entries: tuple[int, int] = (0, 0)


def clocked(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


class Arm:
    """One way to run the model."""

    def __init__(self, name: str, model: LlavakitForConditionalGeneration) -> None:
        self.model, self.measured = model, Measured()
        self.adapter = None if name == "dense" else model.model.language_adapter
        self.sparse = name == "dynamic"

    def run(self, embeds: torch.Tensor, visual: torch.Tensor, tokens: torch.Tensor) -> None:
        """Prefill, decode, and one last forward without a cache."""
        inner = self.model.model
        kept_adapter, inner.language_adapter = inner.language_adapter, self.adapter
        if self.adapter is not None:
            self.adapter.use_vision_predictor = self.adapter.use_text_predictor = self.sparse
        cache = DynamicCache() if self.adapter is None else self.adapter.make_cache()
        extra = {"visual_mask": visual, "logits_to_keep": 1}
        prefilled = clocked(lambda: self.model(inputs_embeds=embeds, past_key_values=cache, **extra))
        self.measured.prefill.append(prefilled[1])

        def decode() -> None:
            for token in tokens.split(1, dim=1):
                self.model(input_ids=token, past_key_values=cache).logits.argmax(-1)

        self.measured.decode.append(clocked(decode)[1])
        if self.adapter is None:
            self.measured.bytes = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
            self.measured.entries = (cache.layers[0].keys.shape[2], cache.layers[-1].keys.shape[2])
        else:
            self.measured.bytes, stored = cache.bytes(), cache.stored()
            self.measured.entries = (stored[0][0], stored[-1][0])
        later = self.model.get_input_embeddings()(tokens)
        whole, mask = torch.cat([embeds, later], dim=1), torch.nn.functional.pad(visual, (0, NEW))
        extra["visual_mask"] = mask
        if self.sparse:
            extra["prompt_info"] = PromptInfo(length=PROMPT)
        self.measured.last.append(clocked(lambda: self.model(inputs_embeds=whole, use_cache=False, **extra))[1])
        inner.language_adapter = kept_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = build(options.layers, options.width)
    tokens = torch.randint(model.config.image_token_id, (1, NEW))
    embeds = 0.02 * torch.randn(1, PROMPT, options.width)
    visual = torch.zeros(1, PROMPT, dtype=torch.bool)
    visual[:, BEFORE : BEFORE + IMAGE] = True
    center(model, torch.cat([embeds, model.get_input_embeddings()(tokens)], dim=1))
    arms = {name: Arm(name, model) for name in ARMS}
    for _ in range(options.repeats):
        for arm in arms.values():
            arm.run(embeds, visual, tokens)

    print(
        f"{options.layers} layers, width {options.width}, prompt {PROMPT} ({IMAGE} image tokens), {NEW} new tokens, "
        f"float32, torch {torch.__version__}, {torch.get_num_threads()} thread(s), best of {options.repeats}"
    )
    print("| | prefill s (CPU) | decode s (CPU) | last forward s (CPU) | entries, layer 0 / last | cache MB |")
    print("|---|---|---|---|---|---|")
    best = {
        name: [tuple(map(min, zip(*times, strict=True))) for times in (m.prefill, m.decode, m.last)]
        for name, m in ((name, arm.measured) for name, arm in arms.items())
    }
    for name, arm in arms.items():
        m, times = arm.measured, " | ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in best[name])
        print(f"| {name} | {times} | {m.entries[0]} / {m.entries[1]} | {m.bytes / 1e6:.1f} |")
    ratios = [f"{best['dynamic'][n][1] / best['dense'][n][1]:.2f}" for n in range(3)]
    share = arms["dynamic"].measured.bytes / arms["dense"].measured.bytes
    print(f"| dynamic / dense, CPU | {' | '.join(ratios)} | | {share:.2f} |")


if __name__ == "__main__":
    main()
