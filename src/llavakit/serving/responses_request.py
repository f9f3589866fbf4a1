"""Requests to `/v1/responses`, and the chat requests that they amount to.

Items become messages: what belongs to one turn of the assistant (reasoning, text, calls) becomes one message. A request
that goes on from an earlier response begins with that one's items. Names of fields in errors are those of the items.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, TypeAdapter, create_model

from llavakit.serving.protocol import (
    MOST_BOXES,
    MOST_TOKENS,
    APIError,
    Empty,
    NoPenalty,
    Strict,
    Text,
    Url,
)

_MESSAGE = re.compile(r"messages\.(\d+)")
_URL_FIELD = re.compile(r"(image|video|volume)_url\.url")


class InputText(Strict):
    """A piece of text."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: Text
    annotations: Empty | None = None
    logprobs: list[Any] | None = None


class Refusal(Strict):
    """A refusal that an earlier answer contained; it stays out of the prompt."""

    type: Literal["refusal"]
    refusal: Text


class InputMedia(Strict):
    """A media item: a data URL, an http(s) URL, or an upload."""

    type: Literal["input_image", "input_video", "input_volume"]
    image_url: str | None = None
    video_url: str | None = None
    volume_url: str | None = None
    file_id: str | None = Field(None, pattern=r"^file-[0-9a-f]{32}$")
    detail: Literal["auto", "low", "high", "original"] | None = None

    @property
    def modality(self) -> str:
        """`image`, `video` or `volume`."""
        return self.type.removeprefix("input_")

    @property
    def url(self) -> str | None:
        """Where the item is, in the form of a chat request's `url`; None if it is not said once."""
        given = {name: getattr(self, f"{name}_url") for name in ("image", "video", "volume")}
        own = given.pop(self.modality)
        if any(value is not None for value in given.values()) or (own is None) == (self.file_id is None):
            return None
        return own if own is not None else f"upload:{self.file_id}"

    @property
    def source(self) -> Url:
        """Where the item is, as `ChatBody` looks at it."""
        return Url(url=self.url or "")


class InputBoxes(Strict):
    """Regions of the image before it, see `llavakit.serving.protocol.BoxesPart`."""

    type: Literal["boxes"]
    boxes: list[Annotated[list[float], Field(min_length=4, max_length=4)]] = Field(max_length=MOST_BOXES)
    labels: list[str] | None = Field(None, max_length=MOST_BOXES)
    scores: list[float] | None = Field(None, max_length=MOST_BOXES)


InputPart = Annotated[InputText | Refusal | InputMedia | InputBoxes, Field(discriminator="type")]
InputContent = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[InputPart], Tag("parts")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
]
Status = Literal["in_progress", "completed", "incomplete"]


class Message(Strict):
    """A message; `type` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class Call(Strict):
    """A call of a function that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Text
    id: str | None = None
    status: Status | None = None


class CallOutput(Strict):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent
    id: str | None = None
    status: Status | None = None


class Reasoning(Strict):
    """What led to an answer."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[InputText] = Field([], max_length=1000)
    content: list[InputText] | None = Field(None, max_length=1000)
    encrypted_content: str | None = None
    status: Status | None = None


class GeneratedPicture(Strict):
    """A picture of an earlier answer, as base64."""

    type: Literal["image_generation_call"]
    id: str | None = None
    result: Text | None = None
    revised_prompt: Text | None = None
    status: Literal["in_progress", "completed", "generating", "failed"] | None = None


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[Call, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[GeneratedPicture, Tag("image_generation_call")],
    Discriminator(
        lambda value: (value.get("type") or "message") if isinstance(value, dict) else getattr(value, "type", "message")
    ),
]
Input = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[Item], Field(max_length=10_000), Tag("items")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "items"),
]


ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])


class FunctionTool(Strict):
    """A function that the model may call; the client runs it."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class TextOptions(Strict):
    """How the text is to be written."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Strict):
    """Accepted; a model here reasons as it was trained to."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesStreamOptions(Strict):
    """Accepted; streams here carry no padding."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Strict):
    """Body of `/v1/responses`."""

    model: str = Field(max_length=1000)
    input: Input
    instructions: Text | None = None
    previous_response_id: str | None = Field(None, max_length=100)
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MOST_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(None, max_length=16)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, max_length=16
    )
    tools: list[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    trace: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None
    user: str | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def items(self) -> list[Any]:
        """The input as items."""
        return [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def media_parts(self) -> Iterator[tuple[str, InputMedia]]:
        """Media of all items, each with the path of its item."""
        for number, item in enumerate(self.items):
            yield from ((f"input.{number}", part) for part in media_of(item))


def media_of(item: Any) -> list[InputMedia]:
    """The media parts of an item."""
    content = getattr(item, "output" if isinstance(item, CallOutput) else "content", None)
    return [part for part in content if isinstance(part, InputMedia)] if isinstance(content, list) else []


def responses_type(options: type[BaseModel] | None) -> type[ResponsesRequest]:
    """The body of requests to a responder that has options of its own; see `llavakit.serving.protocol.request_type`.

    Raises:
        ValueError: If an option is called like a field.
    """
    if options is None:
        return ResponsesRequest
    both = set(options.model_fields) & set(ResponsesRequest.model_fields)
    if both:
        raise ValueError(f"option {sorted(both)[0]!r} of the responder is called like a field of /v1/responses")
    fields = {name: (field.annotation, field) for name, field in options.model_fields.items()}
    return create_model("ResponsesRequest", __base__=ResponsesRequest, **fields)


@dataclass
class Conversation:
    """Items as they are kept, and the messages that they make.

    Attributes:
        items: All items, JSON-able; data URLs are numbers of `ChatBody.media`.
        messages: Messages of a chat request.
        places: The path of the item that each message began with.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def instruct(self, text: str) -> None:
        """Begin with instructions, which are no item and are not kept."""
        self._message("instructions", {"role": "system", "content": text})

    def add(self, item: Any, place: str) -> None:
        """Append an item; `place` is its path in the request."""
        self.items.append(item.model_dump(exclude_none=True))
        match item:
            case Message(role="assistant", content=content):
                turn = self._turn(place, fresh="content")
                turn["content"] = content if isinstance(content, str) else _plain(content)
            case Message(role=role, content=content):
                self._message(place, {"role": role, "content": _content(content, f"{place}.content")})
            case Call(call_id=identity, name=name, arguments=arguments):
                call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
                self._turn(place).setdefault("tool_calls", []).append(call)
            case CallOutput(call_id=identity, output=output):
                content = _content(output, f"{place}.output")
                self._message(place, {"role": "tool", "tool_call_id": identity, "content": content})
            case Reasoning(content=content, summary=summary):
                turn = self._turn(place, fresh="reasoning_content")
                turn["reasoning_content"] = "\n\n".join(part.text for part in content or summary)
            case GeneratedPicture(result=result) if result:
                picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{result}"}}
                if item.revised_prompt:
                    picture["caption"] = item.revised_prompt
                self._turn(place).setdefault("images", []).append(picture)

    def _message(self, place: str, message: dict[str, Any]) -> dict[str, Any]:
        self.places.append(place)
        self.messages.append(message)
        return message

    def _turn(self, place: str, fresh: str | None = None) -> dict[str, Any]:
        """The assistant's turn that is open; another one if it has `fresh` already."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or fresh in last:
            return self._message(place, {"role": "assistant"})
        return last

    def renamed(self, text: str | None) -> str | None:
        """Paths of messages in an error as paths of the items that they came from."""
        if text is None:
            return None
        if text == "messages":
            return "input"
        places = dict(enumerate(self.places))
        text = _MESSAGE.sub(lambda found: places.get(int(found[1]), found[0]), text)
        return _URL_FIELD.sub(r"\1_url", text)

    def error(self, error: APIError) -> APIError:
        """An error about messages as one about items."""
        detail = error.body["error"]
        message, param = self.renamed(detail["message"]), self.renamed(detail["param"])
        return APIError(error.status, message, param, detail["code"], error.headers)


def _plain(parts: Sequence[Any]) -> str:
    """Text of an assistant's parts."""
    return "".join(part.text for part in parts if isinstance(part, InputText))


def _content(content: str | Sequence[Any], place: str) -> str | list[dict[str, Any]]:
    """Content of a message of a chat request.

    Raises:
        APIError: If a media item is not where its type says.
    """
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        match part:
            case InputText(text=text):
                parts.append({"type": "text", "text": text})
            case InputMedia(modality=modality):
                kind, url = f"{modality}_url", part.url
                if url is None:
                    raise APIError(400, f"{part.type} needs {kind} or file_id, one of them", f"{place}.{number}")
                detail = None if part.detail == "original" else part.detail
                parts.append({"type": kind, kind: {"url": url, "detail": detail}})
            case InputBoxes():
                parts.append(part.model_dump(exclude_none=True))
    return parts


def chat_fields(request: ResponsesRequest, conversation: Conversation) -> dict[str, Any]:
    """The fields of the chat request that a request amounts to; `options` of a responder among them."""
    wants_logprobs = request.top_logprobs is not None or "message.output_text.logprobs" in (request.include or ())
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": conversation.messages,
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": wants_logprobs or None,
        "top_logprobs": request.top_logprobs,
    }
    for name in ("stream", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "trace"):
        fields[name] = getattr(request, name)
    fields["parallel_tool_calls"] = request.parallel_tool_calls
    if request.tools:
        functions = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in request.tools]
        fields["tools"] = [{"type": "function", "function": function} for function in functions]
    choice = request.tool_choice
    if isinstance(choice, ChosenTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = choice
    own = set(type(request).model_fields) - set(ResponsesRequest.model_fields)
    fields |= {name: getattr(request, name) for name in own & request.model_fields_set}
    return {name: value for name, value in fields.items() if value is not None}
