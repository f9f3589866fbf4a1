"""Generation beside transformers' `generate`, same weights, same prompts, equal tokens asserted, in one run.

    OMP_NUM_THREADS=1 python benchmarks/generation.py [--part batch|compiled|turns] [--replies log|even]
                                                      [--repeats 3] [--layers 6] [--width 256]

- batch: 16 requests, each a picture and a question of its own length, replies of 8 to 256 tokens (`log`: spaced by
  equal factors, most answers short and some long; `even`: by equal differences); the engine beside transformers' own
  `LlavaForConditionalGeneration` on the same left-padded batch, which decodes until the longest reply is done. Rate:
  tokens that were asked for per second.
- compiled: one request again and again; `Engine(compile=True)` beside `generate` in its defaults; CPU time per token
  (the first call, which compiles, is reported apart).
- turns: a second question about a picture after a first answer; the engine with its states and vectors reused beside
  the engine with nothing kept. Time to the first token.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as TransformersLlava

from llavakit.generation import Engine, Request, SamplingParams
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration

VOCABULARY, IMAGE, PATCH = 4096, 96, 12
VISUAL = (IMAGE // PATCH) ** 2
TOKEN = VOCABULARY - 1


def models(layers: int, width: int) -> tuple[LlavakitForConditionalGeneration, TransformersLlava]:
    """The same random weights in llavakit's model and in transformers' own."""
    text = {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    torch.manual_seed(0)
    ours = LlavakitForConditionalGeneration(
        LlavakitConfig(
            text_config={"model_type": "llama", **text},
            vision_config={"model_type": "clip_vision_model", **vision},
            media={"image": {"views": {"type": "pad", "size": IMAGE}}},
            image_token_id=TOKEN,
        )
    ).eval()
    theirs = TransformersLlava(
        LlavaConfig(
            text_config=LlamaConfig(**text),
            vision_config=CLIPVisionConfig(**vision),
            image_token_id=TOKEN,
            image_seq_length=VISUAL,
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def prompts(count: int, seed: int = 0) -> list[tuple[list[int], torch.Tensor]]:
    """Ids with one picture in front, questions of 16 to 160 tokens, and the picture."""
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        question = [source.randrange(3, TOKEN) for _ in range(source.randrange(16, 161))]
        made.append(([1] + [TOKEN] * VISUAL + question, torch.randn(1, 3, IMAGE, IMAGE, generator=generator)))
    return made


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def line(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def batch(layers: int, width: int, repeats: int, replies: str) -> None:
    ours, theirs = models(layers, width)
    lengths = [round(8 * 32 ** (step / 15) if replies == "log" else 8 + 248 * step / 15) for step in range(16)]
    random.Random(1).shuffle(lengths)
    asked = prompts(16)
    longest = max(len(ids) for ids, _ in asked)
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in asked])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in asked])
    pixels = torch.cat([picture for _, picture in asked])
    options = {"max_new_tokens": max(lengths), "min_new_tokens": max(lengths), "do_sample": False, "pad_token_id": 0}

    def padded_generate() -> list[list[int]]:
        output = theirs.generate(input_ids=padded, attention_mask=mask, pixel_values=pixels, **options)
        return [row[longest : longest + new].tolist() for row, new in zip(output, lengths, strict=True)]

    def engine() -> list[list[int]]:
        requests = [
            Request(ids, picture, sampling=SamplingParams(max_new_tokens=new, eos_token_ids=()))
            for (ids, picture), new in zip(asked, lengths, strict=True)
        ]
        return [reply.token_ids for reply in Engine(ours, max_batch=16).generate(requests)]

    print(f"16 requests, replies of 8 to 256 tokens ({replies}), {sum(lengths)} in all; Llama {layers} x {width}\n")
    line("run", "generate, padded: tokens/s", "engine: tokens/s", "ratio (wall)", "ratio (CPU)")
    line("---", "---", "---", "---", "---")
    ratios = []
    for repeat in range(repeats):
        expected, wall_theirs, cpu_theirs = timed(padded_generate)
        found, wall_ours, cpu_ours = timed(engine)
        assert found == expected, "the engine and generate differ"
        ratios.append((wall_theirs / wall_ours, cpu_theirs / cpu_ours))
        rates = [f"{sum(lengths) / seconds:.0f}" for seconds in (wall_theirs, wall_ours)]
        line(repeat + 1, *rates, *(f"{ratio:.2f}" for ratio in ratios[-1]))
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    line("median", "", "", *(f"{ratio:.2f}" for ratio in medians))


def compiled(layers: int, width: int, repeats: int) -> None:
    ours, theirs = models(layers, width)
    ids, picture = prompts(1)[0]
    new = 128
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": picture}
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    request = Request(ids, picture, sampling=SamplingParams(max_new_tokens=new, eos_token_ids=()))
    engines = {
        name: Engine(ours, max_batch=1, max_length=512, prefix_bytes=0, feature_bytes=0, compile=name == "compiled")
        for name in ("eager", "compiled")
    }
    _, wall, _ = timed(lambda: engines["compiled"].submit(request).result())
    print(f"one request of {new} tokens, Llama {layers} x {width}; compiling took {wall:.0f} s\n")
    line("run", "generate: CPU ms/token", "engine, eager", "engine, compiled", "ratio to compiled")
    line("---", "---", "---", "---", "---")
    ratios = []
    for repeat in range(repeats):
        expected, _, cpu = timed(lambda: theirs.generate(**inputs, **options)[0, len(ids) :].tolist())
        times = [cpu]
        for engine in engines.values():
            reply, _, cpu = timed(lambda engine=engine: engine.submit(request).result())
            assert reply.token_ids == expected, "the engine and generate differ"
            times.append(cpu)
        ratios.append(times[0] / times[2])
        line(repeat + 1, *(f"{seconds / new * 1000:.2f}" for seconds in times), f"{ratios[-1]:.2f}")
    line("median", "", "", "", f"{statistics.median(ratios):.2f}")


def turns(layers: int, width: int, repeats: int) -> None:
    ours, _ = models(layers, width)
    line("run", "nothing kept: ms to first token", "states and vectors kept", "ratio")
    line("---", "---", "---", "---")
    first, then = (
        SamplingParams(max_new_tokens=32, eos_token_ids=()),
        SamplingParams(max_new_tokens=1, eos_token_ids=()),
    )
    ratios = []
    for repeat in range(repeats):
        ids, picture = prompts(1, seed=repeat)[0]
        times, replies = [], []
        for kept in (0, 256 << 20):
            engine = Engine(ours, max_batch=1, prefix_bytes=kept, feature_bytes=kept)
            answer = engine.submit(Request(ids, picture, sampling=first)).result()
            longer = [*ids, *answer.token_ids, *range(10, 30)]
            turn = Request(longer, picture, sampling=then)
            reply, wall, _ = timed(lambda engine=engine, turn=turn: engine.submit(turn).result())
            times.append(wall)
            replies.append(reply.token_ids)
        assert replies[0] == replies[1], "reuse changed the answer"
        ratios.append(times[0] / times[1])
        line(repeat + 1, *(f"{seconds * 1000:.1f}" for seconds in times), f"{ratios[-1]:.2f}")
    line("median", "", "", f"{statistics.median(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["batch", "compiled", "turns"], help="default: all")
    parser.add_argument("--replies", choices=["log", "even"], default="log")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} thread(s), float32\n")
    for name, part in (("batch", batch), ("compiled", compiled), ("turns", turns)):
        if options.part in (None, name):
            print(f"## {name}\n")
            extra = (options.replies,) if part is batch else ()
            part(options.layers, options.width, options.repeats, *extra)
            print()


if __name__ == "__main__":
    main()
