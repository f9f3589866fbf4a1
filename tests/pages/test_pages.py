"""Every command and snippet of the pages runs, page by page from the top, where what the page names is there, small.

A block that cannot run here is marked in its page (`<!-- runs: no, REASON -->`) and only parsed (`tests/test_docs.py`).
`make test-docs` runs all of it and prints how many ran.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, Block, blocks, sessions
from fake_api import FakeAPI
from replies import reply
from warm import Python, ask

pytestmark = [pytest.mark.docs, pytest.mark.slow]
HERE = Path(__file__).parent
BEFORE = {
    "docs/adding-a-system.md": """
import sys
sys.path.insert(0, "examples/llava-zoom/src")
from llava_zoom import *
from llava_zoom.connector import *
from llava_zoom.responder import *
from llava_zoom.views import *
__name__ = "llava_zoom"
""",
    "docs/retrieval.md": "from PIL import Image\npicture = Image.open('bridge.jpg')",
    "docs/tools.md": "from PIL import Image\npicture = Image.open('scene.png')",
}
"""What goes before the snippets of a page that shows parts of a file, or takes a picture for granted."""
RUNNING = [page for page in PAGES if any(block.count and not block.skipped for block in blocks(page))]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder of what several pages name."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """The socket of the process that runs commands."""
    path = str(tmp_path_factory.mktemp("warm") / "socket")
    found = (str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))}
    command = [sys.executable, "-W", "ignore", str(HERE / "warm.py"), path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    yield path
    process.stdin.close()
    process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Reader:
    """Someone who types what a page shows, in a folder that holds what the page names."""

    page: str
    folder: Path
    socket: str
    api: FakeAPI
    port: int
    python: Python | None = None

    def __post_init__(self) -> None:
        commands = self.folder.parent / "bin"
        commands.mkdir()
        ask_warm = f"exec {sys.executable} -SE {HERE / 'client.py'}"
        for name, script in {
            "llavakit": f'{ask_warm} llavakit "$@"',
            "python": f"""[[ "$1 $2" == "-m llavakit"* || "$1" == *.py ]] && {ask_warm} python "$@"
                exec {sys.executable} "$@\"""",
            "make": f'PATH=$PAGES_PATH exec make --dry-run -C {ROOT} "$@"',  # that there is such a target
        }.items():
            (commands / name).write_text(f"#!/bin/bash\n{script}\n")
            (commands / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PAGES_SOCKET": self.socket,
            "PAGES_NAME": self.page,
            "PAGES_PORT": str(self.port),
            "PAGES_PATH": os.environ["PATH"],
            "OPENAI_BASE_URL": self.api.url,
            "OPENAI_API_KEY": "none",
            "COLUMNS": "120",
        }
        self.log = (self.folder.parent / "log").open("ab+")

    def output(self, since: int) -> str:
        self.log.seek(since)
        return self.log.read().decode(errors="replace")[-3000:]

    def ported(self, text: str) -> str:
        """A text with the page's port in the place of 8000, and that of a teacher's API in the place of 8001."""
        return text.replace(":8000", f":{self.port}").replace("http://localhost:8001/v1", self.api.url)

    def shell(self, text: str) -> tuple[int, str]:
        """Status and output of a block of the shell."""
        since = self.log.seek(0, os.SEEK_END)
        command = ["bash", "-euo", "pipefail", "-c", self.ported(text)]
        files = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        status = subprocess.run(command, cwd=self.folder, env=self.environment, timeout=600, **files).returncode
        return status, self.output(since)

    def snippet(self, block: Block) -> str | None:
        if self.python is None:
            request = {"cwd": str(self.folder), "env": self.environment, "page": self.page}
            self.python = Python(self.socket, request, self.log.fileno())
            assert self.python.run(BEFORE.get(self.page, ""), f"before {self.page}") is None
        since = self.log.seek(0, os.SEEK_END)
        error = self.python.run(self.ported(block.text), f"{block.page}:{block.line}")
        return error and f"{self.output(since)}\n{error}"

    def save(self, block: Block) -> None:
        """What a page shows as a file."""
        (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / block.file).write_text(block.text, encoding="utf-8")

    def run(self, block: Block) -> str | None:
        """What went wrong."""
        if block.skipped or not block.count:
            return None
        if block.language == "python":
            return self.snippet(block)
        if block.language == "bash":
            status, output = self.shell(block.text)
            return None if status == 0 else output
        for command, shown in sessions(block.text):
            status, output = self.shell(command)
            if refusal := next((line for line in shown.splitlines() if line.startswith("llavakit: ")), None):
                if status == 0 or refusal not in output:
                    return f"{command}\nshown: {refusal}\n{output}"
            elif status != 0:
                return f"{command}\n{output}"
        return None

    def close(self) -> list[int]:
        """Exit statuses of the servers that the page left."""
        if self.python is not None:
            self.python.close()
        found = ask(self.socket, {"stop": self.page})
        self.log.close()
        return found


@pytest.mark.parametrize("page", RUNNING)
def test_what_the_page_shows_runs(page, warm, made, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    stand_ins = ["python", str(HERE / "stand_ins.py"), page, str(folder), str(made)]
    request = {"argv": stand_ins, "cwd": str(folder), "env": dict(os.environ), "page": page}
    assert ask(warm, request) == {"status": 0}
    with FakeAPI(reply) as api:
        serves = any("llavakit serve" in block.text for block in blocks(page) if not block.skipped)
        port = free_port() if serves else int(api.url.split(":")[2].removesuffix("/v1"))
        reader = Reader(page, folder, warm, api, port)
        wrong = []
        for block in blocks(page):
            if block.file:
                reader.save(block)
        for block in blocks(page):
            began = time.monotonic()
            if error := reader.run(block):
                wrong.append(f"{page}:{block.line}\n{block.text}\n{error}")
                print(wrong[-1])
            if block.count and not block.skipped:
                print(f"{page}:{block.line}: {block.count} in {time.monotonic() - began:.1f} s")
        statuses = reader.close()
    assert not wrong, f"\n{'-' * 80}\n".join(wrong)
    assert not any(statuses), f"servers ended with {statuses}"


def test_most_of_them_run(capsys):
    found = [block for page in PAGES for block in blocks(page)]
    shown = sum(block.count for block in found)
    skipped = sum(block.count for block in found if block.skipped)
    with capsys.disabled():
        print(f"\n{shown} commands and snippets in {len(PAGES)} pages")
        print(f"{shown - skipped} run, {skipped} are marked as not running here")
    assert skipped <= 0.15 * shown
