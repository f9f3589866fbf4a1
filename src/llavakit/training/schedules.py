"""Schedules of learning rates: transformers' by name, and those that it does not have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from llavakit.training.recipe import Stage

STEP = "step"
SET_AFTER_STEP = "cosine_set_after_step"


def step_decay(optimizer: Optimizer, warmup: int, steps: int, *, gamma: float = 0.1, parts: float = 3) -> LambdaLR:
    """The rate of each of several equal parts of a stage is `gamma` times that of the part before.

    Args:
        warmup: Steps of a linear warm-up, which belong to the first part.
        steps: Of the whole stage.
        gamma: In (0, 1].
        parts: How many, 1 or more; as many as there are epochs decays after every epoch.

    Raises:
        ValueError: If an option is out of range.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma: must be above 0 and at most 1, not {gamma:g}")
    if parts < 1 or parts != int(parts):
        raise ValueError(f"parts: must be a whole number from 1 on, not {parts:g}")

    def rate(step: int) -> float:
        decayed = gamma ** min(int(step * parts // max(steps, 1)), int(parts) - 1)
        return decayed * min(step / warmup, 1.0) if warmup else decayed

    return LambdaLR(optimizer, rate)


def open_clip_cosine(warmup: float, steps: float) -> Callable[[int], float]:
    """open_clip's `cosine_lr` as a share of the peak: warm-up step s has (s + 1) / warmup, then half a cosine to 0.

    Args:
        warmup: Steps of the linear warm-up.
        steps: Steps of the whole schedule.
    """

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) if steps != warmup else 0.0

    return share


def after_step(share: Callable[[int], float]) -> Callable[[int], float]:
    """The rates of optimiser steps where a schedule is applied behind each, with the count of steps by then.

    The first step is made before the schedule has said anything, so it has the whole peak rate, as in the published
    training of Robust CLIP.
    """
    return lambda step: 1.0 if step == 0 else share(step)


def set_after_step(optimizer: Optimizer, warmup: int, whole: int, *, steps: float = 0) -> LambdaLR:
    """`open_clip_cosine` applied behind every optimiser step.

    Args:
        warmup: Steps of the linear warm-up.
        whole: Steps of the stage.
        steps: Of the schedule, if it is not the stage's; 0 means it is.

    Raises:
        ValueError: If the number of steps is none.
    """
    if steps < 0 or steps != int(steps):
        raise ValueError(f"steps: must be the number of steps of the whole schedule, not {steps:g}")
    return LambdaLR(optimizer, after_step(open_clip_cosine(warmup, steps or whole)))


def arguments(stage: Stage) -> dict[str, Any]:
    """What transformers' `TrainingArguments` are told of a stage's schedule."""
    if stage.schedule in (STEP, SET_AFTER_STEP):
        return {"lr_scheduler_type": "constant"}
    return {"lr_scheduler_type": stage.schedule, "lr_scheduler_kwargs": dict(stage.schedule_options) or None}


def check_schedule(stage: Stage, optimizer: Optimizer) -> None:
    """Try a stage's schedule on any optimiser.

    Raises:
        ValueError, TypeError, ArithmeticError: If an option is unknown or out of range.
    """
    if stage.schedule == STEP:
        step_decay(optimizer, 1, 10, **stage.schedule_options)
    elif stage.schedule == SET_AFTER_STEP:
        set_after_step(optimizer, 1, 10, **stage.schedule_options)
    else:
        get_scheduler(stage.schedule, optimizer, 1, 10, scheduler_specific_kwargs=dict(stage.schedule_options) or None)
