"""Bodies of requests: JSON and media told apart while bytes arrive, and work that nobody waits for."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
import httpx
from tiny_server import Running, ask, data_url, expected, media, png, small_chat

from llavakit.data.strict_json import JsonError
from llavakit.serving.app import Settings
from llavakit.serving.bodies import BodiesInFlight, ChatBody, TooMuch
from llavakit.serving.length import exceeds, prompt_characters

MODEL = {"model": "tiny"}


def separated(content: bytes, sizes, most=2**20) -> ChatBody:
    """A body that arrives in pieces of the given sizes, again and again."""
    body, place, number = ChatBody(most), 0, 0
    while place < len(content):
        size = sizes[number % len(sizes)]
        body.feed(content[place : place + size])
        place, number = place + size, number + 1
    return body


def images(*urls):
    return MODEL | {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}]
    }


URLS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(lambda text: "data:," + text))


@settings(max_examples=200, deadline=None)
@given(URLS.filter(bool), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.booleans(), st.sampled_from([0, 2]))
def test_media_come_out_as_they_went_in_wherever_the_pieces_end(urls, sizes, plain, indent):
    content = json.dumps(images(*urls), ensure_ascii=not plain, indent=indent or None).encode()
    body = separated(content, sizes)
    request = body.read()
    numbers = [body.number(part.source.url) for _, part in request.media_parts()]
    assert numbers == list(range(len(urls)))
    assert [_text(body.take(number)) for number in numbers] == [_bare(url) for url in urls]


def _text(url):
    return _bare(bytes(url).decode())


def _bare(url):
    """Line breaks mean nothing in a data URL."""
    return url.replace("\n", "").replace("\r", "")


def test_what_a_text_says_of_urls_stays_text():
    said = 'He wrote "url": "data:image/png;base64,AAAA" and \\"url\\": "data:,x" again'
    body = separated(json.dumps(MODEL | {"messages": ask(said)}).encode(), [7])
    assert body.read().messages[0].content[0].text == said
    assert body.media == []


def test_json_escapes_in_a_data_url():
    """PHP writes every slash with a backslash."""
    content = json.dumps(images(data_url(png()))).replace("/", r"\/").replace("base64,", r"base64,\r\n").encode()
    body = separated(content, [1000])
    (_, part), *_ = body.read().media_parts()
    assert bytes(body.take(body.number(part.source.url))).decode() == data_url(png())


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"url": "data:,x"}}}]},
        {"metadata": {"url": "data:,x"}},
    ],
)
def test_a_data_url_in_another_place_is_refused(elsewhere):
    body = separated(json.dumps(MODEL | {"messages": ask()} | elsewhere).encode(), [1000])
    with pytest.raises(JsonError, match="in the url of an image"):
        body.read()


def test_json_has_a_limit_of_its_own():
    image = data_url(bytes(200_000))
    separated(json.dumps(images(image, image)).encode(), [4096], most=500).read()
    for content in (
        json.dumps(MODEL | {"messages": ask("x" * 500)}).encode(),
        b'{"url":"data:' + b"x" * 50 + b'"' + b" " * 500,
        b'"url"' + b" " * 500 + b':"data:,x"',
        b'{"image": "data:' + b"x" * 500,
        b"[" * 501,
    ):
        with pytest.raises(TooMuch, match="at most 500 bytes of JSON"):
            separated(content, [64], most=500).read()
    with pytest.raises(TooMuch, match="at most 256 data URLs"):
        separated(b'{"url":"data:"' * 300, [4096])


def test_bodies_in_flight_are_counted():
    flight = BodiesInFlight(100)
    flight.take(60)
    with pytest.raises(TooMuch) as refused:
        flight.take(41)
    assert refused.value.status == 503
    flight.give(60)
    flight.take(100)


# ------------------------------------------------------------------ the server


@pytest.fixture(scope="module")
def running():
    started = Running(small_chat(), Settings(names=("tiny",), default_tokens=4, flight_bytes=3_000_000))
    yield started
    started.stop()


def post(running, body, **options):
    return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30, **options)


def test_large_media_pass_and_large_texts_do_not(running):
    picture = png(size=(1000, 600))
    assert post(running, MODEL | {"messages": ask(url=data_url(picture + bytes(1_500_000)))}).status_code == 200
    refused = post(running, MODEL | {"messages": ask("word " * 300_000)})
    assert refused.status_code == 413
    assert "JSON beside its media" in refused.json()["error"]["message"]
    assert running.app.state.service.active == 0


def test_more_bodies_than_the_server_can_hold(running):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begun = head + b'Content-Length: 3000000\r\n\r\n{"url": "data:' + b"x" * 2_500_000
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
        line.sendall(begun)
        flight = _flight(running)
        _until(lambda: flight.held > 2_400_000)
        answer = post(running, MODEL | {"messages": ask(url=data_url(bytes(900_000)))})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
    _until(lambda: flight.held == 0)
    assert post(running, MODEL | {"messages": ask()}).status_code == 200
    assert flight.held == 0


def _flight(running):
    layer = running.app.middleware_stack
    while not hasattr(layer, "flight"):
        layer = layer.app
    return layer.flight


def _until(condition, seconds=10.0):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.01)
    assert condition()


def test_prompts_are_refused_by_their_characters(running):
    """All that may become part of the prompt counts, before anything is tokenised."""
    chat = running.app.state.service.responder
    most = prompt_characters(chat.processor.tokenizer, chat.engine.max_length)
    assert most == 512 * max(map(len, chat.processor.tokenizer.get_vocab()))
    third = "x" * (most // 3)
    tool = {"type": "function", "function": {"name": "f", "description": third}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": third}}
    whole = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": third},
        ],
        "tools": [tool],
    }
    tokenised = []
    genuine, chat.request = chat.request, lambda *args, **options: tokenised.append(1)
    try:
        refused = post(running, MODEL | whole)
    finally:
        chat.request = genuine
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert tokenised == []


def test_what_fits_is_never_refused_by_its_characters(running):
    tokenizer = running.app.state.service.responder.processor.tokenizer
    longest = max(tokenizer.get_vocab(), key=len)
    for text in (longest * 40, "What is in this picture? " * 20, "\U0001f600" * 100):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(text) <= prompt_characters(tokenizer, len(ids))


def test_the_loop_does_not_parse(running, monkeypatch):
    """How long `/health` waits meanwhile is measured by benchmarks/server_limits.py."""
    threads = []

    def parse(text):
        threads.append(threading.get_ident())
        return json.loads(text)

    monkeypatch.setattr("llavakit.serving.bodies.parse_json", parse)
    parts = [{"type": "text", "text": ""}] * 3000
    assert post(running, MODEL | {"messages": [{"role": "user", "content": parts}]}).status_code == 200
    assert len(threads) == 1
    assert running.thread.ident not in threads


def test_length_is_known_after_little_more_than_the_context(running):
    tokenizer = running.app.state.service.responder.processor.tokenizer
    read = []

    def counting(text, **options):
        read.append(len(text))
        return tokenizer(text, **options)

    texts = ["What is in this picture? A red square and a blue disc. " * 4000, "x" * 50_000]
    whole = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert exceeds(texts, counting, 2000)
    assert sum(read) <= 2 * 16_384
    for share in (0.5, 0.98):
        assert exceeds(texts, tokenizer, int(whole * share))
    assert not exceeds(texts, tokenizer, whole), "what fits is never refused"
    assert not exceeds([""], tokenizer, 1)


@pytest.mark.parametrize("stream", [True, False])
def test_work_ends_at_its_next_step_when_nobody_waits(running, monkeypatch, stream):
    """A client leaves while its first picture is decoded: nothing of the second is, and nothing is generated."""
    service = running.app.state.service
    begun, go, decoded, queued = threading.Event(), threading.Event(), [], []
    genuine = service.responder.processor.read_media

    def slow(part):
        decoded.append(part)
        begun.set()
        go.wait(10)
        return genuine(part)

    monkeypatch.setattr(service.responder.processor, "read_media", slow)
    submit = service.responder.engine.submit
    monkeypatch.setattr(
        service.responder.engine, "submit", lambda *args, **options: (queued.append(1), submit(*args, **options))[1]
    )
    url = data_url(png())
    content = json.dumps(MODEL | {"messages": [*media("image_url", url), *media("image_url", url)], "stream": stream})
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(content), content.encode())
        )
        assert begun.wait(10)
    time.sleep(0.2)  # the server hears of it
    go.set()
    _until(lambda: service.active == 0)
    assert len(decoded) == 1
    assert queued == []


def test_a_fetch_ends_when_nobody_waits(running, monkeypatch):
    fetched = asyncio.Event()
    state = []

    async def forever(self, url):
        state.append("begun")
        try:
            await fetched.wait()
        finally:
            state.append("ended")

    monkeypatch.setattr("llavakit.serving.service.MediaFetcher.read", forever)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{running.url}/v1/chat/completions",
            json=MODEL | {"messages": ask(url="http://example.com/a.png")},
            timeout=0.5,
        )
    _until(lambda: running.app.state.service.active == 0)
    assert state == ["begun", "ended"]


def test_two_system_messages_are_one(running):
    chat = running.app.state.service.responder
    told = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}]
    answer = post(running, MODEL | {"messages": [*told, *ask()], "max_tokens": 6}).json()
    joined = [{"role": "system", "content": "Be brief.\nBe kind."}, *ask()]
    assert answer["choices"][0]["message"]["content"] == chat.chat(joined, max_new_tokens=6)
    late = post(running, MODEL | {"messages": [*ask(), told[0]]}).json()["error"]
    assert "must be the first" in late["message"]


def test_null_is_as_good_as_nothing(running):
    chat = running.app.state.service.responder
    nothing = dict.fromkeys(
        ("stream", "stream_options", "temperature", "top_p", "n", "stop", "seed", "tools", "tool_choice", "logprobs",
         "max_tokens", "metadata", "user", "logit_bias", "response_format", "audio", "functions", "presence_penalty")
    )  # fmt: skip
    part = {"type": "text", "text": "What is in this picture?", "cache_control": None}
    message = {"role": "user", "content": [part], "name": None, "tool_calls": None, "audio": None}
    answer = post(running, MODEL | nothing | {"messages": [message], "max_tokens": 6})
    assert answer.json()["choices"][0]["message"]["content"] == expected(chat, max_new_tokens=6)
    assert post(running, MODEL | {"messages": None}).json()["error"]["param"] == "messages"


def test_openais_fields_without_effect_are_accepted(running):
    fields = {
        "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y", "logit_bias": {}, "user": "z",
        "metadata": {"a": "b"}, "store": False, "modalities": ["text"], "presence_penalty": 0, "frequency_penalty": 0.0,
        "prompt_cache_retention": "24h", "response_format": {"type": "text"},
    }  # fmt: skip
    assert post(running, MODEL | {"messages": ask()} | fields).status_code == 200
    for field, value in (("logit_bias", {"5": 1}), ("metadata", {"a": 1}), ("presence_penalty", 0.5)):
        refused = post(running, MODEL | {"messages": ask(), field: value})
        assert refused.json()["error"]["param"].startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True), ("n", "2"), ("n", 1.0), ("seed", True), ("max_tokens", "5"), ("temperature", True),
        ("temperature", "1"), ("stream", 1), ("stream", "true"), ("logprobs", 1), ("top_p", False), ("stop", [5]),
        ("presence_penalty", False), ("store", 0),
    ],
)  # fmt: skip
def test_types_are_taken_as_they_are(running, field, value):
    refused = post(running, MODEL | {"messages": ask(), field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith(field)


@pytest.mark.parametrize("value", ["x" * 50_000, "\x1b[31m\n" * 5000, "é" * 9000])
def test_echoed_values_are_short(running, value):
    bodies = [
        {"model": value},
        {value: 1},
        {"messages": [{"role": value, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": value}]}]},
        {"messages": ask(url=value)},
        {"messages": ask(url=f"upload:{value}")},
        {"tool_choice": value},
        {"tools": [{"type": "function", "function": {"name": value}}]},
    ]
    for body in bodies:
        answer = post(running, MODEL | {"messages": ask()} | body)
        error = answer.json()["error"]
        assert 400 <= answer.status_code < 500
        assert len(error["message"]) < 600
        assert len(error["param"] or "") <= 200
        assert "\x1b" not in error["message"]
