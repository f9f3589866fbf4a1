"""From the engine's pieces to an answer of the API, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from llavakit.errors import UserError
from llavakit.generation.request import Reply, RequestHandle, StreamChunk
from llavakit.serving import toolcalls
from llavakit.serving.logprobs import TokenLog, logprobs_body
from llavakit.serving.presence import Presence
from llavakit.serving.protocol import APIError, chunk, completion, new_id, usage
from llavakit.serving.service import Incoming, Service

log = logging.getLogger("llavakit.serving")


class Trimmer:
    """Text as it streams, without white space at its ends: what may turn out to be the end is held back."""

    def __init__(self) -> None:
        self._held, self._begun = "", False

    def __call__(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept


class Answer:
    """One request from its first byte to its last piece."""

    def __init__(self, service: Service, incoming: Incoming) -> None:
        self.service, self.body, self._incoming = service, incoming.body, incoming
        self._account = incoming.account
        self.identity, self.created = new_id("chatcmpl"), int(time.time())
        self.tools = [tool.function.name for tool in self.body.tools or ()] if self.body.tool_choice != "none" else []
        self.handle: RequestHandle | None = None
        self._pieces: deque[StreamChunk] = deque()
        self._news, self._told = asyncio.Event(), False
        self._began, self._begun = time.perf_counter(), False
        self._closed = self._answered = self._failed = False

    async def start(self) -> None:
        """Queue the request.

        Raises:
            APIError: If it cannot be answered, or its client went away meanwhile.
        """
        loop = asyncio.get_running_loop()
        each = bool(self.body.stream)

        def listen(piece: StreamChunk) -> None:
            """In the engine's thread; wakes the loop as seldom as may be."""
            if not self._begun and piece.token_ids:
                self._begun = True
                self.service.metrics.first_token(time.perf_counter() - self._began)
            self._pieces.append(piece)
            if (each or piece.finish_reason is not None) and not self._told:
                self._told = True
                with contextlib.suppress(RuntimeError):  # the loop is closed when the server has gone
                    loop.call_soon_threadsafe(self._news.set)

        incoming, self._incoming = self._incoming, None  # the media are held no longer than needed
        self.handle = await self.service.submit(incoming, listen)

    def close(self) -> None:
        """Give back what the request holds; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.handle is not None:
            if not self.handle.done:
                self.handle.cancel()
            tokens = sum(len(reply.token_ids) for reply in self.handle.replies)
            self.service.metrics.worked(self.handle.prompt_tokens, tokens)
        if self._answered:
            self.service.metrics.answered(time.perf_counter() - self._began)
        elif self.body.stream and self.handle is not None and not self._failed:
            self.service.metrics.failed(499)
        self._account.close()
        self.service.release()

    async def _each(self) -> AsyncIterator[StreamChunk | None]:
        """Pieces of all replies; None when nothing came for a while."""
        unfinished = self.body.n or 1
        while unfinished:
            if not self._pieces:
                try:
                    async with asyncio.timeout(self.service.settings.keep_alive):
                        await self._news.wait()
                except TimeoutError:
                    yield None
                self._news.clear()
                self._told = False
                continue
            piece = self._pieces.popleft()
            unfinished -= piece.finish_reason is not None
            if piece.finish_reason == "error":
                error = self.handle.error
                if isinstance(error, UserError):
                    raise APIError(400, str(error), "messages")
                log.error("request failed", exc_info=error)
                raise APIError(500, "the request failed; the server's log says why")
            yield piece

    @property
    def _usage(self) -> dict[str, Any]:
        tokens = sum(len(reply.token_ids) for reply in self.handle.replies)
        return usage(self.handle.prompt_tokens, self.handle.reused_tokens, tokens)

    async def whole(self, presence: Presence) -> dict[str, Any]:
        """The whole answer.

        Raises:
            APIError: If the request failed, or its client went away meanwhile.
        """
        await presence.unless_gone(self._collect())
        choices = []
        for reply in self.handle.replies:
            text, calls = reply.text.strip(), []
            if self.tools:
                text, calls = toolcalls.read_reply(text, self.body)
            message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            if calls:
                message["tool_calls"] = calls
            choice = {
                "index": reply.index,
                "message": message,
                "finish_reason": "tool_calls" if calls else reply.finish_reason,
                "logprobs": self._logprobs(reply) if self.body.logprobs else None,
            }
            choices.append(choice)
        self._answered = True
        return completion(self.identity, self.body.model, choices, self._usage)

    def _logprobs(self, reply: Reply) -> dict[str, Any]:
        """Of a whole reply; its text is that before calls are taken out."""
        log = TokenLog(self.service.spelling)
        log.push(reply.logprobs)
        return logprobs_body(log.release(reply.text.strip(), last=True))

    async def _collect(self) -> None:
        async for _ in self._each():
            pass

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        for index in range(self.body.n or 1):
            yield self._event([_delta(index, {"role": "assistant", "content": ""})])
        trimmers = [Trimmer() for _ in range(self.body.n or 1)]
        logs = [TokenLog(self.service.spelling) for _ in range(self.body.n or 1 if self.body.logprobs else 0)]
        try:
            async for piece in self._each():
                if piece is None:
                    yield ": still here\n\n"
                    continue
                log = logs[piece.index] if logs else None
                for choice in self._choices(piece, trimmers[piece.index], log):
                    yield self._event([choice])
        except APIError as error:
            self._failed = True
            self.service.metrics.failed(error.status)
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._event([], self._usage)
        self._answered = True
        yield "data: [DONE]\n\n"

    def _choices(self, piece: StreamChunk, trim: Trimmer, log: TokenLog | None) -> Sequence[dict[str, Any]]:
        reason = piece.finish_reason
        if self.tools:  # calls are known when the reply is whole
            if reason is None:
                return []
            reply = self.handle.replies[piece.index]
            text, calls = toolcalls.read_reply(reply.text.strip(), self.body)
            delta: dict[str, Any] = {"content": text} if text else {}
            if calls:
                delta["tool_calls"] = [{**call, "index": number} for number, call in enumerate(calls)]
            logs = self._logprobs(reply) if log is not None else None
            return [_delta(piece.index, delta, logs), _delta(piece.index, {}, None, "tool_calls" if calls else reason)]
        text, ready = trim(piece.text), []
        if log is not None:
            log.push(piece.logprobs)
            ready = log.release(text, last=reason is not None)
        logs = logprobs_body(ready) if ready else None
        choices = [_delta(piece.index, {"content": text}, logs)] if text or logs else []
        if reason is not None:
            choices.append(_delta(piece.index, {}, None, reason))
        return choices

    def _event(self, choices: list[dict[str, Any]], counts: Any = None) -> str:
        body = chunk(self.identity, self.body.model, self.created, choices, counts)
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class Events(StreamingResponse):
    """An answer as server-sent events; closes it however the connection ends, also before the first event."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


def _delta(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
