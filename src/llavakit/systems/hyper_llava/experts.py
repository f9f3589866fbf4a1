"""Experts: bottleneck adapters whose weights a hypernetwork generates from a guidance vector.

    guidance ─▶ RMS ─▶ A, a ─▶ e ─▶ W1, B1 ─▶ W2, B2 ─▶ + b ─▶ (W_down, W_up) ─▶ E(x) = W_up φ(W_down x)

Paper equations 3 to 5. `A`, `a` and `b` belong to one expert, the hypernetwork (`W1`, `B1`, `W2`, `B2`) may be shared
by several. Weights are generated in float32 at least, whatever the model computes in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from llavakit.errors import UserError

RMS_EPS = 1e-6
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
GATED = "swiglu"


@dataclass(frozen=True)
class ExpertShape:
    """The shape of one generated expert.

    Args:
        d_in, d_out: Widths of what it reads and gives.
        bottleneck: Width in the middle.
        activation: "swiglu" (twice the rows in `W_down`, one half gates the other), "silu" or "gelu" (exact).
    """

    d_in: int
    d_out: int
    bottleneck: int = 16
    activation: str = GATED

    @property
    def down_rows(self) -> int:
        """Rows of `W_down`."""
        return self.bottleneck * (2 if self.activation == GATED else 1)

    @property
    def down_size(self) -> int:
        """Numbers of `W_down`, which come first."""
        return self.down_rows * self.d_in

    @property
    def size(self) -> int:
        """Numbers that are generated."""
        return self.down_size + self.d_out * self.bottleneck

    def split(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`W_down` [sets, rows, d_in] and `W_up` [sets, d_out, bottleneck] of generated numbers [sets, size]."""
        down = weights[:, : self.down_size].unflatten(1, (self.down_rows, self.d_in))
        up = weights[:, self.down_size :].unflatten(1, (self.d_out, self.bottleneck))
        return down, up

    def apply(self, x: Tensor, weights: Tensor) -> Tensor:
        """The expert's output [sets, tokens, d_out] for `x` [sets, tokens, d_in], each set with its own weights.

        Args:
            weights: [sets, size].
        """
        down, up = self.split(weights.to(x.dtype))
        inner = torch.bmm(x, down.transpose(1, 2))
        if self.activation == GATED:
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        else:
            inner = ACTIVATIONS[self.activation](inner)
        return torch.bmm(inner, up.transpose(1, 2))


def check_options(part: str, *, embed_dim: int, hyper_hidden: int, bottleneck: int, activation: str) -> None:
    """Refuse sizes and activations that no expert has.

    Args:
        part: What is being built, for the message.

    Raises:
        UserError: One line.
    """
    for name, value in (("embed_dim", embed_dim), ("hyper_hidden", hyper_hidden), ("bottleneck", bottleneck)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{part}.{name} is {value!r}, it must be a whole number from 1")
    known = (GATED, *ACTIVATIONS)
    if activation not in known:
        raise UserError(f"{part}.activation is {activation!r}, it must be {', '.join(known[:-1])} or {known[-1]}")


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rms_normalised(guidance: Tensor) -> Tensor:
    """Guidance [..., width] over its root mean square, so that its scale does not reach the weights."""
    guidance = _wide(guidance)
    return guidance * torch.rsqrt(guidance.square().mean(-1, keepdim=True) + RMS_EPS)


def _init_halves(parameter: Tensor, first: int, std: float) -> None:
    """The first rows normal, the others zero; a parameter that was loaded stays as it is."""
    if getattr(parameter, "_is_hf_initialized", False):
        return
    init.zeros_(parameter)
    init.normal_(parameter[:first], std=std)


class Hypernetwork(nn.Module):
    """Two linear layers without a nonlinearity between them: embeddings [sets, embed_dim] to numbers [sets, size].

    Initialised so that every expert gives exactly zero and still learns: the rows for `W_up` are zero.
    """

    def __init__(self, shape: ExpertShape, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.shape, self.hidden, self.embed_dim = shape, hidden, embed_dim
        self.W1 = nn.Parameter(torch.empty(hidden, embed_dim))
        self.B1 = nn.Parameter(torch.empty(hidden))
        self.W2 = nn.Parameter(torch.empty(shape.size, hidden))
        self.B2 = nn.Parameter(torch.empty(shape.size))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """See the class."""
        init.normal_(self.W1, std=self.embed_dim**-0.5)
        init.zeros_(self.B1)
        _init_halves(self.W2, self.shape.down_size, 0.01 * self.hidden**-0.5)
        init.zeros_(self.B2)

    def forward(self, embedding: Tensor) -> Tensor:
        inner = F.linear(embedding, _wide(self.W1), _wide(self.B1))
        return F.linear(inner, _wide(self.W2), _wide(self.B2))


class ExpertLayer(nn.Module):
    """What belongs to one expert: the encoder of its guidance (`A`, `a`) and its own part of the weights (`b`)."""

    def __init__(self, shape: ExpertShape, guidance_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.shape, self.guidance_dim = shape, guidance_dim
        self.A = nn.Parameter(torch.empty(embed_dim, guidance_dim))
        self.a = nn.Parameter(torch.empty(embed_dim))
        self.b = nn.Parameter(torch.empty(shape.size))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Embeddings of unit size; `W_down` like a linear layer, `W_up` zero."""
        init.normal_(self.A, std=self.guidance_dim**-0.5)
        init.zeros_(self.a)
        _init_halves(self.b, self.shape.down_size, self.shape.d_in**-0.5)

    def embed(self, guidance: Tensor) -> Tensor:
        """Guidance [sets, guidance_dim] to embeddings [sets, embed_dim]."""
        return F.linear(rms_normalised(guidance), _wide(self.A), _wide(self.a))

    def forward(self, guidance: Tensor, hyper: Hypernetwork) -> Tensor:
        """Generated weights [sets, size] of guidance [sets, guidance_dim]."""
        kind = guidance.device.type
        mixed = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if mixed else contextlib.nullcontext():
            return hyper(self.embed(guidance)) + _wide(self.b)


class GeneratedExpert(nn.Module):
    """One expert with a hypernetwork of its own."""

    def __init__(self, shape: ExpertShape, *, guidance_dim: int, embed_dim: int = 64, hyper_hidden: int = 64) -> None:
        super().__init__()
        self.shape = shape
        self.hyper = Hypernetwork(shape, embed_dim, hyper_hidden)
        self.layer = ExpertLayer(shape, guidance_dim, embed_dim)

    def weights(self, guidance: Tensor) -> Tensor:
        """Generated weights [sets, size] of guidance [sets, guidance_dim]."""
        return self.layer(guidance, self.hyper)

    def forward(self, guidance: Tensor, x: Tensor) -> Tensor:
        """[sets, tokens, d_in] to [sets, tokens, d_out]."""
        return self.shape.apply(x, self.weights(guidance))
