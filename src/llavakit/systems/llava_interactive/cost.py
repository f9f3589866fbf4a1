"""What one edit takes (spec section 12): sizes and calls; the paper claims no costs."""

from __future__ import annotations

from llavakit.editing.geometry import CANVAS, LATENT
from llavakit.proof.cost import CostReport
from llavakit.tools.rle import encode_mask

STEPS, GUIDED = 50, 2  # of the published generator; every step runs with and without the caption
SIDE, PATCH = 336, 14  # of the chat's encoder, LLaVA-1.5's


def cost() -> CostReport:
    """Section 12 as a report."""
    import numpy as np

    report = CostReport("llava-interactive")
    mask = np.zeros((CANVAS, CANVAS), bool)
    rows, columns = np.mgrid[:CANVAS, :CANVAS] - CANVAS // 2
    mask[rows**2 + columns**2 < (CANVAS // 4) ** 2] = True
    group = f"a mask of {CANVAS} x {CANVAS}"
    report.add("as it is", mask.nbytes, "bytes", group=group)
    report.add("a disc of half the width, as run lengths", len(encode_mask(mask)["counts"]), "bytes", group=group)
    group = "one edit with the published models"
    report.add("passes of the segmenter and of the hole filler", 2, "calls", group=group)
    report.add("passes of the generator", STEPS * GUIDED, "calls", group=group)
    report.add("latents of a pass", LATENT * LATENT, "positions", group=group)
    report.add("visual tokens of a message with the picture", (SIDE // PATCH) ** 2, "tokens", group="the chat")
    return report
