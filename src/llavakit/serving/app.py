"""The HTTP server: OpenAI's chat API over the generation engine.

One process, one engine thread, one event loop. Media are fetched and decoded before a request is queued; a full
queue answers 429; a client that goes away frees its row before the next step; a request that fails, fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from anyio import to_thread
from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from llavakit.generation.chat import Chat
from llavakit.serving.answer import Answer, Events
from llavakit.serving.protocol import ChatRequest, Completion, ErrorAnswer, error_body, new_id
from llavakit.serving.service import APIError, Service, Settings

log = logging.getLogger("llavakit.serving")
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be answered; `param` names the field"},
    "5XX": {"model": ErrorAnswer, "description": "The server failed, or is shutting down"},
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Completion,
        "description": "The answer; with `stream` as server-sent events, each a `chat.completion.chunk`",
        "content": {"text/event-stream": {"schema": {"properties": {"data": {"type": "string"}}}}},
    }
}
_UPLOAD_ID = re.compile(r"^file-[0-9a-f]{32}$")


class BodyLimit:
    """ASGI middleware: a request body that is too large or too slow is read no further.

    Args:
        most: Bytes; more are answered with 413.
        seconds: Time for the whole body; more is answered with 408.
    """

    def __init__(self, app: Any, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline, seen, unfinished, started = loop.time() + self.seconds, 0, True, False
        refused: JSONResponse | None = None

        async def limited() -> Any:
            nonlocal seen, unfinished, refused
            if not unfinished:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                refused = _refusal(408, f"the request took longer than {self.seconds:g} s to arrive")
                raise _Aborted from None
            seen += len(message.get("body", b""))
            if seen > self.most:
                refused = _refusal(413, f"the request is larger than {self.most} bytes")
                raise _Aborted
            unfinished = message.get("more_body", False)
            return message

        async def watched(message: Any) -> None:
            nonlocal started
            if refused is None:  # what the application makes of an aborted body is replaced below
                started = True
                await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most:
            refused = _refusal(413, f"the request is larger than {self.most} bytes")
        else:
            with contextlib.suppress(_Aborted):
                await self.app(scope, limited, watched)
        if refused is not None and not started:
            await refused(scope, receive, send)


class _Aborted(Exception):
    pass


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(message, "invalid_request_error"), status, headers={"Connection": "close"})


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
    app.add_middleware(BodyLimit, most=settings.body_bytes, seconds=settings.body_seconds)
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
        place = _place(first, error.body)
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


def _place(error: dict[str, Any], body: Any) -> str:
    """Dotted path of the field that an error is about, without the names of types that pydantic puts in between."""
    steps, node = [], body
    for step in error["loc"][1:]:
        known = step in node if isinstance(node, dict) else isinstance(node, list) and step in range(len(node))
        if known:
            node = node[step]
        if known or (step is error["loc"][-1] and error["type"] == "missing"):
            steps.append(str(step))
    return ".".join(steps)


def _guard(keys: Sequence[str]) -> list[Any]:
    """What every operation of the API depends on: a key, if there are keys."""
    known = [key.encode() for key in keys]
    bearer = HTTPBearer(auto_error=False)

    # asynchronous, since plain functions would go through a thread each time
    async def check(sent: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:
        given = sent.credentials.encode() if sent is not None else b""
        matches = [hmac.compare_digest(given, key) for key in known]  # every key, so that time tells nothing
        if not any(matches):
            raise APIError(401, "a valid API key is needed in the Authorization header", code="invalid_api_key")

    return [Depends(check)] if known else []


def _add_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings
    guarded: dict[str, Any] = {"dependencies": _guard(settings.api_keys), "responses": _ERRORS}

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

    @app.get("/v1/models", **guarded)
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [_model(name) for name in settings.names]}

    @app.get("/v1/models/{name:path}", **guarded)
    async def model(name: str) -> dict[str, Any]:
        """Facts about one model."""
        if name not in settings.names:
            raise APIError(404, f"model {name!r} is not served here", "model", "model_not_found")
        return _model(name)

    @app.post("/v1/files", **guarded)
    async def upload(file: UploadFile = File(), purpose: str = Form("vision", max_length=64)) -> dict[str, Any]:
        """Keep a media item in memory for later requests, which name it `upload:ID`."""
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

    @app.delete("/v1/files/{identity}", **guarded)
    async def forget(identity: str) -> dict[str, Any]:
        """Forget an upload."""
        if not _UPLOAD_ID.match(identity) or not service.uploads.remove(identity):
            raise APIError(404, "no such upload", "identity")
        return {"id": identity, "object": "file", "deleted": True}

    @app.post("/v1/chat/completions", response_model=None, **(guarded | {"responses": _ERRORS | _ANSWERS}))
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
