"""Readers: data files as sequences of raw entries, at random and in little memory.

A file is indexed once (8 bytes per entry and end); entries are read and decoded when they are asked for. Nothing here
knows what an entry means.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.data.mixing import choose
from llavakit.data.paths import split_part
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import RecordError, UserError

Span = tuple[int, int]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
        try:
            self.begins, self.ends = self._index()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None

    @abstractmethod
    def _index(self) -> tuple[np.ndarray, np.ndarray]: ...

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Any:
        text = self._read(int(self.begins[index]), int(self.ends[index]))
        try:
            # values of unused keys may be NaN, which many writers allow
            return parse_json(text, finite=False)
        except JsonError as error:
            raise RecordError(self.file, self.line(index), "record", str(error)) from None

    def _read(self, begin: int, end: int) -> bytes:
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            self._descriptor = (os.getpid(), os.open(self.path, os.O_RDONLY))
        return os.pread(self._descriptor[1], end - begin, begin)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if os is None:  # at the interpreter's end, when modules are gone and files are closed anyway
            return
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
        if keep:
            self._refuse_several_lines(int(begins[keep[0]]), int(ends[keep[0]]))
        return begins[keep], ends[keep]

    def _refuse_several_lines(self, begin: int, end: int) -> None:
        """Refuse a file whose first record spans several lines; every line of it would be a broken record."""
        text = self._read(begin, begin + _LONGEST_RECORD)
        start = len(text) - len(text.removeprefix(BYTE_ORDER_MARK).lstrip())
        close = _closing(text, start) if text[start : start + 1] == b"{" else None
        if close is None or begin + close <= end:
            return
        try:
            parse_json(text[start:close], finite=False)
        except JsonError:
            return  # just a broken line
        raise UserError(
            f"{self.path}: its first record takes several lines; write every record on one line, or make the file a "
            "JSON list ([...])"
        )

    def line(self, index: int) -> int:
        return int(self.lines[index])


def _nested(depth: int) -> bytes:
    """Pattern of a JSON object or list with at most `depth` levels inside; never goes back over what it matched."""
    string = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    inner = rb'[^{}\[\]"]++|' + string + (b"|" + _nested(depth - 1) if depth else b"")
    return rb"(?:\{(?:" + inner + rb")*+\}|\[(?:" + inner + rb")*+\])"


_SPACE = re.compile(rb"[\s,]*")
_BLANK = re.compile(rb"\s*")
_LONGEST_RECORD = 1 << 20  # bytes that are searched for the end of a record which takes several lines
_ENTRY = re.compile(_nested(4), re.DOTALL)
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]', re.DOTALL)
_SCALAR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s,{}\[\]"]+', re.DOTALL)


class JsonSource(_Spans):
    """A JSON list, indexed without decoding it."""

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        with self.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise UserError(f"{self.path}: is empty; a JSON list of records would be right")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
                spans = list(self._entries(text))
        pairs = np.array(spans, int).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _entries(self, text: mmap.mmap) -> Iterator[Span]:
        place = _SPACE.match(text, 3 if text[:3] == BYTE_ORDER_MARK else 0).end()
        if text[place : place + 1] != b"[":
            raise UserError(f"{self.path}: must be a JSON list of records ([...]) or JSON lines")
        place += 1
        count = 0
        while True:
            place = _SPACE.match(text, place).end()
            if text[place : place + 1] == b"]":
                if _BLANK.match(text, place + 1).end() != len(text):
                    raise UserError(
                        f"{self.path}: there is more behind the end of its list of {count} records (byte {place + 1}); "
                        "one file holds one list"
                    )
                return
            entry = _ENTRY.match(text, place) or _SCALAR.match(text, place)
            end = entry.end() if entry else _closing(text, place)
            if end is None:
                raise UserError(f"{self.path}: the file is cut off in or after record {count + 1}")
            yield place, end
            place, count = end, count + 1


def _closing(text: mmap.mmap | bytes, begin: int) -> int | None:
    """End of the object or list that begins here, however deep; None if it does not end."""
    depth = 0
    for match in _TOKEN.finditer(text, begin):
        mark = text[match.start()]
        depth += (mark in b"{[") - (mark in b"}]")
        if depth <= 0:
            return match.end()
    return None


class HfSource(Source):
    """A Hugging Face dataset saved on disk (`Dataset.save_to_disk`)."""

    def __init__(self, path: str | Path) -> None:
        try:
            from datasets import Dataset, load_from_disk
        except ImportError as error:
            raise UserError(f"{path}: reading saved datasets needs the package datasets") from error
        self.file = str(path)
        try:
            self.table = load_from_disk(str(path))
        except Exception as error:  # a library of its own, with exceptions of many classes
            said = " ".join(str(error).split())
            raise UserError(
                f"{path}: not a dataset that save_to_disk wrote ({type(error).__name__}: {said})"
            ) from error
        if not isinstance(self.table, Dataset):
            raise UserError(
                f"{path}: holds the splits {', '.join(self.table)}; name one, as in {path}/{min(self.table)}"
            )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.table[int(index)]
        except Exception as error:  # it decodes pictures, too
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise RecordError(self.file, self.line(index), "record", f"cannot be read ({said})") from error


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

    What a file holds counts, not its suffix: a list, or one object per line. A path may end in `#N`, `#N%` (the first
    N entries) or `#STRATEGY`, see `split_part`.

    Raises:
        UserError: If there is no such file or its kind is unknown.
    """
    name, strategy = split_part(path)
    file = Path(name)
    if file.is_dir():
        source: Source = HfSource(file)
    elif file.suffix in (".jsonl", ".ndjson", ".json"):
        stat = file.stat() if file.is_file() else None
        source = _json_source(file, stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    else:
        raise UserError(f"{name}: must be a .json or .jsonl file, or the folder of a saved dataset")
    return Selected(source, strategy) if strategy else source


@functools.lru_cache(maxsize=8)  # the stages of a recipe share files, and an index takes seconds
def _json_source(file: Path, state: tuple[int, int, int] | None) -> Source:
    first = _first_byte(file) if file.is_file() else b""
    if file.suffix == ".json":
        return JsonlSource(file) if first == b"{" else JsonSource(file)
    if first == b"[":
        with contextlib.suppress(UserError):  # lines that are lists are broken records, one by one
            return JsonSource(file)
    return JsonlSource(file)


def _first_byte(file: Path) -> bytes:
    """The first byte that is not blank; many evaluation files named `.json` hold lines."""
    try:
        with file.open("rb") as stream:
            return stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
