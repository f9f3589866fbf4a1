"""The HTTP server: OpenAI's chat API over the generation engine.

One process, one engine thread, one event loop. Media are fetched and decoded before a request is queued; a full
queue answers 429; a client that goes away frees its row before the next step; a request that fails, fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, File, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from llavakit.api import Chat
from llavakit.conversation.encode import disarm
from llavakit.errors import UserError
from llavakit.generation.request import Handle, Piece
from llavakit.serving import toolcalls
from llavakit.serving.metrics import Metrics
from llavakit.serving.policy import MediaFetcher, MediaPolicy, Refused, Uploads
from llavakit.serving.protocol import (
    ChatMessage,
    ChatRequest,
    ImagePart,
    TextPart,
    VideoPart,
    chunk,
    completion,
    error_body,
    logprobs_body,
    new_id,
    usage,
)

log = logging.getLogger("llavakit.serving")
_KINDS = {"image_url": "image", "video_url": "video", "volume_url": "volume"}
_UPLOAD_ID = re.compile(r"^file-[0-9a-f]{32}$")


@dataclass(frozen=True)
class Settings:
    """How one server behaves.

    Attributes:
        names: Model names that clients may ask for; the first is listed.
        api_keys: Keys of which a client must send one; none asks for none.
        origins: Origins of web pages that may call the API; none closes it to other pages.
        max_queue: Requests that may wait beside those being decoded; one more is answered with 429.
        max_tokens: Longest reply; requests for more are cut to it.
        default_tokens: Longest reply of a request that names none.
        temperature: Of requests that name none; 0 is greedy.
        body_bytes: Largest request.
        upload_bytes: Memory for uploads.
        keep_alive: Seconds between comments on a stream that is silent.
        media: The media policy.
    """

    names: tuple[str, ...] = ("llavakit",)
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_queue: int = 64
    max_tokens: int = 4096
    default_tokens: int = 512
    temperature: float = 0.0
    body_bytes: int = 64 * 2**20
    upload_bytes: int = 512 * 2**20
    keep_alive: float = 15.0
    media: MediaPolicy = field(default_factory=MediaPolicy)


class APIError(Exception):
    """An answer with an error in OpenAI's form."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status not in (401, 429) else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.status, self.body, self.headers = status, error_body(message, kind, param, code), headers


class BodyLimit:
    """ASGI middleware: a request body above a limit is answered with 413 and read no further."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        seen, started = 0, False

        async def limited() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most and message["type"] == "http.request":
                raise _TooLarge
            return message

        async def watched(message: Any) -> None:
            nonlocal started
            if seen > self.most and not started:
                return  # what the application makes of the aborted body is replaced below
            started = True
            await send(message)

        if declared.isdigit() and int(declared) > self.most:
            seen = int(declared)
        else:
            with contextlib.suppress(_TooLarge):
                await self.app(scope, limited, watched)
        if seen > self.most and not started:
            body = error_body(f"the request is larger than {self.most} bytes", "invalid_request_error")
            await JSONResponse(body, 413)(scope, receive, send)


class _TooLarge(Exception):
    pass


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


class Service:
    """A loaded model behind the API.

    Args:
        chat: Model, processor and engine.
        settings: How to behave.
    """

    def __init__(self, chat: Chat, settings: Settings) -> None:
        self.chat, self.settings = chat, settings
        self.uploads = Uploads(settings.media.file_bytes, settings.upload_bytes)
        self.fetcher = MediaFetcher(settings.media, self.uploads)
        self.metrics = Metrics(chat.engine)
        self.active = 0
        self.closing = False
        self._decoders = CapacityLimiter(2)
        reading = chat.processor.reading or {}
        limits = {"limits": settings.media.limits}
        chat.processor.reading = {kind: {**reading.get(kind, {}), **limits} for kind in _KINDS.values()}

    def admit(self) -> None:
        """Count a request in.

        Raises:
            APIError: 429 if the queue is full, 503 while shutting down.
        """
        if self.closing:
            raise APIError(503, "the server is shutting down", headers={"Retry-After": "10"})
        if self.active >= self.chat.engine.max_batch + self.settings.max_queue:
            raise APIError(429, "the queue is full; try again", code="queue_full", headers={"Retry-After": "1"})
        self.active += 1

    def release(self) -> None:
        """Count a request out."""
        self.active -= 1

    async def submit(self, request: ChatRequest, listener: Callable[[Piece], None]) -> Handle:
        """Fetch, decode and queue a request.

        Raises:
            APIError: If it cannot be run, naming the field.
        """
        messages = await self._messages(request)
        sampling = self._sampling(request)
        prepare = functools.partial(self._prepare, messages, sampling)
        try:
            prepared = await to_thread.run_sync(prepare, limiter=self._decoders)
            return self.chat.engine.submit(prepared, stream=bool(request.stream), listener=listener)
        except UserError as error:
            raise APIError(400, str(error), "messages") from None

    def _prepare(self, messages: list[dict[str, Any]], sampling: dict[str, Any]) -> Any:
        return self.chat.request(disarm(messages, self.chat.processor.tokenizer), **sampling)

    def _sampling(self, request: ChatRequest) -> dict[str, Any]:
        settings = self.settings
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if (request.n or 1) > self.chat.engine.max_batch:
            raise APIError(400, f"this server answers at most n = {self.chat.engine.max_batch}", "n")
        given = {
            "temperature": settings.temperature if request.temperature is None else request.temperature,
            "max_new_tokens": min(request.budget or settings.default_tokens, settings.max_tokens),
            "stop": stop,
            "n": request.n or 1,
            "seed": request.seed,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        }
        return {name: value for name, value in given.items() if value is not None}

    async def _messages(self, request: ChatRequest) -> list[dict[str, Any]]:
        counts = dict.fromkeys(_KINDS.values(), 0)
        messages: list[dict[str, Any]] = []
        for number, message in enumerate(request.messages):
            role = "system" if message.role == "developer" else message.role
            content = await self._content(message, f"messages.{number}", counts)
            messages.append({"role": role, "content": content})
        tools = toolcalls.describe(request)
        if tools is not None:
            part = {"type": "text", "text": tools}
            if messages[0]["role"] == "system":
                messages[0]["content"] = [*messages[0]["content"], {"type": "text", "text": "\n"}, part]
            else:
                messages.insert(0, {"role": "system", "content": [part]})
        return messages

    async def _content(self, message: ChatMessage, where: str, counts: dict[str, int]) -> list[dict[str, Any]]:
        if message.tool_calls:
            return [{"type": "text", "text": toolcalls.as_text(message)}]
        if message.content is None:
            if message.role != "assistant":
                raise APIError(400, f"a {message.role} message needs content", f"{where}.content")
            return []
        if isinstance(message.content, str):
            return [{"type": "text", "text": message.content}]
        parts = []
        for number, part in enumerate(message.content):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            kind = "image" if isinstance(part, ImagePart) else "video" if isinstance(part, VideoPart) else "volume"
            field_name = f"{where}.content.{number}.{part.type}.url"
            if message.role not in ("user", "tool"):
                raise APIError(400, f"a {message.role} message holds no media", field_name)
            counts[kind] += 1
            most = getattr(self.settings.media, f"{kind}s")
            if counts[kind] > most:
                raise APIError(400, f"a request holds at most {most} {kind}s", field_name)
            try:
                content = await self.fetcher.read(getattr(part, part.type).url)
            except Refused as refused:
                raise APIError(refused.status, str(refused), field_name) from None
            parts.append({"type": kind, kind: content})
        return parts


def create_app(chat: Chat, settings: Settings | None = None) -> FastAPI:
    """The application; the engine's thread lives as long as it."""
    settings = settings or Settings()
    service = Service(chat, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        chat.engine.start()
        yield
        service.closing = True
        await to_thread.run_sync(functools.partial(chat.engine.stop, drain=True))

    app = FastAPI(title="llavakit", version="1", lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.add_middleware(BodyLimit, most=settings.body_bytes)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _handle_errors(app, service)
    _add_routes(app, service)
    return app


def _handle_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        service.metrics.failed(error.status)
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        service.metrics.failed(400)
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"] if step not in ("body", "query", "path"))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            message = f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}"
        text = f"{place}: {message}" if place else message
        return JSONResponse(error_body(text, "invalid_request_error", place or None), 400)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(error_body(str(error.detail), kind), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.exception("unforeseen error")
        service.metrics.failed(500)
        return JSONResponse(error_body("the server failed; its log says why", "server_error"), 500)


def _authorised(service: Service) -> Callable[[Request], Awaitable[None]]:
    keys = [key.encode() for key in service.settings.api_keys]

    async def check(request: Request) -> None:  # plain functions would go through a thread each time
        if not keys:
            return
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        matches = [hmac.compare_digest(sent, key) for key in keys]  # every key, so that time tells nothing
        if not any(matches):
            raise APIError(401, "a valid API key is needed in the Authorization header", code="invalid_api_key")

    return check


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": "An error in OpenAI's form"} for status in statuses}


def _add_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings
    guarded = [Depends(_authorised(service))]

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the server takes requests."""
        engine = service.chat.engine
        body = {"status": "closing" if service.closing else "ok", "waiting": engine.waiting, "active": engine.active}
        return JSONResponse(body, 503 if service.closing else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus' form."""
        return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=guarded, responses=_errors(401))
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [_model(name) for name in settings.names]}

    @app.get("/v1/models/{name:path}", dependencies=guarded, responses=_errors(401, 404))
    async def model(name: str) -> dict[str, Any]:
        """Facts about one model."""
        if name not in settings.names:
            raise APIError(404, f"model {name!r} is not served here", "model", "model_not_found")
        return _model(name)

    @app.post("/v1/files", dependencies=guarded, responses=_errors(400, 401, 413))
    async def upload(file: UploadFile = File(), purpose: str = "vision") -> dict[str, Any]:
        """Keep a medium in memory for later requests, which name it `upload:ID`."""
        content = bytearray()
        while block := await file.read(2**20):
            content += block
            if len(content) > settings.media.file_bytes:
                raise APIError(413, f"a file may hold at most {settings.media.file_bytes} bytes", "file")
        if not content:
            raise APIError(400, "the file is empty", "file")
        identity = new_id("file")
        service.uploads.add(identity, bytes(content))
        return _file(identity, len(content), purpose)

    @app.delete("/v1/files/{identity}", dependencies=guarded, responses=_errors(401, 404))
    async def forget(identity: str) -> dict[str, Any]:
        """Forget an upload."""
        if not _UPLOAD_ID.match(identity) or not service.uploads.remove(identity):
            raise APIError(404, "no such upload", "identity")
        return {"id": identity, "object": "file", "deleted": True}

    @app.post(
        "/v1/chat/completions",
        dependencies=guarded,
        responses=_errors(400, 401, 404, 408, 413, 429, 503),
        response_model=None,
    )
    async def chat_completions(body: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        """Answer a conversation."""
        if body.model not in settings.names:
            known = ", ".join(settings.names)
            raise APIError(404, f"model {body.model!r} is not served here; served: {known}", "model", "model_not_found")
        service.admit()
        answer = Answer(service, body)
        try:
            await answer.start()
        except BaseException:
            answer.close()
            raise
        if body.stream:
            return Events(answer)
        try:
            return JSONResponse(await answer.whole(request))
        finally:
            answer.close()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llavakit"}


def _file(identity: str, size: int, purpose: str) -> dict[str, Any]:
    return {
        "id": identity,
        "object": "file",
        "bytes": size,
        "created_at": int(time.time()),
        "filename": identity,  # the client's own name is not kept
        "purpose": purpose,
    }


class Answer:
    """One request from its first byte to its last piece."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service, self.body = service, body
        self.identity, self.created = new_id("chatcmpl"), int(time.time())
        self.tools = [tool.function.name for tool in body.tools or ()] if body.tool_choice != "none" else []
        self.handle: Handle | None = None
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._began = time.perf_counter()
        self._closed = False

    async def start(self) -> None:
        """Queue the request."""
        loop = asyncio.get_running_loop()

        def listen(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed when the server has gone
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self.handle = await self.service.submit(self.body, listen)

    def close(self) -> None:
        """Give back what the request holds; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.handle is not None:
            if not self.handle.done:
                self.handle.cancel()
            tokens = sum(len(reply.token_ids) for reply in self.handle.replies)
            self.service.metrics.finished(time.perf_counter() - self._began, self.handle.prompt_tokens, tokens)
        self.service.release()

    async def _each(self) -> AsyncIterator[Piece | None]:
        """Pieces of all replies; None when nothing came for a while."""
        unfinished, first = self.body.n or 1, True
        while unfinished:
            try:
                piece = await asyncio.wait_for(self._pieces.get(), self.service.settings.keep_alive)
            except TimeoutError:
                yield None
                continue
            if first and piece.token_ids:
                first = False
                self.service.metrics.first_token(time.perf_counter() - self._began)
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

    async def whole(self, request: Request) -> dict[str, Any]:
        """The whole answer; ends early if the client goes away."""
        gone = asyncio.ensure_future(_disconnected(request))
        collect = asyncio.ensure_future(self._collect())
        try:
            await asyncio.wait({gone, collect}, return_when=asyncio.FIRST_COMPLETED)
            if not collect.done():
                raise APIError(499, "the client closed the request")
            await collect
        finally:
            for task in (gone, collect):
                task.cancel()
        tokenizer = self.service.chat.processor.tokenizer
        choices = []
        for reply in self.handle.replies:
            text, calls = reply.text.strip(), []
            if self.tools:
                text, calls = toolcalls.read(text, self.tools)
            message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            if calls:
                message["tool_calls"] = calls
            choice = {
                "index": reply.index,
                "message": message,
                "finish_reason": "tool_calls" if calls else reply.finish_reason,
                "logprobs": logprobs_body(reply.logprobs, tokenizer) if self.body.logprobs else None,
            }
            choices.append(choice)
        return completion(self.identity, self.body.model, choices, self._usage)

    async def _collect(self) -> None:
        async for _ in self._each():
            pass

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        for index in range(self.body.n or 1):
            yield self._event([_delta(index, {"role": "assistant", "content": ""})])
        trimmers = [Trimmer() for _ in range(self.body.n or 1)]
        try:
            async for piece in self._each():
                if piece is None:
                    yield ": still here\n\n"
                    continue
                for choice in self._choices(piece, trimmers[piece.index]):
                    yield self._event([choice])
        except APIError as error:
            self.service.metrics.failed(error.status)
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._event([], self._usage)
        yield "data: [DONE]\n\n"

    def _choices(self, piece: Piece, trim: Trimmer) -> Sequence[dict[str, Any]]:
        tokenizer = self.service.chat.processor.tokenizer
        logs = logprobs_body(piece.logprobs, tokenizer) if self.body.logprobs and piece.logprobs else None
        reason = piece.finish_reason
        if self.tools:  # calls are known when the reply is whole
            if reason is None:
                return []
            text, calls = toolcalls.read(self.handle.replies[piece.index].text.strip(), self.tools)
            delta: dict[str, Any] = {"content": text} if text else {}
            if calls:
                delta["tool_calls"] = [{**call, "index": number} for number, call in enumerate(calls)]
            return [_delta(piece.index, delta, logs), _delta(piece.index, {}, None, "tool_calls" if calls else reason)]
        text = trim(piece.text)
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


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
