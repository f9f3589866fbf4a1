"""Workers on Ray: processes on this machine or a cluster, each of which holds a model or what else takes long to make.

The package, and the files that workers read, must be at the same place on every machine. A worker that dies is started
again, perhaps elsewhere, and does again what it had not finished; results come in the order of the calls.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llavakit.errors import UserError

RESTARTS = 4  # of one worker; more mean that the work itself kills it
AHEAD = 2  # calls per worker that wait for it


class _Worker:
    """A worker's process. Errors of the user are returned, since Ray would wrap them."""

    def __init__(self, make: Callable[[], Any], folder: str) -> None:
        try:
            _enter(folder)
            self.held = make()
        except UserError as error:
            self.held = error

    def call(self, method: str | None, *arguments: Any) -> Any:
        """What a method of the held object returns; without one whether there is an object."""
        if isinstance(self.held, UserError):
            return self.held
        try:
            return None if method is None else getattr(self.held, method)(*arguments)
        except UserError as error:
            return error


def _enter(folder: str) -> None:
    """Let relative paths mean what they mean where the command was given."""
    try:
        os.chdir(folder)
    except OSError:
        raise UserError(f"{folder}: a machine of Ray has no such folder; all of them need the same paths") from None


class Actors:
    """Several workers.

    Args:
        make: Called in every worker; what it returns is held there.
        count: How many workers.

    Raises:
        UserError: If Ray is missing, has no processor for a worker, or what `make` raises.
    """

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--runner ray needs Ray: pip install 'llavakit[ray]'") from None
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        options = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS, **_resources(ray, count)}
        cls, made = ray.remote(_Worker), ray.put(make)
        self.workers = [cls.options(**options).remote(made, os.getcwd()) for _ in range(count)]
        try:
            for worker in self.workers:
                self._get(worker.call.remote(None))
        except BaseException:
            self.close()
            raise

    def _get(self, future: Any) -> Any:
        try:
            found = self._ray.get(future)
        except self._ray.exceptions.RayActorError as error:
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"a worker of Ray died {RESTARTS + 1} times (out of memory?); the same command goes on ({said})"
            ) from None
        if isinstance(found, UserError):
            raise found
        return found

    def first(self, method: str, *arguments: Any) -> Any:
        """What one of the workers returns."""
        return self._get(self.workers[0].call.remote(method, *arguments))

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """What workers return for calls of a method, in their order; each has a few calls at a time.

        Raises:
            UserError: What a call raised, or that a worker cannot be kept alive.
        """
        calls = enumerate(calls)
        waiting: dict[Any, tuple[int, int]] = {}  # future: number of the call, of its worker
        done: dict[int, Any] = {}
        most = 2 * AHEAD * len(self.workers)  # results may wait for an earlier one
        idle = list(range(len(self.workers))) * AHEAD
        following = 0
        while True:
            room = min(len(idle), most - len(waiting) - len(done))
            for number, arguments in itertools.islice(calls, max(room, 0)):
                worker = idle.pop(0)
                waiting[self.workers[worker].call.remote(method, *arguments)] = (number, worker)
            if following in done:
                yield self._get(done.pop(following))
                following += 1
                continue
            if not waiting:
                return
            for future in self._ray.wait(list(waiting), num_returns=1)[0]:
                number, worker = waiting.pop(future)
                done[number] = future
                idle.append(worker)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        if self._started:
            self._ray.shutdown()
            return
        for worker in self.workers:
            self._ray.kill(worker)


def _resources(ray: Any, count: int) -> dict[str, float]:
    """What a worker takes: its share of the processors (its threads), and one GPU, or a part where there are fewer."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    processors = [int(machine.get("CPU", 0)) for machine in machines]
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    workers = -(-count // gpus) if gpus else 0  # on one GPU: a part of it must lie on one
    fitting = (share for share in range(max(processors), 0, -1) if sum(own // share for own in processors) >= count)
    return {"num_cpus": next(fitting, 0), "num_gpus": 1 / workers if workers else 0}
