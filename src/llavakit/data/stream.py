"""A stream: several sources, read in shares, shuffled by shard, that goes on at any entry.

Where a reader is takes a few numbers (epoch, shard and entry of every source). What it reads depends on them, the seed
and its share alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llavakit.data.boxes import BoxFile
from llavakit.data.edits import build_edits
from llavakit.data.mixture import SourceSpec, completed, open_spec, read_specs
from llavakit.data.paths import is_stream
from llavakit.data.records import Record, read_record
from llavakit.data.shards import Blocks, Entry, Shards, open_shards
from llavakit.errors import UserError


class RecordStream:
    """Sources of which at least one is a stream; indexed ones are read beside it.

    Args:
        sources: See `llavakit.data.mixture.read_specs`. A source's weight is its share of the entries that are read.
        seed: For `random` sampling strategies of indexed sources.
        read: Makes a checked record of an entry; takes what `llavakit.data.records.read_record` takes.

    Raises:
        UserError: If a source cannot be opened.
    """

    def __init__(self, sources: Any, *, seed: int = 0, read: Callable[..., Record] = read_record) -> None:
        self.read, self.specs = read, read_specs(sources)
        self.sources = [_open(spec, seed) for spec in self.specs]
        self.edits = [build_edits(spec.edits) for spec in self.specs]
        self._boxes = [None if spec.boxes is None else BoxFile(spec.boxes) for spec in self.specs]
        if empty := next((source.file for source in self.sources if not len(source)), None):
            raise UserError(f"{empty}: holds no record")

    @property
    def shards(self) -> int:
        """Shards of all sources."""
        return sum(map(len, self.sources))

    def record(self, entry: Entry) -> Record:
        """The checked record of an entry.

        Raises:
            RecordError: If it is broken.
        """
        if isinstance(entry.raw, Exception):
            raise entry.raw
        root = self.specs[entry.source].media_root
        record = self.read(entry.raw, entry.file, entry.line, media_root=root, needs_answer=True, check_files=True)
        return completed(record, self._boxes[entry.source], self.edits[entry.source])

    def entries(self, source: int, shard: int, skip: int = 0) -> Iterator[Entry]:
        """The entries of a shard of a source."""
        for entry in self.sources[source].read(shard, skip):
            yield Entry(entry.file, entry.line, entry.raw, source)


def _open(spec: SourceSpec, seed: int) -> Shards:
    if not is_stream(spec.path):
        return Blocks(open_spec(spec, seed))
    if spec.sampling_strategy != "all":
        raise UserError(f"{spec.path}: {spec.sampling_strategy}: a stream has no part; name fewer of its shards")
    if not spec.weight:
        raise UserError(f"{spec.path}: weight: must be above 0 beside or in a stream")
    return open_shards(spec.path, split=spec.split, config=spec.config)


class Entries(Sequence[Record]):
    """Entries of a stream as a sequence of records, for `llavakit.data.dataset.SampleDataset`."""

    def __init__(self, stream: RecordStream, entries: Sequence[Entry]) -> None:
        self.stream, self.entries = stream, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        return self.stream.record(self.entries[index])

    def place(self, index: int) -> tuple[str, int]:
        """Shard and number of an entry."""
        return self.entries[index].file, self.entries[index].line

    def same_source(self, index: int) -> list[int]:
        """Numbers of the entries of the source that an entry belongs to; all of them where it is the only one."""
        source = self.entries[index].source
        own = [number for number, entry in enumerate(self.entries) if entry.source == source]
        return own if len(own) > 1 else list(range(len(self.entries)))


class Reader:
    """A share of a stream without end, from any entry on.

    In every epoch of a source its shards are shuffled and dealt to the readers; where there are fewer shards than
    readers, every reader goes through all of them and takes the entries of its own.

    Args:
        stream: What is read.
        seed: Of the order of the shards.
        rank, world: Which share, of how many.
        state: Where to go on, see `state`.
    """

    def __init__(
        self, stream: RecordStream, seed: int, rank: int = 0, world: int = 1, state: Sequence[Mapping[str, int]] = ()
    ) -> None:
        self.stream, self.seed, self.rank, self.world = stream, seed, rank, world
        self._cursors = [
            _Cursor(self, number, dict(state[number]) if state else {}) for number in range(len(stream.sources))
        ]
        self._weights = [spec.weight for spec in stream.specs]

    def state(self) -> list[dict[str, int]]:
        """Epoch, shard of the epoch, entry of the shard and number of entries taken, by source."""
        return [dict(cursor.state) for cursor in self._cursors]

    def take(self, count: int) -> list[Entry]:
        """The next entries, at most `count` of them; a stream of one source gives no entry twice.

        Raises:
            UserError: If a source holds no entry for this share.
        """
        found: list[Entry] = []
        while len(found) < count:
            entry = self._due().next(wrap=len(self._cursors) > 1 or not found)
            if entry is None:
                break
            found.append(entry)
        return found

    def _due(self) -> _Cursor:
        """The source that is furthest behind its weight."""
        if len(self._cursors) == 1:
            return self._cursors[0]
        total = 1 + sum(cursor.state["taken"] for cursor in self._cursors)
        shares = [weight / sum(self._weights) for weight in self._weights]
        behind = [share * total - c.state["taken"] for share, c in zip(shares, self._cursors, strict=True)]
        return self._cursors[behind.index(max(behind))]


class _Cursor:
    """Where a reader is in one source."""

    def __init__(self, reader: Reader, source: int, state: Mapping[str, int]) -> None:
        self.stream, self.source, self.seed = reader.stream, source, reader.seed
        self.rank, self.world = reader.rank, reader.world
        self.state = {"epoch": 0, "shard": 0, "entry": 0, "taken": 0} | dict(state)
        self._open: Iterator[Entry] | None = None
        self._fruitless = 0  # shards since the last entry

    def next(self, *, wrap: bool) -> Entry | None:
        """The next entry; None at the end of an epoch if no other may begin."""
        state, split = self.state, len(self.stream.sources[self.source]) < self.world
        while True:
            if self._open is None:
                own = self._shards()
                if state["shard"] >= len(own):
                    if not wrap:
                        return None
                    state |= {"epoch": state["epoch"] + 1, "shard": 0, "entry": 0}
                    own = self._shards()
                if self._fruitless > len(own):
                    share = f" for process {self.rank + 1} of {self.world}" if self.world > 1 else ""
                    raise UserError(f"{self.stream.sources[self.source].file}: holds no record{share}")
                self._open = self.stream.entries(self.source, own[state["shard"]], state["entry"])
            for entry in self._open:
                number = state["shard"] + state["entry"]
                state["entry"] += 1
                if split and number % self.world != self.rank:
                    continue
                state["taken"] += 1
                self._fruitless = 0
                return entry
            self._open = None
            self._fruitless += 1
            state |= {"shard": state["shard"] + 1, "entry": 0}

    def _shards(self) -> list[int]:
        """The shards of this share in this epoch."""
        count = len(self.stream.sources[self.source])
        order = list(range(count))
        random.Random(f"{self.seed} {self.source} {self.state['epoch']}").shuffle(order)
        return order if count < self.world else order[self.rank :: self.world]
