"""The spatial schema: words between slices tell the language model where they lie (LLaVA-UHD section 3.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llavakit.connectors.base import Grid, tokens_in
from llavakit.splice.layout import Arrangement, Run
from llavakit.views.plan import Plan


class SpatialSchema(Arrangement):
    """Slices with a comma between neighbours and a line break after every row, then the overview.

    Args:
        column_separator: Id of the token between slices of a row; 29892 is "," of Llama's tokenizer.
        row_separator: Id of the token after every row, the last one included; 13 is a line break of Llama's.
    """

    def __init__(self, *, column_separator: int = 29892, row_separator: int = 13) -> None:
        self.column_separator, self.row_separator = column_separator, row_separator
        self.literal_ids = (column_separator, row_separator)

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        runs = []
        for view, grid in zip(plan.views, grids, strict=True):
            runs.append(Run(visual=tokens_in(grid)))
            if view.role == "tile":
                last = view.col == plan.cols - 1
                runs.append(Run(ids=(self.row_separator if last else self.column_separator,)))
        return runs

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        return torch.cat(list(tokens))
