"""The work on one item, the same in a thread, a process or an actor on another machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llavakit.data.readers import Source
from llavakit.data.records import belongs_to
from llavakit.errors import APIRefused, CallFailed, RecordError
from llavakit.synthesis.pipeline import Pipeline, Refused


@dataclass(frozen=True)
class Asking:
    """Who the teacher is, and how it is asked; see `llavakit.evaluation.judges.Judge`.

    Attributes:
        spent: What counts to the ceiling (`max_cost` of `api`) already.
    """

    model: str
    base_url: str | None = None
    temperature: float = 0.7
    max_tokens: int = 1024
    concurrency: int = 8
    cache: Path | None = None
    api: Mapping[str, Any] = field(default_factory=dict)
    spent: float = 0.0

    def teacher(self) -> Any:
        """The teacher, ready to be asked."""
        from llavakit.evaluation.judges import Judge
        from llavakit.generation.remote import RemoteResponder

        judge = Judge(
            self.model,
            self.base_url,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            concurrency=self.concurrency,
            cache=self.cache,
            **self.api,
        )
        if isinstance(judge.responder, RemoteResponder):
            judge.responder.client.spent.cost = self.spent
        return judge

    @property
    def batch(self) -> int:
        """Items that a worker of Ray takes at a time."""
        return self.concurrency

    def after(self, spent: float) -> Asking:
        """The same once this much was spent by earlier runs."""
        return replace(self, spent=spent)

    def share(self, workers: int) -> Asking:
        """What one of several workers of Ray may ask: its share of the calls in flight and of the ceiling."""
        api = dict(self.api)
        if api.get("max_cost") is not None:
            api["max_cost"] /= workers
        concurrency = -(-self.concurrency // workers)
        return replace(self, cache=None, api=api, concurrency=concurrency, spent=self.spent / workers)


@dataclass(frozen=True)
class Job:
    """What a worker needs, in a form that can be sent to it.

    Args:
        pipeline: What is done.
        items: On what.
        folder: What `gather` wrote, if the pipeline surveys.
    """

    pipeline: Pipeline
    items: Source
    folder: Path | None = None


@dataclass(frozen=True)
class Done:
    """What became of an item.

    Attributes:
        number: Of the item, from 0.
        outcome: "made", "refused" (by the pipeline), "bad" (a broken item) or "failed" (a call without an answer).
        count: Records.
        lines: The records, one JSON object a line.
        line: Where the item stands in its file.
        name: What it is called.
        reason: Why it became no record.
    """

    number: int
    outcome: str
    count: int = 0
    lines: bytes = b""
    line: int = 0
    name: Any = None
    reason: str | None = None


class Worker:
    """Works on items of a job, in any number of threads."""

    def __init__(self, job: Job, teacher: Any = None) -> None:
        self.job, self.teacher = job, teacher
        if job.folder is not None:
            job.pipeline.open(job.folder)

    def _item(self, number: int) -> Any:
        item = self.job.items[number]
        self.job.pipeline.check(item)
        return item

    def check(self, number: int) -> Done | None:
        """The fault of a broken item; None for the others."""
        return self._guarded(number, lambda: self._item(number) and None)

    def survey(self, number: int) -> Any:
        """What the pipeline wants to know of an item; the fault of a broken one, as `Done`."""
        return self._guarded(number, lambda: self.job.pipeline.survey(number, self._item(number)))

    def work(self, number: int) -> Done:
        """What becomes of an item.

        Raises:
            APIRefused: If the teacher answers no call.
        """
        done = self._guarded(number, lambda: self._outcome(number, self._item(number)))
        if isinstance(done, APIRefused):
            raise done
        return done

    def _outcome(self, number: int, item: Any) -> Done | APIRefused:
        try:
            lines = [_encoded(record) for record in self.job.pipeline.work(item, self.teacher)]
        except Refused as error:
            return self._without(number, "refused", error, item)
        except CallFailed as error:
            return self._without(number, "failed", error, item)
        except APIRefused as error:
            return error
        return Done(number, "made", len(lines), b"".join(lines))

    def _guarded(self, number: int, function: Callable[[], Any]) -> Any:
        """What `function` returns; whatever it raises belongs to the item, which is a broken one then."""
        items = self.job.items
        try:
            with belongs_to(items.file, items.line(number)):
                return function()
        except RecordError as error:
            return self._without(number, "bad", error)

    def _without(self, number: int, outcome: str, error: Exception, item: Any = None) -> Done:
        """An item that became no record, and what stands in its place."""
        pipeline = self.job.pipeline
        name = pipeline.name(item) if isinstance(item, Mapping) else None
        instead = [_encoded(record) for record in pipeline.instead(name, str(error))]
        line = self.job.items.line(number)
        return Done(number, outcome, len(instead), b"".join(instead), line, name, str(error))


def _encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
