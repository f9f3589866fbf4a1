"""HyperLLaVA beside LLaVA-1.5 of the same size: requests decoded together, each with its own generated weights.

    OMP_NUM_THREADS=1 python benchmarks/hyper_llava.py [--layers 8] [--width 1024] [--requests 16] [--new 16]

Both models have the same decoder. Every request has another picture, so another set of generated weights in each of the
upper layers. The engines admit all requests; then the steps that decode one token for each of them are timed, and the
models take turns step by step. Some replies are compared with the ones that their requests get alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from llavakit.generation import Engine, Request, SamplingParams
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.views.plan import MediaSize

VOCABULARY, IMAGE = 4096, 4095
SIDE, PATCH = 56, 14


def build(layers: int, width: int, experts: bool) -> LlavakitForConditionalGeneration:
    """A model with random weights; the experts' are large enough to change replies."""
    torch.manual_seed(0)
    parts = {
        "connector": {"type": "visual_expert_mlp" if experts else "mlp"},
        "language_adapter": {"type": "language_experts"} if experts else None,
    }
    config = LlavakitConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 43 // 16,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 512,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        media={"image": {"views": {"type": "squash", "size": SIDE}}},
        image_token_id=IMAGE,
        **parts,
    )
    model = LlavakitForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".W2", ".b")) and parameter.numel() > width:
            parameter.data.normal_(0, 0.02)
    return model


def requests(model: LlavakitForConditionalGeneration, count: int, new: int) -> list[Request]:
    """Requests with a picture and a question each."""
    generator = torch.Generator().manual_seed(1)
    size = MediaSize(1, SIDE, SIDE)
    tokens = model.model.media.count("image", size)
    found = []
    for number in range(count):
        words = torch.randint(3, IMAGE, (20 + number % 5,), generator=generator).tolist()
        found.append(
            Request(
                [1, *[IMAGE] * tokens, *words],
                pixel_values=torch.randn(1, 3, SIDE, SIDE, generator=generator),
                visual_sizes=torch.tensor([size]),
                visual_modalities=torch.zeros(1, dtype=torch.long),
                sampling=SamplingParams(max_new_tokens=new, eos_token_ids=()),
            )
        )
    return found


def decode(
    models: dict[str, LlavakitForConditionalGeneration], count: int, new: int
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Processor seconds of every step in which all requests are decoded together, and the replies, per model."""
    engines, handles = {}, {}
    for name, model in models.items():
        engines[name] = Engine(model, max_batch=count, prefix_bytes=0, max_prefill_tokens=1_000_000)
        handles[name] = [engines[name].submit(prompt, stream=False) for prompt in requests(model, count, new)]
        engines[name].step()  # reads every prompt
    steps: dict[str, list[float]] = {name: [] for name in models}
    while all(engine.active == count for engine in engines.values()):
        for name, engine in engines.items():
            begin = time.process_time()
            engine.step()
            steps[name].append(time.process_time() - begin)
    return steps, {name: [handle.result().token_ids for handle in own] for name, own in handles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    models = {name: build(options.layers, options.width, name == "HyperLLaVA") for name in ("LLaVA-1.5", "HyperLLaVA")}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.repeats):
        steps, replies = decode(models, options.requests, options.new)
        for name, own in steps.items():
            seconds[name] += own
    model = models["HyperLLaVA"]
    for number, prompt in enumerate(requests(model, options.requests, options.new)[:4]):
        alone = Engine(model, prefix_bytes=0).generate([prompt])[0].token_ids
        assert alone == replies["HyperLLaVA"][number], "a reply depends on its neighbours"
    print(
        f"{options.requests} requests with a picture each, {options.layers} layers of width {options.width}, float32, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), processor time, median of "
        f"{len(seconds['HyperLLaVA'])} steps"
    )
    rates = {name: options.requests / statistics.median(own) for name, own in seconds.items()}
    print("| | tokens/s together | ratio |")
    print("|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / rates['LLaVA-1.5']:.2f} |")


if __name__ == "__main__":
    main()
