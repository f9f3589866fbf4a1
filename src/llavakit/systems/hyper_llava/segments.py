"""Segments of a dialogue: which tokens share one set of generated weights, and where their guidance is read.

A segment is a stretch of prompt and the answer to it. It starts with every prompt token that follows an answer, and
its guidance is read at the last token of its prompt. So no answer influences the weights that predict it, and a
conversation that is trained on whole gets the weights that decoding it turn by turn would make.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of a batch.

    Weight sets are numbered: first the segments that begin in this batch, then, if the batch continues earlier tokens,
    one per row for the segment that was open before.

    Attributes:
        rows, columns: Place of every real token [tokens], row by row.
        number: Weight set of every real token [tokens].
        guide_row, guide_column: Place of the guidance of every segment that begins here [segments].
        last: Weight set at the end of every row [batch]; of a row without a real token the one that was open before.
        ends_in_prompt: Whether the last real token of a row is a prompt token [batch].
    """

    rows: Tensor
    columns: Tensor
    number: Tensor
    guide_row: Tensor
    guide_column: Tensor
    last: Tensor
    ends_in_prompt: Tensor

    @property
    def count(self) -> int:
        """Segments that begin here."""
        return len(self.guide_row)

    @property
    def one_per_row(self) -> bool:
        """Whether all tokens of every row share one weight set."""
        return bool((self.number == self.last[self.rows]).all())


def find_segments(
    answer: Tensor,
    real: Tensor | None = None,
    samples: Tensor | None = None,
    continues: bool = False,
) -> Segments:
    """Segments from roles; all tensors on the CPU.

    Args:
        answer: True at answer tokens [batch, length].
        real: False at padding [batch, length]; None if there is none.
        samples: Number of the packed sample at every position [batch, length]; None if rows are not packed.
        continues: Whether every row goes on from tokens that were seen before. Without, the first token of a sample is
            prompt: nothing predicts it.
    """
    batch = len(answer)
    rows, columns = (torch.ones_like(answer) if real is None else real).nonzero(as_tuple=True)
    is_answer = answer[rows, columns]
    new_row = torch.ones_like(is_answer)
    new_row[1:] = rows[1:] != rows[:-1]
    first = new_row.clone()
    if samples is not None:
        own = samples[rows, columns]
        first[1:] |= own[1:] != own[:-1]
    if not continues:
        is_answer = is_answer & ~first
    follows_answer = torch.zeros_like(is_answer)
    follows_answer[1:] = is_answer[:-1]
    starts = ~is_answer & (first | follows_answer)
    number = starts.long().cumsum(0) - 1
    count = int(starts.sum())
    # a row that begins with an answer token belongs, up to its first start, to the segment that was open before
    before = (number - starts.long())[new_row]  # per row that has tokens: the last segment of the rows above
    row_number = new_row.long().cumsum(0) - 1
    open_before = number == before[row_number] if len(before) else torch.zeros_like(starts)
    number = torch.where(open_before & ~starts, count + rows, number)
    places = torch.arange(len(rows))
    guides = torch.zeros(count, dtype=torch.long)
    prompt = ~is_answer
    guides = guides.scatter_reduce(0, number[prompt], places[prompt], "amax")
    last = count + torch.arange(batch) if continues else torch.zeros(batch, dtype=torch.long)
    ends = torch.zeros(batch, dtype=torch.bool)
    final = torch.ones_like(new_row)
    final[:-1] = new_row[1:]
    last[rows[final]] = number[final]
    ends[rows[final]] = prompt[final]
    return Segments(rows, columns, number, rows[guides], columns[guides], last, ends)


@dataclass(frozen=True)
class Spread:
    """Hidden states of a batch laid out by weight set, so that every set is applied with one batched product.

    Attributes:
        index: Flat position (row x length + column) of every place [sets, longest]; unused places repeat the first.
        inverse: Place of every flat position [batch x length]; padding points anywhere.
    """

    index: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, segments: Segments, sets: int, batch: int, length: int, device: torch.device) -> Spread:
        """The layout of `batch` rows of `length` positions over `sets` weight sets."""
        flat = segments.rows * length + segments.columns
        order = segments.number.argsort(stable=True)
        sizes = torch.bincount(segments.number, minlength=sets)
        within = torch.arange(len(flat)) - (sizes.cumsum(0) - sizes)[segments.number[order]]
        longest = int(sizes.max())
        index = torch.zeros(sets, longest, dtype=torch.long)
        index[segments.number[order], within] = flat[order]
        inverse = torch.zeros(batch * length, dtype=torch.long)
        inverse[flat[order]] = segments.number[order] * longest + within
        return cls(index.to(device), inverse.to(device))

    def gather(self, x: Tensor) -> Tensor:
        """[batch, length, width] to [sets, longest, width]."""
        return x.flatten(0, 1)[self.index]

    def scatter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[sets, longest, width] back to [batch, length, width]."""
        return x.flatten(0, 1)[self.inverse].view(*shape[:2], -1)
