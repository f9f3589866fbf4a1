"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

HUNG_UP = 499
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server.

    Args:
        responder: Its queue is read when metrics are.
    """

    def __init__(self, responder: Any) -> None:
        self.registry = CollectorRegistry()
        make = {"registry": self.registry}
        self._requests = Counter("llavakit_requests", "Requests that ended", ["outcome"], **make)
        self._prompt = Counter("llavakit_prompt_tokens", "Prompt positions", **make)
        self._reply = Counter("llavakit_reply_tokens", "Tokens of replies", **make)
        self._first = Histogram("llavakit_first_token_seconds", "Time to first token", buckets=_SECONDS, **make)
        self._whole = Histogram("llavakit_request_seconds", "Time of a request", buckets=_SECONDS, **make)
        Gauge("llavakit_waiting", "Requests in the queue", **make).set_function(lambda: responder.waiting)
        Gauge("llavakit_active", "Replies being decoded", **make).set_function(lambda: responder.active)

    def first_token(self, seconds: float) -> None:
        """The first event of an answer is there."""
        self._first.observe(seconds)

    def worked(self, prompt_tokens: int, reply_tokens: int) -> None:
        """A request was computed, whether its answer arrived or not."""
        self._prompt.inc(prompt_tokens)
        self._reply.inc(reply_tokens)

    def answered(self, seconds: float) -> None:
        """A request was answered to its end."""
        self._requests.labels("answered").inc()
        self._whole.observe(seconds)

    def failed(self, status: int) -> None:
        """A request was answered with an error, or (499) its client went away."""
        self._requests.labels("hung_up" if status == HUNG_UP else str(status)).inc()

    def render(self) -> str:
        """The text that Prometheus reads."""
        return generate_latest(self.registry).decode()
