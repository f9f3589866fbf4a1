"""Dialogues with tools through the server while some of the tools fail or hang: python benchmarks/agents.py

A scripted model calls a tool with its dialogue's own number; nine of ten calls answer with a picture and a figure, one
in twenty fails, one in twenty hangs until its time is over. Every answer must be about its own number or say what went
wrong, and afterwards neither threads nor memory may stay behind.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import openai
import psutil
from PIL import Image

from llavakit.conversation.turns import Event
from llavakit.generation.responder import Call, Responder
from llavakit.generation.response import RawDelta
from llavakit.serving.app import Settings, create_app
from llavakit.serving.process import http_server
from llavakit.systems.llava_plus.agent import ToolUser
from llavakit.systems.llava_plus.grammar import ThreeLines
from llavakit.tools import Limits, Outcome, Skill, Toolbox
from llavakit.tools.skill import parameters

SECONDS = 2.0  # of a call


def lines(actions: list[dict], value: str) -> str:
    """A reply in three lines."""
    return f'"thoughts🤔" t\n"actions🚀" {json.dumps(actions)}\n"value👉" {value}'


class Model(Responder):
    """Calls the tool with the number that it is asked about, and repeats what the tool found."""

    def run(self, call: Call) -> Iterator[Event]:
        texts = ["".join(part["text"] for part in message["content"]) for message in call.messages]
        number = int(texts[0])
        wanted = [{"API_name": "double", "API_params": {"number": number}}]
        text = lines(wanted, "wait") if len(texts) == 1 else lines([], texts[-1].partition("\n")[0])
        parser = ThreeLines().parser()
        yield RawDelta(text=text)
        yield from parser.feed(text)
        yield from parser.finish()


def double(number: int) -> Outcome:
    """Twice a number, and a picture."""
    if number % 20 == 3:
        raise RuntimeError(f"no {number}")
    if number % 20 == 13:
        time.sleep(2 * SECONDS)
    return Outcome({"double": 2 * number}, {"edited_image": Image.new("RGB", (64, 64), (number % 256, 0, 0))})


async def ask(client: openai.AsyncOpenAI, number: int, gate: asyncio.Semaphore) -> str:
    """What became of one dialogue."""
    async with gate:
        answer = await client.chat.completions.create(
            model="agent", messages=[{"role": "user", "content": str(number)}]
        )
    message = answer.choices[0].message
    pictures = (message.model_extra or {}).get("images") or []
    if message.content == f"double model outputs: {{'double': {2 * number}}}" and len(pictures) == 1:
        return "right"
    if number % 20 == 3 and f"no {number}" in message.content:
        return "failure told"
    if number % 20 == 13 and ("gave no answer" in message.content or "does not answer" in message.content):
        return "hanging told"
    if "does not answer" in message.content:
        return "refused while others hang"
    return "wrong"


async def all_dialogues(url: str, count: int, concurrency: int) -> Counter[str]:
    """What became of all of them."""
    client, gate = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0), asyncio.Semaphore(concurrency)
    return Counter(await asyncio.gather(*(ask(client, number, gate) for number in range(count))))


def main() -> None:
    """Run and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--dialogues", type=int, default=500)
    arguments.add_argument("--concurrency", type=int, default=16)
    given = arguments.parse_args()
    skill = Skill(
        name="double",
        description="Twice a number.",
        parameters=parameters(("number",), number={"type": "integer"}),
        function=double,
    )
    box = Toolbox([skill], limits=Limits(seconds=SECONDS, hanging=16))
    responder = ToolUser(Model(name="agent", capacity=given.concurrency), tools=box)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = http_server(create_app(responder, Settings(names=("agent",))), 64, port=port, log_level="error")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    process, url = psutil.Process(os.getpid()), f"http://127.0.0.1:{port}/v1"
    asyncio.run(all_dialogues(url, 40, given.concurrency))  # warm
    gc.collect()
    memory, threads, began = process.memory_info().rss, threading.active_count(), time.perf_counter()
    found = asyncio.run(all_dialogues(url, given.dialogues, given.concurrency))
    seconds = time.perf_counter() - began
    time.sleep(2 * SECONDS)
    gc.collect()
    print(f"{given.dialogues} dialogues, {given.concurrency} at a time, in {seconds:.1f} s")
    for name, count in sorted(found.items()):
        print(f"  {count:4} {name}")
    print(f"threads {threads} before, {threading.active_count()} after")
    print(f"memory {memory / 2**20:.0f} MiB before, {process.memory_info().rss / 2**20:.0f} MiB after")
    server.should_exit = True
    thread.join(10)
    if found["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
