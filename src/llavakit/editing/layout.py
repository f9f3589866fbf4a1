"""Requests to a generator of pictures with things at given places, in the form of the published page.

The generator works on a 512 x 512 square. What is asked for is a caption, and a phrase for every box; `auto` is a box
without a phrase, whose content the caption decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llavakit.editing.geometry import CANVAS, LATENT, centre_square, with_centre
from llavakit.editing.tabs import CREATE, INPAINT
from llavakit.errors import UserError

AUTO = "auto"
TAU, GUIDANCE, SAMPLES = 0.3, 7.5, 1
SHARE = 0.9  # of the shorter side, where only a middle square is drawn on
MARGIN = 0.05  # on every side of the middle square


class Mismatch(UserError):
    """Phrases and boxes that are not equally many."""


class NothingToAdd(UserError):
    """A request to add to a picture that says nothing of what and where."""


class NothingToMake(UserError):
    """A request for a new picture that does not describe it."""


@dataclass(frozen=True)
class LayoutRequest:
    """What the generator is asked for.

    Attributes:
        tab: `INPAINT` or `CREATE`.
        caption: The whole picture.
        phrases: Box of every phrase, in fractions of the square; of equal phrases the last box.
        boxes: All boxes, in fractions of the square.
        image: RGB uint8 [512, 512, 3] that is added to; None for a new picture.
        kept: Latents [64, 64] that are kept (1), if a mask says so instead of the boxes.
        original: RGB picture whose middle the square is, if only that was painted on.
        tau: Share of the steps with grounding; adding to a picture always takes all.
        guidance: Weight of the caption.
        samples: Pictures to make.
    """

    tab: str
    caption: str
    phrases: Mapping[str, Sequence[float]]
    boxes: Sequence[Sequence[float]]
    image: np.ndarray | None = None
    kept: np.ndarray | None = None
    original: np.ndarray | None = None
    tau: float = TAU
    guidance: float = GUIDANCE
    samples: int = SAMPLES

    def result(self, square: np.ndarray) -> np.ndarray:
        """The picture that a generated square makes: itself, or the original with its middle replaced."""
        if self.original is None:
            return square
        return with_centre(self.original, centre_square(square, min(self.original.shape[:2])))


def layout_request(
    tab: str,
    boxes: Sequence[Sequence[float]],
    text: str,
    instruction: str = "",
    *,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    original: np.ndarray | None = None,
    side: int | None = None,
    tau: float = TAU,
    guidance: float = GUIDANCE,
) -> LayoutRequest:
    """A request from boxes in the 512 x 512 square and a text.

    Args:
        text: Phrases, one per box, separated by semicolons.
        instruction: The caption; every phrase that it does not hold is appended.
        image: RGB that is added to; default: `original`.
        mask: uint8 picture; what is not zero is made anew instead of the boxes.
        original: RGB picture of the canvas.
        side: Side of its middle square, if only that was painted on.

    Raises:
        Mismatch: If phrases and boxes are not equally many.
        NothingToAdd: If something is to be added without a box or to no picture.
        NothingToMake: If a new picture is wanted without a caption.
    """
    phrases = [phrase.strip() for phrase in text.split(";")] if text else []
    if len(phrases) != len(boxes):
        raise Mismatch(f"{len(phrases)} phrases for {len(boxes)} boxes; separate them by semicolons, one for each box")
    if not boxes and tab == INPAINT:
        raise NothingToAdd("nothing is to be added; draw a box and say what it holds")
    if tab == CREATE and not instruction:
        raise NothingToMake("nothing is to be made; describe the picture")
    fractions = [[value / CANVAS for value in box] for box in boxes]
    shrunk = tab == INPAINT and bool(side)
    if shrunk:
        fractions = [[value * SHARE + MARGIN for value in box] for box in fractions]
    grounded = {phrase: box for phrase, box in zip(phrases, fractions, strict=True) if not (shrunk and phrase == AUTO)}
    caption = instruction
    for phrase in phrases:
        if phrase not in caption and phrase != AUTO:
            caption += f"; {phrase}"
    if tab == CREATE:
        return LayoutRequest(tab, caption, grounded, fractions, tau=tau, guidance=guidance)
    image = original if image is None else image
    if image is None:
        raise NothingToAdd("image: there is no picture that could be added to")
    kept = None if mask is None else (centre_square(np.asarray(mask), LATENT) == 0).astype(np.float32)
    square = centre_square(np.asarray(image), CANVAS)
    shown = original if shrunk else None
    return LayoutRequest(tab, caption, grounded, fractions, square, kept, shown, tau, guidance)
