"""Mixtures: several data sources as one dataset of checked records."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.data.boxes import BoxFile, with_boxes
from llavakit.data.edits import build_edits
from llavakit.data.mixing import mixed_order, published_strategy
from llavakit.data.paths import HUB, is_stream, split_part
from llavakit.data.readers import ListSource, Selected, Source, open_source
from llavakit.data.records import BadRecords, Record, check_media, read_record
from llavakit.errors import RecordError, UserError, quoted
from llavakit.registry import nearest

CHECKS = ("fields", "files", "media")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of a mixture.

    Args:
        path: Data file or folder, see `llavakit.data.readers.open_source`; a YAML file that lists further sources
            (`datasets:`); or a list of entries in memory.
        media_root: Folder that relative media paths start from; default the folder of the data file.
        sampling_strategy: Which entries: "all", "first:N", "end:N", "random:N", with N a number or percentage.
        weight: How often the source is seen per epoch; a fraction takes other entries in every epoch.
        edits: What is done to every conversation, in order; see `llavakit.data.edits`.
        boxes: Box file of the source's pictures, see `llavakit.data.boxes`.
        split, config: Of a Hugging Face dataset in streaming mode, see `llavakit.data.shards`.
    """

    path: Any
    media_root: str | Path | None = None
    sampling_strategy: str = "all"
    weight: float = 1.0
    edits: Sequence[Any] = ()
    boxes: str | Path | None = None
    split: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        wrong = None
        if not isinstance(self.path, (str, Path, Sequence, Source)):
            wrong = f"path: must be a path, not {quoted(self.path)}"
        elif self.media_root is not None and not isinstance(self.media_root, (str, Path)):
            wrong = f"media_root: must be a folder, not {quoted(self.media_root)}"
        elif self.boxes is not None and not isinstance(self.boxes, (str, Path)):
            wrong = f"boxes: must be a box file, not {quoted(self.boxes)}"
        elif not isinstance(self.sampling_strategy, str):
            wrong = f"sampling_strategy: must be all, first:N, end:N or random:N, not {quoted(self.sampling_strategy)}"
        elif isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 <= self.weight <= 1e6:
            wrong = f"weight: must be a number from 0 to a million, not {quoted(self.weight)}"
        if wrong:
            raise UserError(wrong)
        for name in ("split", "config"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise UserError(f"{name}: must be a name, not {quoted(getattr(self, name))}")
        build_edits(self.edits)


_SPELLINGS = {"json_path": "path", "data_path": "path", "image_folder": "media_root"}


def read_specs(entry: Any, *, media_root: str | Path | None = None, where: str = "data") -> list[SourceSpec]:
    """The sources that an entry of a recipe means.

    Args:
        entry: A path, a mapping with the fields of `SourceSpec` (LLaVA's `json_path` and `image_folder` are taken
            too), a spec, or a list of these. A path may name several files as `folder/{a,b}.json`.
        media_root: For sources that bring none.
        where: Name of the entry in messages.

    Raises:
        UserError: If a key is unknown or a file is missing.
    """
    if isinstance(entry, (list, tuple)):
        return [s for n, e in enumerate(entry) for s in read_specs(e, media_root=media_root, where=f"{where}.{n}")]
    if isinstance(entry, (str, Path)):
        entry = {"path": entry}
    if isinstance(entry, Mapping):
        options = {_SPELLINGS.get(key, key): value for key, value in entry.items()}
        known = [field.name for field in fields(SourceSpec)]
        for key in options:
            if key not in known:
                raise UserError(f"{where}: unknown key {quoted(key)}{nearest(str(key), known)}")
        if "path" not in options:
            raise UserError(f"{where}: needs a path")
        try:
            entry = SourceSpec(**({"media_root": media_root} | options))
        except UserError as error:
            raise UserError(f"{where}.{error}") from None
    if not isinstance(entry, SourceSpec):
        raise UserError(f"{where}: must be a path or a mapping with a path, not {quoted(entry)}")
    path = str(entry.path)
    if not isinstance(entry.path, (str, Path)) or is_stream(path):  # a stream expands its pattern itself
        return [entry]
    if path.endswith((".yaml", ".yml")):
        return _read_yaml(Path(path), entry)
    if (braces := re.fullmatch(r"(.*)\{(.*)\}(.*)", path)) and not os.path.lexists(split_part(path)[0]):
        paths = [f"{braces[1]}{name.strip()}{braces[3]}" for name in braces[2].split(",")]
        return [replace(entry, path=name) for name in paths]
    return [entry]


def _read_yaml(path: Path, outer: SourceSpec) -> list[SourceSpec]:
    from llavakit.data.strict_yaml import YamlError, parse_yaml

    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file") from None
    except YamlError as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from None
    if not isinstance(content, Mapping) or not isinstance(content.get("datasets"), list):
        raise UserError(f"{path}: must hold a list named datasets")
    if other := [key for key in content if key != "datasets"]:
        raise UserError(f"{path}: {quoted(other[0])}: unknown key; the file holds a list named datasets")
    if outer.sampling_strategy != "all":
        raise UserError(
            f"{path}: {outer.sampling_strategy}: a part of a list of files; choose it for each of its files"
        )
    specs = []
    for spec in read_specs(content["datasets"], media_root=outer.media_root, where=f"{path}: datasets"):
        name = str(spec.path)
        beside = path.parent / name
        found = name if name.startswith(HUB) or Path(split_part(name)[0]).exists() else beside
        edits = [*spec.edits, *outer.edits]
        strategy = published_strategy(spec.sampling_strategy)
        weight = spec.weight * outer.weight
        specs.append(replace(spec, path=found, weight=weight, edits=edits, sampling_strategy=strategy))
    return specs


class Mixture(Sequence[Record]):
    """Several sources as one sequence of checked records.

    Args:
        sources: See `read_specs`.
        media_root: Folder of media for sources that name none.
        seed: For `random` sampling strategies.
        needs_answer: Whether records without an answer are errors.
        check_files: Whether a missing media file is found when its record is read, or only when it is opened.
        read: Makes a checked record of an entry; takes what `llavakit.data.records.read_record` takes.

    Raises:
        UserError: If a source cannot be opened.
    """

    def __init__(
        self,
        sources: Any,
        *,
        media_root: str | Path | None = None,
        seed: int = 0,
        needs_answer: bool = True,
        check_files: bool = True,
        read: Callable[..., Record] = read_record,
    ) -> None:
        self.read = read
        self.specs = read_specs(sources, media_root=media_root)
        self.needs_answer, self.check_files = needs_answer, check_files
        self.sources = [open_spec(spec, seed) for spec in self.specs]
        self.edits = [build_edits(spec.edits) for spec in self.specs]
        self._boxes = [None if spec.boxes is None else BoxFile(spec.boxes) for spec in self.specs]
        self._kept: list[np.ndarray] = [np.arange(len(source)) for source in self.sources]
        self._count()

    def _count(self) -> None:
        self._starts = [0, *accumulate(len(kept) for kept in self._kept)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        """The checked record.

        Raises:
            RecordError: If it is broken.
        """
        source, entry = self._locate(index)
        return self._read(source, entry)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = bisect_right(self._starts, index) - 1
        return source, int(self._kept[source][index - self._starts[source]])

    def _read(self, number: int, entry: int) -> Record:
        source, boxes = self.sources[number], self._boxes[number]
        record = self.read(
            source[entry],
            source.file,
            source.line(entry),
            media_root=self.specs[number].media_root,
            needs_answer=self.needs_answer,
            check_files=self.check_files,
        )
        return completed(record, boxes, self.edits[number])

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a record."""
        source, entry = self._locate(index)
        return self.sources[source].file, self.sources[source].line(entry)

    def same_source(self, index: int) -> range:
        """Numbers of all records of the source that a record belongs to."""
        source, _ = self._locate(index)
        return range(self._starts[source], self._starts[source + 1])

    def order(self, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
        """Record numbers of an epoch by the sources' weights; depends on nothing else."""
        sizes = [len(kept) for kept in self._kept]
        pairs = mixed_order(sizes, [spec.weight for spec in self.specs], seed=seed, epoch=epoch, shuffle=shuffle)
        return [self._starts[source] + index for source, index in pairs]

    def lengths(self, measure: Callable[[Record], int]) -> list[int]:
        """A measure of every record, for samplers and packers."""
        return [measure(record) for record in self]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def check(self, level: str = "files", *, on_bad_record: str = "stop", bad: BadRecords | None = None) -> BadRecords:
        """Read every record once; broken ones end the run or are left out from now on.

        Args:
            level: "fields" checks the entries, "files" also that their media exist, "media" also opens them.
            on_bad_record: "stop" or "skip".
            bad: List to add to.

        Returns:
            The list of records that were left out.

        Raises:
            RecordError: At the first broken record, with "stop".
            UserError: If no record is left.
        """
        check_choice("level", level, CHECKS)
        check_choice("on_bad_record", on_bad_record, ("stop", "skip"))
        bad = BadRecords() if bad is None else bad
        before, self.check_files = self.check_files, level != "fields"
        kept: list[np.ndarray] = []
        try:
            for number, entries in enumerate(self._kept):
                good = []
                for entry in entries.tolist():
                    try:
                        record = self._read(number, entry)
                        if level == "media":
                            check_media(record)
                        bad.note(record.file, record.line, record.notes)
                        good.append(entry)
                    except RecordError as error:
                        if on_bad_record == "stop":
                            raise
                        bad.add(error)
                kept.append(np.array(good, int))
        finally:
            self.check_files = before
        self._kept = kept
        self._count()
        if not len(self):
            raise UserError(f"no usable record in the data; {bad.report(3)}")
        return bad


def completed(record: Record, boxes: BoxFile | None, edits: Sequence[Callable[[Any], Any]]) -> Record:
    """A record with the boxes of its source, after its edits."""
    record = record if boxes is None else with_boxes(record, boxes)
    for edit in edits:
        record = replace(record, messages=edit(record.messages))
    return record


def open_spec(spec: SourceSpec, seed: int = 0) -> Source:
    """The indexed source of a spec, or the part of it that is wanted.

    Raises:
        UserError: If it cannot be opened, or is a stream.
    """
    if is_stream(spec.path):
        raise UserError(f"{spec.path}: is a stream, which training alone reads; write its records to a .jsonl file")
    if spec.split is not None or spec.config is not None:
        name = "split" if spec.split is not None else "config"
        raise UserError(f"{spec.path}: {name} belongs to a Hugging Face dataset (hf://NAME)")
    if isinstance(spec.path, Source):
        source = spec.path
    else:
        source = open_source(spec.path) if isinstance(spec.path, (str, Path)) else ListSource(spec.path)
    return source if spec.sampling_strategy == "all" else Selected(source, spec.sampling_strategy, seed)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        UserError: Naming those there are.
    """
    if value not in known:
        raise UserError(f"{name}: must be one of {', '.join(known)}, not {value!r}")
