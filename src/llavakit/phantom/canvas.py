"""Drawing of the scene world: shapes and signs on grey noise."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from llavakit.phantom import glyphs
from llavakit.phantom.base import check_choice

SHAPES = ("disc", "square", "triangle", "cross", "ring", "diamond", "bar")
COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 190, 70),
    "blue": (60, 90, 235),
    "yellow": (235, 215, 50),
    "purple": (170, 60, 200),
    "cyan": (60, 210, 215),
    "orange": (240, 140, 40),
    "white": (245, 245, 245),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """An object: shape and colour, its cell (row, column), and its square on the canvas in pixels."""

    shape: str
    colour: str
    cell: tuple[int, int]
    top: int
    left: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Sign:
    """A word on a dark plate, with its top left corner on the canvas in pixels."""

    text: str
    top: int
    left: int
    scale: int


def covers(sign: Sign, top: int, left: int, side: int) -> bool:
    """Whether a sign reaches into a square of the canvas."""
    bottom = sign.top + glyphs.HEIGHT * sign.scale + 4
    right = sign.left + ((glyphs.WIDTH + 1) * len(sign.text) - 1) * sign.scale + 4
    return sign.top < top + side and top < bottom and sign.left < left + side and left < right


@functools.lru_cache(maxsize=1024)
def stencil(shape: str, side: int) -> np.ndarray:
    """Share of every pixel that a shape covers, float32 `[side, side, 1]`.

    Raises:
        UserError: If there is no such shape.
    """
    check_choice("shape", shape, SHAPES)
    fine = 4
    axis = (np.arange(side * fine) + 0.5) / (side * fine) * 2 - 1
    x, y = np.abs(axis)[None, :], axis[:, None]
    inside = {
        "disc": x**2 + y**2 < 1,
        "square": (x < 0.88) & (np.abs(y) < 0.88),
        "triangle": x < (y + 1) / 2,
        "cross": np.minimum(x, np.abs(y)) < 0.3,
        "ring": np.abs(np.sqrt(x**2 + y**2) - 0.78) < 0.22,
        "diamond": x + np.abs(y) < 1,
        "bar": (x < 1) & (np.abs(y) < 0.3),
    }[shape]
    return inside.reshape(side, fine, side, fine).mean(axis=(1, 3), dtype=np.float32)[:, :, None]


_PAINT = {name: np.array(value, np.float32) for name, value in COLOURS.items()}


def render(things: list[Thing], sign: Sign | None, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Objects and sign on grey noise: uint8 `[height, width, 3]`."""
    canvas = rng.integers(64, 129, (height, width, 3), dtype=np.uint8)
    for thing in things:
        part = canvas[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side]
        share = stencil(thing.shape, thing.side)
        part[:] = part * (1.0 - share) + _PAINT[thing.colour] * share
    if sign is not None:
        ink = glyphs.render(sign.text, sign.scale)
        tall, wide = ink.shape
        canvas[sign.top : sign.top + tall + 4, sign.left : sign.left + wide + 4] = 10
        canvas[sign.top + 2 : sign.top + 2 + tall, sign.left + 2 : sign.left + 2 + wide] = (
            10.0 + 235.0 * ink[:, :, None]
        )
    return canvas
