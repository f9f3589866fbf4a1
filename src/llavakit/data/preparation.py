"""Preparations: annotations and other people's files to training records, by name.

    prepare("video_instruct", "VideoInstruct100K.json", "train.json", suffix=".mp4")

A preparation is a function in `llavakit.registry.PREPARATIONS`, put there by a system's card:

    def name(source: Path, output: Path, bad: Left, *, option: int = 1) -> dict[str, Any]

It reads `source`, writes `output`, hands broken records to `bad`, and returns counts. One that asks a model keeps what
it was answered beside the output, so that the same call goes on after a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llavakit.data.records import BadRecords
from llavakit.errors import RecordError, UserError
from llavakit.registry import PREPARATIONS


class Left:
    """Where a preparation hands broken records: the first ends the work, or all are left out and reported.

    Args:
        on_bad_record: "stop" or "skip".

    Raises:
        UserError: If it is neither.
    """

    def __init__(self, on_bad_record: str = "stop") -> None:
        if on_bad_record not in ("stop", "skip"):
            raise UserError(f"on_bad_record: must be stop or skip, not {on_bad_record!r}")
        self.stops, self.bad = on_bad_record == "stop", BadRecords()

    def __call__(self, error: RecordError) -> None:
        """Note a broken record.

        Raises:
            RecordError: If broken records end the work.
        """
        if self.stops:
            raise error
        self.bad.add(error)


def prepare(
    name: str, source: str | Path, output: str | Path, *, on_bad_record: str = "stop", **options: Any
) -> dict[str, Any]:
    """Run a preparation.

    Args:
        name: Its registered name.
        source: What it reads.
        output: What it writes.
        on_bad_record: "stop" or "skip".
        options: Its own.

    Returns:
        Its counts, with `left_out`: one line per record that was left out.

    Raises:
        UserError: For an unknown name or option, and for what is wrong with `source`.
        RecordError: At the first broken record, unless they are skipped.
    """
    from llavakit.evaluation.score import checked

    function, left = PREPARATIONS.get(name), Left(on_bad_record)
    if not Path(source).exists():
        raise UserError(f"{source}: there is no such file or folder")
    counts = function(Path(source), Path(output), left, **checked(function, options, name))
    return {**counts, "left_out": [str(error) for error in left.bad.errors()]}


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records, one JSON object a line for a name ending in `.jsonl`, else as a list; whole or not at all.

    Returns:
        How many.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch, count = path.with_name(f"{path.name}.tmp"), 0
    lines = path.suffix == ".jsonl"
    with scratch.open("w", encoding="utf-8") as file:
        file.write("" if lines else "[")
        for record in records:
            file.write(("" if lines or not count else ",\n") + json.dumps(record, ensure_ascii=False))
            file.write("\n" if lines else "")
            count += 1
        file.write("" if lines else "]\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    return count
