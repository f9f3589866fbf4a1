"""Attacks and robust training beside the published way: same results, less processor time.

    OMP_NUM_THREADS=1 python benchmarks/robust_clip.py [apgd] [throughput] [fare] [--pictures 1000] [--steps 100]

apgd         AutoAttack's two gradient attacks on drawn pictures, beside the package pyautoattack: same steps, same
             random start. Needs `pip install --no-deps pyautoattack`; left out where it is missing.
throughput   16 pictures, 100 steps, the loss of a caption through a whole model, beside one picture at a time.
fare         a training step of FARE beside the published loop, from the same encoder and first perturbation.

What stands for the published way is written from its description: one picture at a time through the whole prompt with
the logits of all positions; and a loop whose inner attack keeps gradients of the parameters in reach, runs the last
layer for all tokens and computes clean embeddings that nothing reads.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.robustness.apgd import Judged, apgd
from llavakit.robustness.autoattack import AutoAttack, autoattack
from llavakit.robustness.embedding import Embedder
from llavakit.robustness.losses import squared_distance, unit
from llavakit.robustness.model_attack import TextLoss
from llavakit.robustness.pgd import pgd
from llavakit.robustness.stand_ins import COLOURS, SHAPES, draw, harden, train_clip
from llavakit.views.pixels import CLIP_MEAN, CLIP_STD

EPS = 4 / 255


def seconds(function: Callable[[], object]) -> tuple[float, object]:
    """Processor time of a call, and what it gave."""
    begun = time.process_time()
    found = function()
    return time.process_time() - begun, found


# AutoAttack


def classifier() -> tuple[Callable[[Tensor], Tensor], int]:
    """A small zero-shot classifier of shape and colour that attacks fool in part."""
    plain, texts = train_clip(0, steps=200)
    encoder = harden(plain, "fare", 0, steps=60, eps=EPS)
    shapes = torch.arange(len(SHAPES)).repeat_interleave(len(COLOURS))
    colours = torch.arange(len(COLOURS)).repeat(len(SHAPES))
    columns = texts(torch.stack([shapes, colours, torch.full_like(shapes, -1)], 1)).detach().T
    embed = Embedder(encoder, normalise=True)
    return lambda pixels: 14.0 * embed(pixels) @ columns, len(shapes)


def measure_apgd(pictures: int, steps: int) -> None:
    """Robust accuracy beside pyautoattack's own."""
    try:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    except ImportError:
        print("apgd: left out; pip install --no-deps pyautoattack")
        return
    classify, classes = classifier()
    drawn = draw(pictures, torch.Generator().manual_seed(7))
    labels = drawn.shape * len(COLOURS) + drawn.colour
    with torch.no_grad():
        clean = float((classify(drawn.pixels).argmax(-1) == labels).float().mean())
    print(f"\napgd: {pictures} drawn pictures, {classes} classes, eps 4/255, {steps} steps; clean accuracy {clean:.3f}")
    print("| attack | robust, pyautoattack | robust, llavakit | equal | s, pyautoattack | s, llavakit |")
    print("|---|---|---|---|---|---|")
    given = {"n_iter": steps, "norm": "Linf", "eps": EPS, "seed": 0, "device": "cpu", "verbose": False}
    for name in ("apgd-ce", "apgd-t"):
        if name == "apgd-ce":
            theirs = APGDAttack(classify, n_restarts=1, **given)
        else:
            theirs = APGDAttack_targeted(classify, n_restarts=1, n_target_classes=9, **given)
        spent, attacked = seconds(lambda attack=theirs: attack.perturb(drawn.pixels, labels))
        with torch.no_grad():
            robust = classify(attacked).argmax(-1) == labels
        settings = AutoAttack(eps=EPS, steps=steps, attacks=(name,), seed=0)
        own, found = seconds(lambda settings=settings: autoattack(classify, drawn.pixels, labels, settings))
        equal = int((robust == found.robust).sum())
        rates = f"{robust.float().mean():.3f} | {found.robust.float().mean():.3f}"
        print(f"| {name} | {rates} | {equal} of {pictures} | {spent:.1f} | {own:.1f} |", flush=True)


# Whole models


def language_and_vision() -> LlavakitForConditionalGeneration:
    """A model with random weights: 64 visual tokens, four layers of width 128 in the decoder."""
    torch.manual_seed(0)
    config = LlavakitConfig(
        text_config={"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
        | {"num_attention_heads": 4, "vocab_size": 4096, "max_position_embeddings": 512},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 384}
        | {"num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 8},
        connector={"type": "mlp"},
        media={"image": {"views": {"type": "squash", "size": 64}}},
        image_token_id=4095,
    )
    return LlavakitForConditionalGeneration(config).eval()


def caption_samples(model: LlavakitForConditionalGeneration, count: int) -> list[dict[str, object]]:
    """Prompts as the captioning attack has them: 35 tokens, the picture, 14 tokens, a caption of 12."""
    generator, samples = torch.Generator().manual_seed(1), []
    before, after = (torch.randint(5, 4000, (length,), generator=generator).tolist() for length in (35, 14))
    for _ in range(count):
        caption = torch.randint(5, 4000, (12,), generator=generator).tolist()
        ids = [*before, *[model.config.image_token_id] * 64, *after, *caption]
        labels = [*[-100] * (len(ids) - len(caption)), *caption]
        own = {"input_ids": ids, "labels": labels, "visual_sizes": [(1, 64, 64)], "visual_modalities": [0]}
        samples.append(own)
    return samples


def measure_throughput(steps: int, count: int = 16) -> None:
    """A caption's attack on several pictures together, beside one at a time through everything."""
    model = language_and_vision()
    samples = caption_samples(model, count)
    clean = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    together = TextLoss.of_views(model, samples, CLIP_MEAN, CLIP_STD)

    def batched() -> Tensor:
        return apgd(lambda points, rows: Judged(together(points, rows)), clean, eps=EPS, steps=steps).best_loss

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def alone() -> Tensor:
        found = []
        for picture, sample in zip(clean, samples, strict=True):
            ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))

            def judge(points: Tensor, rows: Tensor, ids: Tensor = ids, labels: Tensor = labels) -> Judged:
                out = model(input_ids=ids, pixel_values=(points - mean) / std, labels=labels, use_cache=False)
                return Judged(out.loss.reshape(1))

            found.append(apgd(judge, picture[None], eps=EPS, steps=steps).best_loss)
        return torch.cat(found)

    model.requires_grad_(True)  # as loaded: the published code leaves it so
    one, single = seconds(alone)
    model.requires_grad_(False)
    all_, several = seconds(batched)
    print(f"\nthroughput: {count} pictures, {steps} steps, a caption's loss")
    print("| | processor s | gradients/s |\n|---|---|---|")
    for name, spent in (("one picture at a time, as published", one), ("llavakit, together", all_)):
        print(f"| {name} | {spent:.1f} | {count * steps / spent:.0f} |")
    print(f"| ratio | {all_ / one:.2f} | {one / all_:.2f} |")
    print(f"largest difference of final losses {float((single - several).abs().max()):.1e}", flush=True)


# Training


def measure_fare(repeats: int, width: int = 256, layers: int = 4, batch: int = 16) -> None:
    """A step of FARE beside the published loop."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    config.image_size, config.patch_size, config.projection_dim, config.hidden_act = 64, 8, 128, "quick_gelu"
    original = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    pixels = torch.rand(batch, 3, 64, 64)
    start = EPS * (2 * torch.rand(pixels.shape) - 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def whole(encoder: CLIPVisionModelWithProjection, points: Tensor) -> Tensor:
        return encoder((points - mean) / std).image_embeds

    def published() -> float:
        own = copy.deepcopy(original).requires_grad_(True)
        optimiser = torch.optim.AdamW(own.parameters(), lr=1e-5, weight_decay=1e-4)
        for _ in range(repeats):
            with torch.no_grad():
                wanted = whole(original, pixels)
            attacked = pgd(
                lambda points, wanted=wanted: squared_distance(whole(own, points), wanted).mean(),
                pixels,
                eps=EPS,
                step=1 / 255,
                steps=10,
                start=start,
            )
            clean = whole(own, pixels)  # the published loop computes it and reads it in its log alone
            found = whole(own, attacked)
            value = squared_distance(found, wanted).mean()
            with torch.no_grad():  # what it logs of every step
                F.cosine_similarity(clean, wanted).mean(), F.cosine_similarity(found, wanted).mean()
                unit(clean), unit(found)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        return float(value)

    def ours() -> float:
        own = copy.deepcopy(original).requires_grad_(True)
        optimiser = torch.optim.AdamW(own.parameters(), lr=1e-5, weight_decay=1e-4, fused=True)
        embed, first = Embedder(own), Embedder(original)
        for _ in range(repeats):
            with torch.no_grad():
                wanted = first(pixels)
            own.requires_grad_(False)
            attacked = pgd(
                lambda points, wanted=wanted: squared_distance(embed(points), wanted).mean(),
                pixels,
                eps=EPS,
                step=1 / 255,
                steps=10,
                start=start,
            )
            own.requires_grad_(True)
            value = squared_distance(embed(attacked), wanted).mean()
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        return float(value)

    rounds = [(seconds(published), seconds(ours)) for _ in range(3)]
    theirs, own = (statistics.median(entry[side][0] for entry in rounds) for side in (0, 1))
    print(f"\nfare: {layers} layers of width {width}, 65 tokens, batch {batch}, {repeats} steps of 10 inner steps")
    print("| | processor s | pictures/s | loss |\n|---|---|---|---|")
    for name, spent, side in (("published loop", theirs, 0), ("llavakit", own, 1)):
        print(f"| {name} | {spent:.2f} | {repeats * batch / spent:.1f} | {rounds[0][side][1]:.6f} |")
    print(f"| ratio | {own / theirs:.2f} | {theirs / own:.2f} | |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=["apgd", "throughput", "fare", []], default=[])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100, help="of the attacks")
    parser.add_argument("--repeats", type=int, default=3, help="training steps")
    given = parser.parse_args()
    torch.set_num_threads(1)
    which = given.which or ["fare", "throughput", "apgd"]
    if "fare" in which:
        measure_fare(given.repeats)
    if "throughput" in which:
        measure_throughput(given.steps)
    if "apgd" in which:
        measure_apgd(given.pictures, given.steps)


if __name__ == "__main__":
    main()
