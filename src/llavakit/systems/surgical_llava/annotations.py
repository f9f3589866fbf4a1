"""Annotations of operations: Cholec80's text files, CholecT50's JSON, and segments as the phantom world writes them.

Every file has its own rate, so a label is looked up by time, never by the number of a row: Cholec80 has a phase for
every frame at 25 frames per second and tools once a second. A file whose length fits neither rate is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.errors import RecordError, UserError, quoted
from llavakit.evaluation.records import Record, read_json, read_records, read_text

VIDEO_RATE, TOOL_RATE = 25.0, 1.0  # rows per second of Cholec80's files
SLACK = 1.0  # seconds by which two files of one operation may differ
PHASES = (
    "preparation",
    "calot triangle dissection",
    "clipping cutting",
    "gallbladder dissection",
    "gallbladder packaging",
    "cleaning coagulation",
    "gallbladder retraction",
)
TOOLS = ("grasper", "bipolar", "hook", "scissors", "clipper", "irrigator", "specimen bag")
VERBS = ("grasp", "retract", "dissect", "coagulate", "clip", "cut", "aspirate", "irrigate", "pack")
NULL = ("null verb", "null target")

Bad = Callable[[RecordError], None]
Triplet = tuple[str, str, str]


@dataclass
class Span:
    """A stretch of an operation in which nothing changes that is annotated.

    Attributes:
        start, end: Seconds.
        phase: Empty if it is not annotated.
        triplets: (instrument, verb, target), without null verbs and targets.
        tools: Instruments that are present.
    """

    start: float
    end: float
    phase: str = ""
    triplets: tuple[Triplet, ...] = ()
    tools: tuple[str, ...] = ()

    @property
    def content(self) -> tuple[Any, ...]:
        """What is annotated."""
        return self.phase, self.triplets, self.tools


@dataclass
class Operation:
    """An annotated operation.

    Attributes:
        name: Of the video, without suffix ("video01").
        video: Where its video is, from the folder of videos on; None for a name with a suffix that the user gives.
        spans: In order of time.
        source: The annotation files.
    """

    name: str
    spans: list[Span]
    source: tuple[str, ...]
    video: str | None = None
    line: int = 1


def plain(label: str) -> str:
    """A label in words: `CalotTriangleDissection` and `calot_triangle_dissection` are "calot triangle dissection"."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").lower().split())


def merged(spans: Sequence[Span]) -> list[Span]:
    """Spans with neighbours of the same content as one."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].content == span.content and abs(found[-1].end - span.start) < 1e-6:
            found[-1].end = span.end
        else:
            found.append(Span(span.start, span.end, *span.content))
    return found


# Cholec80


@dataclass
class Rows:
    """The rows of one of Cholec80's files.

    Attributes:
        frames: Number of the frame that each row is about.
        values: Its cells behind that number.
        rate: Rows per second; found by `fit`.
    """

    file: Path
    frames: list[int] = field(default_factory=list)
    values: list[list[str]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rate: float = 0.0

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.rate

    def at(self, second: float) -> list[str]:
        """The cells of the row that is valid at a time; the last ones behind the end."""
        return self.values[min(int(second * self.rate + 1e-6), len(self.values) - 1)]


def read_rows(file: Path, columns: int | None = None) -> Rows:
    """A tab-separated file with a header line and a frame number in front of every row.

    Args:
        columns: Cells of a row without the frame number.

    Raises:
        RecordError: If a line cannot be read.
    """
    lines = read_text(file).split("\n")
    head = lines[0].rstrip("\r").split("\t")
    if not head[0].strip() or head[0].strip().lower() != "frame":
        raise RecordError(str(file), 1, "(header)", f"is {quoted(lines[0])}, it should begin with Frame")
    rows = Rows(file, columns=[plain(name) for name in head[1:]])
    wanted = columns or len(rows.columns)
    for number, line in enumerate(lines[1:], 2):
        cells = line.rstrip("\r").split("\t")
        if cells == [""]:
            continue
        if len(cells) != wanted + 1:
            problem = f"is {quoted(line)}, it should hold a frame number and {wanted} cells between tabs"
            raise RecordError(str(file), number, "(line)", problem)
        if not cells[0].strip().isdecimal():
            raise RecordError(str(file), number, "Frame", f"must be the number of a frame, not {quoted(cells[0])}")
        frame = int(cells[0])
        if rows.frames and frame <= rows.frames[-1]:
            raise RecordError(str(file), number, "Frame", f"{frame} does not follow {rows.frames[-1]}")
        rows.frames.append(frame)
        rows.values.append([cell.strip() for cell in cells[1:]])
    if not rows.frames:
        raise RecordError(str(file), 1, "(header)", "is followed by no row")
    return rows


def fit(rows: Rows, seconds: float | None) -> None:
    """Find the rate of a file: a row for every frame of the video, or one for every second.

    Args:
        seconds: Length of the operation by another file or by the video; None if nothing else says it, and the frame
            numbers decide.

    Raises:
        RecordError: If the length of the file fits neither rate.
    """
    count = len(rows.frames)
    rates = (VIDEO_RATE, TOOL_RATE)
    if seconds is None:
        step = (rows.frames[-1] - rows.frames[0]) / max(count - 1, 1)
        close = [rate for rate in rates if abs(VIDEO_RATE / rate - step) < 0.01 * VIDEO_RATE / rate]
        if count > 1 and not close:
            problem = f"rows are {step:g} frames apart; 1 ({VIDEO_RATE:g} per second) or {VIDEO_RATE:g} would be right"
            raise RecordError(str(rows.file), 2, "Frame", problem)
        rows.rate = close[0] if close else VIDEO_RATE
        return
    fitting = [rate for rate in rates if abs(count / rate - seconds) <= SLACK]
    if not fitting:
        right = " or ".join(f"about {round(seconds * rate):,} rows ({rate:g} per second)" for rate in rates)
        problem = f"has {count:,} rows for {seconds:,.0f} s of video; {right} would be right"
        raise RecordError(str(rows.file), 2, "(rows)", problem)
    rows.rate = fitting[0]


def cholec80(phase_file: Path | None, tool_file: Path | None) -> Operation:
    """An operation of Cholec80 from `videoNN-phase.txt` and `videoNN-tool.txt`, or from one of them.

    Raises:
        RecordError: If a line cannot be read, a phase is unknown, or the files do not belong together.
    """
    phases = None if phase_file is None else read_rows(phase_file, 1)
    tools = None if tool_file is None else read_rows(tool_file)
    if tools is not None:
        for name in tools.columns:
            if name not in TOOLS:
                raise RecordError(str(tool_file), 1, "(header)", f"{quoted(name)} is no instrument of Cholec80")
        fit(tools, None)
    if phases is not None:
        fit(phases, None if tools is None else tools.seconds)
    known = [rows for rows in (phases, tools) if rows is not None]
    spans = []
    for second in range(max(int(min(rows.seconds for rows in known)), 1)):
        phase, present = "", []
        if phases is not None:
            (label,) = phases.at(second)
            phase = plain(label)
            if phase not in PHASES:
                line = int(second * phases.rate) + 2
                raise RecordError(str(phase_file), line, "Phase", f"{quoted(label)} is no phase of Cholec80")
        if tools is not None:
            cells = tools.at(second)
            for name, cell in zip(tools.columns, cells, strict=True):
                if cell not in ("0", "1"):
                    raise RecordError(str(tool_file), second + 2, name, f"must be 0 or 1, not {quoted(cell)}")
            present = [name for name, cell in zip(tools.columns, cells, strict=True) if cell == "1"]
        spans.append(Span(second, second + 1, phase, (), tuple(present)))
    file = known[0].file
    name = re.sub(r"-(phase|tool)$", "", file.stem)
    return Operation(name, merged(spans), tuple(str(rows.file) for rows in known))


# CholecT50

_TRIPLET, _TOOL, _VERB, _TARGET, _PHASE, _LENGTH = 0, 1, 7, 8, 14, 15


def cholect50(file: Path) -> Operation:
    """An operation of CholecT50 from its JSON: `fps`, `categories`, and labels by the number of the frame.

    Raises:
        RecordError: If a field is missing or a label means nothing.
    """
    data = read_json(file)
    record = Record(str(file), 1, data)
    categories, annotations = record.get("categories", dict), record.get("annotations", dict)
    rate = float(record.get("fps", (int, float), 1))
    if not rate > 0:
        raise record.error("fps", f"must be positive, not {quoted(rate)}")
    names = {}
    for kind in ("instrument", "verb", "target", "phase"):
        given = categories.get(kind)
        if not isinstance(given, Mapping):
            raise record.error(f"categories.{kind}", "must be an object from numbers to names")
        names[kind] = {str(number): plain(str(name)) for number, name in given.items()}
    frames = sorted(annotations, key=lambda number: (not str(number).isdecimal(), str(number).zfill(9)))
    spans = []
    for number in frames:
        where = f"annotations.{number}"
        if not number.isdecimal():
            raise record.error(where, "must be the number of a frame")
        labels = annotations[number]
        if not isinstance(labels, list):
            raise record.error(where, "must be a list of labels")
        phase, triplets, tools = "", [], []
        for place, label in enumerate(labels):
            if not isinstance(label, list) or len(label) != _LENGTH:
                raise record.error(f"{where}.{place}", f"must be a list of {_LENGTH} numbers")

            def named(
                kind: str, position: int, label: list[Any] = label, place: int = place, where: str = where
            ) -> str:
                value = label[position]
                if isinstance(value, (int, float)) and value < 0:
                    return ""
                key = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
                if key not in names[kind]:
                    raise record.error(f"{where}.{place}.{position}", f"{quoted(value)} is no {kind}")
                return names[kind][key]

            phase = named("phase", _PHASE) or phase
            tool, verb, target = named("instrument", _TOOL), named("verb", _VERB), named("target", _TARGET)
            if tool:
                tools.append(tool)
            if tool and verb and target and verb not in NULL and target not in NULL:
                triplets.append((tool, verb, target))
        start = int(number) / rate
        spans.append(Span(start, start + 1 / rate, phase, tuple(dict.fromkeys(triplets)), tuple(dict.fromkeys(tools))))
    if not spans:
        raise record.error("annotations", "holds no frame")
    return Operation(file.stem, merged(spans), (str(file),))


# Segments


def segmented(record: Record) -> Operation:
    """An operation of a record with ordered `segments`, on its own or inside the phantom world's `facts`.

    Raises:
        RecordError: If a field is missing or wrong.
    """
    facts, prefix = record.data, ""
    if "segments" not in facts and isinstance(facts.get("facts"), Mapping):
        facts, prefix = facts["facts"], "facts."
    own = Record(record.file, record.line, dict(facts))
    name = record.data.get("id", record.data.get("video"))
    if not isinstance(name, str) or not name:
        raise record.error("id", "is missing; name the operation")
    spans: list[Span] = []
    segments = facts.get("segments")
    if not isinstance(segments, list) or not segments:
        raise record.error(f"{prefix}segments", "must be a list of objects with start, end and phase")
    for place, segment in enumerate(segments):
        where = f"{prefix}segments.{place}"
        if not isinstance(segment, Mapping):
            raise record.error(where, "must be an object with start, end and phase")
        start, end = segment.get("start"), segment.get("end")
        for key, value in (("start", start), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise record.error(f"{where}.{key}", f"must be a number of seconds, not {quoted(value)}")
        if end <= start or (spans and start < spans[-1].end - 1e-6):
            raise record.error(
                f"{where}.start", f"the segment from {start:g} s to {end:g} s is not behind the one before"
            )
        phase = segment.get("phase", "")
        if not isinstance(phase, str):
            raise record.error(f"{where}.phase", f"must be a string, not {quoted(phase)}")
        triplets = segment.get("triplets", [])
        whole = isinstance(triplets, list) and all(
            isinstance(t, list) and len(t) == 3 and all(isinstance(word, str) and word for word in t) for t in triplets
        )
        if not whole:
            raise record.error(f"{where}.triplets", "must be a list of [instrument, verb, target]")
        kept = [tuple(map(plain, t)) for t in triplets]
        kept = [t for t in kept if t[1] not in NULL and t[2] not in NULL]
        tools = segment.get("tools", [])
        if not isinstance(tools, list) or not all(isinstance(tool, str) for tool in tools):
            raise record.error(f"{where}.tools", "must be a list of names")
        tools = [*map(plain, tools), *(plain(t[0]) for t in triplets)]
        spans.append(Span(float(start), float(end), plain(phase), tuple(kept), tuple(dict.fromkeys(tools))))
    own_items = record.data.get("items")
    video = record.data.get("video")
    if video is None and isinstance(own_items, Mapping):
        video = next(
            (item["video"] for item in own_items.values() if isinstance(item, Mapping) and "video" in item), None
        )
    if video is not None and not isinstance(video, str):
        raise own.error("video", f"must be the name of a file, not {quoted(video)}")
    return Operation(name, merged(spans), (record.file,), video, record.line)


def read_operations(source: Path, bad: Bad) -> Iterator[Operation]:
    """The annotated operations of a file or folder, in one of the three forms.

    Args:
        source: A folder of Cholec80 (`*-phase.txt`, `*-tool.txt`, at any depth) or of CholecT50 (`*.json`), one of
            their files, or JSON lines with `segments`.
        bad: Called with the error of an operation that cannot be read, which is then left out.

    Raises:
        UserError: If there is no annotation.
    """

    def attempt(read: Callable[..., Operation], *arguments: Any) -> Iterator[Operation]:
        try:
            yield read(*arguments)
        except RecordError as error:
            bad(error)

    if source.is_file():
        if source.suffix == ".txt":
            is_tool = source.stem.endswith("-tool")
            yield from attempt(cholec80, None if is_tool else source, source if is_tool else None)
        elif source.suffix == ".json" and isinstance(data := read_json(source), Mapping) and "annotations" in data:
            yield from attempt(cholect50, source)
        else:
            for record in read_records(source, bad):
                yield from attempt(segmented, record)
        return
    texts = {re.sub(r"-(phase|tool)$", "", f.stem): {} for f in sorted(source.rglob("*-phase.txt"))}
    texts |= {re.sub(r"-(phase|tool)$", "", f.stem): {} for f in sorted(source.rglob("*-tool.txt"))}
    for kind in ("phase", "tool"):
        for file in sorted(source.rglob(f"*-{kind}.txt")):
            name = file.stem.removesuffix(f"-{kind}")
            if kind in texts[name]:
                raise UserError(f"{file}: {texts[name][kind]} is of the same operation; leave one of them out")
            texts[name][kind] = file
    jsons = [] if texts else sorted(source.rglob("*.json"))
    if not texts and not jsons:
        raise UserError(f"{source}: holds no annotations: no *-phase.txt, *-tool.txt (Cholec80) or *.json (CholecT50)")
    for own in texts.values():
        yield from attempt(cholec80, own.get("phase"), own.get("tool"))
    for file in jsons:
        yield from attempt(cholect50, file)
