"""Sizes in which LLaVA-Plus sends pictures on, boxes of strokes, and drawings of what tools found.

Source: `Conversation.get_images`, `get_raw_images`, `image_to_url`, `get_mask_bbox` and `plot_boxes` of the published
code; golden cases fix the sizes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from llavakit.errors import UserError
from llavakit.tools.rle import decode_mask

SHORT, LONG = 400, 800  # of pictures for the model and the chat; tools get up to `LONG`
PADDING = (122, 116, 104)
RESIZED = 336
MARK = "\n<image>"
MODES = ("Crop", "Default", "Resize", "Pad")
Size = tuple[int, int]


def shown_size(size: Size) -> Size:
    """Width and height in which a picture is shown in the chat: at most 400 on the short and 800 on the long side."""
    width, height = size
    ratio = max(size) / min(size)
    short = max(int(min(LONG / ratio, SHORT, min(size))), 1)
    long = max(int(short * ratio), 1)
    return (long, short) if width > height else (short, long)


def for_model(image: Image.Image, mode: str = "Crop") -> Image.Image:
    """A picture as it is sent to the model; its processor brings it to the encoder's size.

    Args:
        mode: Of `MODES`: nothing first, 336 x 336, or padded to a square.
    """
    if mode == "Pad":
        side = max(image.size)
        square = Image.new(image.mode, (side, side), PADDING if image.mode == "RGB" else 0)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    elif mode == "Resize":
        image = image.resize((RESIZED, RESIZED))
    elif mode not in MODES:
        raise UserError(f"image mode: must be one of {', '.join(MODES)}, not {mode!r}")
    size = shown_size(image.size)
    return image if max(size) == max(image.size) else image.resize(size)


def for_tool(image: Image.Image) -> Image.Image:
    """A picture as it is sent to a tool: at most 800 on the long side."""
    long = max(image.size)
    if long <= LONG:
        return image
    width, height = image.size
    if width > height:
        return image.resize((LONG, max(int(height * LONG / width), 1)))
    return image.resize((max(int(width * LONG / height), 1), LONG))


def for_chat(image: Image.Image) -> Image.Image:
    """A picture as it is shown in the chat."""
    return image.resize(shown_size(image.size))


def stroke_box(mask: Any) -> list[float] | None:
    """The box [x0, y0, x1, y1] around a painted mask [height, width], in fractions to two decimals; None if empty."""
    painted = np.asarray(mask) != 0
    height, width = painted.shape
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    if not len(rows):
        return None
    edges = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return [float(np.round(edge, 2)) for edge in edges]  # 0.025 gives 0.02, as the original's NumPy figures do


def with_box(text: str, box: Sequence[float] | None) -> str:
    """A question with the marker of its picture and, if something is painted, the box of that."""
    text += "" if MARK.strip() in text else MARK
    return text if box is None else f"{text}\nInput box: {list(box)}"


class Drawing(NamedTuple):
    """What was drawn on a picture: boxes in pixels (float32) and their labels."""

    boxes: list[list[float]]
    labels: list[str]


def boxes_in_pixels(result: Mapping[str, Any], size: Size) -> Drawing | None:
    """Boxes of a cleaned result on a picture of this width and height; None if it has none."""
    boxes = result.get("boxes")
    if not isinstance(boxes, Sequence) or isinstance(boxes, str) or not all(_is_box(box) for box in boxes):
        return None
    scale = np.array([size[0], size[1], size[0], size[1]], np.float32)
    pixels = [(np.array(box, np.float32) * scale).tolist() for box in boxes]
    phrases, logits = (_listed(result.get(name)) for name in ("phrases", "logits"))
    labels = []
    for number in range(len(pixels)):
        parts = [str(phrase) for phrase in phrases[number : number + 1] if phrase]
        scores = [logit for logit in logits[number : number + 1] if isinstance(logit, (int, float))]
        parts += [f"{np.float32(score):.2f}" for score in scores]
        labels.append(" ".join(parts))
    return Drawing(pixels, labels)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _is_box(box: Any) -> bool:
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box)


def draw_boxes(image: Image.Image, drawing: Drawing) -> Image.Image:
    """The picture with boxes and their labels."""
    image, colours = image.copy(), random.Random(0)
    pen = ImageDraw.Draw(image)
    for number, box in enumerate(drawing.boxes):
        colour = tuple(colours.randrange(64, 256) for _ in range(3))
        left, right, top, bottom = min(box[0], box[2]), max(box[0], box[2]), min(box[1], box[3]), max(box[1], box[3])
        pen.rectangle((left, top, right, bottom), outline=colour, width=2)
        if number < len(drawing.labels) and drawing.labels[number]:
            pen.text((left + 3, max(top - 12, 0)), drawing.labels[number], fill=colour)
    return image


def draw_masks(image: Image.Image, masks: Sequence[Any]) -> Image.Image:
    """The picture with masks (COCO run lengths) over it, each in a colour of its own."""
    pixels, colours = np.asarray(image.convert("RGB")).astype(np.float32), random.Random(0)
    for mask in masks:
        try:
            inside = Image.fromarray(decode_mask(mask).astype(np.uint8) * 255)
        except UserError:  # of a tool; the others are drawn
            continue
        share = np.asarray(inside.resize(image.size, Image.Resampling.BILINEAR), np.float32)[..., None] / 255 * 0.8
        colour = np.array([colours.randrange(256) for _ in range(3)], np.float32)
        pixels = pixels * (1 - share) + colour * share
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_points(image: Image.Image, points: Sequence[Any]) -> Image.Image:
    """The picture with points in fractions of it."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    for point in points:
        if isinstance(point, (list, tuple)) and len(point) == 2 and all(isinstance(x, (int, float)) for x in point):
            x, y = point[0] * image.width, point[1] * image.height
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(255, 60, 60), outline=(255, 255, 255))
    return image
