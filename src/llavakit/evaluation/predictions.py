"""The predictions file of a run: one line per answer, and what the answers belong to.

A line is an answer of one run to one question. `run` is the digest of what decides answers (weights, dtype, template,
decoding: `llavakit.generation.identity`), `asked` that of the question's text and of the content of its media. Paths
are in neither, so a run can be resumed under another path, and a model that was retrained in place is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.checkpoints.identity import file_identity
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.records import Record, read_records

if TYPE_CHECKING:
    from llavakit.generation.responder import Answer

Key = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """What the answers of a run belong to.

    Args:
        name: Name of the model, stored with every line for people.
        digest: Digest of `identity`.
        identity: What decides the answers, by content.
        place: Where the model is, if it has a place: a file that is not of this run but of the same place is set aside.
    """

    name: str
    digest: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    place: str | None = None


def description_of(path: Path) -> dict[str, Any]:
    """What `NAME.run.json` says of a predictions file; nothing where there is none."""
    try:
        found = parse_json(path.with_suffix(".run.json").read_bytes())
    except (OSError, JsonError):
        return {}
    return found if isinstance(found, dict) else {}


def question_key(question_id: Any, stored: Mapping[str, Any]) -> Key:
    """What identifies a question: its id, and where ids repeat (rounds, two questions per image) its prompt."""
    return str(question_id), str(stored.get("prompt", "")) + str(stored.get("round_id", ""))


def asked_digest(question: Question) -> str:
    """Digest of what a question shows the model: its texts, and the content of its media."""
    digest = hashlib.sha256()
    for message in question.turns():
        for part in message["content"]:
            value = part if part["type"] == "boxes" else part.get("text")
            value = _content(part[part["type"]]) if value is None else value
            span = [[name, part[name]] for name in ("start", "end") if part.get(name) is not None]
            digest.update(json.dumps([message["role"], part["type"], value, *span]).encode())
    for reply in question.replies:
        digest.update(json.dumps(["reply", reply]).encode())
    return digest.hexdigest()[:16]


def media_digest(question: Question) -> str:
    """Digest of the content of a question's media, which is the same for all questions about them."""
    items = [part[part["type"]] for part in question.media if part["type"] != "boxes"]
    return hashlib.sha256(" ".join(map(_content, items)).encode()).hexdigest()[:16]


def _content(media_item: Any) -> str:
    if isinstance(media_item, bytes):
        return hashlib.sha256(media_item).hexdigest()
    address = str(media_item)
    if address.startswith(("data:", "http://", "https://")):
        return hashlib.sha256(address.encode()).hexdigest()
    path = Path(address)
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return " ".join(file_identity(file) for file in files)
    except OSError:
        return "cannot be read"


class PredictionsFile:
    """The predictions of one run, appended line by line.

    Args:
        path: JSONL file, created with its folder. Beside it `NAME.run.json` says what its answers belong to.
        run: The run.
        resume: Whether to go on with a file that has predictions.
        task: Name of the benchmark, written beside what the answers belong to.

    Attributes:
        aside: Where a file of an earlier state of the same model was moved to, or None.

    Raises:
        UserError: If the file belongs to another model, or exists and `resume` is false.
        RecordError: If a line other than the last is broken.
    """

    def __init__(self, path: str | Path, run: Run, resume: bool = True, task: str | None = None) -> None:
        self.path, self.run, self.task = Path(path), run, task
        self.aside: Path | None = None
        self._known: dict[Key, Record] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            if not resume:
                raise UserError(f"{self.path}: exists; choose another output, or resume it")
            self._repair()
            records = read_records(self.path)
            other = next((record for record in records if record.data.get("run") != run.digest), None)
            if other is not None and not self._is_earlier_state():
                raise self._foreign(other)
            if other is not None:
                records = self._set_aside()
            self._known = {question_key(record.id, record.data): record for record in records}
        self._describe()
        self._file = self.path.open("a", encoding="utf-8")

    @property
    def description(self) -> Path:
        """The file that says what the answers belong to."""
        return self.path.with_suffix(".run.json")

    def _description(self) -> dict[str, Any]:
        return description_of(self.path)

    def _describe(self) -> None:
        """Write what the answers belong to, whole or not at all."""
        content = {"run": self.run.digest, "model": self.run.name, "place": self.run.place, "task": self.task}
        content |= self.run.identity
        scratch = self.description.with_suffix(".tmp")
        scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(scratch, self.description)

    def _is_earlier_state(self) -> bool:
        """Whether the file was written by the model in the same place, when it was another."""
        return self.run.place is not None and self._description().get("place") == self.run.place

    def _set_aside(self) -> list[Record]:
        """Move the file away, and take up one of this very run that was moved away before."""
        before = str(self._description().get("run", "earlier"))[:16]
        self.aside = self._named(before)
        os.replace(self.path, self.aside)
        os.replace(self.description, self.aside.with_suffix(".run.json"))
        own = self._named(self.run.digest)
        if not own.exists():
            return []
        os.replace(own, self.path)
        own.with_suffix(".run.json").unlink(missing_ok=True)
        return read_records(self.path)

    def _named(self, digest: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{digest}{self.path.suffix}")

    def _foreign(self, record: Record) -> UserError:
        """Why a file is not of this run."""
        name = record.data.get("model_id")
        if name != self.run.name:
            return record.error("model_id", f"is {name!r}, this run is of {self.run.name!r}; choose another output")
        before = self._description()
        differs = [key for key, value in self.run.identity.items() if before.get(key) != value] if before else []
        reason = f"other {', '.join(differs)}" if differs else "another run"
        return record.error("run", f"the predictions belong to {reason}; choose another output")

    def _repair(self) -> None:
        """Cut off a last line that a kill left incomplete."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        try:
            complete = isinstance(parse_json(data[end:]), dict)
        except JsonError:
            complete = False
        if complete:
            with self.path.open("ab") as file:
                file.write(b"\n")
        else:
            os.truncate(self.path, end)

    def open_questions(self, questions: Sequence[Question], whole: Sequence[Question]) -> list[Question]:
        """The questions that have no answer yet; answers to another text or to other media are dropped.

        Args:
            questions: Those to ask.
            whole: All questions of the file that they come from.
        """
        keys = {question_key(question.question_id, question.stored) for question in whole}
        ids = {name for name, _ in keys}
        stale = {key for key in self._known if key[0] in ids and key not in keys}
        todo = []
        for question in questions:
            key = question_key(question.question_id, question.stored)
            record = self._known.get(key)
            if record is not None and record.data.get("asked") == asked_digest(question):
                continue
            todo.append(question)
            if record is not None:
                stale.add(key)
        if stale:
            self._drop(stale)
        return todo

    def _drop(self, stale: Iterable[Key]) -> None:
        for key in stale:
            del self._known[key]
        self._file.close()
        scratch = self.path.with_suffix(".tmp")
        rows = (json.dumps(record.data, ensure_ascii=False) + "\n" for record in self._known.values())
        scratch.write_text("".join(rows), encoding="utf-8")
        os.replace(scratch, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, answers: Sequence[tuple[Question, Answer]]) -> None:
        """Add answers; they are on disk when this returns. The text is what is scored, reasoning is kept beside it."""
        for question, answer in answers:
            row = {
                "question_id": question.question_id,
                **question.stored,
                "text": answer.content.strip(),
                "model_id": self.run.name,
                "run": self.run.digest,
                "asked": asked_digest(question),
            }
            if question.media:
                row["media"] = media_digest(question)
            if answer.reasoning:
                row["reasoning"] = answer.reasoning
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
