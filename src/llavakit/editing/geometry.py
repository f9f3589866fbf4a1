"""Arithmetic on pictures, masks and boxes that the skills of a session share.

Boxes are (x0, y0, x1, y1) in pixels with both ends inside, unless they are said to be fractions.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def mirrored(array: np.ndarray, multiple: int = 8) -> np.ndarray:
    """[channels, height, width] extended to multiples at the right and the bottom, mirrored with the edge repeated."""
    _, height, width = array.shape
    return np.pad(array, ((0, 0), (0, -height % multiple), (0, -width % multiple)), mode="symmetric")


def kept_latents(boxes: Sequence[Sequence[float]], size: Sequence[int] = (LATENT, LATENT)) -> np.ndarray:
    """1 where latents [rows, columns] are kept, 0 in boxes (fractions) where something new comes; edges are cut off.

    As published, x goes with the number of rows and y with that of columns; that matters where these differ.
    """
    rows, columns = size
    kept = np.ones((rows, columns), np.float32)
    for x0, y0, x1, y1 in boxes:
        kept[int(y0 * columns) : int(y1 * columns), int(x0 * rows) : int(x1 * rows)] = 0
    return kept


def grounding_weights(steps: int, shares: Sequence[float]) -> list[float]:
    """Weight of the generator's grounding layers in every step.

    Args:
        shares: Shares of the steps with weight 1, of those in which it falls, and of those with 0.
    """
    full, falling = int(shares[0] * steps), int(shares[1] * steps)
    weights = [1.0] * full + np.arange(0, 1, 1 / falling)[::-1].tolist() if falling else [1.0] * full
    return weights + [0.0] * (steps - len(weights))
