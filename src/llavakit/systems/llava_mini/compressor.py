"""Query compression: learned queries look at all features of an image and bring back a few vectors (section 3.2).

Works on the encoder's raw features, in front of the projector, as the released checkpoint does; the paper's formula
compresses projected ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from llavakit.connectors.general import sincos_table


def resized_table(table: Tensor, side: int, rows: int, cols: int) -> Tensor:
    """A side x side table of positions [side x side, width] for rows x cols features, [rows x cols, width].

    Bicubic in float32, without antialiasing; a table that fits already comes back as it is. The table of one query
    becomes the same vector everywhere: such a compressor knows no positions.
    """
    if (rows, cols) == (side, side):
        return table
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=(rows, cols), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class Compressor(nn.Module):
    """One cross-attention without residual, output norm or MLP.

    Args:
        width: Channels of the features.
        side: The queries are side x side.
        heads: Attention heads.
        kv_width: Channels of the features, if they are to be brought to `width` first.
    """

    def __init__(self, width: int, side: int = 1, heads: int = 8, kv_width: int | None = None) -> None:
        super().__init__()
        self.width, self.side = width, side
        # never trained, but published checkpoints hold it
        self.register_buffer("pos_embed", sincos_table(side, side, width))
        self.query = nn.Parameter(torch.randn(side * side, width) * 0.02)
        same = kv_width in (None, width)
        self.kv_proj = nn.Identity() if same else nn.Linear(kv_width, width, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    @torch.no_grad()
    def init_parameters(self) -> None:
        """What `LlavakitPreTrainedModel` calls for parameters that no file gives."""
        init.normal_(self.query, std=0.02)
        init.copy_(self.pos_embed, sincos_table(self.side, self.side, self.width))

    def forward(self, features: Tensor, rows: int, cols: int, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compress images of one size.

        Args:
            features: [images, rows x cols, kv_width].
            weights: Whether the attention weights are wanted too.

        Returns:
            [images, side x side, width]; weights averaged over heads [images, side x side, rows x cols] or None.
        """
        values = self.ln_kv(self.kv_proj(features))
        keys = values + resized_table(self.pos_embed, self.side, rows, cols)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(features), -1, -1)
        return self.attn(queries, keys, values, need_weights=weights)
