"""Plans: which pixels of a media item go into the encoder, as pure arithmetic.

A planner knows sizes, never pixels of a network or text. `plan` needs only the size of a media item, so token counts
are known before anything is decoded; `cut` then makes the encoder inputs that the plan describes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llavakit.media.regions import Region
from llavakit.media.source import MediaSize

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class View:
    """One encoder input.

    Attributes:
        height, width: Pixels of the encoder input.
        depth: Slices or frames of a 3D encoder input; 1 for a 2D encoder.
        role: "whole" (the only or the squashed overview of an image), "tile", "frame", "clip" or "volume".
        row, col: Place in the grid of tiles.
        index: Frame or slice number inside the media item.
        encoder: Which encoder of the route sees the view, by its number in the configuration.
        regions: Boxes (left, top, right, bottom) in pixels of the view whose features the encoder pools, one vector
            per box.
    """

    height: int
    width: int
    depth: int = 1
    role: str = "whole"
    row: int = 0
    col: int = 0
    index: int = 0
    encoder: int = 0
    regions: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """How one media item is cut.

    Attributes:
        modality: "image", "video" or "volume".
        size: Size of the original media item.
        views: Encoder inputs in the order in which they are encoded.
        rows, cols: Grid of tiles; 0 x 0 if the media item is not tiled.
        canvas: (height, width) of the sheet that the views are cut from, if there is one: the resized image under the
            tiles, or the padded square before it is resized.
        content: (left, top, right, bottom) of the image on that canvas, if it is padded.
    """

    modality: str
    size: MediaSize
    views: tuple[View, ...]
    rows: int = 0
    cols: int = 0
    canvas: tuple[int, int] | None = None
    content: tuple[int, int, int, int] | None = None


class Planner(ABC):
    """Base class of planners; subclasses are registered in `llavakit.registry.PLANNERS`.

    Constructor options are keyword-only, JSON-able and saved with the checkpoint under `media.MODALITY.views` of the
    configuration.

    Attributes:
        modality: What the planner cuts.
        takes_regions: Whether plans depend on regions as well as on the size.
    """

    modality = "image"
    takes_regions = False

    @abstractmethod
    def plan(self, size: MediaSize) -> Plan:
        """The plan for a media item of this size.

        A planner with `takes_regions` has a second parameter `regions: Sequence[Region]`, what `select_regions` kept.
        """

    def fitted(self, size: MediaSize) -> MediaSize:
        """The nearest size that `plan` takes, where a media item is made up; most planners take any.

        A planner that refuses some numbers of frames overrides it.
        """
        return size

    def select_regions(self, size: MediaSize, regions: Sequence[Region], text_length: int) -> list[Region]:
        """The regions that the model is to see, in their final order; `takes_regions` only. The default keeps all.

        Args:
            text_length: Tokens of the conversation without its media, for rules that make room for long texts.
        """
        return list(regions)

    @abstractmethod
    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        """The encoder inputs of `plan.views`, normalised.

        Args:
            item: `PIL.Image.Image` for an image; sequence of them for a video; float array
                [depth, height, width] for a volume.

        Returns:
            One float32 array [channels, height, width] (or [channels, depth, height, width]) per view.
        """


__all__ = ["Box", "MediaSize", "Plan", "Planner", "View"]
