"""Samples and batches of a stage.

`PreparedSamples` remembers samples while memory allows; `Samples` are those of conversations. `plan_batches` decides
before training starts which samples make up which batch of the whole stage, from the seed alone; training can
therefore go on at any batch after a kill.
Records, their mixture and broken ones are `llavakit.data`'s business.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from llavakit.connectors.base import tokens_in
from llavakit.conversation.messages import is_media
from llavakit.data.collate import Collator, common_beginning, one_row
from llavakit.data.dataset import SampleDataset, check_sample, media_field
from llavakit.data.mixing import generator_of
from llavakit.data.mixture import Mixture, SourceSpec, read_specs
from llavakit.data.packing import Piece, chunks, first_fit_decreasing
from llavakit.data.paths import is_stream
from llavakit.data.records import BadRecords, Record, read_record
from llavakit.data.sampler import GROUPINGS, modality_grouped, word_length
from llavakit.data.stream import RecordStream
from llavakit.errors import RecordError, UserError
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MODALITIES
from llavakit.splice.scatter import IGNORE
from llavakit.training.recipe import Recipe, Source, Stage
from llavakit.views.plan import MediaSize

MEMORY = 512 * 1024**2
WORDS_PER_IMAGE = 128  # what the original adds for an image where it groups by length alone
WORTH_SHARING = 8  # tokens that samples begin with: fewer cost more in attention than they save
PACKING_WINDOW = 2048  # samples that are packed together: enough for full rows, few enough to stay fast

Messages = Sequence[Mapping[str, Any]]
Features = Callable[[Messages, Sequence[Tensor]], list[Tensor]]


def open_records(recipe: Recipe, number: int, read: Callable[..., Record] = read_record) -> Mixture | RecordStream:
    """The records of a stage; a stream if one of its sources is one.

    Args:
        read: How entries are read, see `llavakit.data.records.read_record`.

    Raises:
        UserError: If a file is missing or a source is misspelt.
    """
    specs: list[SourceSpec] = []
    for source in recipe.sources_of(number):
        specs += read_specs(source_options(source), where=f"data.{source.name}")
    kind = RecordStream if any(is_stream(spec.path) for spec in specs) else Mixture
    return kind(specs, seed=recipe.seed, read=read)


def source_options(source: Source) -> dict[str, Any]:
    """A recipe's source as `read_specs` takes it."""
    options: dict[str, Any] = {"path": source.path, "weight": source.weight, "media_root": source.images}
    options["boxes"] = source.boxes
    options |= {key: getattr(source, key) for key in ("edits", "split", "config") if getattr(source, key)}
    return options if source.subset is None else options | {"sampling_strategy": source.subset}


@dataclass(frozen=True)
class Failure:
    """What a worker of a data loader could not prepare; `StageTrainer` raises the error in the main process."""

    error: UserError


class Maker(Protocol):
    """Makes samples of records; an objective does, see `llavakit.training.objectives.base.Objective`."""

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """The sample of a record."""

    def check(self, sample: dict[str, Any], record: Record) -> dict[str, Any]:
        """The sample, perhaps cut; raises `RecordError` if nothing can be learned from it."""

    def length(self, sample: Mapping[str, Any]) -> int:
        """Positions in a row, negative without media."""

    def size(self, sample: Mapping[str, Any]) -> int:
        """Bytes of memory that a sample takes while it is remembered."""


class Conversations:
    """Makes samples of conversations (see `llavakit.data.collate`).

    Args:
        processor: Makes ids, labels and views.
        max_length: Longest sample.
        positions: Positions that the decoder has; without `max_length` a longer sample is a broken record.
        options: Passed to `LlavakitProcessor.encode` (`labels`, `placement`).
        features: `features(messages, regions)` gives encoder features per view instead of pixels.
    """

    def __init__(
        self,
        processor: LlavakitProcessor,
        *,
        max_length: int | None = None,
        positions: int | None = None,
        options: Mapping[str, Any] | None = None,
        features: Features | None = None,
    ) -> None:
        self.processor, self.max_length, self.features = processor, max_length, features
        self.positions = positions
        self.options = dict(options or {})

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """Ids and labels as int64 tensors [tokens], views or features, sizes, modalities and regions."""
        sample = self.processor.encode(record.messages, pixels=media and self.features is None, **self.options)
        if media and self.features is not None:
            sample["pixel_values"] = self.features(record.messages, sample["visual_regions"])
        return sample

    def check(self, sample: dict[str, Any], record: Record) -> dict[str, Any]:
        """The sample, cut behind its last visual token; see `llavakit.data.dataset.check_sample`."""
        length = len(sample["input_ids"])
        if self.max_length is None and self.positions is not None and length > self.positions:
            problem = f"takes {length} tokens, the model has {self.positions} positions; shorten it, or set max_length"
            raise RecordError(record.file, record.line, media_field(record), problem)
        sample = check_sample(sample, record, self.max_length, self.processor.image_token_id)
        rows = ("input_ids", "labels", "label_weights")
        return sample | {name: torch.tensor(sample[name]) for name in rows if name in sample}

    def length(self, sample: Mapping[str, Any]) -> int:
        """Tokens, negative without media."""
        return len(sample["input_ids"]) * (1 if sample["visual_modalities"] else -1)

    def size(self, sample: Mapping[str, Any]) -> int:
        """Bytes; features lie in a memory map, and views of it cost nothing."""
        views = sample["pixel_values"] if self.features is None else ()
        return 16 * len(sample["input_ids"]) + 512 + sum(view.numel() * view.element_size() for view in views)


class PreparedSamples(Dataset):
    """Samples of checked records, remembered while there is room.

    Args:
        records: A `Mixture`, or a sequence of `llavakit.data.records.Record` with `order(seed, epoch)`.
        maker: Makes the samples.
        on_bad_record: "stop" or "skip".
        bad: Where broken records are noted.
        seed: Of the samples that replace broken records.
        memory: Bytes of samples that are kept.
    """

    def __init__(
        self,
        records: Any,
        maker: Maker,
        *,
        on_bad_record: str = "stop",
        bad: BadRecords | None = None,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        self.maker = maker
        self.dataset = SampleDataset(
            records,
            maker.encode,
            on_bad_record=on_bad_record,
            bad=bad,
            seed=seed,
            check=maker.check,
            whole_records=True,
        )
        self._kept: dict[int, dict[str, Any]] = {}
        self._lengths: dict[int, int] = {}
        self._room = memory

    @property
    def bad(self) -> BadRecords:
        """Where broken records are noted."""
        return self.dataset.bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | Failure:
        """The sample.

        In a worker of a data loader a broken record is returned as a `Failure`: PyTorch would raise it elsewhere as
        another exception, with the worker's traceback for a message.
        """
        if get_worker_info() is None:
            return self._sample(index)
        try:
            return self._sample(index)
        except UserError as error:
            return Failure(error)

    def _sample(self, index: int) -> dict[str, Any]:
        if isinstance(index, Piece):
            return cut_to_piece(self._sample(int(index)), index)
        if index in self._kept:
            return self._kept[index]
        sample = self.dataset[index]
        size = self.maker.size(sample)
        if size <= self._room:
            self._room -= size
            self._kept[index] = sample
        return sample

    def length(self, index: int) -> int:
        """Length of a sample, negative if it has no media. Decodes no image that there is no room to remember."""
        if isinstance(index, Piece):
            return index.begin - index.end
        if index not in self._lengths:
            if index in self._kept or self._room > 0:
                sample = self._sample(index)
            else:
                sample = self.dataset.sample(index, functools.partial(self.maker.encode, media=False))
            self._lengths[index] = self.maker.length(sample)
        return self._lengths[index]

    def words(self, index: int, per_image: int = 0) -> int:
        """Words of a record, negative if it has no media: the original LLaVA's measure for grouping.

        Args:
            per_image: Added for a record with images, as the original does where it groups by length alone.
        """
        return record_words(self.dataset.record(index), per_image)


def record_words(record: Record, per_image: int = 0) -> int:
    """Words of a record, negative if it has no media; see `PreparedSamples.words`."""
    if "conversations" in record.raw:
        words, has_image = word_length(record.raw), "image" in record.raw
    else:
        parts = [part for message in record.messages for part in message["content"]]
        words = sum(len(part["text"].split()) if part["type"] == "text" else is_media(part) for part in parts)
        words *= 1 if any(map(is_media, parts)) else -1
        has_image = any(part["type"] == "image" for part in parts)
    return words + per_image * has_image or -1


def cut_to_piece(sample: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """The tokens of a sample that a chunk of a stream holds."""
    rows = ("input_ids", "labels", "label_weights")
    return sample | {name: sample[name][piece.begin : piece.end] for name in rows if name in sample}


class Samples(PreparedSamples):
    """Samples of conversations.

    Args:
        records, on_bad_record, bad, seed, memory: See `PreparedSamples`.
        processor, max_length, options, features: See `Conversations`.
    """

    def __init__(
        self,
        records: Any,
        processor: LlavakitProcessor,
        *,
        max_length: int | None = None,
        options: Mapping[str, Any] | None = None,
        features: Features | None = None,
        **settings: Any,
    ) -> None:
        maker = Conversations(processor, max_length=max_length, options=options, features=features)
        super().__init__(records, maker, **settings)


class Batches:
    """Sample numbers of every batch; what a `DataLoader` takes as its batch sampler."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def epoch_batches(samples: Any, stage: Stage, seed: int, epoch: int, world: int) -> list[list[int]]:
    """The batches of an epoch, or of what is in the buffer of a stream, in order.

    Args:
        samples: `PreparedSamples`, or what has their `dataset.order`, `length` and `words`.
        world: Number of processes that the batches are dealt to.
    """
    order = samples.dataset.order(seed, epoch)
    if stage.packing == "stream":
        return _streamed(samples, stage, order)
    if stage.packing:
        return [
            batch for begin in range(0, len(order), PACKING_WINDOW) for batch in _packed(samples, stage, order, begin)
        ]
    if stage.group_by_modality or stage.group_by_length:
        generator, group = generator_of(seed, epoch), GROUPINGS[stage.grouping]
        sizes = stage.batch_size, world * stage.accumulation
        if stage.group_by_modality:
            lengths = [samples.words(index) for index in order]
            drops = stage.grouping == "stretch"  # as published
            places = modality_grouped(lengths, *sizes, generator, group=group, drop_remainder=drops)
        else:
            lengths = [abs(samples.words(index, WORDS_PER_IMAGE)) for index in order]
            places = group(lengths, *sizes, generator)
        order = [order[place] for place in places]
    return [order[begin : begin + stage.batch_size] for begin in range(0, len(order), stage.batch_size)]


def _streamed(samples: PreparedSamples, stage: Stage, order: list[int]) -> list[list[int]]:
    """Batches of `batch_size` chunks of all samples behind one another."""
    lengths = [samples.length(index) for index in order]
    media = next((index for index, length in zip(order, lengths, strict=True) if length > 0), None)
    if media is not None:
        file, line = samples.dataset.place(media)
        raise RecordError(file, line, "record", "has media, which packing: stream would cut; use packing: true")
    rows = chunks(order, [-length for length in lengths], stage.max_length)
    groups = (rows[begin : begin + stage.batch_size] for begin in range(0, len(rows), stage.batch_size))
    return [[piece for row in group for piece in row] for group in groups]


def _packed(samples: PreparedSamples, stage: Stage, order: list[int], begin: int) -> Iterator[list[int]]:
    """Batches of as many samples as fill `batch_size` rows.

    A batch lists its samples in the order of the epoch. First-fit-decreasing finds the same rows again when the
    collator packs the batch alone: no sample of another row could have taken their room.
    """
    window = order[begin : begin + PACKING_WINDOW]
    rows = first_fit_decreasing([abs(samples.length(index)) for index in window], stage.max_length)
    for first in range(0, len(rows), stage.batch_size):
        places = sorted(place for row in rows[first : first + stage.batch_size] for place in row)
        yield [window[place] for place in places]


def plan_batches(
    samples: PreparedSamples, stage: Stage, seed: int, *, world: int = 1, rank: int = 0
) -> list[list[int]]:
    """The batches of one process for the whole stage, in order.

    Args:
        world, rank: Number of processes and which one this is; batches are dealt in turn.

    Raises:
        UserError: If there is no sample.
    """
    if not len(samples):
        raise UserError(f"stage {stage.name!r}: there is no record to learn from")
    wanted = None if stage.max_steps is None else stage.max_steps * stage.accumulation * world
    batches: list[list[int]] = []
    epoch = 0
    while True:
        own = epoch_batches(samples, stage, seed, epoch, world)
        if not own and not stage.packing:
            said = "grouping: stretch leaves out the last batches of both modalities, and there are no others"
            raise UserError(f"stage {stage.name!r}: {said}; take grouping: megabatch or a smaller batch_size")
        if not own:
            tokens = sum(abs(samples.length(index)) for index in samples.dataset.order(seed, epoch))
            said = f"{tokens} tokens do not fill a chunk of {stage.max_length}"
            raise UserError(f"stage {stage.name!r}: {said}; take a smaller max_length")
        if wanted is None and epoch + 1 >= stage.epochs:
            batches += own[: math.ceil(len(own) * (stage.epochs - epoch))]
            break
        batches += own
        epoch += 1
        if wanted is not None and len(batches) >= wanted:
            batches = batches[:wanted]
            break
    missing = -len(batches) % world
    batches += [batches[place % len(batches)] for place in range(missing)]
    return batches[rank::world]


def global_batch(stage: Stage, world: int) -> Stage:
    """The stage with the accumulation that gives its `global_batch` on `world` processes.

    Raises:
        UserError: If it is not a multiple of what the processes take in one step.
    """
    if stage.global_batch is None:
        return stage
    step = stage.batch_size * world
    if stage.global_batch % step:
        raise UserError(
            f"stages.{stage.name}.global_batch: {stage.global_batch} is not a multiple of "
            f"{stage.batch_size} samples x {world} processes; change batch_size"
        )
    return stage.model_copy(update={"accumulation": stage.global_batch // step, "global_batch": None})


class StageCollator:
    """A `Collator` that also says how many tokens are not padding, and names cached features as such.

    Args:
        pad_token_id, max_length, packing, padding_side: See `llavakit.data.collate.Collator`.
        features: Whether the samples hold encoder features instead of pixels.
        flat: Lay a packed batch into one row that is exactly as long as its samples, without any padding; for
            attention that computes samples one by one (`llavakit.language.packed`).
        placeholder: Of media. If it is given, a flat row holds the tokens with which all samples begin only once, see
            `llavakit.data.collate.common_beginning`; if they are few, they stay where they are.
        stand_ins: Samples by route, see `stand_ins`; a batch gets those of the routes that it does not use.
    """

    def __init__(
        self,
        pad_token_id: int,
        max_length: int | None = None,
        *,
        packing: bool | str = False,
        features: bool = False,
        flat: bool = False,
        placeholder: int | None = None,
        stand_ins: Mapping[tuple[int, ...], Mapping[str, Any]] | None = None,
        padding_side: str = "right",
    ) -> None:
        self.pad_token_id, self.features, self.flat, self.placeholder = pad_token_id, features, flat, placeholder
        self.stand_ins = dict(stand_ins or {})
        self.settings = {"max_length": max_length, "padding_side": padding_side, "packing": bool(packing)}
        self.settings["joined"] = packing == "stream"

    def collate(self, samples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
        """Tokens and media alone, with `pad` at padding."""
        return one_row(samples) if self.flat else Collator(pad, **self.settings)(samples)

    def cut(self, samples: Sequence[Mapping[str, Any]]) -> int:
        """How many first tokens a flat row holds once for all samples."""
        if self.placeholder is None or len(samples) < 2:
            return 0
        length = common_beginning(samples, self.placeholder)
        return length if length >= WORTH_SHARING else 0

    def __call__(self, samples: Sequence[Mapping[str, Any] | Failure]) -> dict[str, Any] | Failure:
        failed = next((sample for sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            return failed
        used = {modality for sample in samples for modality in sample["visual_modalities"]}
        further = [own for modalities, own in self.stand_ins.items() if not used.intersection(modalities)]
        if self.flat:
            cut = self.cut(samples)
            batch = one_row([*samples, *further], [0, *[cut] * (len(samples) - 1), *[0] * len(further)])
        else:
            batch = self.collate([*samples, *further], self.pad_token_id)
        return self.named(batch, samples)

    def named(self, batch: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of samples with their number of tokens, and features under their name."""
        batch["tokens"] = sum(len(sample["input_ids"]) for sample in samples)
        if self.features and "pixel_values" in batch:
            batch["features"] = batch.pop("pixel_values")
        return batch


def sample_index(collator: StageCollator, samples: Sequence[Mapping[str, Any]]) -> Tensor:
    """Which sample is at each position of the batch that a collator makes of samples, -1 at padding.

    For objectives that look at single samples of a packed batch, whose collator has no `placeholder`.
    """
    numbered = [
        {"input_ids": torch.full((len(sample["input_ids"]),), number), "visual_modalities": ()}
        for number, sample in enumerate(samples)
    ]
    return collator.collate(numbered, -1)["input_ids"]


def stand_ins(
    model: LlavakitForConditionalGeneration, *, features: bool = False
) -> dict[tuple[int, ...], dict[str, Any]]:
    """Samples without labels that make every encoder and connector take part in a batch.

    Processes that share a sharded model must gather the same layers in every step. A batch that does not use one of
    the routes (text alone, or images without videos) therefore gets a blank media item that nothing is learned from.

    Args:
        features: Whether samples hold encoder features instead of pixels.

    Returns:
        Samples by the modalities (indices into `MODALITIES`) that go the same way.
    """
    spec = model.model.media
    routes: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for modality, route in spec.routes.items():
        routes.setdefault((route.encoders, route.connector), []).append(modality)
    samples = {}
    for (encoders, _), modalities in routes.items():
        modality = modalities[0]
        configs = [model.config.encoder_config(name)[0] for name in encoders]
        side = getattr(configs[0], "image_size", 336)
        route = spec.route(modality)
        size = route.planner.fitted(MediaSize(1, side, side))
        plan = spec.plan(modality, size)
        ids: list[int] = []
        for run in route.layout(plan):
            ids += [model.config.image_token_id] * run.visual + list(run.ids)
        views: list[Tensor] = []
        kept = features and route.reduces
        if kept:
            views += [torch.zeros(tokens_in(grid), route.widths[0]) for grid in route.reduced_grids(plan)]
        for view, grid in zip(plan.views, route.feature_grids(plan), strict=True) if not kept else ():
            if features:
                views.append(torch.zeros(tokens_in(grid), route.widths[view.encoder]))
                if view.regions:
                    views.append(torch.zeros(len(view.regions), route.region_widths[view.encoder]))
                continue
            channels = getattr(configs[view.encoder], "num_channels", 3)
            deep = view.depth > 1 or route.geometries[view.encoder].volumetric
            depth = (view.depth,) if deep else ()
            views.append(torch.zeros(channels, *depth, view.height, view.width))
        samples[tuple(MODALITIES.index(modality) for modality in modalities)] = {
            "input_ids": torch.tensor(ids),
            "labels": torch.full((len(ids),), IGNORE),
            "pixel_values": views,
            "visual_sizes": [size],
            "visual_modalities": [MODALITIES.index(modality)],
        }
    return samples
