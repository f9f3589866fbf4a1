"""The two small networks that score tokens: one looks at all image tokens together, one at each text token alone.

Both return logits [..., 2] with channel 0 = keep and channel 1 = drop (the code's order, which checkpoints follow; the
paper names it the other way round). Parameter names are the published ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over all tokens, packed projections without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block without positions: permuting tokens permutes its output."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ImagePredictor(nn.Module):
    """Scores image tokens by themselves and by what the whole image holds (paper section 3.2).

    Args:
        input_dim: Width of the decoder.
        d_model: Inner width; half of it stays local, half is averaged over the image.
        nhead: Attention heads.
        dim_feedforward: Inner width of the blocks' MLP.
        num_layers: Number of blocks.
    """

    def __init__(
        self, input_dim: int, d_model: int = 512, nhead: int = 8, dim_feedforward: int = 2048, num_layers: int = 2
    ) -> None:
        super().__init__()
        self.down_mlp = nn.Sequential(nn.LayerNorm(input_dim), nn.Linear(input_dim, d_model), nn.GELU())
        self.transformer = nn.Sequential(*(Block(d_model, nhead, dim_feedforward) for _ in range(num_layers)))
        self.output_mlp = nn.Sequential(
            nn.Linear(d_model, d_model // 2),
            nn.GELU(),
            nn.Linear(d_model // 2, d_model // 4),
            nn.GELU(),
            nn.Linear(d_model // 4, 2),
        )

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Logits [images, tokens, 2].

        Args:
            x: Hidden states of image tokens [images, tokens, input_dim].
            policy: Weight of every token [images, tokens, 1]; None is all ones, as in every published run.
        """
        x = self.down_mlp(x)
        if policy is None:
            policy = x.new_ones(1, x.shape[1], 1)
        policy = policy.to(x.dtype)
        local, shared = self.transformer(x * policy).chunk(2, dim=-1)
        shared = (shared * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True)
        return self.output_mlp(torch.cat([local, shared.expand_as(local)], dim=-1))


class TextPredictor(nn.Module):
    """Scores every text token from its own hidden state.

    Args:
        input_dim: Width of the decoder.
        d_model: Width of the first inner layer.
    """

    def __init__(self, input_dim: int, d_model: int = 512) -> None:
        super().__init__()
        self.output_mlp = nn.Sequential(
            nn.LayerNorm(input_dim),
            nn.Linear(input_dim, d_model),
            nn.GELU(),
            nn.Linear(d_model, d_model // 2),
            nn.GELU(),
            nn.Linear(d_model // 2, d_model // 4),
            nn.GELU(),
            nn.Linear(d_model // 4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., 2] of hidden states [..., input_dim]."""
        return self.output_mlp(x)
