"""From scores to decisions: sampled with gradients in training, hard at inference, and the price of wrong rates.

Pure functions on logits and masks; where tokens sit in a prompt is the business of `roles` and `adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gumbel_noise(logits: Tensor) -> Tensor:
    """Standard Gumbel noise like `logits`, float32."""
    return -torch.empty_like(logits, dtype=torch.float32).exponential_().log()


def gumbel_keep(logits: Tensor, tau: float, noise: Tensor | None = None) -> Tensor:
    """Sampled keep decisions with straight-through gradients [...], 1 = keep.

    Args:
        logits: [..., 2].
        tau: Temperature.
        noise: Gumbel noise [..., 2]; drawn if None.
    """
    noise = gumbel_noise(logits) if noise is None else noise
    soft = ((logits.float().log_softmax(-1) + noise.float()) / tau).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (hard - soft.detach() + soft)[..., 0]


def top_keep(logits: Tensor, rate: float) -> Tensor:
    """The `int(tokens * rate)` best image tokens, ascending [images, kept].

    Ranked by the difference of the logits: the log-probability that the original ranks saturates at 0 and ties.

    Args:
        logits: [images, tokens, 2].
    """
    count = int(logits.shape[1] * rate)
    margin = (logits[..., 0] - logits[..., 1]).float()
    return margin.topk(count, dim=-1).indices.sort(dim=-1).values


def threshold_keep(logits: Tensor) -> Tensor:
    """True where keep scores strictly above drop [...]; for logits [..., 2]."""
    return logits[..., 0] > logits[..., 1]


def temperature(start: float, end: float, step: float, max_steps: float) -> float:
    """Gumbel temperature at the beginning of an optimiser step: exponential from `start` to `end`."""
    return start * (end / start) ** (step / max_steps)


def rate_penalty(masks: Sequence[Tensor], rate: float, shortest: int = 0, count: int | None = None) -> Tensor:
    """Mean squared distance of the kept fraction from `rate`; samples shorter than `shortest` count as zero.

    Args:
        masks: One mask [tokens] per sample.
        count: Number of samples in the mean, if more than there are masks.
    """
    terms = [(rate - mask.float().mean()) ** 2 for mask in masks if len(mask) and len(mask) >= shortest]
    total = torch.stack(terms).sum() if terms else torch.zeros(())
    return total / max(len(masks) if count is None else count, 1)
