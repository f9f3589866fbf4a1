"""Memory for media: what one request may take when it is decoded, and what all requests hold together.

The readers of `llavakit.media` say how large a media item becomes before they allocate it (`Limits.claim`); an account
that is open in their thread compares it with what the request and the server may take. The views that are cut from the
media count until the request ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from llavakit.media.policy import Refused

_OPEN: ContextVar[Account | None] = ContextVar("memory_account", default=None)


@dataclass(frozen=True)
class MemoryPolicy:
    """How much decoded media may take.

    Attributes:
        request_bytes: All media of one request, decoded; more are refused with 413.
        total_bytes: What all requests hold at once; a request for which there is no room is refused with 503.
    """

    request_bytes: int = 2**30
    total_bytes: int = 4 * 2**30


class MemoryBudget:
    """The memory of one server.

    Args:
        policy: How much there is.
    """

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy, self.held = policy, 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Hold more bytes.

        Raises:
            Refused: If the server holds too much already.
        """
        with self._lock:
            if self.held + size > self.policy.total_bytes:
                raise Refused("the server's memory for media is in use; try again", 503)
            self.held += size

    def give(self, size: int) -> None:
        """Hold fewer bytes."""
        with self._lock:
            self.held -= size


class Account:
    """The memory of one request."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._claimed = self._held = 0

    def claim(self, name: str, size: int) -> None:
        """Before so many bytes are decoded.

        Raises:
            Refused: If the request takes too much, or the server has no room.
        """
        most = self._budget.policy.request_bytes
        if self._claimed + size > most:
            raise Refused(
                f"{name}: the media of a request may take {most:,} bytes when they are decoded; with this one they take"
                f" {self._claimed + size:,}; send fewer or smaller ones",
                413,
            )
        self._budget.take(size)
        self._claimed += size
        self._held += size

    def keep(self, size: int) -> None:
        """What was decoded is gone but for so many bytes."""
        self._budget.give(self._held - size)
        self._held = size

    def close(self) -> None:
        """The request has ended."""
        self.keep(0)

    @contextmanager
    def counting(self) -> Iterator[Account]:
        """What is decoded in here, in this thread, goes to this account."""
        token = _OPEN.set(self)
        try:
            yield self
        finally:
            _OPEN.reset(token)


def claim(name: str, size: int) -> None:
    """`Limits.claim` of a server: goes to the account that is open in this thread, if one is."""
    account = _OPEN.get()
    if account is not None:
        account.claim(name, size)
