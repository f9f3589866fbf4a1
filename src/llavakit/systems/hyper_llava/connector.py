"""The visual expert: LLaVA-1.5's two-layer MLP and, beside it, adapters generated from the view that is projected.

Paper equation 6. `L1` is the first linear layer with its GELU, `L2` the second:

    first    L2(L1 f + E1 f)
    second   L2(L1 f) + E2(L1 f)
    both     L2(L1 f + E1 f) + E2(L1 f)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llavakit.connectors.base import Features, Prompt
from llavakit.connectors.general import MLP
from llavakit.errors import UserError
from llavakit.systems.hyper_llava.experts import GATED, ExpertShape, GeneratedExpert, check_options
from llavakit.views.plan import Plan

VARIANTS = ("first", "second", "both")


class VisualExpertMLP(MLP):
    """The MLP with visual experts. Every view has its own guidance, the mean of its tokens.

    Args:
        variant: Where experts are: "first" (published), "second" or "both".
        embed_dim, hyper_hidden, bottleneck, activation: See `experts`.
        act, bias: See `MLP`.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        hidden_size: int,
        text_config: Any = None,
        variant: str = "first",
        embed_dim: int = 64,
        hyper_hidden: int = 64,
        bottleneck: int = 16,
        activation: str = GATED,
        act: str = "gelu",
        bias: bool = True,
    ) -> None:
        if variant not in VARIANTS:
            raise UserError(f"connector.variant is {variant!r}, it must be first, second or both")
        sizes = {"embed_dim": embed_dim, "hyper_hidden": hyper_hidden}
        check_options("connector", **sizes, bottleneck=bottleneck, activation=activation)
        super().__init__(vision_width=vision_width, hidden_size=hidden_size, depth=2, act=act, bias=bias)

        def expert(d_in: int) -> GeneratedExpert:
            shape = ExpertShape(d_in, hidden_size, bottleneck, activation)
            return GeneratedExpert(shape, guidance_dim=vision_width, **sizes)

        self.expert_1 = expert(vision_width) if variant != "second" else None
        self.expert_2 = expert(hidden_size) if variant != "first" else None

    def project_views(self, tokens: Tensor) -> Tensor:
        """Tokens of views of one size, [views, tokens, vision_width] to [views, tokens, hidden_size]."""
        guidance = tokens.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        inner = self.act(self.linear_1(tokens))
        first = inner if self.expert_1 is None else inner + self.expert_1(guidance, tokens)
        out = self.linear_2(first)
        return out if self.expert_2 is None else out + self.expert_2(guidance, inner)

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        projected: dict[int, Tensor] = {}
        for entries, tokens, _ in features.groups():
            projected |= dict(zip(entries, self.project_views(tokens), strict=True))
        return Features.join(projected, features.grids, features.media_index)
