"""The runner on Ray: the same work in workers on this machine or a cluster (`llavakit.generation.actors`).

The driver notes what comes back, as every runner's. The output's folder must be at the same place on every machine. The
ceiling of costs is shared out among the workers. Replies of calls that were under way when the driver was killed are
lost, and asked for again.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llavakit.errors import APIRefused
from llavakit.generation.actors import Actors
from llavakit.synthesis.work import Done, Job, Worker

BATCH = 64


class _Member:
    """What a worker of Ray holds."""

    def __init__(self, job: Job, asking: Any, what: str) -> None:
        self.teacher = None if asking is None or what == "survey" else asking.teacher()
        self.threads = 1 if self.teacher is None else asking.concurrency
        self.function = getattr(Worker(job, self.teacher), what)
        self.name = uuid.uuid4().hex

    def run(self, numbers: np.ndarray) -> tuple[list[Any], Any]:
        """The results of some items, and who this is with what was asked so far."""
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._one, numbers.tolist()))
        return found, None if self.teacher is None else (self.name, self.teacher.report())

    def _one(self, number: int) -> Any:
        try:
            return self.function(number)
        except APIRefused as error:
            return error  # what the others found must not be lost


class OnRay:
    """Items in workers of Ray.

    Args:
        asking: Who is asked, see `llavakit.synthesis.work.Asking`; None if the pipeline asks nobody.
        workers: How many work.
    """

    def __init__(self, asking: Any, workers: int) -> None:
        self.asking = None if asking is None else asking.share(workers)
        self.workers = workers
        self._reports: dict[str, dict[str, Any]] = {}

    def survey(self, job: Job, numbers: np.ndarray) -> Iterator[Any]:
        """See `llavakit.synthesis.run.Runner`."""
        for found in self._batches(job, numbers, "survey"):
            yield from found

    def work(self, job: Job, numbers: np.ndarray) -> Iterator[list[Done]]:
        """See `llavakit.synthesis.run.Runner`."""
        for found in self._batches(job, numbers, "work"):
            refused = next((place for place, one in enumerate(found) if isinstance(one, APIRefused)), None)
            if refused is None:
                yield found
                continue
            yield found[:refused]
            raise found[refused]

    def _batches(self, job: Job, numbers: np.ndarray, what: str) -> Iterator[list[Any]]:
        size = BATCH if self.asking is None else self.asking.batch
        actors = Actors(functools.partial(_Member, job, self.asking, what), self.workers)
        try:
            calls = ((numbers[begin : begin + size],) for begin in range(0, len(numbers), size))
            for found, report in actors.map("run", calls):
                if report is not None:
                    self._reports[report[0]] = report[1]
                yield found
        finally:
            actors.close()

    def report(self) -> dict[str, Any]:
        """What was asked by all workers, and what it cost."""
        total: dict[str, Any] = {}
        for report in self._reports.values():
            for name, value in report.items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Nothing stays open."""
