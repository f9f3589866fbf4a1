"""Answers of `/v1/responses`: output items, whole or as typed server-sent events, and those that are kept for later.

An item is open while its text grows; an event of another kind closes it. A whole answer is what a stream would have
added up to.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from llavakit.conversation.turns import CallEvent, Event, PictureEvent, ReasoningDelta, TextDelta, TraceEvent
from llavakit.errors import quoted
from llavakit.generation.response import FinishEvent, LogprobsEvent
from llavakit.media.policy import Refused
from llavakit.serving.answer import ChatAnswer
from llavakit.serving.bodies import ChatBody
from llavakit.serving.logprobs import TokenLog
from llavakit.serving.presence import Presence
from llavakit.serving.protocol import APIError, new_id
from llavakit.serving.responses_request import ITEMS, Conversation, ResponsesRequest, media_of
from llavakit.serving.service import Incoming, Service
from llavakit.serving.uploads import Uploads

_OVERHEAD = 4096  # bytes that a kept response counts for beside its contents, so that their number is bounded too
Sent = tuple[str, dict[str, Any]]


class ResponseBody(BaseModel):
    """A response in OpenAI's form; `trace` (if asked for) extends it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    usage: dict[str, Any] | None
    previous_response_id: str | None
    store: bool
    trace: list[dict[str, Any]] = []


@dataclass
class KeptResponse:
    """A response that a later request may go on from.

    Attributes:
        body: As it was sent.
        items: Everything up to its end.
        media: Data URLs that the items name by number.
    """

    body: dict[str, Any]
    items: list[dict[str, Any]]
    media: list[bytearray]

    @property
    def size(self) -> int:
        """Bytes of memory, roughly."""
        texts = sum(len(json.dumps(value, ensure_ascii=False).encode()) for value in (self.body, self.items))
        return texts + sum(map(len, self.media)) + _OVERHEAD


def kept_response(kept: Uploads[KeptResponse], owner: str, identity: str, field: str) -> KeptResponse:
    """A response of this owner.

    Raises:
        APIError: 404 if it is unknown, somebody else's, or forgotten.
    """
    try:
        return kept.get(owner, identity)
    except Refused:
        said = f"response {quoted(identity)} is unknown or has been forgotten"
        raise APIError(404, said, field, "previous_response_not_found") from None


def conversation_of(
    request: ResponsesRequest, content: ChatBody, kept: Uploads[KeptResponse], owner: str
) -> Conversation:
    """Instructions, the items of the response that the request goes on from, and the request's own.

    Raises:
        APIError: If there is no such response, no item, or an item is malformed.
    """
    conversation = Conversation()
    if request.instructions is not None:
        conversation.instruct(request.instructions)
    if request.previous_response_id is not None:
        earlier = kept_response(kept, owner, request.previous_response_id, "previous_response_id")
        first = len(content.media)
        content.media += earlier.media
        for item in ITEMS.validate_python(earlier.items):
            for part in media_of(item):
                name = f"{part.modality}_url"
                number = _number(getattr(part, name))
                if number is not None:
                    setattr(part, name, f"data:#{first + number}")
            conversation.add(item, "previous_response_id")
    for number, item in enumerate(request.items):
        conversation.add(item, "input" if isinstance(request.input, str) else f"input.{number}")
    if not conversation.items:
        raise APIError(400, "there is nothing to answer", "input")
    return conversation


def _number(url: str | None) -> int | None:
    return int(url.removeprefix("data:#")) if url is not None and url.startswith("data:#") else None


class ResponsesAnswer(ChatAnswer):
    """One request to `/v1/responses` from its first byte to its last event."""

    def __init__(
        self, service: Service, incoming: Incoming, request: ResponsesRequest, conversation: Conversation
    ) -> None:
        super().__init__(service, incoming)
        self.identity = new_id("resp")
        self.request, self.conversation, self._owner = request, conversation, incoming.owner
        wanted = request.store is not False
        self._media = list(incoming.content.media) if wanted else []  # what is kept stays when the service takes it
        self._output = _Output(self)
        self._traces: list[dict[str, Any]] = []

    async def start(self) -> None:
        try:
            await super().start()
        except APIError as error:
            raise self.conversation.error(error) from None

    async def whole(self, presence: Presence) -> dict[str, Any]:
        try:
            await presence.unless_gone(self._collect())
        except APIError as error:
            raise self.conversation.error(error) from None
        self._answered = True
        return self._finished()

    async def _collect(self) -> None:
        async for event in self._each():
            self._output.push(event)
            self._trace(event)

    def _trace(self, event: Event | None) -> None:
        if isinstance(event, TraceEvent) and self.body.trace:
            self._traces.append({"name": event.name, "data": event.data})

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events, each with its type and number."""
        number = 0

        def sent(kind: str, fields: dict[str, Any]) -> str:
            nonlocal number
            data = {"type": kind, "sequence_number": number, **fields}
            number += 1
            return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"

        yield sent("response.created", {"response": self._described("in_progress")})
        yield sent("response.in_progress", {"response": self._described("in_progress")})
        try:
            async for event in self._each():
                if event is None:
                    yield ": still here\n\n"
                    continue
                self._trace(event)
                for kind, fields in self._output.push(event):
                    yield sent(kind, fields)
        except APIError as error:
            self._failed = True
            self.service.metrics.failed(error.status)
            detail = self.conversation.error(error).body["error"]
            code = "server_error" if error.status >= 500 else "invalid_prompt"
            failed = self._described("failed") | {"error": {"code": code, "message": detail["message"]}}
            yield sent("response.failed", {"response": failed})
            return
        self._answered = True
        body = self._finished()
        yield sent(f"response.{body['status']}", {"response": body})

    def _finished(self) -> dict[str, Any]:
        """The whole response, kept if the client did not ask otherwise and there is room."""
        cut = self._output.reason == "length"
        body = self._described("incomplete" if cut else "completed")
        body["output"] = self._output.items
        body["completed_at"] = None if cut else int(time.time())
        body["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        used = self.response.usage
        body["usage"] = {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0, **used.details},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        }
        if self.body.trace:
            body["trace"] = self._traces
        if self.request.store is not False:
            body["store"] = self._keep(body)
        return body

    def _keep(self, body: dict[str, Any]) -> bool:
        """Whether there was room for the response."""
        kept = KeptResponse(body, self.conversation.items + self._output.kept_items(), self._media)
        try:
            self.service.responses.add(self._owner, self.identity, kept, kept.size)
        except Refused:
            return False
        return True

    def _described(self, status: str) -> dict[str, Any]:
        """The response without its output."""
        request, settings = self.request, self.service.settings
        choice = request.tool_choice or "auto"
        return {
            "id": self.identity,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": settings.temperature if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }


def _tool(tool: Any) -> dict[str, Any]:
    return {"parameters": None, "strict": None} | tool.model_dump(exclude_none=True)


class _Output:
    """The items of a reply, and the events that tell of them."""

    def __init__(self, answer: ResponsesAnswer) -> None:
        self.items: list[dict[str, Any]] = []
        self.reason = "stop"
        self._open: dict[str, Any] | None = None
        self._log = TokenLog(answer.service.spelling) if answer.body.logprobs else None

    def kept_items(self) -> list[dict[str, Any]]:
        """The items as a later request's input; log probabilities are left out."""
        return [
            item | {"content": [{key: part[key] for key in ("type", "text")} for part in item["content"]]}
            if "content" in item
            else item
            for item in self.items
        ]

    def push(self, event: Event | None) -> list[Sent]:
        """What an event adds to the stream."""
        match event:
            case TextDelta(text=text):
                return self._grow("message", "output_text", text)
            case ReasoningDelta(text=text):
                return self._grow("reasoning", "reasoning_text", text)
            case LogprobsEvent(entries=entries) if self._log is not None:
                self._log.push(entries)
            case CallEvent(call=call):
                named = {"call_id": call.id, "name": call.name}
                item = {"id": new_id("fc"), "type": "function_call", **named, "arguments": "", "status": "in_progress"}
                sent = [*self._close(), *self._begin(item)]
                place = self._place
                item["arguments"] = call.arguments
                sent.append(("response.function_call_arguments.delta", place | {"delta": call.arguments}))
                done = place | {"name": call.name, "arguments": call.arguments}
                sent.append(("response.function_call_arguments.done", done))
                return [*sent, *self._end()]
            case PictureEvent(image=image, caption=caption):
                item = {"id": new_id("ig"), "type": "image_generation_call", "status": "in_progress", "result": None}
                sent = [*self._close(), *self._begin(item)]
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                item["result"] = base64.b64encode(buffer.getvalue()).decode()
                if caption:
                    item["revised_prompt"] = caption
                sent.append(("response.image_generation_call.completed", self._place))
                return [*sent, *self._end()]
            case FinishEvent(reason=reason):
                self.reason = reason
                return self._close(last=True)
        return []

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._open["id"], "output_index": len(self.items)}

    def _begin(self, item: dict[str, Any]) -> list[Sent]:
        self._open = item
        shown = item | ({"content": []} if "content" in item else {})
        return [("response.output_item.added", {"output_index": len(self.items), "item": shown})]

    def _end(self) -> list[Sent]:
        item, self._open = self._open, None
        item["status"] = "incomplete" if self.reason == "length" and "content" in item else "completed"
        self.items.append(item)
        return [("response.output_item.done", {"output_index": len(self.items) - 1, "item": dict(item)})]

    def _grow(self, kind: str, part_kind: str, text: str) -> list[Sent]:
        sent: list[Sent] = []
        if self._open is None or self._open["type"] != kind:
            sent += self._close()
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            own: dict[str, Any] = {"summary": []}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
                own = {"role": "assistant"}
            prefix = "msg" if kind == "message" else "rs"
            sent += self._begin({"id": new_id(prefix), "type": kind, "status": "in_progress", **own, "content": [part]})
            sent.append(("response.content_part.added", self._place | {"content_index": 0, "part": dict(part)}))
        self._open["content"][0]["text"] += text
        delta = self._place | {"content_index": 0, "delta": text}
        return [*sent, (f"response.{part_kind}.delta", delta | ({"logprobs": []} if kind == "message" else {}))]

    def _close(self, last: bool = False) -> list[Sent]:
        """End the item whose text grew, if there is one."""
        if self._open is None:
            return []
        part = self._open["content"][0]
        done = self._place | {"content_index": 0, "text": part["text"]}
        if part["type"] == "output_text":
            if self._log is not None:
                part["logprobs"] = self._log.release(part["text"], last=last)
            done["logprobs"] = part["logprobs"]
        sent = [(f"response.{part['type']}.done", done)]
        sent.append(("response.content_part.done", self._place | {"content_index": 0, "part": dict(part)}))
        return [*sent, *self._end()]
