"""Spatio-temporal pooling: one token per frame and one per patch, then the MLP (Video-ChatGPT section 3.1).

What it calls frames may be the frames of a video, the slices of a volume, or the layers of a 3D encoder's grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llavakit.connectors.base import Features, Grid, Prompt
from llavakit.connectors.general import MLP
from llavakit.errors import UserError, quoted
from llavakit.views.plan import Plan

SLOTS = 100
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def averages(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the patches of every frame [frames, width] and over the frames of every patch [patches, width].

    Args:
        frames: [frames, patches, width], at least one frame; the means are in at least float32.
    """
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    return wide.mean(1), wide.mean(0)


def joined(temporal: Tensor, spatial: Tensor, slots: int | None) -> Tensor:
    """Averages as one sequence [max(frames, slots) + patches, width]: frames, zeros up to `slots`, patches.

    More frames than slots are all kept.
    """
    blank = temporal.new_zeros(max((slots or 0) - len(temporal), 0), temporal.shape[-1])
    return torch.cat([temporal, blank, spatial])


def pool(frames: Tensor, slots: int | None = SLOTS) -> Tensor:
    """Temporal and spatial averages of a clip [frames, patches, width] as one sequence, see `joined`.

    Args:
        slots: Rows of the temporal part; None for as many as there are frames.
    """
    return joined(*averages(frames), slots)


class SpatioTemporal(MLP):
    """A media item as its temporal and spatial averages, then the MLP: slots + patches tokens whatever the length.

    Slots that no frame fills are rows of zeros, which the MLP maps to its bias.

    Args:
        slots: Most frames, and rows of the temporal part; None for as many rows as there are frames, without zeros.
        precision: Type that the averages are rounded to: "float16" as published, "bfloat16" or "float32"; None leaves
            them in the type of the weights.
        depth: Linear layers, see `MLP`; the published connector has one.
        options: See `MLP`.
    """

    reduces = True

    def __init__(
        self, *, slots: int | None = SLOTS, precision: str | None = "float16", depth: int = 1, **options: Any
    ) -> None:
        super().__init__(depth=depth, **options)
        if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int) or slots < 1):
            raise UserError(f"slots: must be a positive number or null, not {quoted(slots)}")
        if precision is not None and precision not in PRECISIONS:
            raise UserError(f"precision: must be one of {', '.join(PRECISIONS)} or null, not {quoted(precision)}")
        self.slots, self.precision = slots, precision

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        slots, frames = options.get("slots", SLOTS), _frames(plan, grids)
        if slots is not None and frames > slots:
            raise UserError(
                f"connector 'spatio_temporal' has {slots} slots, the {plan.modality} has {frames} frames; sample "
                "fewer, or give it more slots"
            )
        return [(slots or frames, 1, 1), (1, *grids[0][1:])]

    @classmethod
    def reduced_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        return [(_frames(plan, grids), 1, 1), (1, *grids[0][1:])]

    def reduce(self, features: Features, plans: Sequence[Plan]) -> Features:
        """Averages of every media item: one entry for its frames, one for its patches."""
        parts, values, grids = features.split(), [], []
        for own in features.by_media(len(plans)):
            depths = [features.grids[entry][0] for entry in own]
            frames = [parts[entry].unflatten(0, (depth, -1)) for entry, depth in zip(own, depths, strict=True)]
            values += averages(torch.cat(frames))
            grids += [(sum(depths), 1, 1), (1, *features.grids[own[0]][1:])]
        index = [number for number in range(len(plans)) for _ in range(2)]
        return Features(torch.cat(values), grids, index, reduced=True)

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        reduced = features if features.reduced else self.reduce(features, plans)
        parts = reduced.split()
        tokens = [joined(parts[t], parts[s], self.slots) for t, s in reduced.by_media(len(plans))]
        grids = list(reduced.grids)
        for number, own in enumerate(tokens):
            grids[2 * number] = (len(own) - len(parts[2 * number + 1]), 1, 1)
        values = torch.cat(tokens)
        if self.precision is not None:
            values = values.to(PRECISIONS[self.precision])
        return Features(self.project(values.to(features.values.dtype)), grids, reduced.media_index)


def _frames(plan: Plan, grids: Sequence[Grid]) -> int:
    """Frames of a media item whose views have these grids.

    Raises:
        UserError: If a frame has several views, or views differ.
    """
    if len({view.index for view in plan.views}) < len(plan.views):
        raise UserError(
            "connector 'spatio_temporal' reads one view of every frame, the planner cuts frames into several; "
            "use a planner without tiles"
        )
    if len({grid[1:] for grid in grids}) != 1:
        raise UserError("connector 'spatio_temporal' reads views of one size, the planner gives several")
    return sum(grid[0] for grid in grids)
