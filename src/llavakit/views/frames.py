"""Planner of videos: every frame goes through a planner of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import UserError
from llavakit.registry import PLANNERS
from llavakit.views.plan import MediaSize, Plan, Planner


def squash_nearest(frame: Image.Image, side: int) -> Image.Image:
    """A frame squashed to side x side by nearest neighbour, sampled at the upper left of every output pixel.

    Pillow samples at the centre instead; Video-ChatGPT and LLaVA-Mini used PyTorch's rule, which this is.
    """
    if frame.size == (side, side):
        return frame
    rows, cols = (
        np.minimum((np.arange(side, dtype=np.float32) * np.float32(length / side)).astype(int), length - 1)
        for length in (frame.height, frame.width)
    )
    return Image.fromarray(np.asarray(frame)[rows[:, None], cols])


class Frames(Planner):
    """Views of all frames in order of time; which frames those are was decided by sampling.

    Args:
        frame: Planner of one frame, `{"type": "squash", "size": 384}`.
        nearest: Squash every frame to this side by nearest neighbour first (Video-ChatGPT, LLaVA-Mini).
    """

    modality = "video"

    def __init__(self, *, frame: Mapping[str, Any], nearest: int | None = None) -> None:
        self.frame: Planner = PLANNERS.build(dict(frame))
        if self.frame.modality != "image":
            raise UserError(f"frame: needs a planner of images, {frame.get('type')!r} plans a {self.frame.modality}")
        self.nearest = nearest

    def _inner(self, size: MediaSize) -> Plan:
        height, width = (size.height, size.width) if self.nearest is None else (self.nearest, self.nearest)
        return self.frame.plan(MediaSize(1, height, width))

    def plan(self, size: MediaSize) -> Plan:
        inner = self._inner(size)
        role = {"role": "frame"} if len(inner.views) == 1 else {}
        views = [replace(view, index=index, **role) for index in range(size.depth) for view in inner.views]
        return Plan("video", size, tuple(views), inner.rows, inner.cols, inner.canvas, inner.content)

    def cut(self, item: Sequence[Image.Image], plan: Plan) -> list[np.ndarray]:
        """Views of RGB frames of one size, float32 [3, height, width] each."""
        if len(item) != plan.size.depth:
            raise ValueError(f"the plan is for {plan.size.depth} frames, there are {len(item)}")
        inner = self._inner(plan.size)
        views: list[np.ndarray] = []
        for frame in item:
            frame = frame if self.nearest is None else squash_nearest(frame, self.nearest)
            views += self.frame.cut(frame, inner)
        return views
