"""Order of samples that keeps padding small: samples of like length, and of one modality, in one batch.

The rule is the original LLaVA's (`group_by_modality_length`). Lengths are any measure of a sample's size; their sign
says whether it has media (positive) or is text only (negative). Orders depend on the generators alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llavakit.errors import UserError

MEDIA_KEYS = ("image", "images", "video", "videos", "volume", "volumes", "image3d")


def word_length(record: Mapping[str, Any]) -> int:
    """Whitespace-separated words of a LLaVA record, negative if it has no media."""
    words = sum(len(turn["value"].split()) for turn in record["conversations"])
    return words if any(key in record for key in MEDIA_KEYS) else -words


def even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """`indices` dealt to `chunks` ranks of like total length.

    Every index goes to the rank with the smallest total that is not full (ties: the first). If the number of indices
    is not divisible, they are dealt in turn instead.
    """
    if len(indices) % chunks:
        return [list(indices[rank::chunks]) for rank in range(chunks)]
    full = len(indices) // chunks
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals = [0.0] * chunks
    for index in indices:
        rank = totals.index(min(totals))
        dealt[rank].append(index)
        totals[rank] = float("inf") if len(dealt[rank]) == full else totals[rank] + lengths[index]
    return dealt


def length_grouped(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[int]:
    """All sample numbers, shuffled; inside a megabatch (world_size * batch_size) dealt by length, longest first."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = world_size * batch_size
    grouped: list[int] = []
    for begin in range(0, len(order), size):
        for chunk in even_chunks(_longest_first(order[begin : begin + size], lengths), lengths, world_size):
            grouped += chunk
    return grouped


def widely_grouped(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[int]:
    """All sample numbers, sorted by length inside stretches of up to 50 megabatches, megabatches shuffled.

    transformers' length grouping in front of the one above, as LLaVA-NeXT's `auto` samplers have it; lengths of a
    batch are closer to each other than with `length_grouped`.
    """
    size = world_size * batch_size
    stretch = size * (min(len(lengths) // (size * 4), 50) or 1)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    stretches = [_longest_first(order[n : n + stretch], lengths) for n in range(0, len(order), stretch)]
    # The longest sample of all goes first, so that running out of memory shows at once.
    longest = max(range(len(stretches)), key=lambda number: lengths[stretches[number][0]])
    stretches[0][0], stretches[longest][0] = stretches[longest][0], stretches[0][0]
    order = [index for part in stretches for index in part]
    megabatches = [_longest_first(order[n : n + size], lengths) for n in range(0, len(order), size)]
    shuffled = torch.randperm(len(megabatches), generator=generator).tolist()
    return [i for n in shuffled for chunk in even_chunks(megabatches[n], lengths, world_size) for i in chunk]


def banded_by_length(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[int]:
    """All sample numbers, sorted by length and shuffled inside stretches of 8 megabatches, megabatches shuffled.

    LLaVA-NeXT's `group_by_varlen`: lengths of a batch are as close as those of a stretch.
    """
    size = world_size * batch_size
    places = torch.randperm(len(lengths), generator=generator).tolist()
    ranked = _longest_first(range(len(lengths)), lengths)
    order = [i for n in range(0, len(ranked), 8 * size) for i in _longest_first(ranked[n : n + 8 * size], places)]
    megabatches = [order[n : n + size] for n in range(0, len(order), size)]
    shuffled = torch.randperm(len(megabatches), generator=generator).tolist()
    return [i for n in shuffled for i in megabatches[n]]


# A stage's `grouping` -> how it groups by length
GROUPINGS = {"megabatch": length_grouped, "stretch": widely_grouped, "band": banded_by_length}


def _longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: lengths[index], reverse=True)


def modality_grouped(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None,
    *,
    order_generator: torch.Generator | None = None,
    group: Callable[..., list[int]] = length_grouped,
    drop_remainder: bool = False,
) -> list[int]:
    """All sample numbers, megabatches of one modality each.

    The incomplete last megabatches of both modalities are joined, sorted by number and put at the very end.

    Args:
        lengths: Positive with media, negative without.
        generator: Shuffles the samples of each modality.
        order_generator: Shuffles the megabatches; `generator` is used if it is not given.
        group: How each modality is grouped by length, of `GROUPINGS`.
        drop_remainder: Whether to leave the joined remainder out.

    Raises:
        UserError: If a length is 0, which has no sign.
    """
    if not all(lengths):
        raise UserError(f"sample {list(lengths).index(0)} has length 0; leave empty samples out of the data")
    with_media = [index for index, length in enumerate(lengths) if length > 0]
    text_only = [index for index, length in enumerate(lengths) if length < 0]
    if not with_media or not text_only:
        return group(lengths, batch_size, world_size, order_generator or generator)
    size = world_size * batch_size
    megabatches: list[list[int]] = []
    remainder: list[int] = []
    for members in (with_media, text_only):
        own = [abs(lengths[index]) for index in members]
        order = [members[place] for place in group(own, batch_size, world_size, generator)]
        parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
        megabatches += parts[:-1]
        remainder += parts[-1]
    shuffled = torch.randperm(len(megabatches), generator=order_generator or generator).tolist()
    grouped = [index for number in shuffled for index in megabatches[number]]
    return grouped if drop_remainder else grouped + sorted(remainder)
