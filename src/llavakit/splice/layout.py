"""Arrangements: how the visual tokens of one media item are laid out in the prompt.

An arrangement is chosen by name in the configuration (`media.KIND.arrange`). It knows two things about a plan: the
layout as arithmetic (for the processor, which writes the placeholder ids) and the same layout as tensors (for the
model, which fills them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llavakit.connectors.base import Grid, tokens_in
from llavakit.views.plan import Plan


class Run(NamedTuple):
    """A stretch of the layout: `visual` positions to fill, or literal token ids written between them."""

    visual: int = 0
    ids: tuple[int, ...] = ()


class Arrangement:
    """Base class; subclasses are registered in `llavakit.registry.ARRANGEMENTS`.

    Attributes:
        uses_newline: Whether the model must own a learned `image_newline` vector.
        newline_vectors: How many: one that ends rows, or a second one that ends frames.
        literal_ids: Token ids that layouts may write between visual positions.
    """

    uses_newline = False
    newline_vectors = 1
    literal_ids: tuple[int, ...] = ()

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        """The layout of one media item whose connector output has the grids `grids`."""
        raise NotImplementedError(f"{type(self).__name__} must define layout")

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        """The vectors of all visual positions in order, [visual tokens, hidden].

        Args:
            tokens: One tensor [tokens, hidden] per grid.
            newline: The learned separator [hidden], or several [newline_vectors, hidden], if `uses_newline`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define arrange")


class Flat(Arrangement):
    """All tokens of all views one after another (LLaVA-1.5)."""

    def layout(self, plan: Plan, grids: Sequence[Grid]) -> list[Run]:
        return [Run(visual=sum(tokens_in(grid) for grid in grids))]

    def arrange(
        self, plan: Plan, grids: Sequence[Grid], tokens: Sequence[Tensor], newline: Tensor | None = None
    ) -> Tensor:
        return tokens[0] if len(tokens) == 1 else torch.cat(list(tokens))
