"""The connector: features of two views to the tokens of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llavakit.connectors.base import Connector, Features, Grid, Prompt
from llavakit.errors import UserError
from llavakit.views.plan import Plan


class GatedZoom(Connector):
    """overview + tanh(gate) * middle, both projected; the gate starts at 0, so training starts from the overview alone.

    Every media item must have two views with equal grids (`overview_and_middle`).
    """

    def __init__(self, *, vision_width: int, hidden_size: int, text_config: Any = None) -> None:
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        self.overview = nn.Linear(vision_width, hidden_size)
        self.middle = nn.Linear(vision_width, hidden_size)
        self.gate = nn.Parameter(torch.zeros(hidden_size))

    def init_parameters(self) -> None:
        """Called when the model is initialised, for parameters that belong to no layer."""
        nn.init.zeros_(self.gate)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        if len(grids) != 2 or grids[0] != grids[1]:
            raise UserError(f"connector 'gated_zoom' needs two views of one size, the planner gives {list(grids)}")
        return [grids[0]]

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        views = features.split()  # of every media item the overview and the middle
        tokens = [
            self.overview(overview) + torch.tanh(self.gate) * self.middle(middle)
            for overview, middle in zip(views[::2], views[1::2], strict=True)
        ]
        return Features(torch.cat(tokens), features.grids[::2], list(range(len(tokens))))
