"""Install a wheel in an empty environment, outside the checkout, and use it as a newcomer would.

    make test-dist

The wheel must be small and hold no tests. The environment gets nothing but what the wheel asks for; commands run in an
empty folder, with no path into the checkout but the golden cases that `llavakit parity` is given. A phantom world is
written, a small model is trained on it and asked in the terminal and over a server, which is stopped again, and the
golden cases of one system hold.

    python scripts/try_wheel.py dist/*.whl --constraints constraints.txt [--golden tests/golden] [--environment FOLDER]

`--environment` keeps the environment for the next time; without it, it is made in a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

LIMIT = 2_000_000
"""Bytes of the wheel."""

RECIPE = """\
parts:
  text_config: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 4, vocab_size: 1200, max_position_embeddings: 512, pad_token_id: 0}
  vision_config: {model_type: clip_vision_model, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 3,
    num_attention_heads: 4, image_size: 24, patch_size: 8}
  media: {image: {views: {type: square, size: 24}}}
  tokenizer: tokenizer
data:
  - path: data/train.json
stages:
  - {name: tune, train: [multi_modal_projector, language_model, lm_head], learning_rate: 1.0e-3, max_steps: 4}
output: runs/small
"""
TOKENIZER = """
import json
from llavakit.phantom.tokenizer import tiny_tokenizer
tiny_tokenizer(json.load(open("data/texts.json")), vocab_size=1199).save_pretrained("tokenizer")
"""


def contents(wheel: Path) -> None:
    """Refuse a wheel that is too large, holds tests, or lacks what commands read."""
    size = wheel.stat().st_size
    assert size < LIMIT, f"{wheel.name} has {size:,} bytes, the limit is {LIMIT:,}"
    names = zipfile.ZipFile(wheel).namelist()
    tests = [name for name in names if re.search(r"(^|/)(tests?|golden)/|(^|/)(test_|conftest)", name)]
    assert not tests, f"the wheel holds tests: {tests[:3]}"
    systems = {name.split("/")[2] for name in names if re.match(r"llavakit/systems/\w+/__init__\.py", name)}
    lacking = [name for name in systems if f"llavakit/systems/{name}/README.md" not in names]
    assert not lacking, f"systems without their page: {lacking}"
    print(f"{wheel.name}: {size:,} bytes, {len(names)} files, {len(systems)} systems")


def environment(folder: Path, wheel: Path, constraints: Path) -> Path:
    """An environment with the wheel alone; its folder of commands."""
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "-c", str(constraints)]
    arguments = shlex.split(os.environ.get("PIP_ARGS", ""))
    subprocess.run([*pip, *arguments, f"llavakit[train,serve] @ {wheel.resolve().as_uri()}"], check=True)
    subprocess.run([*pip, *arguments, "--force-reinstall", "--no-deps", str(wheel.resolve())], check=True)
    return folder / "bin"


class Newcomer:
    """Runs commands of the environment in a folder of their own."""

    def __init__(self, commands: Path, folder: Path) -> None:
        self.commands, self.folder = commands, folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        kept["PATH"] = f"{commands}{os.pathsep}{kept['PATH']}"
        self.variables = kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def run(self, *words: str, check: Callable[[str], bool] = bool) -> str:
        """Standard output of a command that must succeed; `check` must hold of it."""
        began = time.monotonic()
        done = subprocess.run(words, cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=600)
        shown = shlex.join(words)[:100]
        assert done.returncode == 0, f"{shown}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert check(done.stdout + done.stderr), f"{shown}: printed\n{done.stdout}\n{done.stderr}"
        print(f"{time.monotonic() - began:5.1f} s  {shown.splitlines()[0]}")
        return done.stdout

    def serve(self, model: str, question: list[dict]) -> str:
        """Start a server, ask it, stop it; the answer."""
        began = time.monotonic()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["llavakit", "serve", model, "--port", str(port), "--no-web"]
        server = subprocess.Popen(words, cwd=self.folder, env=self.variables)
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                assert server.poll() is None, f"the server ended with status {server.returncode}"
                assert time.monotonic() - began < 120, "the server did not start within two minutes"
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            body = json.dumps({"model": Path(model).name, "messages": question, "max_tokens": 8}).encode()
            asked = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0, f"the server ended with status {server.returncode}"
        finally:
            server.kill()
        print(f"{time.monotonic() - began:5.1f} s  {shlex.join(words)}, asked, stopped")
        return answer


def use(newcomer: Newcomer, golden: Path) -> None:
    """From a world to a served model, and the proof that the numbers are the original's."""
    folder = newcomer.folder
    where = newcomer.run("python", "-c", "import llavakit; print(llavakit.__file__)").strip()
    assert Path(where).is_relative_to(newcomer.commands.parent), f"llavakit is imported from {where}"
    newcomer.run("llavakit", "--version", check=lambda text: text.startswith("llavakit "))
    newcomer.run("llavakit", "systems", check=lambda text: "llava-1.5" in text)
    newcomer.run("llavakit", "phantom", "scene", "data", "--n", "40", "size=24", "difficulty=easy")
    newcomer.run("python", "-c", TOKENIZER, check=lambda text: True)
    (folder / "recipe.yaml").write_text(RECIPE)
    newcomer.run("llavakit", "train", "recipe.yaml")
    picture = folder / "data" / json.loads((folder / "data" / "heldout.json").read_text())[0]["image"]
    text = "What colour is the disc?"
    asked = ["--prompt", text, "--max-new-tokens", "8"]
    said = newcomer.run("llavakit", "chat", "runs/small/final", "--image", str(picture), *asked).strip()
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    served = newcomer.serve("runs/small/final", [{"role": "user", "content": parts}])
    assert served.strip() == said, f"chat says {said!r}, the server {served!r}"
    newcomer.run("llavakit", "parity", str(golden), "--only", "llava-1.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--golden", type=Path, default=Path("tests/golden"))
    parser.add_argument("--environment", type=Path)
    arguments = parser.parse_args()
    contents(arguments.wheel)
    work = Path(tempfile.mkdtemp(prefix="llavakit-wheel-"))
    try:
        folder = arguments.environment or work / "environment"
        commands = environment(folder.resolve(), arguments.wheel, arguments.constraints.resolve())
        (work / "here").mkdir()
        use(Newcomer(commands, work / "here"), arguments.golden.resolve())
    except AssertionError as wrong:
        sys.exit(f"test-dist: {wrong}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("the wheel works")


if __name__ == "__main__":
    main()
