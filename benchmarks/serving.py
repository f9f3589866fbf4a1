"""The server beside what a user of transformers would run: `generate` one request at a time, and `transformers serve`.

    python benchmarks/serving.py [--part rate|first|all] [--repeats 5] [--layers 6] [--width 256]

One model in two layouts (llavakit's and transformers' own), one core for whoever answers, the client on the others.
Every request is a picture of its own and a question; answers are compared, and must be equal.

- rate: requests per second of 64 new tokens each: the server at concurrency 16, and transformers one at a time, with
  processor, chat template and decoding of the reply on both sides. Taken in turns, wall and processor time.
- first: time to the first token at concurrency 1: the server over HTTP, streaming, and the bare engine in a process of
  its own, with a picture that neither has seen. Taken in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
import numpy as np
import psutil
import torch
import transformers
from PIL import Image

from llavakit.checkpoints.convert import convert, save
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.phantom.tokenizer import tiny_tokenizer

IMAGE, PATCH, NEW = 96, 12, 64
QUESTION = "What is in this picture, and what colour is it?"
CORE = max(os.sched_getaffinity(0))


def write_models(folder: Path, layers: int, width: int) -> tuple[Path, Path]:
    """A random LLaVA-1.5 with 64 visual tokens in llavakit's layout and in transformers'."""
    tokenizer = tiny_tokenizer(vocab_size=1200)
    text = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    torch.manual_seed(0)
    config = LlavakitConfig(
        text_config=text,
        vision_config=vision,
        media={"image": {"views": {"type": "pad", "size": IMAGE}}},
        image_token_id=len(tokenizer) - 1,
        template="vicuna_v1",
    )
    model = LlavakitForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) - 1 :] = 0  # ids without a text are not said
        model.lm_head.weight[: 3 + 256] = 0  # nor special ones and bytes
    save(model.state_dict(), config, LlavakitProcessor.from_config(config, tokenizer), folder / "own")
    convert(folder / "own", folder / "hf", to="hf")
    return folder / "own", folder / "hf"


def picture(seed: int) -> bytes:
    """A PNG that nobody has seen."""
    values = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((IMAGE, IMAGE)).save(buffer, "PNG")
    return buffer.getvalue()


def body(content: bytes, model: str, new: int = NEW, **fields: Any) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": new, **fields}


@contextmanager
def pinned(command: list[str], ready: Callable[[], bool]) -> Iterator[psutil.Process]:
    """A process on the core of those who answer."""
    process = subprocess.Popen(["taskset", "-c", str(CORE), *command])
    try:
        while not ready():
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


async def ask_all(url: str, bodies: list[dict[str, Any]], concurrency: int) -> list[str]:
    """Texts of the answers, in order."""
    texts: dict[int, str] = {}
    waiting = list(enumerate(bodies))

    async def worker(client: httpx.AsyncClient) -> None:
        while waiting:
            number, one = waiting.pop(0)
            answer = await client.post(url + "/v1/chat/completions", json=one)
            answer.raise_for_status()
            texts[number] = answer.json()["choices"][0]["message"]["content"].strip()

    async with httpx.AsyncClient(timeout=600) as client:
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))
    return [texts[number] for number in range(len(bodies))]


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


# Others in processes of their own, spoken to by lines of JSON


def worker(kind: str, folder: str) -> None:
    """Answer requests that come as lines: {"picture": base64, "new": tokens}."""
    torch.set_num_threads(1)
    answer = {"generate": one_at_a_time, "engine": bare_engine}[kind](folder)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        content = base64.b64decode(request["picture"])
        wall, cpu = time.perf_counter(), time.process_time()
        text, first = answer(content, request["new"])
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "first": first - wall}
        print(json.dumps({"text": text, **seconds}), flush=True)


def one_at_a_time(folder: str) -> Callable[[bytes, int], tuple[str, float]]:
    """transformers' own model, processor and `generate`."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)

    def answer(content: bytes, new: int) -> tuple[str, float]:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        inputs = processor(images=image, text=text, return_tensors="pt")
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        output = model.generate(**inputs, **options)
        reply = output[0, inputs["input_ids"].shape[1] :]
        return processor.decode(reply, skip_special_tokens=True).strip(), time.perf_counter()

    return answer


def bare_engine(folder: str) -> Callable[[bytes, int], tuple[str, float]]:
    """llavakit's engine without a server."""
    import llavakit

    chat = llavakit.load(folder)

    def answer(content: bytes, new: int) -> tuple[str, float]:
        parts = [{"type": "image", "image": content}, {"type": "text", "text": QUESTION}]
        request = chat.request([{"role": "user", "content": parts}], max_new_tokens=new)
        times: list[float] = []
        handle = chat.engine.submit(request, listener=lambda piece: times.append(time.perf_counter()))
        return handle.result().text.strip(), times[0]

    return answer


class Worker:
    """A process that answers one request after the other."""

    def __init__(self, kind: str, folder: Path) -> None:
        command = ["taskset", "-c", str(CORE), sys.executable, __file__, "--worker", kind, "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> Any:
        return json.loads(self._process.stdout.readline())

    def __call__(self, content: bytes, new: int) -> dict[str, Any]:
        line = json.dumps({"picture": base64.b64encode(content).decode(), "new": new})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)


# What is measured


def rate(own: Path, hf: Path, repeats: int) -> None:
    """Requests per second."""
    port, other = 8765, 8766
    command = [sys.executable, "-m", "llavakit", "serve", str(own), "--port", str(port), "--no-web"]
    theirs = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(hf), "--device", "cpu"]
    theirs += ["--port", str(other)]
    generate = Worker("generate", hf)
    with (
        pinned(command, lambda: answers(f"http://127.0.0.1:{port}/health")) as server,
        pinned(theirs, lambda: answers(f"http://localhost:{other}/health")) as serve,
    ):
        print("Requests per second (per second of processor time), and llavakit's ratio to the others, wall (CPU)\n")
        print("| run | generate | transformers serve | llavakit serve | to generate | to transformers serve |")
        print("|---|---|---|---|---|---|")
        ratios = []
        for repeat in range(-1, repeats):
            pictures = [picture(1000 * repeat + number + 5000) for number in range(48)]
            few = [generate(content, NEW) for content in pictures[:6]]
            single = 6 / sum(one["wall"] for one in few), 6 / sum(one["cpu"] for one in few)
            many = timed(server, f"http://127.0.0.1:{port}", [body(one, "own") for one in pictures])
            extra = {"temperature": 0}
            others = timed(serve, f"http://localhost:{other}", [body(one, str(hf), **extra) for one in pictures[:6]])
            assert many[2][:6] == [one["text"] for one in few], "the server and generate differ"
            assert others[2] == many[2][:6], "transformers serve and llavakit differ"
            if repeat < 0:
                continue  # everything is warm now
            cells = [single, others[:2], many[:2], _ratio(many, single), _ratio(many, others)]
            ratios.append(cells[3] + cells[4])
            print(f"| {repeat + 1} |", *(f"{wall:.2f} ({cpu:.2f}) |" for wall, cpu in cells), flush=True)
        medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
        print("| median | | | | {:.2f} ({:.2f}) | {:.2f} ({:.2f}) |".format(*medians))
    generate.stop()


def _ratio(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[float, float]:
    return one[0] / other[0], one[1] / other[1]


def timed(process: psutil.Process, url: str, bodies: list[dict[str, Any]]) -> tuple[float, float, list[str]]:
    """Requests per second, per second of processor time, and the answers."""
    wall, cpu = time.perf_counter(), spent(process)
    texts = asyncio.run(ask_all(url, bodies, 16))
    return len(bodies) / (time.perf_counter() - wall), len(bodies) / (spent(process) - cpu), texts


def first(own: Path, repeats: int) -> None:
    """Milliseconds to the first token."""
    port = 8767
    command = [sys.executable, "-m", "llavakit", "serve", str(own), "--port", str(port), "--no-web"]
    engine = Worker("engine", own)
    with pinned(command, lambda: answers(f"http://127.0.0.1:{port}/health")), httpx.Client(timeout=60) as client:

        def streamed(content: bytes) -> tuple[str, float]:
            one, began = body(content, "own", 8, stream=True), time.perf_counter()
            text, seconds = "", 0.0
            with client.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=one) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                        if text and not seconds:
                            seconds = time.perf_counter() - began
            return text, seconds

        found: list[tuple[float, float]] = []
        for number in range(10 * repeats + 4):
            content = picture(number)
            if number % 2:
                (text, seconds), bare = streamed(content), engine(content, 8)
            else:
                bare, (text, seconds) = engine(content, 8), streamed(content)
            assert text == bare["text"], "the server and the engine differ"
            found.append((bare["first"] * 1000, seconds * 1000))
        engines, servers = zip(*found[4:], strict=True)
        differences = sorted(server - engine for engine, server in found[4:])
        print("| | engine, ms | server, ms | difference, ms |")
        print("|---|---|---|---|")
        for name, pick in (("lowest", min), ("median", statistics.median), ("highest", max)):
            print(f"| {name} | {pick(engines):.1f} | {pick(servers):.1f} | {pick(differences):.1f} |")
    engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["rate", "first", "all"], default="all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--worker", choices=["generate", "engine"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder)
        return
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {CORE} or {CORE})
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one core, float32")
    print(f"Llama {options.layers} x {options.width}, {NEW} new tokens\n")
    with tempfile.TemporaryDirectory() as scratch:
        own, hf = write_models(Path(scratch), options.layers, options.width)
        if options.part in ("rate", "all"):
            rate(own, hf, options.repeats)
            print()
        if options.part in ("first", "all"):
            first(own, options.repeats)


if __name__ == "__main__":
    main()
