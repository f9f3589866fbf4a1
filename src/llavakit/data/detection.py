"""Box files of a data set, made by a detector: with progress, resume, and broken records as elsewhere.

The source is a file of records or questions (`id`, `question_id` or `index`, and `image`), or pictures themselves,
whose id is the file's name without suffix. Tags are given, or those of the record (`tags`), or taken from its question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llavakit.data.mixture import check_choice
from llavakit.data.readers import open_source
from llavakit.data.records import BadRecords, belongs_to
from llavakit.data.strict_json import JsonError, parse_json, read_json
from llavakit.errors import FieldError, RecordError, UserError, quoted
from llavakit.media import load_image
from llavakit.media.regions import Region
from llavakit.vision.detection import entry, parse_tags, tags_of_question

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
IDS = ("id", "question_id", "index")
Find = Callable[[Any, Sequence[str]], list[Region]]


@dataclass(frozen=True)
class Job:
    """One picture to look at.

    Attributes:
        name: Its id in the box file.
        image: Its file.
        tags: What to look for.
        file, line: Where the record stands, for messages.
    """

    name: str
    image: str
    tags: tuple[str, ...]
    file: str
    line: int


def jobs_of(
    source: str | Path, *, images: str | Path | None = None, tags: str | None = None
) -> Iterator[Job | RecordError | None]:
    """The pictures of a source; None for a record without a picture, an error for a broken one.

    Args:
        source: See the module's docstring.
        images: Folder that relative names of pictures are relative to; default: the folder of the file.
        tags: "dog, red car", for all pictures; default: those of the record, else taken from its question.
    """
    place = Path(source)
    given = None if tags is None else tuple(tag for tag in parse_tags(tags) if tag)
    if place.is_dir() or place.suffix.lower() in PICTURES:
        found = sorted(p for p in place.rglob("*") if p.suffix.lower() in PICTURES) if place.is_dir() else [place]
        if not found:
            raise UserError(f"{place}: holds no picture")
        if not given:
            raise UserError("--tags: is missing; pictures alone have no question to take tags from")
        for number, path in enumerate(found, 1):
            yield Job(path.stem, str(path), given, str(place), number)
        return
    entries = open_source(place)
    root = Path(images) if images is not None else place.parent
    for number in range(len(entries)):
        line = entries.line(number)
        try:
            with belongs_to(entries.file, line):
                yield _job(entries[number], entries.file, line, root, given)
        except RecordError as error:
            yield error


def _job(raw: Any, file: str, line: int, root: Path, given: tuple[str, ...] | None) -> Job | None:
    if not isinstance(raw, Mapping):
        raise FieldError("record", f"must be an object, not {quoted(raw)}")
    image = raw.get("image")
    if image is None:
        return None
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not isinstance(image, str) or not image:
        raise FieldError("image", f"must name one picture, not {quoted(image)}")
    name = next((raw[key] for key in IDS if raw.get(key) is not None), None)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise FieldError("id", f"is missing; a record needs {', '.join(IDS[:-1])} or {IDS[-1]}")
    tags = given or _own_tags(raw)
    if not tags:
        raise FieldError("tags", "are missing, and the question names nothing to look for; give tags")
    return Job(str(name), str(root / image), tuple(tags), file, line)


def _own_tags(raw: Mapping[str, Any]) -> tuple[str, ...]:
    own = raw.get("tags")
    if isinstance(own, str):
        return tuple(tag for tag in parse_tags(own) if tag)
    if isinstance(own, list) and all(isinstance(tag, str) for tag in own):
        return tuple(tag.strip().lower() for tag in own if tag.strip())
    if own is not None:
        raise FieldError("tags", f"must be a list of strings, or one string, not {quoted(own)}")
    question = raw.get("text", raw.get("question"))
    turns = raw.get("conversations")
    if question is None and isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        question = turns[0].get("value")
    return tuple(tags_of_question(question)) if isinstance(question, str) else ()


def write_boxes(
    jobs: Iterator[Job | RecordError | None],
    find: Find,
    output: str | Path,
    *,
    settings: Mapping[str, Any],
    total: int | None = None,
    on_bad_record: str = "stop",
    console: Console | None = None,
) -> dict[str, Any]:
    """Look at every picture and append its boxes to a file of JSON lines; an interrupted run is continued.

    Args:
        find: Gives the regions of a picture for tags, such as `llavakit.vision.detection.Detector`.
        output: The box file, `.jsonl`.
        settings: What decides the boxes (detector, threshold, tags); kept beside the file, so that boxes made in
            another way are never mixed in.
        total: Number of records, for the progress bar.
        on_bad_record: "stop" or "skip".

    Returns:
        `found` (pictures looked at now), `kept` (from before), `without` (records without a picture), and `bad`.

    Raises:
        UserError: If the file was made with other settings.
        RecordError: At a broken record, with "stop".
    """
    check_choice("on_bad_record", on_bad_record, ("stop", "skip"))
    path = Path(output)
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: boxes are written as JSON lines; name a file that ends in .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _resume(path, dict(settings))
    kept, seen, bad = len(done), {}, BadRecords()
    counts = {"found": 0, "without": 0}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = console or Console(stderr=True)
    with path.open("a", encoding="utf-8") as stream, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("detecting", total=total)
        for job in jobs:
            progress.advance(bar)
            if job is None:
                counts["without"] += 1
                continue
            try:
                if isinstance(job, RecordError):
                    raise job
                if _again(job, seen) or job.name in done:
                    continue
                with belongs_to(job.file, job.line, "image"):
                    regions = find(load_image(job.image), job.tags)
            except RecordError as error:
                if on_bad_record == "stop":
                    raise
                bad.add(error)
                continue
            stream.write(json.dumps(entry(job.name, regions), ensure_ascii=False) + "\n")
            stream.flush()
            counts["found"] += 1
    return {**counts, "kept": kept, "bad": bad}


def _again(job: Job, seen: dict[str, Job]) -> bool:
    """Whether a picture was met before under this id.

    Raises:
        RecordError: If it was another one.
    """
    before = seen.setdefault(job.name, job)
    if before is job:
        return False
    if before.image != job.image:
        problem = f"{quoted(job.name)} is also that of line {before.line}, which shows another picture"
        raise RecordError(job.file, job.line, "id", problem)
    return True


def _resume(path: Path, settings: dict[str, Any]) -> set[str]:
    """Ids that the file holds already; a line that a kill tore is taken off.

    Raises:
        UserError: If the file was made with other settings.
    """
    stamp = path.with_name(f"{path.name}.settings.json")
    settings = json.loads(json.dumps(settings))
    if path.exists() and path.stat().st_size:
        before = read_json(stamp, error=UserError) if stamp.exists() else None
        if before != settings:
            changed = "settings" if before is None else next(k for k in settings if before.get(k) != settings[k])
            raise UserError(f"{path}: was made with other {changed}; name another file, or remove this one")
    else:
        stamp.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return set()
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        os.truncate(path, end)
    done = set()
    for number, line in enumerate(whole[:end].splitlines(), 1):
        try:
            done.add(str(parse_json(line)["id"]))
        except (JsonError, KeyError, TypeError):
            raise RecordError(str(path), number, "entry", "is no entry of a box file") from None
    return done
