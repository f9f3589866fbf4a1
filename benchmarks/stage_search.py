"""Stage search as LLaVA-o1 published it beside llavakit's: the same tokens for the same seeds, in one run.

    OMP_NUM_THREADS=1 python benchmarks/stage_search.py [--candidates 4] [--repeats 3]

Both run `by_stage` with the published judge on one model with random weights, which writes stages of 24 tokens and
verdicts of 12; a verdict is read off its tokens. The published way asks for every candidate and every judgement alone,
picture and prefix again each time; llavakit's decodes candidates together, from prefixes and vectors that are kept.
Counted are FLOPs of matrix products, and processor time.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llavakit.generation import Engine, Request, SamplingParams
from llavakit.generation.sampling import choice_seed
from llavakit.generation.search import Branch, expand_branches
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.systems.llava_o1.judging import Judge
from llavakit.systems.llava_o1.searching import by_stage
from llavakit.systems.llava_o1.stages import NAMES, end_of

VOCABULARY, TOKEN, IMAGE, PATCH = 1024, 1023, 224, 14
VISUAL, QUESTION, STAGE, VERDICT, WORDS = (IMAGE // PATCH) ** 2, 32, 24, 12, 60


class Flops(TorchDispatchMode):
    """Counts FLOPs of matrix products, attention's among them."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counter = flop_registry.get(func._overloadpacket)
        if counter is None:
            with self:
                found = func.decompose(*args, **kwargs or {})
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs or {})
        self.total += 0 if counter is None else counter(*args, **kwargs or {}, out_val=found)
        return found


def new_model(layers: int, width: int) -> LlavakitForConditionalGeneration:
    """CLIP 12 x 192 and a Llama, random."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    text |= {"num_attention_heads": width // 32, "num_key_value_heads": width // 32, "vocab_size": VOCABULARY}
    vision = {"model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 768}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 6, "image_size": IMAGE, "patch_size": PATCH}
    media = {"image": {"views": {"type": "pad", "size": IMAGE}}}
    text["max_position_embeddings"] = 2048
    config = LlavakitConfig(text_config=text, vision_config=vision, media=media, image_token_id=TOKEN)
    return LlavakitForConditionalGeneration(config).eval()


class Way:
    """One way to run a search.

    Args:
        alone: Ask for everything alone and keep nothing, as published.
    """

    def __init__(self, model: LlavakitForConditionalGeneration, alone: bool) -> None:
        kept = {"prefix_bytes": 0, "feature_bytes": 0} if alone else {}
        self.engine, self.alone = Engine(model, max_batch=16, **kept), alone
        self.calls = 0

    def expand(self, branches: Sequence[Branch], sampling: SamplingParams) -> list[list[Branch]]:
        """Candidates of a fixed length, written as a stage."""
        (branch,), marker = branches, sampling.stop[0]
        fixed = replace(sampling, stop=(), max_new_tokens=STAGE, eos_token_ids=())
        if self.alone:
            parts = [replace(fixed, n=1, seed=choice_seed(fixed.seed, place)) for place in range(fixed.n)]
            found = [expand_branches(self.engine, [branch], own)[0][0] for own in parts]
        else:
            (found,) = expand_branches(self.engine, [branch], fixed)
        self.calls += len(found)
        name = next(name for name in NAMES if end_of(name) == marker)
        return [[self._written(branch, own, name) for own in found]]

    @staticmethod
    def _written(before: Branch, branch: Branch, name: str) -> Branch:
        words = " ".join(map(str, branch.ids[len(before.ids) :]))
        last = replace(branch.last, finish_reason="stop", stop=end_of(name))
        return replace(branch, text=f"{before.text}<{name}> {words} {end_of(name)}", last=last)

    def ask(self, text: str, picture: bool) -> str:
        """A verdict, read off the last token."""
        ids = [int(word) for word in re.findall(r"\d{2,}", text)]
        request = self.request([*range(10, 10 + WORDS), *ids], self.pixels if picture else None)
        request.sampling = SamplingParams(max_new_tokens=VERDICT, temperature=0.6, seed=self.calls, eos_token_ids=())
        self.calls += 1
        (reply,) = self.engine.generate([request])
        first = sum(reply.token_ids) % 2
        return f"I choose response {1 + first}" if picture else ("correct", "incorrect")[first]

    @staticmethod
    def request(ids: list[int], pixels: torch.Tensor | None) -> Request:
        """A prompt, behind a picture if there is one."""
        if pixels is None:
            return Request(input_ids=ids)
        sizes = torch.tensor([[1, IMAGE, IMAGE]])
        return Request(input_ids=[1, *[TOKEN] * VISUAL, *ids], pixel_values=pixels, visual_sizes=sizes)

    def run(self, candidates: int, seed: int) -> tuple[int, ...]:
        """Tokens of one reply to a new picture."""
        self.engine.forget()
        draws, self.calls = random.Random(seed), 0
        self.pixels = torch.randn(1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))
        question = [draws.randrange(10, 1000) for _ in range(QUESTION)]
        root = Branch(self.request(question, self.pixels))
        sampling = SamplingParams(n=candidates, temperature=0.6, top_p=0.9, seed=seed, max_new_tokens=2048)
        judge = Judge(self.ask, " ".join(map(str, question)))
        *_, reply = by_stage(self.expand, root, sampling, judge, draws.randrange)
        return reply.ids


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = new_model(arguments.layers, arguments.width)
    ways = {"published": Way(model, alone=True), "llavakit": Way(model, alone=False)}
    flops, replies, seconds = {}, {}, {name: [] for name in ways}
    for name, way in ways.items():
        with Flops() as counted:
            replies[name] = way.run(arguments.candidates, 0)
        flops[name] = counted.total
    if len(set(replies.values())) > 1:
        raise AssertionError("the two ways gave other tokens")
    calls = ways["published"].calls
    found = set(replies.values())
    for repeat in range(arguments.repeats):
        found = set()
        for name, way in ways.items():
            started = time.process_time()
            found.add(way.run(arguments.candidates, repeat + 1))
            seconds[name].append(time.process_time() - started)
        if len(found) > 1:
            raise AssertionError("the two ways gave other tokens")
    kept = len(next(iter(found)))
    print(f"{arguments.candidates} candidates a stage, {calls} calls, {kept} tokens kept, {VISUAL} visual tokens")
    print("| | GFLOPs | ratio | processor s | ratio |\n|---|---|---|---|---|")
    taken = {name: statistics.median(own) for name, own in seconds.items()}
    for name in ways:
        ratios = flops[name] / flops["published"], taken[name] / taken["published"]
        print(f"| {name} | {flops[name] / 1e9:.1f} | {ratios[0]:.2f} | {taken[name]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
