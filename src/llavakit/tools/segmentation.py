"""Interactive segmentation with OpenCV's GrabCut: from a stroke, a box or points to the mask of what is meant.

GrabCut models the colours of what is marked and of the rest; it knows nothing of objects. It separates things whose
colours differ from their surroundings and fails where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from llavakit.tools.skill import BOX, POINT, Outcome, Skill, SkillError, absent, mask, number, parameters, picture

ROUNDS = 5  # of GrabCut
LIKE = 12, 40  # smallest and largest distance in CIELAB (8 bit) that counts as the same colour
MARGIN = 0.25  # by which the neighbourhood of what has the mark's colours is larger


def segment(
    image: Image.Image,
    *,
    stroke: Sequence[Sequence[float]] | None = None,
    box: Sequence[float] | None = None,
    points: Sequence[Sequence[float]] | None = None,
    point_labels: Sequence[int] | None = None,
    scribble: np.ndarray | None = None,
    width: float = 0.02,
) -> Outcome:
    """The mask of what a person has marked.

    Args:
        image: RGB picture.
        stroke: Corners of a line over the thing, in fractions of width and height.
        box: [x0, y0, x1, y1] around it, in fractions.
        points: Points on it, in fractions.
        point_labels: 1 for a point on the thing, 0 for one beside it; default: all on it.
        scribble: Boolean matrix of the picture's size instead of a stroke.
        width: Diameter of stroke and points, as a share of the shorter side.

    Returns:
        `boxes` with the one around the mask (none if nothing was found), `area` as a share of the picture, and the
        mask.

    Raises:
        SkillError: If nothing is marked, or a mark does not fit.
    """
    import cv2

    pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
    height, wide = pixels.shape[:2]
    if height < 3 or wide < 3:
        raise SkillError(f"segment: a picture of {wide} x {height} pixels is too small")
    on, beside = _marks((height, wide), stroke, points, point_labels, scribble, width)
    if not on.any() and box is None:
        raise SkillError("segment: mark something with stroke, box, points or scribble")
    if box is None:
        labels = _around(pixels, on)
    else:
        labels = np.full((height, wide), cv2.GC_BGD, np.uint8)
        left, top, right, bottom = _pixels(box, wide, height)
        labels[top:bottom, left:right] = cv2.GC_PR_FGD
        if (labels == cv2.GC_PR_FGD).all():  # GrabCut needs some background
            labels[0], labels[-1], labels[:, 0], labels[:, -1] = (cv2.GC_BGD,) * 4
    labels[on], labels[beside] = cv2.GC_FGD, cv2.GC_BGD
    if (labels == cv2.GC_FGD).all():
        raise SkillError("segment: the whole picture is marked; leave some of it out")
    inside = _cut(pixels, labels)
    if on.any():
        inside = _touching(inside, on)
    return _outcome(inside)


def _around(pixels: np.ndarray, on: np.ndarray) -> np.ndarray:
    """GrabCut's first labels for marks alone.

    A mark says little of the thing's extent. What touches it and has its colours is taken for the thing to begin with,
    and what lies well outside of that for background; GrabCut decides between.
    """
    import cv2

    colours = cv2.cvtColor(cv2.GaussianBlur(pixels, (3, 3), 0), cv2.COLOR_RGB2LAB).astype(np.float32)
    marked = colours[on]
    centres = np.unique(np.quantile(marked, (0.2, 0.5, 0.8), axis=0), axis=0)
    far = np.min([np.linalg.norm(colours - centre, axis=-1) for centre in centres], axis=0)
    limit, _ = cv2.threshold(np.clip(far, 0, 255).astype(np.uint8), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    like = _touching((far <= min(max(limit, LIKE[0]), LIKE[1])) | on, on)
    rows, columns = np.flatnonzero(like.any(1)), np.flatnonzero(like.any(0))
    labels = np.full(on.shape, cv2.GC_BGD, np.uint8)
    margin = 3 + round(MARGIN * max(len(rows), len(columns)))
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    labels[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1] = cv2.GC_PR_BGD
    labels[like] = cv2.GC_PR_FGD
    return labels


def _cut(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    import cv2

    cv2.setRNGSeed(0)  # its mixtures begin with k-means
    models = np.zeros((1, 65)), np.zeros((1, 65))
    try:
        cv2.grabCut(pixels, labels, None, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
    except cv2.error as error:
        raise SkillError(f"segment: the marks do not tell the thing from the rest ({error.err or error})") from None
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def _marks(
    size: tuple[int, int],
    stroke: Sequence[Sequence[float]] | None,
    points: Sequence[Sequence[float]] | None,
    point_labels: Sequence[int] | None,
    scribble: np.ndarray | None,
    width: float,
) -> tuple[np.ndarray, np.ndarray]:
    """What is marked as the thing, and as not the thing."""
    import cv2

    height, wide = size
    thick = max(1, round(width * min(size)))
    on, beside = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def at(point: Sequence[float]) -> tuple[int, int]:
        x, y = point
        return min(int(x * wide), wide - 1), min(int(y * height), height - 1)

    for first, second in zip(stroke or (), (stroke or ())[1:] or (stroke or ()), strict=False):
        cv2.line(on, at(first), at(second), 1, thick)
    if point_labels is not None and len(point_labels) != len(points or ()):
        raise SkillError(f"point_labels: {len(point_labels)} for {len(points or ())} points; give one each")
    for place, point in enumerate(points or ()):
        side = on if point_labels is None or point_labels[place] else beside
        cv2.circle(side, at(point), max(1, thick // 2), 1, -1)
    if scribble is not None:
        if scribble.shape != size:
            raise SkillError(
                f"scribble: is {scribble.shape[1]} x {scribble.shape[0]} pixels, the picture {wide} x {height}"
            )
        on |= scribble.astype(np.uint8)
    return on.astype(bool), beside.astype(bool)


def _pixels(box: Sequence[float], wide: int, height: int) -> tuple[int, int, int, int]:
    left, top = int(box[0] * wide), int(box[1] * height)
    right, bottom = max(left + 1, round(box[2] * wide)), max(top + 1, round(box[3] * height))
    if not (0 <= left < wide and 0 <= top < height) or box[2] <= box[0] or box[3] <= box[1]:
        raise SkillError(f"box: {list(box)} holds nothing of the picture; give [x0, y0, x1, y1] in fractions")
    return left, top, min(right, wide), min(bottom, height)


def _touching(inside: np.ndarray, on: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that a mark touches."""
    import cv2

    labels = cv2.connectedComponents(inside.astype(np.uint8), connectivity=8)[1]
    touched = np.unique(labels[on & inside])
    return np.isin(labels, touched[touched > 0])


def _outcome(inside: np.ndarray) -> Outcome:
    height, wide = inside.shape
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    boxes = []
    if len(rows):
        edges = columns[0] / wide, rows[0] / height, (columns[-1] + 1) / wide, (rows[-1] + 1) / height
        boxes.append([round(float(edge), 4) for edge in edges])
    return Outcome({"boxes": boxes, "area": round(float(inside.mean()), 4)}, masks=(inside,))


def _called(image: Image.Image, **marks: Any) -> Outcome:
    return segment(image, **marks)


def segmentation_skill() -> Skill:
    """The skill `segment`."""
    return Skill(
        name="segment",
        description="Cut out what a stroke, a box or points mark, by its colours (GrabCut).",
        parameters=parameters(
            image=picture(),
            stroke={"type": "array", "items": POINT, "minItems": 1, "maxItems": 2000, "description": "Line over it."},
            box=BOX | {"description": "[x0, y0, x1, y1] around it, in fractions of the picture."},
            points={"type": "array", "items": POINT, "minItems": 1, "maxItems": 200, "description": "Points on it."},
            point_labels={
                "type": "array",
                "items": {"enum": [0, 1]},
                "description": "1 for a point on it, 0 for one beside it.",
            },
            scribble=mask("Marked pixels instead of a stroke."),
            width=number("Diameter of stroke and points, as a share of the shorter side.", 0.001, 0.5, 0.02),
        ),
        function=_called,
        needs=("opencv-python",),
        missing=absent("cv2", "opencv-python", "tools"),
    )
