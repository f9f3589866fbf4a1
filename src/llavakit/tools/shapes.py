"""Detection of coloured shapes: a detector for the pictures of `llavakit.phantom`, exact and without weights."""

from __future__ import annotations

import functools
import re

import numpy as np
from PIL import Image

from llavakit.phantom.canvas import COLOURS, SHAPES, stencil
from llavakit.tools.skill import Outcome, Skill, SkillError, absent, parameters, picture

CANVAS = 64  # pixels to which what was found and what is known are brought for comparison
NEAR = 60.0  # largest distance of a pixel's RGB from a colour
LEAST = 0.5  # overlap below which something is no known shape


@functools.cache
def _known() -> dict[str, tuple[np.ndarray, float]]:
    """Every shape filling a square canvas, and its width divided by its height."""
    found = {}
    for shape in SHAPES:
        inside = stencil(shape, CANVAS)[..., 0] > 0.5
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        tight = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        found[shape] = _filling(tight), tight.shape[1] / tight.shape[0]
    return found


def _filling(inside: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(inside.astype(np.uint8) * 255).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    return np.asarray(picture) > 127


def detect_shapes(image: Image.Image, caption: str = "") -> Outcome:
    """Coloured shapes in a picture.

    Args:
        image: RGB picture.
        caption: What is looked for, phrases separated by " . " ("red disc . square"); empty for everything.

    Returns:
        `boxes`, `logits` (overlap with the ideal shape), `phrases` and `size` [height, width], from top to bottom and
        left to right; and the masks.

    Raises:
        SkillError: If a phrase names no colour and no shape.
    """
    wanted = [_wanted(phrase) for phrase in re.split(r"\s*\.\s*", caption.lower()) if phrase.strip()]
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    found = []
    for name, box, score, inside in _things(pixels):
        colour, shape = name.split()
        if not wanted or any(colour in colours and shape in shapes for colours, shapes in wanted):
            found.append((box, score, name, inside))
    found.sort(key=lambda one: (one[0][1], one[0][0]))
    size = (width, height, width, height)
    data = {
        "boxes": [[round(edge / whole, 4) for edge, whole in zip(one[0], size, strict=True)] for one in found],
        "logits": [round(one[1], 4) for one in found],
        "phrases": [one[2] for one in found],
        "size": [height, width],
    }
    return Outcome(data, masks=tuple(one[3] for one in found))


def _wanted(phrase: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Colours and shapes that a phrase allows."""
    words = re.findall(r"[a-z]+", phrase)
    words += [word.removesuffix("es" if word.endswith(("sses", "shes")) else "s") for word in words]
    colours = tuple(word for word in words if word in COLOURS)
    shapes = tuple(word for word in words if word in SHAPES)
    if not colours and not shapes and not {"object", "thing", "shape"} & set(words):
        known = ", ".join((*COLOURS, *SHAPES))
        raise SkillError(f"caption: {phrase!r} names nothing that can be detected; known words: {known}")
    return colours or tuple(COLOURS), shapes or SHAPES


def _things(pixels: np.ndarray) -> list[tuple[str, tuple[int, int, int, int], float, np.ndarray]]:
    """Name, box in pixels, score and mask of everything that has a known colour and shape."""
    import cv2

    distances = np.stack(
        [np.linalg.norm(pixels.astype(np.float32) - np.array(paint, np.float32), axis=-1) for paint in COLOURS.values()]
    )
    nearest = np.where(distances.min(0) <= NEAR, distances.argmin(0), -1)
    found = []
    for number, colour in enumerate(COLOURS):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((nearest == number).astype(np.uint8), connectivity=8)
        for label in range(1, count):
            left, top, wide, tall, area = map(int, stats[label])
            if area < 6 or min(wide, tall) < 2:
                continue
            inside = labels[top : top + tall, left : left + wide] == label
            shape, score = _shape(inside)
            if score >= LEAST:
                whole = np.zeros(nearest.shape, bool)
                whole[top : top + tall, left : left + wide] = inside
                found.append((f"{colour} {shape}", (left, top, left + wide, top + tall), score, whole))
    return found


def _shape(inside: np.ndarray) -> tuple[str, float]:
    """The known shape that is most like a tight mask, and how much like it."""
    filling, ratio = _filling(inside), inside.shape[1] / inside.shape[0]
    scores = {}
    for shape, (ideal, own) in _known().items():
        overlap = (filling & ideal).sum() / max((filling | ideal).sum(), 1)
        scores[shape] = float(overlap * min(ratio / own, own / ratio))
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def shapes_skill() -> Skill:
    """The skill `detect_shapes`."""
    return Skill(
        name="detect_shapes",
        description="Find coloured shapes (such as 'red disc') in a drawn scene and give their boxes.",
        parameters=parameters(
            image=picture(),
            caption={
                "type": "string",
                "maxLength": 400,
                "description": "What to look for, separated by ' . '; empty for everything.",
            },
        ),
        function=detect_shapes,
        needs=("opencv-python",),
        missing=absent("cv2", "opencv-python", "tools"),
    )
