"""Planners of volumes: one box for a 3D encoder, or slices for a 2D encoder (spec section 4).

A volume holds Hounsfield units. It is windowed, normalised as its encoder was trained, cropped to what is above the
background, and resized. Volumes that were stored as grey levels, as the released CT weights were trained on, are
taken as they are; which of the two a file holds is configured, and a file that is clearly the other is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llavakit.errors import MediaError, UserError
from llavakit.views import pixels
from llavakit.views.plan import MediaSize, Plan, Planner, View

INTENSITIES = ("minmax", "standard")
STORED = ("hounsfield", "grey")


def windowed(volume: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Hounsfield units clipped to a window and scaled to 0 ... 255, float32."""
    low, high = window
    return ((np.clip(volume, low, high) - low) / (high - low) * 255).astype(np.float32)


def foreground(volume: np.ndarray) -> np.ndarray:
    """The bounding box of voxels above 0.

    Raises:
        MediaError: If there are none.
    """
    box = []
    for axis in range(3):
        other = tuple(n for n in range(3) if n != axis)
        found = np.flatnonzero((volume > 0).any(axis=other))
        if not len(found):
            raise MediaError("the volume is empty: nothing is above the background after windowing")
        box.append(slice(found[0], found[-1] + 1))
    return volume[tuple(box)]


def resized(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Trilinear resize to (depth, height, width)."""
    tensor = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None, None]
    return F.interpolate(tensor, size=tuple(size), mode="trilinear", align_corners=False)[0, 0].numpy()


class VolumePlanner(Planner):
    """What both planners share.

    Args:
        window: (lowest, highest) Hounsfield units.
        stored: "hounsfield", or "grey" for volumes that are 0 ... 255 already.
    """

    modality = "volume"

    def __init__(self, *, window: Sequence[float] = (-1000, 1000), stored: str = "hounsfield") -> None:
        if stored not in STORED:
            raise UserError(f"stored: must be one of {', '.join(STORED)}, not {stored!r}")
        if len(window) != 2 or not window[0] < window[1]:
            raise UserError(f"window: must be (lowest, highest), not {list(window)}")
        self.window, self.stored = tuple(window), stored

    def grey(self, volume: np.ndarray) -> np.ndarray:
        """Grey levels 0 ... 255 of a volume.

        Raises:
            MediaError: If its values are clearly of the other kind.
        """
        low, high = float(volume.min()), float(volume.max())
        if self.stored == "grey":
            if low < -0.5 or high > 255.5:
                raise MediaError(
                    f"the volume's values reach from {low:g} to {high:g}; this model takes grey levels from 0 to 255"
                )
            return volume.astype(np.float32)
        return windowed(volume, self.window)


class Box(VolumePlanner):
    """The whole volume as one input of a 3D encoder.

    Args:
        size: (depth, height, width) of the encoder's input.
        intensity: "minmax" maps lowest and highest value to 0 and 1; "standard" subtracts `mean` and divides by `std`
            before the crop, so that the box is that of voxels above the mean.
    """

    def __init__(
        self,
        *,
        size: Sequence[int] = (32, 256, 256),
        intensity: str = "minmax",
        mean: float = 55.6982188356434,
        std: float = 66.1943479570918,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if intensity not in INTENSITIES:
            raise UserError(f"intensity: must be one of {', '.join(INTENSITIES)}, not {intensity!r}")
        self.size, self.intensity, self.mean, self.std = tuple(size), intensity, mean, std

    def plan(self, size: MediaSize) -> Plan:
        depth, height, width = self.size
        return Plan("volume", size, (View(height, width, depth=depth, role="volume"),))

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        values = self.grey(np.asarray(item))
        if self.intensity == "standard":
            values = (values - np.float32(self.mean)) / np.float32(self.std)
        else:
            values = values / np.float32(255)
            values = values - values.min()
            values = values / max(float(values.max()), 1e-8)
        if self.stored == "hounsfield":
            values = resized(foreground(values), self.size)
        if values.shape != self.size:
            raise MediaError(f"the volume has shape {values.shape}; stored grey volumes must have {self.size}")
        return [values[None].astype(np.float32)]


class Slices(VolumePlanner):
    """Slices of the volume as grey images for a 2D encoder.

    Args:
        size: Side of the encoder's input.
        slices: Number of slices after the resize; a stored grey volume keeps its own.
        image_mean, image_std: Normalisation per channel.
    """

    def __init__(
        self,
        *,
        size: int = 256,
        slices: int = 32,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.size, self.slices = size, slices
        self.normalise = pixels.Normaliser(image_mean, image_std)

    def plan(self, size: MediaSize) -> Plan:
        count = self.slices if self.stored == "hounsfield" else size.depth
        views = tuple(View(self.size, self.size, role="frame", index=index) for index in range(count))
        return Plan("volume", size, views)

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        values = self.grey(np.asarray(item))
        if self.stored == "hounsfield":
            values = resized(foreground(values), (self.slices, self.size, self.size))
        levels = values.astype(np.uint8)
        views = []
        for level in levels:
            image = Image.fromarray(level).convert("RGB")
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            views.append(self.normalise(image))
        return views
