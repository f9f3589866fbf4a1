"""Malformed requests to the server: each is answered with a 4xx of one line, and the next one is answered as ever."""

from __future__ import annotations

import base64
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parent.parent))
import httpx
from mutations import json_text, scramble, scrambled_json, twist
from tiny_server import Running, ask, data_url, png, small_chat

from llavakit.media.policy import MediaPolicy
from llavakit.serving.app import Settings

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
WHOLE: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        *ask(url=data_url(png(size=(8, 6)))),
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "a red square"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ],
    "tools": [TOOL],
    "tool_choice": "auto",
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 1,
    "seed": 3,
    "stop": ["x"],
    "logprobs": True,
    "top_logprobs": 1,
    "max_tokens": 2,
    "stream": False,
    "stream_options": {"include_usage": True},
    "metadata": {"a": "b"},
    "response_format": {"type": "text"},
}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def running():
    media = MediaPolicy(fetch=False, images=3)
    started = Running(small_chat(), Settings(names=("tiny",), media=media, max_tokens=3, default_tokens=2))
    yield started
    started.stop()


@pytest.fixture
def client(running):
    with httpx.Client(base_url=running.url, timeout=30) as opened:
        yield opened
        answer = opened.post("/v1/chat/completions", json={"model": "tiny", "messages": ask()})
        assert answer.status_code == 200, "the server is not what it was"
        service = running.app.state.service
        deadline = time.time() + 10
        while service.active and time.time() < deadline:
            time.sleep(0.02)
        assert (service.active, service.memory.held) == (0, 0)


def test_chat_requests(faults, client):
    for seed in range(400):
        rng = random.Random(seed)
        body = twist(WHOLE, rng) | ({"max_tokens": 2} if rng.random() < 0.5 else {})
        answer = client.post("/v1/chat/completions", content=json_text(body).encode(), headers=JSON)
        faults.response(
            "server: chat requests", f"seed {seed}", answer.status_code, answer.text if answer.is_error else ""
        )


def test_bytes_of_chat_requests(faults, client):
    for seed in range(200):
        content = scrambled_json(WHOLE, random.Random(seed))
        answer = client.post("/v1/chat/completions", content=content, headers=JSON)
        faults.response(
            "server: their bytes", f"seed {seed}", answer.status_code, answer.text if answer.is_error else ""
        )


def test_data_urls(faults, client):
    picture = png(size=(8, 6))
    for seed in range(200):
        rng = random.Random(seed)
        url = data_url(scramble(picture, rng) if seed % 2 else picture)
        if seed % 2 == 0:
            url = scramble(url.encode(), rng).decode("latin-1")
        body = {"model": "tiny", "messages": ask(url=url), "max_tokens": 1}
        answer = client.post("/v1/chat/completions", json=body)
        faults.response("server: data URLs", f"seed {seed}", answer.status_code, answer.text if answer.is_error else "")


def test_uploads(faults, client):
    """Multipart forms, their headers, and names of uploads."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        + png(size=(8, 6))
        + b"\r\n--b--\r\n"
    )
    for seed in range(150):
        rng = random.Random(seed)
        kind = (
            "multipart/form-data; boundary=b"
            if seed % 5
            else "multipart/form-data" + rng.choice(("", "; boundary=", ";x"))
        )
        answer = client.post("/v1/files", content=scramble(form, rng), headers={"Content-Type": kind})
        faults.response("server: uploads", f"seed {seed}", answer.status_code, answer.text if answer.is_error else "")
        name = base64.b64encode(rng.randbytes(rng.randint(0, 30))).decode()
        body = {"model": "tiny", "messages": ask(url=f"upload:{name}")}
        answer = client.post("/v1/chat/completions", json=body)
        faults.response("server: names of uploads", f"seed {seed}", answer.status_code, answer.text)
        answer = client.delete(f"/v1/files/{name}")
        faults.response("server: names of uploads", f"delete, seed {seed}", answer.status_code, answer.text)


def test_raw_http(faults, running, client):
    """What is no HTTP, or half of it; the connection may end without an answer."""
    whole = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer x\r\nOrigin: http://localhost:%d\r\nCookie: llavakit_session=a.b.1.c\r\n"
        b"Content-Length: 2\r\nConnection: close\r\n\r\n{}" % running.port
    )
    for seed in range(150):
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
            try:
                line.sendall(scramble(whole, random.Random(seed)))
                line.shutdown(socket.SHUT_WR)
                head = line.recv(4096).split(b"\r\n")[0].split()
            except ConnectionError:
                head = []
        status = int(head[1]) if len(head) > 1 and head[1].isdigit() else 400
        faults.response("server: raw HTTP", f"seed {seed}", status)
