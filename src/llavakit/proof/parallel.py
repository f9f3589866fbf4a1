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
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from llavakit.errors import UserError


class WorkerError(Exception):
    """A run that failed in its worker; the cause holds the worker's traceback."""


class _Remote(Exception):
    """Shows a traceback of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


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
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    running: dict[Connection, int] = {}
    waiting = list(enumerate(inputs))[::-1]
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            running[ours] = _send(ours, waiting)
        while running:
            for connection in wait(list(running)):
                number = running.pop(connection)
                yield number, _receive(connection, f"{name} {inputs[number]!r}", processes[connection])
                if waiting:
                    running[connection] = _send(connection, waiting)
    finally:  # also when the user presses Ctrl-C, or whoever iterates stops
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join()


def _send(connection: Connection, waiting: list[tuple[int, Any]]) -> int:
    number, item = waiting.pop()
    with contextlib.suppress(BrokenPipeError):  # a worker that died already is noticed when its answer is awaited
        connection.send(item)
    return number


def _receive(connection: Connection, what: str, process: Any) -> Any:
    try:
        result, error, trace = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise UserError(
            f"{what}: its process ended without an answer (exit code {process.exitcode}); -9 often means too little "
            "memory, and 1 that the script which called this lacks `if __name__ == '__main__':`"
        ) from None
    if error is None:
        return result
    if isinstance(error, UserError):
        raise error
    raise WorkerError(f"{what}: {error}") from _Remote(trace)


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    """A worker's life: an input, an answer, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    with one_thread(), contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            item = connection.recv()
            try:
                answer = (function(item), None, "")
            except UserError as error:
                answer = (None, error, "")
            except Exception as error:
                answer = (None, f"{type(error).__name__}: {error}", traceback.format_exc())
            connection.send(answer)
