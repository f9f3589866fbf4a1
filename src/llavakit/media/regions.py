"""Regions: boxes around objects of one picture, with label and score.

A region has one frame everywhere inside llavakit: the two corners in pixels of the original, upright picture. What a
detector, a file or a user gives in another frame is converted by one of the functions here where it enters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llavakit.errors import FieldError

FRAMES = ("pixel_corners", "pixel_center", "fraction_corners", "fraction_center")
_LIMIT = 1e7  # pixels; beyond it a coordinate is a mistake


class Region(NamedTuple):
    """A box in pixels of the original picture.

    Attributes:
        left, top, right, bottom: Corners. Detectors write boxes that reach beyond the picture; planners clip them.
        label: What the detector called it.
        score: The detector's confidence.
    """

    left: float
    top: float
    right: float
    bottom: float
    label: str | None = None
    score: float | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The two corners."""
        return self[:4]


def to_corners(
    box: Sequence[float], frame: str, size: tuple[int, int] | None = None
) -> tuple[float, float, float, float]:
    """The corners in pixels of a box given in another frame.

    Args:
        box: Four numbers: corners (x1, y1, x2, y2), or centre, width and height (x, y, w, h).
        frame: One of `FRAMES`: unit (pixels, or fractions of the picture's sides) and form.
        size: (width, height) of the picture in pixels; needed for fractions.
    """
    unit, _, form = frame.partition("_")
    if frame not in FRAMES:
        raise ValueError(f"frame {frame!r} is unknown; known: {', '.join(FRAMES)}")
    a, b, c, d = map(float, box)
    if form == "center":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    if unit == "fraction":
        if size is None:
            raise ValueError("fractions need the size of the picture")
        a, b, c, d = a * size[0], b * size[1], c * size[0], d * size[1]
    return a, b, c, d


def read_regions(value: Mapping[str, Any], where: str) -> list[Region]:
    """The regions of a content part or of an entry of a box file.

    Args:
        value: `boxes` (a list of [x1, y1, x2, y2] in pixels), and `labels` and `scores` of equal length or neither.
        where: Name of the value in error messages.

    Raises:
        FieldError: If a box is not four finite numbers, is inverted, or labels and scores do not fit the boxes.
    """
    boxes = value.get("boxes")
    if not isinstance(boxes, Sequence) or isinstance(boxes, (str, bytes)):
        raise FieldError(f"{where}.boxes", "must be a list of boxes [x1, y1, x2, y2] in pixels")
    columns: dict[str, Sequence[Any]] = {}
    for name, kinds in (("labels", str), ("scores", (int, float))):
        column = value.get(name)
        if column is None:
            columns[name] = [None] * len(boxes)
            continue
        if not isinstance(column, Sequence) or isinstance(column, (str, bytes)) or len(column) != len(boxes):
            raise FieldError(f"{where}.{name}", f"must be a list of {len(boxes)}, one entry per box")
        for index, entry in enumerate(column):
            if not isinstance(entry, kinds) or isinstance(entry, bool):
                wanted = "a string" if kinds is str else "a number"
                raise FieldError(f"{where}.{name}.{index}", f"must be {wanted}, not {type(entry).__name__}")
        columns[name] = column
    return [
        Region(*_corners(box, f"{where}.boxes.{index}"), label, None if score is None else float(score))
        for index, (box, label, score) in enumerate(zip(boxes, columns["labels"], columns["scores"], strict=True))
    ]


def _corners(box: Any, where: str) -> tuple[float, float, float, float]:
    numbers = (
        isinstance(box, Sequence)
        and len(box) == 4
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in box)
    )
    if not numbers or not all(math.isfinite(x) and abs(x) < _LIMIT for x in box):
        raise FieldError(where, "must be four finite numbers [x1, y1, x2, y2] in pixels")
    left, top, right, bottom = map(float, box)
    if right < left or bottom < top:
        raise FieldError(where, f"is inverted: {list(box)}; it must be [left, top, right, bottom] in pixels")
    return left, top, right, bottom
