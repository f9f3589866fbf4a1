"""Readers: data files as sequences of raw entries, at random and in little memory.

A file is indexed once (8 bytes per entry and end); entries are read and decoded when they are asked for. Nothing here
knows what an entry means.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.data.mixing import choose
from llavakit.errors import RecordError, UserError


class Source(ABC):
    """A sequence of raw entries.

    Attributes:
        file: Name in messages.
    """

    file: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """The decoded entry.

        Raises:
            RecordError: If it cannot be decoded.
        """

    def line(self, index: int) -> int:
        """Where the entry stands: its line or number, counted from 1."""
        return index + 1


class _Spans(Source):
    """Entries that are stretches of bytes of one file; safe to fork and to pickle."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.file = Path(path), str(path)
        if not self.path.is_file():
            raise UserError(f"{path}: there is no such data file")
        self._descriptor: tuple[int, int] | None = None
        self.begins, self.ends = self._index()

    @abstractmethod
    def _index(self) -> tuple[np.ndarray, np.ndarray]: ...

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Any:
        text = self._read(int(self.begins[index]), int(self.ends[index]))
        try:
            return json.loads(text)
        except ValueError as error:  # also bytes that are not UTF-8
            raise RecordError(self.file, self.line(index), "record", f"not JSON: {error}") from None

    def _read(self, begin: int, end: int) -> bytes:
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            self._descriptor = (os.getpid(), os.open(self.path, os.O_RDONLY))
        return os.pread(self._descriptor[1], end - begin, begin)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None and self._descriptor[0] == os.getpid():
            os.close(self._descriptor[1])


class JsonlSource(_Spans):
    """One JSON object per line; empty lines do not count as entries."""

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        breaks = [np.array([-1])]
        position = 0
        with self.path.open("rb") as stream:
            while block := stream.read(1 << 24):
                breaks.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 0x0A) + position)
                position += len(block)
        ends = np.concatenate([*breaks[1:], [position]]) if position else np.array([], int)
        begins = np.concatenate([[-1], ends[:-1]]) + 1 if position else ends
        keep = [n for n in range(len(begins)) if ends[n] - begins[n] > 2 or self._read(begins[n], ends[n]).strip()]
        self.lines = np.array(keep, int) + 1
        return begins[keep], ends[keep]

    def line(self, index: int) -> int:
        return int(self.lines[index])


# A JSON string as one match, so that brackets inside strings do not count.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)


class JsonSource(_Spans):
    """A JSON list, indexed without decoding it."""

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        begins: list[int] = []
        ends: list[int] = []
        depth = 0
        last = 0  # end of the last entry
        with self.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise UserError(f"{self.path}: is empty; a JSON list of records would be right")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
                for match in _TOKEN.finditer(text):
                    mark = text[match.start()]
                    if mark in b"{[":
                        if depth == 0 and (mark != 0x5B or begins):
                            raise UserError(f"{self.path}: must be a JSON list of records ([...]) or JSON lines")
                        if depth == 1:
                            _stray(text, last, match.start(), begins, ends)
                            begins.append(match.start())
                        depth += 1
                        last = match.end() if depth == 1 else last
                    elif mark in b"}]":
                        depth -= 1
                        if depth == 1:
                            ends.append(match.end())
                            last = match.end()
                        elif depth == 0:
                            _stray(text, last, match.start(), begins, ends)
                            break
                    elif depth == 0:
                        break
                if depth:
                    where = f"in record {len(begins)}" if len(begins) > len(ends) else f"after {len(ends)} records"
                    raise UserError(f"{self.path}: ends {where}; the file is cut off")
                if not last:
                    raise UserError(f"{self.path}: must be a JSON list of records ([...]) or JSON lines")
        return np.array(begins, int), np.array(ends, int)


def _stray(text: Any, begin: int, end: int, begins: list[int], ends: list[int]) -> None:
    """Keep what stands between two entries as an entry, so that it is reported and not lost."""
    between = text[begin:end]
    inner = between.strip(b", \t\r\n")
    if inner:
        offset = begin + between.index(inner)
        begins.append(offset)
        ends.append(offset + len(inner))


class HfSource(Source):
    """A Hugging Face dataset saved on disk (`Dataset.save_to_disk`)."""

    def __init__(self, path: str | Path) -> None:
        try:
            from datasets import Dataset, load_from_disk
        except ImportError as error:
            raise UserError(f"{path}: reading saved datasets needs the package datasets") from error
        self.file = str(path)
        self.table = load_from_disk(str(path))
        if not isinstance(self.table, Dataset):
            raise UserError(
                f"{path}: holds the splits {', '.join(self.table)}; name one, as in {path}/{min(self.table)}"
            )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[int(index)]


class ListSource(Source):
    """Entries that are in memory already."""

    def __init__(self, entries: Sequence[Any], file: str = "<memory>") -> None:
        self.entries, self.file = entries, file

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Any:
        return self.entries[index]


class Selected(Source):
    """A part of a source.

    Args:
        source: Any source.
        strategy: See `llavakit.data.mixing.choose`.
        seed: For "random".
    """

    def __init__(self, source: Source, strategy: str, seed: int = 0) -> None:
        self.source, self.file = source, source.file
        self.indices = np.array(choose(range(len(source)), strategy, random.Random(seed)), int)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.indices[index])]

    def line(self, index: int) -> int:
        return self.source.line(int(self.indices[index]))


def open_source(path: str | Path) -> Source:
    """The source behind a path: `.json`, `.jsonl`, or the folder of a saved dataset.

    A path may end in `#N`, `#N%` (the first so many entries) or `#STRATEGY`.

    Raises:
        UserError: If there is no such file or its kind is unknown.
    """
    name, _, strategy = str(path).partition("#")
    if strategy and ":" not in strategy and strategy != "all":
        strategy = f"first:{strategy}"
    file = Path(name)
    if file.is_dir():
        source: Source = HfSource(file)
    elif file.suffix in (".jsonl", ".ndjson"):
        source = JsonlSource(file)
    elif file.suffix == ".json":
        source = JsonlSource(file) if file.is_file() and _is_lines(file) else JsonSource(file)
    else:
        raise UserError(f"{name}: must be a .json or .jsonl file, or the folder of a saved dataset")
    return Selected(source, strategy) if strategy else source


def _is_lines(file: Path) -> bool:
    """Whether a `.json` file holds one object per line (many evaluation files are named so)."""
    with file.open("rb") as stream:
        return stream.read(4096).lstrip()[:1] == b"{"
