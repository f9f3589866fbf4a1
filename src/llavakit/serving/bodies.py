"""Bodies of requests: how large, how slow and how many at once, and what a chat request holds.

A chat request is JSON with media inside as data URLs. `ChatBody` separates the two while bytes arrive: media are kept
as they come and never parsed as JSON, and what is left, the JSON itself, has a limit of its own that is small. Parsing
and validation run beside the event loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from pydantic import BaseModel
from starlette.responses import JSONResponse

from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import Portable
from llavakit.serving.protocol import ChatRequest, error_body

_URL = re.compile(rb'"(?:(?:image|video|volume)_)?url"[ \t\r\n]{0,64}:[ \t\r\n]{0,64}"(?=data:)')
_PLACE = re.compile(r"data:#(\d{1,4})", re.ASCII)
_LONGEST_MARK = len(b'"volume_url":"data:') + 128
_MOST_MEDIA = 256  # data URLs of one request


class TooMuch(Portable):
    """A body that is too large, too slow or one too many, with the HTTP status and what to say."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodiesInFlight:
    """How many bytes of bodies the server holds, of all requests together.

    Args:
        most: Bytes.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, size: int) -> None:
        """Count bytes that arrived.

        Raises:
            TooMuch: If they are more than the server may hold.
        """
        if self.held + size > self.most:
            raise TooMuch(503, "the server is receiving as much as it can hold; try again")
        self.held += size

    def give(self, size: int) -> None:
        """Bytes that are held no longer."""
        self.held -= size


class BodyLimit:
    """ASGI middleware: a request body that is too large or too slow, or too much beside others, is read no further.

    Bytes count until the response begins, or until the application says that it has made something else of them
    (`state["body"].release()`).

    Args:
        most: Bytes; more are answered with 413.
        seconds: Time for the whole body; more is answered with 408.
        flight: Bytes of all requests; more are answered with 503.
        refused: Told the status of every request that is refused here.
    """

    def __init__(
        self, app: Any, most: int, seconds: float, flight: BodiesInFlight, refused: Callable[[int], None]
    ) -> None:
        self.app, self.most, self.seconds, self.flight, self.refused = app, most, seconds, flight, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, receive)
        started, refused = False, None
        scope.setdefault("state", {})["body"] = body

        async def watched(message: Any) -> None:
            nonlocal started
            if body.refused is None:  # what the application makes of an aborted body is replaced below
                started = True
                body.release()
                await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if declared.isdigit() and int(declared) > self.most:
                raise TooMuch(413, f"the request is larger than {self.most} bytes")
            await self.app(scope, body.receive, watched)
        except TooMuch as error:
            refused = error
        finally:
            body.release()
        refused = refused or body.refused
        if refused is not None and not started:
            self.refused(refused.status)
            await refusal(refused.status, str(refused))(scope, receive, send)


class _Body:
    """The body of one request while it arrives."""

    def __init__(self, limit: BodyLimit, receive: Any) -> None:
        self.limit, self._receive = limit, receive
        self.refused: TooMuch | None = None
        self._deadline = asyncio.get_running_loop().time() + limit.seconds
        self._seen, self._counted, self._unfinished = 0, 0, True

    async def receive(self) -> Any:
        if not self._unfinished:
            return await self._receive()
        try:
            try:
                async with asyncio.timeout_at(self._deadline):
                    message = await self._receive()
            except TimeoutError:
                raise TooMuch(408, f"the request took longer than {self.limit.seconds:g} s to arrive") from None
            size = len(message.get("body", b""))
            self._seen += size
            if self._seen > self.limit.most:
                raise TooMuch(413, f"the request is larger than {self.limit.most} bytes")
            self.limit.flight.take(size)
            self._counted += size
        except TooMuch as error:
            self.refused = error
            raise
        self._unfinished = message.get("more_body", False)
        return message

    def release(self) -> None:
        """The bytes so far are held no longer."""
        self.limit.flight.give(self._counted)
        self._counted = 0


def refusal(status: int, message: str) -> JSONResponse:
    """An answer after which the connection ends, since the rest of the body is not read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Connection": "close"} | ({"Retry-After": "1"} if status == 503 else {})
    return JSONResponse(error_body(message, kind), status, headers=headers)


class WithMedia(Protocol):
    """A request that names media."""

    def media_parts(self) -> Iterable[tuple[str, Any]]:
        """Media with the paths of their fields; each has a `source` with a `url`."""


class ChatBody:
    """The body of a request that holds a conversation, separated into JSON and media while it arrives.

    In the JSON every `"url": "data:..."` becomes `"url": "data:#0"`, `"data:#1"` and so on; `media` holds them. An
    `"image_url": "data:..."` (of a video or volume likewise) is treated in the same way.

    Args:
        most_json: Bytes of JSON without media; more raise `TooMuch`.
        request: What the JSON is read as.
    """

    def __init__(self, most_json: int, request: type[BaseModel] = ChatRequest) -> None:
        self.most_json, self._request = most_json, request
        self.json = bytearray()
        self.media: list[bytearray] = []
        self.value: Any = None  # the JSON, once it is parsed
        self._pending = bytearray()  # JSON in which no data URL has been looked for yet
        self._inside = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            TooMuch: If there is more JSON, or there are more data URLs, than a request may hold.
        """
        rest = memoryview(chunk)
        while len(rest):
            rest = rest[self._media(rest) :] if self._inside else self._text(rest)

    def _media(self, rest: memoryview) -> int:
        """Append to the data URL that is open; how many bytes were taken."""
        data, item = bytes(rest), self.media[-1]
        place = data.find(b'"')
        while place >= 0 and _escaped(item, data, place):
            place = data.find(b'"', place + 1)
        if place < 0:
            item += data
            return len(data)
        item += data[:place]
        self._inside = False
        return place  # the closing quote is JSON again

    def _text(self, rest: memoryview) -> memoryview:
        """Append JSON up to the next data URL; what follows is left."""
        self._pending += rest
        found = _URL.search(self._pending)
        if found is None:
            self._keep(max(len(self._pending) - _LONGEST_MARK, 0))  # a mark may be cut in two
            return rest[:0]
        if len(self.media) >= _MOST_MEDIA:
            raise TooMuch(413, f"a request holds at most {_MOST_MEDIA} data URLs")
        left = memoryview(bytes(self._pending))[found.end() :]
        del self._pending[found.end() :]
        self._keep(found.end())
        self.json += b"data:#%d" % len(self.media)
        self.media.append(bytearray())
        self._inside = True
        return left

    def _keep(self, size: int) -> None:
        self.json += self._pending[:size]
        del self._pending[:size]
        if len(self.json) + len(self._pending) > self.most_json:
            raise TooMuch(413, f"a request holds at most {self.most_json} bytes of JSON beside its media")

    def read(self) -> Any:
        """The request; takes a while and is meant for a thread.

        Raises:
            JsonError: If the body is not JSON.
            ValidationError: If it is no such request.
        """
        self._keep(len(self._pending))
        self.value = parse_json(bytes(self.json))
        request: WithMedia = self._request.model_validate(self.value)
        used = {self.number(part.source.url) for _, part in request.media_parts()}
        if not used.issuperset(range(len(self.media))):
            raise JsonError("a data URL is read in the url of an image, a video or a volume, and nowhere else")
        return request

    def number(self, url: str) -> int | None:
        """Which of the media a URL of the request stands for, if any."""
        found = _PLACE.fullmatch(url)
        return int(found[1]) if found is not None and int(found[1]) < len(self.media) else None

    def take(self, number: int) -> bytes:
        """The data URL of that number, without JSON's escapes, and forget it."""
        item, self.media[number] = self.media[number], bytearray()
        if b"\\" not in item:
            return bytes(item)
        plain = item.replace(b"\\/", b"/").replace(b"\\n", b"").replace(b"\\r", b"")
        return plain if b"\\" not in plain else parse_json(b'"%s"' % item).encode("utf-8")


def _escaped(before: bytearray, data: bytes, place: int) -> bool:
    """Whether the character at a place of `data`, which follows `before`, has an odd number of backslashes in front."""
    slashes = 0
    while place - slashes > 0 and data[place - slashes - 1] == 0x5C:
        slashes += 1
    if slashes == place:
        slashes += len(before) - len(before.rstrip(b"\\"))
    return slashes % 2 == 1
