"""Resizing of float images as several original programs do it: on the normalised tensor, without antialias.

`llavakit.views.pixels` resizes 8-bit pictures as Pillow does. Published code that derives a small input from a large
normalised one, or whose video reader resizes floats, gives these numbers instead.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from llavakit.errors import UserError

MODES = ("bilinear", "bicubic")


def resize(values: np.ndarray, height: int, width: int, mode: str = "bilinear") -> np.ndarray:
    """Images resized with half-pixel centres and no antialias (`align_corners=False`), float32.

    Args:
        values: [..., channels, height, width], float.
        mode: "bilinear" or "bicubic".

    Raises:
        UserError: If the mode is unknown.
    """
    if mode not in MODES:
        raise UserError(f"resize: mode must be one of {', '.join(MODES)}, not {mode!r}")
    images = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if images.shape[-2:] == (height, width):
        return images.numpy().copy()
    flat = images.reshape(-1, *images.shape[-3:])
    return F.interpolate(flat, size=(height, width), mode=mode).reshape(*images.shape[:-2], height, width).numpy()


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) whose short side is `side`, the long one rounded down: what PyTorch's video transforms do."""
    if width < height:
        return int(np.floor(height / width * side)), side
    return side, int(np.floor(width / height * side))
