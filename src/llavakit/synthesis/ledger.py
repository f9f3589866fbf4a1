"""What a run has done, on disk as it is done, so that it can be killed at any moment and goes on.

Beside `out.jsonl` are, while it is made, `out.partial.jsonl` (records as they come) and `out.journal.jsonl` (what the
run is, then a line per item: what became of it and where its records end). Records are written before their line, and
what no line accounts for is cut off, so none is lost and none is there twice. At the end the records are put in order
of the items into `out.jsonl`, items without any into `out.refused.jsonl`, and what was done into `out.run.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import UserError
from llavakit.synthesis.work import Done

OUTCOMES = ("open", "made", "refused", "bad", "failed")
_SYNC = 1.0  # seconds between two times that the disk is waited for
_BLOCK = 1 << 20


class Ledger:
    """The state of a run.

    Args:
        output: `.jsonl` or `.json`.
        identity: What decides the output.
        total: Number of items.

    Attributes:
        finished: What the run did, if the output is there already; else None.
        cost: What the run has cost so far, earlier calls of the command included.

    Raises:
        UserError: If the output, or what is beside it, belongs to another run, or a run is writing it now.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], total: int) -> None:
        if output.suffix not in (".jsonl", ".json"):
            raise UserError(f"{output}: the output must be a .jsonl or .json file")
        self.output, self.identity = output, json.loads(json.dumps(identity))
        self.states = np.zeros(total, np.uint8)
        self.begins, self.ends = np.zeros(total, np.int64), np.zeros(total, np.int64)
        self.counts = np.zeros(total, np.int32)
        self.finished: dict[str, Any] | None = None
        self.cost = 0.0
        self._synced = time.monotonic()
        output.parent.mkdir(parents=True, exist_ok=True)
        journal = self.beside("journal.jsonl")
        if not journal.exists() and output.exists():
            self.finished = self._finished()
            return
        self._journal = journal.open("a+b", buffering=0)
        try:
            _lock(self._journal, output)
            self._records = self.beside("partial.jsonl").open("a+b", buffering=0)
            self._resume()
        except BaseException:
            self._journal.close()
            raise

    def beside(self, name: str) -> Path:
        """A file beside the output."""
        return self.output.with_name(f"{self.output.stem}.{name}")

    def _finished(self) -> dict[str, Any]:
        """What an earlier run of the same kind did."""
        try:
            found = parse_json(self.beside("run.json").read_bytes())
        except (OSError, JsonError):
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("done"), dict):
            raise UserError(f"{self.output}: exists and was not written by this command; choose another output")
        self._compare(found.get("run"), self.output)
        return found["done"]

    def _compare(self, before: Any, file: Path) -> None:
        before = before if isinstance(before, dict) else {}
        if differs := [name for name in self.identity if before.get(name) != self.identity[name]]:
            raise UserError(f"{file}: belongs to a run with other {', '.join(differs)}; choose another output")

    def _resume(self) -> None:
        """Read what is done, and cut off what a kill left half-written."""
        size, good, position = os.fstat(self._records.fileno()).st_size, 0, 0
        with self.beside("journal.jsonl").open("rb") as lines:
            head = lines.readline()
            if head.endswith(b"\n"):
                self._compare(_object(head).get("run"), self.beside("journal.jsonl"))
                good = len(head)
                for line in lines:
                    entry = _object(line) if line.endswith(b"\n") else {}
                    number, end = entry.get("item"), entry.get("end")
                    if isinstance(entry.get("cost"), float):
                        self.cost = entry["cost"]
                        if number is None:
                            good += len(line)
                            continue
                    if not isinstance(number, int) or not isinstance(end, int) or not position <= end <= size:
                        break  # cut short by a kill, or its records are
                    self._note(number, entry.get("outcome"), position, end, entry.get("records", 0))
                    good, position = good + len(line), end
        os.ftruncate(self._journal.fileno(), good)
        os.ftruncate(self._records.fileno(), position)
        self._position = position
        if not good:
            self._journal.write(_line({"run": self.identity}))

    def _note(self, number: int, outcome: Any, begin: int, end: int, count: int) -> None:
        if not 0 <= number < len(self.states) or outcome not in OUTCOMES:
            raise UserError(
                f"{self.beside('journal.jsonl')}: is not this command's; remove it or choose another output"
            )
        self.states[number] = OUTCOMES.index(outcome)
        self.begins[number], self.ends[number], self.counts[number] = begin, end, count

    def todo(self) -> np.ndarray:
        """Numbers of the items that have no outcome yet, or whose calls failed; in order."""
        return np.flatnonzero((self.states == 0) | (self.states == OUTCOMES.index("failed")))

    def paid(self, cost: float) -> None:
        """Note what the run has cost so far."""
        if cost > self.cost:
            self.cost = cost
            _write(self._journal, _line({"cost": float(cost)}))

    def append(self, done: Sequence[Done], cost: float = 0.0) -> None:
        """Note what became of some items, and what the run has cost so far."""
        position, notes = self._position, []
        for one in done:
            end = position + len(one.lines)
            self._note(one.number, one.outcome, position, end, one.count)
            entry = {"item": one.number, "outcome": one.outcome, "records": one.count, "end": end}
            if one.reason is not None:
                entry |= {"line": one.line, "id": one.name, "reason": one.reason}
            notes.append(_line(entry))
            position = end
        _write(self._records, b"".join(one.lines for one in done))
        _write(self._journal, b"".join(notes))
        self._position = position
        self.paid(cost)
        if time.monotonic() - self._synced > _SYNC:
            self.sync()

    def sync(self) -> None:
        """Wait for the disk, records first."""
        os.fsync(self._records.fileno())
        os.fsync(self._journal.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        if self.finished is None:
            for file in (self._records, self._journal):
                with contextlib.suppress(OSError):
                    file.close()

    def summary(self) -> dict[str, int]:
        """Items by outcome, and records."""
        found = {name: int((self.states == place).sum()) for place, name in enumerate(OUTCOMES) if place > 1}
        return {"items": len(self.states), "records": int(self.counts.sum()), **found}

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Write the output; with failed items left, what the next run needs stays.

        Args:
            more: What to keep beside the counts.
        """
        self.sync()
        found = {**self.summary(), **more}
        self._write_refused()
        with _replacing(self.output) as file:
            self._write_records(file)
        if not found["failed"]:
            with _replacing(self.beside("run.json")) as file:
                file.write(json.dumps({"run": self.identity, "done": found}, indent=2, ensure_ascii=False).encode())
                file.write(b"\n")
            self.beside("partial.jsonl").unlink()
            self.beside("journal.jsonl").unlink()
        return found

    def _write_refused(self) -> None:
        left_out = np.isin(self.states, [OUTCOMES.index(name) for name in ("refused", "bad", "failed")])
        if not left_out.any():
            self.beside("refused.jsonl").unlink(missing_ok=True)
            return
        last: dict[int, dict[str, Any]] = {}
        with self.beside("journal.jsonl").open("rb") as lines:
            lines.readline()
            for line in lines:
                entry = _object(line)
                if "item" in entry and left_out[entry["item"]]:
                    last[entry["item"]] = {name: entry[name] for name in ("line", "id", "outcome", "reason")}
        with _replacing(self.beside("refused.jsonl")) as file:
            for number in sorted(last):
                file.write(_line(last[number]))

    def _write_records(self, file: BinaryIO) -> None:
        """The records in order of the items."""
        if self.output.suffix == ".jsonl":
            for begin, end in self._stretches():
                self._copy(begin, end, file)
            return
        file.write(b"[")
        before = b"\n"
        for begin, end in zip(self.begins, self.ends, strict=True):
            for line in os.pread(self._records.fileno(), int(end - begin), int(begin)).split(b"\n")[:-1]:
                file.write(before + line)
                before = b",\n"
        file.write(b"\n]\n")

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """Stretches of bytes, items that follow one another together."""
        start = stop = 0
        for begin, end in zip(self.begins.tolist(), self.ends.tolist(), strict=True):
            if begin == end:
                continue
            if begin != stop:
                yield start, stop
                start = begin
            stop = end
        yield start, stop

    def _copy(self, begin: int, end: int, file: BinaryIO) -> None:
        while begin < end:
            block = os.pread(self._records.fileno(), min(_BLOCK, end - begin), begin)
            file.write(block)
            begin += len(block)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: BinaryIO, data: bytes) -> None:
    """All of it: an unbuffered file may take less at once."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _lock(file: BinaryIO, output: Path) -> None:
    """Keep a second run away from the same output; the lock goes with the process."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{output}: another run is writing it now") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all."""
    scratch = path.with_name(f"{path.name}.tmp")
    with scratch.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
