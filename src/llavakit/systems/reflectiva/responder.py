"""Answering in ReflectiVA's way: `llavakit chat MODEL --image a.jpg --store STORE`.

1. The model answers the question, or asks for passages with its first token.
2. Pages that look like the picture are retrieved, and the model says of every passage whether it helps.
3. It answers from the passages that do; where none does, from one that is drawn.

All prompts begin alike with the system text, the picture and the question, whose states are computed once. Judgements
are taken from the likeliest first token, many passages in one forward pass. With `decisions=sampled` every judgement is
a whole generation by the request's own sampling, as in the original, which samples at temperature 0.2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from llavakit.conversation.messages import normalise, text_of
from llavakit.conversation.turns import Event, ReasoningDelta, TextDelta, TraceEvent
from llavakit.errors import UserError
from llavakit.generation.responder import Call, Responder
from llavakit.generation.response import Usage
from llavakit.systems.reflectiva.knowledge import SHORTEST, Knowledge, Passage
from llavakit.systems.reflectiva.prompts import DEFAULT, answer, frame_of, judgement
from llavakit.systems.reflectiva.tokens import NO_RELEVANT, NO_RETRIEVAL, RELEVANT, RETRIEVAL, id_of

if TYPE_CHECKING:
    from llavakit.retrieval.retriever import Retriever

TOGETHER = 16  # passages that are judged in one forward pass
MOST_PASSAGES = 256  # of one question
SHOWN = 60  # characters of a passage in the line that says what became of it


class ReflectionOptions(BaseModel):
    """Options of a request.

    Attributes:
        retrieve: Whether passages are looked up: as the model asks for them, "always", or "never".
        pages: How many pages are read.
        short: Whether a short answer is asked for when passages were read, as in the published evaluations.
        decisions: "forward" or "sampled", see the module.
    """

    retrieve: Literal["auto", "always", "never"] = "auto"
    pages: int = Field(5, ge=1, le=100)
    short: bool = True
    decisions: Literal["forward", "sampled"] = "forward"


class Judged(BaseModel):
    """What became of a passage.

    Attributes:
        page, title, text: Of the passage.
        kept: Whether the answer is from it.
        confidence: Probability of "helps" against "does not"; None if it was sampled.
    """

    page: str
    title: str
    text: str
    kept: bool
    confidence: float | None = None


class Reflection(Responder):
    """A model that looks up what it does not know.

    Args:
        model: Who asks, judges and answers.
        store: Where pages are: a store's folder, or a retriever. Without one, questions are answered from the model
            alone.
        encoder: Encoder of the store's queries; default: the one that the store names.
        approximate: Whether the store's index is asked instead of comparing every vector.
        shortest: Characters of a passage, shorter ones are left out.
        template_paragraph: Name of the text around a passage; default: what the checkpoint says.
        draw: Gives a number below its argument, to choose a passage where none helps; default: by the request's seed.
        retrieve, pages, short, decisions: Defaults of the options of a request.
    """

    options = ReflectionOptions

    def __init__(
        self,
        model: Responder,
        *,
        store: str | Retriever | None = None,
        encoder: str | None = None,
        approximate: bool = False,
        shortest: int = SHORTEST,
        template_paragraph: str | None = None,
        draw: Callable[[int], int] | None = None,
        retrieve: str = "auto",
        pages: int = 5,
        short: bool = True,
        decisions: str = "forward",
    ) -> None:
        super().__init__(model)
        if model.tokenizer is None:
            raise UserError(f"{model.name}: its tokenizer is not known here, and with it the reflective tokens")
        self.ids = {token: id_of(token, model.tokenizer) for token in (RETRIEVAL, NO_RELEVANT, RELEVANT)}
        extras = getattr(getattr(model, "config", None), "extras", None) or {}
        self.frame = frame_of(template_paragraph or extras.get("template_paragraph") or DEFAULT)
        self.knowledge = None
        if store is not None:
            self.knowledge = Knowledge(_retriever(store, encoder, approximate), shortest=shortest)
        self.draw = draw
        self.preset(retrieve=retrieve, pages=pages, short=short, decisions=decisions)

    def run(self, call: Call) -> Iterator[Event]:
        """One reply; what was read is in the reasoning and in the trace `retrieval`."""
        options: ReflectionOptions = call.options or ReflectionOptions(**self._preset)
        messages = normalise(call.messages)
        if options.retrieve == "never":
            yield from self._alone(call, messages)
            return
        if options.retrieve == "auto" or options.decisions == "sampled":
            wanted = yield from self._asked(call, messages, options)
            if not wanted:
                return
        passages = self._passages(call, messages, options.pages)
        if not passages:
            why = "no store was named" if self.knowledge is None else "nothing was found"
            yield ReasoningDelta(text=f"passages are wanted, and {why}; answered without", stage="retrieval")
            yield TraceEvent(name="retrieval", data={"passages": [], "drawn": None})
            yield from self._alone(call, messages)
            return
        yield ReasoningDelta(text=f"{len(passages)} passages\n", stage="retrieval")
        judged = []
        for own in self._judged(call, messages, passages, options.decisions):
            judged.append(own)
            yield ReasoningDelta(text=f"{line(own)}\n", stage="retrieval")
        drawn = None
        if not any(own.kept for own in judged):
            drawn = self._drawn(call, len(judged))
            yield ReasoningDelta(text=f"none helps; passage {drawn + 1} was drawn\n", stage="retrieval")
        yield TraceEvent(name="retrieval", data={"passages": [own.model_dump() for own in judged], "drawn": drawn})
        kept = [own.text for own in judged if own.kept] if drawn is None else [judged[drawn].text]
        asked = answer(messages, kept, self.frame, short=options.short)
        yield from call.stream(self.main, asked)

    # steps

    def _asked(self, call: Call, messages: Sequence[Any], options: ReflectionOptions) -> Iterator[Event]:
        """The reply to the question itself; gives True, and no event, if it asks for passages."""
        if options.decisions == "sampled":
            found = call.ask(self.main, messages)
            if options.retrieve == "always" or self._first(found) == self.ids[RETRIEVAL]:
                return True
            yield TextDelta(text=found.content)
            call.finish_reason, call.stop = found.finish_reason, found.stop
            return False
        said = False
        for event in call.stream(self.main, messages, stop=(*call.sampling.stop, RETRIEVAL)):
            said |= isinstance(event, TextDelta) and bool(event.text)
            yield event
        if call.stop != RETRIEVAL:
            return False
        call.stop = None
        return not said

    def _passages(self, call: Call, messages: Sequence[Any], pages: int) -> list[Passage]:
        if self.knowledge is None:
            return []
        call.check()
        found = self.knowledge.passages(self.knowledge.pages(self._query(messages), pages))[:MOST_PASSAGES]
        return [own._replace(text=self._harmless(own.text)) for own in found]

    def _query(self, messages: Sequence[Any]) -> Any:
        """The newest picture of the user, or the question where there is none."""
        turns = [message for message in messages if message["role"] == "user"]
        pictures = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
        if not pictures:
            return text_of(turns[-1]) if turns else ""
        from llavakit.media import load_image

        processor = getattr(self.main, "processor", None)
        return load_image(pictures[-1]["image"]) if processor is None else processor.read_media(pictures[-1])[0]

    def _harmless(self, text: str) -> str:
        """A passage in which nothing acts as a special token: a store is data."""
        (turn,) = self.main.escape([{"role": "user", "content": text}])
        return text_of(normalise([turn])[0])

    def _judged(
        self, call: Call, messages: Sequence[Any], passages: Sequence[Passage], decisions: str
    ) -> Iterator[Judged]:
        """What the model says of every passage."""
        asked = [judgement(messages, passage.text, self.frame) for passage in passages]
        names = [{"page": one.page, "title": one.title, "text": one.text} for one in passages]
        if decisions == "sampled":
            replies = call.ask_all([(self.main, own, {}) for own in asked], purpose="judged")
            for name, reply in zip(names, replies, strict=True):
                yield Judged(**name, kept=self._first(reply) == self.ids[RELEVANT])
            return
        if not hasattr(self.main, "next_logits"):
            raise UserError(f"decisions: {self.main.name} gives no logits; that needs a model that runs here")
        pair = [self.ids[RELEVANT], self.ids[NO_RELEVANT]]
        for begin in range(0, len(asked), TOGETHER):
            call.check()
            logits = self.main.next_logits(asked[begin : begin + TOGETHER]).float()
            call.count(Usage(completion_tokens=len(logits), details={"judged": len(logits)}))
            likeliest = logits.argmax(-1).tolist()
            confidence = logits[:, pair].softmax(-1)[:, 0].tolist()
            for name, token, sure in zip(names[begin:], likeliest, confidence, strict=False):
                yield Judged(**name, kept=token == self.ids[RELEVANT], confidence=sure)

    def _first(self, reply: Any) -> int | None:
        if not reply.token_ids:
            raise UserError(f"decisions: {self.main.name} gives no token ids; that needs a model that runs here")
        return reply.token_ids[0]

    def _drawn(self, call: Call, count: int) -> int:
        draw = self.draw or random.Random(call.sampling.seed).randrange
        return draw(count)

    def _alone(self, call: Call, messages: Sequence[Any]) -> Iterator[Event]:
        """The model's own answer, begun as one that needs no passage."""
        call.check()
        (found,) = self.main.continue_from(messages, NO_RETRIEVAL, call.sampling)
        call.count(Usage(completion_tokens=len(found.token_ids)))
        call.finish_reason, call.stop = found.finish_reason, found.stop
        yield TextDelta(text=found.text)


def line(judged: Judged) -> str:
    """What became of a passage, on one line."""
    text = " ".join(judged.text.split())
    text = text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}…"
    sure = "" if judged.confidence is None else f" {100 * judged.confidence:3.0f} %"
    return f"{'kept' if judged.kept else 'left'}{sure}  {judged.title or judged.page}: {text}"


def _retriever(store: Any, encoder: str | None, approximate: bool) -> Any:
    if not isinstance(store, str):
        return store
    from llavakit.retrieval.retriever import open_retriever

    return open_retriever(store, encoder=encoder, approximate=approximate)
