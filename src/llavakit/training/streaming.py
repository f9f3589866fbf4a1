"""Samples and batches of a stage that learns from a stream.

A stream cannot be planned as a whole, so it is planned buffer by buffer: `buffer` entries of this process's share are
read, shuffled, and made into batches by the very functions that plan an epoch (`training.dataset.epoch_batches`). A
batch holds its raw entries; what decodes them, this process or a worker of the data loader, changes nothing.

Training goes on at any batch: a state is where the reader was before the buffer, and how many batches of the buffer
were trained. It is part of a checkpoint, one file per process.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from llavakit.checkpoints.files import read_json
from llavakit.data.dataset import SampleDataset
from llavakit.data.packing import Piece
from llavakit.data.records import BadRecords
from llavakit.data.shards import Entry
from llavakit.data.stream import Entries, Reader, RecordStream
from llavakit.errors import RecipeError, RecordError, UserError
from llavakit.training.callbacks import write_json
from llavakit.training.dataset import Failure, Maker, cut_to_piece, epoch_batches, record_words
from llavakit.training.recipe import Stage

SPARES = 16  # entries of every source that go with a batch, in case that one of it proves broken


@dataclass(frozen=True)
class DrawnBatch:
    """The raw entries of a batch.

    Attributes:
        entries: First those of the batch, then spare ones.
        chosen: Numbers of the batch's samples among them, `Piece` where a row holds a part of one.
        seed: Of the choice of spare ones.
    """

    entries: Sequence[Entry]
    chosen: Sequence[int]
    seed: int


class StreamSamples(Dataset):
    """Makes the samples of drawn batches.

    Args:
        stream: What is read.
        maker: Makes samples of records, see `llavakit.training.dataset.Maker`.
        on_bad_record: "stop" or "skip".
        bad: Where broken records are noted.
    """

    def __init__(
        self, stream: RecordStream, maker: Maker, *, on_bad_record: str = "stop", bad: BadRecords | None = None
    ) -> None:
        self.stream, self.maker = stream, maker
        self.on_bad_record, self.bad = on_bad_record, BadRecords() if bad is None else bad

    def dataset(self, entries: Sequence[Entry], seed: int = 0) -> SampleDataset:
        """The samples of some entries; a broken one is replaced by another of them."""
        return SampleDataset(
            Entries(self.stream, entries),
            self.maker.encode,
            on_bad_record=self.on_bad_record,
            bad=self.bad,
            seed=seed,
            check=self.maker.check,
            whole_records=True,
        )

    def __getitems__(self, batch: DrawnBatch) -> list[dict[str, Any] | Failure]:
        """The samples of a batch; in a worker of a data loader a broken record is a `Failure`."""
        dataset = self.dataset(batch.entries, batch.seed)
        try:
            return [_sample(dataset, number) for number in batch.chosen]
        except UserError as error:
            if get_worker_info() is None:
                raise
            return [Failure(error)]


def _sample(dataset: SampleDataset, number: int) -> dict[str, Any]:
    if isinstance(number, Piece):
        return cut_to_piece(dataset[int(number)], number)
    return dataset[number]


class _Buffer:
    """Entries that are planned together, with what planning needs of `PreparedSamples`."""

    def __init__(self, samples: StreamSamples, entries: Sequence[Entry]) -> None:
        self.samples, self.entries = samples, entries
        self.records = samples.dataset(entries)
        self.place, self._lengths = self.records.place, {}
        self._measure = functools.partial(samples.maker.encode, media=False)

    @property
    def dataset(self) -> _Buffer:
        return self

    def kept(self, stage: Stage, seed: int) -> list[int]:
        """Numbers of the entries, in the place of broken ones those of others of their source, if there are any."""
        if stage.packing:
            measure = self._length
        elif stage.group_by_length or stage.group_by_modality:
            measure = self.words
        else:
            measure = self._decoded
        usable = [self._holds(number, measure) for number in range(len(self.entries))]
        draw, sound = random.Random(seed), {}
        for number, entry in enumerate(self.entries):
            if usable[number]:
                sound.setdefault(entry.source, []).append(number)
        chosen = []
        for number, entry in enumerate(self.entries):
            if usable[number]:
                chosen.append(number)
            elif others := sound.get(entry.source):
                chosen.append(draw.choice(others))
        return chosen

    def _holds(self, number: int, measure: Any) -> bool:
        try:
            measure(number)
        except RecordError as error:
            if self.samples.on_bad_record == "stop":
                raise
            self.samples.bad.add(error)
            return False
        return True

    def _decoded(self, number: int) -> None:
        if isinstance(self.entries[number].raw, RecordError):
            raise self.entries[number].raw

    def _length(self, number: int) -> int:
        if number not in self._lengths:
            sample = self.records.made(number, self._measure)
            self._lengths[number] = self.samples.maker.length(sample)
        return self._lengths[number]

    def length(self, number: int) -> int:
        """Length of a sample, negative without media."""
        return number.begin - number.end if isinstance(number, Piece) else self._length(number)

    def words(self, number: int, per_image: int = 0) -> int:
        """Words of a record, negative without media."""
        return record_words(self.records.records[number], per_image)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The chosen entries, shuffled."""
        order = list(self._chosen)
        random.Random(f"{seed} {epoch}").shuffle(order)
        return order

    def plan(self, stage: Stage, seed: int, number: int) -> list[list[int]]:
        """The batches of the buffer with this number."""
        self._chosen = self.kept(stage, number)
        return epoch_batches(self, stage, seed, number, 1) if self._chosen else []


class StreamBatches:
    """The batches of one process, drawn from its share; what a `DataLoader` takes as its batch sampler.

    Args:
        samples: What makes samples of them.
        stage: Has `max_steps`.
        seed: Of the order.
        world, rank: Number of processes and which one this is.
        state: Where to go on, see `state`.

    Raises:
        RecipeError: If the state was left by another number of processes.
    """

    def __init__(
        self,
        samples: StreamSamples,
        stage: Stage,
        seed: int,
        *,
        world: int = 1,
        rank: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        state = state or {"batches": 0, "buffer": 0, "trained": 0, "reader": [], "world": world, "rank": rank}
        if (state["world"], state["rank"]) != (world, rank):
            raise RecipeError(
                f"stages.{stage.name}: its checkpoint was left by {state['world']} processes, each with its share of "
                f"the stream, and goes on with as many; {world} were started"
            )
        self.samples, self.stage, self.world, self.rank = samples, stage, world, rank
        self.seed, self._begin = seed, state
        # Where buffers began, as long as a checkpoint may have to say so: batches before it, its number, the reader.
        self._buffers: deque[tuple[int, int, list[dict[str, int]]]] = deque()

    def __len__(self) -> int:
        """All batches of the stage."""
        return self.stage.max_steps * self.stage.accumulation

    def __iter__(self) -> Iterator[DrawnBatch | None]:
        """Batch after batch; those that were trained before are None, which the trainer passes over."""
        begin = self._begin
        reader = Reader(self.samples.stream, self.seed, self.rank, self.world, begin["reader"])
        done, number, skip = begin["batches"], begin["buffer"], begin["trained"]
        yield from [None] * done
        self._buffers.clear()
        fruitless = 0
        while done < len(self):
            self._buffers.append((done - skip, number, reader.state()))
            batches = self._drawn(reader, number)
            fruitless = 0 if batches else fruitless + 1
            if fruitless > 3:
                why = "no usable record" if self.samples.bad else "its records do not fill a batch"
                raise UserError(f"stage {self.stage.name!r}: {why}; {self.samples.bad.report(3)}")
            for batch in batches[skip : skip + len(self) - done]:
                yield batch
                done += 1
            number, skip = number + 1, 0

    def _drawn(self, reader: Reader, number: int) -> list[DrawnBatch]:
        """The batches of the next buffer."""
        stage = self.stage
        whole = stage.batch_size * stage.accumulation
        entries = reader.take(-(-stage.buffer // whole) * whole)
        # processes shuffle differently, or equally long shards would be seen in step
        batches = _Buffer(self.samples, entries).plan(stage, self.seed * self.world + self.rank, number)
        spares = SPARES if self.samples.on_bad_record == "skip" else 0
        return [_draw(entries, batch, spares, place) for place, batch in enumerate(batches)]

    def state(self, batches: int) -> dict[str, Any]:
        """Where to go on once this many batches of the stage were trained."""
        while len(self._buffers) > 1 and self._buffers[1][0] <= batches:
            self._buffers.popleft()
        before, number, reader = self._buffers[0]
        place = {"batches": batches, "buffer": number, "trained": batches - before, "reader": reader}
        return place | {"world": self.world, "rank": self.rank}

    def save(self, folder: Path, batches: int) -> None:
        """Write the state of this process into a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / state_file(self.rank), self.state(batches))


def state_file(rank: int) -> str:
    """Name of a process's state in a checkpoint."""
    return f"stream_{rank}.json"


def read_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """The state that a process left in a checkpoint; where there were fewer processes that of the first, which says so.

    Raises:
        UserError: If there is none.
    """
    file = checkpoint / state_file(rank)
    return read_json(file if file.is_file() else checkpoint / state_file(0))


def _draw(entries: Sequence[Entry], batch: Sequence[int], spares: int, place: int) -> DrawnBatch:
    """A batch with its entries alone, and spare ones that are not in it: of their sources, or of others instead."""
    numbers = list(dict.fromkeys(map(int, batch)))
    where = {number: at for at, number in enumerate(numbers)}
    chosen = [Piece(where[int(own)], own.begin, own.end) if isinstance(own, Piece) else where[own] for own in batch]
    draw = random.Random(place)
    others = [number for number in range(len(entries)) if number not in where] if spares else []
    for source in dict.fromkeys(entries[number].source for number in where):
        own = [number for number in others if entries[number].source == source] or others
        numbers += draw.sample(own, min(spares, len(own)))
    return DrawnBatch([entries[number] for number in numbers], chosen, place)
