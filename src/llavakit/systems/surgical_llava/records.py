"""Video-ChatGPT's instruction files (`q`, `a`, `video_id`) as training records."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.records import Record, read_records


def training_record(record: Record, number: int, suffix: str = ".pkl") -> dict[str, Any]:
    """An instruction as a training record: the clip after the question of even numbers, before that of odd ones.

    Args:
        number: Place of the record in its file, counted from 0.
        suffix: What the name of a clip ends with.

    Raises:
        RecordError: If a field is missing or no text.
    """
    question, answer, video = (record.get(field, str) for field in ("q", "a", "video_id"))
    asked = f"{question}\n<video>" if number % 2 == 0 else f"<video>\n{question}"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": video, "video": f"{video}{suffix}", "conversations": turns}


def training_records(
    records: Iterable[Record], available: Collection[str] | None = None, suffix: str = ".pkl", bad: Any = None
) -> Iterator[dict[str, Any]]:
    """The training records of instructions; numbers count those that are left out too.

    Args:
        available: Ids of the videos to keep; None keeps all.
        bad: Called with the error of a broken record, which is then left out.
    """
    for number, record in enumerate(records):
        try:
            made = training_record(record, number, suffix)
        except RecordError as error:
            if bad is None:
                raise
            bad(error)
            continue
        if available is None or made["id"] in available:
            yield made


def video_instruct(
    source: Path, output: Path, bad: Left, *, suffix: str = ".pkl", videos: Path | None = None
) -> dict[str, Any]:
    """Preparation of VideoInstruct-100K and files like it.

    Args:
        suffix: What the name of a clip ends with; ".pkl" as published.
        videos: Folder of the clips; records of others are left out.

    Raises:
        UserError: If the folder holds no file with the suffix.
    """
    available = None
    if videos is not None:
        if not videos.is_dir():
            raise UserError(f"videos: {videos} is no folder")
        available = {file.name.removesuffix(suffix) for file in videos.iterdir() if file.name.endswith(suffix)}
        if not available:
            raise UserError(f"videos: {videos} holds no file whose name ends with {suffix!r}")
    records = read_records(source, bad)
    return {"records": write_records(output, training_records(records, available, suffix, bad)), "read": len(records)}
