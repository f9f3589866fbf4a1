"""Batches of the original code (padded ids with -200 for a media item, a list of media) as the product's batches.

The original strips padding, puts visual vectors in place of -200, cuts rows and pads them again, all on embeddings.
Here every row becomes messages, of which `Samples` and `LlavakitProcessor.encode` make a sample, and the stage's
collator makes the batch. Rows that no message can say (see `verbatim.is_conversation`) and ready visual vectors are
laid out directly.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.data.collate import Collator
from llavakit.errors import UserError
from llavakit.generation.engine import Engine, position_limit
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.model.visuals import Visuals, gather_media, run_encoders, view_jobs
from llavakit.proof.entries import engine_logits
from llavakit.proof.golden import Example, Result, escaped
from llavakit.proof.verbatim import VerbatimRows, is_conversation
from llavakit.splice.layout import Run
from llavakit.splice.scatter import IGNORE, expand
from llavakit.training.dataset import StageCollator
from llavakit.views.plan import MediaSize, Plan

ONE_PIXEL = MediaSize(1, 1, 1)


@dataclass
class Entry:
    """One entry of the original's list of media.

    Attributes:
        modality, size: As in a processed sample.
        views: Encoder inputs, or the encoder's features [tokens, width] of every view.
        vectors: Ready visual vectors [tokens, hidden] instead of views.
        plan: How the media item was cut, where that does not follow from its size (boxes on a view, for instance).
        regions: The boxes that the plan shows, [regions, 4] in pixels of the original picture.
    """

    modality: str = "image"
    size: MediaSize = ONE_PIXEL
    views: Sequence[Tensor] = ()
    vectors: Tensor | None = None
    plan: Plan | None = None
    regions: Tensor | None = None


def as_rows(values: Any) -> list[list[int]] | None:
    """Rows of a tensor, of nested lists, or of one row alone; None stays None."""
    if values is None:
        return None
    rows = values.tolist() if isinstance(values, Tensor) else list(values)
    return rows if not rows or isinstance(rows[0], list) else [rows]


@dataclass
class ClassicBatch:
    """A batch of the original code, laid out for a model.

    Args:
        model: Its media layouts decide how many tokens an entry takes.
        input_ids: Rows with -200 (or another key of `media`) for a media item; a tensor or lists.
        media: Entries in the order in which placeholders take them, by placeholder id.
        attention_mask: True at real tokens; None means that all are.
        labels: None for none.
        max_length: Rows are cut to this length after media are in place, perhaps in the middle of one.
        padding_side: "right" or "left".
        pad_token_id: Written where there is no token.
        spare: Whether a row without a placeholder uses up one entry without showing it, as the original's loader sends.
        features: Whether the entries' views are encoder features.
    """

    model: LlavakitForConditionalGeneration
    input_ids: Any
    media: Mapping[int, Sequence[Entry]]
    attention_mask: Any = None
    labels: Any = None
    max_length: int | None = None
    padding_side: str = "right"
    pad_token_id: int = 0
    spare: bool = True
    features: bool = False
    used: list[Entry] = field(default_factory=list, init=False)
    samples: list[dict[str, Any]] = field(default_factory=list, init=False)
    _text: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        self.max_length = self.max_length or None
        waiting = {token: iter(entries) for token, entries in self.media.items()}
        rows, masks, labels = (as_rows(values) for values in (self.input_ids, self.attention_mask, self.labels))
        self._text = {token for row in rows or [] for token in row if token not in waiting and token >= 0}
        for number, row in enumerate(rows or []):
            seen = [True] * len(row) if masks is None else [bool(x) for x in masks[number]]
            ids = [i for i, real in zip(row, seen, strict=True) if real]
            own = None if labels is None else [t for t, real in zip(labels[number], seen, strict=True) if real]
            self.samples.append(self._sample(ids, own, waiting))

    def _sample(
        self, ids: Sequence[int], labels: Sequence[int] | None, waiting: Mapping[int, Iterator[Entry]]
    ) -> dict[str, Any]:
        entries = []
        for token in ids:
            if token in waiting:
                entry = next(waiting[token], None)
                if entry is None:
                    raise ValueError(f"more placeholders {token} than media")
                entries.append(entry)
        if not entries and self.spare:
            for left in waiting.values():
                next(left, None)
        self.used += entries
        places = [place for place, token in enumerate(ids) if token in waiting]
        found = {place: (entry.modality, entry.size) for place, entry in zip(places, entries, strict=True)}
        text = [0 if token in waiting else token for token in ids]
        usual = all(entry.vectors is None and entry.plan is None for entry in entries)
        if usual and is_conversation(text, labels, found):
            views = [view for entry in entries for view in entry.views]
            return self._rows.sample(text, labels, found, views)
        spliced = expand(
            [IMAGE_PLACEHOLDER if token in waiting else token for token in ids],
            labels,
            [self._layout(entry) for entry in entries],
            placeholder=IMAGE_PLACEHOLDER,
            image_token_id=self.model.config.image_token_id,
        )
        regions = [torch.zeros(0, 4) if entry.regions is None else entry.regions for entry in entries]
        return {
            "input_ids": spliced.ids,
            "labels": spliced.labels,
            "pixel_values": [view for entry in entries for view in entry.views],
            "visual_sizes": [entry.size for entry in entries],
            "visual_modalities": [MODALITIES.index(entry.modality) for entry in entries],
            "visual_regions": regions if any(map(len, regions)) else [],
        }

    @functools.cached_property
    def _rows(self) -> VerbatimRows:
        return VerbatimRows(self.model.config, self._text | {0})

    def _layout(self, entry: Entry) -> Sequence[Run]:
        if entry.vectors is not None:
            return [Run(visual=len(entry.vectors))]
        if entry.plan is not None:
            return self.model.model.media.route(entry.modality).layout(entry.plan)
        return self.model.model.media.layout(entry.modality, entry.size)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row, media in place, before it is cut."""
        return [len(sample["input_ids"]) for sample in self.samples]

    def collated(self, *, cut: bool = True) -> dict[str, Any]:
        """The batch as the stage's collator makes it: `input_ids`, `labels`, `attention_mask`, and the media."""
        limit = self.max_length if cut else None
        batch = StageCollator(self.pad_token_id, limit, padding_side=self.padding_side, features=self.features)(
            self.samples
        )
        batch.pop("tokens")
        if "features" in batch:
            net, features = self.model.model, batch.pop("features")
            modalities, plans = net.plan_media((), batch.pop("visual_sizes"), batch.pop("visual_modalities"))
            batch["visuals"] = gather_media(net.media, modalities, plans, list(features))
        elif any(entry.plan is not None for entry in self.used):
            batch["visuals"] = self._planned()
            for name in ("pixel_values", "visual_sizes", "visual_modalities", "visual_regions"):
                batch.pop(name, None)
        if self.labels is None:
            batch.pop("labels")
        return batch

    def _planned(self) -> Visuals:
        """Encoder features of entries that bring their plans."""
        net = self.model.model
        modalities, plans = [entry.modality for entry in self.used], [entry.plan for entry in self.used]
        views = [view for entry in self.used for view in entry.views]
        return gather_media(
            net.media, modalities, plans, run_encoders(net, views, view_jobs(net.media, modalities, plans))
        )

    @property
    def attention(self) -> Tensor:
        """1 at real tokens [rows, longest]."""
        return self._tokens["attention_mask"]

    @property
    def targets(self) -> Tensor:
        """Labels [rows, longest], -100 everywhere if the batch has none."""
        return self._tokens["labels"]

    @property
    def ids(self) -> Tensor:
        """Ids [rows, longest]."""
        return self._tokens["input_ids"]

    @property
    def _tokens(self) -> dict[str, Tensor]:
        text = [{name: sample[name] for name in ("input_ids", "labels")} for sample in self.samples]
        return Collator(self.pad_token_id, self.max_length, self.padding_side)(text)

    @property
    def is_cut(self) -> bool:
        """Whether a row is longer than the limit; a cut may go through a media item, so embeddings are cut."""
        return self.max_length is not None and max(self.lengths) > self.max_length

    def embeds(self, **options: Any) -> Tensor:
        """The embedded batch [rows, longest, hidden], cut and padded."""
        batch = self.collated(cut=False)
        vectors = [entry.vectors for entry in self.used if entry.vectors is not None]
        if vectors:
            options["vectors"] = vectors
        embeds, _, _ = self.model.model.embed(batch.pop("input_ids"), **batch, **options)
        if not self.is_cut:
            return embeds
        side = self.padding_side
        rows = [row[mask.bool()][: self.max_length] for row, mask in zip(embeds, batch["attention_mask"], strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)

    def forward(self, **options: Any) -> Any:
        """The model's output on the batch; through embeddings where a cut goes through a media item."""
        visual = self.model.config.image_token_id
        rest = [int(token) for sample in self.samples for token in sample["input_ids"][self.max_length or 0 :]]
        ready = any(entry.vectors is not None for entry in self.used)
        if not self.is_cut or (visual not in rest and not ready):
            return self.model(**self.collated(), **options)
        labels = None if self.labels is None else self.targets
        return self.model(inputs_embeds=self.embeds(), attention_mask=self.attention, labels=labels, **options)

    def examples(self, prefix: str = "new") -> Iterator[Example]:
        """The forward pass and the engine, as cases of whole models record them.

        Args:
            prefix: Of the spliced labels and mask: `{prefix}_labels`, `{prefix}_attention_mask`.
        """

        def outputs() -> Result:
            with torch.no_grad():
                out, embeds = self.forward(), self.embeds()
            tensors = {
                "inputs_embeds": embeds * self.meaningful(),
                f"{prefix}_labels": self.targets,
                f"{prefix}_attention_mask": self.attention,
                "logits": out.logits,
            }
            if out.loss is not None:
                tensors["loss"] = out.loss.reshape(1)
            return Result(tensors=tensors, mask={"logits": self.meaningful()})

        yield Example("forward pass", outputs, tensors=("*",))
        yield from self.through_engine()

    def through_engine(self, name: str = "logits") -> Iterator[Example]:
        """An example that compares the output `name` [rows, longest, vocabulary] with the engine's logits.

        The prompt of every row ends with its last media item; what follows is given to the engine as the answer. There
        is no example where the engine cannot take the rows (cut or empty ones, ready vectors, more positions than the
        decoder has) or the decoder.
        """
        limit = position_limit(self.model.config.get_text_config())
        fits = min(self.lengths, default=0) > 0 and (limit is None or max(self.lengths) < limit)
        try:
            Engine(self.model)
        except UserError:
            return
        if fits and not self.is_cut and all(entry.vectors is None for entry in self.used):
            yield Example("through the engine", lambda: self._engine_result(name), tensors=(escaped(name),))

    def _engine_result(self, name: str) -> Result:
        found: list[Tensor] = []
        known: list[Tensor] = []
        for sample in self.samples:
            ids = [int(token) for token in sample["input_ids"]]
            visual = [place for place, token in enumerate(ids) if token == self.model.config.image_token_id]
            begin = visual[-1] + 1 if visual else 1
            logits = engine_logits(self.model, sample, begin)
            found.append(torch.cat([logits.new_zeros(begin - 1, logits.shape[-1]), logits]))
            known.append(torch.arange(len(ids)).unsqueeze(-1) >= begin - 1)
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=self.padding_side)
        return Result(tensors={name: pad(found)}, mask={name: pad(known)})

    def meaningful(self) -> Tensor:
        """True at real tokens [rows, longest, 1], as masks of results."""
        return self.attention.bool().unsqueeze(-1)

    def expanded_labels(self) -> Tensor:
        """Labels, and -100 at padding."""
        return self.targets.masked_fill(self.attention == 0, IGNORE)
