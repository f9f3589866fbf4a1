"""Mixing: in which order the samples of several sources are seen.

The order of an epoch depends on (seed, epoch) and the mixture alone, not on what was read before, so training can go
on at any position after a kill and see what it would have seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from llavakit.errors import UserError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """A generator that depends on (seed, epoch) only; neighbouring epochs are unrelated."""
    import torch  # here, because files are read in processes that need no network

    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9) % 2**63)


def parse_count(text: str, total: int, *, where: str = "count") -> int:
    """Number of items that `N` or `N%` (rounded up) of `total` means; at most `total`.

    Raises:
        UserError: If the text is neither.
    """
    number = text.strip()
    try:
        if number.endswith("%"):
            count = math.ceil(float(number[:-1]) * total / 100)
        else:
            count = int(number)
    except (ValueError, OverflowError):
        count = -1
    if count < 0:
        raise UserError(f"{where}: must be a number or a percentage such as 500 or 10%, not {text!r}")
    return min(count, total)


def choose(items: Sequence[Item], strategy: str = "all", shuffle: random.Random | None = None) -> list[Item]:
    """The items that a sampling strategy of LLaVA-OneVision's data files keeps.

    Args:
        strategy: "all", "first:N", "end:N" or "random:N", where N is a number or a percentage.
        shuffle: Source of randomness for "random"; seeded with 0 if not given.

    Raises:
        UserError: If the strategy is none of these.
    """
    items = list(items)
    kind, _, amount = strategy.partition(":")
    if kind == "all" and not amount:
        return items
    if kind not in ("first", "end", "random") or not amount:
        raise UserError(f"sampling_strategy: must be all, first:N, end:N or random:N, not {strategy!r}")
    count = parse_count(amount, len(items), where="sampling_strategy")
    if kind == "end":
        return items[len(items) - count :]
    if kind == "random":
        (shuffle or random.Random(0)).shuffle(items)
    return items[:count]


def published_strategy(strategy: str) -> str:
    """A strategy of a published list of files, as LLaVA-OneVision's code reads it.

    A kind without a number keeps everything, and so does `end:0`, whose slice begins at -0.
    """
    kind, _, amount = strategy.partition(":")
    nothing = amount.strip().removesuffix("%") in ("", "0")
    return "all" if nothing and (kind == "end" or (kind in ("first", "random") and not amount)) else strategy


def mixed_order(
    sizes: Sequence[int], weights: Sequence[float] | None = None, *, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> list[tuple[int, int]]:
    """The samples of an epoch as (source, index) pairs.

    Args:
        sizes: Number of samples of every source.
        weights: How often a source is seen per epoch: 1 every sample once, 0.5 half of them (other halves in other
            epochs), 2 every sample twice. Default 1.
        shuffle: Whether the order is random; otherwise source after source.

    Raises:
        UserError: If a weight is negative or their number is wrong.
    """
    import torch

    weights = [1.0] * len(sizes) if weights is None else list(weights)
    if len(weights) != len(sizes):
        raise UserError(f"weights: {len(weights)} given for {len(sizes)} sources")
    if any(weight < 0 for weight in weights):
        raise UserError(f"weights: must not be negative, got {min(weights)}")
    generator = generator_of(seed, epoch)
    pairs: list[tuple[int, int]] = []
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        whole = math.floor(weight)
        part = round((weight - whole) * size)
        chosen = list(range(size)) * whole
        if part:
            # A fraction walks through one fixed permutation, so that epochs see different samples before any twice.
            fixed = torch.randperm(size, generator=generator_of(seed + source + 1, -1)).tolist()
            begin = epoch * part
            chosen += sorted(fixed[(begin + n) % size] for n in range(part))
        pairs += [(source, index) for index in chosen]
    if not shuffle:
        return pairs
    return [pairs[place] for place in torch.randperm(len(pairs), generator=generator).tolist()]
