"""The planner: which pixels the encoder sees."""

from __future__ import annotations

from PIL import Image

from llavakit.errors import UserError
from llavakit.views.image import ImagePlanner
from llavakit.views.plan import MediaSize, Plan, View


class OverviewAndMiddle(ImagePlanner):
    """The squashed image, then its middle at the same size.

    Args:
        zoom: How many times the middle is magnified; it shows 1 / zoom of each side.
        options: See `ImagePlanner` (`size`, `image_mean`, `image_std`, `resample`).
    """

    def __init__(self, *, zoom: float = 2.0, **options) -> None:
        super().__init__(**options)
        if not zoom >= 1:
            raise UserError(f"zoom: is {zoom}, it must be at least 1")
        self.zoom = zoom

    def plan(self, size: MediaSize) -> Plan:
        views = (View(self.size, self.size), View(self.size, self.size, role="tile"))
        return Plan("image", size, views, rows=1, cols=1)

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        width, height = image.width / self.zoom, image.height / self.zoom
        left, top = (image.width - width) / 2, (image.height - height) / 2
        middle = (left, top, left + width, top + height)
        sides = (self.size, self.size)
        return [image.resize(sides, self.resample), image.resize(sides, self.resample, box=middle)]
