"""Balls of pixels around a picture: projections, steepest steps, random starts, per picture of a batch.

`eps` is the radius in pixels of 0..1. Sources: Croce and Hein, "Reliable evaluation of adversarial robustness"
(arXiv 2003.01690), and the attacks of Robust CLIP (arXiv 2402.12336).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llavakit.errors import UserError

NORMS = ("linf", "l2")
TINY = 1e-12


def check_norm(norm: str) -> str:
    """The norm, as it is.

    Raises:
        UserError: If there is no such norm.
    """
    if norm not in NORMS:
        raise UserError(f"norm: must be one of {', '.join(NORMS)}, not {norm!r}")
    return norm


def check_eps(eps: float) -> float:
    """The radius, as it is.

    Raises:
        UserError: If it is not in 0 < eps <= 1; a radius in grey levels is recognised.
    """
    if isinstance(eps, str):
        raise UserError(f"eps: must be a number or a fraction as 4/255, not {eps!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps <= 1:
        hint = f"; did you mean {eps:g}/255?" if isinstance(eps, (int, float)) and 1 < eps <= 255 else ""
        raise UserError(f"eps: must be above 0 and at most 1, pixels of 0..1, not {eps!r}{hint}")
    return float(eps)


def fraction(value: Any) -> Any:
    """A number, also one written as a fraction: "4/255"."""
    if not isinstance(value, str):
        return value
    above, slash, below = value.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        return value


def at_least_single(pixels: Tensor) -> Tensor:
    """Pixels in float32, or wider as they are: in half precision the steps of an attack would be rounded away."""
    return pixels.float() if pixels.dtype in (torch.float16, torch.bfloat16) else pixels


def per_picture(values: Tensor, like: Tensor) -> Tensor:
    """One number per picture [pictures], shaped so that it broadcasts over `like` [pictures, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def l2_norm(values: Tensor) -> Tensor:
    """Euclidean norm of every picture, broadcastable over `values`."""
    return per_picture(values.square().flatten(1).sum(-1).sqrt(), values)


def project(perturbation: Tensor, norm: str, eps: float) -> Tensor:
    """The perturbation [pictures, ...] inside the ball, each picture by itself; l2 by rescaling."""
    if norm == "linf":
        return perturbation.clamp(-eps, eps)
    return torch.renorm(perturbation, p=2, dim=0, maxnorm=eps)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The step of length one that ascends most: signs, or the gradient over its Euclidean norm."""
    if norm == "linf":
        return gradient.sign()
    return F.normalize(gradient.flatten(1), dim=1).view_as(gradient)


def inside(points: Tensor, clean: Tensor, norm: str, eps: float) -> Tensor:
    """Points moved into the ball around `clean`, then into 0..1."""
    if norm == "linf":
        return torch.min(torch.max(points, clean - eps), clean + eps).clamp(0.0, 1.0)
    away = points - clean
    length = l2_norm(away)
    return (clean + away / (length + TINY) * torch.minimum(length, torch.full_like(length, eps))).clamp(0.0, 1.0)


def start_on_edge(noise: Tensor, clean: Tensor, norm: str, eps: float) -> Tensor:
    """AutoAttack's random start: noise scaled until it touches the edge of the ball.

    Args:
        noise: Uniform in -1..1 for linf, normal for l2.
    """
    size = per_picture(noise.abs().flatten(1).amax(-1), noise) if norm == "linf" else l2_norm(noise)
    return clean + eps * (noise / (size + TINY))
