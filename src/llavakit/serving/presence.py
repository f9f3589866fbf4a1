"""Whether the client of a request is still there: work ends at its next step when it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from llavakit.serving.protocol import APIError

T = TypeVar("T")


class Presence:
    """Listens for a client that goes away, after its request has arrived and before the answer begins."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def __aenter__(self) -> Presence:
        self._leaving = asyncio.ensure_future(_disconnected(self._request))
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._leaving.cancel()

    def check(self) -> None:
        """Called before a step of work, in any thread.

        Raises:
            APIError: 499, if the client has gone.
        """
        if self._leaving.done() and not self._leaving.cancelled():  # cancelled: the answer has begun
            raise APIError(499, "the client closed the request")

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that waits for something; it is cancelled if the client goes away.

        Not for work in threads: those cannot be cancelled, and would go on uncounted.

        Raises:
            APIError: 499, if the client has gone.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({self._leaving, task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.check()
            return await task
        finally:
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
