"""Pictures that planners cut like Pillow's, with gradients from the views back to every pixel.

`PixelPicture` holds a tensor and answers to the part of Pillow's interface that planners use. Resizing is Pillow's: the
same filters, the same weights, rows and columns one after another, values kept within 0..255 in between. Only the
rounding to whole grey levels is left out, so views differ from those of an 8-bit picture by less than a level or two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llavakit.errors import UserError
from llavakit.views.plan import Plan, Planner

WHITE = 255.0
Box = Sequence[float]


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)


def _cubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _hamming(x: float) -> float:
    x = abs(x)
    return 0.0 if x >= 1 else _sinc(x) * (0.54 + 0.46 * math.cos(math.pi * x))


# Pillow's filters and how far each reaches
FILTERS: dict[int, tuple[Callable[[float], float], float]] = {
    Image.Resampling.BOX: (lambda x: 1.0 if -0.5 < x <= 0.5 else 0.0, 0.5),
    Image.Resampling.BILINEAR: (lambda x: max(1 - abs(x), 0.0), 1.0),
    Image.Resampling.HAMMING: (_hamming, 1.0),
    Image.Resampling.BICUBIC: (_cubic, 2.0),
    Image.Resampling.LANCZOS: (lambda x: _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0, 3.0),
}


@functools.lru_cache(maxsize=256)
def weights(length: int, target: int, begin: float, end: float, resample: int) -> Tensor:
    """Pillow's weights along one axis [target, length] for the stretch from `begin` to `end`."""
    scale = (end - begin) / target
    found = torch.zeros(target, length, dtype=torch.float64)
    if resample == Image.Resampling.NEAREST:
        # Pillow itself says which pixels it takes, by resizing a line of their numbers
        line = Image.fromarray(np.arange(length, dtype=np.int32)[None])
        taken = np.asarray(line.resize((target, 1), Image.Resampling.NEAREST, box=(begin, 0, end, 1)))[0]
        found[torch.arange(target), torch.from_numpy(taken.astype(np.int64))] = 1.0
        return found.float()
    function, reach = FILTERS[resample]
    stretch = max(scale, 1.0)
    for place in range(target):
        centre = begin + (place + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), length)
        own = torch.tensor([function((x - centre + 0.5) / stretch) for x in range(first, last)], dtype=torch.float64)
        total = own.sum()
        found[place, first:last] = own / total if total else own
    return found.float()


class PixelPicture:
    """An RGB picture that gradients pass through.

    Args:
        values: [3, height, width] in 0..255.
    """

    mode = "RGB"

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.values.shape[2], self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]

    @property
    def height(self) -> int:
        return self.values.shape[1]

    def canvas(self, size: tuple[int, int], colour: int | Sequence[int] = 0) -> PixelPicture:
        """A picture of one colour, on the same device."""
        colours = [colour] * 3 if isinstance(colour, int) else list(colour)
        fill = self.values.new_tensor(colours).view(3, 1, 1)
        return PixelPicture(fill.expand(3, size[1], size[0]).clone())

    def resize(self, size: tuple[int, int], resample: int = Image.Resampling.BICUBIC, box: Box | None = None) -> Any:
        """As `PIL.Image.Image.resize`."""
        whole = (0, 0, *self.size)
        left, top, right, bottom = whole if box is None else box
        if tuple(size) == self.size and (left, top, right, bottom) == whole:
            return PixelPicture(self.values)
        values, (width, height) = self.values, size
        if width != self.width or (left, right) != (0, self.width):
            along = weights(self.width, width, left, right, int(resample)).to(values)
            values = (values @ along.T).clamp(0, WHITE)
        if height != self.height or (top, bottom) != (0, self.height):
            down = weights(self.height, height, top, bottom, int(resample)).to(values)
            values = (down @ values).clamp(0, WHITE)
        return PixelPicture(values)

    def crop(self, box: Box) -> PixelPicture:
        """As `PIL.Image.Image.crop`: black where the box leaves the picture."""
        left, top, right, bottom = (round(place) for place in box)
        inner = self.values[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        around = (max(-left, 0), max(right - self.width, 0), max(-top, 0), max(bottom - self.height, 0))
        return PixelPicture(F.pad(inner, around) if any(around) else inner)

    def paste(self, picture: PixelPicture, place: tuple[int, int] = (0, 0)) -> None:
        """As `PIL.Image.Image.paste` without a mask."""
        left, top = place
        x, y = max(left, 0), max(top, 0)
        inner = picture.values[:, y - top : self.height - top, x - left : self.width - left]
        values = self.values.clone()
        values[:, y : y + inner.shape[1], x : x + inner.shape[2]] = inner
        self.values = values

    def take(self, rows: np.ndarray, columns: np.ndarray, colour: Sequence[int]) -> PixelPicture:
        """The crossings of rows and columns; those outside have a colour."""
        down, across = torch.from_numpy(rows), torch.from_numpy(columns)
        inside = ((down >= 0) & (down < self.height))[:, None] & ((across >= 0) & (across < self.width))
        seen = self.values[:, down.clamp(0, self.height - 1)][:, :, across.clamp(0, self.width - 1)]
        return PixelPicture(torch.where(inside.to(seen.device), seen, seen.new_tensor(tuple(colour)).view(3, 1, 1)))

    def normalised(self, mean: Sequence[float], std: Sequence[float], rescale: float) -> Tensor:
        """Encoder input [3, height, width]."""
        shift, scale = (self.values.new_tensor(tuple(numbers)).view(3, 1, 1) for numbers in (mean, std))
        return (self.values * rescale - shift) / scale


def cut(planner: Planner, plan: Plan, pixels: Tensor) -> list[Tensor]:
    """The encoder inputs of a plan, with gradients.

    Args:
        pixels: [frames, 3, height, width] in 0..1; one frame for an image.

    Raises:
        UserError: If the planner does not cut such pictures.
    """
    pictures = [PixelPicture(frame * WHITE) for frame in pixels]
    try:
        views = planner.cut(pictures if planner.modality == "video" else pictures[0], plan)
    except (TypeError, AttributeError, RuntimeError, ValueError, LookupError) as error:
        raise UserError(_refusal(planner)) from error
    if not all(isinstance(view, Tensor) for view in views):
        raise UserError(_refusal(planner))
    return list(views)


def _refusal(planner: Planner) -> str:
    return (
        f"views of type {type(planner).__name__} are not differentiable from pixels; "
        "attack the encoder's inputs instead (at=views)"
    )
