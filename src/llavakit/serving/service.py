"""From a request of the API to the engine's queue: who is admitted, and how messages and media are read.

Media are fetched and decoded before a request is queued. This module knows nothing of answers.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from anyio import CapacityLimiter, to_thread

from llavakit.conversation.encode import escape_special_tokens
from llavakit.errors import Portable, UserError
from llavakit.generation.chat import Chat
from llavakit.generation.request import RequestHandle, StreamChunk
from llavakit.media.fetch import MediaFetcher
from llavakit.media.policy import MediaPolicy, Refused
from llavakit.media.source import Attached
from llavakit.serving import toolcalls
from llavakit.serving.metrics import Metrics
from llavakit.serving.protocol import ChatMessage, ChatRequest, ImagePart, TextPart, VideoPart, error_body
from llavakit.serving.uploads import Uploads

_KINDS = ("image", "video", "volume")


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
        body_seconds: Longest time for a request to arrive.
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
    body_seconds: float = 120.0
    upload_bytes: int = 512 * 2**20
    keep_alive: float = 15.0
    media: MediaPolicy = field(default_factory=MediaPolicy)


class APIError(Portable):
    """An answer with an error in OpenAI's form."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
    ) -> None:
        super().__init__(message)
        modality = "invalid_request_error" if status < 500 and status not in (401, 429) else "server_error"
        modality = {401: "authentication_error", 429: "rate_limit_error"}.get(status, modality)
        self.status, self.body, self.headers = status, error_body(message, modality, param, code), headers


class Service:
    """A loaded model behind the API.

    Args:
        chat: Model, processor and engine.
        settings: How to behave.
    """

    def __init__(self, chat: Chat, settings: Settings) -> None:
        self.chat, self.settings = chat, settings
        self.uploads = Uploads(settings.upload_bytes)
        self.fetcher = MediaFetcher(settings.media, self.uploads)
        self.metrics = Metrics(chat.engine)
        self.active = 0
        self.closing = False
        self._decoders = CapacityLimiter(2)
        reading = chat.processor.reading or {}
        limits = {"limits": settings.media.limits}
        chat.processor.reading = {modality: {**reading.get(modality, {}), **limits} for modality in _KINDS}

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

    async def submit(self, request: ChatRequest, listener: Callable[[StreamChunk], None]) -> RequestHandle:
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
            named = re.match(r"(messages\.[\w.]+)(?=: )|sampling: (\w+)", str(error))
            raise APIError(400, str(error), named[1] or named[2] if named else "messages") from None

    def _prepare(self, messages: list[dict[str, Any]], sampling: dict[str, Any]) -> Any:
        return self.chat.request(escape_special_tokens(messages, self.chat.processor.tokenizer), **sampling)

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
        held: Counter[str] = Counter()
        messages: list[dict[str, Any]] = []
        for number, message in enumerate(request.messages):
            role = "system" if message.role == "developer" else message.role
            content = await self._content(message, f"messages.{number}", held)
            messages.append({"role": role, "content": content})
        tools = toolcalls.describe(request)
        if tools is not None:
            part = {"type": "text", "text": tools}
            if messages[0]["role"] == "system":
                messages[0]["content"] = [*messages[0]["content"], {"type": "text", "text": "\n"}, part]
            else:
                messages.insert(0, {"role": "system", "content": [part]})
        return messages

    async def _content(self, message: ChatMessage, where: str, held: Counter[str]) -> list[dict[str, Any]]:
        calls = [{"type": "text", "text": toolcalls.as_text(message)}] if message.tool_calls else []
        if message.content is None:
            if message.role != "assistant":
                raise APIError(400, f"a {message.role} message needs content", f"{where}.content")
            return calls
        if isinstance(message.content, str):
            return [{"type": "text", "text": message.content}, *calls]
        parts = []
        for number, part in enumerate(message.content):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            modality = "image" if isinstance(part, ImagePart) else "video" if isinstance(part, VideoPart) else "volume"
            field_name = f"{where}.content.{number}.{part.type}.url"
            if message.role not in ("user", "tool"):
                raise APIError(400, f"a {message.role} message holds no media", field_name)
            policy = self.settings.media
            held[modality] += 1
            if held[modality] > getattr(policy, f"{modality}s"):
                raise APIError(
                    400, f"a request holds at most {getattr(policy, f'{modality}s')} {modality}s", field_name
                )
            try:
                content = await self.fetcher.read(getattr(part, part.type).url)
            except Refused as refused:
                raise APIError(refused.status, str(refused), field_name) from None
            held["bytes"] += len(content)
            if held["bytes"] > policy.request_bytes:
                raise APIError(413, f"the media of a request hold at most {policy.request_bytes} bytes", field_name)
            parts.append({"type": modality, modality: Attached(content, f"{where}.content.{number}.{part.type}")})
        return [*parts, *calls]
