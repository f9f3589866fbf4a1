"""Masks for decoder layers, and the masked softmax that lets gradients reach decisions.

`PolicyMask` carries decisions into an untouched transformers attention layer: it goes in as the layer's attention
mask, and where the layer would apply the mask, PyTorch's `__torch_function__` protocol hands over to the masked
softmax. Layers are therefore called whole (hooks, checkpointing, sharding and LoRA keep working).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def masked_softmax(scores: Tensor, policy: Tensor, eps: float = EPS) -> Tensor:
    """Softmax in which a key counts as much as its policy says, and every token always sees itself (paper Eq. 7).

    The maximum runs over all keys, dropped ones too, and every key, even a forbidden one, gets a floor of eps / keys.

    Args:
        scores: [batch, heads, length, length], -inf where attention is forbidden.
        policy: Weight of every key [batch, length] or [batch, length, 1].

    Returns:
        float32 probabilities [batch, heads, length, length].
    """
    length = scores.shape[-1]
    policy = policy.reshape(policy.shape[0], 1, 1, length).float()
    itself = torch.eye(length, dtype=policy.dtype, device=policy.device)
    gate = policy + (1.0 - policy) * itself
    scores = scores.float()
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * gate
    return (weights + eps / length) / (weights.sum(dim=-1, keepdim=True) + eps)


class PolicyMask(Tensor):
    """A boolean attention mask [batch or 1, 1, length, length] that carries a policy [batch, length].

    Build with `PolicyMask.of`. SDPA and eager attention apply it as a masked softmax.
    """

    policy: Tensor
    eps: float

    @classmethod
    def of(cls, allowed: Tensor, policy: Tensor, eps: float = EPS) -> PolicyMask:
        """A mask that forbids where `allowed` is False and weighs keys by `policy`."""
        mask = allowed.as_subclass(cls)
        mask.policy, mask.eps = policy, eps
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if func is Tensor.add and isinstance(args[1], cls):  # eager attention: scores + mask ...
            mask = args[1]
            return cls.of(_forbid(args[0], mask), mask.policy, mask.eps)
        if func is F.softmax:  # ... and then its softmax
            scores = args[0]
            return masked_softmax(scores.as_subclass(Tensor), scores.policy, scores.eps)
        result = super().__torch_function__(func, types, args, kwargs)
        source = next((arg for arg in args if isinstance(arg, cls)), None)
        if isinstance(result, cls) and hasattr(source, "policy"):
            result.policy, result.eps = source.policy, source.eps
        return result


def _forbid(scores: Tensor, mask: PolicyMask) -> Tensor:
    return scores.masked_fill(~mask.as_subclass(Tensor), -torch.inf)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: PolicyMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _forbid(query @ key.transpose(-1, -2) * scale, attn_mask)
    weights = masked_softmax(scores, attn_mask.policy, attn_mask.eps).to(value.dtype)
    return F.dropout(weights, dropout_p) @ value


def allowed_pairs(
    length: int,
    device: torch.device,
    valid: Tensor | None = None,
    segments: Tensor | None = None,
    visible: Tensor | None = None,
    queries: int | None = None,
) -> Tensor:
    """Which query may see which key [batch or 1, 1, queries, length]: causal, real, of one sample, not dropped.

    Every position sees itself, so that no row is empty.

    Args:
        valid: True at real tokens [batch, length].
        segments: Number of the packed sample at every position [batch, length].
        visible: False at tokens that later ones must not see [batch, length].
        queries: Number of queries, the last positions; None is all.
    """
    keys = torch.arange(length, device=device)
    first = 0 if queries is None else length - queries
    allowed = (keys <= keys[first:, None])[None, None]
    for seen in (valid, visible):
        if seen is not None:
            allowed = allowed & seen[:, None, None, :]
    if segments is not None:
        allowed = allowed & (segments[:, None, first:, None] == segments[:, None, None, :])
    return allowed | (keys == keys[first:, None])


def as_layer_mask(allowed: Tensor | None, implementation: str, dtype: torch.dtype) -> Tensor | None:
    """The mask in the form that a layer of this attention implementation takes."""
    if allowed is None or implementation == "sdpa":
        return allowed
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, lowest)
