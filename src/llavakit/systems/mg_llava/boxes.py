"""From a detector's boxes to the model's: suppression per label, caps, and the frame of the high-resolution view.

Boxes come as `Region`s in pixels of the original picture (spec sections 4.2 and 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llavakit.errors import FieldError, UserError
from llavakit.media.regions import Region

PER_CATEGORY, PER_CATEGORY_SMALL, SMALL_LIMIT = 20, 5, 50
NOTHING = Region(0.0, 0.0, 0.0, 0.0)  # what a picture without detections shows: its top left cell


def suppress(regions: Sequence[Region], iou_threshold: float) -> list[Region]:
    """Greedy suppression per label, in descending order of score; equal scores keep their order.

    A region is dropped if its overlap with a kept one of the same label is greater than the threshold. Numbers are
    float32, as in torchvision's `batched_nms`. Two regions without area overlap by 0 / 0, which suppresses nothing.
    """
    if not regions:
        return []
    boxes = np.array([region.box for region in regions], np.float32)
    scores = np.array([region.score for region in regions], np.float32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    labels = np.array([_number(region.label, regions) for region in regions])
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1, dtype=np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            overlap = (shared / (areas[best] + areas[left] - shared)).astype(np.float64)
        left = left[~((overlap > iou_threshold) & (labels[left] == labels[best]))]
    return [regions[index] for index in kept]


def _number(label: str | None, regions: Sequence[Region]) -> int:
    """A label by the number of the first region that has it."""
    return next(number for number, region in enumerate(regions) if region.label == label)


def cap(regions: Sequence[Region], mode: str, limit: int | None, near: bool) -> list[Region]:
    """The regions that remain of those that `suppress` kept.

    Args:
        mode: "per_category": if there are more than `limit`, or the text is long, the best of every label, labels in
            order of first appearance; there is no limit on the total. "per_image": the best.
        limit: None for no cap, except that of the best boxes where the text is long.
        near: Whether the text is so long that few boxes fit.

    Raises:
        UserError: If the mode is unknown.
    """
    if mode not in ("per_category", "per_image"):
        raise UserError(f"limit_mode: must be 'per_category' or 'per_image', not {mode!r}")
    if mode == "per_image":
        return list(regions[: PER_CATEGORY if near else limit])
    if limit is None or (len(regions) <= limit and not near):
        return list(regions)
    most = 1 if near else PER_CATEGORY_SMALL if limit < SMALL_LIMIT else PER_CATEGORY
    by_label: dict[str | None, list[Region]] = {}
    for region in regions:
        by_label.setdefault(region.label, []).append(region)
    return [region for own in by_label.values() for region in own[:most]]


def check_complete(regions: Sequence[Region]) -> None:
    """Refuse regions without label or score, which the rules need.

    Raises:
        FieldError: It names the first one.
    """
    for index, region in enumerate(regions):
        for name, example in (("score", "1.0"), ("label", '"object"')):
            if getattr(region, name) is None:
                raise FieldError(
                    f"boxes.{name}s",
                    f"box {index} has no {name}, by which boxes are chosen; give one {name} per box (of a box drawn by "
                    f"hand {example})",
                )


def check_inside(regions: Sequence[Region], width: int, height: int) -> None:
    """Refuse regions that no detector finds in a picture of this size.

    Detectors that pad a picture to a square (at the right or below) may find something there, so the square counts.

    Raises:
        FieldError: It names the first one.
    """
    side = max(width, height)
    for index, region in enumerate(regions):
        if region.left >= side or region.top >= side or region.right < 0 or region.bottom < 0:
            raise FieldError(
                f"boxes.boxes.{index}",
                f"{[_plain(x) for x in region.box]} lies outside the picture of {width} x {height} pixels; boxes are "
                "[left, top, right, bottom] in pixels of this picture",
            )


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def to_view(
    regions: Sequence[Region], width: int, height: int, offset: tuple[int, int], side: int, rounded: bool = True
) -> list[Region]:
    """Regions in the frame of a square view that shows the middle of the resized picture; those outside are dropped.

    A region that only touches the view is kept, and corners are rounded as float32, as published.

    Args:
        width, height: Of the picture, padding included.
        offset: Pixels of padding on the left and above.
        side: Of the view; the picture's short side becomes so long.
        rounded: Whether corners become whole numbers after scaling (half to even), as published.
    """
    scale = side / min(width, height)
    left, top = (int(width * scale) - side) // 2, (int(height * scale) - side) // 2
    kept = []
    for region in regions:
        corners = [place + shift for place, shift in zip(region.box, offset * 2, strict=True)]
        if rounded:
            corners = np.round(np.array(corners, np.float32) * np.float32(scale)).tolist()
        else:
            corners = [place * scale for place in corners]
        x1, y1, x2, y2 = (place - shift for place, shift in zip(corners, (left, top) * 2, strict=True))
        if x1 <= side and y1 <= side and x2 >= 0 and y2 >= 0:
            kept.append(region._replace(**_clamped(x1, y1, x2, y2, side)))
    return kept


def _clamped(*places: float) -> dict[str, float]:
    *corners, side = places
    names = ("left", "top", "right", "bottom")
    return {name: min(max(place, 0.0), float(side)) for name, place in zip(names, corners, strict=True)}
