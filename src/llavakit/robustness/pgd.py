"""Projected gradient steps with momentum: the inner attack of robust training, and a plain attack on any model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llavakit.robustness.balls import at_least_single, check_norm, project, steepest

MOMENTUM = 0.9


def gradient_of(value: Tensor, pixels: Tensor) -> Tensor:
    """The gradient of a loss with respect to pixels.

    Raises:
        RuntimeError: If no gradient reaches the pixels, for instance because something in between runs without.
    """
    (gradient,) = torch.autograd.grad(value, pixels)
    return gradient.detach()


def pgd(
    loss: Callable[[Tensor], Tensor],
    clean: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: str = "linf",
    start: Tensor | None = None,
    descend: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The pictures after `steps` steps, as Robust CLIP's training and evaluation compute them.

    Velocity is the steepest direction of 0.9 times the last velocity plus the steepest direction; since signs outweigh
    0.9 of signs, momentum matters in linf only where a gradient is exactly zero. Gradients that are not a number count
    as zero.

    Args:
        loss: Pictures to a number; of a batch, a sum or a mean of losses that do not depend on one another.
        clean: [pictures, ...] in 0..1; half precision is widened to single.
        eps, step: Radius and length of a step, in pixels of 0..1.
        start: First perturbation; it is not clamped to 0..1 before the first gradient. None starts at `clean`.
        descend: Lower the loss instead.
        mask: Multiplied with every gradient: 0 where pixels are to stay.

    Returns:
        Like `clean`, within the ball and within 0..1.
    """
    check_norm(norm)
    clean = at_least_single(clean)
    moved = torch.zeros_like(clean) if start is None else start.detach().to(clean).clone()
    velocity = torch.zeros_like(clean)
    for _ in range(steps):
        with torch.enable_grad():
            moved.requires_grad_()
            gradient = gradient_of(loss(clean + moved), moved)
        with torch.no_grad():
            if mask is not None:
                gradient = gradient * mask
            gradient = gradient.masked_fill(gradient.isnan(), 0.0)
            velocity = steepest(MOMENTUM * velocity + steepest(gradient, norm), norm)
            moved = moved + (-step if descend else step) * velocity
            moved = project(moved, norm, eps)
            moved = (clean + moved).clamp(0, 1) - clean
    return clean + moved.detach()


def uniform_start(clean: Tensor, eps: float, norm: str = "linf", generator: torch.Generator | None = None) -> Tensor:
    """A random first perturbation: uniform in the cube of side 2 eps, for l2 moved into the ball."""
    noise = torch.rand(clean.shape, generator=generator, dtype=clean.dtype, device="cpu").to(clean.device)
    return project((2 * noise - 1) * eps, norm, eps)
