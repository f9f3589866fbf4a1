"""Features of frozen encoders, computed once and kept on disk.

While an encoder is frozen and the plan of every media item is fixed, its output never changes; then training reads
features from a memory map instead of running the encoder in every epoch. The cache lives in a folder named after
everything that decides the features (weights, configuration, planners, precision) and finds a media item by its
content, so that stages, runs and restarts share it. A kill while it is written costs at most the media item
being written. Where a connector begins with a step without weights (`Connector.reduces`), the cache keeps what that
leaves: of a clip of 100 frames under spatio-temporal pooling 0.7 MB instead of 52.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llavakit.connectors.base import Features
from llavakit.conversation.encode import collect_media
from llavakit.data.records import Record, belongs_to, open_media
from llavakit.errors import RecordError, UserError
from llavakit.media.regions import Region
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import read_region_tensor
from llavakit.model.visuals import ViewJob, run_encoders, view_jobs
from llavakit.training.parameter_groups import part_of, public_name
from llavakit.views.plan import Plan

DTYPES = {"float16": torch.float16, "float32": torch.float32}
MEDIA_AT_ONCE = 32

Messages = Sequence[Mapping[str, Any]]
_Opened = tuple[str, str, Plan, list[ViewJob], list[Tensor]]  # key, modality, plan, work and views of a media item


def _digest(*chunks: bytes) -> str:
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()[:32]


def towers_digest(model: LlavakitForConditionalGeneration, processor: LlavakitProcessor, dtype: str) -> str:
    """Name of everything that decides the features of a media item, apart from the media item."""
    config = model.config
    names = config.encoder_names()
    state = hashlib.sha256()
    settings = {name: [str(part) for part in config.encoder_config(name)] for name in names}
    reading = [processor.sampling, processor.reading]
    described = [settings, config.media, reading, dtype]
    reduced = {route.connector for route in processor.spec.routes.values() if route.reduces}
    if reduced:
        described.append([config.connector_options(name) for name in sorted(reduced)])
    state.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name in names:
        for key, tensor in sorted(getattr(model.model, name).state_dict().items()):
            state.update(key.encode())
            state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


class FeatureCache:
    """Encoder features of media on disk.

    Args:
        folder: Cache folder of all runs; a subfolder is used.
        model: Its encoders compute what is missing.
        processor: Opens media and cuts views.
        dtype: "float16" or "float32".
    """

    def __init__(
        self,
        folder: str | Path,
        model: LlavakitForConditionalGeneration,
        processor: LlavakitProcessor,
        dtype: str = "float16",
    ) -> None:
        self.model, self.processor, self.dtype = model, processor, DTYPES[dtype]
        self.folder = Path(folder) / towers_digest(model, processor, dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, tuple[int, list[list[int]]]] = {}
        self._content: dict[tuple[str, int, int], str] = {}
        self._map: np.memmap | None = None
        self.reload()

    @property
    def data(self) -> Path:
        """The file of raw features."""
        return self.folder / "features.bin"

    @property
    def index(self) -> Path:
        """One JSON line per media item: key, offset in bytes, shape of every view."""
        return self.folder / "index.jsonl"

    def reload(self) -> None:
        """Read the index again, after another process has filled the cache."""
        self._map = None
        self._index.clear()
        if not self.index.is_file():
            return
        available = self.data.stat().st_size if self.data.is_file() else 0
        good = 0
        with self.index.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                if entry["offset"] + self._bytes(entry["shapes"]) > available:
                    break
                self._index[entry["key"]] = (entry["offset"], entry["shapes"])
                good += len(line)
        if good < self.index.stat().st_size:  # a kill tore the last line
            os.truncate(self.index, good)

    def _bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        return sum(tokens * width for tokens, width in shapes) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._index)

    def key(self, part: Mapping[str, Any], modality: str) -> str:
        """Key of a media item: its content and the kind that it is treated as."""
        source = part[part["type"]]
        extra = json.dumps({k: v for k, v in part.items() if k not in (part["type"], "type")}, default=str)
        return f"{self._content_of(source)}-{modality}-{_digest(extra.encode())[:8]}"

    def _content_of(self, source: Any) -> str:
        if isinstance(source, (bytes, bytearray)):
            return _digest(bytes(source))
        if isinstance(source, (list, tuple)):  # a video by its frames
            return _digest(*(self._content_of(item).encode() for item in source))
        if isinstance(source, (str, Path)):
            path = Path(source)
            if path.is_dir():  # a DICOM series, or frames
                files = sorted(own for own in path.rglob("*") if own.is_file())
                return _digest(*(f"{own.relative_to(path)}\0{self._content_of(own)}\0".encode() for own in files))
            stat = path.stat()
            seen = (str(path), stat.st_size, stat.st_mtime_ns)
            if seen not in self._content:
                with path.open("rb") as file:
                    self._content[seen] = hashlib.file_digest(file, "sha256").hexdigest()[:32]
            return self._content[seen]
        if isinstance(source, Image.Image):
            looks = (source.mode, source.size, source.getpalette(), source.info.get("transparency"))
            return _digest(repr((*looks, dict(source.getexif()))).encode(), source.tobytes())
        array = np.asarray(source)
        return _digest(f"{array.shape} {array.dtype}".encode(), array.tobytes())

    def _media(
        self, messages: Messages, regions: Sequence[Tensor]
    ) -> Iterator[tuple[str, str, Mapping[str, Any], tuple[Region, ...]]]:
        """Key, modality, content part and selected regions of every media item."""
        parts = collect_media(messages)
        several = sum(part["type"] == "image" for part in parts) > 1
        for part, own in zip(parts, regions or [None] * len(parts), strict=True):
            modality = "multi_image" if several and part["type"] == "image" else part["type"]
            selected = read_region_tensor(own)
            yield self.key(part | {"regions": selected}, modality), modality, part, selected

    def fill(
        self,
        records: Iterable[Record],
        *,
        on_bad: Callable[[RecordError], None] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Compute what is missing for these records.

        Args:
            on_bad: Called with the error of a record whose media cannot be read; such a record ends the work if there
                is nobody to call.
            progress: Called with the number of records seen so far.

        Returns:
            Number of media items that were computed.

        Raises:
            RecordError: Without `on_bad`, at the first record whose media cannot be read.
            UserError: If the disk is full; what was written before stays usable.
        """
        computed = 0
        try:
            with self.data.open("ab") as data, self.index.open("a", encoding="utf-8") as index:
                # a kill may have left features that no line promises
                data.truncate(max((at + self._bytes(shapes) for at, shapes in self._index.values()), default=0))
                data.seek(0, os.SEEK_END)
                missing = self._missing(records, on_bad, progress)
                while group := list(islice(missing, MEDIA_AT_ONCE)):
                    self._compute(group, data, index)
                    computed += len(group)
        except OSError as error:
            raise UserError(f"{self.folder}: features could not be written ({error.strerror or error})") from None
        self._map = None
        return computed

    def _missing(
        self,
        records: Iterable[Record],
        on_bad: Callable[[RecordError], None] | None,
        progress: Callable[[int], None],
    ) -> Iterator[_Opened]:
        seen: set[str] = set()
        for done, record in enumerate(records, start=1):
            try:
                yield from self._missing_of(record, seen)
            except RecordError as error:
                if on_bad is None:
                    raise
                on_bad(error)
            progress(done)

    def _missing_of(self, record: Record, seen: set[str]) -> Iterator[_Opened]:
        spec, processor = self.processor.spec, self.processor
        with belongs_to(record.file, record.line):
            # which regions a model sees may depend on the whole conversation
            regions = processor.encode(record.messages, pixels=False)["visual_regions"] if spec.takes_regions else []
            known = iter(list(self._media(record.messages, regions)))  # in the order in which they are opened

        def read(_: Mapping[str, Any]) -> _Opened | None:
            key, modality, part, selected = next(known)
            if key in self._index or key in seen:
                return None
            item, size = processor.read_media(part)
            plan = spec.plan(modality, size, selected)
            jobs = view_jobs(spec, [modality], [plan])
            return key, modality, plan, jobs, processor.views_of(modality, item, size, selected)

        for _, opened in open_media(record, read):
            if opened is not None:
                seen.add(opened[0])
                yield opened

    @torch.no_grad()
    def _compute(self, media: Sequence[_Opened], data: Any, index: Any) -> None:
        device = self.model.device
        views = [view.to(device) for *_, own in media for view in own]
        jobs = [job for *_, own, _ in media for job in own]
        remaining = iter(run_encoders(self.model.model, views, jobs))
        for key, modality, plan, own, _ in media:
            tensors = list(islice(remaining, sum(1 + bool(job.regions) for job in own)))
            tensors = self._reduced(modality, plan, tensors)
            offset = data.tell()
            for values in tensors:
                data.write(values.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes())
            self._index[key] = (offset, [list(values.shape) for values in tensors])
            data.flush()  # the features first, then the line that promises them
            index.write(json.dumps({"key": key, "offset": offset, "shapes": self._index[key][1]}) + "\n")
            index.flush()

    def _reduced(self, modality: str, plan: Plan, tensors: list[Tensor]) -> list[Tensor]:
        """What the connector's step without weights leaves of the features of a media item, if it has one."""
        route = self.processor.spec.route(modality)
        if not route.reduces:
            return tensors
        features = Features(torch.cat(tensors), route.feature_grids(plan), [0] * len(tensors))
        connector = getattr(self.model.model, route.connector)
        return connector.reduce(features, [plan]).split()

    def __call__(self, messages: Messages, regions: Sequence[Tensor] = ()) -> list[Tensor]:
        """Features of every view of a conversation's media, as views of the memory map.

        Args:
            regions: `visual_regions` of the processed sample.

        Returns:
            [tokens, width] per view; a view with regions is followed by their vectors [regions, width]. Of a media
            item whose connector reduces, one tensor per grid of `Connector.reduced_grids`.
        """
        found: list[Tensor] = []
        for key, modality, part, _ in self._media(messages, regions):
            if key not in self._index:
                raise UserError(
                    f"{part[part['type']]}: changed while training runs; its {modality} features are unknown"
                )
            offset, shapes = self._index[key]
            for tokens, width in shapes:
                found.append(self._view(offset, tokens, width))
                offset += tokens * width * self.dtype.itemsize
        return found

    def _view(self, offset: int, tokens: int, width: int) -> Tensor:
        if self._map is None:
            # copy-on-write: PyTorch wants writable memory, the file must not change
            self._map = np.memmap(self.data, dtype=np.uint8, mode="c")
        raw = self._map[offset : offset + tokens * width * self.dtype.itemsize]
        return torch.from_numpy(raw).view(self.dtype).view(tokens, width)


def cacheable(model: LlavakitForConditionalGeneration) -> bool:
    """Whether all encoders are frozen; of a model with adapters around it as well."""
    names = model.config.encoder_names()
    return not any(p.requires_grad and part_of(public_name(n), names) for n, p in model.named_parameters())
