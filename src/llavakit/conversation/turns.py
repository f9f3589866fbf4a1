"""The assistant's turn: whole (`Turn`), and as events while it is being generated.

Nothing here knows how a model writes these things as text; that is `llavakit.conversation.codecs`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Args:
        name: What the model calls it.
        description: What it does.
        parameters: JSON schema of its arguments.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None

    def schema(self) -> dict[str, Any]:
        """The function as JSON, without what it does not have."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote.

    Args:
        name: The function.
        arguments: JSON text, not yet validated against the function's schema.
        id: Name of the call; results refer to it. Two calls that differ in it alone are equal.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call-{uuid.uuid4().hex}", compare=False)


@dataclass(frozen=True, kw_only=True)
class Event:
    """A part of a reply, in the order of generation.

    Args:
        index: Number of the reply, below `n`.
    """

    index: int = 0


@dataclass(frozen=True, kw_only=True)
class TextDelta(Event):
    """More text of the answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ReasoningDelta(Event):
    """More text that leads to the answer and is not part of it.

    Args:
        stage: Name of the stage that it belongs to, if the model names stages.
    """

    text: str
    stage: str | None = None


@dataclass(frozen=True, kw_only=True)
class CallEvent(Event):
    """A complete tool call."""

    call: ToolCall


@dataclass(frozen=True, kw_only=True)
class PictureEvent(Event):
    """A picture that is part of the reply.

    Args:
        image: A PIL image.
        caption: What it shows.
    """

    image: Any
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class TraceEvent(Event):
    """A step on the way to the reply, for logs and inspection: a candidate, a verdict, a retrieved page.

    Args:
        name: Kind of step.
        data: What happened, JSON-able.
    """

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Turn:
    """A whole turn of the assistant.

    Attributes:
        content: The answer.
        reasoning: Everything that led to it, stages separated by a blank line.
        calls: Tool calls in order.
        stages: (name, text) of every named stage of the reasoning.
        pictures: (PIL image, caption) of every picture.
        traces: (name, data) of every step.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    stages: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[Any, str]] = field(default_factory=list)
    traces: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> Turn:
        """The turn that events make up."""
        turn = cls()
        for event in events:
            turn.add(event)
        return turn

    def add(self, event: Event) -> None:
        """Append an event; those of other kinds than the ones above change nothing."""
        match event:
            case TextDelta(text=text):
                self.content += text
            case ReasoningDelta(text=text, stage=stage):
                self.reasoning += text
                if stage is not None:
                    if not self.stages or self.stages[-1][0] != stage:
                        self.stages.append((stage, ""))
                    self.stages[-1] = (stage, (self.stages[-1][1] + text).lstrip())
            case CallEvent(call=call):
                self.calls.append(call)
            case PictureEvent(image=image, caption=caption):
                self.pictures.append((image, caption))
            case TraceEvent(name=name, data=data):
                self.traces.append((name, data))

    def message(self) -> dict[str, Any]:
        """The turn as a message of a conversation, for the next request."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                for one in self.calls
            ]
        return message
