"""Planners of Video-LLaVA: pictures resized as floats, and clips whose frames the encoder sees together (spec 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from llavakit.errors import MediaError, UserError
from llavakit.registry import PLANNERS
from llavakit.views import pixels
from llavakit.views.image import ImagePlanner
from llavakit.views.plan import MediaSize, Plan, Planner, View
from llavakit.views.tensors import MODES, short_side, taps


class FloatSquare(ImagePlanner):
    """Normalised floats, short side to `size` without antialias, then the middle square.

    torchvision 0.15 resized tensors so; neither does it round to 8 bits in between nor cut off what bicubic weights
    overshoot. Only the pixels that the square depends on are looked at.

    Args:
        size: Side of the square in pixels.
        mode: "bicubic" (LanguageBind's pictures) or "bilinear" (its frames).
        ratio: Whether the long side is the ratio of the sides times `size`, as PyTorch's video transforms have it, or
            `size` times the long side over the short one, as those of pictures do: the former may be one pixel less.
        pad: Whether pictures are padded to a square first; `background` is the 8-bit colour, default int(255 * mean).
    """

    def __init__(
        self,
        *,
        size: int = 224,
        mode: str = "bicubic",
        ratio: bool = False,
        pad: bool = False,
        background: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size=size, **options)
        if mode not in MODES:
            raise UserError(f"mode: must be one of {', '.join(MODES)}, not {mode!r}")
        self.mode, self.ratio, self.pad = mode, ratio, pad
        self.background = pixels.pad_colour(self.image_mean) if background is None else tuple(background)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture before the crop."""
        if self.ratio:
            return short_side(height, width, self.size)
        return pixels.shortest_edge(width, height, self.size)[::-1]

    def crop(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the middle square; halves round to even."""
        return round((height - self.size) / 2), round((width - self.size) / 2)

    def plan(self, size: MediaSize) -> Plan:
        view = (View(self.size, self.size),)
        if not self.pad:
            return Plan("image", size, view, canvas=self.resized(size.height, size.width))
        side = max(size.width, size.height)
        left, top = pixels.square_offset(size.width, size.height)
        content = (left, top, left + size.width, top + size.height)
        return Plan("image", size, view, canvas=(side, side), content=content)

    def cut(self, item: Image.Image, plan: Plan) -> list[np.ndarray]:
        side = max(item.size) if self.pad else 0
        height, width = (side, side) if self.pad else (item.height, item.width)
        tall, wide = self.resized(height, width)
        top, left = self.crop(tall, wide)
        rows, down = taps(height, tall, top, top + self.size, self.mode)
        columns, across = taps(width, wide, left, left + self.size, self.mode)
        if not isinstance(item, Image.Image):  # a differentiable picture
            seen = item.take(*self._places(item, rows.ravel(), columns.ravel(), side), self.background)
            across, down = torch.from_numpy(across), torch.from_numpy(down)
        else:
            seen = Image.fromarray(self._pixels(item, rows.ravel(), columns.ravel(), side))
        values = self.normalise(seen).reshape(3, *rows.shape, *columns.shape)
        values = sum(values[..., tap] * across[:, tap] for tap in range(columns.shape[1]))
        return [sum(values[:, :, tap] * down[:, tap, None] for tap in range(rows.shape[1]))]

    def _places(
        self, item: Image.Image, rows: np.ndarray, columns: np.ndarray, side: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the picture, given those of the square of this side that it is padded to."""
        left, top = pixels.square_offset(*item.size) if side else (0, 0)
        return rows - top, columns - left

    def _pixels(self, item: Image.Image, rows: np.ndarray, columns: np.ndarray, side: int) -> np.ndarray:
        """The crossings of rows and columns of a picture, or of the square of this side that it is padded to."""
        picture = np.asarray(item)
        if not side:
            return picture[rows[:, None], columns]
        rows, columns = self._places(item, rows, columns, side)
        inside = [(own >= 0) & (own < length) for own, length in ((rows, item.height), (columns, item.width))]
        seen = picture[np.clip(rows, 0, item.height - 1)[:, None], np.clip(columns, 0, item.width - 1)]
        return np.where((inside[0][:, None] & inside[1])[..., None], seen, np.array(self.background, np.uint8))


class Clip(Planner):
    """All frames of a video as one view [channels, frames, height, width], for encoders that look along time.

    Args:
        frame: Planner of one frame.
        frames: Frames that the encoder takes at once; a clip must have a multiple of it. None takes any number.
        mirror: Whether clips are mirrored left to right. The published code mirrors every second clip at random, also
            at inference, so that its answers about left and right are random; a compatibility switch.
    """

    modality = "video"

    def __init__(self, *, frame: Mapping[str, Any], frames: int | None = None, mirror: bool = False) -> None:
        self.frame: Planner = PLANNERS.build(dict(frame))
        if self.frame.modality != "image":
            raise UserError(f"frame: needs a planner of images, {frame.get('type')!r} plans a {self.frame.modality}")
        if frames is not None and (not isinstance(frames, int) or frames < 1):
            raise UserError(f"frames: must be a positive number, got {frames!r}")
        self.frames, self.mirror = frames, mirror

    def plan(self, size: MediaSize) -> Plan:
        inner = self.frame.plan(MediaSize(1, size.height, size.width))
        if len(inner.views) != 1:
            raise UserError(f"frame: a clip needs a planner that makes one view of a frame, not {len(inner.views)}")
        if self.frames is not None and (size.depth % self.frames or not size.depth):
            raise MediaError(
                f"{size.depth} frames; this model takes {self.frames}, or a multiple of it "
                f"(sampling {{type: uniform, frames: {self.frames}}} repeats frames of shorter videos)"
            )
        (view,) = inner.views
        clip = View(view.height, view.width, depth=size.depth, role="clip")
        return Plan("video", size, (clip,), canvas=inner.canvas, content=inner.content)

    def fitted(self, size: MediaSize) -> MediaSize:
        step = self.frames or 1
        return size._replace(depth=max(-(-size.depth // step), 1) * step)

    def cut(self, item: Sequence[Image.Image], plan: Plan) -> list[np.ndarray]:
        """One float32 array [3, frames, height, width] of RGB frames of one size."""
        if len(item) != plan.size.depth:
            raise ValueError(f"the plan is for {plan.size.depth} frames, there are {len(item)}")
        inner = self.frame.plan(MediaSize(1, plan.size.height, plan.size.width))
        cut: dict[int, np.ndarray] = {}  # a short video repeats frames
        for frame in item:
            if id(frame) not in cut:
                (cut[id(frame)],) = self.frame.cut(frame, inner)
        if not all(isinstance(view, np.ndarray) for view in cut.values()):  # of differentiable pictures
            clip = torch.stack([cut[id(frame)] for frame in item], dim=1)
            return [clip.flip(-1) if self.mirror else clip]
        clip = np.stack([cut[id(frame)] for frame in item], axis=1)
        return [np.ascontiguousarray(clip[..., ::-1]) if self.mirror else clip]
