"""A whole model's loss on texts, as a function of the pixels of their pictures.

Gradients go through whatever stands between pixels and loss: preprocessing, encoders, connector, decoder. What stands
in front of the pictures does not depend on them, so the decoder's states of it are computed once; the head is computed
only where a token of the text is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llavakit.data.collate import IGNORE, Collator
from llavakit.errors import UserError
from llavakit.model.modeling import LlavakitForConditionalGeneration

Cut = Callable[[Tensor, int], Sequence[Tensor]]  # pixels of a row, and the row: encoder inputs, normalised


class TextLoss:
    """The cross entropy of texts given pictures.

    Args:
        model: In evaluation mode; its parameters get no gradients.
        samples: One processed sample per row, labels included.
        cut: Makes a row's encoder inputs of its pixels, differentiably.
        reduction: "mean" or "sum" over the tokens of a row.
        pool: Give one number instead, the mean over the tokens of all rows; as the published attack on a batch.
        reuse: Whether the decoder's states in front of the pictures are computed once.

    Attributes:
        worst: After a call, the largest loss of a single token of every row [rows]; below log(2) each token is the
            likeliest by far, so greedy decoding writes the text.

    Raises:
        UserError: If a row has no picture, no text to lead to or away from, or is longer than the decoder allows.
    """

    def __init__(
        self,
        model: LlavakitForConditionalGeneration,
        samples: Sequence[Mapping[str, Any]],
        cut: Cut,
        *,
        reduction: str = "mean",
        pool: bool = False,
        reuse: bool = True,
    ) -> None:
        self.model, self.cut, self.reduction, self.pool = model.eval().requires_grad_(False), cut, reduction, pool
        self.samples = [_without_views(sample) for sample in samples]
        self.pad = next(iter(_special_ids(model)), 0)
        _check(model, self.samples)
        self.begin = self._begin() if reuse else 0
        self._states: list[tuple[Tensor, Tensor]] | None = None
        self.worst: Tensor | None = None

    @classmethod
    def of_views(
        cls,
        model: LlavakitForConditionalGeneration,
        samples: Sequence[Mapping[str, Any]],
        mean: Sequence[float],
        std: Sequence[float],
        **options: Any,
    ) -> TextLoss:
        """The loss as a function of a row's one encoder input in 0..1, before it is normalised."""
        shift, scale = (torch.tensor(tuple(values)).view(-1, 1, 1) for values in (mean, std))
        return cls(model, samples, lambda pixels, row: [(pixels - shift.to(pixels)) / scale.to(pixels)], **options)

    def __call__(self, pictures: Tensor | Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """The loss of every row [rows], or one number with `pool`.

        Args:
            pictures: Pixels of every row, as `cut` takes them.
            rows: Which samples they belong to; default: all, in order.
        """
        numbers = list(range(len(self.samples))) if rows is None else rows.tolist()
        batch = self._batch(pictures, numbers)
        labels = batch.pop("labels")
        hidden = self._hidden(batch, labels)
        targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:][:, self.begin :]
        places = (targets != IGNORE).nonzero(as_tuple=True)
        logits = self.model.lm_head(hidden[places]).float()
        each = F.cross_entropy(logits, targets[places], reduction="none")
        if self.pool:
            return each.mean()
        self.worst = torch.zeros(len(numbers), dtype=each.dtype, device=each.device).scatter_reduce(
            0, places[0], each.detach(), "amax"
        )
        sums = torch.zeros(len(numbers), dtype=each.dtype, device=each.device).index_add(0, places[0], each)
        return sums / (targets != IGNORE).sum(-1) if self.reduction == "mean" else sums

    def outputs(self, pictures: Tensor | Sequence[Tensor]) -> Any:
        """The model's whole output, logits of every position included."""
        batch = self._batch(pictures, range(len(self.samples)))
        batch.pop("labels")
        return self.model(**batch, use_cache=False)

    def features(self, pictures: Tensor | Sequence[Tensor]) -> Tensor:
        """Visual tokens [pictures, tokens, hidden] of pictures with equally many."""
        batch = self._batch(pictures, range(len(self.samples)))
        names = ("pixel_values", "visual_sizes", "visual_modalities", "visual_regions")
        found = self.model.get_image_features(**{name: batch[name] for name in names if name in batch})
        return torch.stack(found.pooler_output)

    def _batch(self, pictures: Tensor | Sequence[Tensor], rows: Sequence[int]) -> dict[str, Any]:
        views = [list(self.cut(picture, row)) for picture, row in zip(pictures, rows, strict=True)]
        samples = [
            self.samples[row] | {"pixel_values": own, "visual_regions": self.samples[row].get("visual_regions") or []}
            for row, own in zip(rows, views, strict=True)
        ]
        batch = Collator(self.pad)(samples)
        device = self.model.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _begin(self) -> int:
        """How many first positions of all rows are the same text, with the pictures and all labels behind them."""
        model = self.model.model
        if model.language_adapter is not None or model.reads_prompt:
            return 0
        visual = self.model.config.image_token_id
        rows = [[int(token) for token in sample["input_ids"]] for sample in self.samples]
        labels = [[int(label) != IGNORE for label in sample["labels"]] for sample in self.samples]
        end = min(
            *(row.index(visual) for row in rows),
            *(own.index(True) - 1 for own in labels),
            *(len(row) - 1 for row in rows),
        )
        while end > 0 and any(row[:end] != rows[0][:end] for row in rows):
            end -= 1
        return max(end, 0)

    def _hidden(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """Last hidden states [rows, positions from `begin` on, hidden]."""
        net = self.model.model
        if not self.begin:  # connectors and adapters that read the prompt are told where it ends
            return net(**batch, labels=labels, use_cache=False).last_hidden_state
        ids = batch.pop("input_ids")
        cache = self._cache(ids[:1, : self.begin], len(ids))
        if cache is None:
            self.begin = 0
            return net(input_ids=ids, **batch, labels=labels, use_cache=False).last_hidden_state
        return net(input_ids=ids[:, self.begin :], **batch, past_key_values=cache, use_cache=True).last_hidden_state

    def _cache(self, ids: Tensor, rows: int) -> Any:
        """A cache that holds the states of the common beginning for every row; None if the decoder keeps others."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        net = self.model.model
        if self._states is None:
            with torch.no_grad():
                found = net.language_model(inputs_embeds=net.embed_ids(ids), use_cache=True).past_key_values
            layers = getattr(found, "layers", [])
            if not layers or any(type(layer) is not DynamicLayer for layer in layers):
                return None
            self._states = [(layer.keys, layer.values) for layer in layers]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache


def _without_views(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name != "pixel_values"}


def _special_ids(model: LlavakitForConditionalGeneration) -> list[int]:
    pad = model.config.get_text_config().pad_token_id
    return [] if pad is None or pad < 0 else [pad]


def _check(model: LlavakitForConditionalGeneration, samples: Sequence[Mapping[str, Any]]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, sample in enumerate(samples):
        ids = [int(token) for token in sample["input_ids"]]
        if model.config.image_token_id not in ids:
            raise UserError(f"sample {number + 1}: has no picture; there is nothing to attack")
        if all(int(label) == IGNORE for label in sample["labels"]):
            raise UserError(f"sample {number + 1}: has no text that the attack could lead to or away from")
        if limit is not None and len(ids) > limit:
            raise UserError(
                f"sample {number + 1}: prompt and text have {len(ids)} tokens, the model's context {limit}; "
                "shorten the target"
            )
