"""Requests and answers in OpenAI's form, validated.

Fields that llavakit does not have are refused by name rather than ignored in silence; those of OpenAI's that cannot
change an answer (`user`, `metadata`, `service_tier`) are accepted. `null` means absent, everywhere. Types are taken as
they are: `true` is no number, and `"1"` neither.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model, model_validator
from pydantic_core import PydanticCustomError

from llavakit.errors import Portable, UserError
from llavakit.registry import nearest

MOST_TOKENS = 1_000_000
Text = Annotated[str, Field(max_length=4_000_000)]
Empty = Annotated[list[Any], Field(max_length=0)]
NoPenalty = Annotated[float, Field(ge=0, le=0)]


class Strict(BaseModel):
    """Unknown fields are errors that name the nearest known one; `null` is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            data = {key: value for key, value in data.items() if value is not None}
            names = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in names:
                    raise PydanticCustomError(
                        "unknown_field",
                        "unknown field {key}{hint}",
                        {"key": repr(str(key)[:64]), "hint": nearest(str(key), names)},
                    )
        return data


MOST_BOXES = 1000


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class Url(Strict):
    """Where a media item is: a data URL, an http(s) URL, or `upload:ID`."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class MediaPart(Strict):
    """A media item."""

    type: str

    @property
    def modality(self) -> str:
        """`image`, `video` or `volume`."""
        return self.type.removesuffix("_url")

    @property
    def source(self) -> Url:
        """Where it is."""
        return getattr(self, self.type)


class ImagePart(MediaPart):
    """An image."""

    type: Literal["image_url"]
    image_url: Url


class VideoPart(MediaPart):
    """A video."""

    type: Literal["video_url"]
    video_url: Url


class VolumePart(MediaPart):
    """A volume (.npy in Hounsfield units or NIfTI); an extension of OpenAI's form."""

    type: Literal["volume_url"]
    volume_url: Url


class BoxesPart(Strict):
    """Regions of the image before it, corners in pixels; an extension of OpenAI's form for models that take boxes."""

    type: Literal["boxes"]
    boxes: list[Annotated[list[float], Field(min_length=4, max_length=4)]] = Field(max_length=MOST_BOXES)
    labels: list[str] | None = Field(None, max_length=MOST_BOXES)
    scores: list[float] | None = Field(None, max_length=MOST_BOXES)


Part = Annotated[TextPart | ImagePart | VideoPart | VolumePart | BoxesPart, Field(discriminator="type")]


Content = (
    Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[Part], Tag("parts")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
    ]
    | None
)


class FunctionCall(Strict):
    """A call of a function; arguments are JSON text."""

    name: str
    arguments: Text


class ToolCall(Strict):
    """A call that the assistant made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class AnsweredImage(ImagePart):
    """A picture of an earlier answer."""

    caption: Text | None = None


class TraceStep(Strict):
    """A step on the way to an earlier answer."""

    name: str
    data: dict[str, Any]


class ChatMessage(Strict):
    """One message of the conversation; an earlier answer may come back as it was given."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    reasoning_content: Text | None = None
    images: list[AnsweredImage] | None = None
    trace: list[TraceStep] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Empty | None = None


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    """Name of the function to call."""

    name: str


class ToolChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class StreamOptions(Strict):
    """Whether the last chunk reports usage."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(Strict):
    """Body of `/v1/chat/completions`."""

    model: str = Field(max_length=1000)
    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MOST_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    n: int | None = Field(1, ge=1, le=128)
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | list[Annotated[str, Field(min_length=1, max_length=1000)]]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    trace: bool | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    user: str | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("contradiction", "top_logprobs needs logprobs: true")
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise PydanticCustomError("contradiction", "stop takes at most 16 strings")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise PydanticCustomError("contradiction", "tool_choice needs tools")
        if isinstance(self.tool_choice, ToolChoice):
            names = [tool.function.name for tool in self.tools]
            if self.tool_choice.function.name not in names:
                raise PydanticCustomError("contradiction", "tool_choice names a function that is not among the tools")
        return self

    def media_parts(self) -> Iterator[tuple[str, MediaPart]]:
        """Media of all messages, each with the path of its field."""
        for number, message in enumerate(self.messages):
            for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if isinstance(part, MediaPart):
                    yield f"messages.{number}.content.{place}.{part.type}", part
            for place, part in enumerate(message.images or ()):
                yield f"messages.{number}.images.{place}.{part.type}", part

    def characters(self) -> int:
        """Characters that may become part of the prompt: texts, calls, results and tools."""
        count = 0
        for message in self.messages:
            content = message.content or ""
            texts = [content] if isinstance(content, str) else [p.text for p in content if isinstance(p, TextPart)]
            texts += [call.function.name + call.function.arguments for call in message.tool_calls or ()]
            texts += [message.name or "", message.tool_call_id or "", message.reasoning_content or ""]
            count += sum(map(len, texts))
        for tool in self.tools or ():
            count += len(json.dumps(tool.function.model_dump(exclude_none=True), ensure_ascii=False))
        return count

    @property
    def budget(self) -> int | None:
        """The longest reply that the client asks for."""
        return self.max_completion_tokens or self.max_tokens


def request_type(options: type[BaseModel] | None) -> type[ChatRequest]:
    """The body of chat requests to a responder that has options of its own; they are fields like the others.

    Raises:
        ValueError: If an option is called like a field.
    """
    if options is None:
        return ChatRequest
    both = set(options.model_fields) & set(ChatRequest.model_fields)
    if both:
        raise ValueError(f"option {sorted(both)[0]!r} of the responder is called like a field of chat requests")
    fields = {name: (field.annotation, field) for name, field in options.model_fields.items()}
    return create_model("ChatRequest", __base__=ChatRequest, **fields)


class ErrorDetail(BaseModel):
    """What was wrong, and in which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


class Picture(BaseModel):
    """A picture that is part of an answer, as a data URL; an extension of OpenAI's form."""

    type: Literal["image_url"]
    image_url: dict[Literal["url"], str]
    caption: str


class Reply(BaseModel):
    """What the assistant said; `reasoning_content`, `images` and `trace` (if asked for) extend OpenAI's form."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    images: list[Picture] = []
    trace: list[TraceStep] = []


class Choice(BaseModel):
    """One of `n` replies."""

    index: int
    message: Reply
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: dict[str, Any] | None


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int] = {}


class Completion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class APIError(Portable):
    """An answer with an error in OpenAI's form."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
    ) -> None:
        message = str(UserError(message))  # one line, in which long values are cut
        super().__init__(message)
        modality = "invalid_request_error" if status < 500 and status not in (401, 429) else "server_error"
        modality = {401: "authentication_error", 429: "rate_limit_error"}.get(status, modality)
        self.status, self.body, self.headers = status, error_body(message, modality, param, code), headers


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def new_id(prefix: str) -> str:
    """A fresh identifier."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(used: Any) -> dict[str, Any]:
    """Token counts of a response (`llavakit.generation.response.Usage`); hidden calls are counted by their purpose."""
    counts = {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }
    return counts | ({"completion_tokens_details": dict(used.details)} if used.details else {})


def chunk(identity: str, model: str, created: int, choices: list[dict[str, Any]], counts: Any = None) -> dict[str, Any]:
    """One chunk of a streamed answer."""
    body = {
        "id": identity,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": choices,
    }
    return body | ({"usage": counts} if counts is not None else {})


def completion(identity: str, model: str, choices: list[dict[str, Any]], counts: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    return {
        "id": identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": counts,
    }
