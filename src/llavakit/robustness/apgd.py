"""APGD: gradient steps whose length halves where they oscillate, on a whole batch of pictures at once.

Every picture has its own step, history and best point, so a picture's course does not depend on the others, and
pictures that are done can leave the batch. Sources: Croce and Hein (arXiv 2003.01690); the variant for vision-language
models in Robust CLIP (arXiv 2402.12336), whose first step is eps instead of 2 eps.

As published, the first window compares the first loss with an empty slot (0): a positive first loss counts as an
increase whatever it is, a negative one (targeted attacks) never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.robustness.balls import at_least_single, check_norm, inside, l2_norm, per_picture
from llavakit.robustness.pgd import gradient_of

OSCILLATION = 0.75  # share of increases in a window up to which a step is halved
INERTIA = 0.75  # how much of a step is new; the rest goes on in the last direction


def windows(steps: int) -> Iterator[tuple[int, int]]:
    """(iteration, length of the window that ends with it), iterations counted from 0."""
    length, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    end = length - 1
    while end < steps:
        yield end, length
        length = max(length - shrink, shortest)
        end += length


@dataclass(frozen=True)
class Judged:
    """What an attack learns of points [pictures, ...].

    Attributes:
        loss: To be raised, one number per picture.
        broken: Whether a picture's attack has its wish; None where nothing but the loss counts.
    """

    loss: Tensor
    broken: Tensor | None = None


@dataclass
class Attacked:
    """Where an attack led, per picture.

    Attributes:
        best, best_loss: The point of the highest loss, and that loss.
        last: The last point that was judged.
        broken: Whether a point on the way was broken.
        broken_at: The last broken point; the clean picture where there is none.
        steps: Gradients that were taken.
        curve: Highest loss so far [1 + steps, pictures]; a picture that left keeps its last.
    """

    best: Tensor
    best_loss: Tensor
    last: Tensor
    broken: Tensor
    broken_at: Tensor
    steps: Tensor
    curve: Tensor


class _State:
    """The course of the pictures that are still attacked; `rows` are their places in the batch."""

    def __init__(self, points: Tensor, steps: int, step: float) -> None:
        count = len(points)
        self.rows = torch.arange(count, device=points.device)
        self.points, self.before = points, points.clone()
        self.step = per_picture(torch.full((count,), step, dtype=points.dtype, device=points.device), points)
        self.history = torch.zeros(steps, count, dtype=points.dtype, device=points.device)
        self.reduced = torch.ones(count, dtype=torch.bool, device=points.device)
        self.gradient = self.best = self.best_gradient = self.best_loss = self.checked_loss = self.last = points

    def keep(self, stay: Tensor) -> None:
        """Only the pictures where `stay` is true."""
        for name, value in vars(self).items():
            setattr(self, name, value[:, stay] if name == "history" else value[stay])


def apgd(
    judge: Callable[[Tensor, Tensor], Judged],
    clean: Tensor,
    *,
    eps: float,
    steps: int,
    norm: str = "linf",
    first_step: float = 1.0,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    leave: bool = False,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Attacked:
    """The best points of an attack.

    Args:
        judge: Called with points and their rows in the batch; losses of different rows must not depend on each other.
        clean: [pictures, ...] in 0..1; half precision is widened to single.
        eps: Radius, in pixels of 0..1.
        steps: Iterations; each takes one gradient, and one is taken before the first. The last point is only judged.
        first_step: In units of eps; 1 for vision-language models, 2 for classifiers.
        start: First points, clamped to 0..1; None starts at `clean`.
        mask: [pictures, ...], multiplied with every gradient: 0 where pixels are to stay.
        leave: Whether a broken picture leaves the batch; its course is over then.
        progress: Called after every iteration with its number and the rows that are left.
    """
    check_norm(norm)
    clean = at_least_single(clean)
    points = (clean if start is None else start.to(clean)).detach().clamp(0.0, 1.0).clone()
    found = Attacked(
        best=points.clone(),
        best_loss=torch.full((len(clean),), -torch.inf, dtype=clean.dtype, device=clean.device),
        last=points.clone(),
        broken=torch.zeros(len(clean), dtype=torch.bool, device=clean.device),
        broken_at=clean.detach().clone(),
        steps=torch.zeros(len(clean), dtype=torch.long, device=clean.device),
        curve=torch.full((steps + 1, len(clean)), -torch.inf, dtype=clean.dtype, device=clean.device),
    )
    state = _State(points, steps, first_step * eps)

    def look(differentiate: bool) -> Tensor:
        """Judge the points; the losses, with the state's gradient renewed if asked."""
        at = state.points.detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            judged = judge(at, state.rows)
        if differentiate:
            gradient = gradient_of(judged.loss.sum(), at)
            state.gradient = gradient if mask is None else gradient * mask[state.rows]
            found.steps[state.rows] += 1
        if judged.broken is not None:
            rows = state.rows[judged.broken]
            found.broken[rows] = True
            found.broken_at[rows] = state.points[judged.broken]
        return judged.loss.detach().to(clean.dtype)

    def settle(gone: Tensor) -> None:
        rows = state.rows[gone]
        found.best[rows], found.best_loss[rows], found.last[rows] = (
            value[gone] for value in (state.best, state.best_loss, state.last)
        )

    state.best_loss = look(steps > 0)
    state.best, state.best_gradient = state.points.clone(), state.gradient.clone()
    state.checked_loss = state.best_loss.clone()
    found.curve[:] = state.best_loss
    ends = dict(windows(steps))
    for number in range(steps):
        if leave and found.broken[state.rows].any():
            gone = found.broken[state.rows]
            settle(gone)
            state.keep(~gone)
        if not len(state.rows):
            break
        with torch.no_grad():
            own = clean[state.rows]
            forward = state.gradient.sign() if norm == "linf" else state.gradient / (l2_norm(state.gradient) + 1e-12)
            new = inside(state.points + state.step * forward, own, norm, eps)
            share, inertia = (INERTIA if number else 1.0), state.points - state.before
            state.before = state.points
            state.points = inside(state.points + (new - state.points) * share + inertia * (1 - share), own, norm, eps)
        state.last = state.points  # a window's end may lead back to the best point
        losses = look(number < steps - 1)
        state.history[number] = losses
        better = losses > state.best_loss
        state.best = torch.where(per_picture(better, state.best), state.points, state.best)
        state.best_gradient = torch.where(per_picture(better, state.best), state.gradient, state.best_gradient)
        state.best_loss = torch.where(better, losses, state.best_loss)
        found.curve[number + 1 :, state.rows] = state.best_loss
        if number in ends:
            _halve(state, number, ends[number])
        if progress is not None:
            progress(number, state.rows)
    settle(torch.ones_like(state.rows, dtype=torch.bool))
    return found


def _halve(state: _State, number: int, window: int) -> None:
    """At the end of a window: smaller steps, from the best point, where steps stopped helping."""
    rises = sum(
        (state.history[number - back] > state.history[number - back - 1]).to(state.history.dtype)
        for back in range(window)
    )
    stuck = ~state.reduced & (state.checked_loss >= state.best_loss)
    state.reduced = (rises <= window * OSCILLATION) | stuck
    state.checked_loss = state.best_loss.clone()
    again = per_picture(state.reduced, state.points)
    state.step = torch.where(again, state.step / 2, state.step)
    state.points = torch.where(again, state.best, state.points)
    state.gradient = torch.where(again, state.best_gradient, state.gradient)


def picture_mask(clean: Tensor, alone: str | None) -> Tensor | None:
    """A gradient mask for prompts of several pictures [batch, pictures, ...].

    Args:
        alone: Which pictures are left alone: "context" (all but the last), "query" (the last), or None.
    """
    if alone is None:
        return None
    mask = torch.zeros_like(clean)
    if alone == "context":
        mask[:, -1] = 1
    else:
        mask[:, :-1] = 1
    return mask
