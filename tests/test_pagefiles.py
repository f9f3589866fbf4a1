"""Files that a browser names: only uploads of its own session, whatever the page's framework would do with the rest."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from llavakit.media.policy import Refused
from llavakit.serving.access import Access, AccessPolicy, Sessions
from llavakit.serving.pagefiles import PageFiles, PageGuard
from llavakit.serving.uploads import UploadPolicy


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    return PageFiles(folder, 1000)


def upload(files, session, name="a.png", content=b"a picture"):
    path = files.folder / name
    path.write_bytes(content)
    files.add(session, str(path))
    return str(path)


def test_a_session_opens_its_own_uploads_and_what_the_page_offers(files):
    path = upload(files, "one")
    offered = files.folder / "example.png"
    offered.write_bytes(b"an example")
    files.share(offered)
    assert files.open("one", path) == b"a picture"
    assert files.open("one", f"{files.folder}/x/../a.png") == b"a picture", "another spelling of the same file"
    assert files.open("two", str(offered)) == b"an example"
    assert files.open(None, str(offered)) == b"an example"


@pytest.mark.parametrize("session", ["two", None, ""])
def test_other_sessions_do_not(files, session):
    path = upload(files, "one")
    with pytest.raises(Refused) as refused:
        files.open(session, path)
    assert refused.value.status == 403


@pytest.mark.parametrize(
    "spelling",
    [
        "{secret}",
        "{uploads}/../secret.txt",
        "{uploads}/a.png/../../secret.txt",
        "{uploads}/unknown.png",
        "{uploads}",
        "file://{secret}",
        "http://127.0.0.1:9/a.png",
        "secret.txt",
        "~/secret.txt",
        "/dev/zero",
        "/proc/self/environ",
        "",
        "\0",
        "a" * 10_000,
        None,
        5,
        ["{secret}"],
        {"path": "{secret}"},
    ],
)
def test_nothing_else_is_opened(files, tmp_path, spelling):
    upload(files, "one")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    if isinstance(spelling, str):
        spelling = spelling.format(secret=secret, uploads=files.folder)
    with pytest.raises(Refused) as refused:
        files.open("one", spelling)
    assert refused.value.status == 403


def test_an_upload_that_was_exchanged_for_something_else_stays_closed(files, tmp_path):
    path = upload(files, "one")
    (tmp_path / "secret.txt").write_text("secret")
    os.unlink(path)
    with pytest.raises(Refused):
        files.open("one", path)
    os.symlink(tmp_path / "secret.txt", path)
    with pytest.raises(Refused):
        files.open("one", path)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(Refused, match="at most 1000 bytes"):
        files.open("one", path)
    os.unlink(path)
    Path(path).write_bytes(bytes(1001))
    with pytest.raises(Refused, match="at most 1000 bytes"):
        files.open("one", path)


def test_what_lies_outside_the_folder_never_becomes_an_upload(files, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (files.folder / "link").symlink_to(tmp_path / "secret.txt")
    for path in (tmp_path / "secret.txt", files.folder / "link", "/etc/passwd"):
        with pytest.raises(Refused):
            files.add("one", str(path))


def test_old_uploads_go_and_so_does_what_nobody_holds(files):
    first, second = upload(files, "one"), upload(files, "two")
    assert first == second, "the framework names files by their content"
    files.uploads.remove("one", first)
    assert files.open("two", second) == b"a picture"
    files.uploads.remove("two", second)
    assert not Path(second).exists()
    offered = files.folder / "example.png"
    offered.write_bytes(b"an example")
    files.share(offered)
    (files.folder / "left behind").write_bytes(b"x")
    kept = upload(files, "one", "kept.png")
    files.tidy(seconds=-60)
    assert {path.name for path in files.folder.iterdir()} == {"example.png", "kept.png"}
    assert files.open("one", kept) == b"a picture"


def test_an_upload_without_room_is_deleted_at_once(tmp_path):
    files = PageFiles(tmp_path, 1000, UploadPolicy(total_bytes=30, owner_bytes=20))
    upload(files, "one", "a.png", bytes(18))
    second = upload(files, "one", "b.png", bytes(19))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png"], "the oldest makes room"
    with pytest.raises(Refused) as refused:
        upload(files, "two", "c.png", bytes(12))
    assert refused.value.status == 507
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png"]
    assert files.open("one", second) == bytes(19)


# ------------------------------------------------------------------ in front of a framework that trusts everybody


def trusting(files):
    """A framework that opens every file it is told of, and lets everything be called."""

    async def event(request):
        body = await request.json()
        paths = filter(os.path.isfile, re.findall(r'"(?:[^"]*file=)?(/[^"]+)"', json.dumps(body)))
        return JSONResponse({"data": [Path(path).read_text() for path in paths]})

    async def keep(request):
        path = files.folder / "kept.png"
        path.write_bytes(await request.body())
        return JSONResponse([str(path)])

    async def anything(request):
        return PlainTextResponse("reached")

    routes = [
        Route("/gradio_api/queue/join", event, methods=["POST"]),
        Route("/gradio_api/upload", keep, methods=["POST"]),
        Route("/{path:path}", anything, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
    ]
    sessions = Sessions()
    page = PageGuard(Starlette(routes=routes), files, sessions, re.compile("^/v1/"))
    return TestClient(Access(page, AccessPolicy(hosts=("testserver",)), sessions, lambda status: None))


def nestings(path):
    file = {"path": path}
    return [
        file,
        {"files": [path]},
        {"files": [file]},
        {"files": path},
        {"file": path},
        {"file": file},
        {"file": [path]},
        {"url": f"/gradio_api/file={path}"},
        {"url": f"http://elsewhere/gradio_api/file={path}"},
        {"url": path},
        {"url": ["x"]},
        {"path": [path]},
        {"path": file},
        {"x": {"y": [[{"z": file}]]}},
        {"component": "image", "value": path},
        {"value": path, "constructor_args": {"value": path}},
    ]


def test_no_event_reaches_the_framework_with_a_file_of_somebody_else(files, tmp_path):
    client = trusting(files)
    client.get("/config")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for place in ("data", "event_data", "anything"):
        for value in nestings(str(secret)):
            answer = client.post("/gradio_api/queue/join", json={place: value, "fn_index": 1})
            assert answer.status_code == 403, value
            assert "secret.txt" not in answer.text
    (own,) = client.post("/gradio_api/upload", content=b"my own").json()
    for value in nestings(own)[:8]:
        answer = client.post("/gradio_api/queue/join", json={"data": value})
        assert answer.status_code == 200, value
        assert answer.json() == {"data": ["my own"]}
    assert client.get(f"/gradio_api/file={own}").content == b"my own"
    deep = json.loads("[" * 200 + "]" * 200)
    assert client.post("/gradio_api/queue/join", json={"data": deep}).status_code == 400
    assert client.post("/gradio_api/queue/join", content=b"[" * 10**6).status_code == 400
    assert client.post("/gradio_api/queue/join", content=b"0" * (2**20 + 1)).status_code == 413


def test_events_need_a_session_and_the_rest_is_closed(files):
    client = trusting(files)
    assert client.post("/gradio_api/queue/join", json={}).status_code == 401
    assert client.post("/gradio_api/upload", content=b"x").status_code == 401
    for path in ("/gradio_api/call/answer", "/gradio_api/component_server", "/gradio_api/proxy=http://x", "/new"):
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert client.request(method, path).status_code == 404, (method, path)
    for method in ("POST", "PUT", "DELETE"):
        assert client.request(method, "/config").status_code == 404
    assert client.get("/config").text == "reached"
    assert client.post("/v1/other").text == "reached", "what does not belong to the page is not its guard's business"
