"""How likely a decoder finds tokens, from hidden states, without the logits of all positions at a time.

With a vocabulary of 50,000 to 150,000 entries the logits of a batch, their float32 copy and their gradient are the
largest tensors of a training step. Here a chunk of positions goes through the output layer, is turned into its
gradients, and is let go; the next chunk takes its memory. The numbers are those of the plain computation.

Two functions share that:

- `cross_entropy` has one number as its result. The gradient of every logit is known at once but for that number's own,
  so the gradients of hidden states and weights are made in the forward pass: three matrix products, as always.
- `token_logps` gives a number per token, whose gradients are known in the backward pass only: chunks are computed again
  there, unless the output layer is frozen.

On a GPU `cross_entropy` is Liger's fused kernel if that package is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from llavakit.language.head import Head

CHUNK = {"cpu": 1 << 26, "cuda": 1 << 28}  # bytes of float32 logits in memory at a time


class Likelihood(NamedTuple):
    """Of tokens, one after another.

    Attributes:
        logps: Log-probabilities [targets], float32 (float64 if the hidden states are).
        likeliest: The likeliest token at every place [targets], without gradient; None if nobody asked for it.
    """

    logps: Tensor
    likeliest: Tensor | None = None


def cross_entropy(head: nn.Module, hidden: Tensor, ids: Tensor, factors: Tensor | None = None) -> Tensor:
    """The sum of the cross entropies of tokens, one number.

    Args:
        head: The output layer, hidden states to logits.
        hidden: What predicts every token [targets, hidden].
        ids: The tokens [targets].
        factors: Of each cross entropy [targets], without gradient; default: 1.
    """
    if not _plain(head):
        logps = token_logps(head, hidden, ids).logps
        return -(logps if factors is None else logps * factors).sum()
    if factors is None and head.scale == 1 and hidden.is_cuda and _liger() is not None:
        return _by_liger(head, hidden, ids)
    return _CrossEntropy.apply(hidden, head.weight, head.bias, ids, factors, head.scale, head.cap)


def token_logps(head: nn.Module, hidden: Tensor, ids: Tensor, *, likeliest: bool = False) -> Likelihood:
    """Log-probabilities of tokens.

    Args:
        head: The output layer, hidden states to logits.
        hidden: What predicts every token [targets, hidden].
        ids: The tokens [targets].
        likeliest: Whether the likeliest tokens are wanted too.
    """
    if _plain(head):
        logps, best = _TokenLogps.apply(hidden, head.weight, head.bias, ids, head.scale, head.cap, likeliest)
        return Likelihood(logps, best if likeliest else None)
    parts = []  # adapters, quantised weights: the layer's own forward, also for no token, which gives a graph
    for place in list(_chunks(hidden, head.out_features)) or [slice(0, 0)]:
        parts.append(checkpoint(_through, head, hidden[place], ids[place], use_reentrant=False))
    logps, best = map(torch.cat, zip(*parts, strict=True))
    return Likelihood(logps, best if likeliest else None)


@functools.cache
def _liger() -> Any:
    """Liger's fused loss if it is installed and keeps the weights' gradient in float32, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Liger

    return Liger if "accum_dtype" in inspect.signature(Liger).parameters else None


def _by_liger(head: Head, hidden: Tensor, ids: Tensor) -> Tensor:
    layer = _Layer(hidden, head.weight, head.bias, head.scale, head.cap)
    return _liger()(reduction="sum", softcap=head.cap, accum_dtype=torch.float32)(
        layer.weight, hidden.to(layer.dtype), ids, layer.bias
    )


def _through(head: nn.Module, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = _wide(head(hidden))
    return -F.cross_entropy(logits, ids, reduction="none"), logits.detach().argmax(-1)


def _plain(head: nn.Module) -> bool:
    """Whether the output layer is nothing but its weights, so that its forward need not be called."""
    return type(head) is Head and type(head.weight) in (nn.Parameter, Tensor) and not head._forward_hooks


def _chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    """Stretches of positions whose logits are about as large as allowed."""
    rows = max(CHUNK.get(hidden.device.type, CHUNK["cuda"]) // (4 * vocabulary), 1)
    parts = -(-len(hidden) // rows)
    size = -(-len(hidden) // max(parts, 1))  # equally long ones
    return (slice(begin, min(begin + size, len(hidden))) for begin in range(0, len(hidden), max(size, 1)))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _Layer:
    """The output layer in the precision that autocast asks for."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> None:
        kind = hidden.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.scale, self.cap = scale, cap

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [positions, vocabulary] in float32, nobody else's memory."""
        logits = _wide(F.linear(hidden.to(self.dtype), self.weight, self.bias))
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def gradient(self, logits: Tensor, totals: Tensor, ids: Tensor, factors: Tensor | None) -> Tensor:
        """Gradient of the sum of factors x log-probabilities with respect to what the matrix product gives.

        Args:
            logits: Of `logits`; overwritten.
            totals: Their logsumexp [positions].
        """
        slope = None if self.cap is None else 1 - (logits / self.cap).square_()
        gradient = logits.sub_(totals[:, None]).exp_().neg_()
        gradient[torch.arange(len(ids), device=ids.device), ids] += 1
        if factors is not None:
            gradient.mul_(factors[:, None])
        if slope is not None:
            gradient.mul_(slope)
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


class _Gradients:
    """Gradients of hidden states, weight and bias, filled chunk by chunk; those that nobody needs are None."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> None:
        like = (hidden, weight, bias)
        kinds = [None if tensor is None else tensor.dtype for tensor in like]
        wide = [kinds[0], *(torch.float64 if kind == torch.float64 else torch.float32 for kind in kinds[1:])]
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=dtype) if need and tensor is not None else None
            for tensor, dtype, need in zip(like, wide, needs, strict=True)
        )
        self.kinds = kinds

    def add(self, place: slice, hidden: Tensor, gradient: Tensor, layer: _Layer) -> None:
        """Those of a chunk, from its logits' gradient."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(layer.dtype)
        if self.hidden is not None:
            self.hidden[place] = gradient @ layer.weight
        if self.weight is not None:
            if self.weight.dtype == layer.dtype:
                self.weight.addmm_(gradient.T, hidden.to(layer.dtype))
            else:
                self.weight += gradient.T @ hidden.to(layer.dtype)

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the precision of what they are gradients of."""
        made = (self.hidden, self.weight, self.bias)
        return tuple(None if own is None else own.to(kind) for own, kind in zip(made, self.kinds, strict=True))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        factors: Tensor | None,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        layer = _Layer(hidden, weight, bias, scale, cap)
        gradients = _Gradients(hidden, weight, bias, needs)
        total = torch.zeros((), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for place in _chunks(hidden, len(weight)):
                logits, own = layer.logits(hidden[place]), ids[place]
                each = None if factors is None else factors[place]
                totals = logits.logsumexp(-1)
                losses = totals - logits.gather(-1, own[:, None]).squeeze(-1)
                total += (losses if each is None else losses * each).sum()
                if any(needs):
                    gradients.add(place, hidden[place], layer.gradient(logits, totals, own, each), layer)
        ctx.save_for_backward(*gradients.all())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        # in place: another table of the vocabulary's size would be needed otherwise
        found = [None if own is None else own.mul_(-upstream) for own in ctx.saved_tensors]
        return (*found, None, None, None, None)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        scale: float,
        cap: float | None,
        likeliest: bool,
    ) -> tuple[Tensor, Tensor]:
        layer = _Layer(hidden, weight, bias, scale, cap)
        ctx.at_once = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        gradients = _Gradients(hidden, weight, bias, (ctx.at_once, False, False))
        logps = torch.empty(len(ids), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        totals, best = torch.empty_like(logps), torch.empty_like(ids) if likeliest else ids[:0]
        with torch.autocast(hidden.device.type, enabled=False):
            for place in _chunks(hidden, len(weight)):
                logits, own = layer.logits(hidden[place]), ids[place]
                totals[place] = logits.logsumexp(-1)
                logps[place] = logits.gather(-1, own[:, None]).squeeze(-1) - totals[place]
                if likeliest:
                    best[place] = logits.argmax(-1)
                if ctx.at_once:
                    gradients.add(place, hidden[place], layer.gradient(logits, totals[place], own, None), layer)
        if ctx.at_once:
            ctx.save_for_backward(gradients.hidden)
        else:
            ctx.save_for_backward(hidden, weight, bias, ids, totals)
            ctx.shape = (scale, cap, layer.dtype)
        ctx.mark_non_differentiable(best)
        return logps, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.at_once:
            (gradient,) = ctx.saved_tensors
            return (gradient * upstream[:, None].to(gradient.dtype), *(None,) * 6)
        hidden, weight, bias, ids, totals = ctx.saved_tensors
        scale, cap, dtype = ctx.shape
        with torch.autocast(hidden.device.type, dtype=dtype, enabled=dtype != weight.dtype):
            layer = _Layer(hidden, weight, bias, scale, cap)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for place in _chunks(hidden, len(weight)):
            logits = layer.logits(hidden[place])
            gradient = layer.gradient(logits, totals[place], ids[place], upstream[place])
            gradients.add(place, hidden[place], gradient, layer)
        return (*gradients.all(), *(None,) * 4)
