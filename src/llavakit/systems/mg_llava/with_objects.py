"""Object tokens beside any other way of reading a picture: tiles of LLaVA-OneVision and the object tokens of MG-LLaVA.

    extra_encoders: {detail_encoder: {layer: -1, config: {model_type: convnext_pyramid, ...}}}
    connector: {type: with_objects, inner: {type: mlp}, encoder: [vision_tower, detail_encoder]}
    media:
      image:
        views: {type: with_objects, views: {type: anyres, ...}, size: 768}
        arrange: {type: then_objects, inner: {type: spatial_unpad}}

The inner planner, connector and arrangement work as without objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavakit.connectors.base import Connector, Features, Grid, Prompt
from llavakit.errors import UserError
from llavakit.media.regions import Region
from llavakit.registry import ARRANGEMENTS, CONNECTORS, PLANNERS
from llavakit.splice.layout import Arrangement, Run
from llavakit.systems.mg_llava.connector import ObjectProjector
from llavakit.systems.mg_llava.views import HIGH, LOW, LowAndHigh
from llavakit.views.plan import MediaSize, Plan


class WithObjects(LowAndHigh):
    """The views of another planner, and behind them a high view with boxes for the second encoder.

    Args:
        views: The other planner and its options.
        options: Of the high view and its boxes, see `LowAndHigh`.
    """

    def __init__(self, *, views: Mapping[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.inner = PLANNERS.build(views)
        if self.inner.takes_regions or self.inner.modality != "image":
            raise UserError(f"views: {views.get('type')!r} cuts no pictures, or shows boxes itself")

    def plan(self, size: MediaSize, regions: Sequence[Region] = ()) -> Plan:
        inner, (_, high) = self.inner.plan(size), super().plan(size, regions).views
        return replace(inner, views=(*inner.views, high))

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        (high,) = self.frame.cut(item, self.frame.plan(plan.size))
        return [*self.inner.cut(item, self.inner.plan(plan.size)), high]


class ConnectorWithObjects(Connector):
    """Another connector on the views of the first encoder, then one token per region of the second one's view.

    Args:
        inner: The other connector, `{type: mlp}` by default.
        levels, level_width: See `ObjectProjector`.
    """

    encoders = 2

    def __init__(
        self,
        *,
        vision_width: tuple[int, int],
        region_width: tuple[int, int],
        hidden_size: int,
        text_config: Any = None,
        inner: Mapping[str, Any] | None = None,
        levels: Sequence[int] | None = None,
        level_width: int = 1024,
    ) -> None:
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        given = {"vision_width": vision_width[LOW], "hidden_size": hidden_size, "text_config": text_config}
        self.inner = CONNECTORS.build(dict(inner or {"type": "mlp"}), **given)
        if self.inner.encoders != 1 or self.inner.needs_prompt:
            raise UserError("connector 'with_objects': inner must read one encoder and no prompt")
        self.objects = ObjectProjector(region_width[HIGH], hidden_size, levels, level_width)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        inner = dict(options.get("inner") or {"type": "mlp"})
        low = [grid for view, grid in zip(plan.views, grids, strict=True) if view.encoder == LOW]
        high = [view for view in plan.views if view.encoder == HIGH]
        if len(high) != 1 or not high[0].regions:
            raise UserError("connector 'with_objects' reads one view with boxes; use the planner 'with_objects'")
        own = CONNECTORS.get(inner["type"]).token_grids(inner, without_objects(plan), low)
        return [*own, (1, 1, len(high[0].regions))]

    def forward(
        self, features: tuple[Features, Features], plans: Sequence[Plan], prompt: Prompt | None = None
    ) -> Features:
        low, high = features
        tokens = self.inner(low, [without_objects(plan) for plan in plans])
        split, parts, grids, media_index = tokens.split(), {}, [], []
        for number, entries in enumerate(tokens.by_media(len(plans))):
            objects = self.objects(high.regions[number])
            for own, grid in [*((split[n], tokens.grids[n]) for n in entries), (objects, (1, 1, len(objects)))]:
                parts[len(grids)] = own
                grids.append(grid)
                media_index.append(number)
        return Features.join(parts, grids, media_index)


class ThenObjects(Arrangement):
    """Another arrangement, and the object tokens behind it.

    Args:
        inner: The other arrangement, `{type: flat}` by default.
    """

    def __init__(self, *, inner: Mapping[str, Any] | None = None) -> None:
        self.inner = ARRANGEMENTS.build(dict(inner or {"type": "flat"}))
        self.uses_newline, self.newline_vectors = self.inner.uses_newline, self.inner.newline_vectors
        self.literal_ids = self.inner.literal_ids

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        *own, objects = grids
        return [*self.inner.layout(without_objects(plan), own), Run(visual=objects[2])]

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        own = self.inner.arrange(without_objects(plan), grids[:-1], tokens[:-1], newline)
        return torch.cat([own, tokens[-1]])


def without_objects(plan: Plan) -> Plan:
    """The plan of the first encoder's views alone."""
    return replace(plan, views=tuple(view for view in plan.views if view.encoder == LOW))
