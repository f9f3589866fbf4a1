"""Arithmetic of tiled images ("anyres"): candidate canvases, choice of canvas, fitting, unpadding.

Pure integers and floats, shared by planners (pixels) and arrangements (feature maps). Sizes are (width, height)
here, as in the published code. Sources: LLaVA-1.5's repository for v1.6, LLaVA-OneVision section 4.
"""

from __future__ import annotations

import math
import re
from ast import literal_eval
from collections.abc import Sequence

from llavakit.errors import UserError

Size = tuple[int, int]


def candidates(pinpoints: str | Sequence[Sequence[int]], tile: int) -> tuple[Size, ...]:
    """Candidate canvases from a list, a list written as a string, or a range such as "(1x1),...,(6x6)".

    A range counts tiles of `tile` pixels: every width and height between its first and last pair, widths outer.

    Raises:
        UserError: If it is neither, or a canvas is not made of whole tiles.
    """
    if isinstance(pinpoints, str) and "x" in pinpoints:
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if not pairs:
            raise UserError(f"pinpoints: {pinpoints!r} is no range; write it as '(1x1),...,(6x6)'")
        (first_w, first_h), (last_w, last_h) = pairs[0], pairs[-1]
        listed = [(i * tile, j * tile) for i in range(first_w, last_w + 1) for j in range(first_h, last_h + 1)]
    else:
        try:
            listed = [
                (int(w), int(h)) for w, h in (literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints)
            ]
        except (ValueError, TypeError, SyntaxError) as error:
            raise UserError(f"pinpoints: {pinpoints!r} is not a list of (width, height) pairs") from error
    wrong = [(w, h) for w, h in listed if w < tile or h < tile or w % tile or h % tile]
    if wrong or not listed:
        raise UserError(f"pinpoints: canvases must be multiples of the tile size {tile}, got {wrong or 'none'}")
    return tuple(listed)


def select_canvas(size: Size, canvases: Sequence[Size]) -> Size | None:
    """The canvas that keeps most of the image, among equals the one that wastes least, then the first.

    Args:
        size: (width, height) of the image.
        canvases: Candidates.

    Returns:
        The canvas; None only if there are no candidates. An image so thin that every scaled side truncates to 0
        gets the smallest canvas.
    """
    width, height = size
    best, kept, wasted = None, 0, math.inf
    for canvas_width, canvas_height in canvases:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_width * canvas_height - effective
        if effective > kept or (effective == kept and waste < wasted):
            best, kept, wasted = (canvas_width, canvas_height), effective, waste
    return best


def fit(size: Size, canvas: Size) -> tuple[Size, tuple[int, int]]:
    """Size of the image resized into a canvas with its aspect ratio kept, and (left, top) where it is pasted."""
    (width, height), (canvas_width, canvas_height) = size, canvas
    scale_w, scale_h = canvas_width / width, canvas_height / height
    if scale_w < scale_h:
        new = (canvas_width, min(math.ceil(height * scale_w), canvas_height))
    else:
        new = (min(math.ceil(width * scale_h), canvas_width), canvas_height)
    return new, ((canvas_width - new[0]) // 2, (canvas_height - new[1]) // 2)


def unpad(size: Size, rows: int, cols: int, rounding: str = "int") -> tuple[slice, slice]:
    """Rows and columns of a feature map that hold the image, not its padding.

    The same number is cut on both sides, so of an odd remainder one padded line stays.

    Args:
        size: (width, height) of the original image.
        rows, cols: Size of the map over the whole canvas.
        rounding: "int" truncates like the published code; "hf" rounds at the seventh decimal first, as transformers
            does (a few sizes differ).
    """
    width, height = size

    def whole(value: float) -> int:
        return int(round(value, 7)) if rounding == "hf" else int(value)

    if width / height > cols / rows:
        cut = (rows - whole(height * (cols / width))) // 2
        return slice(cut, rows - cut), slice(0, cols)
    cut = (cols - whole(width * (rows / height))) // 2
    return slice(0, rows), slice(cut, cols - cut)


def budgeted(rows: int, cols: int, per_tile: int, max_tiles: int) -> Size:
    """(rows, cols) of a feature map shrunk to a budget of `max_tiles` tiles of `per_tile` features.

    Maps up to 1.1 times too long on a side are left alone (LLaVA-OneVision).
    """
    times = math.sqrt(rows * cols / (max_tiles * per_tile))
    if times <= 1.1:
        return rows, cols
    return max(int(rows // times), 1), max(int(cols // times), 1)
