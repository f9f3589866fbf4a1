"""Pixels: resizing, padding, cropping, normalising of 8-bit RGB images, exactly as the published processors do it.

Knows nothing of planners or tokens. Everything stays 8-bit until one table lookup per channel, which gives the very
float32 numbers that "times 1/255, minus mean, over std" gives (transformers computes these in the same order and
types), at a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BAND_PIXELS = 2**20  # rows are padded and shrunk in bands of about this many pixels
_SMALL_SQUARE = 2**21  # pixels of a square that is made whole
_LARGEST_RESIZE = 2**26  # pixels of a resized image of which only the middle is kept

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def canvas_for(image: Image.Image, size: tuple[int, int], colour: int | Sequence[int] = 0) -> Any:
    """A sheet of one colour that `image` can be pasted on: Pillow's, or the kind of a differentiable picture."""
    own = getattr(image, "canvas", None)
    if own is not None:
        return own(size, colour)
    return Image.new("RGB", size, colour if isinstance(colour, int) else tuple(colour))


def resampling(name: str | int) -> Image.Resampling:
    """Pillow's filter by name, or by the number that preprocessor files use.

    Raises:
        UserError: If there is no such filter.
    """
    if isinstance(name, int) and name in set(_FILTERS.values()):
        return Image.Resampling(name)
    if name not in _FILTERS:
        raise UserError(f"resample: unknown filter {name!r}; known: {', '.join(_FILTERS)}")
    return _FILTERS[name]


class Normaliser:
    """8-bit pixels to normalised float32 by one table of 256 entries per channel.

    Args:
        mean, std: Per channel, in units of the rescaled pixel (0 to 1).
        rescale: Factor before normalising.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], rescale: float = 1 / 255) -> None:
        if len(mean) != 3 or len(std) != 3:
            raise UserError(f"image_mean and image_std need 3 numbers each, not {len(mean)} and {len(std)}")
        grey = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
        self.mean, self.std, self.rescale = tuple(mean), tuple(std), rescale
        self.tables = [(grey - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]

    def into(self, image: Image.Image, out: np.ndarray) -> None:
        """Write a normalised RGB image into `out`, float32 [3, height, width]."""
        for table, channel, plane in zip(self.tables, image.split(), out, strict=True):
            if plane.flags.c_contiguous:
                np.take(table, np.asarray(channel), out=plane, mode="clip")  # "clip" writes without a buffer
            else:
                plane[...] = table[np.asarray(channel)]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """A normalised RGB image, float32 [3, height, width]; of a differentiable picture a tensor."""
        own = getattr(image, "normalised", None)
        if own is not None:
            return own(self.mean, self.std, self.rescale)
        out = np.empty((3, image.height, image.width), np.float32)
        self.into(image, out)
        return out


def pad_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """The 8-bit padding colour of the LLaVA family, int(255 * mean)."""
    return tuple(int(255 * channel) for channel in mean)


def square_offset(width: int, height: int) -> tuple[int, int]:
    """Left and top of an image on the square of its long side; an odd pixel goes right or below."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2


def pad_to_square(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    """The image in the middle of a square of its long side."""
    if image.width == image.height:
        return image
    side = max(image.size)
    canvas = canvas_for(image, (side, side), colour)
    canvas.paste(image, square_offset(*image.size))
    return canvas


def pad_and_resize(
    image: Image.Image, colour: Sequence[int], side: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """`pad_to_square(image, colour).resize((side, side))`, pixel for pixel, without the large square.

    Pillow resizes rows first, rounds to 8 bit, then columns. Rows of pure padding stay the padding colour in the
    first pass, so only the image's own rows go through it (in bands that bound the memory of very tall images).
    """
    long = max(image.size)
    small = long * long <= _SMALL_SQUARE and (image.width < long or resample == Image.Resampling.NEAREST)
    if (
        image.width == image.height or small or not isinstance(image, Image.Image)
    ):  # a small tall image gains nothing but less memory
        return pad_to_square(image, colour).resize((side, side), resample)
    if resample == Image.Resampling.NEAREST:
        return _nearest_on_square(image, colour, side)
    left, top = square_offset(*image.size)
    column = Image.new("RGB", (side, long), tuple(colour))
    if image.width == long:
        column.paste(image.resize((side, image.height), resample), (0, top))
    else:
        rows = min(image.height, max(1, _BAND_PIXELS // long))
        band = Image.new("RGB", (long, rows), tuple(colour))
        for y in range(0, image.height, rows):
            count = min(rows, image.height - y)
            band.paste(image.crop((0, y, image.width, y + count)), (left, 0))
            whole = band if count == rows else band.crop((0, 0, long, count))
            column.paste(whole.resize((side, count), resample), (0, y))
    return column.resize((side, side), resample)


def _nearest_on_square(image: Image.Image, colour: Sequence[int], side: int) -> Image.Image:
    """`pad_to_square(image, colour).resize((side, side), NEAREST)`, pixel for pixel, without the large square."""
    left, top = square_offset(*image.size)
    # Pillow itself says which pixels it takes, by resizing a line of their numbers.
    line = Image.fromarray(np.arange(max(image.size), dtype=np.int32)[None])
    taken = np.asarray(line.resize((side, 1), Image.Resampling.NEAREST))[0]
    out = np.full((side, side, 3), tuple(colour), np.uint8)
    columns = np.flatnonzero((taken >= left) & (taken < left + image.width))
    for row in np.flatnonzero((taken >= top) & (taken < top + image.height)):
        pixels = np.asarray(_crop(image, 0, int(taken[row]) - top, image.width, 1))
        out[row, columns] = pixels[0, taken[columns] - left]
    return Image.fromarray(out)


def shortest_edge(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the short side at `size` and the aspect ratio kept, long side truncated."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _half(space: int, rounded: bool) -> int:
    """What of the space is in front of a middle part: rounded down, or to the nearest even number."""
    return round(space / 2) if rounded else space // 2


def centre_crop(image: Image.Image, height: int, width: int, *, rounded: bool = False) -> Image.Image:
    """The middle of an image; where it is smaller than that, black around it.

    Args:
        rounded: Whether an odd rest is split as torchvision's `CenterCrop` does it (half to even), and not as
            transformers' processors do (the smaller half in front).
    """
    left, top = _half(image.width - width, rounded), _half(image.height - height, rounded)
    if left >= 0 and top >= 0:
        return image if (left, top, width, height) == (0, 0, *image.size) else _crop(image, left, top, width, height)
    # transformers first centres on a black canvas (odd pixel left and above), then crops that.
    canvas = canvas_for(image, (max(width, image.width), max(height, image.height)))
    pad_left, pad_top = math.ceil((canvas.width - image.width) / 2), math.ceil((canvas.height - image.height) / 2)
    canvas.paste(image, (pad_left, pad_top))
    return _crop(canvas, max(left + pad_left, 0), max(top + pad_top, 0), width, height)


def _crop(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def resize_and_crop(
    image: Image.Image,
    size: int,
    crop: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    *,
    rounded: bool = False,
) -> Image.Image:
    """The classic CLIP view: short side to `size`, then the middle `crop` x `crop` pixels.

    A strip so long that its resized form would be huge is reduced to its middle first; its pixels may then differ
    from the long way round in the last bit.

    Args:
        rounded: See `centre_crop`.
    """
    width, height = shortest_edge(*image.size, size)
    if (width, height) == image.size:
        return centre_crop(image, crop, crop, rounded=rounded)
    x, y = image.width / width, image.height / height
    if width * height > _LARGEST_RESIZE:
        across, down = min(crop, width), min(crop, height)
        left, top = _half(width - across, rounded), _half(height - down, rounded)
        right, bottom = min((left + across) * x, image.width), min((top + down) * y, image.height)
        return centre_crop(image.resize((across, down), resample, box=(left * x, top * y, right, bottom)), crop, crop)
    # From version 13 on Pillow resizes columns first where the height shrinks much, and rounds other values in between.
    tall = 2 * image.height > 3 * image.width
    if tall or crop > size or resample == Image.Resampling.NEAREST:
        return centre_crop(image.resize((width, height), resample), crop, crop, rounded=rounded)
    left, top = _half(width - crop, rounded), _half(height - crop, rounded)
    # Rows first, as Pillow does otherwise, but only the rows and columns that the kept square depends on.
    reach = 3 * max(y, 1.0) + 2  # no filter reaches further
    first, last = max(int(top * y - reach), 0), min(int((top + crop) * y + reach) + 1, image.height)
    rows = _crop(image, 0, first, image.width, last - first) if last - first < image.height else image
    columns = canvas_for(image, (crop, image.height))
    columns.paste(_crop(rows.resize((width, rows.height), resample), left, 0, crop, rows.height), (0, first))
    return _crop(columns.resize((crop, height), resample), 0, top, crop, crop)
