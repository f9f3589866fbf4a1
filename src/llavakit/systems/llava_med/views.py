"""The padding of v1.5's published code, whose offset is drawn: for comparison with runs of that code."""

from __future__ import annotations

import random

from PIL import Image

from llavakit.views import pixels
from llavakit.views.image import Pad
from llavakit.views.plan import Plan


class DrawnPad(Pad):
    """As `pad`, but the picture stands at the middle of its square or one pixel behind it, as Python's `random` says.

    Where the spare space is even, a picture behind the middle loses its last line. The plan tells the middle. Square
    pictures draw nothing.
    """

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        square = image
        if image.width != image.height:
            side = max(image.size)
            before = (side - min(image.size)) // 2
            before = random.randint(before, before + 1)
            square = Image.new("RGB", (side, side), self.colour_around(image))
            square.paste(image, (0, before) if image.width > image.height else (before, 0))
        return [pixels.resize_and_crop(square, self.size, self.crop, self.resample)]
