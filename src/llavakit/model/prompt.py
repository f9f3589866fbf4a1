"""What connectors and adapters may know of a prompt, found from ids, masks and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llavakit.connectors.base import Prompt
from llavakit.model.routes import MediaSpec
from llavakit.model.visuals import Visuals


@dataclass
class PromptInfo:
    """What the caller knows of a prompt beside its ids.

    Attributes:
        answers: True at the answers of earlier turns [batch, length]; shorter if none follow. Columns count from the
            beginning of the conversation, also behind a cache.
        length: Number of columns, from the beginning, that the model has not generated itself; None for all.
    """

    answers: Tensor | None = None
    length: int | None = None

    def for_batch(self, rows: int, columns: int, start: int = 0) -> Tensor | None:
        """`answers` of `columns` columns from `start` on, as [rows, columns].

        They are padded at the end, and repeated for the beams of one prompt.
        """
        if self.answers is None:
            return None
        answers = self.answers[:, start : start + columns].repeat_interleave(rows // self.answers.shape[0], dim=0)
        return F.pad(answers, (0, columns - answers.shape[1]))


def make_prompt(
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    visual: Tensor,
    *,
    attention_mask: Tensor | None = None,
    segments: Tensor | None = None,
    info: PromptInfo | None = None,
    labels: Tensor | None = None,
    digests: list[bytes] | None = None,
    memory: object = None,
) -> Prompt:
    """What connectors that read the prompt get to see.

    Args:
        visual: True at visual positions [batch, length].
        digests, memory: See `llavakit.connectors.base.Prompt`.
    """
    info = info or PromptInfo()
    rows, length = visual.shape
    visible = torch.ones_like(visual)
    if attention_mask is not None and attention_mask.dim() == 2:
        visible = attention_mask[:, -length:].bool()
    if info.length is not None:
        given = torch.arange(length, device=visual.device) < info.length
        visible, visual = visible & given, visual & given
    if segments is None:
        segments = torch.zeros_like(visual, dtype=torch.long)
    return Prompt(
        inputs_embeds,
        input_ids,
        visible=visible,
        visual=visual,
        labels=labels,
        segments=segments,
        answers=info.for_batch(rows, length),
        digests=digests,
        memory=memory,
    )


def media_segments(spec: MediaSpec, prompt: Prompt, visuals: Visuals) -> list[tuple[int, int]]:
    """Row and segment of every media item, found by counting visual positions.

    Raises:
        ValueError: If there are more or fewer positions than visual tokens.
    """
    places = prompt.visual.nonzero()
    counts = [
        sum(run.visual for run in spec.route(modality).layout(plan))
        for modality, plan in zip(visuals.modalities, visuals.plans, strict=True)
    ]
    if sum(counts) != len(places):
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {len(places)}, features: {sum(counts)}"
        )
    first = torch.tensor(counts[:-1], dtype=torch.long).cumsum(0).tolist()
    rows, columns = places[[0, *first][: len(counts)]].unbind(-1)
    return list(zip(rows.tolist(), prompt.segments[rows, columns].tolist(), strict=True))


def samples_without_media(prompt: Prompt) -> list[tuple[int, int]]:
    """Row and segment of every sample of the batch that no media item belongs to."""
    samples = torch.stack([torch.where(prompt.visible)[0], prompt.segments[prompt.visible]], dim=1).unique(dim=0)
    taken = set(prompt.media_segments)
    return [sample for sample in map(tuple, samples.tolist()) if sample not in taken]


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions of real tokens [batch, length], counted from 0 whichever side is padded."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def packed_segments(
    position_ids: Tensor | None, attention_mask: Tensor | None, past_key_values: object = None
) -> Tensor | None:
    """Number of the packed sample at every position [batch, length]; None if rows are not packed."""
    if position_ids is None or attention_mask is not None or past_key_values is not None:
        return None
    starts = torch.ones_like(position_ids[:, :1])
    segments = (torch.diff(position_ids, prepend=position_ids[:, :1] - starts, dim=-1) != 1).cumsum(-1)
    return segments if bool((segments[:, -1] > 0).any()) else None


__all__ = ["PromptInfo", "make_prompt", "media_segments", "packed_segments", "positions_of", "samples_without_media"]
