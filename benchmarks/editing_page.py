"""The editing page beside GrabCut alone: python benchmarks/editing_page.py, in the environment of `make test-web`.

A stroke is drawn with the pointer in a headless Chromium, on a picture of 512 x 512 pixels. It counts from the moment
the pointer is lifted until the selection is on the screen: the event's way to the server, GrabCut, the hole behind the
object filled, the mask's way back, and two frames of the browser. Beside it, in turn and in the same process,
`cv2.grabCut` runs alone on the same pixels from the same first labels. CHROMIUM names the browser if it is elsewhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from llavakit.editing.backends import backends_of
from llavakit.generation.responder import Responder
from llavakit.phantom.write import build_world
from llavakit.serving.app import Settings, create_app
from llavakit.serving.process import http_server
from llavakit.serving.webapp import mount
from llavakit.tools.segmentation import ROUNDS

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SIDE = 512
# Lifts the pointer, and resolves when the selection that comes of it has been painted.
SHOWN = """() => new Promise((resolve) => {
    const editor = document.querySelector(".editor"), before = editor.dataset.view;
    let began = 0;
    window.addEventListener("pointerup", () => { began = performance.now(); }, { capture: true, once: true });
    new MutationObserver(() => {
        if (editor.dataset.view === before) return;
        requestAnimationFrame(() => requestAnimationFrame(() => resolve([performance.now() - began,
            document.querySelector(".status").innerText])));
    }).observe(editor, { attributes: true });
})"""


class Silent(Responder):
    """Nobody is talked to."""

    def run(self, call):
        yield from ()


def alone(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Seconds of `cv2.grabCut`."""
    cv2.setRNGSeed(0)
    models, own = (np.zeros((1, 65)), np.zeros((1, 65))), labels.copy()
    began = time.perf_counter()
    cv2.grabCut(pixels, own, None, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
    return time.perf_counter() - began


def serve() -> tuple[object, str]:
    """The page on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings()
    app = mount(create_app(Silent(name="silent"), settings), backends_of())
    server = http_server(app, settings.connections, port=port, log_level="error")
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    return server, f"http://127.0.0.1:{port}/editing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strokes", type=int, default=7)
    strokes = parser.parse_args().strokes
    item = build_world("scene", size=SIDE, difficulty="easy").sample(seed=3, index=0).items[0]
    x0, y0, x1, y1 = item.boxes[0].xyxy
    line = [(x0 + (x1 - x0) * along, (y0 + y1) / 2) for along in (0.3, 0.7)]
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    cut = cv2.grabCut

    def noted(pixels: np.ndarray, labels: np.ndarray, *rest: object) -> object:
        asked.append((pixels.copy(), labels.copy()))
        return cut(pixels, labels, *rest)

    server, address = serve()
    rows = []
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.goto(address)
        page.wait_for_selector(".editor[data-view]")
        path = Path(folder) / "scene.png"
        Image.fromarray(item.media[0]).save(path)
        page.set_input_files(".file", str(path))
        page.wait_for_selector(".strip li")
        for number in range(strokes + 1):
            if number:  # away from the object that is selected, which would be dragged
                page.get_by_text("Undo", exact=True).click()
                page.wait_for_function("document.querySelector('.object').hidden")
            box = page.locator("canvas").bounding_box()
            at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
            page.mouse.move(*at[0])
            page.mouse.down()
            page.mouse.move(*at[1], steps=8)
            cv2.grabCut = noted if not asked else cut
            shown = page.evaluate_handle(SHOWN.replace("() =>", "() => ({ promise: ", 1) + "})")
            page.mouse.up()
            milliseconds, said = shown.evaluate("(one) => one.promise")
            if number:  # the first one is for warming up
                rows.append((milliseconds / 1000, alone(*asked[0])))
            page.get_by_text("Remove", exact=True).click()
            page.wait_for_function("n => document.querySelectorAll('.strip li').length == n", arg=number + 2)
        browser.close()
    server.should_exit = True
    print(f"{SIDE} x {SIDE} pixels, {strokes} strokes; {said}")
    print("| | s, median | fastest | slowest |\n|---|---|---|---|")
    for name, times in zip(("stroke shown", "cv2.grabCut alone"), zip(*rows, strict=True), strict=True):
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} |")
    ratios = [page / alone for page, alone in rows]
    print(f"ratio, median of pairs: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
