"""The planner: a high-resolution view with the boxes, and a low-resolution view that is made from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llavakit.errors import UserError
from llavakit.media.regions import Region
from llavakit.systems.mg_llava.boxes import NOTHING, cap, check_complete, check_inside, suppress, to_view
from llavakit.views import pixels
from llavakit.views.image import ImagePlanner, Pad, Square
from llavakit.views.plan import MediaSize, Plan, View
from llavakit.views.tensors import resize

LOW, HIGH = 0, 1  # encoders of the connector


class LowAndHigh(ImagePlanner):
    """Two views of a picture, and boxes on the high one.

    The picture is brought to `size`, normalised, and the low view is resized from that tensor (bilinear, without
    antialias), as published. A picture without boxes shows one at its top left corner, of one cell.

    Args:
        size: Side of the high view.
        low_size: Side of the low view.
        aspect: "pad" to a square, or "square": short side to `size`, the rest of the long side is lost.
        background: 8-bit padding colour; default int(255 * mean).
        iou_threshold: Overlap from which on the lesser of two boxes of a label is dropped.
        limit_mode, limit_num: How many boxes remain, see `boxes.cap`.
        max_text_length, near_margin: A text is long if it has so many tokens, or as many less as the margin.
        box_frame: Side of the square in which boxes are rounded; default `size`.
        rounded: Whether boxes are rounded, as published.
        outside: "refuse" boxes that lie outside the picture, or "drop" them without a word, as published.
    """

    takes_regions = True

    def __init__(
        self,
        *,
        size: int = 768,
        low_size: int = 336,
        aspect: str = "pad",
        background: Sequence[int] | None = None,
        iou_threshold: float = 0.2,
        limit_mode: str = "per_category",
        limit_num: int | None = 100,
        max_text_length: int = 1472,
        near_margin: int = 50,
        box_frame: int | None = None,
        rounded: bool = True,
        outside: str = "refuse",
        **options: Any,
    ) -> None:
        super().__init__(size=size, **options)
        for name, value, known in (("aspect", aspect, ("pad", "square")), ("outside", outside, ("refuse", "drop"))):
            if value not in known:
                raise UserError(f"{name}: must be {' or '.join(map(repr, known))}, got {value!r}")
        cap((), limit_mode, limit_num, near=False)
        self.low_size, self.aspect, self.outside = low_size, aspect, outside
        self.iou_threshold, self.limit_mode, self.limit_num = iou_threshold, limit_mode, limit_num
        self.max_text_length, self.near_margin = max_text_length, near_margin
        self.box_frame, self.rounded = size if box_frame is None else box_frame, rounded
        own = {"background": background} if aspect == "pad" else {}
        self.frame = {"pad": Pad, "square": Square}[aspect](size=size, **own, **options)

    def select_regions(self, size: MediaSize, regions: Sequence[Region], text_length: int) -> list[Region]:
        """Suppression per label and caps (spec section 4.3)."""
        check_complete(regions)
        if self.outside == "refuse":
            check_inside(regions, size.width, size.height)
        # The published rule counts the placeholder of the picture as a token of the text.
        near = text_length + 1 >= self.max_text_length - self.near_margin
        return cap(suppress(regions, self.iou_threshold), self.limit_mode, self.limit_num, near)

    def in_frame(self, size: MediaSize, regions: Sequence[Region]) -> list[Region]:
        """Selected regions in a square of `box_frame` pixels that shows what the views show."""
        width, height, offset = size.width, size.height, (0, 0)
        if self.aspect == "pad":
            offset = pixels.square_offset(width, height)
            width = height = max(width, height)
        return to_view(regions, width, height, offset, self.box_frame, self.rounded)

    def plan(self, size: MediaSize, regions: Sequence[Region] = ()) -> Plan:
        found = self.in_frame(size, regions) or [NOTHING]
        scale = self.size / self.box_frame
        boxes = tuple(tuple(place * scale for place in region.box) for region in found)
        high = View(self.size, self.size, role="detail", encoder=HIGH, regions=boxes)
        return Plan("image", size, (View(self.low_size, self.low_size), high))

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        (high,) = self.frame.cut(item, self.frame.plan(plan.size))
        return [resize(high, self.low_size, self.low_size, "bilinear"), high]
