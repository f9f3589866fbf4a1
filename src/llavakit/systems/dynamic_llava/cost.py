"""What Dynamic-LLaVA saves at published dimensions: counted, and by the paper's own formula."""

from __future__ import annotations


def paper_flops(layers: int, hidden: int, tokens_before: int, tokens_after: int, full_layers: int) -> int:
    """FLOPs by the paper's Eq. 13: 32 N C^2 + 4 N^2 C per layer, which assumes a feed-forward width of 4 C."""

    def layer(tokens: int) -> int:
        return 32 * tokens * hidden**2 + 4 * tokens**2 * hidden

    return full_layers * layer(tokens_before) + (layers - full_layers) * layer(tokens_after)
