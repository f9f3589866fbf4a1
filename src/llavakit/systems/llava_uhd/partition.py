"""Slices that follow the image: the partition planner (LLaVA-UHD section 3.1).

An image larger than the encoder's square is cut into `cols x rows` slices of equal size whose shape is as close to
the encoder's square as possible; every view keeps its own aspect ratio, in whole patches. An overview of the whole
image comes last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from llavakit.errors import UserError
from llavakit.views.image import ImagePlanner
from llavakit.views.plan import MediaSize, Plan, View

Size = tuple[float, float]  # width, height


def whole_patches(length: float, patch: int) -> int:
    """The largest multiple of `patch` below a length, at least one patch."""
    return max(math.floor(length / patch) * patch, patch)


def native_size(width: float, height: float, side: int, patch: int, enlarge: bool) -> tuple[int, int]:
    """(width, height) of about `side` squared pixels with the aspect ratio kept, in whole patches.

    A smaller image keeps its size unless `enlarge`.
    """
    if width * height > side * side or enlarge:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)  # from the height that was truncated already, as published
    return whole_patches(width, patch), whole_patches(height, patch)


def choose_grid(width: int, height: int, counts: Sequence[int]) -> tuple[int, int]:
    """(columns, rows) of the grid whose shape is nearest to the image's in log ratio; the first one wins ties."""
    wanted = math.log(width / height)
    best, smallest = (1, 1), math.inf
    for count in counts:
        for cols in range(1, count + 1):
            if count % cols:
                continue
            error = abs(wanted - math.log(cols / (count // cols)))
            if error < smallest:
                best, smallest = (cols, count // cols), error
    return best


def preview_partition(width: int, height: int, max_slices: int, side: int, patch: int) -> dict[str, Any]:
    """The planner of the first public code (March 2024), closest to the paper's text: grid and patch counts."""

    def patches(w: float, h: float) -> tuple[int, int]:
        most = (side // patch) ** 2
        scale = math.sqrt(most * (patch / h) * (patch / w))
        return tuple(max(min(math.floor(scale * length / patch), most), 1) for length in (w, h))

    ideal = min(math.ceil(width * height / (side * side)), max_slices)
    counts = [ideal, ideal + 1] if ideal <= 2 else [ideal - 1, ideal, ideal + 1]
    cols, rows = choose_grid(width, height, counts)
    return {
        "grid": (cols, rows),
        "slice_patches": patches(width // cols, height // rows),
        "overview_patches": patches(width, height),
    }


class NativeSlices(ImagePlanner):
    """Slices in row-major order, then the overview, each at its own aspect ratio.

    Args:
        size: Side of the square whose area views aim at.
        patch: Patch size of the encoder.
        max_slices: Most slices (7 in the released model, 6 in the paper).
        split: Whether to slice at all; without it there is only the overview at its enlarged size.
        overview_only: Keep the plan's overview and throw the slices away (stage 1).
        long_side: Resize the long side to this first, enlarging small images (1024 in most evaluations).
        max_patches: Shrink views that would have more patches, which extreme ratios do; None leaves them.
    """

    def __init__(
        self,
        *,
        size: int = 336,
        patch: int = 14,
        max_slices: int = 7,
        split: bool = True,
        overview_only: bool = False,
        long_side: int | None = None,
        max_patches: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size=size, **options)
        if max_patches is not None and max_patches < 1:
            raise UserError(f"max_patches: must be at least 1, got {max_patches}")
        self.patch, self.max_slices, self.split = patch, max_slices, split
        self.overview_only, self.long_side, self.max_patches = overview_only, long_side, max_patches

    def resized(self, size: MediaSize) -> tuple[int, int]:
        """(width, height) after the resize of the long side; a side never vanishes."""
        if self.long_side is None:
            return size.width, size.height
        scale = self.long_side / max(size.width, size.height)
        short = max(int(scale * min(size.width, size.height)), 1)
        return (self.long_side, short) if size.width > size.height else (short, self.long_side)

    def grid(self, width: int, height: int) -> tuple[int, int] | None:
        """(columns, rows) of the slices, None if the image is not sliced."""
        ideal = min(math.ceil(width * height / self.size**2), self.max_slices)
        if ideal <= 1 or not self.split:
            return None
        counts = [count for count in (ideal - 1, ideal, ideal + 1) if 1 < count <= self.max_slices]
        return choose_grid(width, height, counts)

    def plan(self, size: MediaSize) -> Plan:
        width, height = self.resized(size)
        grid = self.grid(width, height)
        overview = self._view(width, height, enlarge=grid is None)
        if grid is None or self.overview_only:
            return Plan("image", size, (overview,))
        cols, rows = grid
        one = self._view(
            whole_patches(width, cols) / cols, whole_patches(height, rows) / rows, enlarge=True, role="tile"
        )
        slices = [replace(one, row=row, col=col) for row in range(rows) for col in range(cols)]
        canvas = (rows * one.height, cols * one.width)
        return Plan("image", size, (*slices, overview), rows=rows, cols=cols, canvas=canvas)

    def _view(self, width: float, height: float, *, enlarge: bool, role: str = "whole") -> View:
        w, h = native_size(width, height, self.size, self.patch, enlarge)
        if self.max_patches is not None:
            most = self.max_patches * self.patch
            w, h = min(w, most), min(h, most)
            while (w // self.patch) * (h // self.patch) > self.max_patches:
                w, h = (w - self.patch, h) if w >= h else (w, h - self.patch)
        return View(h, w, role=role)

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        wanted = self.resized(plan.size)
        if image.size != wanted:
            image = image.resize(wanted, self.resample)
        overview = plan.views[-1]
        views = []
        if plan.canvas is not None:
            rows, cols = plan.canvas
            refined = image.resize((cols, rows), self.resample)
            for view in plan.views[:-1]:
                left, top = view.col * view.width, view.row * view.height
                views.append(refined.crop((left, top, left + view.width, top + view.height)))
        return [*views, image.resize((overview.width, overview.height), self.resample)]
