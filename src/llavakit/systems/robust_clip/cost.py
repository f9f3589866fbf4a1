"""What robust training and attacks cost at published dimensions."""

from __future__ import annotations

import functools

from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llavakit.proof.cost import CostReport, on_meta, parameters, vision_flops
from llavakit.vision.known import KNOWN_ENCODERS

LARGE, SIDES = "openai/clip-vit-large-patch14", (224, 336)
STEPS, BATCH, INNER = 20_000, 128, 10
ENSEMBLE, ITERATIONS, TARGETED = 6, 100, 10_000


@functools.cache
def _config(side: int) -> CLIPVisionConfig:
    own = {key: value for key, value in KNOWN_ENCODERS[LARGE].items() if key != "model_type"}
    return CLIPVisionConfig(**own | {"image_size": side})


@functools.cache
def tower(side: int) -> tuple[int, int]:
    """FLOPs of a picture and parameters of the tower, the projection included."""
    config = _config(side)
    module = on_meta(lambda: CLIPVisionModelWithProjection(config))
    projection = 2 * config.hidden_size * config.projection_dim
    return vision_flops(config).total + projection, parameters(module)


def forwards(*, published: bool) -> int:
    """Passes of the tower per picture and training step; a backward pass to the pixels is one more, a full one two.

    Original embedding, ten inner steps, the step on the attacked picture; the published loop also computes clean
    embeddings that nothing reads.
    """
    return 1 + 2 * INNER + 3 + (1 if published else 0)


def cost() -> CostReport:
    """Everything as a report."""
    report = CostReport("robust-clip")
    for side in SIDES:
        flops, count = tower(side)
        group = f"CLIP ViT-L/14, {side} x {side}"
        report.add("one picture", flops, "FLOPs", group=group)
        report.add("tower with projection", count, "parameters", group=group)
    flops, _ = tower(224)
    group = "FARE, one step per picture"
    for name, published in (("as published", True), ("llavakit", False)):
        passes = forwards(published=published)
        report.add(f"forward passes, {name}", passes, "passes", group=group)
        report.add(f"work, {name}", passes * flops, "FLOPs", "4.05 TFLOP" if published else None, group=group)
    whole = STEPS * BATCH
    report.add("pictures of a training", whole, "pictures", group=group)
    report.add("a training, as published", whole * forwards(published=True) * flops, "FLOPs", "1.04e19", group=group)
    group = "attacks on a LLaVA, per picture"
    report.add("gradients of the caption ensemble, at most", ENSEMBLE * (ITERATIONS + 1), "passes", group=group)
    report.add("gradients of a targeted attack", TARGETED + 1, "passes", group=group)
    for side in SIDES:
        report.add(f"visual tokens at {side} px", (side // 14) ** 2, "tokens", group=group)
    report.notes.append("A multiply-add counts as two; TeCoA adds a matrix product of 768 x 1000 per embedding.")
    return report
