"""Real sizes on one GPU beside transformers, in one run of at most 8 minutes; prints a section for RESULTS.md.

    python benchmarks/gpu.py [--minutes 8] [--parts decode,train,first_token,frames]

Random weights in bfloat16 of LLaVA-1.5-7B (CLIP-L at 336 px, 576 visual tokens, 32 layers x 4096); both sides hold the
same tensors. `--tiny` (the default without a GPU) runs all of it in a small shape on a CPU: a test, no measurement.

- decode: 1 and 16 requests with a picture; tokens per second, and the share of the memory bandwidth that reading every
  weight once per step takes.
- train: LoRA of the decoder on 8 records of picture and text; tokens per second, share of the peak arithmetic (MFU:
  forward pass, and the backward pass through frozen weights), peak memory.
- first_token: LLaVA-Mini beside LLaVA-1.5 in llavakit and in transformers, a new picture.
- frames: LLaVA-Mini's first token behind a video of 10,000 frames, and peak memory.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlavaConfig
from transformers import LlavaForConditionalGeneration as TransformersLlava

sys.path.insert(0, str(Path(__file__).parent))
from llava_mini import MINI, VOCABULARY, model

from llavakit.generation import Engine, Request, SamplingParams
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.views.plan import MediaSize

TOKEN = VOCABULARY - 1  # transformers wants the placeholder inside the vocabulary
# Peak dense bfloat16 arithmetic (FLOP/s) and memory bandwidth (bytes/s), from NVIDIA's data sheets.
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.55e12),
    "L40S": (362e12, 0.864e12),
}


class Bench:
    """What the parts share: device, sizes, clock.

    Args:
        device: "cuda" or "cpu".
        tiny: Whether shapes are those of the test.
        minutes: When no further part begins.
    """

    def __init__(self, device: str, tiny: bool, minutes: float) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.deadline = time.monotonic() + 60 * minutes
        self.hidden, self.layers, self.image = (64, 2, 28) if tiny else (4096, 32, 336)
        self.visual = (self.image // 14) ** 2
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
        self.flops, self.bandwidth = next((peak for key, peak in PEAKS.items() if key in self.name), (None, None))

    def build(self, connector: dict[str, Any]) -> LlavakitForConditionalGeneration:
        """Random weights, made where they will be used."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                net = model(connector, hidden=self.hidden, layers=self.layers, image=self.image)
        finally:
            torch.set_default_dtype(before)
        net = net.to(self.device, self.dtype)
        net.config.image_token_id = net.model.config.image_token_id = TOKEN
        return net

    def ids(self, text: int, visual: int | None = None, seed: int = 1) -> list[int]:
        words = torch.randint(3, TOKEN, (text,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [*words[:10], *[TOKEN] * (self.visual if visual is None else visual), *words[10:]]

    def picture(self, count: int = 1) -> Tensor:
        made = torch.randn(count, 3, self.image, self.image, generator=torch.Generator().manual_seed(count))
        return made.to(self.device, self.dtype)

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Result and seconds, the device's work included."""
        self.wait()
        begin = time.perf_counter()
        result = work()
        self.wait()
        return result, time.perf_counter() - begin

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def peak(self) -> Any:
        """Peak memory of what runs inside, in GiB; a list of one number, NaN on a CPU."""
        found = [math.nan]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield found
        if self.device.type == "cuda":
            found[0] = torch.cuda.max_memory_allocated() / 2**30

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def twin(ours: LlavakitForConditionalGeneration) -> TransformersLlava:
    """Transformers' LLaVA around the same modules."""
    config = ours.config
    options = {"image_token_id": TOKEN, "image_seq_length": (config.vision_config.image_size // 14) ** 2}
    with torch.device("meta"):
        theirs = TransformersLlava(
            LlavaConfig(text_config=config.text_config, vision_config=config.vision_config, **options)
        )
    theirs.model.vision_tower, theirs.model.language_model = ours.model.vision_tower, ours.model.language_model
    theirs.model.multi_modal_projector.load_state_dict(ours.model.multi_modal_projector.state_dict(), assign=True)
    theirs.lm_head.weight = ours.lm_head.weight
    left = [name for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()] if tensor.is_meta]
    assert not left, left
    return theirs.eval()


def line(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(title: str, *cells: str) -> None:
    print(f"\n{title}\n")
    line(*cells)
    line(*["---"] * len(cells))


def share(value: float, peak: float | None) -> str:
    return "" if peak is None else f"{100 * value / peak:.0f} %"


def of(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def decode(bench: Bench) -> None:
    ours = bench.build({"type": "mlp"})
    theirs = twin(ours)
    new = 4 if bench.tiny else 128
    weights = sum(p.numel() for p in [*ours.model.language_model.layers.parameters(), ours.lm_head.weight])
    weights *= ours.dtype.itemsize
    head(
        f"Decoding {new} tokens behind {bench.visual + 43} positions; prefill is not counted",
        "requests",
        "run",
        "tokens/s",
        "weights read, share of bandwidth",
        "tokens as in `generate`",
    )
    for count in (1, 16) if not bench.tiny else (1, 2):
        prompts = [bench.ids(43, seed=row) for row in range(count)]
        pixels = bench.picture(count)
        text = torch.tensor(prompts, device=bench.device)

        def generate(tokens: int, text: Tensor = text, pixels: Tensor = pixels) -> list[list[int]]:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(text)
            with torch.inference_mode():
                made = theirs.generate(input_ids=text, attention_mask=mask, pixel_values=pixels, **options)
            return made[:, text.shape[1] :].tolist()

        def engine(tokens: int, prompts: Any = prompts, pixels: Tensor = pixels) -> list[list[int]]:
            sampling = SamplingParams(max_new_tokens=tokens, eos_token_ids=())
            asked = [Request(ids, pixels[row : row + 1], sampling=sampling) for row, ids in enumerate(prompts)]
            made = Engine(ours, max_batch=len(prompts), prefix_bytes=0, feature_bytes=0).generate(asked)
            return [reply.token_ids for reply in made]

        expected = None
        for name, work in (("transformers `generate`", generate), ("llavakit", engine)):
            work(2)
            _, begin = bench.timed(lambda work=work: work(1))
            found, whole = bench.timed(lambda work=work: work(new))
            seconds = max(whole - begin, 1e-9)
            expected = found if expected is None else expected
            same = statistics.mean(
                float(a == b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)
            )
            rate = (new - 1) / seconds
            line(count, name, f"{count * rate:,.0f}", share(rate * weights, bench.bandwidth), f"{100 * same:.0f} %")


def train(bench: Bench) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    ours = bench.build({"type": "mlp"})
    theirs = twin(ours)
    for parameter in [*ours.parameters(), *theirs.parameters()]:
        parameter.requires_grad_(False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=names), ours.model.language_model)
    trained = [p for p in ours.parameters() if p.requires_grad]
    records, text, steps = (2, 20, 1) if bench.tiny else (8, 256, 3)
    length = bench.visual + text
    ids = torch.tensor([bench.ids(text, seed=row) for row in range(records)], device=bench.device)
    labels = ids.masked_fill(ids == TOKEN, -100)
    batch = {"input_ids": ids, "pixel_values": bench.picture(records), "labels": labels}
    frozen = sum(p.numel() for p in ours.model.language_model.layers.parameters()) - sum(p.numel() for p in trained)
    encoder = sum(p.numel() for p in ours.model.vision_tower.parameters())
    work = 4 * frozen * records * length + 4 * ours.lm_head.weight.numel() * records * text
    work += 2 * encoder * records * bench.visual
    head(
        f"LoRA (rank 16, all linear layers of the decoder), {records} records of {bench.visual} visual and {text} text "
        "tokens, no padding, no recomputation",
        "run",
        "loss",
        "text and visual tokens/s",
        "MFU",
        "peak memory, GiB",
    )
    sides = {
        "transformers": lambda: theirs(**batch, attention_mask=torch.ones_like(ids)),
        "llavakit": lambda: ours(**batch, skip_logits=True),
    }
    for name, forward in sides.items():
        (ours if name == "llavakit" else theirs).train()
        optimizer = torch.optim.AdamW(trained, lr=0.0)  # both sides shall meet the same weights

        def step(forward: Callable[[], Any] = forward, optimizer: Any = optimizer) -> float:
            loss = forward().loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        bench.forget()
        with bench.peak() as memory:
            loss = step()
            seconds = statistics.median(bench.timed(step)[1] for _ in range(steps))
        rate = records * length / seconds
        line(name, f"{loss:.3f}", f"{rate:,.0f}", share(work / seconds, bench.flops), of(memory[0]))


def first_token(bench: Bench) -> None:
    full = bench.build({"type": "mlp"})
    theirs = twin(full)
    mini = bench.build(MINI)
    pixels = bench.picture()
    sides: dict[str, tuple[nn.Module, int]] = {
        "transformers, LLaVA-1.5": (theirs, bench.visual),
        "llavakit, LLaVA-1.5": (full, bench.visual),
        "llavakit, LLaVA-Mini": (mini, 1),
    }
    head("First token behind a new picture and 43 text tokens", "run", "positions", "ms", "ratio")
    slowest = None
    for name, (net, visual) in sides.items():
        ids = torch.tensor([bench.ids(43, visual)], device=bench.device)

        def ask(net: Any = net, ids: Tensor = ids) -> int:
            with torch.inference_mode():
                found = net(input_ids=ids, pixel_values=pixels, logits_to_keep=1, use_cache=True)
            return int(found.logits[0, -1].argmax())

        ask()
        ask()
        seconds = statistics.median(bench.timed(ask)[1] for _ in range(2 if bench.tiny else 10))
        slowest = seconds if slowest is None else slowest
        line(name, visual + 43, f"{1000 * seconds:.1f}", f"{slowest / seconds:.2f}")


class Film:
    """Frames that are made on the device when they are asked for."""

    def __init__(self, frames: int, bench: Bench) -> None:
        self.frames, self.bench = frames, bench

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self.frames))]
        shape = (3, self.bench.image, self.bench.image)
        return torch.full(shape, (index % 17) / 17, device=self.bench.device, dtype=self.bench.dtype)


def frames(bench: Bench) -> None:
    net = bench.build(MINI)
    head(
        "LLaVA-Mini, first token behind a video, one visual token per frame",
        "frames",
        "seconds",
        "frames/s",
        "peak memory, GiB",
    )
    for length in (8, 80) if bench.tiny else (100, 1000, 10_000):
        ids = torch.tensor([bench.ids(43, length)], device=bench.device)
        size = torch.tensor([MediaSize(length, bench.image, bench.image)])

        def ask(ids: Tensor = ids, size: Tensor = size, length: int = length) -> int:
            with torch.inference_mode():
                found = net(
                    input_ids=ids,
                    pixel_values=Film(length, bench),
                    visual_sizes=size,
                    visual_modalities=torch.tensor([1]),
                    logits_to_keep=1,
                )
            return int(found.logits[0, -1].argmax())

        with bench.peak() as memory:
            _, seconds = bench.timed(ask)
        line(f"{length:,}", f"{seconds:.1f}", f"{length / seconds:,.0f}", of(memory[0]))


PARTS = {"decode": decode, "train": train, "first_token": first_token, "frames": frames}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after four fifths of this")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU; without a GPU always")
    options = parser.parse_args()
    chosen = options.parts.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"--parts: {unknown[0]} is unknown; known: {', '.join(PARTS)}")
    tiny = options.tiny or not torch.cuda.is_available()
    bench = Bench("cpu" if tiny else "cuda", tiny, options.minutes * 0.8)
    print("## Real sizes on a GPU\n" if not tiny else "## The GPU benchmark's small shape on a CPU: no measurement\n")
    print(f"`make bench-gpu`, {date.today()}, {bench.name}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {str(bench.dtype).removeprefix('torch.')}, random weights.")
    failed = False
    for name in chosen:
        if time.monotonic() > bench.deadline:
            print(f"\n{name}: left out, {options.minutes:g} minutes are nearly over")
            continue
        try:
            PARTS[name](bench)
        except Exception as error:  # the other parts are worth their minutes
            failed = True
            print(f"\n{name}: failed, {type(error).__name__}: {str(error)[:500]}", flush=True)
        bench.forget()
    sys.exit(failed)


if __name__ == "__main__":
    main()
