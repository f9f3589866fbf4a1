"""What LLaVA-o1 costs at its published dimensions (spec section 12): the model, and searches over its stages.

The published model is Llama-3.2-11B-Vision: a picture of four tiles enters through cross-attention, so its 6,404
positions are no positions of the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, MllamaConfig

from llavakit.proof.cost import CostReport, count, on_meta, parameters

IMAGE, TILES, PER_TILE = 560, 4, 1601
PROMPT, STAGE, STAGES = 64, 62, 4  # tokens of a question, and of each of four stages: about 250 in all
CANDIDATES = (2, 4, 10)


def calls(candidates: int) -> dict[str, tuple[int, int]]:
    """Least and most model calls of a stage search: `generated` candidates, comparisons that see the picture, checks.

    Of every comparison of reasonings a check that fails saves what would follow it.
    """
    games = candidates - 1
    return {
        "candidates": (STAGES * candidates,) * 2,
        "comparisons": ((STAGES - 1) * games, STAGES * games),
        "checks": (games, 2 * games),
    }


def cost() -> CostReport:
    """Section 12 as a report."""
    report = CostReport("llava-o1")
    config = MllamaConfig(vision_config={"image_size": IMAGE, "max_num_tiles": TILES})
    text, vision = config.text_config, config.vision_config
    model = on_meta(lambda: AutoModelForImageTextToText.from_config(config, attn_implementation="eager"))
    core, seen = model.model, TILES * PER_TILE

    group = "Llama-3.2-11B-Vision"
    report.add("parameters", parameters(model), "parameters", group=group)
    report.add("tensors", len(model.state_dict()), "tensors", group=group)
    pixels = _empty(1, 1, TILES, 3, IMAGE, IMAGE)
    ratios = {"aspect_ratio_ids": _ones(1, 1), "aspect_ratio_mask": _ones(1, 1, TILES)}
    encoder = count(lambda: core.vision_model(pixels, **ratios)).total
    wide = _empty(1, seen, vision.vision_output_dim)
    projector = count(lambda: core.multi_modal_projector(wide)).total
    report.add(f"encoder, one picture of {TILES} tiles", encoder, "FLOPs", group=group)
    report.add("projector", projector, "FLOPs", group=group)
    report.add("positions that cross-attention sees", seen, "positions", group=group)

    for length in (64, 300):
        report.add(
            f"decoder, {length} text tokens, without the head",
            _prompt(core.language_model, length, seen),
            "FLOPs",
            group=group,
        )
        head = 2 * length * text.hidden_size * text.vocab_size
        report.add(f"head, {length} text tokens", head, "FLOPs", group=group)

    picture = encoder + projector
    one = (
        _prompt(core.language_model, 300, seen) - _prompt(core.language_model, 64, seen)
    ) // 236 + 2 * text.hidden_size * text.vocab_size
    report.add("a generated token", one, "FLOPs", group=group)
    report.add("tokens that cost as much as the picture", picture // one, "tokens", group=group)
    prefixes = [_prompt(core.language_model, PROMPT + STAGE * done, seen) for done in range(STAGES)]
    for candidates in CANDIDATES:
        found = calls(candidates)
        group = f"stage search, {candidates} candidates"
        generated = found["candidates"][0]
        report.add("candidates", generated, "calls", group=group)
        for name in ("comparisons", "checks"):
            report.add(f"{name}, least", found[name][0], "calls", group=group)
            report.add(f"{name}, most", found[name][1], "calls", group=group)
        report.add("pictures encoded as published, most", generated + found["comparisons"][1], "pictures", group=group)
        report.add("pictures encoded here", 1, "pictures", group=group)
        again = candidates * sum(prefixes)
        report.add("prefixes of candidates as published", again, "FLOPs", group=group)
        report.add(
            "the same here: the prompt once, kept stages",
            prefixes[0] + STAGE * (STAGES - 1) * one,
            "FLOPs",
            group=group,
        )
        report.add("pictures of candidates as published", generated * picture, "FLOPs", group=group)
        report.add("pictures of candidates here", picture, "FLOPs", group=group)
        report.add("tokens that are generated, both", generated * STAGE * one, "FLOPs", group=group)
    report.notes = [
        f"Searches: a prompt of {PROMPT} tokens, four stages of {STAGE}; the judge's texts are not counted.",
        "Here candidates fork from states that are kept, and the judge's questions reuse the picture's vectors.",
    ]
    return report


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long, device="meta")


def _prompt(decoder: Any, length: int, seen: int) -> int:
    """FLOPs of the decoder on a prompt that sees a picture."""
    return count(
        lambda: decoder(
            input_ids=_ones(1, length),
            attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device="meta"),
            position_ids=torch.arange(length, device="meta")[None],
            cross_attention_states=_empty(1, seen, decoder.config.hidden_size),
            cross_attention_mask=_empty(1, 1, length, seen),
            full_text_row_masked_out_mask=_empty(1, 1, length, 1),
            use_cache=False,
        )
    ).total
