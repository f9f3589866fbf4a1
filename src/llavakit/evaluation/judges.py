"""A language model as judge, over any OpenAI-compatible chat API.

    judge = Judge("gpt-4-0314", base_url="https://api.openai.com/v1", cache="judge.jsonl")
    replies = judge.ask_all([[{"role": "user", "content": "..."}], ...])

Replies are kept on disk as they come, so an interrupted run asks only what is left, and a second run asks nothing.
This module knows requests and replies; what is asked and what a reply means is the benchmarks' business
(`benchmarks.judged`). Judge models drift: figures by different judges, or by one judge years apart, do not compare.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from llavakit.errors import UserError
from llavakit.evaluation.records import read_text

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]

_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_WAIT = 60.0


class ReplyCache:
    """Replies by request, one JSON object per line; a line that a kill cut short is dropped.

    Args:
        path: The file, created with its folder; None keeps replies in memory only.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._replies: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file = None
        if path is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = read_text(path)
            for line in text.split("\n"):
                try:
                    entry = json.loads(line)
                    self._replies[entry["key"]] = entry["reply"]
                except (ValueError, KeyError, TypeError):
                    continue
        else:
            text = ""
        self._file = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def get(self, key: str) -> str | None:
        """The reply to a request, None if it was not asked yet."""
        with self._lock:
            return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; it is on disk when this returns."""
        with self._lock:
            self._replies[key] = reply
            if self._file is not None:
                self._file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Judge:
    """A client of one judge model.

    Args:
        model: Name of the model at the server.
        base_url: Address of the API up to and including `/v1`.
        api_key_env: Environment variable with the key; servers without keys need none.
        temperature: Of every request unless it says otherwise; LLaVA-Bench is published with 0.2.
        max_tokens: Longest reply.
        retries: How often a request is repeated after a transient failure (rate limit, server error, lost connection).
        backoff: Seconds before the first repeat; doubled each time, with jitter; the server's `Retry-After` wins.
        concurrency: Requests in flight.
        timeout: Seconds for one request.
        cache: JSONL of replies to resume from, see `ReplyCache`.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        *,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float = 0.2,
        max_tokens: int = 1024,
        retries: int = 6,
        backoff: float = 1.0,
        concurrency: int = 8,
        timeout: float = 120.0,
        cache: str | Path | None = None,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise UserError("judges need httpx; install llavakit[eval]") from error
        self.model, self.base_url = model, base_url.rstrip("/")
        self.temperature, self.max_tokens = temperature, max_tokens
        self.retries, self.backoff, self.concurrency = retries, backoff, concurrency
        self.api_key_env = api_key_env
        key = os.environ.get(api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx
        self._client = httpx.Client(headers=headers, timeout=timeout)
        self.cache = ReplyCache(cache)

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and the cache."""
        self._client.close()
        self.cache.close()

    def ask(self, messages: Messages, temperature: float | None = None, attempt: int = 0) -> str:
        """The reply to a conversation, from the cache if it was asked before.

        Args:
            attempt: Number that tells a repeated question from its first asking.

        Raises:
            UserError: If the server refuses the request, or keeps failing.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature if temperature is None else temperature,
            "max_tokens": self.max_tokens,
        }
        identity = json.dumps([self.base_url, attempt, body], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(identity.encode()).hexdigest()
        reply = self.cache.get(key)
        if reply is None:
            reply = self._request(body)
            self.cache.put(key, reply)
        return reply

    def ask_parsed(
        self, messages: Messages, parse: Callable[[str], T | None], temperatures: Sequence[float]
    ) -> T | None:
        """Ask at each temperature in turn until `parse` makes something of the reply; None if it never does."""
        for attempt, temperature in enumerate(temperatures):
            found = parse(self.ask(messages, temperature, attempt))
            if found is not None:
                return found
        return None

    def ask_all(self, conversations: Iterable[Messages]) -> list[str]:
        """Replies to many conversations, in their order, asked at the same time."""
        return self.map(self.ask, conversations)

    def map(self, function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        """`function` of every item in `concurrency` threads, with progress; results in order of the items.

        Raises:
            UserError: The first failure; what is not begun is dropped, what was answered stays in the cache.
        """
        items = list(items)
        results: list[Any] = [None] * len(items)
        with ThreadPoolExecutor(self.concurrency) as pool, _progress() as progress:
            task = progress.add_task(f"asking {self.model}", total=len(items))
            futures = {pool.submit(function, item): place for place, item in enumerate(items)}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results

    def _request(self, body: dict[str, Any]) -> str:
        url = f"{self.base_url}/chat/completions"
        wait, problem = self.backoff, ""
        for repeat in range(self.retries + 1):
            if repeat:
                time.sleep(min(wait, _LONGEST_WAIT))
            delay = None
            try:
                response = self._client.post(url, json=body)
            except self._http.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            except self._http.InvalidURL as error:
                raise UserError(f"judge address {self.base_url!r} is not a URL: {error}") from error
            else:
                if response.status_code == 200:
                    return self._reply(response)
                problem = f"HTTP {response.status_code}: {response.text[:200]}".replace("\n", " ")
                if response.status_code in (401, 403):
                    raise UserError(f"{url}: {problem}; is the key in ${self.api_key_env} right?")
                if response.status_code not in _TRANSIENT:
                    raise UserError(f"{url}: {problem}")
                delay = _seconds(response.headers.get("retry-after"))
            wait = delay if delay is not None else self.backoff * 2**repeat * random.uniform(0.75, 1.25)
        raise UserError(f"{url}: still failing after {self.retries + 1} tries; the last answer was {problem}")

    def _reply(self, response: Any) -> str:
        try:
            reply = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.base_url}: the reply is not a chat completion: {response.text[:200]!r}") from error
        return reply or ""  # null content is an empty reply


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:  # an HTTP date
        return None


def _progress() -> Progress:
    return Progress(console=Console(stderr=True), transient=True)


# Reviews of two answers


def parse_pair(review: str) -> list[float]:
    """The two scores in the first line of a review; [-1, -1] if it is not exactly two numbers with a space between.

    Commas count as spaces, so "9, 8" (then two spaces) fails as it did in the published evaluation.
    """
    fields = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(field) for field in fields] if len(fields) == 2 else [-1, -1]
    except ValueError:
        return [-1, -1]


def review_content(
    context: str | Sequence[str], question: str, first: str, second: str, rule: str, role: str = "Assistant"
) -> str:
    """What a judge is shown of two answers: context, question, both answers, instruction.

    Args:
        context: Caption of the image, or several that become lines.
        rule: The instruction to the judge.
        role: What the answers' authors are called.
    """
    context = context if isinstance(context, str) else "\n".join(context)
    parts = [("Context", context), ("Question", question)]
    blocks = [f"[{name}]\n{text}\n\n" for name, text in parts]
    blocks += [f"[{role} {n}]\n{text}\n\n[End of {role} {n}]\n\n" for n, text in ((1, first), (2, second))]
    return "".join(blocks) + f"[System]\n{rule}\n\n"


def review_record(
    number: int, question: dict[str, Any], first_id: Any, second_id: Any, category: str, reply: str
) -> dict[str, Any]:
    """A review as the published files keep it; `number` counts from 1."""
    return {
        "id": number,
        "question_id": question["question_id"],
        "answer1_id": first_id,
        "answer2_id": second_id,
        "category": category,
        "content": reply,
        "tuple": parse_pair(reply),
    }
