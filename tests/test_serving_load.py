"""Many clients at once through real HTTP: nobody gets another's answer, the poisoned fail alone, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
import httpx
from tiny_server import Running, ask, data_url, png, small_chat

from llavakit.generation import Engine
from llavakit.generation.engine import _Row
from llavakit.generation.request import RequestHandle
from llavakit.media.policy import decode_data_url
from llavakit.serving.answer import Answer
from llavakit.serving.app import Settings

CONCURRENCY = 16
QUESTIONS = [
    "What is in this picture?",
    "A red square?",
    "and a blue disc",
    "What? " * 12,
    "Is this a picture of a disc?",
]


@dataclass
class Kind:
    """A request that is sent again and again, and what a single one is answered.

    Attributes:
        poisoned: Whether it must fail.
    """

    body: dict[str, Any]
    text: str = ""
    poisoned: bool = False


@dataclass
class Tally:
    """What happened to all requests."""

    whole: int = 0
    left: int = 0
    failed: int = 0
    wrong: list[Any] = field(default_factory=list)


def kinds() -> list[Kind]:
    made = []
    for number, question in enumerate(QUESTIONS):
        for colour in (None, "red", "blue"):
            url = None if colour is None else data_url(png(colour, (40, 30 + number)))
            body = {"model": "tiny", "messages": ask(question, url), "max_tokens": 6 + 3 * number}
            if number % 2:
                body |= {"temperature": 1.0, "seed": number}
            made.append(Kind(body))
    return made


def alone(chat: Any, body: dict[str, Any]) -> Any:
    """The reply of an engine that holds one request and remembers nothing."""
    engine = Engine(chat.model, chat.processor.tokenizer, max_batch=1, prefix_bytes=0, feature_bytes=0)
    messages = [{"role": "user", "content": [_part(part) for part in body["messages"][0]["content"]]}]
    sampling = {name: body[name] for name in ("temperature", "seed") if name in body}
    request = chat.request(messages, max_new_tokens=body["max_tokens"], **sampling)
    return engine.submit(request).result()


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    return {"type": "image", "image": decode_data_url(part["image_url"]["url"], 10**6)}


def poison(chat: Any, healthy: list[Kind]) -> list[Kind]:
    """Requests that break in the engine: one while its prompt is computed, one in the middle of its reply.

    Embeddings of two tokens become NaN: one that only a poisoned prompt holds, and one that only a certain sampled
    reply says.
    """
    tokenizer, table = chat.processor.tokenizer, chat.model.get_input_embeddings().weight
    prompt = {"model": "tiny", "messages": ask("poison: §"), "max_tokens": 8}
    reply = {"model": "tiny", "messages": ask("blue"), "max_tokens": 30, "temperature": 2.0, "seed": 11}
    needed = {token for kind in healthy for token in alone(chat, kind.body).token_ids}
    for question in QUESTIONS:
        needed.update(tokenizer(question)["input_ids"])
    rare = next(token for token in alone(chat, reply).token_ids[3:] if token not in needed)
    mark = next(token for token in tokenizer("§", add_special_tokens=False)["input_ids"] if token not in needed)
    with torch.no_grad():
        table[[rare, mark]] = torch.nan
    return [Kind(prompt, poisoned=True), Kind(reply, poisoned=True)]


async def client(web: httpx.AsyncClient, work: list[tuple[Kind, float, float]], tally: Tally) -> None:
    while work:
        kind, seconds, events = work.pop()
        text, error, left = "", None, True
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(seconds),
                web.stream("POST", "/v1/chat/completions", json=kind.body | {"stream": True}) as response,
            ):
                if response.status_code != 200:
                    error = (await response.aread()).decode()
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        event = json.loads(line.removeprefix("data: "))
                        error = event.get("error", error)
                        text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                        events -= 1
                        if events < 0:
                            break
                else:
                    left = False
        if left:
            tally.left += 1
            good = kind.text.startswith(text.strip()) or kind.poisoned
        elif kind.poisoned:
            tally.failed += 1
            good = error is not None and "failed" in error["message"]
        else:
            tally.whole += 1
            good = error is None and text == kind.text
        if not good:
            tally.wrong.append((kind.body, kind.text, text, error))


async def storm(url: str, requests: int, healthy: list[Kind], poisoned: list[Kind], seed: int = 0) -> Tally:
    """Stream so many requests, sixteen at a time.

    Every tenth is poisoned; every tenth client leaves before an answer can have begun, every fifth after some events.
    """
    source, tally = random.Random(seed), Tally()
    work = []
    for _ in range(requests):
        kind = source.choice(poisoned if source.random() < 0.1 else healthy)
        seconds = source.random() * 0.05 if source.random() < 0.1 else 60.0
        work.append((kind, seconds, source.choice([0, 1, 2, 5]) if source.random() < 0.2 else float("inf")))
    async with httpx.AsyncClient(base_url=url, timeout=60) as web:
        await asyncio.gather(*(client(web, work, tally) for _ in range(CONCURRENCY)))
    return tally


def settle(service: Any) -> None:
    """Wait until the server has noticed that everybody is gone."""
    deadline = time.time() + 10
    while (service.active or service.responder.engine.busy) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # for the last connection's task to end


def left_over() -> dict[str, int]:
    """Objects of requests that are still alive."""
    gc.collect()
    found = dict.fromkeys(("Answer", "Handle", "_Row"), 0)
    for one in gc.get_objects():
        if type(one) in (Answer, RequestHandle, _Row):
            found[type(one).__name__] += 1
    return found


@pytest.fixture(scope="module")
def loaded():
    chat = small_chat()
    healthy = kinds()
    poisoned = poison(chat, healthy)
    for kind in healthy:
        kind.text = alone(chat, kind.body).text.strip()
    running = Running(chat, Settings(names=("tiny",)))
    logging.getLogger("llavakit.serving").disabled = True  # pytest would keep the errors, and with them the requests
    yield running, healthy, poisoned
    running.stop()
    logging.getLogger("llavakit.serving").disabled = False


def check(loaded: Any, requests: int) -> None:
    running, healthy, poisoned = loaded
    service = running.app.state.service
    asyncio.run(storm(running.url, 50, healthy, poisoned, seed=1))  # thread pools and caches are filled now
    settle(service)
    held, threads, memory = left_over(), threading.active_count(), psutil.Process().memory_info().rss
    tally = asyncio.run(storm(running.url, requests, healthy, poisoned))
    settle(service)
    assert tally.wrong == []
    assert tally.whole + tally.left + tally.failed == requests
    assert tally.left > requests / 10
    assert tally.failed > requests / 25
    assert (service.active, service.responder.engine.active, service.responder.engine.waiting) == (0, 0, 0)
    assert left_over() == held
    # pools of threads may still fill up; a leak would be one thread per request
    assert threading.active_count() <= threads + requests // 20
    grown = psutil.Process().memory_info().rss - memory
    assert grown < 40 * 2**20, f"{grown / 2**20:.0f} MiB more"


def test_a_hundred_clients_come_and_go(loaded):
    check(loaded, 100)


@pytest.mark.slow
def test_a_thousand_clients_come_and_go(loaded):
    check(loaded, 1000)
