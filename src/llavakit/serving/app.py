"""The HTTP server: OpenAI's chat and responses APIs over a responder.

One process, one model, one event loop. Whoever may not ask is refused from the headers (`access`), bodies are
limited and kept off the loop (`bodies`), media are fetched and decoded before a request is queued (`service`); a full
queue answers 429; a client that goes away frees its row before the next step; a request that fails, fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from anyio import to_thread
from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llavakit.data.strict_json import JsonError
from llavakit.errors import UserError, quoted, shorten
from llavakit.generation.responder import Responder
from llavakit.media.policy import Refused
from llavakit.serving.access import Access, Sessions
from llavakit.serving.answer import ChatAnswer, Events
from llavakit.serving.bodies import BodiesInFlight, BodyLimit, ChatBody
from llavakit.serving.memory import Account
from llavakit.serving.presence import Presence
from llavakit.serving.protocol import APIError, ChatRequest, Completion, ErrorAnswer, error_body, new_id
from llavakit.serving.responses_answer import ResponseBody, ResponsesAnswer, conversation_of, kept_response
from llavakit.serving.responses_request import chat_fields
from llavakit.serving.service import Incoming, Service, Settings

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
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ResponseBody,
        "description": "The response; with `stream` as server-sent events of the types that OpenAI's clients know",
        "content": {"text/event-stream": {"schema": {"properties": {"data": {"type": "string"}}}}},
    }
}


def _body(name: str) -> dict[str, Any]:
    """What the OpenAPI document says of a body that FastAPI does not read."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_UPLOAD_ID = re.compile(r"^file-[0-9a-f]{32}$")


def create_app(responder: Responder, settings: Settings | None = None) -> FastAPI:
    """The application; the responder's threads live as long as it."""
    settings = settings or Settings()
    service, sessions = Service(responder, settings), Sessions()
    failed = service.metrics.failed

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        responder.start()
        housekeeping = asyncio.create_task(_forget_old(service))
        yield
        housekeeping.cancel()
        service.closing = True
        await to_thread.run_sync(functools.partial(responder.stop, drain=True))

    app = FastAPI(title="llavakit", version="1", lifespan=lifespan, redoc_url=None)
    app.state.service, app.state.sessions = service, sessions
    flight = BodiesInFlight(settings.flight_bytes)
    # The last one is the outermost: CORS only adds headers and answers what browsers ask in advance.
    app.add_middleware(
        BodyLimit, most=settings.body_bytes, seconds=settings.body_seconds, flight=flight, refused=failed
    )
    app.add_middleware(Access, policy=settings.access, sessions=sessions, refused=failed)
    app.add_middleware(
        CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    _handle_errors(app, service)
    _add_routes(app, service)
    _describe_requests(app, service)
    return app


async def _forget_old(service: Service) -> None:
    while True:
        await asyncio.sleep(60)
        service.uploads.expire()
        service.responses.expire()


def _describe_requests(app: FastAPI, service: Service) -> None:
    """The schemas of conversations in the OpenAPI document; their bodies are read by `ChatBody`, not by FastAPI."""
    describe = app.openapi

    def document() -> dict[str, Any]:
        described = describe()
        schemas = described["components"]["schemas"]
        for name, kind in (("ChatRequest", service.request_type), ("ResponsesRequest", service.responses_type)):
            if name not in schemas:
                schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= {**schema.pop("$defs"), name: schema}
        return described

    app.openapi = document  # FastAPI's way to extend the document


def _handle_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        service.metrics.failed(error.status)
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        service.metrics.failed(400)
        first = error.errors()[0]
        return JSONResponse(_invalid(first, first["loc"][1:], error.body), 400)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(error_body(str(error.detail), kind), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.exception("unforeseen error")
        service.metrics.failed(500)
        return JSONResponse(error_body("the server failed; its log says why", "server_error"), 500)


def _invalid(error: dict[str, Any], steps: Sequence[Any], body: Any) -> dict[str, Any]:
    """The answer to a request with a wrong field."""
    place = _place(error, steps, body)
    message = error["msg"].removeprefix("Value error, ")
    text = str(UserError(f"{place}: {message}" if place else message))
    return error_body(text, "invalid_request_error", place or None)


def _place(error: dict[str, Any], steps: Sequence[Any], body: Any) -> str:
    """Dotted path of the field that an error is about, without the names of types that pydantic puts in between."""
    found, node = [], body
    for step in steps:
        known = step in node if isinstance(node, dict) else isinstance(node, list) and step in range(len(node))
        if known:
            node = node[step]
        if known or (step is steps[-1] and error["type"] == "missing"):
            found.append(shorten(str(step)))
    return shorten(".".join(found))


def _add_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings
    # `Access` asks for keys; this says so in the document
    documented = [Depends(HTTPBearer(auto_error=False))] if settings.api_keys else []
    guarded: dict[str, Any] = {"dependencies": documented, "responses": _ERRORS}

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the server takes requests."""
        responder = service.responder
        counts = {"waiting": responder.waiting, "active": responder.active}
        body = {"status": "closing" if service.closing else "ok", **counts}
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
            raise APIError(404, f"model {quoted(name)} is not served here", "model", "model_not_found")
        return _model(name)

    @app.post("/v1/files", **guarded)
    async def upload(
        request: Request, file: UploadFile = File(), purpose: str = Form("vision", max_length=64)
    ) -> dict[str, Any]:
        """Keep a media item in memory for later requests, which name it `upload:ID`."""
        content = bytearray()
        while block := await file.read(2**20):
            content += block
            if len(content) > settings.media.file_bytes:
                raise APIError(413, f"a file may hold at most {settings.media.file_bytes} bytes", "file")
        if not content:
            raise APIError(400, "the file is empty", "file")
        identity = new_id("file")
        try:
            service.uploads.add(request.state.owner, identity, bytes(content), len(content))
        except Refused as refused:
            raise APIError(refused.status, str(refused), "file") from None
        return _file(identity, len(content), purpose)

    @app.delete("/v1/files/{identity}", **guarded)
    async def forget(identity: str, request: Request) -> dict[str, Any]:
        """Forget an upload."""
        if not _UPLOAD_ID.match(identity) or not service.uploads.remove(request.state.owner, identity):
            raise APIError(404, "no such upload", "identity")
        return {"id": identity, "object": "file", "deleted": True}

    chat_options = {"response_model": None, "openapi_extra": _body("ChatRequest"), "responses": _ERRORS | _ANSWERS}

    @app.post("/v1/chat/completions", **(guarded | chat_options))
    async def chat_completions(request: Request) -> JSONResponse | StreamingResponse:
        """Answer a conversation."""
        content, body = await _read(request, service, service.request_type)
        return await _answered(request, service, body, content, functools.partial(ChatAnswer, service))

    responses_options = {
        "response_model": None,
        "openapi_extra": _body("ResponsesRequest"),
        "responses": _ERRORS | _RESPONSES,
    }

    @app.post("/v1/responses", **(guarded | responses_options))
    async def responses(request: Request) -> JSONResponse | StreamingResponse:
        """Answer items, perhaps going on from an earlier response."""
        content, asked = await _read(request, service, service.responses_type)
        conversation = conversation_of(asked, content, service.responses, request.state.owner)
        fields = chat_fields(asked, conversation)
        try:
            body = service.request_type.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            refused = _invalid(first, first["loc"], fields)["error"]
            raise conversation.error(APIError(400, refused["message"], refused["param"])) from None
        make = functools.partial(ResponsesAnswer, service, request=asked, conversation=conversation)
        return await _answered(request, service, body, content, make)

    @app.get("/v1/responses/{identity}", **guarded, response_model=ResponseBody)
    async def response(identity: str, request: Request) -> JSONResponse:
        """A response that is kept."""
        return JSONResponse(kept_response(service.responses, request.state.owner, identity, "identity").body)

    @app.delete("/v1/responses/{identity}", **guarded)
    async def forget_response(identity: str, request: Request) -> dict[str, Any]:
        """Forget a response."""
        kept_response(service.responses, request.state.owner, identity, "identity")
        service.responses.remove(request.state.owner, identity)
        return {"id": identity, "object": "response", "deleted": True}


async def _answered(
    request: Request, service: Service, body: ChatRequest, content: ChatBody, make: Callable[[Incoming], ChatAnswer]
) -> JSONResponse | StreamingResponse:
    """The answer to a request that has been read."""
    service.admit()
    async with Presence(request) as presence:
        account = Account(service.memory)
        incoming = Incoming(body, content, request.state.owner, request.state.body.release, presence, account)
        answer = make(incoming)
        try:
            await answer.start()
            if not body.stream:
                return JSONResponse(await answer.whole(presence))
        except BaseException:
            answer.close()
            raise
        finally:
            if not body.stream:
                answer.close()
    return Events(answer)


async def _read(request: Request, service: Service, expected: type[BaseModel]) -> tuple[ChatBody, Any]:
    """The body of a request that holds a conversation, as it came and as it was understood."""
    settings = service.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"send Content-Type: application/json, not {quoted(kind)}")
    content = ChatBody(settings.json_bytes, expected)
    try:
        async for chunk in request.stream():
            content.feed(chunk)
        body = await to_thread.run_sync(content.read)
    except ClientDisconnect:
        raise APIError(499, "the client closed the request") from None
    except JsonError as error:
        raise APIError(400, f"the body is not valid JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise RequestValidationError([first | {"loc": ("body", *first["loc"])}], body=content.value) from None
    if body.model not in settings.names:
        said = f"model {quoted(body.model)} is not served here; served: {', '.join(settings.names)}"
        raise APIError(404, said, "model", "model_not_found")
    return content, body


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
