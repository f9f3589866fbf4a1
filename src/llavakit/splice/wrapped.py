"""Literal tokens around a block: `<im_start>` ... `<im_end>` of the first LLaVA, `<vid_start>` ... of its videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llavakit.connectors.base import Grid
from llavakit.errors import UserError, quoted
from llavakit.registry import ARRANGEMENTS
from llavakit.splice.layout import Arrangement, Run
from llavakit.views.plan import Plan


class Wrapped(Arrangement):
    """Another arrangement with token ids before and after the whole media item.

    Args:
        before, after: Ids of the language model's vocabulary; their embeddings are ordinary rows of its table.
        inner: The arrangement of the visual tokens, `{type: flat}` by default.
    """

    def __init__(
        self, *, before: Sequence[int] = (), after: Sequence[int] = (), inner: Mapping[str, Any] | None = None
    ) -> None:
        for name, ids in (("before", before), ("after", after)):
            if not isinstance(ids, (list, tuple)) or not all(type(token) is int and token >= 0 for token in ids):
                raise UserError(f"{name}: is {quoted(ids)}, it should be a list of token ids")
        if not before and not after:
            raise UserError("before, after: both are empty; give the ids that stand around a media item")
        self.inner = ARRANGEMENTS.build(dict(inner or {"type": "flat"}))
        self.before, self.after = tuple(before), tuple(after)
        self.uses_newline = self.inner.uses_newline
        self.newline_vectors = self.inner.newline_vectors
        self.literal_ids = (*self.before, *self.inner.literal_ids, *self.after)

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        return [Run(ids=self.before), *self.inner.layout(plan, grids), Run(ids=self.after)]

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        return self.inner.arrange(plan, grids, tokens, newline)
