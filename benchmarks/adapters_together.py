"""Requests decoded together under an adapter, beside the same requests one after the other, in one run.

    OMP_NUM_THREADS=1 python benchmarks/adapters_together.py [--layers 8] [--width 256] [--repeats 3]

16 requests with one image each, prompts of different lengths and 32 new tokens, random weights shaped as in the 7B
model and scaled down. Dynamic-LLaVA drops image tokens at the prompt and about half of the generated ones (the text
predictor is set to the middle of its scores); LLaVA-Mini compresses every image to one token. Tokens must be equal; the
table gives tokens per second of processor time, the best of the repeats.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from llavakit.generation.engine import Engine
from llavakit.generation.request import Request, SamplingParams
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.views.plan import MediaSize

REQUESTS, NEW, SIDE = 16, 32, 56
COMPRESSOR = {"type": "compressor_prefusion", "compressor_size": 1, "compressor_heads": 2, "prefusion_layer_num": 1}


def build(system: str, layers: int, width: int) -> LlavakitForConditionalGeneration:
    """A model with random weights."""
    torch.manual_seed(0)
    sparse = {"type": "dynamic_sparsification", "d_model": width // 8, "dim_feedforward": width // 2, "nhead": 4}
    config = LlavakitConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 43 // 16,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "vocab_size": 2048,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 14,
        },
        media={"image": {"views": {"type": "squash", "size": SIDE}}},
        image_token_id=2047,
        connector=COMPRESSOR if system == "LLaVA-Mini" else {"type": "mlp"},
        language_adapter=sparse if system == "Dynamic-LLaVA" else None,
    )
    model = LlavakitForConditionalGeneration(config).eval()
    if model.model.language_adapter is not None:
        center(model)
    return model


@torch.no_grad()
def center(model: LlavakitForConditionalGeneration) -> None:
    """Shift the text predictor so that it keeps about half of random tokens."""
    adapter, seen = model.model.language_adapter, []
    layer = model.model.language_model.layers[adapter.sparse_layer]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=torch.randint(3, 2000, (1, 200)), use_cache=False, logits_to_keep=1)
    hook.remove()
    logits = adapter.text_predictor(seen[0])
    adapter.text_predictor.output_mlp[-1].bias[0] -= (logits[..., 0] - logits[..., 1]).median()


def requests(model: LlavakitForConditionalGeneration) -> list[Request]:
    """Requests with an image each; their texts are 8 to 68 tokens long."""
    generator = torch.Generator().manual_seed(0)
    size = MediaSize(1, SIDE, SIDE)
    visual = [model.config.image_token_id] * model.model.media.count("image", size)
    made = []
    for number in range(REQUESTS):
        text = torch.randint(3, 2000, (8 + 4 * number,), generator=generator).tolist()
        pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
        sampling = SamplingParams(max_new_tokens=NEW, eos_token_ids=())
        made.append(
            Request(
                input_ids=[1, *visual, *text], pixel_values=pixels, visual_sizes=torch.tensor([size]), sampling=sampling
            )
        )
    return made


def timed(model: LlavakitForConditionalGeneration, rows: int) -> tuple[list[list[int]], float]:
    """New tokens of all requests, and processor seconds, with so many rows decoded together."""
    engine = Engine(model, max_batch=rows, prefix_bytes=0, feature_bytes=0)
    begin = time.process_time()
    replies = engine.generate(requests(model))
    return [reply.token_ids for reply in replies], time.process_time() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(
        f"{REQUESTS} requests, {NEW} new tokens each, {options.layers} layers of width {options.width}, float32, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), best of {options.repeats}"
    )
    print("| | one after the other, tokens/s | together, tokens/s | ratio |")
    print("|---|---|---|---|")
    for system in ("Dynamic-LLaVA", "LLaVA-Mini"):
        model = build(system, options.layers, options.width)
        best = [float("inf"), float("inf")]
        for _ in range(options.repeats):
            (one, alone), (other, together) = timed(model, 1), timed(model, REQUESTS)
            if one != other:
                raise SystemExit(f"{system}: tokens differ")
            best = [min(best[0], alone), min(best[1], together)]
        rates = [REQUESTS * NEW / seconds for seconds in best]
        print(f"| {system} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} |")


if __name__ == "__main__":
    main()
