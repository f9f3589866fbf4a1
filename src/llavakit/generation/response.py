"""A response to a request: its events, the answers that they make up, and what it used.

Nothing here knows how replies are generated; that is the responders' business.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llavakit.conversation.codecs import Parser
from llavakit.conversation.turns import Event, Turn
from llavakit.errors import UserError
from llavakit.generation.request import Reply, RequestFailed, StreamChunk, TokenLogprob, Usage

Listener = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class LogprobsEvent(Event):
    """Log probabilities of the newest tokens, if they were asked for.

    Args:
        entries: One per token.
        text: The raw text that became certain with them, before the codec.
    """

    entries: tuple[TokenLogprob, ...]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class FinishEvent(Event):
    """The last event of a reply.

    Args:
        reason: "stop", "length", "tool_calls", "cancelled" or "error".
        stop: The stop string that ended the reply, if one did.
        usage: Of the whole response up to here.
    """

    reason: str = "stop"
    stop: str | None = None
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, kw_only=True)
class RawDelta(Event):
    """What a model generated before the codec read it: text and ids, where the responder has them."""

    text: str = ""
    token_ids: tuple[int, ...] = ()


def chunk_events(chunk: StreamChunk, parser: Parser) -> list[Event]:
    """The events of what one step added to a reply; the last piece of a reply ends with a `FinishEvent`."""
    events: list[Event] = [RawDelta(text=chunk.text, token_ids=chunk.token_ids)]
    if chunk.text:
        events += parser.feed(chunk.text)
    if chunk.logprobs:
        events.append(LogprobsEvent(entries=chunk.logprobs, text=chunk.text))
    if chunk.finish_reason is not None:
        reason = "stop" if parser.complete and chunk.finish_reason == "length" else chunk.finish_reason
        events += parser.finish(reason)
        events.append(FinishEvent(reason=reason, stop=chunk.stop))
    return [replace(event, index=chunk.index) for event in events] if chunk.index else events


@dataclass
class Answer(Turn):
    """One finished reply.

    Attributes:
        index: Number of the reply, below `n`.
        text: The raw text, before the codec, if the responder has it.
        finish_reason: See `FinishEvent`; None while it is being generated.
        stop: The stop string that ended it.
        token_ids: All new ids, if the responder has them.
        logprobs: One entry per token, if asked for.
    """

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    stop: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, event: Event) -> None:
        match event:
            case RawDelta(text=text, token_ids=token_ids):
                self.text += text
                self.token_ids += token_ids
            case LogprobsEvent(entries=entries):
                self.logprobs += entries
            case FinishEvent(reason=reason, stop=stop):
                self.finish_reason, self.stop = reason, stop
            case _:
                super().add(event)

    @classmethod
    def continued(cls, parser: Parser, prefix: str, reply: Reply) -> Answer:
        """The answer that a reply makes with the text that it continues; `text` is the new text alone."""
        answer = cls.of([*parser.feed(prefix + reply.text), *parser.finish(reply.finish_reason)])
        answer.index, answer.text, answer.token_ids = reply.index, reply.text, reply.token_ids
        answer.finish_reason, answer.stop = reply.finish_reason, reply.stop
        return answer


class Cancelled(Exception):
    """The request that a call belongs to was cancelled; leaves `Responder.run` on its own."""


class Cancellable(Protocol):
    """What can be stopped from any thread: a response, or a request of the engine."""

    @property
    def done(self) -> bool:
        """Whether there is nothing left to stop."""

    def cancel(self) -> None:
        """Stop."""


class Response:
    """A submitted request: iterate for its events, or ask for the result.

    Attributes:
        answers: The replies as far as they have come.
        error: What went wrong, if it failed.
        usage: Tokens so far.
        held_bytes: What its media take until it is done, where that is known when it is queued.
        began: When the first token or event came, as `time.perf_counter` counts; None before that.
    """

    def __init__(self, n: int = 1, listener: Listener | None = None) -> None:
        self.answers = [Answer(index=index) for index in range(n)]
        self.error: Exception | None = None
        self.usage = Usage()
        self.cancelled = False
        self.held_bytes: int | None = None
        self.began: float | None = None
        self._listener = listener
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._unread = n
        self._lock = threading.Lock()
        self._children: set[Cancellable] = set()

    @property
    def done(self) -> bool:
        """Whether every reply is finished."""
        return all(answer.finish_reason is not None for answer in self.answers)

    def cancel(self) -> None:
        """Stop, with everything that was asked for this response. May be called from any thread."""
        with self._lock:
            self.cancelled = True
            children = list(self._children)
        for child in children:
            child.cancel()

    def __iter__(self) -> Iterator[Event]:
        """Events of all replies as they come.

        Raises:
            UserError: If the request cannot be answered.
            RequestFailed: If answering it failed.
        """
        while self._unread:
            event = self._next()
            self._unread -= isinstance(event, FinishEvent)
            self._raise()
            yield event

    def result(self) -> Any:
        """The finished answer (with n above 1: a list of them).

        Raises:
            UserError: If the request cannot be answered.
            RequestFailed: If answering it failed.
        """
        for _ in self:
            pass
        self._raise()
        return self.answers[0] if len(self.answers) == 1 else self.answers

    def _raise(self) -> None:
        if isinstance(self.error, UserError):
            raise self.error
        if self.error is not None:
            raise RequestFailed(str(self.error)) from self.error

    def _next(self) -> Event:
        return self._events.get()

    # ------------------------------------------------------------------ the responder's side

    def deliver(self, event: Event) -> None:
        """Record an event and hand it on; a listener that raises cancels the response."""
        if self.began is None:
            self.began = time.perf_counter()
        if isinstance(event, FinishEvent):
            event = replace(event, usage=self.usage)
        self.answers[event.index].add(event)
        if isinstance(event, RawDelta):  # recorded, but of no interest to those who listen
            return
        self._events.put(event)
        if self._listener is not None:
            try:
                self._listener(event)
            except Exception:  # a listener that breaks is a client that went away
                self._listener = None
                self.cancel()

    def finish(self, index: int, reason: str = "stop", stop: str | None = None) -> None:
        """End a reply that is not finished yet."""
        with self._lock:
            if self.answers[index].finish_reason is not None:
                return
            self.answers[index].finish_reason = reason
        self.deliver(FinishEvent(index=index, reason=reason, stop=stop))

    def fail(self, error: Exception) -> None:
        """End all replies with an error."""
        with self._lock:
            self.error = self.error or error
        for answer in self.answers:
            self.finish(answer.index, "error")
        self.cancel()

    def count(self, usage: Usage) -> None:
        """Add tokens."""
        with self._lock:
            self.usage += usage

    @contextlib.contextmanager
    def holding(self, *children: Cancellable) -> Iterator[None]:
        """What is cancelled with this one, and when the block is left."""
        with self._lock:
            self._children.update(children)
            cancelled = self.cancelled
        try:
            for child in children if cancelled else ():
                child.cancel()
            yield
        finally:
            with self._lock:
                self._children.difference_update(children)
            for child in children:
                if not child.done:
                    child.cancel()
