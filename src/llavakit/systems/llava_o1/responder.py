"""Answering with a search: `llavakit chat MODEL --responder llava-o1 --search stage --trace`.

Candidates and judgements come from the same model unless another judge, or a reward, is named. What is certain of a
reply is sent while the search goes on. What the search decided is in its trace, one entry a step and one in all, with
counts of what the model computed; tokens are counted by what they were for (`generated`, `judged`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from llavakit.conversation.messages import is_media, normalise, text_of
from llavakit.conversation.turns import Event, TextDelta, TraceEvent
from llavakit.errors import UserError
from llavakit.generation.request import SamplingParams
from llavakit.generation.responder import Call, Responder
from llavakit.generation.response import RawDelta, Usage
from llavakit.generation.search import Branch
from llavakit.generation.stopping import StopStrings
from llavakit.registry import resolve
from llavakit.systems.llava_o1.judging import Judge, shown_text
from llavakit.systems.llava_o1.searching import DESCRIBE, REASON, SAMPLING, SEARCHES, Retracing, Reward, swires
from llavakit.systems.llava_o1.stages import stages_codec

Method = Literal["none", "best_of_n", "best-of-n", "sentence", "stage", "swires"]
WhoJudges = Literal["self", "reward"]
Candidates = Annotated[int, Field(ge=1, le=64)]
Rounds = Annotated[int, Field(ge=1, le=20)]
VERDICT_TOKENS = 512
_VERDICT = re.compile("I choose response [12]")


class SearchBody(BaseModel):
    """A search with its options in one object, as the API takes it.

    Attributes:
        seed: Of the draws of pairs; default: the request's.
        max_rounds: See `SearchOptions.rounds`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Method = "stage"
    candidates: Candidates | None = None
    judge: WhoJudges | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    max_rounds: Rounds | None = None


def _form(value: Any) -> str:
    return "object" if isinstance(value, (Mapping, BaseModel)) else "name"


class SearchOptions(BaseModel):
    """Options of a request.

    Attributes:
        search: How candidates are chosen; "none" is one reply. Or an object, see `SearchBody`.
        candidates: Candidates of every step.
        judge: Who judges them: the model itself, or the reward; default: what the responder was made with.
        rounds: Most rounds of "swires".
    """

    search: Annotated[Annotated[Method, Tag("name")] | Annotated[SearchBody, Tag("object")], Discriminator(_form)] = (
        "none"
    )
    candidates: Candidates = 2
    judge: WhoJudges | None = None
    rounds: Rounds = 5

    def settled(self, given: SearchOptions | None) -> dict[str, Any]:
        """These as defaults of what a request gives: `search`, `candidates`, `judge`, `rounds`, `seed`."""
        found: dict[str, Any] = {"seed": None}
        for options in (self, given):
            if options is None:
                continue
            known = self.model_fields_set if options is self else options.model_fields_set
            own = {name: getattr(options, name) for name in SearchOptions.model_fields}
            own = own if options is self else {name: value for name, value in own.items() if name in known}
            body = own.get("search")
            if isinstance(body, SearchBody):
                named = {"search": body.method, "candidates": body.candidates, "judge": body.judge}
                named |= {"rounds": body.max_rounds, "seed": body.seed}
                own |= {name: value for name, value in named.items() if value is not None}
            found |= own
        found["search"] = found["search"].replace("-", "_")
        return found


class StagedSearch(Responder):
    """A model with a search over its stages.

    Args:
        model: Who writes.
        judge: Who judges: a responder, an address or folder, "self" (the default) or "reward".
        reward: "module:function" that rates replies, for "swires" and as a judge: called with the question, texts and,
            if it takes it, `media` (the conversation's content parts), it returns a number each, higher is better.
        search, candidates, rounds: Defaults of the options of a request.
    """

    options = SearchOptions

    def __init__(
        self,
        model: Responder,
        *,
        judge: str | Responder | None = None,
        reward: str | Reward | None = None,
        search: Any = "none",
        candidates: int = 2,
        rounds: int = 5,
    ) -> None:
        who = judge if judge in ("self", "reward") else None
        if isinstance(judge, str) and who is None:
            from llavakit.generation.load import load

            judge = load(judge)
        other = judge if isinstance(judge, Responder) else None
        super().__init__(model, *([] if other is None else [other]))
        self.judge = other or model
        self.reward: Any = resolve(reward) if isinstance(reward, str) else reward
        self.defaults = SearchOptions.model_validate(self._checked(search, candidates, rounds, who))
        self.settings = {**self.defaults.model_dump(), "reward": str(reward)}

    def _checked(self, search: Any, candidates: Any, rounds: Any, judge: Any) -> dict[str, Any]:
        given = {"search": search, "candidates": candidates, "rounds": rounds, "judge": judge}
        return self._options(given).model_dump()

    def run(self, call: Call) -> Iterator[Event]:
        """One reply; its reasoning is the stages before the conclusion."""
        options = self.defaults.settled(call.options)
        shown = _Visible(call.sampling.stop)
        if options["search"] == "none":
            for event in call.stream(self.main, stop=()):
                yield from shown.cut([event])
                if shown.ended:
                    call.finish_reason, call.stop = "stop", shown.stop
                    return
            yield from shown.rest()
            return
        if not hasattr(self.main, "expand"):
            raise UserError(f"search: {self.main.name} cannot continue a reply; that needs a model that runs here")
        if call.tools:
            raise UserError("search: a search calls no tools; leave them out, or search with none")
        search = _Search(self, call, options)
        parser, sent, reason = stages_codec().parser(), Branch(search.root.request), "stop"
        for branch in search.branches():
            yield TraceEvent(name="step", data=search.step(branch))
            new = branch.text[len(sent.text) :]
            yield RawDelta(text=new, token_ids=branch.ids[len(sent.ids) :])
            yield from shown.cut(parser.feed(new))
            sent, reason = branch, branch.last.finish_reason if branch.last is not None else "stop"
        yield from shown.cut(parser.finish(reason))
        yield from shown.rest()
        call.finish_reason, call.stop = ("stop", shown.stop) if shown.ended else (reason or "stop", None)
        yield TraceEvent(name="search", data=search.trace)


class _Visible:
    """Events whose content ends at a client's stop string; reasoning does not."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stops = StopStrings(tuple(stop)) if stop else None
        self.ended, self.stop = False, None

    def cut(self, events: Sequence[Event]) -> Iterator[Event]:
        """The events up to the stop string."""
        for event in events:
            if self.ended and isinstance(event, TextDelta):
                continue
            if self._stops is None or not isinstance(event, TextDelta):
                yield event
                continue
            text, self.ended = self._stops.push(event.text)
            self.stop = self._stops.met
            if text:
                yield replace(event, text=text)

    def rest(self) -> Iterator[Event]:
        """Text that might have been the beginning of a stop string."""
        if self._stops is not None and not self.ended and (text := self._stops.flush()):
            yield TextDelta(text=text)


class _Search:
    """One search of one reply.

    Attributes:
        root: The prompt.
        trace: Counts so far: candidates, judgements, prompts with their positions, media that were encoded.
    """

    def __init__(self, responder: StagedSearch, call: Call, options: Mapping[str, Any]) -> None:
        self.responder, self.call, self.options = responder, call, options
        self.name, rewarded = options["search"], options["judge"] == "reward"
        if responder.reward is None and (self.name == "swires" or rewarded):
            what = "swires" if self.name == "swires" else "a judge that is a reward"
            raise UserError(f"search: {what} needs a reward (--responder-option reward=module:function)")
        self.by_reward = rewarded
        self.judge = responder.main if options["judge"] == "self" else responder.judge
        messages = normalise(call.messages)
        user = next((turn for turn in reversed(messages) if turn["role"] == "user"), messages[-1])
        self.question = text_of(user).strip()
        self.media = [part for turn in messages for part in turn["content"] if is_media(part)]
        base = call.sampling if call.sampling.temperature else replace(call.sampling, **_sampled())
        self.sampling = replace(base, n=options["candidates"], logprobs=None, stop=())
        self.root = responder.main.begin(messages, before_media=call.before_media)
        self.trace: dict[str, Any] = {"search": self.name, "candidates": options["candidates"]}
        self.trace |= dict.fromkeys(("generated", "judged", "rated", "unclear", "prompts"), 0)
        self.trace |= dict.fromkeys(("prompt_tokens", "reused_tokens", "encoded"), 0)
        self._newest: list[Branch] = []
        self._before = dict(self.trace)

    def branches(self) -> Iterator[Branch]:
        """What is certain of the reply, see `searching`."""
        if self.name == "swires":
            settings = Retracing(rounds=self.options["rounds"])
            return swires(self.expand, self.root, self.sampling, self.rate, self.question, settings)
        seed = self.sampling.seed if self.options["seed"] is None else self.options["seed"]
        draws = np.random.RandomState(None if seed is None else seed % 2**32)
        compare = self.compare_rates if self.by_reward else Judge(self.ask, self.question)
        return SEARCHES[self.name](
            self.expand, self.root, self.sampling, compare, lambda count: int(draws.randint(count))
        )

    def step(self, kept: Branch) -> dict[str, Any]:
        """What was done since the last step, and the candidate that was kept."""
        counts = {name: self.trace[name] - self._before[name] for name in ("generated", "judged", "rated", "encoded")}
        self._before = dict(self.trace)
        texts = [branch.text for branch in self._newest]
        place = next((number for number, branch in enumerate(self._newest) if branch is kept), None)
        return {**counts, "texts": texts, "kept": place}

    def expand(self, branches: Sequence[Branch], wanted: SamplingParams) -> list[list[Branch]]:
        """Candidates, counted."""
        self.call.check()
        grown = self.responder.main.expand(branches, wanted, self._count("generated"), self.call)
        self._newest = [branch for group in grown for branch in group]
        self.trace["generated"] += len(self._newest)
        return grown

    def _count(self, purpose: str) -> Any:
        def count(usage: Usage) -> None:
            self.call.count(replace(usage, details={purpose: usage.completion_tokens}))
            self._computed(usage)

        return count

    def _computed(self, usage: Usage) -> None:
        self.trace["prompts"] += usage.prompt_tokens > 0
        self.trace["prompt_tokens"] += usage.prompt_tokens
        self.trace["reused_tokens"] += usage.cached_tokens
        self.trace["encoded"] += usage.encoded

    def ask(self, text: str, with_media: bool) -> str:
        """The judge's reply."""
        turn = {"role": "user", "content": [*(self.media if with_media else ()), {"type": "text", "text": text}]}
        self.trace["judged"] += 1
        fields = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "stop": ()}
        answer = self.call.ask(
            self.judge, [turn], purpose="judged", max_new_tokens=VERDICT_TOKENS, usage=self._computed, **fields
        )
        reply = answer.text or answer.content
        self.trace["unclear"] += with_media and not _VERDICT.search(reply)
        return reply

    def rate(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """The reward's numbers."""
        self.call.check()
        reward = self.responder.reward
        takes = inspect.signature(reward).parameters if callable(reward) else {}
        more = {"media": self.media} if "media" in takes else {}
        found = reward(prompt, list(texts), **more)
        self.trace["rated"] += len(texts)
        try:
            numbers = [float(value) for value in ([found] if isinstance(found, (int, float)) else found)]
        except (TypeError, ValueError):
            raise UserError(f"reward: must give a number for each text, not {type(found).__name__}") from None
        if len(numbers) != len(texts) or not np.isfinite(numbers).all():
            raise UserError(f"reward: gave {len(numbers)} numbers for {len(texts)} texts; all must be finite")
        return numbers

    def compare_rates(self, kind: str, first: str, second: str) -> int:
        """0 if the first candidate is kept, 1 if the reward rates the second higher."""
        texts = [shown_text(kind, text)[0] for text in (first, second)]
        if None in texts:
            return int(texts[0] is None and texts[1] is not None)
        scores = self.rate(self.question + {"CAPTION": DESCRIBE, "REASONING": REASON}.get(kind, ""), texts)
        return int(scores[1] > scores[0])


def _sampled() -> dict[str, Any]:
    """Greedy candidates would all be the same: the published sampling."""
    return {"temperature": SAMPLING.temperature, "top_p": SAMPLING.top_p}
