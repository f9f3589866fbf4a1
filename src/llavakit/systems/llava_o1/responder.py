"""Answering with a search: `llavakit chat MODEL --responder llava-o1 --search stage`.

Candidates and judgements come from the same model unless another judge is named. What the search decided is in the
trace; tokens are counted by what they were for (`generated`, `judged`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from llavakit.conversation.messages import is_media, normalise, text_of
from llavakit.conversation.turns import Event, TraceEvent
from llavakit.errors import UserError
from llavakit.generation.request import SamplingParams
from llavakit.generation.responder import Call, Responder
from llavakit.generation.response import Usage
from llavakit.generation.search import Branch
from llavakit.registry import resolve
from llavakit.systems.llava_o1.judging import Judge
from llavakit.systems.llava_o1.searching import SAMPLING, SEARCHES, Retracing, Reward, swires
from llavakit.systems.llava_o1.stages import stages_codec


class SearchOptions(BaseModel):
    """Options of a request.

    Attributes:
        search: How candidates are chosen; "none" is one reply.
        candidates: Candidates of every step.
        rounds: Most rounds of "swires".
    """

    search: Literal["none", "best_of_n", "best-of-n", "sentence", "stage", "swires"] = "none"
    candidates: int = Field(2, ge=1, le=64)
    rounds: int = Field(5, ge=1, le=20)


class StagedSearch(Responder):
    """A model with a search over its stages.

    Args:
        model: Who writes.
        judge: Who judges: an address or folder; default: the model itself.
        reward: "module:function" that rates replies for "swires": called with the question and texts, it returns
            numbers, higher is better.
        search, candidates, rounds: Defaults of the options of a request.
    """

    options = SearchOptions

    def __init__(
        self,
        model: Responder,
        *,
        judge: str | Responder | None = None,
        reward: str | Reward | None = None,
        search: str = "none",
        candidates: int = 2,
        rounds: int = 5,
    ) -> None:
        if isinstance(judge, str):
            from llavakit.generation.load import load

            judge = load(judge)
        super().__init__(model, *([] if judge is None else [judge]))
        self.judge = judge or model
        self.reward: Any = resolve(reward) if isinstance(reward, str) else reward
        self.defaults = SearchOptions(search=search, candidates=candidates, rounds=rounds)
        self.settings = {**self.defaults.model_dump(), "reward": str(reward)}

    def run(self, call: Call) -> Iterator[Event]:
        """One reply; its reasoning is the stages before the conclusion."""
        chosen = self.defaults if call.options is None else call.options
        given = chosen.model_fields_set if call.options is not None else set()
        options = self.defaults.model_copy(update={name: getattr(chosen, name) for name in given})
        name = options.search.replace("-", "_")
        if name == "none":
            yield from call.stream(self.main)
            return
        if not hasattr(self.main, "expand"):
            raise UserError(f"search: {self.main.name} cannot continue a reply; that needs a model that runs here")
        trace: dict[str, Any] = {"search": name, "candidates": options.candidates, "generated": 0, "judged": 0}
        branch = self._searched(call, options, name, trace)
        parser = stages_codec().parser()
        yield from parser.feed(branch.text)
        reason = branch.last.finish_reason if branch.last is not None else "stop"
        yield from parser.finish(reason)
        call.finish_reason = reason or "stop"
        yield TraceEvent(name="search", data=trace)

    def _searched(self, call: Call, options: SearchOptions, name: str, trace: dict[str, Any]) -> Branch:
        messages = normalise(call.messages)
        user = next((turn for turn in reversed(messages) if turn["role"] == "user"), messages[-1])
        question, media = text_of(user).strip(), [part for part in user["content"] if is_media(part)]
        base = call.sampling if call.sampling.temperature else replace(call.sampling, **_sampled())
        sampling = replace(base, n=options.candidates, logprobs=None)

        def expand(branches: Sequence[Branch], wanted: SamplingParams) -> list[list[Branch]]:
            grown = self.main.expand(branches, wanted)
            tokens = sum(len(b.last.token_ids) for group in grown for b in group if b.last is not None)
            call.count(Usage(completion_tokens=tokens, details={"generated": tokens}))
            trace["generated"] += sum(map(len, grown))
            return grown

        def ask(text: str, with_media: bool) -> str:
            content = [*(media if with_media else ()), {"type": "text", "text": text}]
            trace["judged"] += 1
            turn = [{"role": "user", "content": content}]
            return call.ask(self.judge, turn, purpose="judged", stop=(), max_new_tokens=512).content

        root = self.main.begin(messages)
        if name == "swires":
            if self.reward is None:
                raise UserError("search: swires needs a reward (--responder-option reward=module:function)")
            return swires(expand, root, sampling, self.reward, question, Retracing(rounds=options.rounds))
        draws = np.random.RandomState(None if sampling.seed is None else sampling.seed % 2**32)
        return SEARCHES[name](expand, root, sampling, Judge(ask, question), lambda count: int(draws.randint(count)))


def _sampled() -> dict[str, Any]:
    """Greedy candidates would all be the same: the published sampling."""
    return {"temperature": SAMPLING.temperature, "top_p": SAMPLING.top_p}
