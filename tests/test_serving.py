"""The server: OpenAI's client unmodified, errors in OpenAI's form, the media policy, clients that go away."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from llavakit.api import Chat
from llavakit.model.processing import LlavakitProcessor
from llavakit.phantom.tokenizer import tiny_tokenizer

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from llavakit.serving.app import Settings, create_app  # noqa: E402
from llavakit.serving.policy import MediaPolicy, decode_data_url  # noqa: E402
from llavakit.serving.toolcalls import read  # noqa: E402

LOOPBACK = ip_network("127.0.0.0/8")


def small_chat() -> Chat:
    tokenizer = tiny_tokenizer(["What is in this picture? A red square and a blue disc."], vocab_size=600)
    torch.manual_seed(0)
    text = {**tiny.DECODERS["llama"], "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    net = tiny.LlavakitForConditionalGeneration(
        tiny.config(text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return Chat(net, LlavakitProcessor.from_config(net.config, tokenizer), name="tiny", max_batch=8)


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, chat: Chat, settings: Settings) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.app = create_app(chat, settings)
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    def client(self, key: str = "none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def chat():
    return small_chat()


@pytest.fixture(scope="module")
def server(chat):
    media = MediaPolicy(networks=(LOOPBACK,), seconds=2.0, idle_seconds=0.7, file_bytes=200_000, images=3)
    running = Running(chat, Settings(names=("tiny",), media=media, default_tokens=12))
    yield running
    running.stop()


def png(colour="red", size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def ask(text="What is in this picture?", url=None):
    parts = [{"type": "text", "text": text}]
    if url is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


def expected(chat, text="What is in this picture?", image=None, **sampling):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image})
    return chat.chat([{"role": "user", "content": parts}], **sampling)


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
        ({"messages": ask(url=data_url(b"not a picture"))}, "messages", "not an image"),
        ({"messages": ask(url=data_url(png()))[0:1] * 4}, "messages.3.content.0.image_url.url", "at most 3 images"),
        ({"n": 99}, "n", "at most n = 8"),
        ({"top_logprobs": 3}, None, "needs logprobs"),
        ({"model": "other"}, "model", "not served here"),
    ],
    ids=lambda value: None,
)
def test_errors_name_the_field(server, body, param, words):
    import httpx

    request = {"model": "tiny", "messages": ask(), **body}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=30)
    error = response.json()["error"]
    assert 400 <= response.status_code < 500
    assert words in error["message"]
    if param is not None:
        assert (error["param"] or "").startswith(param)


def test_broken_json_and_oversize_bodies():
    import httpx

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

        assert httpx.post(url, content=endless()).status_code == 413
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
    import httpx

    running = Running(small_chat(), Settings(names=("tiny",), max_queue=0))
    try:
        running.app.state.service.active = running.app.state.service.chat.engine.max_batch
        response = httpx.post(f"{running.url}/v1/chat/completions", json={"model": "tiny", "messages": ask()})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
    finally:
        running.stop()


def reply_tokens(server) -> float:
    import httpx

    text = httpx.get(f"{server.url}/metrics").text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("llavakit_reply_tokens_total")))


def test_a_client_that_goes_away_frees_its_row(server, chat):
    import httpx

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


def bomb() -> bytes:
    """A small file that decodes to 81 million pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9_000, 9_000), np.uint8)).convert("1").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


BOMB = bomb()


class Hostile(BaseHTTPRequestHandler):
    """A local server that misbehaves in the way its path says."""

    def do_GET(self):
        if self.path == "/picture":
            content = png("green")
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(10_000):
                    self.wfile.write(b"x" * 10_000)
            except OSError:
                pass
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(60):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.3)
            except OSError:
                pass
        elif self.path == "/silent":
            time.sleep(3)
        elif self.path == "/bomb":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BOMB)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hostile():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def refusal(server, url):
    import httpx

    request = {"model": "tiny", "messages": ask(url=url)}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=30)
    return response.status_code, response.json().get("error", {}).get("message", "")


def test_pictures_are_fetched_by_url_and_redirects_followed(server, hostile, chat):
    wanted = expected(chat, image=png("green"), max_new_tokens=12)
    for url in (f"{hostile}/picture", f"{hostile}/to/{hostile}/picture"):
        answer = server.client().chat.completions.create(model="tiny", messages=ask(url=url))
        assert answer.choices[0].message.content == wanted


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/endless", 413, "larger than"),
        ("/slow", 408, "longer than"),
        ("/silent", 408, "sent nothing"),
        ("/bomb", 400, "pixels"),
        ("/to/file:///etc/passwd", 400, "only http and https"),
        ("/to//to//to//to//to//picture", 400, "redirects"),
    ],
)
def test_hostile_servers_end_in_a_clear_error(server, hostile, path, status, words):
    found, message = refusal(server, hostile + path)
    assert (found, words in message) == (status, True), message


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x",
        "http://localhost:9/x",
        "http://2130706433/x",
        "http://0x7f000001/x",
        "http://0177.0.0.1/x",
        "http://[::1]/x",
        "http://[::ffff:127.0.0.1]/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://169.254.169.254/latest/meta-data",
        "http://10.1.2.3/x",
        "http://192.168.0.1/x",
        "http://172.16.0.1/x",
        "http://100.64.0.1/x",
        "http://0.0.0.0/x",
        "http://224.0.0.1/x",
        "http://[fe80::1]/x",
        "http://[fc00::1]/x",
        "http://[64:ff9b::7f00:1]/x",
        "http://[2002:7f00:1::]/x",
        "http://user:pass@example.com/x",
        "gopher://127.0.0.1/x",
    ],
)
def test_addresses_that_are_not_public_are_refused(strict, url):
    found, message = refusal(strict, url)
    assert found == 400
    assert any(words in message for words in ("not a public address", "user names", "cannot be read", "is unknown"))


@pytest.fixture(scope="module")
def strict():
    running = Running(small_chat(), Settings(names=("tiny",)))
    yield running
    running.stop()


def test_a_redirect_into_the_private_network_is_refused(hostile):
    import asyncio

    from llavakit.serving.policy import MediaFetcher, Refused

    port = int(hostile.rsplit(":", 1)[1])
    policy = MediaPolicy(networks=(ip_network("127.0.0.1/32"),))
    fetcher = MediaFetcher(policy)
    with pytest.raises(Refused, match="not a public address"):
        asyncio.run(fetcher.read(f"http://127.0.0.1:{port}/to/http://127.0.0.2:{port}/picture"))


def test_policy_on_addresses():
    policy = MediaPolicy()
    assert policy.allows(ip_address("93.184.215.14"))
    assert policy.allows(ip_address("2606:2800:21f:cb07:6820:80da:af6b:8b2c"))
    assert not policy.allows(ip_address("::ffff:192.168.1.1"))


def test_data_urls():
    assert decode_data_url("data:,hello%20there", 100) == b"hello there"
    assert decode_data_url("data:image/png;base64,aGk=", 100) == b"hi"


def test_tool_calls_are_read_and_never_evaluated():
    text, calls = read('Looking. <tool_call>{"name": "find", "arguments": {"x": 1}}</tool_call>', ["find"])
    assert text == "Looking."
    assert calls[0]["function"] == {"name": "find", "arguments": '{"x": 1}'}
    assert read('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', ["find"])[1] == []
    assert read("<tool_call>{broken</tool_call>", ["find"]) == ("<tool_call>{broken</tool_call>", [])


def test_metrics_and_health(server):
    import httpx

    server.client().chat.completions.create(model="tiny", messages=ask(), max_tokens=2)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'llavakit_requests_total{outcome="answered"}' in text
    assert "llavakit_first_token_seconds_count" in text
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
