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


def pool(frames: Tensor, slots: int | None = SLOTS) -> Tensor:
    """Temporal and spatial averages of a clip, [max(frames, slots) + patches, width], in at least float32.

    First the mean over the patches of every frame, followed by rows of zeros up to `slots`; then the mean over the
    frames of every patch. More frames than slots are all kept.

    Args:
        frames: [frames, patches, width], at least one frame.
        slots: Rows of the temporal part; None for as many as there are frames.
    """
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    temporal, spatial = wide.mean(1), wide.mean(0)
    blank = temporal.new_zeros(max((slots or 0) - len(temporal), 0), temporal.shape[-1])
    return torch.cat([temporal, blank, spatial])


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

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        parts, tokens, grids = features.split(), [], []
        for own in features.by_media(len(plans)):
            depths = [features.grids[entry][0] for entry in own]
            frames = torch.cat(
                [parts[entry].unflatten(0, (depth, -1)) for entry, depth in zip(own, depths, strict=True)]
            )
            tokens.append(pool(frames, self.slots))
            temporal = len(tokens[-1]) - frames.shape[1]
            grids += [(temporal, 1, 1), (1, *features.grids[own[0]][1:])]
        values = torch.cat(tokens)
        if self.precision is not None:
            values = values.to(PRECISIONS[self.precision])
        index = [number for number in range(len(plans)) for _ in range(2)]
        return Features(self.project(values.to(features.values.dtype)), grids, index)


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
