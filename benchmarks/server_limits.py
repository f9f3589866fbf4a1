"""What a hostile request costs the server: processor time, memory, and how long others wait meanwhile.

    python benchmarks/server_limits.py [--part prompt|json|media|all]

A tiny random model is served on loopback by a process of its own, under the settings of `llavakit serve`. Every request
is bounded (64 MiB) and sent once, to a fresh server; numbers are differences to the idle server.

- prompt: a prompt of 58 MB, and the longest one that is not refused by its characters.
- json: 60 MB of nested JSON without a key, while `/health` is asked over and over.
- media: the largest accepted pictures and volume; peak memory over the size of what was decoded.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
import numpy as np
import psutil
from PIL import Image

KEY = "a key"
HEAD = {"Authorization": f"Bearer {KEY}"}
MIB = 2**20


def write_model(folder: Path) -> None:
    """A tiny random model that takes pictures and volumes."""
    import torch

    from llavakit.checkpoints.convert import save
    from llavakit.model.configuration import LlavakitConfig
    from llavakit.model.modeling import LlavakitForConditionalGeneration
    from llavakit.model.processing import LlavakitProcessor
    from llavakit.phantom.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer(vocab_size=1200)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", **size, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "clip_vision_model", **size, "image_size": 48, "patch_size": 12}
    deep = {"model_type": "m3d_clip_vision", "image_size": [8, 16, 16], "patch_size": [2, 4, 4], **size}
    volume = {"views": {"type": "volume_box", "size": [8, 16, 16]}, "encoder": "deep", "connector": "flat"}
    torch.manual_seed(0)
    config = LlavakitConfig(
        text_config=text,
        vision_config=vision,
        media={"image": {"views": {"type": "pad", "size": 48}}, "volume": volume},
        extra_encoders={"deep": {"config": deep, "layer": -1}},
        extra_connectors={"flat": {"type": "pooling", "stride": [2, 2, 2], "encoder": "deep"}},
        image_token_id=len(tokenizer) - 1,
        template="vicuna_v1",
    )
    model = LlavakitForConditionalGeneration(config)
    save(model.state_dict(), config, LlavakitProcessor.from_config(config, tokenizer), folder)


class Server:
    """A server in a process of its own, and what it spends."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "llavakit", "serve", str(folder), "--port", str(port), "--no-web"]
        self.popen = subprocess.Popen([*command, "--api-key", KEY], stderr=subprocess.DEVNULL)
        while not self._answers():
            if self.popen.poll() is not None:
                raise RuntimeError(f"the server ended with {self.popen.returncode}")
            time.sleep(0.2)
        self.process = psutil.Process(self.popen.pid)
        self.ask({"messages": [{"role": "user", "content": "warm"}], "max_tokens": 2})
        self.cpu, self.idle = self._cpu(), self.process.memory_info().rss

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def _cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def ask(self, body: dict[str, Any] | bytes, headers: dict[str, str] = HEAD) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps({"model": "model", **body}).encode()
        given = headers | {"Content-Type": "application/json"}
        return httpx.post(f"{self.url}/v1/chat/completions", content=content, headers=given, timeout=600)

    def spent(self) -> tuple[float, float]:
        """Processor seconds since the server was idle, and its highest memory since then in MiB above that."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0])  # KiB
        return self._cpu() - self.cpu, peak / 1024 - self.idle / MIB

    def forget_peak(self) -> None:
        """Begin to measure the highest memory anew."""
        Path(f"/proc/{self.popen.pid}/clear_refs").write_text("5")
        self.cpu, self.idle = self._cpu(), self.process.memory_info().rss


@contextmanager
def served(folder: Path, port: int = 8471) -> Iterator[Server]:
    server = Server(folder, port)
    try:
        server.forget_peak()
        yield server
    finally:
        server.popen.terminate()
        server.popen.wait(60)


def said(answer: httpx.Response) -> str:
    if answer.status_code == 200:
        return "200"
    return f"{answer.status_code} {answer.json()['error']['code'] or ''}".strip()


def row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2}


def prompts(folder: Path) -> None:
    row("prompt", "answer", "s", "CPU s", "MiB over idle")
    row("---", "---", "---:", "---:", "---:")
    limit = None
    for name in ("58 MB", "1 MB", "longest that is tokenised"):
        with served(folder) as server:
            if name == "longest that is tokenised":
                text = ("word " * limit)[:limit]
            else:
                text = "word " * (11_600_000 if name == "58 MB" else 180_000)
            began = time.perf_counter()
            answer = server.ask(user(text))
            seconds = time.perf_counter() - began
            cpu, memory = server.spent()
            if answer.status_code == 400 and "never fit" in answer.text:
                limit = int(answer.json()["error"]["message"].split("more than ")[1].split()[0])
            row(f"{name} ({len(text):,} characters)", said(answer), f"{seconds:.2f}", f"{cpu:.2f}", f"{memory:.0f}")


def nested(size: int) -> bytes:
    return b'{"model": "model", "messages": ' + b'[{"a": ' * (size // 16) + b"1" + b"}]" * (size // 16) + b"}"


def unwanted_json(folder: Path) -> None:
    row("60 MB of JSON", "answer", "CPU s", "MiB over idle", "/health meanwhile: median, slowest of, s")
    row("---", "---", "---:", "---:", "---:")
    content = nested(60_000_000)
    for name, headers in (("without a key", {}), ("with a key", HEAD)):
        with served(folder) as server:
            waits, stop = [], threading.Event()

            def knock(server: Server = server, waits: list[float] = waits, stop: threading.Event = stop) -> None:
                with httpx.Client(base_url=server.url) as client:
                    while not stop.is_set():
                        began = time.perf_counter()
                        client.get("/health")
                        waits.append(time.perf_counter() - began)
                        time.sleep(0.005)

            thread = threading.Thread(target=knock)
            thread.start()
            time.sleep(1)
            answer = server.ask(content, headers)
            time.sleep(1)
            stop.set()
            thread.join()
            cpu, memory = server.spent()
            waited = f"{np.median(waits):.3f}, {max(waits):.3f} of {len(waits)}"
            row(name, said(answer), f"{cpu:.2f}", f"{memory:.0f}", waited)


def png(mode: str, side: int) -> bytes:
    buffer = io.BytesIO()
    values = np.arange(side, dtype=np.uint16)
    if mode == "I;16":
        Image.fromarray(np.broadcast_to(values * 7, (side, side)).copy()).save(buffer, "PNG", compress_level=1)
    else:
        grey = Image.fromarray(np.broadcast_to(values.astype(np.uint8), (side, side)).copy())
        grey.convert(mode).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def nifti(side: int, depth: int, kind: type[np.number]) -> bytes:
    import nibabel

    values = np.zeros((side, side, depth), kind)
    values[::3] = 100
    return gzip.compress(nibabel.Nifti1Image(values, np.eye(4)).to_bytes(), 1)


def media(folder: Path) -> None:
    """Pictures just below 50 million pixels, a volume just below 2^27 voxels."""
    row("largest accepted", "file MiB", "answer", "decoded MiB", "peak MiB over idle", "ratio", "CPU s")
    row("---", "---:", "---", "---:", "---:", "---:", "---:")
    side = 7071
    cases = [
        ("picture, RGB", "image", png("RGB", side), 3 * side**2),
        ("picture, RGBA", "image", png("RGBA", side), 4 * side**2),
        ("picture, 16-bit grey", "image", png("I;16", side), 3 * side**2),
        ("volume, int16", "volume", nifti(512, 511, np.int16), 4 * 512 * 512 * 511),
        ("volume, float32", "volume", nifti(512, 511, np.float32), 4 * 512 * 512 * 511),
    ]
    for name, kind, content, decoded in cases:
        url = f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
        body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}], "max_tokens": 2}
        with served(folder) as server:
            answer = server.ask(body)
            cpu, memory = server.spent()
        ratio = memory * MIB / (decoded + len(content))
        sizes = (f"{len(content) / MIB:.1f}", said(answer), f"{decoded / MIB:.0f}", f"{memory:.0f}")
        row(name, *sizes, f"{ratio:.2f}", f"{cpu:.1f}")


PARTS = {"prompt": prompts, "json": unwanted_json, "media": media}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    chosen = parser.parse_args().part
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        write_model(folder)
        for name, part in PARTS.items():
            if chosen in (name, "all"):
                part(folder)
                print()


if __name__ == "__main__":
    main()
