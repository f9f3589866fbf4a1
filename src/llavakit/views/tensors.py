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
        values: [..., channels, height, width], float; a tensor gives a tensor, with gradients.
        mode: "bilinear" or "bicubic".

    Raises:
        UserError: If the mode is unknown.
    """
    if mode not in MODES:
        raise UserError(f"resize: mode must be one of {', '.join(MODES)}, not {mode!r}")
    if isinstance(values, torch.Tensor):  # of a differentiable picture
        flat = values.reshape(-1, *values.shape[-3:])
        return F.interpolate(flat, size=(height, width), mode=mode).reshape(*values.shape[:-2], height, width)
    images = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if images.shape[-2:] == (height, width):
        return images.numpy().copy()
    flat = images.reshape(-1, *images.shape[-3:])
    return F.interpolate(flat, size=(height, width), mode=mode).reshape(*images.shape[:-2], height, width).numpy()


def taps(length: int, target: int, start: int, stop: int, mode: str = "bilinear") -> tuple[np.ndarray, np.ndarray]:
    """Where `resize` looks along one axis for the outputs `start` to `stop - 1`: for whoever needs only a part.

    Args:
        length, target: Cells before and after.

    Returns:
        Places in the input [outputs, 2 or 4] and their float32 weights of the same shape.
    """
    cubic = np.float32(-0.75)  # PyTorch's
    # PyTorch multiplies and subtracts float32 numbers with one rounding at the end.
    scale = float(np.float32(length) / np.float32(target))
    source = (scale * (np.arange(start, stop) + 0.5) - 0.5).astype(np.float32)
    if mode == "bilinear":
        source = np.maximum(source, np.float32(0))
    first = np.floor(source)
    near = source - first
    far = 1 - near
    if mode == "bilinear":
        offsets, weights = (0, 1), (far, near)
    else:
        offsets = (-1, 0, 1, 2)
        outer = [((cubic * x - 5 * cubic) * x + 8 * cubic) * x - 4 * cubic for x in (near + 1, far + 1)]
        inner = [((cubic + 2) * x - (cubic + 3)) * x * x + 1 for x in (near, far)]
        weights = (outer[0], *inner, outer[1])
    places = np.clip(first.astype(np.int64)[:, None] + np.array(offsets), 0, length - 1)
    return places, np.stack(weights, axis=1).astype(np.float32)


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) whose short side is `side`, the long one rounded down: what PyTorch's video transforms do."""
    if width < height:
        return int(np.floor(height / width * side)), side
    return side, int(np.floor(width / height * side))
