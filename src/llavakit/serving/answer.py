"""From a responder's events to an answer of the API, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from llavakit.conversation.codecs import Trimmer
from llavakit.conversation.turns import (
    CallEvent,
    Event,
    PictureEvent,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    TraceEvent,
)
from llavakit.errors import UserError
from llavakit.generation.remote import APIRefused, CallFailed, data_url
from llavakit.generation.request import PromptTooLong
from llavakit.generation.response import Answer, FinishEvent, LogprobsEvent, Response
from llavakit.media.policy import Refused
from llavakit.serving.logprobs import TokenLog, logprobs_body
from llavakit.serving.presence import Presence
from llavakit.serving.protocol import APIError, chunk, completion, new_id, usage
from llavakit.serving.service import CONTEXT_EXCEEDED, Incoming, Service, field_of, refused_error

log = logging.getLogger("llavakit.serving")


class ChatAnswer:
    """One request from its first byte to its last event."""

    def __init__(self, service: Service, incoming: Incoming) -> None:
        self.service, self.body, self._incoming = service, incoming.body, incoming
        self._account = incoming.account
        self.identity, self.created = new_id("chatcmpl"), int(time.time())
        self.response: Response | None = None
        self._events: deque[Event] = deque()
        self._news, self._told = asyncio.Event(), False
        self._began = time.perf_counter()
        self._closed = self._answered = self._failed = False

    async def start(self) -> None:
        """Queue the request.

        Raises:
            APIError: If it cannot be answered, or its client went away meanwhile.
        """
        loop = asyncio.get_running_loop()
        each = bool(self.body.stream)

        def listen(event: Event) -> None:
            """In a thread that generates; wakes the loop as seldom as may be."""
            self._events.append(event)
            if (each or isinstance(event, FinishEvent)) and not self._told:
                self._told = True
                with contextlib.suppress(RuntimeError):  # the loop is closed when the server has gone
                    loop.call_soon_threadsafe(self._news.set)

        incoming, self._incoming = self._incoming, None  # the media are held no longer than needed
        self.response = await self.service.submit(incoming, listen)

    def close(self) -> None:
        """Give back what the request holds; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.response is not None:
            if not self.response.done:
                self.response.cancel()
            if self.response.began is not None:
                self.service.metrics.first_token(self.response.began - self._began)
            used = self.response.usage
            self.service.metrics.worked(used.prompt_tokens, used.completion_tokens)
        if self._answered:
            self.service.metrics.answered(time.perf_counter() - self._began)
        elif self.body.stream and self.response is not None and not self._failed:
            self.service.metrics.failed(499)
        self._account.close()
        self.service.release()

    async def _each(self) -> AsyncIterator[Event | None]:
        """Events of all replies; None when nothing came for a while."""
        unfinished = self.body.n or 1
        while unfinished:
            if not self._events:
                try:
                    async with asyncio.timeout(self.service.settings.keep_alive):
                        await self._news.wait()
                except TimeoutError:
                    yield None
                self._news.clear()
                self._told = False
                continue
            event = self._events.popleft()
            if isinstance(event, FinishEvent):
                unfinished -= 1
                if event.reason == "error":
                    raise _api_error(self.response.error)
            yield event

    async def whole(self, presence: Presence) -> dict[str, Any]:
        """The whole answer.

        Raises:
            APIError: If the request failed, or its client went away meanwhile.
        """
        await presence.unless_gone(self._collect())
        choices = [self._choice(answer) for answer in self.response.answers]
        self._answered = True
        return completion(self.identity, self.body.model, choices, usage(self.response.usage))

    async def _collect(self) -> None:
        async for _ in self._each():
            pass

    def _choice(self, answer: Answer) -> dict[str, Any]:
        content = answer.content or (None if answer.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        if answer.pictures:
            message["images"] = [_picture(image, caption) for image, caption in answer.pictures]
        if self.body.trace:
            message["trace"] = [{"name": name, "data": data} for name, data in answer.traces]
        logs = None
        if self.body.logprobs:
            kept = TokenLog(self.service.spelling)
            kept.push(answer.logprobs)
            logs = logprobs_body(kept.release(answer.text.strip(), last=True))
        reason = answer.finish_reason
        return {"index": answer.index, "message": message, "finish_reason": reason, "logprobs": logs}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        streams = [_ChoiceStream(self, index) for index in range(self.body.n or 1)]
        for stream in streams:
            yield self._sent([stream.choice({"role": "assistant", "content": ""})])
        try:
            async for event in self._each():
                if event is None:
                    yield ": still here\n\n"
                    continue
                for choice in streams[event.index].choices(event):
                    yield self._sent([choice])
        except APIError as error:
            self._failed = True
            self.service.metrics.failed(error.status)
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._sent([], usage(self.response.usage))
        self._answered = True
        yield "data: [DONE]\n\n"

    def _sent(self, choices: list[dict[str, Any]], counts: Any = None) -> str:
        body = chunk(self.identity, self.body.model, self.created, choices, counts)
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _ChoiceStream:
    """One reply as deltas of the API."""

    def __init__(self, answer: ChatAnswer, index: int) -> None:
        self._index, self._trace = index, bool(answer.body.trace)
        self._log = TokenLog(answer.service.spelling) if answer.body.logprobs else None
        self._trim = Trimmer()
        self._pending: dict[str, Any] = {}  # a delta that waits for the log probabilities of its tokens
        self._calls = 0

    def choice(self, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        """An entry of `choices`."""
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def choices(self, event: Event) -> list[dict[str, Any]]:
        """What an event adds to the stream."""
        match event:
            case LogprobsEvent(entries=entries, text=text):
                self._log.push(entries)
                return self._logged(self._log.release(self._trim(text)))
            case FinishEvent(reason=reason):
                rest = self._logged(self._log.release("", last=True)) if self._log is not None else []
                return [*rest, self.choice({}, None, reason)]
        delta = self._delta(event)
        if self._log is None or not isinstance(event, (TextDelta, ReasoningDelta)):
            return [self.choice(delta)] if delta else []
        for name, text in delta.items():
            self._pending[name] = self._pending.get(name, "") + text
        return []

    def _logged(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        delta, self._pending = self._pending, {}
        return [self.choice(delta, logprobs_body(entries) if entries else None)] if delta or entries else []

    def _delta(self, event: Event) -> dict[str, Any]:
        match event:
            case TextDelta(text=text):
                return {"content": text}
            case ReasoningDelta(text=text):
                return {"reasoning_content": text}
            case CallEvent(call=call):
                self._calls += 1
                return {"tool_calls": [_call(call) | {"index": self._calls - 1}]}
            case PictureEvent(image=image, caption=caption):
                return {"images": [_picture(image, caption)]}
            case TraceEvent(name=name, data=data) if self._trace:
                return {"trace": [{"name": name, "data": data}]}
        return {}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _picture(image: Any, caption: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"type": "image_url", "image_url": {"url": data_url(buffer.getvalue(), "image/png")}, "caption": caption}


def _api_error(error: Exception | None) -> APIError:
    """What the client is told of a request that failed."""
    if isinstance(error, APIError):  # the client went away
        return error
    if isinstance(error, (CallFailed, APIRefused)):
        log.error("the API behind this server failed: %s", error)
        return APIError(502, "the model behind this server did not answer; the server's log says why")
    if isinstance(error, Refused):
        return refused_error(error)
    if isinstance(error, PromptTooLong):
        return APIError(400, str(error), "messages", CONTEXT_EXCEEDED)
    if isinstance(error, UserError):
        return APIError(400, str(error), field_of(error))
    log.error("request failed", exc_info=error)
    return APIError(500, "the request failed; the server's log says why")


class Events(StreamingResponse):
    """An answer as server-sent events; closes it however the connection ends, also before the first event."""

    def __init__(self, answer: ChatAnswer) -> None:
        super().__init__(answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()
