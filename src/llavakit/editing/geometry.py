"""Arithmetic on pictures, masks and boxes that the skills of a session share.

Boxes are (x0, y0, x1, y1) in pixels with both ends inside, unless they are said to be fractions.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]
CANVAS = 512  # side of the square in which boxes are drawn and pictures are generated
LATENT = 64  # side of the generator's latent square


def extent(mask: np.ndarray) -> Box | None:
    """The box around everything that is not zero; None if all is.

    Args:
        mask: [height, width], or [height, width, channels] of which any counts.
    """
    inside = np.asarray(mask) != 0
    if inside.ndim == 3:
        inside = inside.any(-1)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def centre(image: np.ndarray, side: int) -> np.ndarray:
    """The square of this side in the middle of [height, width, ...]; cut off where the picture ends."""
    top, left = (size // 2 - side // 2 for size in image.shape[:2])
    return image[top : top + side, left : left + side]


def with_centre(image: np.ndarray, square: np.ndarray) -> np.ndarray:
    """The picture with a square in its middle replaced."""
    top, left = (size // 2 - square.shape[0] // 2 for size in image.shape[:2])
    changed = image.copy()
    changed[top : top + square.shape[0], left : left + square.shape[1]] = square
    return changed


def centre_square(image: np.ndarray, side: int, size: int | None = None) -> np.ndarray:
    """The middle square of a uint8 picture or mask, resized (bicubic).

    Args:
        side: Of the result.
        size: Of what is cut out; default: the shorter side.
    """
    cut = centre(image, min(image.shape[:2]) if size is None else size)
    return np.asarray(Image.fromarray(np.ascontiguousarray(cut)).resize((side, side)))
