"""Shards: data that is too large for an index and is read from front to back.

A source is a list of shards, and a shard gives its entries in order, from any of them on: a tar file in WebDataset's
form (`llavakit.data.webdataset`), a row group of a Parquet file, a shard of a Hugging Face dataset in streaming mode.
`Blocks` reads an indexed source likewise. Nothing is opened before it is read, and nothing here knows what an entry
means.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.data.paths import HUB, expand, split_part
from llavakit.data.readers import Source
from llavakit.errors import RecordError, UserError

ROWS = 64  # rows of a Parquet file, or entries of an indexed source, that are in memory at a time
BLOCK = 1024  # entries of an indexed source that count as a shard
_BUFFER = 1 << 20  # bytes that are read of a column at a time


@dataclass(frozen=True, slots=True)
class Entry:
    """A raw entry of a shard.

    Attributes:
        file: Its shard, for messages.
        line: Its number in the shard, from 1.
        raw: The decoded entry, or the error of one that cannot be decoded.
        source: Number of its source in a stream of several.
    """

    file: str
    line: int
    raw: Any
    source: int = 0


class Shards(ABC):
    """A source that is read shard by shard.

    Attributes:
        file: Name in messages.
    """

    file: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of shards."""

    @abstractmethod
    def read(self, shard: int, skip: int = 0) -> Iterator[Entry]:
        """The entries of a shard behind the first `skip`; one that cannot be read is an entry with its error."""

    @abstractmethod
    def identity(self) -> Any:
        """What tells the data from other data, as JSON: names and sizes, no contents."""


def unreadable(file: str, line: int, error: Exception) -> Entry:
    """The entry at which reading a shard failed."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    problem = f"the shard cannot be read from here on ({said})"
    return Entry(file, line, RecordError(file, line, "record", problem))


class ShardFiles(Shards):
    """Files as shards.

    Raises:
        UserError: If one of them is missing.
    """

    def __init__(self, pattern: str) -> None:
        self.file = pattern
        try:
            self.paths = expand(pattern)
        except ValueError as error:
            raise UserError(f"{pattern}: {error}") from None
        if not self.paths:
            raise UserError(f"{pattern}: there is no such file")
        missing = next((path for path in self.paths if not Path(path).is_file()), None)
        if missing is not None:
            raise UserError(f"{pattern}: there is no file {missing!r}")

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> Any:
        return [[Path(path).name, Path(path).stat().st_size] for path in self.paths]


class ParquetShards(ShardFiles):
    """Row groups of Parquet files; rows are entries, pictures `{"bytes", "path"}` or bytes."""

    def __init__(self, pattern: str) -> None:
        try:
            from pyarrow.parquet import read_metadata
        except ImportError as error:
            raise UserError(f"{pattern}: Parquet files need pyarrow: pip install 'llavakit[train]'") from error
        super().__init__(pattern)
        self.groups: list[tuple[str, int, int]] = []  # file, row group, rows before it
        for path in self.paths:
            try:
                metadata = read_metadata(path)
            except Exception as error:  # a library of its own, with exceptions of many classes
                raise UserError(f"{path}: not a Parquet file ({' '.join(str(error).split())})") from error
            before = 0
            for number in range(metadata.num_row_groups):
                self.groups.append((path, number, before))
                before += metadata.row_group(number).num_rows

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, shard: int, skip: int = 0) -> Iterator[Entry]:
        from pyarrow.parquet import ParquetFile

        path, group, before = self.groups[shard]
        seen = 0
        try:
            with ParquetFile(path, buffer_size=_BUFFER) as file:
                for batch in file.iter_batches(ROWS, row_groups=[group], use_threads=False):
                    rows = batch.slice(max(0, skip - seen)).to_pylist()
                    seen += batch.num_rows
                    for number, row in enumerate(rows, seen - len(rows) + 1):
                        yield Entry(path, before + number, row)
        except Exception as error:
            if seen >= skip:
                yield unreadable(path, before + seen + 1, error)


class HubShards(Shards):
    """A Hugging Face dataset in streaming mode: of the hub, or a folder of files that `load_dataset` reads.

    Args:
        path: `hf://NAME` or `hf://NAME@REVISION`; NAME may be a local folder.
        split, config: Which part of it.

    Raises:
        UserError: If it cannot be opened.
    """

    def __init__(self, path: str, split: str = "train", config: str | None = None) -> None:
        name = path.removeprefix(HUB)
        self.file, self.split = path, split
        self.folder = Path(name) if Path(name).is_dir() else None
        self.table = _hub_table(path, name if self.folder is not None else "", split, config)
        self.count = self.table.num_shards

    def __len__(self) -> int:
        return self.count

    def read(self, shard: int, skip: int = 0) -> Iterator[Entry]:
        file = f"{self.file} ({self.split}, shard {shard + 1} of {self.count})"
        line = skip
        try:
            for row in self.table.shard(self.count, shard).skip(skip):
                line += 1
                yield Entry(file, line, row)
        except Exception as error:
            yield unreadable(file, line + 1, error)

    def identity(self) -> Any:
        if self.folder is not None:
            files = sorted(file for file in self.folder.rglob("*") if file.is_file())
            return [self.split, [[str(file.relative_to(self.folder)), file.stat().st_size] for file in files]]
        return [self.split, self.count, str(self.table.features), str(self.table.info.version)]


@functools.lru_cache(maxsize=8)  # check and stages of a recipe share it, and asking the hub takes seconds
def _hub_table(path: str, folder: str, split: str, config: str | None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{path}: needs the package datasets: pip install 'llavakit[train]'") from error
    name, _, revision = path.removeprefix(HUB).partition("@")
    options = {"split": split, "streaming": True, "revision": None if folder else revision or None}
    try:
        return load_dataset(folder or name, config, **options).decode(False)
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: the split {split!r} cannot be streamed ({said})") from error


class Blocks(Shards):
    """An indexed source as blocks of consecutive entries, beside streams."""

    def __init__(self, source: Source) -> None:
        self.source, self.file = source, source.file

    def __len__(self) -> int:
        return -(-len(self.source) // BLOCK)

    def read(self, shard: int, skip: int = 0) -> Iterator[Entry]:
        end = min((shard + 1) * BLOCK, len(self.source))
        for index in range(shard * BLOCK + skip, end):
            try:
                raw = self.source[index]
            except RecordError as error:
                raw = error
            yield Entry(self.file, self.source.line(index), raw)

    def identity(self) -> Any:
        return len(self.source)


def open_shards(path: str | Path, *, split: str | None = None, config: str | None = None) -> Shards:
    """The shards behind a path for which `llavakit.data.paths.is_stream` holds.

    Raises:
        UserError: If there are none, or a key does not belong to their kind.
    """
    name, part = split_part(path)
    if part:
        raise UserError(f"{path}: a stream has no part; name fewer of its shards")
    if name.startswith(HUB):
        return HubShards(name, split or "train", config)
    for key, value in (("split", split), ("config", config)):
        if value is not None:
            raise UserError(f"{path}: {key} belongs to a Hugging Face dataset (hf://NAME)")
    if name.lower().endswith(".parquet"):
        return ParquetShards(name)
    from llavakit.data.webdataset import TarShards

    return TarShards(name)
