"""The HTTP server process: connections, their number and patience, and how it stops."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0  # for a connection to send the headers of its next request
STOP_SECONDS = 30  # for open requests to end after SIGTERM


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that waits only so long for headers: connections that never ask anything make room."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def http_server(app: Any, connections: int, **options: Any) -> uvicorn.Server:
    """A server for an application.

    Args:
        connections: Most at once; one more is answered with 503.
        options: Further ones of `uvicorn.Config` (`host`, `port`, `log_level`).
    """
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        limit_concurrency=connections,
        timeout_graceful_shutdown=STOP_SECONDS,
        server_header=False,
        **options,
    )
    return uvicorn.Server(config)


def run_until_stopped(server: uvicorn.Server) -> None:
    """Serve until SIGTERM or Ctrl-C; after SIGTERM the process ends with status 0 once open requests are answered."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again when it has stopped
    server.run()
