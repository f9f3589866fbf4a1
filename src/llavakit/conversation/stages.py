"""Replies in named stages: `<think> ... </think> answer`, or several stages that end in a conclusion.

    Stages([Stage.tagged("SUMMARY"), Stage.tagged("REASONING")], answer=Stage.tagged("CONCLUSION"))

Stages are reasoning; the answer stage, or without one all text outside the stages, is the content. A reply that does
not open with a stage is content as a whole. A stage that is left unclosed ends where a later one opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llavakit.conversation.codecs import Codec, Parser, Trimmer, get_codec, held_back
from llavakit.conversation.messages import Message
from llavakit.conversation.turns import Event, ReasoningDelta, Tool, TraceEvent, Turn

_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Stage:
    """One stage and the spellings of its markers; the first ones are written.

    Args:
        name: What clients and pages call it.
        opens: Opening markers.
        closes: Closing markers.
    """

    name: str
    opens: tuple[str, ...]
    closes: tuple[str, ...]

    @classmethod
    def tagged(cls, name: str) -> Stage:
        """`<name> ... </name>`."""
        return cls(name, (f"<{name}>",), (f"</{name}>",))


class Stages(Codec):
    """A codec of stages.

    Args:
        stages: In the order in which they are written.
        answer: The stage that holds the answer; None: the text after the stages is the answer.
        content: Codec of the text that is the answer (tool calls).
    """

    def __init__(self, stages: Sequence[Stage], answer: Stage | None = None, content: str | Codec = "plain") -> None:
        self.stages, self.answer, self.content = tuple(stages), answer, get_codec(content)

    @property
    def takes_tools(self) -> bool:
        """Whether the answer may hold tool calls."""
        return self.content.takes_tools

    def parser(self, tools: Sequence[str] = (), *, parallel: bool = True) -> Parser:
        return StagesParser(self.stages, self.answer, self.content.parser(tools, parallel=parallel))

    def opening(self, name: str) -> str:
        begun = "" if self.answer is None else f"{self.answer.opens[0]} "
        return begun + self.content.opening(name)

    def call_parser(self, name: str) -> Parser:
        return self.content.call_parser(name)

    def render(self, turn: Turn) -> str:
        texts = dict(turn.stages)
        if turn.reasoning and not texts and len(self.stages) == 1:
            texts[self.stages[0].name] = turn.reasoning
        blocks = [_block(stage, texts[stage.name]) for stage in self.stages if stage.name in texts]
        content = self.content.render(turn)
        if content:
            blocks.append(content if self.answer is None else _block(self.answer, content))
        return _BETWEEN.join(blocks)

    def describe(self, tools: Sequence[Tool], choice: str) -> str:
        return self.content.describe(tools, choice)

    def results(self, messages: Sequence[Message], question: str) -> list[Message]:
        return self.content.results(messages, question)


def _block(stage: Stage, text: str) -> str:
    return f"{stage.opens[0]} {text} {stage.closes[0]}"


class StagesParser(Parser):
    """Sends stages and answer into their channels as they come.

    Args:
        stages, answer: See `Stages`.
        content: Parser of the answer.
    """

    def __init__(self, stages: Sequence[Stage], answer: Stage | None, content: Parser) -> None:
        super().__init__()
        self._stages = [*stages] if answer is None else [*stages, answer]
        self._answer, self._content_parser = answer, content
        self._held, self._mode = "", "start"
        self._stage: Stage | None = None
        self._answered = self._reasoned = self._begun = False

    def feed(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        step = True
        while step:
            step = self._step(events)
        return events

    def finish(self, reason: str | None = "stop") -> list[Event]:
        events: list[Event] = []
        held, self._held = self._held, ""
        structured = self._mode in ("between", "inside", "outside")
        if structured and reason == "length" and held.strip():  # the limit cut a marker in two
            events.append(TraceEvent(name="malformed", data={"problem": f"cut inside {held.strip()}"}))
        elif self._mode == "inside":
            events += self._say(held)
        elif held.strip():
            events += self._content_parser.feed(held)
        events += self._content_parser.finish(reason)
        if structured and reason == "stop":
            if self._mode == "inside":
                events.append(TraceEvent(name="malformed", data={"problem": f"{self._stage.name} was not closed"}))
            elif self._answer is not None and not self._answered:
                events.append(TraceEvent(name="malformed", data={"problem": f"{self._answer.name} is missing"}))
        return events

    def _step(self, events: list[Event]) -> bool:
        """Read one thing; False when more text is needed."""
        if self._mode == "plain":
            events += self._content_parser.feed(self._take(len(self._held)))
            return False
        if self._mode in ("start", "between"):
            return self._step_between()
        if self._mode == "outside":  # an answer may mention a stage that is over
            later = self._later()
            place, _ = self._find(self._opening(later))
            cut = place if place >= 0 else len(self._held) - held_back(self._held, self._markers(later))
            events += self._content_parser.feed(self._take(cut))
            if place >= 0:
                self._mode = "between"
            return place >= 0
        return self._step_inside(events)

    def _step_between(self) -> bool:
        seen = self._held.lstrip()
        for marker, stage in self._opening(self._stages):
            if seen.startswith(marker):
                self._held = seen[len(marker) :]
                self._stage, self._mode, self._begun = stage, "inside", False
                self._trim = Trimmer()
                self._answered |= stage is self._answer
                return True
        if not seen or held_back(seen, self._markers(self._stages)) == len(seen):
            return False
        self._mode = "plain" if self._mode == "start" else "outside"
        return True

    def _step_inside(self, events: list[Event]) -> bool:
        ends = [(marker, None) for marker in self._stage.closes] + self._opening(self._later())
        place, marker = self._find(ends)
        if place < 0:
            cut = len(self._held) - held_back(self._held, [marker for marker, _ in ends])
            events += self._say(self._take(cut))
            return False
        events += self._say(self._take(place))
        if marker in self._stage.closes:
            self._take(len(marker))
        self._mode = "between"
        return True

    def _say(self, text: str) -> list[Event]:
        """Text of the open stage."""
        if self._stage is self._answer:
            return self._content_parser.feed(text)
        text = self._trim(text)
        if not text:
            return []
        gap = _BETWEEN if self._reasoned and not self._begun else ""
        self._reasoned = self._begun = True
        return [ReasoningDelta(text=gap + text, stage=self._stage.name)]

    def _later(self) -> list[Stage]:
        """The stages that may still come."""
        return self._stages[self._stages.index(self._stage) + 1 :]

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken

    def _find(self, markers: Sequence[tuple[str, Stage | None]]) -> tuple[int, str]:
        """Place and text of the first marker in what is held; -1 if there is none."""
        places = [(self._held.find(marker), -len(marker), marker) for marker, _ in markers]
        place, _, marker = min((one for one in places if one[0] >= 0), default=(-1, 0, ""))
        return place, marker

    @staticmethod
    def _opening(stages: Sequence[Stage]) -> list[tuple[str, Stage]]:
        return [(marker, stage) for stage in stages for marker in stage.opens]

    @classmethod
    def _markers(cls, stages: Sequence[Stage]) -> list[str]:
        return [marker for marker, _ in cls._opening(stages)]


def think() -> Stages:
    """`<think> ... </think>` and then the answer, which may hold tool calls as `Hermes` writes them."""
    return Stages([Stage.tagged("think")], content="hermes")
