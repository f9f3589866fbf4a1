"""The prefix mapper of a captioner (Med-XPT): one picture vector to a prefix of token embeddings.

Med-XPT is named in the paper and published nowhere. What it says - a transformer between MedCLIP's encoder and GPT-2 -
is what ClipCap's `TransformerMapper` is (rmokady/CLIP_prefix_caption, MIT), which this connector follows; it is a
stand-in, not the authors' module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from llavakit.connectors.base import Connector, Features, Grid, Prompt, check_heads
from llavakit.errors import UserError
from llavakit.views.plan import Plan


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_queries = nn.Linear(width, width, bias=bias)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=bias)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.to_queries(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = self.to_keys_values(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        return self.project(mixed.transpose(1, 2).flatten(2))


class _Feedforward(nn.Module):
    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(width, inner), nn.Linear(inner, width), ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, inner: int, bias: bool, act: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = _Attention(width, heads, bias), _Feedforward(width, inner, act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Transformer(nn.Module):
    def __init__(self, layers: Sequence[_Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PrefixMapper(Connector):
    """Every feature of a view becomes `clip_length` vectors; with learned ones behind them they run through a small
    transformer, and what comes out at the learned ones is the prefix.

    Args:
        prefix_length: Tokens of the prefix (learned vectors).
        clip_length: Vectors that a feature is spread over.
        num_layers, heads: Of the transformer.
        mlp_ratio: Inner width of a layer over its width.
        qkv_bias: Whether queries, keys and values have a bias.
        act: Activation.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        hidden_size: int,
        text_config: Any = None,
        prefix_length: int = 10,
        clip_length: int = 10,
        num_layers: int = 8,
        heads: int = 8,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = False,
        act: str = "relu",
    ) -> None:
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        check_heads("prefix_mapper", hidden_size, heads)
        if act not in ACT2FN:
            raise UserError(f"connector 'prefix_mapper': act {act!r} is no activation of transformers")
        self.clip_length = clip_length
        self.linear = nn.Linear(vision_width, clip_length * hidden_size)
        self.prefix_const = nn.Parameter(torch.empty(prefix_length, hidden_size))
        inner = int(hidden_size * mlp_ratio)
        self.transformer = _Transformer([_Layer(hidden_size, heads, inner, qkv_bias, act) for _ in range(num_layers)])
        self.init_parameters()

    def init_parameters(self) -> None:
        """Learned vectors from a standard normal distribution, as the original draws them."""
        init.normal_(self.prefix_const)

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        return [(1, 1, options.get("prefix_length", 10)) for _ in grids]

    def forward(self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None) -> Features:
        length, width = self.prefix_const.shape
        found: dict[int, Tensor] = {}
        for entries, tokens, _ in features.groups():
            spread = (
                self.linear(tokens).flatten(1).unflatten(1, (-1, width))
            )  # [entries, features x clip_length, width]
            constant = self.prefix_const.expand(len(spread), -1, -1)
            mixed = self.transformer(torch.cat([spread, constant], dim=1))
            found |= dict(zip(entries, mixed[:, -length:], strict=True))
        return Features.join(found, [(1, 1, length)] * len(features.grids), features.media_index)
