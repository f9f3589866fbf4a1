"""Classical inpainting with OpenCV: an area is filled from what surrounds it.

Colours are continued inwards from the border of the hole. Small holes in even surroundings vanish; texture is not
continued, and nothing new can be put in.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from llavakit.tools.skill import Outcome, Skill, SkillError, absent, mask, number, parameters, picture

METHODS = ("telea", "navier_stokes")
DILATION = 0.01  # share of the shorter side by which a mask grows: its edge has the colours of what is removed


def inpaint(
    image: Image.Image,
    mask: np.ndarray,
    *,
    method: str = "telea",
    radius: float = 3.0,
    dilation: float | None = None,
) -> Outcome:
    """The picture with an area filled from its surroundings.

    Args:
        image: RGB picture.
        mask: Boolean matrix [height, width] of the picture's size: what is to go.
        method: Of `METHODS`.
        radius: Pixels around a point that decide about it.
        dilation: Pixels by which the mask is grown first; default: 1 % of the shorter side, at least 1.

    Returns:
        `area` that was filled, as a share of the picture; the picture `edited_image`, and the grown mask.

    Raises:
        SkillError: If the mask has another size, is empty or covers everything.
    """
    import cv2

    pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
    hole = np.asarray(mask).astype(bool)
    if hole.shape != pixels.shape[:2]:
        raise SkillError(
            f"mask: is {' x '.join(map(str, hole.shape[::-1]))} pixels, the picture {image.width} x {image.height}"
        )
    if not hole.any():
        raise SkillError("mask: is empty, so nothing is removed")
    grow = max(1, round(DILATION * min(hole.shape))) if dilation is None else int(dilation)
    if grow:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * grow + 1, 2 * grow + 1))
        hole = cv2.dilate(hole.astype(np.uint8), kernel).astype(bool)
    if hole.all():
        raise SkillError("mask: covers the whole picture, so there is nothing to fill it from")
    flag = cv2.INPAINT_NS if method == "navier_stokes" else cv2.INPAINT_TELEA
    filled = cv2.inpaint(pixels, hole.astype(np.uint8), radius, flag)
    return Outcome(
        {"area": round(float(hole.mean()), 4)}, pictures={"edited_image": Image.fromarray(filled)}, masks=(hole,)
    )


def inpainting_skill() -> Skill:
    """The skill `inpaint`."""
    return Skill(
        name="inpaint",
        description="Remove an area of the picture and fill it from its surroundings.",
        parameters=parameters(
            image=picture(),
            mask=mask("What is to go; default: the last mask."),
            method={"enum": list(METHODS), "description": "How the hole is filled.", "default": METHODS[0]},
            radius=number("Pixels around a point that decide about it.", 1, 64, 3),
            dilation=number("Pixels by which the area is grown first.", 0, 256),
        ),
        function=inpaint,
        needs=("opencv-python",),
        missing=absent("cv2", "opencv-python", "tools"),
    )
