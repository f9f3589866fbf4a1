"""Who may ask the server, and from where: decided from headers, for the API and the page alike."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
import httpx
from tiny_server import Running, ask, data_url, png, small_chat

from llavakit.serving.access import COOKIE, AccessPolicy, Sessions, hosts_of
from llavakit.serving.app import Settings
from llavakit.serving.uploads import UploadPolicy, Uploads

KEYS = ("right", "other")


@pytest.fixture(scope="module")
def closed():
    """A server that asks for keys and knows one page of another origin."""
    settings = Settings(names=("tiny",), api_keys=KEYS, hosts=("models.example",), origins=("https://app.example",))
    running = Running(small_chat(), settings)
    running.app.state.sessions.page = True
    yield running
    running.stop()


@pytest.fixture(scope="module")
def keyless():
    running = Running(small_chat(), Settings(names=("tiny",), default_tokens=2))
    yield running
    running.stop()


def with_key(key="right", **headers):
    return {"Authorization": f"Bearer {key}", **headers}


# ------------------------------------------------------------------ keys


PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/files"),
    ("DELETE", "/v1/files/x"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/anything"),
    ("POST", "/anything"),
    ("GET", "/config"),
    ("POST", "/gradio_api/queue/join"),
]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer right right"},
        {"Authorization": "Basic right"},
        {"Authorization": "right"},
        {"Authorization": "Bearer r\u00efght".encode("latin-1")},
        {"Cookie": f"{COOKIE}=00.right.99999999999.00"},
    ],
    ids=str,
)
def test_nothing_but_health_is_answered_without_a_key(closed, headers):
    with httpx.Client(base_url=closed.url, headers=headers) as client:
        for method, path in PATHS:
            answer = client.request(method, path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_health_and_every_key(closed):
    assert httpx.get(f"{closed.url}/health").status_code == 200
    for key in KEYS:
        assert httpx.get(f"{closed.url}/v1/models", headers=with_key(key)).status_code == 200


def test_a_body_without_a_key_is_not_taken(closed):
    """The answer comes although the body never does."""
    for length in (b"Content-Length: 60000000", b"Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", closed.port), timeout=10) as line:
            line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n\r\n")
            answer = b"".join(iter(lambda: line.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer.lower()


def test_a_browser_logs_in_with_a_key(closed):
    with httpx.Client(base_url=closed.url) as browser:
        asked = browser.get("/")
        assert asked.status_code == 401
        assert 'name="password"' in asked.text
        assert browser.post("/login", data={"password": "wrong"}).status_code == 401
        assert browser.post("/login", content=b"password=" + b"x" * 5000).status_code == 413
        assert browser.get("/v1/models").status_code == 401
        entered = browser.post("/login", data={"username": "any", "password": "other"})
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert browser.get("/v1/models").status_code == 200


def test_sessions_are_signed_and_end(monkeypatch):
    sessions = Sessions()
    cookie = sessions.begin("somebody")
    session, owner = sessions.read(f"other=1; {COOKIE}={cookie}")
    assert owner == "somebody"
    assert sessions.read(f"{COOKIE}={sessions.begin('somebody')}") != (session, owner)
    identity, _, expires, signature = cookie.split(".")
    forged = ["", ".", "...", identity, f"{cookie[:-1]}x", f"{identity}.admin.{expires}.{signature}", '"\xff.\xff"']
    forged += [f"{identity}.somebody.{int(expires) + 9}.{signature}", Sessions().begin("somebody")]
    for one in forged:
        assert sessions.read(f"{COOKIE}={one}") is None, one
    assert sessions.read(";;;=;") is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert sessions.read(f"{COOKIE}={cookie}") is None


# ------------------------------------------------------------------ hosts and origins


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("page.localhost", True),
        ("127.0.0.1:9", True),
        ("[::1]:9", True),
        ("192.168.3.4", True),
        ("models.example:8000", True),
        ("models.example.", True),
        ("a.wild.example", True),
        ("wild.example", False),
        ("attacker.example", False),
        ("localhost.attacker.example", False),
        ("127.0.0.1.attacker.example", False),
        ("xmodels.example", False),
        ("[::1", False),
        ("", False),
        ("a b", False),
    ],
)
def test_hosts(host, served):
    assert AccessPolicy(hosts=("models.example", "*.wild.example")).serves(host) is served
    assert AccessPolicy(hosts=("*",)).serves("anything.example")


def test_names_of_a_server():
    assert hosts_of("box", "127.0.0.1", ("a", "box")) == ("box", "127.0.0.1", "a")


def test_a_page_whose_name_points_here_reaches_nothing(keyless):
    """Name rebinding: the browser believes that it talks to the attacker's own host."""
    headers = {"Host": "attacker.example:8000", "Origin": "http://attacker.example:8000"}
    with httpx.Client(base_url=keyless.url, headers=headers) as client:
        for path in ("/v1/chat/completions", "/v1/files", "/health", "/", "/gradio_api/queue/join"):
            for method in ("GET", "POST"):
                answer = client.request(method, path)
                assert answer.status_code == 421
                assert "--allowed-host 'attacker.example'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "host", "welcome"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://localhost", "localhost:80", True),
        ("https://models.example", "models.example", True),
        ("https://app.example", "localhost:8000", True),
        ("http://app.example", "localhost:8000", False),
        ("https://app.example.attacker.example", "localhost:8000", False),
        ("http://localhost:9000", "localhost:8000", False),
        ("null", "localhost:8000", False),
        ("", "", False),
        ("file://", "localhost:8000", False),
    ],
)
def test_origins(origin, host, welcome):
    assert AccessPolicy(origins=("https://app.example",)).welcomes(origin, host) is welcome


def test_pages_of_other_origins_are_refused_by_api_and_page(keyless):
    body = {"model": "tiny", "messages": ask()}
    with httpx.Client(base_url=keyless.url) as client:
        for path in ("/v1/chat/completions", "/v1/files", "/gradio_api/queue/join", "/login"):
            for origin in ("https://attacker.example", "null", "http://localhost:1"):
                answer = client.post(path, json=body, headers={"Origin": origin})
                assert answer.status_code == 403
                assert not [name for name in answer.headers if name.startswith("access-control-")]
        own = client.post("/v1/chat/completions", json=body, headers={"Origin": keyless.url}, timeout=30)
        assert own.status_code == 200


def test_cors_is_for_listed_origins_and_never_with_credentials(closed):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    url = f"{closed.url}/v1/models"
    allowed = httpx.options(url, headers={"Origin": "https://app.example", **asked})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    got = httpx.get(url, headers=with_key(Origin="https://app.example"))
    assert got.headers["access-control-allow-origin"] == "https://app.example"
    refused = httpx.options(url, headers={"Origin": "https://attacker.example", **asked})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    for answer in (allowed, got, refused):
        assert "access-control-allow-credentials" not in answer.headers


def test_what_the_application_thinks_of_cors_does_not_come_out():
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from llavakit.serving.access import Access

    reflecting = {"Access-Control-Allow-Origin": "http://x", "Access-Control-Allow-Credentials": "true", "A": "b"}
    inner = Starlette(routes=[Route("/", lambda request: PlainTextResponse("hi", headers=reflecting))])
    client = TestClient(Access(inner, AccessPolicy(hosts=("testserver",)), Sessions(), lambda status: None))
    answer = client.get("/")
    assert answer.headers["a"] == "b"
    assert not [name for name in answer.headers if name.startswith("access-control-")]


# ------------------------------------------------------------------ uploads


def test_an_upload_belongs_to_its_key(closed):
    files = {"file": ("a.png", png())}
    identity = httpx.post(f"{closed.url}/v1/files", files=files, headers=with_key()).json()["id"]
    body = {"model": "tiny", "messages": ask(url=f"upload:{identity}"), "max_tokens": 2}
    for key, status in (("other", 404), ("right", 200)):
        answer = httpx.post(f"{closed.url}/v1/chat/completions", json=body, headers=with_key(key), timeout=30)
        assert answer.status_code == status
    url = f"{closed.url}/v1/files/{identity}"
    assert httpx.delete(url, headers=with_key("other")).status_code == 404
    assert httpx.delete(url, headers=with_key("right")).status_code == 200


def test_uploads_have_quotas_and_go_when_they_are_old():
    now, gone = [0.0], []
    uploads = Uploads(UploadPolicy(total_bytes=100, owner_bytes=50, seconds=10), gone.append, lambda: now[0])
    uploads.add("one", "a", b"a", 20)
    uploads.add("one", "b", b"b", 20)
    assert uploads.get("one", "a") == b"a"
    uploads.add("one", "c", b"c", 20)
    assert gone == [b"b"], "what its owner has not used for longest makes room"
    with pytest.raises(Exception, match="at most 50 bytes"):
        uploads.add("one", "d", b"d", 51)
    uploads.add("two", "a", b"x", 50)
    with pytest.raises(Exception, match="try again later"):
        uploads.add("three", "a", b"y", 20)
    assert uploads.get("one", "a") == b"a", "nobody makes another's uploads go"
    with pytest.raises(Exception, match="unknown or has been forgotten"):
        uploads.get("three", "a")
    now[0] = 9.0
    uploads.get("one", "c")
    now[0] = 11.0
    uploads.expire()
    assert gone == [b"b", b"x", b"a"]
    assert uploads.bytes == 20
    assert not uploads.remove("two", "c")
    assert uploads.remove("one", "c")


def test_quotas_are_told_to_clients():
    settings = Settings(names=("tiny",), api_keys=KEYS, uploads=UploadPolicy(total_bytes=100, owner_bytes=60))
    running = Running(small_chat(), settings)
    try:

        def send(key, size):
            files = {"file": ("a", bytes(size))}
            return httpx.post(f"{running.url}/v1/files", files=files, headers=with_key(key)).status_code

        assert [send("right", 61), send("right", 60), send("other", 60)] == [413, 200, 507]
    finally:
        running.stop()


# ------------------------------------------------------------------ connections


def test_connections_are_counted_and_silent_ones_end(monkeypatch):
    monkeypatch.setattr("llavakit.serving.process.HEADER_SECONDS", 0.5)
    running = Running(small_chat(), Settings(names=("tiny",), connections=4))
    try:
        silent = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(5)]
        silent[0].sendall(b"GET /health HTTP/1.1\r\nHost:")
        time.sleep(0.1)
        assert httpx.get(f"{running.url}/health").status_code == 503
        for line in silent:
            while line.recv(4096):
                pass
            line.close()
        assert httpx.get(f"{running.url}/health").status_code == 200
    finally:
        running.stop()


def test_a_slow_answer_keeps_its_connection(monkeypatch):
    """Patience is for headers; a request may take as long as it does."""
    monkeypatch.setattr("llavakit.serving.process.HEADER_SECONDS", 0.2)
    chat = small_chat()
    genuine = chat.engine.step
    monkeypatch.setattr(chat.engine, "step", lambda: (time.sleep(0.1), genuine())[1])
    running = Running(chat, Settings(names=("tiny",)))
    try:
        body = {"model": "tiny", "messages": ask(), "max_tokens": 8, "stop": "never said"}
        began = time.time()
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 200
        assert time.time() - began > 0.4
    finally:
        running.stop()


STOPPED_BY_SIGNAL = """
import signal, threading, time
from llavakit.serving.process import http_server, run_until_stopped

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

def stop():
    while not server.started:
        time.sleep(0.02)
    signal.raise_signal(signal.SIGTERM)

server = http_server(app, 10, port=0, log_level="error")
threading.Thread(target=stop).start()
run_until_stopped(server)
"""


def test_sigterm_ends_with_status_0():
    """In a process of its own: sse_starlette keeps for good that a signal stopped one of the process's servers."""
    ended = subprocess.run([sys.executable, "-c", STOPPED_BY_SIGNAL], timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def _until(condition, seconds=10.0):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.02)
    assert condition()


def test_refusals_are_counted_and_hang_ups_apart(closed):
    httpx.get(f"{closed.url}/v1/models")
    body = {"model": "tiny", "messages": ask(url=data_url(png())), "max_tokens": 400, "stop": "never said"}

    def count(outcome):
        text = httpx.get(f"{closed.url}/metrics", headers=with_key()).text
        lines = [line for line in text.splitlines() if line.startswith(f'llavakit_requests_total{{outcome="{outcome}"')]
        return float(lines[0].split()[1]) if lines else 0.0

    assert count("401") >= 1
    answered = count("answered")
    for stream in (True, False):
        before = count("hung_up")
        content = json.dumps(body | {"stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", closed.port), timeout=10) as line:
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer right\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
            )
            service = closed.app.state.service
            _until(lambda service=service: service.responder.engine.active)
        _until(lambda before=before: count("hung_up") == before + 1)
    assert count("answered") == answered
    assert closed.app.state.service.active == 0
