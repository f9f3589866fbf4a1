"""What clients may make the server read: hostile servers, private addresses, bombs; see `serving/policy.py`."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
import httpx
from tiny_server import LOOPBACK, Running, ask, expected, png, small_chat

from llavakit.serving.app import Settings
from llavakit.serving.policy import MediaFetcher, MediaPolicy, Refused, decode_data_url


@pytest.fixture(scope="module")
def chat():
    return small_chat()


@pytest.fixture(scope="module")
def server(chat):
    media = MediaPolicy(networks=(LOOPBACK,), seconds=2.0, idle_seconds=0.7, file_bytes=200_000, images=3)
    running = Running(chat, Settings(names=("tiny",), media=media, default_tokens=12))
    yield running
    running.stop()


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
