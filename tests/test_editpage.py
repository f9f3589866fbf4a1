"""The editing page in a headless Chromium: `make test-web`. What it knows without a browser: test_desk.py."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the web app's environment: make test-web")
pytest.importorskip("playwright.sync_api", reason="the web app's environment: make test-web")
pytest.importorskip("cv2", reason="the web app's environment: make test-web")
from test_desk import Looks, scene
from test_webapp import browser  # noqa: F401
from tiny_server import Running, png

from llavakit.editing.backends import backends_of
from llavakit.editing.log import replay
from llavakit.editing.session import Session
from llavakit.serving.app import Settings
from llavakit.serving.webapp import mount

pytestmark = pytest.mark.web


# Parts that reach over the edge of a telephone; the strip of versions scrolls.
WIDE = """() => [...document.querySelectorAll(".editor *, textarea, button")].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.width && !one.closest(".strip") && (box.left < 0 || box.right > 360);
}).map((one) => one.outerHTML)"""


@pytest.fixture(scope="module")
def running():
    started = Running(Looks(name="looks"), Settings(), lambda app: mount(app, backends_of()))
    yield started
    started.stop()


@pytest.fixture
def context(browser):  # noqa: F811
    opened = browser.new_context(viewport={"width": 1000, "height": 900})
    yield opened
    opened.close()


@pytest.fixture
def page(context, running):
    opened = context.new_page()
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    visit(opened, running.url)
    yield opened
    assert errors == []


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    scene(192, 256).save(path)
    return path


def visit(page, url):
    page.goto(f"{url}/editing")
    page.wait_for_selector(".editor[data-view]")


def acted(page, action):
    """Do something that the server answers; what the page says then."""
    before = int(page.get_attribute(".editor", "data-view"))
    action()
    page.wait_for_function("n => Number(document.querySelector('.editor').dataset.view) > n", arg=before)
    return page.inner_text(".status")


def opened(page, path):
    return acted(page, lambda: page.set_input_files(".file", str(path)))


def drawn(page, start, end):
    """A line with the pointer, in fractions of the canvas."""
    box = page.locator("canvas").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()


def colour(page, x, y):
    """Of the canvas, at a point in fractions."""
    script = """([x, y]) => { const c = document.querySelector("canvas");
        return [...c.getContext("2d").getImageData(x * c.width, y * c.height, 1, 1).data].slice(0, 3); }"""
    return page.evaluate(script, [x, y])


def versions(page):
    return page.locator(".strip button").all_inner_texts()


def asked(page, text, turns):
    page.fill("textarea", text)
    page.press("textarea", "Enter")
    page.wait_for_function("n => document.querySelectorAll('[data-testid=bot]').length == n", arg=turns)
    page.wait_for_function("() => [...document.querySelectorAll('[data-testid=bot]')].at(-1).innerText.includes(' ')")
    return page.locator("[data-testid=bot]").last.inner_text().strip()


def test_brush_drag_remove_undo_and_a_chat_about_what_is_shown(page, picture):
    assert opened(page, picture) == "Picture 0: opened"
    assert asked(page, "How red?", 1).startswith("0.07")
    said = acted(page, lambda: drawn(page, (0.22, 0.4), (0.3, 0.5)))
    assert said == "Selected: object, 7.3 % of the picture"
    acted(page, lambda: drawn(page, (0.25, 0.45), (0.65, 0.45)))
    assert versions(page) == ["0 upload", "1 move"]
    red = colour(page, 0.65, 0.45)
    assert red[0] > red[1] + 100
    assert max(colour(page, 0.25, 0.45)) < 150
    acted(page, lambda: drawn(page, (0.65, 0.45), (1.3, 0.45)))  # out of the picture
    assert versions(page)[-1] == "2 remove"
    assert asked(page, "And now?", 2).startswith("0.00")
    acted(page, lambda: page.get_by_text("Undo", exact=True).click())
    assert asked(page, "And before?", 3).startswith("0.07")
    acted(page, lambda: page.get_by_text("Redo", exact=True).click())
    acted(page, lambda: page.get_by_label("Show picture 0: opened").click())
    assert page.locator(".strip [aria-current=true]").inner_text() == "0 upload"
    page.reload()
    page.wait_for_selector(".strip li")
    assert len(versions(page)) == 3, "a reload loses nothing"
    page.wait_for_selector("[data-testid=bot]")


def test_boxes_and_a_layout_are_drawn_and_the_saved_session_replays(page, picture, tmp_path):
    opened(page, picture)
    assert "not objects" in page.inner_text(".about")
    page.get_by_role("tab", name="Add objects").click()
    assert "no generator" in page.inner_text(".about")
    drawn(page, (0.6, 0.1), (0.9, 0.4))
    page.get_by_text("Add", exact=True).click()
    assert page.inner_text(".status") == "Say what box 1 holds"
    page.get_by_label("What box 1 holds").fill("blue disc")
    acted(page, lambda: page.get_by_text("Add", exact=True).click())
    page.get_by_role("tab", name="Make a new picture").click()
    drawn(page, (0.1, 0.1), (0.5, 0.9))
    page.get_by_label("What box 1 holds").fill("green square")
    page.get_by_label("description").fill("one shape")
    acted(page, lambda: page.get_by_text("Make the picture").click())
    assert versions(page) == ["0 upload", "1 insert", "2 create"]
    acted(page, lambda: page.get_by_label("Show picture 0: opened").click())
    acted(page, lambda: drawn(page, (0.22, 0.4), (0.3, 0.5)))
    page.get_by_label("replace by").fill("a yellow ring")
    acted(page, lambda: page.get_by_text("Replace", exact=True).click())
    with page.expect_download() as download:
        page.get_by_text("Save session").click()
    path = Path(download.value.path())
    log = json.loads(zipfile.ZipFile(path).read("session.json"))
    assert [one["op"] for one in log["versions"]] == ["upload", "insert", "create", "replace"]
    assert replay(path, Session(backends_of())) == []


def test_the_keyboard_is_enough(page, picture):
    opened(page, picture)
    page.get_by_text("Mark by numbers").press("Enter")
    for name, value in {"Start from the left": 20, "End from the left": 30}.items():
        page.get_by_label(name).fill(str(value))
    said = acted(page, lambda: page.get_by_text("Mark line").press("Enter"))
    assert said.startswith("Selected")
    page.focus(".stage")
    for _ in range(2):
        page.keyboard.press("Shift+ArrowRight")
    assert page.inner_text(".status") == "Moved by 20 right, 0 down; Enter puts it down"
    acted(page, lambda: page.keyboard.press("Enter"))
    page.get_by_label("Move down").fill("-12")
    acted(page, lambda: page.get_by_text("Move", exact=True).press("Enter"))
    page.focus(".stage")
    acted(page, lambda: page.keyboard.press("Delete"))
    acted(page, lambda: page.keyboard.press("Control+z"))
    assert versions(page) == ["0 upload", "1 move", "2 move", "3 remove"]
    assert page.locator(".strip [aria-current=true]").inner_text() == "2 move"
    page.get_by_role("tab", name="Add objects").press("Enter")
    page.get_by_text("Add a box").press("Enter")
    page.keyboard.type("white square")  # the box's field has the focus
    page.get_by_label("Box 1, right edge in percent").fill("50")
    acted(page, lambda: page.get_by_text("Add", exact=True).press("Enter"))
    assert versions(page)[-1] == "4 insert"
    nameless = page.evaluate("""() => [...document.querySelectorAll(".editor input, .editor button, .editor a")].filter(
        (one) => one.offsetParent && !(one.innerText || one.getAttribute("aria-label")
            || one.closest("label")?.innerText.trim())).map((one) => one.outerHTML)""")
    assert nameless == []


def test_a_telephone_shows_and_does_everything(browser, running, picture):  # noqa: F811
    context = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page = context.new_page()
    try:
        visit(page, running.url)
        opened(page, picture)
        page.locator("canvas").scroll_into_view_if_needed()
        box = page.locator("canvas").bounding_box()
        point = box["x"] + 0.27 * box["width"], box["y"] + 0.45 * box["height"]
        assert acted(page, lambda: page.touchscreen.tap(*point)).startswith("Selected")
        acted(page, lambda: page.get_by_text("Remove", exact=True).tap())
        assert versions(page) == ["0 upload", "1 remove"]
        for tab in ("Add objects", "Make a new picture", "Remove or change objects"):
            page.get_by_role("tab", name=tab).tap()
            wide = page.evaluate(WIDE)
            assert wide == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert asked(page, "How red?", 1).startswith("0.00")
    finally:
        context.close()


def test_a_session_is_its_browsers_own(browser, context, page, running, picture):  # noqa: F811
    opened(page, picture)
    address = page.locator(".strip img").first.get_attribute("src").partition("?")[0]
    saved = page.get_attribute("[data-link=session]", "href")
    assert page.request.get(running.url + address).status == 200
    stranger = browser.new_context()
    other = stranger.new_page()
    try:
        visit(other, running.url)
        assert other.locator(".strip li").count() == 0
        for place in (address, saved):
            assert other.request.get(running.url + place).status == 404
    finally:
        stranger.close()
    second = context.new_page()
    visit(second, running.url)
    acted(second, lambda: drawn(second, (0.22, 0.4), (0.3, 0.5)))
    acted(second, lambda: second.get_by_text("Remove", exact=True).click())
    said = acted(page, lambda: drawn(page, (0.22, 0.4), (0.3, 0.5)))
    assert said.startswith("the picture was changed in another window")
    assert versions(page) == ["0 upload", "1 remove"]


def test_bad_pictures_and_marks_are_one_line(page, picture, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(png()[:60])
    assert "cut off" in opened(page, broken)
    assert "failed" in page.get_attribute(".status", "class")
    opened(page, picture)
    page.get_by_label("or name it").fill("an elephant")
    assert "names nothing that can be detected" in acted(page, lambda: page.get_by_text("Find", exact=True).click())
    page.get_by_label("or name it").fill("red square")
    assert acted(page, lambda: page.get_by_text("Find", exact=True).click()).startswith("Selected: red square")


def test_a_key_opens_the_editing_page(browser):  # noqa: F811
    started = Running(Looks(name="looks"), Settings(api_keys=("right",)), lambda app: mount(app, backends_of()))
    context = browser.new_context()
    page = context.new_page()
    try:
        page.goto(f"{started.url}/editing")
        page.get_by_label("API key").fill("right")
        page.get_by_text("Open").click()
        page.wait_for_function("document.activeElement.tagName == 'TEXTAREA'")
        visit(page, started.url)
    finally:
        context.close()
        started.stop()


def test_pictures_are_seen_as_they_are(page, picture):
    """The canvas shows the version's own pixels."""
    opened(page, picture)
    pixels = np.asarray(scene(192, 256))
    assert colour(page, 0.75, 0.5) == pixels[96, 192].tolist()
