"""Runs a pipeline over a file: `llavakit synthesize`.

    synthesize("captions", "facts.jsonl", "captions.jsonl", teacher="http://localhost:8000/v1#NAME", concurrency=32)

The output is the same for any number of threads, processes and machines, and after any number of kills. A runner is a
function that yields what becomes of the items, in their order; what is noted and written happens here.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llavakit.data.paths import split_part
from llavakit.errors import APIRefused, UserError
from llavakit.registry import PIPELINES
from llavakit.synthesis.ledger import Ledger
from llavakit.synthesis.work import Asking, Done, Job, Worker

RUNNERS = ("local", "ray")
CHUNK = 128  # items that are sent to a process together
AHEAD = 4  # chunks, or items of a thread, that may be under way for each process or thread
HOPELESS = 8  # calls that must fail before any has succeeded for the rest not to be asked


class Runner(Protocol):
    """Where the work is done."""

    def survey(self, job: Job, numbers: np.ndarray) -> Iterator[Any]:
        """Results of `Worker.survey` in order of the items."""

    def work(self, job: Job, numbers: np.ndarray) -> Iterator[list[Done]]:
        """What became of the items, in their order, some at a time.

        Raises:
            APIRefused: If the teacher answers no call.
        """

    def report(self) -> dict[str, Any]:
        """What the teacher was asked, and what it cost."""


def synthesize(
    name: str,
    source: str | Path,
    output: str | Path,
    *,
    teacher: str | None = None,
    base_url: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    concurrency: int = 8,
    processes: int = 1,
    runner: str = "local",
    on_bad_record: str = "stop",
    api: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a pipeline, or go on with a run that was interrupted.

    Args:
        name: Its registered name.
        source: What it reads.
        output: `.jsonl` or `.json`; what the teacher replied is kept in `OUT.teacher.jsonl`, items that became no
            record are in `OUT.refused.jsonl` with the reasons.
        teacher: Model folder, address (`http://host:8000/v1#NAME`), or name of a model at `base_url`.
        temperature, max_tokens: Of its replies; default: the pipeline's.
        concurrency: Items that are worked on at the same time, if the pipeline asks a teacher.
        processes: Processes that work, if it does not; workers of Ray.
        runner: "local" or "ray" (workers of Ray, on this machine or the cluster that RAY_ADDRESS names).
        on_bad_record: "stop" or "skip".
        api: Further options of `llavakit.generation.remote.APIClient`: `retries`, `timeout`, `price_in`, `price_out`,
            `max_cost`, `api_key_env`.
        options: The pipeline's own.

    Returns:
        Counts of items, records, `refused`, `bad` and `failed` items, and what the teacher was asked and cost.

    Raises:
        UserError: For an unknown name or option, and for what is wrong with `source` or `output`.
            At the first broken record, too, unless they are skipped.
        APIRefused: If no call is answered, or the ceiling is reached; the same call goes on from there.
    """
    output, options = Path(output), dict(options or {})
    refuse_options(runner, on_bad_record, concurrency=concurrency, processes=processes)
    pipeline = PIPELINES.build({"type": name, **options})
    asking = None
    if pipeline.asks:
        if teacher is None:
            raise UserError(f"{name}: asks a teacher; name it with --teacher")
        if processes > 1 and runner == "local":
            raise UserError(f"{name}: waits for a teacher; --concurrency makes it faster, --processes does not")
        asking = Asking(
            model=teacher,
            base_url=base_url,
            temperature=pipeline.temperature if temperature is None else temperature,
            max_tokens=pipeline.max_tokens if max_tokens is None else max_tokens,
            concurrency=concurrency,
            cache=output.with_name(f"{output.stem}.teacher.jsonl"),
            api=dict(api or {}),
        )
    elif teacher is not None:
        raise UserError(f"{name}: asks no teacher; leave --teacher out")
    identity = {
        "pipeline": name,
        "version": pipeline.version,
        "options": options,
        "files": list(pipeline.files),
        "source": source_identity(source),
        "teacher": asking and [_name(asking.model), asking.temperature, asking.max_tokens],
    }
    items = pipeline.items(Path(source))
    return run_pipeline(Job(pipeline, items), output, identity, asking, processes, runner, on_bad_record)


def run_pipeline(
    job: Job,
    output: Path,
    identity: Mapping[str, Any],
    asking: Any,
    processes: int = 1,
    runner: str = "local",
    on_bad_record: str = "stop",
) -> dict[str, Any]:
    """Work on all items of a job that are not done yet.

    Args:
        job: What is done, on what.
        identity: What decides the output.
        asking: Who is asked (`teacher`, `concurrency`, `batch`, `after`, `share` of `Asking`); None for nobody.
        output, processes, runner, on_bad_record: See `synthesize`.

    Returns:
        See `synthesize`.
    """
    ledger = Ledger(output, identity, len(job.items))
    with contextlib.closing(ledger):
        if ledger.finished is not None:
            return ledger.finished
        chosen = _runner(runner, None if asking is None else asking.after(ledger.cost), processes)
        with contextlib.closing(chosen):
            if ledger.todo().size:
                _run(chosen, job, ledger, stops=on_bad_record == "stop")
            return ledger.finish(chosen.report() | ({"cost": round(ledger.cost, 6)} if ledger.cost else {}))


def _name(model: str) -> str:
    """What a teacher is called, whatever server it is behind: that may move."""
    return model.partition("#")[2] if model.startswith(("http://", "https://")) else model


def refuse_options(runner: str, on_bad_record: str, **counts: int) -> None:
    """Refuse what is not possible.

    Args:
        counts: Numbers that must be at least one.

    Raises:
        UserError: Naming the option.
    """
    if runner not in RUNNERS:
        raise UserError(f"runner must be local or ray, not {runner!r}")
    if on_bad_record not in ("stop", "skip"):
        raise UserError(f"on_bad_record: must be stop or skip, not {on_bad_record!r}")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; at least one is needed")


def source_identity(source: str | Path) -> list[Any]:
    """What is read, by content; of a folder the names and sizes of its files."""
    name, part = split_part(source)
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [[str(file.relative_to(path)), file.stat().st_size] for file in files] + [part]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder")
    with path.open("rb") as file:
        return [hashlib.file_digest(file, "sha256").hexdigest(), part]


def _runner(name: str, asking: Any, processes: int) -> Any:
    if name == "ray":
        from llavakit.synthesis.on_ray import OnRay

        return OnRay(asking, processes)
    return InThreads(asking) if asking is not None else InProcesses(processes)


def _run(runner: Any, job: Job, ledger: Ledger, stops: bool) -> None:
    """Everything that is not done yet."""
    folder = ledger.beside("survey")
    try:
        if job.pipeline.surveys:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            everything = np.arange(len(job.items))
            found = _without_bad(runner.survey(job, everything), stops)
            job.pipeline.gather(found, folder)
            job = Job(job.pipeline, job.items, folder)
        elif job.pipeline.asks and stops:  # said before anything is paid for
            worker = Worker(job)
            for number in ledger.todo():
                _stop_at(worker.check(int(number)))
        succeeded, reasons = False, []
        with _progress(job, ledger) as advance:
            for done in runner.work(job, ledger.todo()):
                for one in done if stops else ():
                    _stop_at(one)
                ledger.append(done, _cost(runner))
                advance()
                reasons += [one.reason for one in done if one.outcome == "failed" and not succeeded]
                succeeded = succeeded or any(one.outcome in ("made", "refused") for one in done)
                if len(reasons) >= HOPELESS and not succeeded:
                    raise APIRefused(f"{reasons[-1]} (so did the {len(reasons)} first items)")
    finally:
        ledger.paid(_cost(runner))
        shutil.rmtree(folder, ignore_errors=True)


def _cost(runner: Any) -> float:
    return runner.report().get("cost", 0.0)


def _without_bad(found: Iterable[Any], stops: bool) -> Iterator[Any]:
    """What a survey found in items that are not broken."""
    for one in found:
        if not isinstance(one, Done):
            yield one
        elif stops:
            _stop_at(one)


def _stop_at(done: Done | None) -> None:
    """End the work if an item is a broken one."""
    if done is not None and done.outcome == "bad":
        raise UserError(str(done.reason))


@contextlib.contextmanager
def _progress(job: Job, ledger: Ledger) -> Iterator[Callable[[], None]]:
    """A bar on standard error: items, what became of them, and what was paid."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        total = len(job.items)
        task = bar.add_task(type(job.pipeline).__name__, total=total)

        def advance() -> None:
            if bar.disable:
                return
            counts = ledger.summary()
            said = ", ".join(f"{counts[name]:,} {name}" for name in ("records", "refused", "failed") if counts[name])
            said += f", cost {ledger.cost:.2f}" if ledger.cost else ""
            bar.update(task, completed=total - len(ledger.todo()), description=said or "at work")

        yield advance


class InThreads:
    """Items side by side in threads of this process: what takes time is the teacher."""

    def __init__(self, asking: Any) -> None:
        self.asking = asking
        self._teacher: Any = None

    @property
    def teacher(self) -> Any:
        """The teacher, made when it is needed."""
        if self._teacher is None:
            self._teacher = self.asking.teacher()
        return self._teacher

    def survey(self, job: Job, numbers: np.ndarray) -> Iterator[Any]:
        return map(Worker(job).survey, map(int, numbers))

    def work(self, job: Job, numbers: np.ndarray) -> Iterator[list[Done]]:
        worker = Worker(job, self.teacher)
        with ThreadPoolExecutor(self.asking.concurrency) as pool:
            calls = ((worker.work, int(number)) for number in numbers)
            for done in _in_order(pool, calls, AHEAD * self.asking.concurrency):
                yield [done]

    def report(self) -> dict[str, Any]:
        return {} if self._teacher is None else self._teacher.report()

    def close(self) -> None:
        if self._teacher is not None:
            self._teacher.close()


class InProcesses:
    """Chunks of items in processes, or in this one; for pipelines that ask nobody."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def survey(self, job: Job, numbers: np.ndarray) -> Iterator[Any]:
        return itertools.chain.from_iterable(self._chunks(job, numbers, "survey"))

    def work(self, job: Job, numbers: np.ndarray) -> Iterator[list[Done]]:
        return self._chunks(job, numbers, "work")

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing stays open."""

    def _chunks(self, job: Job, numbers: np.ndarray, what: str) -> Iterator[list[Any]]:
        chunks = (numbers[begin : begin + CHUNK] for begin in range(0, len(numbers), CHUNK))
        if self.processes == 1 or len(numbers) <= CHUNK:
            worker = Worker(job)
            yield from ([getattr(worker, what)(int(number)) for number in chunk] for chunk in chunks)
            return
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.processes, context, _become_worker, (job,)) as pool:
            calls = ((_in_worker, what, chunk) for chunk in chunks)
            try:
                yield from _in_order(pool, calls, AHEAD * self.processes)
            except BrokenProcessPool:
                raise UserError(
                    "a process ended before its work was done (out of memory?); the same command goes on from here"
                ) from None


_worker: Worker | None = None


def _become_worker(job: Job) -> None:
    """Make a process a worker, which ends with its parent even if that is killed."""
    global _worker
    import multiprocessing
    import os

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the work
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = Worker(job)


def _in_worker(what: str, numbers: Sequence[int]) -> list[Any]:
    function = getattr(_worker, what)
    return [function(int(number)) for number in numbers]


def _in_order(pool: Executor, calls: Iterable[tuple[Any, ...]], ahead: int) -> Iterator[Any]:
    """Results in order of the calls, of which `ahead` are under way; a failure cancels what has not begun."""
    waiting: deque[Future[Any]] = deque()
    calls = iter(calls)
    try:
        while True:
            waiting.extend(pool.submit(*call) for call in itertools.islice(calls, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


__all__ = ["RUNNERS", "Runner", "synthesize"]
