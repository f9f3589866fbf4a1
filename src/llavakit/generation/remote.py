"""Models behind an OpenAI-compatible API: one client for judges, teachers, rewards and chat.

    client = APIClient("https://api.openai.com/v1", price_in=2.5, price_out=10, max_cost=20)
    judge = RemoteResponder(client, "gpt-4o")

The `openai` package does the HTTP: connections, time-outs, repeats with growing pauses and the server's `Retry-After`.
Here is what it does not do: a bound on calls in flight, counts of tokens and money, a ceiling, and errors in one line.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.conversation.turns import CallEvent, Event, ReasoningDelta, TextDelta, ToolCall
from llavakit.errors import APIRefused, CallFailed, UserError, quoted
from llavakit.generation.request import SamplingParams
from llavakit.generation.responder import Call, Responder
from llavakit.generation.response import FinishEvent, Response, Usage
from llavakit.media.image import load_image
from llavakit.media.source import Attached, Limits, name_of, opened

OPENAI = "https://api.openai.com/v1"
PNG = "image/png"
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": PNG, "WEBP": "image/webp"}
_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}
_ORIENTATION = 0x0112
_DEFAULTS = SamplingParams()


@dataclass
class Spending:
    """What a client has used so far.

    Attributes:
        calls: Calls that were answered.
        failed: Calls that were not, after all repeats.
        prompt_tokens, completion_tokens: As the server counted them.
        cost: In the currency of the prices.
    """

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class APIClient:
    """A client of one OpenAI-compatible server. May be shared between threads.

    Args:
        base_url: Address of the API up to and including `/v1`; default: the environment variable OPENAI_BASE_URL, or
            OpenAI's own.
        api_key_env: Environment variable with the key; servers without keys need none.
        concurrency: Calls in flight.
        retries: How often a call is repeated after a rate limit, a server error or a lost connection.
        timeout: Seconds for one call.
        price_in, price_out: Per million tokens of prompts and replies.
        max_cost: Ceiling; a call that could cross it is refused. A call is reckoned with its whole `max_tokens` and a
            token for every three characters of the prompt until the server has counted.

    Attributes:
        spent: Tokens and money so far.

    Raises:
        UserError: If the `openai` package is missing, or the options contradict each other.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 120.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        max_cost: float | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("calls of an API need the openai package: pip install 'llavakit[eval]'") from None
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}; at least one call must be in flight")
        if max_cost is not None and not (price_in or price_out):
            raise UserError("max_cost needs prices: give price_in and price_out per million tokens")
        if not base_url.startswith(("http://", "https://")):
            raise UserError(f"API address {quoted(base_url)} is not a URL; it should look like http://host:8000/v1")
        self.base_url, self.api_key_env, self.concurrency = base_url.rstrip("/"), api_key_env, concurrency
        self.retries, self.max_cost = retries, max_cost
        self._prices = (price_in / 1e6, price_out / 1e6)
        self._openai = openai
        # a connection that breaks inside a stream is raised as the HTTP library's own error
        libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
        self._transport = tuple(library.HTTPError for library in libraries)
        key = os.environ.get(api_key_env) or "none"
        self._client = openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=retries, timeout=timeout)
        self.spent = Spending()
        self._flying, self._reserved = 0, 0.0
        self._places = threading.Semaphore(concurrency)
        self._settled = threading.Condition()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def complete(self, body: Mapping[str, Any]) -> Any:
        """The server's completion for a request body.

        Raises:
            CallFailed: If there is none after all repeats.
            APIRefused: If no call can succeed.
        """
        with self._places, self._reserving(body) as count, self._errors():
            completion = self._client.chat.completions.create(**body)
            if not getattr(completion, "choices", None) or getattr(completion.choices[0], "message", None) is None:
                raise CallFailed(f"{self.base_url}: the reply is not a chat completion")
            count(completion.usage)
            return completion

    def stream(self, body: Mapping[str, Any]) -> Iterator[Any]:
        """The chunks of a streamed completion; raises as `complete`."""
        with self._places, self._reserving(body) as count, self._errors():
            usage = None
            with self._client.chat.completions.create(
                **body, stream=True, stream_options={"include_usage": True}
            ) as chunks:
                for chunk in chunks:
                    usage = chunk.usage or usage
                    yield chunk
            count(usage)

    def models(self) -> list[str]:
        """Names of the models that the server offers; raises as `complete`."""
        with self._errors():
            return [model.id for model in self._client.models.list().data]

    @contextlib.contextmanager
    def _reserving(self, body: Mapping[str, Any]) -> Iterator[Any]:
        """Room for the cost of one call under the ceiling, until it is known."""
        reserve = self._most(body)
        with self._settled:
            while self.max_cost is not None and self.spent.cost + self._reserved + reserve > self.max_cost:
                if not self._flying:
                    raise APIRefused(
                        f"{self.base_url}: {self.spent.cost:.4g} of max_cost {self.max_cost:g} is spent, and the next "
                        f"call may cost {reserve:.4g}; raise max_cost to go on"
                    )
                self._settled.wait()
            self._flying, self._reserved = self._flying + 1, self._reserved + reserve

        def count(usage: Any) -> None:
            prompt, completion = getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0
            with self._settled:
                self.spent.calls += 1
                self.spent.prompt_tokens += prompt
                self.spent.completion_tokens += completion
                self.spent.cost += prompt * self._prices[0] + completion * self._prices[1]

        try:
            yield count
        except CallFailed:
            with self._settled:
                self.spent.failed += 1
            raise
        finally:
            with self._settled:
                self._flying -= 1
                self._reserved = self._reserved - reserve if self._flying else 0.0
                self._settled.notify_all()

    def _most(self, body: Mapping[str, Any]) -> float:
        if self.max_cost is None:
            return 0.0
        texts = [message.get("content") or "" for message in body["messages"]]
        parts = [part for text in texts if not isinstance(text, str) for part in text]
        characters = sum(len(text) for text in texts if isinstance(text, str))
        characters += sum(len(part.get("text", "")) for part in parts)
        replies = body.get("n", 1) * (body.get("max_tokens") or body.get("max_completion_tokens") or 0)
        return characters / 3 * self._prices[0] + replies * self._prices[1]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """The library's exceptions as one line each."""
        openai = self._openai
        tried = f"still failing after {self.retries + 1} tries; " if self.retries else ""
        try:
            yield
        except openai.APIStatusError as error:
            problem = f"{self.base_url}: HTTP {error.status_code}: {_line(error.message)}"
            if error.status_code in (401, 403):
                raise APIRefused(f"{problem}; is the key in ${self.api_key_env} right?") from None
            if error.status_code in (402, 404) or error.code == "insufficient_quota":
                raise APIRefused(problem) from None
            raise CallFailed(f"{tried if _repeated(error.status_code) else ''}{problem}") from None
        except openai.APIConnectionError as error:  # time-outs too
            raise CallFailed(f"{tried}{self.base_url}: {_line(error.__cause__ or error)}") from None
        except (openai.OpenAIError, json.JSONDecodeError, *self._transport) as error:
            raise CallFailed(f"{self.base_url}: the reply broke off or cannot be read ({_line(error)})") from None


def _line(problem: Any) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__


def _repeated(status: int) -> bool:
    return status in (408, 409, 429) or status >= 500


class RemoteResponder(Responder):
    """A model behind an API.

    Args:
        client: Where to ask.
        model: Name of the model there; None takes the first that the server lists.

    Raises:
        APIRefused, CallFailed: If the name has to be asked for, and the server does not answer.
    """

    def __init__(self, client: APIClient, model: str | None = None) -> None:
        if model is None:
            model = next(iter(client.models()), None)
            if model is None:
                raise UserError(f"{client.base_url}: lists no models; name one")
        super().__init__(name=model, capacity=client.concurrency)
        self.client, self.model = client, model
        self._limits = Limits()
        self._length_field = "max_tokens"

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "video", "volume")

    @property
    def identity(self) -> str:
        return f"{self.client.base_url} {self.model}"

    def restrict(self, limits: Any) -> None:
        self._limits = limits

    def run(self, call: Call) -> Iterator[Event]:
        body = self._body(call)
        if call.streamed and call.sampling.n == 1:
            yield from self._streamed(call, body)
            return
        completion = self._complete(body)
        for choice in completion.choices:
            message, index = choice.message, choice.index or 0
            for text, kind in ((_reasoning(message), ReasoningDelta), (message.content, TextDelta)):
                if text:
                    yield kind(text=text, index=index)
            for one in message.tool_calls or ():
                yield CallEvent(call=ToolCall(one.function.name, one.function.arguments, one.id), index=index)
            call.count(_usage(completion.usage) if choice is completion.choices[0] else Usage())
            yield FinishEvent(reason=_REASONS.get(choice.finish_reason, "stop"), index=index)

    def _calls(self, call: Call, response: Response) -> list[Call]:
        # A server may give all choices of one seed the same reply, so each gets a call of its own; without a seed one
        # call pays for the prompt once.
        return super()._calls(call, response) if call.sampling.seed is not None else [call.together(response)]

    def _complete(self, body: dict[str, Any]) -> Any:
        try:
            return self.client.complete(body)
        except CallFailed as error:
            if not self._other_length_field(str(error)):
                raise
            body[self._length_field] = body.pop("max_tokens")
            return self.client.complete(body)

    def _other_length_field(self, problem: str) -> bool:
        """Whether the server wants the length under OpenAI's newer name; from now on it gets it."""
        if self._length_field == "max_tokens" and "max_completion_tokens" in problem:
            self._length_field = "max_completion_tokens"
            return True
        return False

    def _streamed(self, call: Call, body: dict[str, Any]) -> Iterator[Event]:
        calls: dict[int, list[str]] = {}
        usage = None
        for chunk in self._chunks(body):
            usage = chunk.usage or usage
            for choice in chunk.choices or ():
                delta = choice.delta
                if text := _reasoning(delta):
                    yield ReasoningDelta(text=text)
                if delta.content:
                    yield TextDelta(text=delta.content)
                for piece in delta.tool_calls or ():
                    known = calls.setdefault(piece.index, ["", "", ""])
                    known[0] = piece.id or known[0]
                    known[1] += (piece.function and piece.function.name) or ""
                    known[2] += (piece.function and piece.function.arguments) or ""
                if choice.finish_reason:
                    call.finish_reason = _REASONS.get(choice.finish_reason, "stop")
        for _, (identity, name, arguments) in sorted(calls.items()):
            yield CallEvent(call=ToolCall(name, arguments, identity))
        call.count(_usage(usage))

    def _chunks(self, body: dict[str, Any]) -> Iterator[Any]:
        try:
            yield from self.client.stream(body)
        except CallFailed as error:
            if not self._other_length_field(str(error)):
                raise
            body[self._length_field] = body.pop("max_tokens")
            yield from self.client.stream(body)

    def _body(self, call: Call) -> dict[str, Any]:
        sampling = call.sampling
        for field in ("eos_token_ids", "skip_special_tokens", "logprobs"):
            if getattr(sampling, field) != getattr(_DEFAULTS, field):
                raise UserError(f"sampling: {field} cannot be told to an API; it needs a model that runs here")
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [self._message(message, number) for number, message in enumerate(call.messages)],
            "temperature": sampling.temperature,
            self._length_field: sampling.max_new_tokens,
        }
        given = {"top_p": sampling.top_p, "seed": sampling.seed, "n": sampling.n}
        body |= {name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        further = ("top_k", "min_p", "repetition_penalty")  # not OpenAI's; other servers know them
        extra = {name: getattr(sampling, name) for name in further}
        extra = {name: value for name, value in extra.items() if value != getattr(_DEFAULTS, name)}
        if extra:
            body["extra_body"] = extra
        if call.tools:
            body["tools"] = [{"type": "function", "function": tool.schema()} for tool in call.tools]
            plain = call.tool_choice in ("auto", "none", "required")
            named = {"type": "function", "function": {"name": call.tool_choice}}
            body["tool_choice"] = call.tool_choice if plain else named
            if not call.parallel_calls:
                body["parallel_tool_calls"] = False
        return body

    def _message(self, message: Mapping[str, Any], number: int) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = [self._part(part, f"messages.{number}.content.{place}") for place, part in enumerate(content)]
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)  # servers of text models take nothing else
        found = {"role": message["role"], "content": content}
        kept = ("name", "tool_calls", "tool_call_id")  # reasoning of earlier turns is refused by some servers
        return found | {name: message[name] for name in kept if message.get(name) is not None}

    def _part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        kind = part.get("type")
        if kind == "text":
            return {"type": "text", "text": part["text"]}
        if isinstance(kind, str) and kind.endswith("_url"):
            return dict(part)
        if kind not in self.modalities:
            raise UserError(f"{where}: parts of type {quoted(kind)} cannot be sent to an API")
        if part.get("start") is not None or part.get("end") is not None:
            raise UserError(f"{where}: a stretch of a video cannot be sent to an API; cut the file")
        source = part.get(kind, part.get("url", part.get("path")))
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            url = source
        else:
            url = image_url(source, self._limits) if kind == "image" else _file_url(source, kind, self._limits)
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _reasoning(message: Any) -> str | None:
    """Reasoning of a message or delta, under either name that servers use."""
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)


def _usage(usage: Any) -> Usage:
    if usage is None:
        return Usage()
    cached = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None)
    return Usage(usage.prompt_tokens or 0, usage.completion_tokens or 0, cached or 0)


def data_url(content: bytes, mime: str) -> str:
    """Bytes as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def image_url(source: Any, limits: Limits | None = None) -> str:
    """An image as a data URL: its own bytes where every server reads them, else as PNG, upright.

    Raises:
        MediaError: If it is no image, or breaks a limit.
    """
    from PIL import Image

    limits = limits or Limits()
    if not isinstance(source, Image.Image) and not hasattr(source, "__array__"):
        source = _content(source, limits, "an image")
        image = load_image(source, limits=limits)
        with Image.open(io.BytesIO(source)) as header:
            turned = header.getexif().get(_ORIENTATION, 1) != 1
            if header.format in _SENT_AS_THEY_ARE and header.mode == "RGB" and not turned:
                return data_url(source, _SENT_AS_THEY_ARE[header.format])
    else:
        image = load_image(source, limits=limits)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return data_url(buffer.getvalue(), PNG)


def _content(source: Any, limits: Limits, wanted: str) -> Attached:
    file = opened(source, limits, wanted)
    return Attached(file.read_bytes() if isinstance(file, Path) else bytes(file), name_of(source))


def _file_url(source: Any, kind: str, limits: Limits) -> str:
    mime = "video/mp4" if kind == "video" else "application/octet-stream"
    return data_url(_content(source, limits, f"the file of a {kind}, not opened data"), mime)


__all__ = ["APIClient", "APIRefused", "CallFailed", "RemoteResponder", "Spending", "data_url", "image_url"]
