"""What a stage is about to do, in a few lines before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llavakit.data.packing import pack_rows
from llavakit.training.dataset import PreparedSamples
from llavakit.training.fingerprint import spread
from llavakit.training.memory import Memory, in_gb, static_bytes
from llavakit.training.recipe import Stage

FEW_STEPS = 20
BATCHES = 16  # that are measured where samples would have to be prepared for it
EXACT = 64  # batches up to which all of them are measured


@dataclass(frozen=True)
class Plan:
    """Sizes of a stage.

    Attributes:
        records: Records of its sources.
        samples: Samples of all steps of all processes.
        steps: Optimiser steps.
        tokens: Tokens of all samples without padding.
        exact: Whether all samples were measured, or some of them.
        padding: Share of positions that hold padding.
        unpacked: The same if the samples of a batch were padded to its longest instead; None without packing.
    """

    records: int
    samples: int
    steps: int
    tokens: int
    exact: bool
    padding: float
    unpacked: float | None


@dataclass(frozen=True)
class StreamPlan:
    """What is known of a stage that learns from a stream.

    Attributes:
        shards: Shards of its sources.
        steps: Optimiser steps.
        buffer: Records that are shuffled and packed together.
    """

    shards: int
    steps: int
    buffer: int


def plan_of(samples: PreparedSamples, stage: Stage, batches: Sequence[Sequence[int]], world: int, flat: bool) -> Plan:
    """Measure a stage.

    Args:
        batches: Batches of this process.
        world: Number of processes.
        flat: Whether packed rows are laid end to end without padding.
    """
    measured = batches
    if not stage.packing and len(batches) > EXACT:  # packing has measured every sample already
        measured = [batches[number] for number in spread(len(batches), BATCHES)]
    tokens = positions = unpacked = chosen = 0
    for batch in measured:
        lengths = [abs(samples.length(index)) for index in batch]
        tokens, chosen = tokens + sum(lengths), chosen + len(lengths)
        padded = len(lengths) * max(lengths)
        rows = len(pack_rows(lengths, stage.max_length)) if stage.packing else 0
        positions += (sum(lengths) if flat else rows * stage.max_length) if stage.packing else padded
        unpacked += padded
    planned = sum(map(len, batches))
    return Plan(
        records=len(samples),
        samples=planned * world,
        steps=-(-len(batches) // stage.accumulation),
        tokens=round(tokens * planned / chosen) * world,
        exact=len(measured) == len(batches),
        padding=1 - tokens / positions,
        unpacked=1 - tokens / unpacked if stage.packing else None,
    )


def lines(stage: Stage, plan: Plan | StreamPlan, trainable: Mapping[str, int], model: nn.Module) -> list[str]:
    """The lines that are shown."""
    parts = ", ".join(f"{part} {count:,}" for part, count in trainable.items())
    total = sum(parameter.numel() for parameter in model.parameters())
    said = [
        f"{stage.name}: {_sizes(plan)}",
        f"{stage.name}: trains {sum(trainable.values()):,} of {total:,} parameters: {parts}",
        f"{stage.name}: {_memory(static_bytes(model, stage, loaded=True))}",
    ]
    if plan.steps < FEW_STEPS:
        said.append(
            f"{stage.name}: {_several(plan.steps, 'step')} are few, the loss will hardly move; more epochs or smaller "
            "batches make more of them"
        )
    return said


def _memory(memory: Memory) -> str:
    terms = ", ".join(f"{name} {in_gb(value)}" for name, value in memory.terms.items())
    return f"takes {in_gb(memory.total)} of memory ({terms}) beside its activations, which --plan counts"


def in_time(seconds: float) -> str:
    """As people read it."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 3 else f"{minutes:.0f} min" if hours < 3 else f"{hours:.1f} h"


def _sizes(plan: Plan | StreamPlan) -> str:
    steps = _several(plan.steps, "step")
    if isinstance(plan, StreamPlan):
        return f"a stream of {_several(plan.shards, 'shard')}, {steps}, {plan.buffer:,} records shuffled at a time"
    about = "" if plan.exact else "about "
    padding = f"{100 * plan.padding:.0f} % padding"
    if plan.unpacked is not None:
        padding += f" ({100 * plan.unpacked:.0f} % without packing)"
    records, samples = _several(plan.records, "record"), _several(plan.samples, "sample")
    return f"{records}, {samples} in {steps}, {about}{plan.tokens:,} tokens, {padding}"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def facts(plan: Plan | StreamPlan) -> dict[str, Any]:
    """What `metrics.json` keeps of it."""
    if isinstance(plan, StreamPlan):
        return {"shards": plan.shards}
    return {"records": plan.records, "samples": plan.samples}
