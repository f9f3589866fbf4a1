"""Schedules of learning rates: transformers' by name, and the one that it does not have."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from llavakit.training.recipe import Stage

STEP = "step"


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


def arguments(stage: Stage) -> dict[str, Any]:
    """What transformers' `TrainingArguments` are told of a stage's schedule."""
    if stage.schedule == STEP:
        return {"lr_scheduler_type": "constant"}
    return {"lr_scheduler_type": stage.schedule, "lr_scheduler_kwargs": dict(stage.schedule_options) or None}


def check_schedule(stage: Stage, optimizer: Optimizer) -> None:
    """Try a stage's schedule on any optimiser.

    Raises:
        ValueError, TypeError, ArithmeticError: If an option is unknown or out of range.
    """
    if stage.schedule == STEP:
        step_decay(optimizer, 1, 10, **stage.schedule_options)
    else:
        get_scheduler(stage.schedule, optimizer, 1, 10, scheduler_specific_kwargs=dict(stage.schedule_options) or None)
