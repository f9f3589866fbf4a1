"""Asking one responder many things: kept on disk as answers come, several at a time, failures as data.

    asker = Asker(responder, cache="judge.jsonl")
    answers = asker.ask_all(conversations)  # an Answer or a CallFailed each

Interrupted at any moment, the same calls ask only what has no answer yet. A call that failed is no answer and is never
kept: callers that count leave it out and report how many there were. Judges, teachers and rewards are built on this;
nothing here knows what is asked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from llavakit.checkpoints.identity import file_identity
from llavakit.conversation.messages import MEDIA
from llavakit.conversation.turns import ToolCall
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import UserError
from llavakit.generation.identity import digest_of, identity_of
from llavakit.generation.remote import APIRefused, CallFailed, RemoteResponder, Spending
from llavakit.generation.request import RequestFailed, SamplingParams
from llavakit.generation.responder import SAMPLING, Messages, Responder
from llavakit.generation.response import Answer

T = TypeVar("T")
HOPELESS = 8  # calls that must fail before any has succeeded for the rest not to be asked


class AnswerCache:
    """Answers by request, one JSON object per line; a line that a kill cut short is dropped.

    Args:
        path: The file, created with its folder; None keeps answers in memory only.

    Raises:
        UserError: If the file is something else.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._answers: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._file: int | None = None
        if path is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json(line)
            except JsonError:  # empty, or cut short by a kill
                continue
            if not isinstance(entry, dict) or not {"key", "answer"} <= set(entry) or not _is_answer(entry["answer"]):
                raise UserError(f"{path}:{number}: is no kept answer; name another file for the cache")
            self._answers[entry["key"]] = entry["answer"]
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if lines[-1]:
            os.write(self._file, b"\n")

    def get(self, key: str) -> Answer | None:
        """The answer to a request, None if there is none yet."""
        with self._lock:
            kept = self._answers.get(key)
        if kept is None:
            return None
        calls = [ToolCall(**call) for call in kept["calls"]]
        return Answer(
            content=kept["content"], reasoning=kept["reasoning"], calls=calls, finish_reason=kept["finish_reason"]
        )

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        kept = {
            "content": answer.content,
            "reasoning": answer.reasoning,
            "calls": [asdict(call) for call in answer.calls],
            "finish_reason": answer.finish_reason,
        }
        line = json.dumps({"key": key, "answer": kept}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._answers[key] = kept
            if self._file is not None:
                os.write(self._file, line)
                os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def _is_answer(kept: Any) -> bool:
    return isinstance(kept, dict) and {"content", "reasoning", "calls", "finish_reason"} == set(kept)


class Asker:
    """Many questions to one responder.

    Args:
        responder: Who answers; a model that runs here, or a remote one.
        sampling: Of every question unless it says otherwise.
        cache: JSONL of answers to resume from, see `AnswerCache`.
        concurrency: Questions in flight; default: as many as the responder runs together.

    Attributes:
        asked, kept, failed: Questions that were asked, answered from the cache, and not answered.
    """

    def __init__(
        self,
        responder: Responder,
        *,
        sampling: SamplingParams | None = None,
        cache: str | Path | None = None,
        concurrency: int | None = None,
    ) -> None:
        self.responder, self.sampling = responder, sampling or SamplingParams()
        self.concurrency = concurrency or responder.capacity
        self.cache = AnswerCache(cache)
        self.asked = self.kept = self.failed = 0
        self._asking: dict[str, Future[Answer]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the cache, and the connections of a remote responder."""
        self.cache.close()
        if isinstance(self.responder, RemoteResponder):
            self.responder.client.close()

    def answer(self, messages: Messages, *, attempt: int = 0, **fields: Any) -> Answer:
        """The answer to a conversation, from the cache if it was asked before.

        Args:
            attempt: Number that tells a repeated question from its first asking.
            fields: Changes to the sampling parameters, or the responder's options.

        Raises:
            CallFailed: If there is no answer.
            APIRefused: If no question can be answered.
        """
        key = self._key(messages, attempt, fields)
        with self._lock:
            same = self._asking.get(key)
            kept = self.cache.get(key) if same is None else None
            if same is None and kept is None:
                self._asking[key] = Future()
        if kept is not None or same is not None:
            with self._lock:
                self.kept += 1
            return kept if kept is not None else same.result()
        future = self._asking[key]
        try:
            answer = self._ask(messages, fields)
            self.cache.put(key, answer)
            future.set_result(answer)
            return answer
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._asking[key]

    def _ask(self, messages: Messages, fields: Mapping[str, Any]) -> Answer:
        with self._lock:
            self.asked += 1
        try:
            return self.responder.submit(messages, self.sampling, stream=False, **fields).result()
        except (CallFailed, APIRefused):
            raise
        except (UserError, RequestFailed) as error:
            raise CallFailed(str(error)) from error

    @functools.cached_property
    def _identity(self) -> str:
        return digest_of(identity_of(self.responder))

    def _key(self, messages: Messages, attempt: int, fields: Mapping[str, Any]) -> str:
        sampling = {name: value for name, value in fields.items() if name in SAMPLING}
        others = {name: value for name, value in fields.items() if name not in SAMPLING}
        identity = [
            self._identity,
            attempt,
            content_of(messages),
            asdict(replace(self.sampling, **sampling)),
            content_of(others),
        ]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def ask_all(self, conversations: Iterable[Messages], **fields: Any) -> list[Answer | CallFailed]:
        """Answers to many conversations in their order, asked at the same time; see `map`."""
        return self.map(lambda messages: self.answer(messages, **fields), conversations)

    def map(self, function: Callable[[Any], T], items: Iterable[Any]) -> list[T | CallFailed]:
        """`function` of every item in `concurrency` threads, with progress; results in order of the items.

        A `CallFailed` that `function` raises is the item's result. If many fail before one succeeds, the rest is not
        asked.

        Raises:
            APIRefused: If no call can be answered; what was answered stays in the cache.
        """
        items = list(items)
        results: list[Any] = [None] * len(items)
        succeeded = failed = 0
        with ThreadPoolExecutor(self.concurrency) as pool, _progress() as progress:
            task = progress.add_task(f"asking {self.responder.name}", total=len(items))
            futures = {pool.submit(function, item): place for place, item in enumerate(items)}
            try:
                for future in as_completed(futures):
                    try:
                        results[futures[future]] = future.result()
                        succeeded += 1
                    except CallFailed as error:
                        results[futures[future]] = error
                        failed += 1
                        if not succeeded and failed >= HOPELESS:
                            raise APIRefused(f"{error} (so did the {failed} first calls)") from error
                    progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        with self._lock:
            self.failed += failed
        return results

    def report(self) -> dict[str, Any]:
        """What was asked and used, for results."""
        found: dict[str, Any] = {"asked": self.asked, "kept": self.kept, "failed_calls": self.failed}
        if isinstance(self.responder, RemoteResponder):
            spent: Spending = self.responder.client.spent
            found |= {"prompt_tokens": spent.prompt_tokens, "completion_tokens": spent.completion_tokens}
            if spent.cost:
                found["cost"] = round(spent.cost, 6)
        return found


def content_of(value: Any) -> Any:
    """A value with media by their content, as JSON: neither a file's location nor the spelling of its path counts."""
    if isinstance(value, Mapping):
        kind = value.get("type")
        return {
            str(name): _media(item) if name == kind and kind in MEDIA else content_of(item)
            for name, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [content_of(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return _media(value)


def _media(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        if not str(value).startswith(("http://", "https://", "data:")) and len(str(value)) < 4096 and path.is_file():
            return file_identity(path)
        return str(value)
    if hasattr(value, "tobytes"):  # arrays and pictures
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        digest = hashlib.sha256(f"{shape} {getattr(value, 'mode', getattr(value, 'dtype', ''))}".encode())
        digest.update(value.tobytes())
        return digest.hexdigest()
    return content_of(value) if isinstance(value, (Mapping, list, tuple)) else repr(value)


def _progress() -> Progress:
    return Progress(console=Console(stderr=True), transient=True)
