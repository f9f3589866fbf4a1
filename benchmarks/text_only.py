"""Text alone at SmolLM2's size (30 layers of width 576, vocabulary 49,152) beside transformers' `generate`.

    OMP_NUM_THREADS=1 python benchmarks/text_only.py [--part even|log|one|quality|step] [--longest 64]
                                                     [--model FOLDER] [--gguf FILE]

- even, log: 16 requests, prompts of 16 to 160 tokens, replies of 4 to `--longest` tokens (`log`: spaced by equal
  factors, most short and some long; `even`: by equal differences); the engine beside `LlamaForCausalLM.generate` on the
  same left-padded batch, which decodes until the longest reply is done. Tokens that were asked for per CPU second;
  equal tokens are asserted.
- one: a single request, float32, int8 and int4 weights beside `generate` in float32; with `--gguf` llama-cpp-python on
  that file too. Tokens per CPU second, the sides in turn.
- quality: with `--model`, what quantised weights cost, by the loss on this script's text.
- step: where the time of a decoding step goes, 1 and 16 requests: matrix products, attention, everything else; the
  decoder's own forward pass beside the engine's.

Weights are random (seed 0), or those of a folder in transformers' layout, such as `llavakit convert` makes of a GGUF
file.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llavakit
from llavakit.generation import Engine, Request, SamplingParams
from llavakit.generation.lean import LeanDecoder
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.quantization import quantize

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SLOTS = 16


def models(folder: Path | None, layers: int) -> tuple[LlavakitForConditionalGeneration, LlamaForCausalLM]:
    """The same weights in llavakit's model and in transformers' own."""
    if folder is not None:
        ours = llavakit.load(folder, device="cpu", responder="plain").model
    else:
        torch.manual_seed(0)
        text = {"model_type": "llama", **SHAPE, "num_hidden_layers": layers}
        ours = LlavakitForConditionalGeneration(LlavakitConfig(text_config=text, vision_config=None)).eval()
    config = ours.config.text_config
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**config.to_dict())).eval()
    theirs.model, theirs.lm_head = ours.model.language_model, ours.lm_head
    return ours, theirs


def ragged(longest: int, replies: str) -> tuple[list[list[int]], list[int]]:
    """Prompts, and the lengths of their replies."""
    shortest, source = 4, random.Random(1)
    steps = [step / (SLOTS - 1) for step in range(SLOTS)]
    factor = longest / shortest
    lengths = [
        round(shortest * factor**at if replies == "log" else shortest + (longest - shortest) * at) for at in steps
    ]
    source.shuffle(lengths)
    prompts = [[source.randrange(3, 40000) for _ in range(source.randrange(16, 161))] for _ in lengths]
    return prompts, lengths


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Result and CPU seconds."""
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


def line(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells: str) -> None:
    line(*cells)
    line(*["---"] * len(cells))


def fixed(new: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, eos_token_ids=())


def batch(ours: Any, theirs: Any, replies: str, longest: int, repeats: int) -> None:
    prompts, lengths = ragged(longest, replies)
    widest = max(map(len, prompts))
    padded = torch.tensor([[0] * (widest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (widest - len(ids)) + [1] * len(ids) for ids in prompts])
    options = {"max_new_tokens": longest, "min_new_tokens": longest, "do_sample": False, "pad_token_id": 0}

    def generate() -> list[list[int]]:
        output = theirs.generate(input_ids=padded, attention_mask=mask, eos_token_id=None, **options)
        return [row[widest : widest + new].tolist() for row, new in zip(output, lengths, strict=True)]

    def engine() -> list[list[int]]:
        requests = [Request(ids, sampling=fixed(new)) for ids, new in zip(prompts, lengths, strict=True)]
        return [reply.token_ids for reply in Engine(ours, max_batch=SLOTS).generate(requests)]

    print(f"\n{SLOTS} requests, replies of 4 to {longest} tokens ({replies}), {sum(lengths)} in all\n")
    head("run", "generate, padded: tokens per CPU second", "engine", "ratio")
    ratios = []
    for repeat in range(repeats):
        expected, slow = timed(generate)
        found, fast = timed(engine)
        assert found == expected, "the engine and generate differ"
        ratios.append(slow / fast)
        line(repeat + 1, f"{sum(lengths) / slow:.1f}", f"{sum(lengths) / fast:.1f}", f"{ratios[-1]:.2f}")
    if repeats > 1:
        line("median", "", "", f"{statistics.median(ratios):.2f}")


def one(ours: Any, theirs: Any, new: int, repeats: int, gguf: Path | None) -> None:
    ids = random.Random(0).choices(range(3, 40000), k=32)
    text = torch.tensor([ids])
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    sides: dict[str, Callable[[], Any]] = {
        "`generate`, float32": lambda: theirs.generate(text, eos_token_id=None, **options)[0, len(ids) :].tolist()
    }
    for form in ("float32", "int8", "int4"):
        net = copy.deepcopy(ours)
        net = net if form == "float32" else quantize(net, form)
        engine = Engine(net, max_batch=1, prefix_bytes=0)
        request = Request(ids, sampling=fixed(new))
        sides[f"engine, {form}"] = lambda engine=engine, request=request: engine.generate([request])[0].token_ids
    if gguf is not None:
        from llama_cpp import Llama

        model = Llama(str(gguf), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
        sides[f"llama.cpp, {gguf.name}"] = lambda: llama_tokens(model, ids, new)
    print(f"\none request of {new} tokens behind 32\n")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    made = {name: work() for name, work in sides.items()}  # warms up
    first, second = list(sides)[:2]
    assert made[first] == made[second], "the engine and generate differ"
    for _ in range(repeats):
        for name, work in sides.items():
            seconds[name].append(timed(work)[1])
    head("", "tokens per CPU second", "beside `generate`")
    for name, spent in seconds.items():
        ratio = statistics.median(slow / fast for slow, fast in zip(seconds[first], spent, strict=True))
        line(name, f"{new / statistics.median(spent):.1f}", f"{ratio:.2f}")


def llama_tokens(model: Any, ids: list[int], new: int) -> list[int]:
    model.reset()
    found = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if len(found) == new:
            return found
    return found


def quality(ours: Any, folder: Path) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(Path(__file__).read_text()).input_ids[:600]])
    print("\nloss on this script's text\n")
    head("weights", "loss", "divergence from float32", "same likeliest token")
    exact = None
    for form in ("float32", "int8", "int4"):
        net = copy.deepcopy(ours)
        net = net if form == "float32" else quantize(net, form)
        with torch.inference_mode():
            logits = net(input_ids=ids).logits[0, :-1].log_softmax(-1)
        exact = logits if exact is None else exact
        loss = F.nll_loss(logits, ids[0, 1:])
        divergence = F.kl_div(logits, exact, log_target=True, reduction="none").sum(-1).mean()
        same = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
        line(form, f"{loss:.4f}", f"{divergence:.4f}", f"{100 * same:.1f} %")


def step(ours: Any, steps: int) -> None:
    print("\nmilliseconds of a step, by PyTorch's profiler\n")
    head("requests", "decoder", "matrix products", "attention", "everything else", "operations")
    for rows in (1, SLOTS):
        for name, lean in (("its own forward pass", False), ("lean", True)):
            with mock.patch.object(LeanDecoder, "fits", staticmethod(lambda decoder, lean=lean: lean)):
                engine = Engine(ours, max_batch=rows, prefix_bytes=0)
                for row in range(rows):
                    ids = random.Random(row).choices(range(3, 40000), k=100)
                    engine.submit(Request(ids, sampling=fixed(steps + 4)), stream=False)
                engine.step()
                engine.step()
                with profile(activities=[ProfilerActivity.CPU]) as found:
                    for _ in range(steps):
                        engine.step()
            entries = [entry for entry in found.key_averages() if entry.self_cpu_time_total]
            total = sum(entry.self_cpu_time_total for entry in entries)
            products = sum(entry.self_cpu_time_total for entry in entries if entry.key in ("aten::mm", "aten::addmm"))
            attention = sum(
                entry.self_cpu_time_total
                for entry in entries
                if "flash" in entry.key or entry.key in ("aten::bmm", "aten::baddbmm", "aten::_softmax")
            )
            spent = (products, attention, total - products - attention)
            count = sum(entry.count for entry in entries) // steps
            line(rows, name, *(f"{one / steps / 1000:.1f}" for one in spent), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["even", "log", "one", "quality", "step"], help="default: all")
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30, help="of random weights")
    parser.add_argument("--steps", type=int, default=8, help="to profile")
    parser.add_argument("--model", type=Path, help="folder in transformers' layout")
    parser.add_argument("--gguf", type=Path, help="the same model for llama-cpp-python")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32")
    ours, theirs = models(options.model, options.layers)
    for part in ("even", "log"):
        if options.part in (None, part):
            batch(ours, theirs, part, options.longest, options.repeats)
    if options.part in (None, "one"):
        one(ours, theirs, options.longest, options.repeats, options.gguf)
    if options.model is not None and options.part in (None, "quality"):
        quality(ours, options.model)
    if options.part in (None, "step"):
        step(ours, options.steps)


if __name__ == "__main__":
    main()
