"""Collation: processed samples to one batch, padded or packed.

A processed sample is a dict with `input_ids` (media expanded), `labels`, and for its media `pixel_values` (one tensor
per view), `visual_sizes` (depth, height, width) and `visual_modalities` (index into
`llavakit.model.routes.MODALITIES`). The collator lays tokens side by side and media one after another; it
knows neither tokenizer nor model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llavakit.data.packing import pack_rows
from llavakit.errors import UserError

IGNORE = -100


class Collator:
    """Makes batches of processed samples.

    Padded batches have `input_ids`, `labels` and `attention_mask` [samples, longest]. Packed batches have `input_ids`,
    `labels` and `position_ids` [rows, max_length] and no mask: positions restart at 0 with every sample, which is
    how the model tells samples apart; the unused tail of a row is a segment of its own. Media come as `pixel_values`
    ([views, channels, height, width] if all views have one shape, else a list of tensors), `visual_sizes` [media, 3]
    and `visual_modalities` [media], in the order of their placeholders, and `visual_regions` (one tensor
    [regions, 4] per media item) if a sample has regions. `label_weights`, of the shape of the labels, are there if a
    sample has them.

    Args:
        pad_token_id: Id written where there is no token.
        max_length: Most tokens of a sample, and the length of packed rows; longer samples are cut. None: no limit.
        padding_side: "right" or "left"; padded batches only.
        packing: Whether to pack. A batch becomes as few rows as `llavakit.data.packing.pack_rows` finds, which
            are never more than a plan of `llavakit.training.dataset.plan_batches` has.
        mask_by_pad_id: Whether a token that equals the padding id is masked wherever it stands, as the original
            LLaVA does (there a real `<unk>` disappears).
        joined: Whether a packed row is one text: positions run on across samples, and so does attention.
        pad_to_multiple_of: Round the length of padded batches up.

    Raises:
        UserError: If the options contradict each other.
    """

    def __init__(
        self,
        pad_token_id: int,
        max_length: int | None = None,
        padding_side: str = "right",
        packing: bool = False,
        *,
        mask_by_pad_id: bool = False,
        joined: bool = False,
        pad_to_multiple_of: int = 1,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise UserError(f"padding_side: must be 'right' or 'left', not {padding_side!r}")
        if packing and max_length is None:
            raise UserError("packing: needs max_length, the number of tokens in a row")
        self.pad_token_id, self.max_length, self.padding_side = pad_token_id, max_length, padding_side
        self.joined = joined
        self.packing, self.mask_by_pad_id, self.pad_to_multiple_of = packing, mask_by_pad_id, pad_to_multiple_of

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Raises:
            ValueError: If a sample's ids and labels differ in length.
        """
        rows = [_tokens(sample, self.max_length) for sample in samples]
        if not self.packing:
            return self._pad(rows) | _media(samples)
        plan = pack_rows([len(ids) for ids, *_ in rows], self.max_length)
        in_order = [samples[index] for row in plan for index in row]
        return self._pack([[rows[index] for index in row] for row in plan]) | _media(in_order)

    def _pad(self, rows: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, *_ in rows)
        longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), longest), self.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORE)
        mask, weights = torch.zeros(len(rows), longest, dtype=torch.long), torch.ones(len(rows), longest)
        for row, (ids, own, own_weights) in enumerate(rows):
            place = slice(0, len(ids)) if self.padding_side == "right" else slice(longest - len(ids), longest)
            input_ids[row, place], labels[row, place], mask[row, place] = ids, own, 1
            weights[row, place] = 1.0 if own_weights is None else own_weights
        if self.mask_by_pad_id:
            mask = input_ids.ne(self.pad_token_id).long()
        weighted = {"label_weights": weights} if any(own is not None for *_, own in rows) else {}
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask} | weighted

    def _pack(self, rows: Sequence[Sequence[tuple[Tensor, Tensor, Tensor | None]]]) -> dict[str, Tensor]:
        shape = (len(rows), self.max_length)
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE)
        positions, weights = torch.zeros(shape, dtype=torch.long), torch.ones(shape)
        for row, samples in enumerate(rows):
            begin = 0
            for ids, own, own_weights in samples:
                end = begin + len(ids)
                input_ids[row, begin:end], positions[row, begin:end] = ids, torch.arange(len(ids))
                # The first token follows nothing of its own sample, so the shifted loss must not see it.
                labels[row, begin + 1 : end] = own[1:]
                if self.joined:
                    labels[row, begin] = own[0]
                weights[row, begin:end] = 1.0 if own_weights is None else own_weights
                begin = end
            positions[row, begin:] = torch.arange(self.max_length - begin)
        if self.joined:
            positions[:] = torch.arange(self.max_length)
        weighted = {"label_weights": weights} if any(own is not None for samples in rows for *_, own in samples) else {}
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions} | weighted


def one_row(samples: Sequence[Mapping[str, Any]], cuts: Sequence[int] | None = None) -> dict[str, Any]:
    """A packed batch of one row that is exactly as long as its samples, in their order.

    Args:
        cuts: How many first tokens of each sample are left out, since the row begins with them: its position ids then
            start there, which is how attention knows (`llavakit.language.packed`).
    """
    ids, labels, positions, weights = [], [], [], []
    rows = [_tokens(sample) for sample in samples]
    for (own, own_labels, own_weights), cut in zip(rows, cuts or [0] * len(rows), strict=True):
        ids.append(own[cut:])
        own_labels = own_labels[cut:].clone()
        own_labels[:1] = IGNORE  # the token in front of it in the row is another sample's
        labels.append(own_labels)
        positions.append(torch.arange(cut, len(own)))
        weights.append(torch.ones(len(own) - cut) if own_weights is None else own_weights[cut:])
    row = {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": torch.cat(positions)}
    if any(own_weights is not None for *_, own_weights in rows):
        row["label_weights"] = torch.cat(weights)
    return {name: tensor[None] for name, tensor in row.items()} | _media(samples)


def common_beginning(samples: Sequence[Mapping[str, Any]], placeholder: int) -> int:
    """How many first tokens all samples share that a row may hold once.

    They lie in front of all media, each sample has a token behind them, and nothing is learned up to that one.

    Args:
        placeholder: Id that stands for media.
    """
    first = torch.as_tensor(samples[0]["input_ids"])
    length = min(len(sample["input_ids"]) for sample in samples) - 1
    same = first[:length] != placeholder
    for sample in samples:
        own, labels = torch.as_tensor(sample["input_ids"]), torch.as_tensor(sample["labels"])
        same = same & (own[:length] == first[:length]) & (labels[1 : length + 1] == IGNORE)
    return int(same.long().cumprod(0).sum())


def _tokens(sample: Mapping[str, Any], max_length: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    ids = torch.as_tensor(sample["input_ids"], dtype=torch.long)[:max_length]
    labels = sample.get("labels")
    labels = torch.full_like(ids, IGNORE) if labels is None else torch.as_tensor(labels, dtype=torch.long)
    labels = labels[:max_length]
    if ids.shape != labels.shape or ids.dim() != 1:
        raise ValueError(f"input_ids {list(ids.shape)} and labels {list(labels.shape)} must be equal rows")
    weights = sample.get("label_weights")
    if weights is not None:
        weights = torch.as_tensor(weights, dtype=torch.float32)[:max_length]
        if weights.shape != labels.shape:
            shapes = f"labels {list(labels.shape)} and label_weights {list(weights.shape)}"
            raise ValueError(f"{shapes} must be equal rows")
    return ids, labels, weights


def _media(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    views: list[Tensor] = []
    sizes: list[Sequence[int]] = []
    modalities: list[int] = []
    regions: list[Tensor] = []
    for sample in samples:
        views += [torch.as_tensor(view) for view in _listed(sample, "pixel_values")]
        sizes += [[int(x) for x in size] for size in _listed(sample, "visual_sizes")]
        modalities += [int(modality) for modality in _listed(sample, "visual_modalities")]
        own = [torch.as_tensor(boxes, dtype=torch.float64) for boxes in _listed(sample, "visual_regions")]
        regions += own or [torch.zeros(0, 4, dtype=torch.float64)] * (len(sizes) - len(regions))
    if not views:
        return {}
    same = all(view.shape == views[0].shape for view in views)
    media = {"visual_regions": regions} if any(map(len, regions)) else {}
    return media | {
        "pixel_values": torch.stack(views) if same else views,
        "visual_sizes": torch.tensor(sizes, dtype=torch.long).reshape(-1, 3),
        "visual_modalities": torch.tensor(modalities, dtype=torch.long),
    }


def _listed(sample: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = sample.get(name)
    return [] if value is None else value
