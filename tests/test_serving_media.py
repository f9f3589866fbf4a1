"""What clients may make the server read: hostile servers, private addresses, bombs; see `media/policy.py`."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import resource
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
import httpx
from tiny_server import LOOPBACK, Running, ask, data_url, expected, png, small_chat, strict_server

from llavakit.media.fetch import MediaFetcher, _parsed
from llavakit.media.policy import MediaPolicy, Refused, decode_data_url
from llavakit.serving.app import Settings


@pytest.fixture(scope="module")
def chat():
    return small_chat()


@pytest.fixture(scope="module")
def server(chat):
    running = strict_server(chat)
    yield running
    running.stop()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def pixel_bomb() -> bytes:
    """A small PNG of 400 million pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(20_001 * 200), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG of one pixel with a comment of 100 million letters."""
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    comment = b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9)
    pixel = zlib.compress(b"\0\0")
    parts = chunk(b"IHDR", header) + chunk(b"zTXt", comment) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


BOMBS = {"/bomb": pixel_bomb(), "/text-bomb": text_bomb(), "/gzip": gzip.compress(bytes(50_000_000), 9)}


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
                while True:
                    self.wfile.write(b"x" * 1_000_000)
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
        elif self.path == "/declared":
            self.send_response(200)
            self.send_header("Content-Length", str(10**12))
            self.end_headers()
        elif self.path in BOMBS:
            self.send_response(200)
            if self.path == "/gzip":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(BOMBS[self.path])
        elif self.path == "/page":
            self.send_response(404)
            self.end_headers()
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hostile():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
        ("/declared", 413, "larger than"),
        ("/bomb", 400, "pixels"),
        ("/text-bomb", 400, "damaged"),
        ("/gzip", 400, "not an image"),
        ("/page", 400, "status 404"),
        ("/cut", 400, "could not be fetched"),
        ("/to/file:///etc/passwd", 400, "only http and https"),
        ("/to/http://[", 400, "malformed URL"),
        ("/to/http://x\\y", 400, "malformed"),
        ("/to//to//to//to//to//picture", 400, "redirects"),
    ],
)
def test_hostile_servers_end_in_a_clear_error(server, hostile, path, status, words):
    before = peak_memory()
    found, message = refusal(server, hostile + path)
    assert (found, words in message) == (status, True), message
    assert peak_memory() - before < 30 * 2**20


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x",
        "http://localhost:9/x",
        "http://2130706433/x",
        "http://0x7f000001/x",
        "http://0177.0.0.1/x",
        "http://127.1/x",
        "http://127.0.0.1./x",
        "http://localhost./x",
        "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/x",
        "http://%31%32%37.0.0.1/x",
        "http://[::1]/x",
        "http://[::]/x",
        "http://[::127.0.0.1]/x",
        "http://[::ffff:7f00:1]/x",
        "http://[::ffff:0:127.0.0.1]/x",
        "http://[::ffff:127.0.0.1]/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://169.254.169.254/latest/meta-data",
        "http://10.1.2.3/x",
        "http://192.168.0.1/x",
        "http://172.16.0.1/x",
        "http://100.64.0.1/x",
        "http://0.0.0.0/x",
        "http://192.0.0.8/x",
        "http://198.18.0.1/x",
        "http://224.0.0.1/x",
        "http://240.0.0.1/x",
        "http://255.255.255.255/x",
        "http://[fe80::1]/x",
        "http://[fc00::1]/x",
        "http://[64:ff9b::7f00:1]/x",
        "http://[2002:7f00:1::]/x",
        "http://[2001:0:7f00:1::]/x",
        "http://[fec0::1]/x",
        "http://[ff02::1]/x",
        "http://[fe80::1%25lo]/x",
        "http://user:pass@example.com/x",
        "http://example.com@127.0.0.1/x",
        "http://example.com\\@127.0.0.1/x",
        "gopher://127.0.0.1/x",
    ],
)
def test_addresses_that_are_not_public_are_refused(strict, url):
    found, message = refusal(strict, url)
    assert found == 400
    known = ("not a public address", "user names", "cannot be read", "is unknown", "malformed", "could not be fetched")
    assert any(words in message for words in known), message
    assert "could not be fetched" not in message, message


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


def fake_names(monkeypatch, **names):
    """Name servers that answer as told, a list of addresses per question; returns what was asked."""
    asked, genuine = [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        host = host.decode() if isinstance(host, bytes) else host
        if host.partition(".")[0] not in names:
            return genuine(host, port, *args, **kwargs)
        asked.append(host)
        answers = names[host.partition(".")[0]]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in genuine(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_that_changes_its_address_reaches_nothing_private(hostile, monkeypatch):
    port = int(hostile.rsplit(":", 1)[1])
    fetcher = MediaFetcher(MediaPolicy(networks=(ip_network("127.0.0.1/32"),)))
    asked = fake_names(monkeypatch, rebind=[["127.0.0.1"], ["127.0.0.2"]], hop=[["127.0.0.1"], ["127.0.0.2"]])
    assert asyncio.run(fetcher.read(f"http://rebind.test:{port}/picture")) == png("green")
    assert asked == ["rebind.test"], "the address that was checked is not the one that was connected to"
    with pytest.raises(Refused, match="not a public address"):
        asyncio.run(fetcher.read(f"http://rebind.test:{port}/picture"))
    with pytest.raises(Refused, match="not a public address"):
        asyncio.run(fetcher.read(f"http://hop.test:{port}/to/http://hop.test:{port}/picture"))


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    fake_names(monkeypatch, mixed=[["93.184.215.14", "10.0.0.1"]])
    with pytest.raises(Refused, match="not a public address"):
        asyncio.run(MediaFetcher(MediaPolicy()).read("http://mixed.test/picture"))


def test_another_address_is_tried_when_one_does_not_answer(hostile, monkeypatch):
    port = int(hostile.rsplit(":", 1)[1])
    fake_names(monkeypatch, two=[["127.0.0.9", "127.0.0.1"]])
    fetcher = MediaFetcher(MediaPolicy(networks=(LOOPBACK,)))
    assert asyncio.run(fetcher.read(f"http://two.test:{port}/picture")) == png("green")


def test_media_of_a_request_are_limited_together(hostile):
    media = MediaPolicy(networks=(LOOPBACK,), request_bytes=len(png()) + 1)
    running = Running(small_chat(), Settings(names=("tiny",), media=media))
    try:
        assert refusal(running, data_url(png()))[0] == 200
        twice = [*ask(url=data_url(png())), *ask(url=data_url(png()))]
        response = httpx.post(f"{running.url}/v1/chat/completions", json={"model": "tiny", "messages": twice})
        assert response.status_code == 413
    finally:
        running.stop()


def test_files_of_an_operators_folder_and_no_others(tmp_path):
    allowed = tmp_path / "media"
    allowed.mkdir()
    (allowed / "a picture.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png("blue"))
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    fetcher = MediaFetcher(MediaPolicy(folders=(allowed,)))
    assert asyncio.run(fetcher.read(f"file://{allowed}/a%20picture.png")) == png()
    for path in ("../secret.png", "link.png", "%2e%2e/secret.png", "", "missing.png"):
        with pytest.raises(Refused, match="not in a folder"):
            asyncio.run(fetcher.read(f"file://{allowed}/{path}"))


def test_a_client_that_sends_slowly_is_answered_408():
    running = Running(small_chat(), Settings(names=("tiny",), body_seconds=0.5))
    try:
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            began = time.time()
            answer = b"".join(iter(lambda: line.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"took longer than 0.5 s" in answer
        assert time.time() - began < 5
        assert httpx.get(f"{running.url}/health").status_code == 200
    finally:
        running.stop()


@given(st.sampled_from(["http://", "https://", "http://x/", "http://x:", "data:", "upload:"]), st.text(max_size=40))
def test_whatever_is_no_url_is_refused(begin, rest):
    with contextlib.suppress(Refused):
        decode_data_url(begin + rest, 10)
    with contextlib.suppress(Refused):
        assert _parsed(begin + rest)[1].isascii()


def test_policy_on_addresses():
    policy = MediaPolicy()
    assert policy.allows(ip_address("93.184.215.14"))
    assert policy.allows(ip_address("2606:2800:21f:cb07:6820:80da:af6b:8b2c"))
    assert not policy.allows(ip_address("::ffff:192.168.1.1"))


def test_data_urls():
    assert decode_data_url("data:,hello%20there", 100) == b"hello there"
    assert decode_data_url("data:image/png;base64,aGk=", 100) == b"hi"
    assert decode_data_url(b"data:image/png;base64,aG\r\nkg\n aGk=", 100) == b"hi hi"
    content = bytes(range(256)) * 20_000  # longer than what is decoded at once
    assert decode_data_url(data_url(content), len(content)) == content
    for most, url in [(1, "data:,%41%42"), (4, "data:;base64,aGVsbG8="), (len(content) - 1, data_url(content))]:
        with pytest.raises(Refused, match="larger than"):
            decode_data_url(url, most)
    for url in ("data:;base64,aGk=aGk=", "data:;base64,aGk", "data:;base64,a_-=", "data:;base64", "data:text"):
        with pytest.raises(Refused):
            decode_data_url(url, 100)
