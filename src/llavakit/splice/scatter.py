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
        ValueError: If the number of placeholders differs from the number of media.
    """
    found = sum(1 for token in ids if token == placeholder)
    if found != len(layouts):
        raise ValueError(f"{found} placeholders in the prompt, but {len(layouts)} media")
    labels = [IGNORE] * len(ids) if labels is None else labels
    out_ids: list[int] = []
    out_labels: list[int] = []
    out_weights: list[float] = []
    remaining = iter(layouts)
    for token, label, weight in zip(ids, labels, [1.0] * len(ids) if weights is None else weights, strict=True):
        if token != placeholder:
            out_ids.append(token)
            out_labels.append(label)
            out_weights.append(weight)
            continue
        for run in next(remaining):
            out_ids += [image_token_id] * run.visual + list(run.ids)
            out_labels += [IGNORE] * (run.visual + len(run.ids))
            out_weights += [1.0] * (run.visual + len(run.ids))
    return Spliced(out_ids, out_labels, None if weights is None else out_weights)


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
