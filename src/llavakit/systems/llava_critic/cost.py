"""What LLaVA-Critic's preference rounds cost at published scale (spec section 12): calls, FLOPs of a step, memory."""

from __future__ import annotations

from transformers import Qwen2Config, SiglipVisionConfig

from llavakit.checkpoints.siglip_qwen import SIGLIP, kept_tower
from llavakit.connectors.general import MLP
from llavakit.evaluation.rewards import ordered_pairs
from llavakit.proof.cost import (
    CostReport,
    language_model,
    on_meta,
    parameters,
    prefill_flops,
    vision_flops,
    vision_model,
)
from llavakit.vision.known import KNOWN_ENCODERS

PROMPTS, ANSWERS, ROUNDS = 9_400, 5, 3
VIEWS, VISUAL, TEXT = 2, 1_485, 300  # of one image of 384 x 384, and of prompt and answer beside it
ANSWER = 200  # of them in the answer, for the logits
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


def cost() -> CostReport:
    """Section 12 as a report."""
    report = CostReport("llava-critic")
    calls = PROMPTS * len(ordered_pairs(ANSWERS))
    group = f"preference rounds: {PROMPTS:,} prompts, {ANSWERS} answers each"
    report.add("answers that are sampled in a round", PROMPTS * ANSWERS, "calls", group=group)
    report.add("judgements of ordered pairs in a round", calls, "calls", group=group)
    report.add(f"judgements in {ROUNDS} rounds", ROUNDS * calls, "calls", group=group)

    siglip = SiglipVisionConfig(**{k: v for k, v in kept_tower(KNOWN_ENCODERS[SIGLIP]).items() if k != "model_type"})
    config = Qwen2Config(**QWEN2_7B)
    decoder = language_model(config)
    projector = on_meta(lambda: MLP(vision_width=siglip.hidden_size, hidden_size=config.hidden_size))
    total = parameters(decoder) + parameters(projector) + parameters(vision_model(siglip))
    view, length = vision_flops(siglip).total, VISUAL + TEXT
    layer = language_model(Qwen2Config(**QWEN2_7B | {"num_hidden_layers": 1}))
    row = prefill_flops(layer, length, head=False).total * config.num_hidden_layers
    group = f"a pair on the 7B model: {VIEWS} views, {VISUAL:,} visual and {TEXT} text tokens"
    report.add("encoder, both answers in policy and reference", 2 * 2 * VIEWS * view, "FLOPs", group=group)
    report.add("encoder, once per pair in each, as llavakit runs it", 2 * VIEWS * view, "FLOPs", group=group)
    report.add("layers, forward, one answer", row, "FLOPs", group=group)
    report.add("layers, forward, both answers in policy and reference", 4 * row, "FLOPs", group=group)

    logits = 4 * config.vocab_size
    group = "memory"
    report.add("parameters of the reference", total, "parameters", group=group)
    report.add("a copy of it, 16 bit", 2 * total, "bytes", group=group)
    report.add("logits of both answers at all positions, 32 bit", 2 * length * logits, "bytes", group=group)
    report.add(f"logits at {ANSWER} positions of each answer", 2 * ANSWER * logits, "bytes", group=group)
    report.notes = [
        "Judgements see both orders of every two answers, so that a favoured place cancels.",
        "llavakit keeps the reference's log-probabilities, so its copy is not in memory while the policy trains.",
    ]
    return report
