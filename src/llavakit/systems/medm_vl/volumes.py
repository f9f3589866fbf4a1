"""Planners of volumes: one box for a 3D encoder, or slices for a 2D encoder (spec section 4).

A volume holds Hounsfield units. It is windowed, normalised as its encoder was trained, cropped to what is above the
background, and resized. Volumes that were stored as grey levels, as the released CT weights were trained on, are
taken as they are; which of the two a file holds is configured, and a file that is clearly the other is refused.

A volume may be large and of integers, so nothing of its size is made from it: it is looked at slice by slice, and only
those slices become floats that the resize looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Hounsfield units of any type clipped to a window and scaled to 0 ... 255, float32."""
    low, high = window
    values = volume.astype(np.result_type(volume.dtype, np.float32))  # integers would wrap around
    np.clip(values, low, high, out=values)
    values -= low
    values /= high - low
    values *= 255
    return values.astype(np.float32, copy=False)


def foreground(volume: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> tuple[slice, slice, slice]:
    """The bounding box of voxels that are above 0 when they are converted.

    Args:
        convert: From a slice as it is stored to float32.

    Raises:
        MediaError: If there are none.
    """
    depth, height, width = volume.shape
    slices, rows, columns = np.zeros(depth, bool), np.zeros(height, bool), np.zeros(width, bool)
    for index, stored in enumerate(volume):
        above = convert(stored) > 0
        slices[index] = above.any()
        rows |= above.any(axis=1)
        columns |= above.any(axis=0)
    if not slices.any():
        raise MediaError("the volume is empty: nothing is above the background after windowing")
    first, last = zip(
        *((found[0], found[-1] + 1) for found in map(np.flatnonzero, (slices, rows, columns))), strict=True
    )
    return tuple(map(slice, first, last))


def resized(volume: np.ndarray, size: Sequence[int], convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Trilinear resize of a converted volume to (depth, height, width), float32."""
    depth = len(volume)
    # Zeros take no memory until they are written, and slices that no result looks at are never written.
    values = np.zeros(volume.shape, np.float32)
    centres = np.floor((np.arange(size[0]) + 0.5) * (depth / size[0]) - 0.5).astype(int)
    for index in np.unique(np.clip(centres[:, None] + np.arange(-1, 3), 0, depth - 1)):
        values[index] = convert(volume[index])
    tensor = torch.from_numpy(values)[None, None]
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
        """Grey levels 0 ... 255 of a volume or a part of it, float32."""
        return volume.astype(np.float32) if self.stored == "grey" else windowed(volume, self.window)

    def check(self, volume: np.ndarray) -> tuple[float, float]:
        """The lowest and the highest grey level of a volume.

        Raises:
            MediaError: If its values are clearly of the other kind.
        """
        ends = np.array([volume.min(), volume.max()], volume.dtype)
        if self.stored == "grey" and (ends[0] < -0.5 or ends[1] > 255.5):
            raise MediaError(
                f"the volume's values reach from {ends[0]:g} to {ends[1]:g}; this model takes grey levels from 0 to 255"
            )
        low, high = self.grey(ends)
        return low, high


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
        volume = np.asarray(item)
        if self.stored == "grey" and volume.shape != self.size:
            raise MediaError(f"the volume has shape {volume.shape}; stored grey volumes must have {self.size}")
        low, high = self.check(volume)
        if self.stored == "grey":
            return [self._intensities(volume, low, high)[None]]

        def convert(part: np.ndarray) -> np.ndarray:
            return self._intensities(part, low, high)

        return [resized(volume[foreground(volume, convert)], self.size, convert)[None]]

    def _intensities(self, part: np.ndarray, low: np.float32, high: np.float32) -> np.ndarray:
        """A part of a volume as the encoder takes it, float32.

        Args:
            low, high: Lowest and highest grey level of the whole volume.
        """
        values = self.grey(part)
        if self.intensity == "standard":
            values -= np.float32(self.mean)
            values /= np.float32(self.std)
            return values
        values /= np.float32(255)
        values -= low / np.float32(255)
        values /= max(float(high / np.float32(255) - low / np.float32(255)), 1e-8)
        return values


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
        volume = np.asarray(item)
        self.check(volume)
        if self.stored == "hounsfield":
            box = foreground(volume, self.grey)
            volume = resized(volume[box], (self.slices, self.size, self.size), self.grey)
        views = []
        for values in volume:
            image = Image.fromarray(values.astype(np.float32).astype(np.uint8)).convert("RGB")
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            views.append(self.normalise(image))
        return views
