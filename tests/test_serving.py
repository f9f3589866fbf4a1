"""The server's API: OpenAI's client unmodified, errors in OpenAI's form, clients that go away."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
import httpx  # noqa: E402
from tiny_server import Running, ask, data_url, expected, media, png, small_chat, strict_server  # noqa: E402

from llavakit.serving.app import Settings  # noqa: E402


@pytest.fixture(scope="module")
def chat():
    return small_chat()


@pytest.fixture(scope="module")
def server(chat):
    running = strict_server(chat)
    yield running
    running.stop()


def test_official_client_gets_what_the_library_says(server, chat):
    client = server.client()
    wanted = expected(chat, image=png(), max_new_tokens=12)
    whole = client.chat.completions.create(model="tiny", messages=ask(url=data_url(png())))
    assert whole.choices[0].message.content == wanted
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.prompt_tokens > 16
    pieces = client.chat.completions.create(
        model="tiny", messages=ask(url=data_url(png())), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(pieces)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == wanted
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [m.id for m in client.models.list()] == ["tiny"]


def test_n_seed_stop_and_logprobs(server):
    client = server.client()
    options = {"model": "tiny", "messages": ask(), "n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 6}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    answers = [choice.message.content for choice in first.choices]
    assert answers == [choice.message.content for choice in second.choices]
    assert len(answers) == 3
    logged = client.chat.completions.create(model="tiny", messages=ask(), max_tokens=4, logprobs=True, top_logprobs=2)
    content = logged.choices[0].logprobs.content
    assert 1 <= len(content) <= 4
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    whole = client.chat.completions.create(model="tiny", messages=ask(), max_tokens=12).choices[0].message.content
    mark = whole[len(whole) // 2]
    cut = client.chat.completions.create(model="tiny", messages=ask(), max_tokens=12, stop=mark)
    assert cut.choices[0].message.content == whole.split(mark)[0].strip()
    assert cut.choices[0].finish_reason == "stop"


def test_uploads_are_named_by_the_server(server, chat):
    client = server.client()
    stored = client.files.create(file=("../../etc/passwd", png("blue")), purpose="vision")
    assert stored.id.startswith("file-")
    assert "passwd" not in stored.filename
    answer = client.chat.completions.create(model="tiny", messages=ask(url=f"upload:{stored.id}"))
    assert answer.choices[0].message.content == expected(chat, image=png("blue"), max_new_tokens=12)
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError, match="unknown or has been forgotten"):
        client.chat.completions.create(model="tiny", messages=ask(url=f"upload:{stored.id}"))


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temprature": 1}, "", "did you mean 'temperature'"),
        ({"temperature": 9}, "temperature", "less than or equal to 2"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "user"),
        ({"messages": ask(url="file:///etc/passwd")}, "messages.0.content.0.image_url.url", "never paths"),
        ({"messages": ask(url="/etc/passwd")}, "messages.0.content.0.image_url.url", "never paths"),
        ({"messages": ask(url="data:image/png;base64,@@@")}, "messages.0.content.0.image_url.url", "valid base64"),
        ({"messages": ask(url=data_url(b"not a picture"))}, "messages.0.content.0.image_url", "not an image"),
        ({"messages": ask(url=data_url(png()))[0:1] * 4}, "messages.3.content.0.image_url.url", "at most 3 images"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid list"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages.0.content.0", "'image_url'"),
        ({"messages": ask(url=5)}, "messages.0.content.0.image_url.url", "valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.image_url.url",
            "required",
        ),
        ({"stop": 5}, "stop", "valid string"),
        ({"messages": media("video_url", data_url(b"x"))}, "messages", "video"),
        ({"messages": media("volume_url", data_url(b"x"))}, "messages", "volume"),
        (
            {"messages": [media("image_url", data_url(png()))[0] | {"role": "assistant"}]},
            "messages",
            "no media",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "needs content"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"n": 99}, "n", "at most n = 8"),
        ({"stop": "</s> now"}, "stop", "holds the special token '</s>'"),
        ({"top_logprobs": 3}, None, "needs logprobs"),
        ({"model": "other"}, "model", "not served here"),
    ],
    ids=lambda value: None,
)
def test_errors_name_the_field(server, body, param, words):
    request = {"model": "tiny", "messages": ask(), **body}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=30)
    error = response.json()["error"]
    assert 400 <= response.status_code < 500
    assert words in error["message"]
    if param is not None:
        assert (error["param"] or "").startswith(param)


def test_halves_of_characters_are_no_failure(server):
    url = f"{server.url}/v1/chat/completions"
    bodies = [
        r'{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}',
        r'{"model": "\ud800", "messages": [{"role": "user", "content": "x"}]}',
        r'{"\ud800": 1, "model": "tiny", "messages": [{"role": "user", "content": "x"}]}',
        r'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": ['
        r'{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}]}',
        r'{"model": "tiny", "messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", '
        r'"function": {"name": "f", "arguments": "{\"a\": \"\\ud800\"}"}}]}]}',
    ]
    answers = [httpx.post(url, content=body, headers={"content-type": "application/json"}) for body in bodies]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 400, 200]


def test_broken_json_and_oversize_bodies():
    running = Running(small_chat(), Settings(names=("tiny",), body_bytes=20_000))
    try:
        url = f"{running.url}/v1/chat/completions"
        broken = httpx.post(url, content=b"{nonsense", headers={"content-type": "application/json"})
        assert broken.status_code == 400
        assert "not valid JSON" in broken.json()["error"]["message"]
        big = httpx.post(url, json={"model": "tiny", "messages": ask("x" * 30_000)})
        assert big.status_code == 413

        def endless():
            for _ in range(100):
                yield b"x" * 1000

        json = {"content-type": "application/json"}
        assert httpx.post(url, content=endless(), headers=json).status_code == 413
        assert httpx.post(url, content=b"{}").status_code == 415
    finally:
        running.stop()


def test_api_keys_are_asked_for():
    running = Running(small_chat(), Settings(names=("tiny",), api_keys=("right", "other")))
    try:
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").models.list()
        assert list(running.client("other").models.list())
    finally:
        running.stop()


def test_a_full_queue_answers_429():
    running = Running(small_chat(), Settings(names=("tiny",), max_queue=0))
    try:
        running.app.state.service.active = running.app.state.service.responder.engine.max_batch
        response = httpx.post(f"{running.url}/v1/chat/completions", json={"model": "tiny", "messages": ask()})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
    finally:
        running.stop()


def reply_tokens(server) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("llavakit_reply_tokens_total")))


def test_a_client_that_goes_away_frees_its_row(server, chat):
    before = reply_tokens(server)
    body = {"model": "tiny", "messages": ask(), "max_tokens": 450, "stream": True, "stop": "never said"}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    deadline = time.time() + 30
    service = server.app.state.service
    while (service.active or chat.engine.busy) and time.time() < deadline:
        time.sleep(0.02)
    assert service.active == 0
    assert not chat.engine.busy
    assert reply_tokens(server) - before < 440


def test_a_client_that_goes_away_before_the_first_byte_frees_its_place(server):
    service = server.app.state.service
    body = json.dumps({"model": "tiny", "messages": ask(), "max_tokens": 200, "stream": True}).encode()
    events = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": ("::1", 1), "server": ("::1", 2)}

    async def receive():
        return events.pop(0) if events else {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0.01)  # the start of the answer does not get through

    asyncio.run(server.app(scope | {"root_path": ""}, receive, send))
    assert service.active == 0


def test_metrics_and_health(server):
    server.client().chat.completions.create(model="tiny", messages=ask(), max_tokens=2)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'llavakit_requests_total{outcome="answered"}' in text
    assert "llavakit_first_token_seconds_count" in text
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
