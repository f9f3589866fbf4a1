"""Views of LLaVA-Mini: an image cut into r x r blocks, and the whole image last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import MediaError, UserError
from llavakit.registry import PLANNERS
from llavakit.views import pixels
from llavakit.views.image import ImagePlanner
from llavakit.views.plan import MediaSize, Plan, Planner

Box = tuple[int, int, int, int]


def blocks(width: int, height: int, grid: int) -> list[Box]:
    """(left, top, right, bottom) of grid x grid blocks, row by row; what the division leaves over is in none."""
    across, down = width // grid, height // grid
    places = [(row, col) for row in range(grid) for col in range(grid)]
    return [(col * across, row * down, (col + 1) * across, (row + 1) * down) for row, col in places]


class GridAndWhole(Planner):
    """`grid_and_whole`: r x r blocks row by row, each a view of its own, then the whole image.

    What the division leaves over at the right and the bottom is in no block.

    Args:
        view: Planner that makes a view of a block or of the whole, `{"type": "square", "size": 336}`.
        grid: r, blocks along each side.
        pad_first: Pad the whole image to a square before it is cut, as the published training does where it pads;
            inference pads every block.
        always_whole: Whether r = 1 gives a block and the whole (the same pixels twice, as the published EgoSchema
            evaluation does) instead of the whole alone.

    Raises:
        UserError: If an option is wrong.
    """

    def __init__(
        self, *, view: Mapping[str, Any], grid: int = 2, pad_first: bool = False, always_whole: bool = False
    ) -> None:
        if not isinstance(grid, int) or grid < 1:
            raise UserError(f"grid: must be a positive number of blocks along a side, got {grid!r}")
        self.view = PLANNERS.build(dict(view))
        if not isinstance(self.view, ImagePlanner):
            raise UserError(f"view: needs a planner that makes views of one size, {view.get('type')!r} does not")
        self.grid, self.pad_first, self.always_whole = grid, pad_first, always_whole

    def boxes(self, width: int, height: int) -> list[Box]:
        """(left, top, right, bottom) of every block; none if the image stays whole.

        Raises:
            MediaError: If the image has fewer pixels along a side than there are blocks.
        """
        if self.grid == 1 and not self.always_whole:
            return []
        if self.pad_first:
            width = height = max(width, height)
        if min(width, height) < self.grid:
            raise MediaError(
                f"the image is {width} x {height} pixels, too small for {self.grid} x {self.grid} blocks; "
                f"it needs at least {self.grid} pixels along each side"
            )
        return blocks(width, height, self.grid)

    def plan(self, size: MediaSize) -> Plan:
        blocks = len(self.boxes(size.width, size.height))
        (whole,) = self.view.plan(size).views
        tiles = [replace(whole, role="tile", row=n // self.grid, col=n % self.grid) for n in range(blocks)]
        side = self.grid if blocks else 0
        return Plan("image", size, (*tiles, whole), rows=side, cols=side)

    def cut(self, item: Image.Image, plan: Plan) -> list[np.ndarray]:
        if self.pad_first:
            item = pixels.pad_to_square(item, pixels.pad_colour(self.view.image_mean))
        parts = [item.crop(box) for box in self.boxes(*item.size)] + [item]
        return [view for part in parts for view in self.view.cut(part, self.view.plan(MediaSize(1, *part.size[::-1])))]
