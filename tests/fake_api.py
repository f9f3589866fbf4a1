"""An OpenAI-compatible server on the loopback interface that answers by a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Failure:
    """An answer with an error status."""

    status: int
    message: str = "no"
    headers: dict[str, str] = field(default_factory=dict)


def completion(message: str | dict[str, Any], reason: str = "stop", n: int = 1) -> dict[str, Any]:
    """A chat completion as servers send it: 10 prompt tokens, 5 per reply."""
    message = {"role": "assistant", "content": message} if isinstance(message, str) else message
    choices = [{"index": index, "message": message, "finish_reason": reason} for index in range(n)]
    usage = {"prompt_tokens": 10, "completion_tokens": 5 * n, "total_tokens": 10 + 5 * n}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def chunks(message: dict[str, Any], reason: str) -> list[dict[str, Any]]:
    """The same as a stream, letter by letter."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for name in ("reasoning_content", "content"):
        deltas += [{name: letter} for letter in message.get(name) or ""]
    for number, call in enumerate(message.get("tool_calls") or ()):
        head = {"index": number, "id": call["id"], "type": "function"}
        deltas.append({"tool_calls": [head | {"function": {"name": call["function"]["name"], "arguments": ""}}]})
        for letter in call["function"]["arguments"]:
            deltas.append({"tool_calls": [{"index": number, "function": {"arguments": letter}}]})
    base = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    found = [base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    found.append(base | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return [*found, base | {"choices": [], "usage": usage}]


class FakeAPI:
    """The server.

    Args:
        reply: Gets the body of a request; gives text, a message, a `Failure` or other JSON, or raises `ConnectionError`
            to hang up.

    Attributes:
        bodies: (path, headers, body) of every request, failed ones included.
        most: Most requests that were being answered at the same time.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Any], models: tuple[str, ...] = ("m",)) -> None:
        self.bodies: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in models]
                self.send(200, json.dumps({"object": "list", "data": listed}).encode(), {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append((self.path, {k.title(): v for k, v in self.headers.items()}, body))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    found = reply(body)
                finally:
                    with outer.lock:  # before the answer is sent: the client may ask again as soon as it has it
                        outer.now -= 1
                try:
                    self.answer(body, found)
                except ConnectionError:
                    self.close_connection = True

            def answer(self, body: dict[str, Any], found: Any) -> None:
                if isinstance(found, Failure):
                    data = json.dumps({"error": {"message": found.message}}).encode()
                    self.send(found.status, data, found.headers)
                    return
                if isinstance(found, str):
                    found = {"role": "assistant", "content": found}
                if "role" in found:
                    reason = "tool_calls" if found.get("tool_calls") else "stop"
                    if body.get("stream"):
                        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks(found, reason)]
                        self.send(200, "".join([*events, "data: [DONE]\n\n"]).encode(), {}, "text/event-stream")
                        return
                    found = completion(found, reason, body.get("n", 1))
                self.send(200, json.dumps(found).encode(), {})

            def send(self, status: int, data: bytes, headers: dict[str, str], kind: str = "application/json") -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), "Content-Type": kind, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> FakeAPI:
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()
