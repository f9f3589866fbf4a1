"""From a request of the API to the responder's queue: who is admitted, and how messages and media are read.

Media are fetched and decoded before a request is queued. This module knows nothing of answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from anyio import CapacityLimiter, to_thread

from llavakit.conversation.messages import boxes_part
from llavakit.conversation.turns import Event, Tool
from llavakit.errors import FieldError, UserError
from llavakit.generation.request import PromptTooLong
from llavakit.generation.responder import Responder
from llavakit.generation.response import Response
from llavakit.media.fetch import MediaFetcher
from llavakit.media.policy import MediaPolicy, Refused, decode_data_url
from llavakit.media.source import Attached
from llavakit.serving.access import AccessPolicy
from llavakit.serving.bodies import ChatBody
from llavakit.serving.length import exceeds, prompt_characters
from llavakit.serving.logprobs import Spelling
from llavakit.serving.memory import Account, MemoryBudget, MemoryPolicy, claim
from llavakit.serving.metrics import Metrics
from llavakit.serving.presence import Presence
from llavakit.serving.protocol import (
    APIError,
    BoxesPart,
    ChatMessage,
    ChatRequest,
    MediaPart,
    TextPart,
    request_type,
)
from llavakit.serving.responses_request import responses_type
from llavakit.serving.uploads import UploadPolicy, Uploads

CONTEXT_EXCEEDED = "context_length_exceeded"
_RETRY = {503: {"Retry-After": "1"}}
_FIELD = re.compile(r"(messages\.[\w.]+|tools|tool_choice)(?=: )|sampling: (\w+)")


@dataclass(frozen=True)
class Settings:
    """How one server behaves.

    Attributes:
        names: Model names that clients may ask for; the first is listed.
        api_keys, hosts, origins: Who may ask, see `AccessPolicy`.
        max_queue: Requests that may wait beside those being decoded; one more is answered with 429.
        max_tokens: Longest reply; requests for more are cut to it.
        default_tokens: Longest reply of a request that names none.
        temperature: Of requests that name none; 0 is greedy.
        body_bytes: Largest request.
        json_bytes: Largest request without its media.
        flight_bytes: Bodies of all requests that are arriving.
        body_seconds: Longest time for a request to arrive.
        connections: Most connections at once; one more is answered with 503.
        uploads: What clients may send ahead of their requests.
        responses: What is kept of `/v1/responses` for requests that go on from there.
        editing: What is kept of sessions of the editing page.
        memory: What media may take when they are decoded.
        keep_alive: Seconds between comments on a stream that is silent.
        media: The media policy.
    """

    names: tuple[str, ...] = ("llavakit",)
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_queue: int = 64
    max_tokens: int = 4096
    default_tokens: int = 512
    temperature: float = 0.0
    body_bytes: int = 64 * 2**20
    json_bytes: int = 2**20
    flight_bytes: int = 256 * 2**20
    body_seconds: float = 120.0
    connections: int = 512
    uploads: UploadPolicy = field(default_factory=UploadPolicy)
    responses: UploadPolicy = field(default_factory=lambda: UploadPolicy(256 * 2**20, 64 * 2**20))
    editing: UploadPolicy = field(default_factory=lambda: UploadPolicy(2**30, 256 * 2**20))
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    keep_alive: float = 15.0
    media: MediaPolicy = field(default_factory=MediaPolicy)

    @property
    def access(self) -> AccessPolicy:
        """Who may ask."""
        return AccessPolicy(self.api_keys, self.hosts, self.origins)


@dataclass
class Incoming:
    """A chat request that has arrived.

    Attributes:
        body: The validated request.
        content: Its media.
        owner: Whose key it came with; "" where none are asked for.
        arrived: To be called when the bytes of the body are held no longer.
        presence: Of the client.
        account: Memory that it takes.
    """

    body: ChatRequest
    content: ChatBody
    owner: str
    arrived: Callable[[], None]
    presence: Presence
    account: Account


class Service:
    """A loaded model behind the API.

    Args:
        responder: What answers.
        settings: How to behave.
    """

    def __init__(self, responder: Responder, settings: Settings) -> None:
        self.responder, self.settings = responder, settings
        self.request_type = request_type(responder.options)
        self.responses_type = responses_type(responder.options)
        self.uploads: Uploads[bytes] = Uploads(self._of_owners(settings, settings.uploads))
        self.responses: Uploads[Any] = Uploads(self._of_owners(settings, settings.responses))
        self.characters = prompt_characters(responder.tokenizer, responder.positions)
        self.metrics = Metrics(responder)
        self.memory = MemoryBudget(settings.memory)
        self.spelling = Spelling(responder.tokenizer) if responder.gives_logprobs else None
        self.active = 0
        self.closing = False
        self._decoders = CapacityLimiter(2)
        self.limits = dataclasses.replace(settings.media.limits, claim=claim)
        responder.restrict(self.limits)

    @staticmethod
    def _of_owners(settings: Settings, policy: UploadPolicy) -> UploadPolicy:
        """Without keys all clients are one owner, who may use all there is."""
        return policy if settings.api_keys else dataclasses.replace(policy, owner_bytes=policy.total_bytes)

    def admit(self) -> None:
        """Count a request in.

        Raises:
            APIError: 429 if the queue is full, 503 while shutting down.
        """
        if self.closing:
            raise APIError(503, "the server is shutting down", headers={"Retry-After": "10"})
        if self.active >= self.responder.capacity + self.settings.max_queue:
            raise APIError(429, "the queue is full; try again", code="queue_full", headers={"Retry-After": "1"})
        self.active += 1

    def release(self) -> None:
        """Count a request out."""
        self.active -= 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """What is decoded in here counts as one request of the web app."""
        account = Account(self.memory)
        try:
            with account.counting():
                yield
        finally:
            account.close()

    def check_messages(self, messages: list[dict[str, Any]]) -> None:
        """Whether messages whose media are at hand may be asked at all; for the web app.

        Raises:
            APIError: If not.
        """
        tally = Tally(self.settings.media)
        count = 0
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text":
                    count += len(part["text"])
                else:
                    tally.add(part["type"], "messages")
                    tally.add_bytes(len(part[part["type"]]), "messages")
        self._check_characters(count)

    def _check_characters(self, count: int) -> None:
        if self.characters is not None and count > self.characters:
            said = f"the texts hold {count} characters; more than {self.characters} never fit the model's context"
            raise APIError(400, said, "messages", CONTEXT_EXCEEDED)

    def _check_length(self, messages: list[dict[str, Any]]) -> None:
        """Refuse texts that take more positions than there are, before all of them are tokenised."""
        most, tokenizer = self.responder.positions, self.responder.tokenizer
        if most is None or tokenizer is None:
            return
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if sum(map(len, texts)) > 4 * most and exceeds(texts, tokenizer, most):
            said = f"the texts take more than the {most} positions of the model's context"
            raise APIError(400, said, "messages", CONTEXT_EXCEEDED)

    async def submit(self, incoming: Incoming, listener: Callable[[Event], None]) -> Response:
        """Fetch, decode and queue a request.

        Raises:
            APIError: If it cannot be run, naming the field.
        """
        request = incoming.body
        self._check_characters(request.characters())
        fields = self._sampling(request) | self._tools(request) | self._own(request)
        messages = await self._messages(incoming)
        incoming.arrived()
        incoming.presence.check()
        submit = functools.partial(self._submit, messages, fields, incoming, listener)
        try:
            return await to_thread.run_sync(submit, limiter=self._decoders)
        except PromptTooLong as error:
            raise APIError(400, str(error), "messages", CONTEXT_EXCEEDED) from None
        except Refused as refused:  # of the readers, for want of memory
            raise refused_error(refused) from None
        except UserError as error:
            raise APIError(400, str(error), field_of(error)) from None

    def _submit(
        self,
        messages: list[dict[str, Any]],
        fields: dict[str, Any],
        incoming: Incoming,
        listener: Callable[[Event], None],
    ) -> Response:
        incoming.presence.check()  # it may have waited for a thread
        self._check_length(messages)

        def before(part: Any) -> None:
            incoming.presence.check()
            incoming.account.keep(0)  # the item before it is cut into views

        with incoming.account.counting() as account:
            messages = self.responder.escape(messages)
            response = self.responder.submit(
                messages, listener=listener, before_media=before, owner=incoming.owner, **fields
            )
            if response.held_bytes is not None:
                account.keep(response.held_bytes)
        return response

    def _own(self, request: ChatRequest) -> dict[str, Any]:
        """The responder's own options as far as they are given."""
        options = self.responder.options
        names = () if options is None else options.model_fields
        return {name: getattr(request, name) for name in names if name in request.model_fields_set}

    def _tools(self, request: ChatRequest) -> dict[str, Any]:
        choice = request.tool_choice or "auto"
        tools = [tool.function for tool in request.tools or ()]
        return {
            "tools": [Tool(tool.name, tool.description, tool.parameters) for tool in tools],
            "tool_choice": choice if isinstance(choice, str) else choice.function.name,
            "parallel_calls": request.parallel_tool_calls is not False,
            "stream": bool(request.stream),
        }

    def _sampling(self, request: ChatRequest) -> dict[str, Any]:
        settings = self.settings
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if (request.n or 1) > self.responder.capacity:
            raise APIError(400, f"this server answers at most n = {self.responder.capacity}", "n")
        if request.logprobs and self.spelling is None:
            raise APIError(400, "this model gives no log probabilities", "logprobs")
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

    async def _messages(self, incoming: Incoming) -> list[dict[str, Any]]:
        request = incoming.body
        tally = Tally(self.settings.media)
        messages: list[dict[str, Any]] = []
        for number, message in enumerate(request.messages):
            role = "system" if message.role == "developer" else message.role
            content = await self._content(message, f"messages.{number}", tally, incoming)
            if role == "system" and number and all(each["role"] == "system" for each in messages):
                messages[0]["content"] += [{"type": "text", "text": "\n"}, *content]  # templates take one
                continue
            further = message.model_dump(
                include={"name", "tool_calls", "tool_call_id", "reasoning_content"}, exclude_none=True
            )
            if message.images:
                further["images"] = await self._images(message, f"messages.{number}.images", tally, incoming)
            messages.append({"role": role, "content": content, **further})
        return messages

    async def _images(self, message: ChatMessage, where: str, tally: Tally, incoming: Incoming) -> list[dict[str, Any]]:
        """Pictures of an earlier answer, for responders that go on with them; the prompt of a model has none."""
        if message.role != "assistant":
            raise APIError(400, f"a {message.role} message has its images in content", where)
        found = []
        for number, part in enumerate(message.images):
            name = f"{where}.{number}.{part.type}"
            content = await self._media(part, f"{name}.url", tally, incoming)
            found.append({"type": "image", "image": Attached(content, name), "caption": part.caption or ""})
        return found

    async def _content(
        self, message: ChatMessage, where: str, tally: Tally, incoming: Incoming
    ) -> list[dict[str, Any]]:
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
            if isinstance(part, BoxesPart):
                try:
                    parts.append(boxes_part(part.model_dump(exclude_none=True), f"{where}.content.{number}"))
                except FieldError as error:
                    raise APIError(400, error.problem, error.field) from None
                continue
            name = f"{where}.content.{number}.{part.type}"
            if message.role not in ("user", "tool"):
                raise APIError(400, f"a {message.role} message holds no media", f"{name}.url")
            incoming.presence.check()
            content = await self._media(part, f"{name}.url", tally, incoming)
            parts.append({"type": part.modality, part.modality: Attached(content, name)})
        return parts

    async def _media(self, part: MediaPart, name: str, tally: Tally, incoming: Incoming) -> bytes:
        """The content of a media item."""
        policy = self.settings.media
        tally.add(part.modality, name)
        url, number = part.source.url, incoming.content.number(part.source.url)
        try:
            if number is None:
                fetcher = MediaFetcher(policy, self.uploads.of(incoming.owner))
                content = await incoming.presence.unless_gone(fetcher.read(url))
            else:
                content = await to_thread.run_sync(decode_data_url, incoming.content.take(number), policy.file_bytes)
        except Refused as refused:
            raise APIError(refused.status, str(refused), name) from None
        tally.add_bytes(len(content), name)
        return content


class Tally:
    """Counts the media of one request."""

    def __init__(self, policy: MediaPolicy) -> None:
        self._policy, self._counts, self._bytes = policy, Counter(), 0

    def add(self, modality: str, name: str) -> None:
        """One more item.

        Raises:
            APIError: If it is one too many; `name` is its field.
        """
        most = getattr(self._policy, f"{modality}s")
        self._counts[modality] += 1
        if self._counts[modality] > most:
            raise APIError(400, f"a request holds at most {most} {modality}s", name)

    def add_bytes(self, size: int, name: str) -> None:
        """The size of an item's file.

        Raises:
            APIError: If the files are too large together.
        """
        self._bytes += size
        if self._bytes > self._policy.request_bytes:
            raise APIError(413, f"the media of a request hold at most {self._policy.request_bytes} bytes", name)


def field_of(error: UserError) -> str:
    """The field of a request that an error is about."""
    found = _FIELD.match(str(error))
    return found[1] or found[2] if found else "messages"


def refused_error(refused: Refused) -> APIError:
    """What the client is told of media for which there is no room."""
    return APIError(refused.status, str(refused), "messages", headers=_RETRY.get(refused.status))
