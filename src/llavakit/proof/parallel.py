"""One function on several inputs, each in a process of its own core.

Small models gain nothing from a second thread, so independent runs share the cores instead. This module knows
processes and PyTorch's number of threads, and nothing of what runs in them. Results do not depend on the number of
workers: every run has one thread.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from llavakit.errors import Portable, UserError


class WorkerError(Portable):
    """A run that failed in its worker; the cause shows the worker's traceback."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes in one thread inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_each(
    function: Callable[[Any], Any], inputs: Sequence[Any], workers: int | None = None, name: str = "input"
) -> Iterator[tuple[int, Any]]:
    """Call `function` on every input, several at a time.

    Args:
        function: With more than one worker it must be importable by name (a module's function, or a
            `functools.partial` of one): workers are spawned, since a fork of a threaded process may hang.
        workers: Processes; default: one per available core, no more than inputs. One runs here, without a process.
        name: What an input is called in messages.

    Yields:
        Number of the input and what the function returned, in the order in which they end.

    Raises:
        WorkerError: If the function raised in a worker.
        UserError: If it raised one, or if a worker was killed. In every case the other workers are ended.
    """
    workers = min(workers or available_cores(), len(inputs))
    if workers <= 1:
        with one_thread():
            for number, item in enumerate(inputs):
                yield number, function(item)
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        running = {pool.submit(function, item): number for number, item in enumerate(inputs)}
        for done in as_completed(running):
            number = running[done]
            yield number, _result(done, f"{name} {inputs[number]!r}")
    except BaseException:  # also when the user presses Ctrl-C, or the caller stops iterating
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _result(done: Future, what: str) -> Any:
    try:
        return done.result()
    except UserError:
        raise
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended without an answer; too little memory is the usual reason, or the script which "
            "called this lacks `if __name__ == '__main__':`"
        ) from None
    except Exception as error:
        raise WorkerError(f"{what}: {type(error).__name__}: {error}") from error.__cause__


def _begin_worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    torch.set_num_threads(1)
