"""The runner on Ray Data: the same work in actors, on this machine or on a cluster.

Ray gives actors the numbers of items and keeps their order; the driver notes what comes back, as every runner's. The
package, the files that are read and the output's folder must be at the same place on every machine. The ceiling is
shared out among the actors. Replies of calls that were under way when the driver was killed are lost, and asked for
again.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from llavakit.errors import APIRefused, UserError
from llavakit.synthesis.work import Asking, Done, Job, Worker

BATCH = 64


class _Actor:
    """A worker that Ray makes; what its methods take and give are columns of a table."""

    def __init__(self, job: Job, asking: Asking | None, what: str) -> None:
        self.teacher = None if asking is None or what == "survey" else asking.teacher()
        self.threads = 1 if self.teacher is None else asking.concurrency
        self.function = getattr(Worker(job, self.teacher), what)
        self.name = uuid.uuid4().hex

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._one, batch["item"].tolist()))
        report = None if self.teacher is None else (self.name, self.teacher.report())
        return {"found": [pickle.dumps(found)], "report": [pickle.dumps(report)]}

    def _one(self, number: int) -> Any:
        try:
            return self.function(number)
        except APIRefused as error:
            return error  # Ray would wrap it


class OnRay:
    """Items in actors.

    Args:
        asking: Who the teacher is, None if the pipeline asks nobody.
        actors: How many work.

    Raises:
        UserError: If Ray Data is missing.
    """

    def __init__(self, asking: Asking | None, actors: int) -> None:
        try:
            import ray.data
        except ImportError:
            raise UserError("--runner ray needs Ray Data: pip install 'llavakit[ray]'") from None
        self._ray, self.actors, self._started = ray, actors, not ray.is_initialized()
        self._reports: dict[str, dict[str, Any]] = {}
        self.asking = asking
        if asking is not None:
            api = dict(asking.api)
            if api.get("max_cost") is not None:
                api["max_cost"] /= actors
            share = -(-asking.concurrency // actors)
            self.asking = replace(asking, cache=None, api=api, concurrency=share, spent=asking.spent / actors)
        if self._started:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False

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
        size = BATCH if self.asking is None else self.asking.concurrency
        blocks = max(1, -(-len(numbers) // size))
        table = self._ray.data.from_items([{"item": int(number)} for number in numbers], override_num_blocks=blocks)
        found = table.map_batches(
            _Actor,
            fn_constructor_args=(job, self.asking, what),
            batch_size=size,
            compute=self._ray.data.ActorPoolStrategy(size=self.actors),
        )
        for row in found.iter_rows():
            report = pickle.loads(row["report"])
            if report is not None:
                self._reports[report[0]] = report[1]
            yield pickle.loads(row["found"])

    def report(self) -> dict[str, Any]:
        """What the teacher was asked by all actors, and what it cost."""
        total: dict[str, Any] = {}
        for report in self._reports.values():
            for name, value in report.items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """End Ray, if it was started here."""
        if self._started:
            self._ray.shutdown()
