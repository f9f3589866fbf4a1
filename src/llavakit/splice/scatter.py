"""Splice: visual tokens into the embedded prompt.

Two halves of one rule. On ids: a placeholder becomes as many placeholder ids as the media item has visual tokens (and
the literal separator ids of its layout). On embeddings: the visual vectors replace the embeddings at those ids.
Between them the prompt is an ordinary sequence of ids, which any collator, packer or server can handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llavakit.splice.layout import Run

IGNORE = -100


class Spliced(NamedTuple):
    """A prompt after expansion: ids, labels and, if they were given, loss weights of equal length."""

    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


def expand(
    ids: Sequence[int],
    labels: Sequence[int] | None,
    layouts: Sequence[Sequence[Run]],
    *,
    placeholder: int,
    image_token_id: int,
    weights: Sequence[float] | None = None,
) -> Spliced:
    """Replace every `placeholder` id by the layout of the next media item.

    Args:
        ids: Prompt ids with one `placeholder` per media item.
        labels: Labels of equal length, or None for all -100.
        layouts: One layout per media item, in order of appearance.
        image_token_id: Id written at visual positions.
        weights: Loss weights of equal length; visual positions get 1.

    Raises:
        ValueError: If the number of placeholders differs from the number of media, or the lengths differ.
    """
    places = [place for place, token in enumerate(ids) if token == placeholder]
    if len(places) != len(layouts):
        raise ValueError(f"{len(places)} placeholders in the prompt, but {len(layouts)} media")
    rows = [list(ids), [IGNORE] * len(ids) if labels is None else list(labels)]
    if weights is not None:
        rows.append(list(weights))
    if any(len(row) != len(ids) for row in rows):
        raise ValueError("ids, labels and weights must be of equal length")
    for place, layout in zip(reversed(places), reversed(layouts), strict=True):  # so that earlier places stay valid
        own = [token for run in layout for token in (*[image_token_id] * run.visual, *run.ids)]
        for row, values in zip(rows, (own, [IGNORE] * len(own), [1.0] * len(own)), strict=False):
            row[place : place + 1] = values
    return Spliced(*rows)


def scatter(inputs_embeds: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
    """Put the visual vectors at the marked positions, row by row.

    Args:
        inputs_embeds: [batch, length, hidden].
        mask: True at visual positions [batch, length].
        vectors: [visual tokens of the batch, hidden].

    Raises:
        ValueError: If the counts differ.
    """
    if not torch.compiler.is_compiling() and int(mask.sum()) != vectors.shape[0]:
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {int(mask.sum())}, features: {vectors.shape[0]}"
        )
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), vectors.to(inputs_embeds))
