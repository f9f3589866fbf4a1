"""The planner: blocks, interleaved pieces and the whole picture as views of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llavakit.errors import UserError
from llavakit.systems.inf_llava.cropping import blocks, interleaved
from llavakit.views.image import ImagePlanner, Pad, Square
from llavakit.views.plan import MediaSize, Plan, View
from llavakit.views.tensors import resize


class DualPerspective(ImagePlanner):
    """n * n blocks, then n * n interleaved pieces of the picture at n times the encoder's size, then the whole.

    The picture is brought to `image_size` first, normalised, and resized from there without antialias, as published.
    For odd n the whole view equals the middle interleaved piece and is left out.

    Args:
        size: Side of a view, the encoder's input.
        crops: n.
        image_size: Side of the square that the picture is brought to; default n * size. The published loader used
            `size` at inference, which loses the detail that the method is for: a compatibility switch.
        aspect: "pad" to a square, or "square": short side to `image_size`, the rest of the long side is lost.
        background: 8-bit padding colour; default int(255 * mean).
    """

    def __init__(
        self,
        *,
        size: int = 336,
        crops: int = 3,
        image_size: int | None = None,
        aspect: str = "pad",
        background: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size=size, **options)
        if not isinstance(crops, int) or crops < 1:
            raise UserError(f"crops: must be a positive number, got {crops!r}")
        if aspect not in ("pad", "square"):
            raise UserError(f"aspect: must be 'pad' or 'square', got {aspect!r}")
        self.crops = crops
        side = crops * size if image_size is None else image_size
        own = {"background": background} if aspect == "pad" else {}
        self.frame = {"pad": Pad, "square": Square}[aspect](size=side, **own, **options)

    def plan(self, size: MediaSize) -> Plan:
        places = [(row, col) for row in range(self.crops) for col in range(self.crops)]
        views = [View(self.size, self.size, role="tile", row=row, col=col) for row, col in places]
        views += [View(self.size, self.size, role="sample", row=row, col=col) for row, col in places]
        if self.crops % 2 == 0:
            views.append(View(self.size, self.size))
        return Plan("image", size, tuple(views), rows=self.crops, cols=self.crops)

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        (picture,) = self.frame.cut(item, self.frame.plan(plan.size))
        return self.split(picture)

    def split(self, picture: np.ndarray) -> list[np.ndarray]:
        """The views of a normalised picture [channels, height, width], in the order of the plan."""
        large = resize(picture, self.crops * self.size, self.crops * self.size, "bicubic")
        views = [*blocks(large, self.crops), *interleaved(large, self.crops)]
        if self.crops % 2 == 0:
            views.append(resize(picture, self.size, self.size, "bicubic"))
        if not isinstance(picture, np.ndarray):  # a tensor, of a differentiable picture
            return views
        return [np.ascontiguousarray(view) for view in views]
