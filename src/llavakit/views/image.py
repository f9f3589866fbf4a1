"""Planners of images: square, pad, squash and anyres.

Each cuts an image into views of fixed size; none knows what the encoder makes of them. Options are JSON-able and
saved with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import UserError
from llavakit.media.image import ONE_CHANNEL
from llavakit.views import pixels, tiles
from llavakit.views.plan import MediaSize, Plan, Planner, View


class ImagePlanner(Planner):
    """What all image planners share: view size, normalisation, filter.

    Args:
        size: Side of the (square) encoder input in pixels.
        image_mean, image_std: Normalisation per channel; CLIP's by default.
        resample: Pillow filter by name or number.
        rescale_factor: What 8-bit values are multiplied with before they are normalised.
    """

    def __init__(
        self,
        *,
        size: int = 336,
        image_mean: Sequence[float] = pixels.CLIP_MEAN,
        image_std: Sequence[float] = pixels.CLIP_STD,
        resample: str | int = "bicubic",
        rescale_factor: float = 1 / 255,
    ) -> None:
        if not isinstance(size, int) or size < 1:
            raise UserError(f"size: must be a positive number of pixels, got {size!r}")
        self.size, self.image_mean, self.image_std = size, tuple(image_mean), tuple(image_std)
        self.resample = pixels.resampling(resample)
        self.normalise = pixels.Normaliser(image_mean, image_std, rescale_factor)

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        """Views of one RGB image, float32 [3, height, width] each."""
        return [self.normalise(image) for image in self.render(item, plan)]

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        """The views as 8-bit RGB images, before they are normalised."""
        raise NotImplementedError(f"{type(self).__name__} must define render")


class Square(ImagePlanner):
    """Short side to `size`, then the middle square; the rest of the long side is lost (stage 1 of LLaVA-1.5).

    Args:
        crop: Side of the square that is kept, `size` if None.
        rounded: Whether an odd rest is split as torchvision's `CenterCrop` does it; see `pixels.centre_crop`.
    """

    def __init__(self, *, size: int = 336, crop: int | None = None, rounded: bool = False, **options: Any) -> None:
        super().__init__(size=size, **options)
        self.crop = size if crop is None else crop
        self.rounded = rounded

    def plan(self, size: MediaSize) -> Plan:
        width, height = pixels.shortest_edge(size.width, size.height, self.size)
        return Plan("image", size, (View(self.crop, self.crop),), canvas=(height, width))

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        return [pixels.resize_and_crop(image, self.size, self.crop, self.resample, rounded=self.rounded)]


class Pad(Square):
    """Pad to the square of the long side, then as `Square` (LLaVA-1.5 from stage 2 on).

    The plan's canvas is the padded square in pixels of the original image.

    Args:
        background: 8-bit padding colour; int(255 * mean) per channel if None.
        grey_background: 8-bit padding value around pictures that were stored in one channel; `background` if None.
    """

    def __init__(
        self, *, background: Sequence[int] | None = None, grey_background: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.background = pixels.pad_colour(self.image_mean) if background is None else tuple(background)
        if grey_background is not None and (type(grey_background) is not int or not 0 <= grey_background <= 255):
            raise UserError(f"grey_background: must be a value from 0 to 255, got {grey_background!r}")
        self.grey_background = None if grey_background is None else (grey_background,) * 3

    def colour_around(self, image: Image.Image) -> tuple[int, ...]:
        """The padding colour of an image."""
        return self.grey_background if self.grey_background and image.info.get(ONE_CHANNEL) else self.background

    def plan(self, size: MediaSize) -> Plan:
        side = max(size.width, size.height)
        left, top = pixels.square_offset(size.width, size.height)
        content = (left, top, left + size.width, top + size.height)
        return Plan("image", size, (View(self.crop, self.crop),), canvas=(side, side), content=content)

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        square = pixels.pad_and_resize(image, self.colour_around(image), self.size, self.resample)
        return [pixels.centre_crop(square, self.crop, self.crop, rounded=self.rounded)]


class Squash(ImagePlanner):
    """Plain resize to `size` x `size`, aspect ratio not kept (SigLIP's processor).

    Args:
        crop: Side of the middle square that is kept, `size` if None.
    """

    def __init__(self, *, size: int = 336, crop: int | None = None, **options: Any) -> None:
        super().__init__(size=size, **options)
        self.crop = size if crop is None else crop

    def plan(self, size: MediaSize) -> Plan:
        return Plan("image", size, (View(self.crop, self.crop),))

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        resized = image.resize((self.size, self.size), self.resample)
        return [pixels.centre_crop(resized, self.crop, self.crop)]


class AnyRes(ImagePlanner):
    """The squashed whole image, then tiles of the image fitted on the best of several canvases, row by row.

    v1.6 and LLaVA-OneVision share it; LLaVA-OneVision's limit on tokens belongs to the arrangement.

    Args:
        size: Side to which the processor resizes the short side of every view.
        crop: Side of a tile and of the view that the processor keeps, `size` if None.
        pinpoints: Candidate canvases (width, height), or a range such as "(1x1),...,(6x6)" in tiles.
        background: 8-bit colour around the image on its canvas.
    """

    def __init__(
        self,
        *,
        size: int = 336,
        crop: int | None = None,
        pinpoints: str | Sequence[Sequence[int]] = "(1x1),...,(6x6)",
        background: Sequence[int] = (0, 0, 0),
        **options: Any,
    ) -> None:
        super().__init__(size=size, **options)
        self.tile = size if crop is None else crop
        self.canvases = tiles.candidates(pinpoints, self.tile)
        self.background = tuple(background)

    def plan(self, size: MediaSize) -> Plan:
        canvas = tiles.select_canvas((size.width, size.height), self.canvases)
        (width, height), (left, top) = tiles.fit((size.width, size.height), canvas)
        cols, rows = canvas[0] // self.tile, canvas[1] // self.tile
        views = [View(self.tile, self.tile)]
        views += [View(self.tile, self.tile, role="tile", row=r, col=c) for r in range(rows) for c in range(cols)]
        return Plan(
            "image",
            size,
            tuple(views),
            rows=rows,
            cols=cols,
            canvas=(canvas[1], canvas[0]),
            content=(left, top, left + width, top + height),
        )

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        left, top, right, bottom = plan.content
        canvas = pixels.canvas_for(image, plan.canvas[::-1], self.background)
        canvas.paste(image.resize((right - left, bottom - top), self.resample), (left, top))
        views = [image.resize((self.size, self.size), self.resample)]
        for view in plan.views[1:]:
            x, y = view.col * self.tile, view.row * self.tile
            views.append(canvas.crop((x, y, x + self.tile, y + self.tile)))
        return [pixels.resize_and_crop(view, self.size, self.tile, self.resample) for view in views]
