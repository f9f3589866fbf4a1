"""The studio in a headless Chromium: `make test-web`. What it does without a browser: test_studio.py.

STUDIO_SCREENSHOT names a file to keep the picture of the documentation in.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("gradio", reason="the web app's environment: make test-web")
pytest.importorskip("playwright.sync_api", reason="the web app's environment: make test-web")
from test_studio import model, pid_of, table, wait  # noqa: F401
from test_webapp import browser  # noqa: F401

from llavakit.serving.access import AccessPolicy
from llavakit.serving.process import http_server
from llavakit.studio.actions import Studio
from llavakit.studio.run import create_app

pytestmark = pytest.mark.web
PATIENCE = 300_000  # milliseconds; commands of llavakit start slowly on a busy machine


class RunningStudio:
    """A studio in a thread, on a free port."""

    def __init__(self, workspace, source="", start="", keys=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.studio = Studio(workspace, keys=tuple(keys))
        app = create_app(self.studio, AccessPolicy(tuple(keys)), source=str(source), model=str(start))
        self.server = http_server(app, 64, port=port, log_level="error")
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{port}"

    def stop(self):
        if self.studio.open is not None:
            for name in ("train", "eval", "serve"):
                self.studio.open.job(name).stop()
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def running(tmp_path, table, model):  # noqa: F811
    started = RunningStudio(tmp_path / "runs", table, model)
    yield started
    started.stop()


@pytest.fixture
def page(browser, running):  # noqa: F811
    opened = browser.new_page(viewport={"width": 1100, "height": 1400})
    opened.set_default_timeout(PATIENCE)
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(running.url)
    opened.wait_for_selector("text=Make or open a project first")
    yield opened
    opened.close()
    assert errors == []


def press(page, name):
    """Click a button, in view before the click: where the click itself scrolls, Chromium gives it to a frame above."""
    button = page.get_by_role("button", name=name, exact=True)
    button.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    button.click()


def test_five_clicks_from_a_table_to_an_answer_of_the_served_model(page, running):
    press(page, "Make the project")
    page.wait_for_selector("text=records to learn from")
    frame = page.frame_locator("iframe[title='Record 1 as the model sees it']")
    frame.locator("text=visual tokens").first.wait_for()
    press(page, "Train")
    page.wait_for_selector("text=Trained.")
    page.wait_for_selector(".studio-curve polyline")
    press(page, "Evaluate")
    page.wait_for_selector("text=95 % interval")
    press(page, "Serve")
    page.wait_for_selector("text=Served at")
    press(page, "Ask")
    page.wait_for_function("() => document.querySelectorAll('.studio-cards').length == 2")
    if "STUDIO_SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["STUDIO_SCREENSHOT"], full_page=True)
    reply = page.locator(".studio-cards").last.inner_text()
    assert "truth:" in reply
    page.reload()
    page.wait_for_selector("text=Trained.")
    page.wait_for_selector("text=95 % interval")
    page.wait_for_selector("text=Served at")
    press(page, "Stop serving")
    page.wait_for_selector("text=Served at", state="hidden")
    assert wait(running.studio.project.job("serve"), "stopped") == "stopped"


def test_a_killed_training_is_told_and_goes_on(page, running):
    press(page, "Make the project")
    page.wait_for_selector("text=records to learn from")
    press(page, "Train")
    project = running.studio.project
    end = time.time() + PATIENCE / 1000
    while not list((project.folder / "run").glob("*/checkpoint-*")) and time.time() < end:
        time.sleep(0.05)
    os.killpg(pid_of(project.job("train")), signal.SIGKILL)
    page.wait_for_selector("text=The training process is gone")
    press(page, "Go on")
    page.wait_for_selector("text=Trained.")
    assert "goes on after step" in project.job("train").log()


def test_mistakes_are_told_by_keyboard_alone_on_a_telephone(browser, tmp_path):  # noqa: F811
    running = RunningStudio(tmp_path / "runs")
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.set_default_timeout(PATIENCE)
    try:
        page.goto(running.url)
        page.wait_for_function("['INPUT', 'TEXTAREA'].includes(document.activeElement.tagName)")
        page.keyboard.type(str(tmp_path / "nothing.csv"))
        for key in ("Tab", "Tab", "Enter"):
            page.wait_for_timeout(200)  # the page takes a moment to know what was typed
            page.keyboard.press(key)
        page.wait_for_selector("text=nothing.csv:", timeout=30_000)
        wide = "() => [...document.querySelectorAll('button, input, textarea')].filter((one) => "
        wide += "one.getBoundingClientRect().right > 360).length"
        assert page.evaluate(wide) == 0
    finally:
        page.close()
        running.stop()


def test_a_studio_with_a_key_asks_for_it(browser, tmp_path):  # noqa: F811
    running = RunningStudio(tmp_path / "runs", keys=("secret",))
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        page.goto(running.url)
        page.fill("#password", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Make or open a project first")
    finally:
        page.close()
        running.stop()
