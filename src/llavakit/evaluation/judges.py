"""A language model as judge: any responder, one that runs here or one behind an API.

    judge = Judge("gpt-4-0314", cache="judge.jsonl")
    judge = Judge("runs/critic", cache="judge.jsonl")  # a model folder
    replies = judge.ask_all([[{"role": "user", "content": "..."}], ...])

A failed call is no verdict: `ask_all` and `map` return a `CallFailed` in its place, which is not counted.
What is asked and what a reply means is the benchmarks' business (`benchmarks.judged`). Judge models drift: figures by
different judges, or by one judge years apart, do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llavakit.generation.asking import Asker
from llavakit.generation.load import load
from llavakit.generation.remote import APIClient, CallFailed, RemoteResponder
from llavakit.generation.request import SamplingParams
from llavakit.generation.responder import Messages, Responder

T = TypeVar("T")


class Judge(Asker):
    """A judge model.

    Args:
        model: A responder, a model folder, an address (`http://host:8000/v1#NAME`), or the name of a model at
            `base_url`.
        base_url: Address of the API up to and including `/v1`.
        temperature: Of every question unless it says otherwise; LLaVA-Bench is published with 0.2.
        max_tokens: Longest reply.
        concurrency: Questions in flight.
        cache: JSONL of replies to resume from.
        api: Further options of `APIClient`: `api_key_env`, `retries`, `timeout`, `price_in`, `price_out`, `max_cost`.
    """

    def __init__(
        self,
        model: str | Path | Responder,
        base_url: str | None = None,
        *,
        temperature: float = 0.2,
        max_tokens: int = 1024,
        concurrency: int | None = None,
        cache: str | Path | None = None,
        **api: Any,
    ) -> None:
        if isinstance(model, Responder):
            responder = model
        elif base_url is None and (Path(model).is_dir() or str(model).startswith(("http://", "https://"))):
            responder = load(model, **({"api": api} if api else {}))
        else:
            client = APIClient(base_url, concurrency=concurrency or 8, **api)
            responder = RemoteResponder(client, str(model))
        sampling = SamplingParams(temperature=temperature, max_new_tokens=max_tokens)
        super().__init__(responder, sampling=sampling, cache=cache, concurrency=concurrency)

    def ask(self, messages: Messages, temperature: float | None = None, attempt: int = 0) -> str:
        """The text of the reply to a conversation, from the cache if it was asked before; see `Asker.answer`."""
        fields = {} if temperature is None else {"temperature": temperature}
        return self.answer(messages, attempt=attempt, **fields).content

    def ask_parsed(
        self, messages: Messages, parse: Callable[[str], T | None], temperatures: Sequence[float]
    ) -> T | None:
        """Ask at each temperature in turn until `parse` makes something of the reply; None if it never does."""
        for attempt, temperature in enumerate(temperatures):
            found = parse(self.ask(messages, temperature, attempt))
            if found is not None:
                return found
        return None

    def ask_all(self, conversations: Iterable[Messages], **fields: Any) -> list[str | CallFailed]:
        """The texts of the replies to many conversations, in their order, asked at the same time."""
        answers = super().ask_all(conversations, **fields)
        return [answer if isinstance(answer, CallFailed) else answer.content for answer in answers]
