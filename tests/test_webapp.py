"""The web app in a headless Chromium: `make test-web`.

CHROMIUM names the browser's executable if it is not /usr/bin/chromium. WEBAPP_MODEL names a checkpoint and
WEBAPP_SCREENSHOT a file to keep the picture of the documentation in.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

pytest.importorskip("gradio", reason="the web app's environment: make test-web")
playwright = pytest.importorskip("playwright.sync_api", reason="the web app's environment: make test-web")
from tiny_server import Running, png, small_chat  # noqa: E402

from llavakit.conversation.turns import ReasoningDelta, TextDelta  # noqa: E402
from llavakit.editing.backends import backends_of  # noqa: E402
from llavakit.errors import UserError  # noqa: E402
from llavakit.generation.responder import Responder  # noqa: E402
from llavakit.media.policy import MediaPolicy  # noqa: E402
from llavakit.media.source import Limits  # noqa: E402
from llavakit.serving.app import Settings  # noqa: E402
from llavakit.serving.webapp import export, greyscale, mount, slice_of  # noqa: E402

pytestmark = pytest.mark.web
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
QUESTION = "What is in this picture?"


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing; install Chromium, or name it: CHROMIUM=/path/to/chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def served():
    squash = {"type": "squash", "size": tiny.SIZE}
    from llavakit.systems.medm_vl import encoders  # noqa: F401  (its encoder is registered with it)

    deep = {"model_type": "m3d_clip_vision", "image_size": [8, 16, 16], "patch_size": [2, 4, 4], "hidden_size": 16}
    deep |= {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    volume = {"views": {"type": "volume_box", "size": [8, 16, 16]}, "encoder": "tower3d", "connector": "projector3d"}
    chat = small_chat(
        positions=2048,
        media={"image": {"views": squash}, "volume": volume},
        extra_encoders={"tower3d": {"config": deep, "layer": -1}},
        extra_connectors={"projector3d": {"type": "pooling", "stride": [2, 2, 2], "encoder": "tower3d"}},
    )
    running = Running(chat, Settings(names=("tiny",)), lambda app: mount(app))
    yield running, chat
    running.stop()


@pytest.fixture(autouse=True)
def uploads():
    """The folder of uploads, which Gradio has one of per process: another page that a test opens takes it over."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    yield
    if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture
def page(browser, served):
    opened = browser.new_page(viewport={"width": 1000, "height": 800})
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    visit(opened, served[0].url)
    yield opened
    opened.close()
    assert errors == []


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(png("red", (60, 40)))
    return path


def visit(page, url):
    page.goto(url)
    page.wait_for_function("document.activeElement.tagName == 'TEXTAREA'")  # the page is alive


def ask(page, text, picture=None):
    if picture is not None:
        with page.expect_file_chooser() as chooser:
            page.get_by_label("Upload a file").first.click()
        chooser.value.set_files(str(picture))
        page.wait_for_selector(".thumbnail-item")
    page.fill("textarea >> nth=0", text)
    page.press("textarea >> nth=0", "Enter")


def answered(page, turns=1):
    """Wait until so many answers are whole."""
    page.wait_for_function(
        "n => document.querySelectorAll('[data-testid=bot]').length == n && !document.querySelector('.stop-button')"
        " && document.querySelector('[aria-label=Retry]') && !document.querySelector('textarea').disabled",
        arg=turns,
        timeout=30_000,
    )


def exported(page):
    with page.expect_download() as download:
        page.get_by_text("Export conversation").click()
    return json.loads(Path(download.value.path()).read_text())["messages"]


def test_a_chat_about_a_picture_is_answered_and_exported(page, served, picture):
    running, chat = served
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": QUESTION}]
    first = chat.chat([{"role": "user", "content": parts}], max_new_tokens=256)
    ask(page, QUESTION, picture)
    answered(page)
    ask(page, "And now?")
    answered(page, 2)
    messages = exported(page)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert messages[1]["content"] == [{"type": "text", "text": first}]
    body = {"model": "tiny", "messages": messages[:1], "max_tokens": 256}
    answer = page.request.post(f"{running.url}/v1/chat/completions", data=body).json()
    assert answer["choices"][0]["message"]["content"] == first, "what is exported is not what was asked"


def test_stop_and_retry(page, served, monkeypatch):
    chat = served[1]
    engine = chat.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
    ask(page, "Tell me a long story")
    said = "document.querySelector('[data-testid=bot] .message-content')?.innerText.trim()"
    page.wait_for_function(said)  # it has begun
    page.locator(".stop-button").click()
    deadline = time.time() + 5
    while engine.busy and time.time() < deadline:
        time.sleep(0.05)
    assert not engine.busy, "the reply goes on after it was stopped"
    monkeypatch.setattr(engine, "step", step)
    page.get_by_label("Retry").click()
    question = {"role": "user", "content": [{"type": "text", "text": "Tell me a long story"}]}
    wanted = {"role": "assistant", "content": [{"type": "text", "text": chat.chat([question], max_new_tokens=256)}]}
    deadline = time.time() + 20
    while (messages := exported(page)) != [question, wanted] and time.time() < deadline:
        page.wait_for_timeout(200)
    assert messages == [question, wanted]


SAID = "Because <SUMMARY> matters:\n\nif x < y then <b>B</b> & *not*\n<script>document.title = 'run'</script>"


class Thinking(Responder):
    """Thinks aloud, and answers with what a page might take for its own."""

    def __init__(self):
        super().__init__(name="thinking")
        self.seen = []

    def run(self, call):
        self.seen.append(call.messages)
        yield ReasoningDelta(text="3 <b>4</b>, so B.", stage="REASONING")
        for letter in SAID:
            yield TextDelta(text=letter)


def test_the_page_shows_what_the_model_wrote(browser):
    responder = Thinking()
    running = Running(responder, Settings(), mount)
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    try:
        visit(page, running.url)
        ask(page, "Why?")
        answered(page, 2)  # the reasoning is a note of its own
        shown = page.locator("[data-testid=bot]").all()
        assert "Reasoning" in shown[0].inner_text()
        assert "3 <b>4</b>, so B." in shown[0].text_content().replace("\u2060", "")
        assert shown[1].inner_text().replace("\u2060", "").strip() == SAID
        assert page.title() != "run"
        page.get_by_label("Copy message").last.click()
        page.wait_for_timeout(300)
        assert page.evaluate("navigator.clipboard.readText()").replace("\u2060", "").endswith(SAID)
        ask(page, "And?")
        answered(page, 4)
        answer = {"role": "assistant", "content": [{"type": "text", "text": SAID}]}
        assert [dict(message) for message in responder.seen[1]][1] == answer  # reasoning is not sent back
        if name := os.environ.get("WEBAPP_REASONING"):
            page.screenshot(path=name)
    finally:
        context.close()
        running.stop()


def test_the_keyboard_is_enough(page):
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator("[data-testid=user]").count() == 0, "Shift+Enter is a new line"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Submit"
    page.keyboard.press("Enter")
    answered(page)
    assert exported(page)[0]["content"][0]["text"] == "one\ntwo"


def test_a_telephone_shows_everything(browser, served, picture):
    page = browser.new_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    visit(page, served[0].url)
    ask(page, QUESTION, picture)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("textarea >> nth=0", ".submit-button", "[data-testid=bot]"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    page.close()


def test_a_broken_picture_is_one_clear_line(page, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(png()[:60])
    ask(page, QUESTION, path)
    page.get_by_text("broken.png: it is cut off").wait_for(timeout=10_000)
    ask(page, "Still there?")
    answered(page, 2)
    assert exported(page)[0]["content"] == [{"type": "text", "text": "Still there?"}]


def test_an_attached_volume_is_shown_slice_by_slice(page, tmp_path):
    path = tmp_path / "scan.npy"
    np.save(path, np.random.default_rng(0).normal(0, 300, (12, 20, 24)).astype(np.float32))
    page.get_by_text("Volume viewer").click()
    page.set_input_files("input[type=file] >> nth=0", str(path))
    number = page.get_by_label("number input for Slice, from feet to head")
    number.wait_for()
    assert number.input_value() == "5"
    page.locator("img[alt='Slice 5']").wait_for()
    number.fill("9")
    number.press("Enter")
    page.locator("img[alt='Slice 9']").wait_for()
    page.fill("textarea >> nth=0", "What is this?")
    page.press("textarea >> nth=0", "Enter")
    answered(page)
    assert [part["type"] for part in exported(page)[0]["content"]] == ["volume_url", "text"]


def test_a_browser_enters_with_a_key_and_asks(browser, picture):
    chat = small_chat(positions=2048)
    running = Running(chat, Settings(names=("tiny",), api_keys=("right",)), lambda app: mount(app))
    page = browser.new_page()
    try:
        page.goto(running.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_text("Open").click()
        page.get_by_text("This API key is not valid").wait_for()
        page.get_by_label("API key").fill("right")
        page.get_by_text("Open").click()
        page.wait_for_function("document.activeElement.tagName == 'TEXTAREA'")
        ask(page, QUESTION, picture)
        answered(page)
    finally:
        page.close()
        running.stop()


def test_the_page_is_under_the_servers_policy(served, tmp_path):
    """Sizes, counts, origins and hosts are those of the API."""
    import httpx

    chat = served[1]
    media = MediaPolicy(fetch=False, file_bytes=300_000, images=1)
    settings = Settings(names=("tiny",), media=media, json_bytes=20_000, origins=("https://app.example",))
    running = Running(chat, settings, lambda app: mount(app))
    try:
        with httpx.Client(base_url=running.url, timeout=20) as client:
            config = client.get("/config").json()
            answer = next(event for event in config["dependencies"] if event["api_name"] == "answer")

            def post(path, **options):
                return client.post(f"/gradio_api/{path}", **options)

            upload = {"files": ("a.png", png())}
            assert post("upload", files={"files": ("a.npy", bytes(300_001))}).status_code == 413
            (path,) = post("upload", files=upload).json()
            body = {"data": [{"text": "x" * 20_000}], "fn_index": answer["id"], "session_hash": "a"}
            assert post("queue/join", json=body).status_code == 413
            body["data"] = [{"text": "x", "files": [as_file(path)] * 2}, [], 0, 1, 4]
            assert post("queue/join", json=body).status_code == 200
            said = client.get("/gradio_api/queue/data", params={"session_hash": "a"}).text
            assert "at most 1 images" in said
            body["data"][0]["files"] = [as_file("http://127.0.0.1:9/a.png")]
            assert post("queue/join", json=body).status_code == 403
            for headers in ({"Origin": "https://attacker.example"}, {"Origin": "null"}):
                refused = post("queue/join", json=body, headers=headers)
                assert refused.status_code == 403
                assert not [name for name in refused.headers if name.startswith("access-control-")]
            assert client.get("/config", headers={"Host": "attacker.example"}).status_code == 421
            allowed = client.get("/config", headers={"Origin": "https://app.example"})
            assert "access-control-allow-credentials" not in allowed.headers
    finally:
        running.stop()


def test_keys_close_the_page():
    chat = small_chat()
    running = Running(chat, Settings(api_keys=("right",)), lambda app: mount(app))
    try:
        import httpx

        with httpx.Client(base_url=running.url) as client:
            assert client.get("/config").status_code == 401
            assert client.post("/login", data={"password": "wrong"}).status_code == 401
            assert client.post("/login", data={"password": "right"}).status_code == 303
            assert client.get("/config").status_code == 200
    finally:
        running.stop()


# ------------------------------------------------------------------ files of the server

MARK = "marker 4711, which no answer may hold"
KEYS = [(), ("right",)]


@pytest.fixture(scope="module", params=KEYS, ids=["no key", "a key"])
def reachable(request, served):
    """A client with a session of the page, and the events of the page's own configuration."""
    import httpx

    chat = served[1]
    keys = request.param
    running = Running(chat, Settings(names=("tiny",), api_keys=keys), lambda app: mount(app, backends_of()))
    with httpx.Client(base_url=running.url, timeout=20) as client:
        enter(client, keys)
        config = client.get("/config").json()
        yield client, config
    running.stop()


def enter(client, keys):
    """Begin a session of the page."""
    if keys:
        assert client.post("/login", data={"password": keys[0]}).status_code == 303
    assert client.get("/config").status_code == 200


def as_file(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png", "mime_type": "image/png"}


def spellings(path):
    """Every way in which a browser could name a file."""
    file = as_file(path)
    return [
        file,
        [file],
        path,
        [path],
        {"path": path},
        {"text": "x", "files": [file]},
        {"text": "x", "files": [path]},
        {"file": path},
        {"url": f"/gradio_api/file={path}", "path": ""},
        [{"role": "user", "content": [{"type": "file", "file": file}], "metadata": {}, "options": []}],
        [{"role": "user", "content": [{"type": "file", "file": file | {"url": f"/gradio_api/file={path}"}}]}],
        [{"role": "user", "content": file}],
        [{"role": "user", "content": [[path]]}],
        [{"role": "user", "content": [{"type": "component", "component": "image", "value": file, "props": {}}]}],
        [{"role": "user", "content": [{"type": "component", "component": "file", "value": [file]}]}],
    ]


def test_no_event_gives_away_a_file_of_the_server(reachable, tmp_path):
    client, config = reachable
    marker = tmp_path / "marker.png"
    marker.write_text(MARK)
    sought = (MARK.encode(), base64.b64encode(MARK.encode()).rstrip(b"=")[:-1])
    refused = 0
    for event in config["dependencies"]:
        empty = [None] * len(event["inputs"])
        bodies = [
            {"data": [*empty[:place], value, *empty[place + 1 :]]}
            for place in range(len(empty))
            for value in spellings(str(marker))
        ]
        bodies += [
            {"data": empty, "event_data": data}
            for value in spellings(str(marker))
            for data in (value, {"value": value, "index": 0})
        ]
        for number, body in enumerate(bodies):
            body |= {"fn_index": event["id"], "session_hash": f"s{event['id']}x{number}"}
            answers = [client.post("/gradio_api/run/predict", json=body)]
            if number % 5 == 0 or event["queue"]:
                answers.append(client.post("/gradio_api/queue/join", json=body))
                if answers[-1].status_code == 200:
                    answers.append(client.get("/gradio_api/queue/data", params={"session_hash": body["session_hash"]}))
            for answer in answers:
                assert not any(words in answer.content for words in sought), (event, body)
            names = re.findall(r"/gradio_api/file=([^\"\\\\]+)", "".join(answer.text for answer in answers))
            for name in names:  # what the framework may have copied is not handed out either
                assert client.get(f"/gradio_api/file={name}").status_code == 403, (event, body)
            refused += answers[0].status_code == 403
    assert refused > 10 * len(config["dependencies"])
    assert client.get(f"/gradio_api/file={marker}").status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/call/answer",
        "/gradio_api/call/v2/answer",
        "/gradio_api/run/answer",
        "/gradio_api/api/answer",
        "/gradio_api/component_server",
        "/gradio_api/process_recording",
        "/gradio_api/vibe-code/",
        "/run/predict",
    ],
)
def test_operations_that_the_page_does_not_use_are_closed(reachable, tmp_path, path):
    marker = tmp_path / "marker.png"
    marker.write_text(MARK)
    body = {"data": [as_file(str(marker))], "fn_index": 0, "session_hash": "x", "component_id": 0, "fn_name": "x"}
    answer = reachable[0].post(path, json=body)
    assert answer.status_code == 404
    assert MARK not in answer.text


@pytest.mark.parametrize("path", ["proxy=http://127.0.0.1:9/", "stream/a/b/c/playlist.m3u8", "deep_link", "runs"])
def test_reading_operations_that_the_page_does_not_use_are_closed(reachable, path):
    assert reachable[0].get(f"/gradio_api/{path}").status_code == 404


def test_an_upload_is_its_sessions_own(reachable, request):
    import httpx

    client, config = reachable
    (path,) = client.post("/gradio_api/upload", files={"files": ("../../a picture.png", png())}).json()
    assert client.get(f"/gradio_api/file={path}").content == png()
    export = next(event for event in config["dependencies"] if event["api_name"] == "save")
    turn = {"role": "user", "content": [{"type": "file", "file": as_file(path)}]}
    body = {"data": [[turn]], "fn_index": export["id"], "session_hash": "a"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    saved = client.get("/gradio_api/queue/data", params={"session_hash": "a"}).text
    assert base64.b64encode(png()).decode() in saved
    with httpx.Client(base_url=client.base_url) as other:
        assert other.post("/gradio_api/queue/join", json=body).status_code == 401
        enter(other, ("right",) if "a key" in request.node.name else ())
        assert other.post("/gradio_api/queue/join", json=body).status_code == 403
        assert other.get(f"/gradio_api/file={path}").status_code == 403
        assert other.post("/gradio_api/upload", files={"files": ("b.html", b"<script>")}).status_code == 200


def test_a_page_that_was_uploaded_is_not_shown_as_one(reachable):
    client = reachable[0]
    (path,) = client.post("/gradio_api/upload", files={"files": ("b.html", b"<script>1</script>")}).json()
    answer = client.get(f"/gradio_api/file={path}")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"


def test_slices(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(60, dtype=np.float32).reshape(5, 3, 4))
    volume = greyscale((tmp_path / "a.npy").read_bytes(), Limits())
    assert (volume.min(), volume.max()) == (0, 255)
    picture, slider = slice_of(volume, None)
    assert 'alt="Slice 2"' in picture
    assert (slider["value"], slider["maximum"]) == (2, 4)
    assert slice_of(None, 3)[0] == ""
    with pytest.raises(UserError):
        greyscale(b"no volume", Limits())


def test_export_of_nothing():
    assert json.loads(export([], bytes)) == {"messages": []}


@pytest.mark.skipif("WEBAPP_SCREENSHOT" not in os.environ, reason="WEBAPP_SCREENSHOT names no file")
def test_the_picture_of_the_documentation(browser, tmp_path):
    import llavakit

    model = Path(os.environ["WEBAPP_MODEL"])
    chat = llavakit.load(model)
    chat.name = "LLaVA-1.5 of make demo"
    world = model.parent / "data" / "scene"
    questions = [json.loads(line) for line in (world / "heldout_questions.jsonl").read_text().splitlines()]
    running = Running(chat, Settings(), lambda app: mount(app))
    page = browser.new_page(viewport={"width": 880, "height": 660})
    try:
        visit(page, running.url)
        question = next(one for one in questions if right(chat, world, one))
        ask(page, question["text"], world / question["image"])
        answered(page)
        page.wait_for_timeout(500)
        page.screenshot(path=os.environ["WEBAPP_SCREENSHOT"])
    finally:
        page.close()
        running.stop()


def right(chat, world, question):
    parts = [{"type": "image", "image": str(world / question["image"])}, {"type": "text", "text": question["text"]}]
    return chat.chat([{"role": "user", "content": parts}], max_new_tokens=8).rstrip(".") == question["answer"]
