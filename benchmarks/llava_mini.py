"""LLaVA-Mini beside LLaVA-1.5 on one core: time to first token, and the memory of long videos, in one run.

    python benchmarks/llava_mini.py [--repeat 5] [--layers 32] [--hidden 512] [--frames 10000]

Both models have the same random encoder (CLIP's 24 x 24 patches at 336 px, narrow) and the same random decoder (as
deep as a 7B model, narrow), float32; they differ in the connector alone. Times are processor time of the process,
medians, taken in turns. Memory is the peak of a fresh process per length of video, frames made one by one.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch starts its threads

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llavakit.generation.engine import Engine
from llavakit.generation.request import Request, SamplingParams
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.cost import count
from llavakit.views.plan import MediaSize

TEXT = 43
VOCABULARY = 32000
SQUARE = {"type": "square", "size": 336}
MINI = {"type": "compressor_prefusion", "compressor_size": 1, "prefusion_layer_num": 4}


def model(connector: dict[str, Any], *, hidden: int, layers: int, image: int = 336) -> LlavakitForConditionalGeneration:
    """A model with random weights whose encoder is as wide as a quarter of CLIP-L relative to the decoder."""
    width = hidden // 4
    torch.manual_seed(0)
    views = {**SQUARE, "size": image}
    config = LlavakitConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": hidden * 11008 // 4096,
            "num_hidden_layers": layers,
            "num_attention_heads": max(hidden // 64, 1),
            "num_key_value_heads": max(hidden // 64, 1),
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 16384,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 24 if layers >= 8 else 2,
            "num_attention_heads": max(width // 64, 1),
            "image_size": image,
            "patch_size": 14,
        },
        connector=connector,
        media={"image": {"views": views}, "video": {"views": {"type": "frames", "frame": views}}},
        image_token_id=VOCABULARY,
    )
    return LlavakitForConditionalGeneration(config).eval()


def prompt(tokens: int, text: int = TEXT) -> Tensor:
    """Ids with `tokens` visual positions in the middle of the text."""
    words = torch.randint(3, VOCABULARY, (text,), generator=torch.Generator().manual_seed(1)).tolist()
    return torch.tensor([*words[:10], *[VOCABULARY] * tokens, *words[10:]])


def in_turns(repeat: int, *functions: Any) -> list[float]:
    """Median processor time of every function in milliseconds."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(repeat + 1):  # the first turn warms up
        for function, own in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            if number:
                own.append(1000 * (time.process_time() - start))
    return [statistics.median(own) for own in times]


def first_token(repeat: int, hidden: int, layers: int) -> None:
    """Time to first token of a new image, and of a new question about a known one."""
    nets = {
        "LLaVA-1.5": (model({"type": "mlp"}, hidden=hidden, layers=layers), 576),
        "LLaVA-Mini": (model(MINI, hidden=hidden, layers=layers), 1),
    }
    pixels = torch.randn(1, 3, 336, 336)

    @torch.no_grad()
    def forward(name: str) -> None:
        net, tokens = nets[name]
        net(input_ids=prompt(tokens)[None], pixel_values=pixels, logits_to_keep=1, use_cache=True)

    new = dict(zip(nets, in_turns(repeat, *(lambda n=name: forward(n) for name in nets)), strict=True))
    counted = {name: count(lambda n=name: forward(n)).linear / 1e9 for name in nets}  # layers with weights
    engines = {name: Engine(net, prefix_bytes=0) for name, (net, _) in nets.items()}

    def ask(name: str) -> None:
        ids = prompt(nets[name][1])
        ids[-5:] = torch.randint(3, VOCABULARY, (5,))
        sampling = SamplingParams(max_new_tokens=1, eos_token_ids=())
        engines[name].submit(Request(input_ids=ids, pixel_values=pixels, sampling=sampling)).result()

    known = dict(zip(nets, in_turns(repeat, *(lambda n=name: ask(n) for name in nets)), strict=True))
    print(f"\nTime to first token, {TEXT} text tokens, decoder {hidden} wide and {layers} deep, {repeat} repeats\n")
    print("| model | tokens in the decoder | GFLOPs counted | new image, ms | known image, new question, ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (_, tokens) in nets.items():
        print(f"| {name} | {tokens + TEXT} | {counted[name]:.1f} | {new[name]:.0f} | {known[name]:.0f} |")
    pairs = [(counts["LLaVA-1.5"] / counts["LLaVA-Mini"]) for counts in (counted, new, known)]
    print(f"| ratio | | {pairs[0]:.2f} | {pairs[1]:.2f} | {pairs[2]:.2f} |")


class Film:
    """Frames that are made when they are asked for."""

    def __init__(self, frames: int, size: int) -> None:
        self.frames, self.size = frames, size

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self.frames))]
        return torch.full((3, self.size, self.size), (index % 17) / 17)


def high_water() -> float:
    """Peak memory of this process in MB (Linux; `getrusage` would count the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _peak(frames: int, image: int, queue: Any) -> None:
    net = model(MINI, hidden=64, layers=2, image=image)
    size = torch.tensor([MediaSize(frames, image, image)])
    before = high_water()
    start = time.process_time()
    with torch.inference_mode():
        net.model.embed(
            prompt(frames)[None],
            pixel_values=Film(frames, image),
            visual_sizes=size,
            visual_modalities=torch.tensor([1]),
        )
    queue.put((before, high_water(), time.process_time() - start))


def long_videos(frames: int, image: int = 112) -> None:
    """Peak memory of pre-fusing videos of growing length."""
    print(f"\nPeak memory of a process that embeds a video of {image} px frames, {(image // 14) ** 2} patches each\n")
    print("| frames | pixels, MB | features, MB | before, MB | peak, MB | s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    context = multiprocessing.get_context("spawn")
    for length in (frames // 100, frames // 10, frames):
        queue = context.SimpleQueue()
        worker = context.Process(target=_peak, args=(length, image, queue))
        worker.start()
        before, peak, seconds = queue.get()
        worker.join()
        pixels, features = (4 * length * n / 2**20 for n in (3 * image**2, (image // 14) ** 2 * 16))
        print(f"| {length:,} | {pixels:.0f} | {features:.0f} | {before:.0f} | {peak:.0f} | {seconds:.0f} |")


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--frames", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; {' '.join(sys.argv)}")
    first_token(options.repeat, options.hidden, options.layers)
    long_videos(options.frames)


if __name__ == "__main__":
    main()
