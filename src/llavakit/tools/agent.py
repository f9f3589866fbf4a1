"""Any model with tools that run beside it: `llavakit chat MODEL --tools tools.yaml`, `llavakit serve` with the same.

The model is told of the tools in its codec's way, its calls are run, the results go back to it, until it answers
without a call. A client's own tools stay the client's: a call of one ends the reply, as OpenAI's API has it. A system
whose models learned tools in another way brings its own responder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from llavakit.conversation.messages import is_media, normalise
from llavakit.conversation.turns import CallEvent, Event, PictureEvent, TextDelta, ToolCall, TraceEvent
from llavakit.errors import UserError
from llavakit.generation.responder import Call, Responder
from llavakit.media.image import load_image
from llavakit.tools.artefacts import Artefacts
from llavakit.tools.configuration import load_toolbox
from llavakit.tools.toolbox import Toolbox


class ToolOptions(BaseModel):
    """Options of a request.

    Attributes:
        rounds: Most times that the model may call tools before it has to answer.
    """

    rounds: int = Field(4, ge=0, le=16)


class ToolAgent(Responder):
    """A model whose calls are run here.

    Args:
        model: Who answers; its codec must have tool calls.
        tools: A configuration of tools, its file, or a `Toolbox`.
    """

    options = ToolOptions

    def __init__(self, model: Responder, *, tools: str | Path | Mapping[str, Any] | Toolbox) -> None:
        super().__init__(model)
        self.toolbox = tools if isinstance(tools, Toolbox) else load_toolbox(tools or None)
        self._media_limits: Any = None

    def restrict(self, limits: Any) -> None:
        self._media_limits = limits
        super().restrict(limits)

    def run(self, call: Call) -> Iterator[Event]:
        """One reply; calls and results are in its trace, pictures of tools in the answer."""
        options = call.options or ToolOptions()
        own = [tool for tool in self.toolbox.tools() if tool.name not in {theirs.name for theirs in call.tools}]
        if not own or call.tool_choice == "none":
            yield from call.stream(self.main)
            return
        messages: list[Any] = list(call.messages)
        artefacts = Artefacts()
        artefacts.picture = self._picture(messages, call)
        running = {tool.name for tool in own}
        for number in range(options.rounds + 1):
            last = number == options.rounds
            tools = call.tools if last else (*own, *call.tools)
            held: list[ToolCall] = []
            content = ""
            for event in call.stream(self.main, messages, tools=tools, parallel_calls=False):
                if isinstance(event, CallEvent) and event.call.name in running:
                    held.append(event.call)
                    continue
                content += event.text if isinstance(event, TextDelta) else ""
                yield event
            if not held:
                return
            call.finish_reason = "stop"
            messages.append({**call.answer.message(), "content": content})
            for one in held:
                yield TraceEvent(name="tool_call", data={"id": one.id, "name": one.name, "arguments": one.arguments})
                call.check()
                result = self.toolbox.call(one.name, one.arguments, artefacts)
                shown = result.data if result.error is None else {"error": result.error}
                yield TraceEvent(name="tool_result", data={"id": one.id, "name": one.name, "result": shown})
                for name, image in result.pictures.items():
                    yield PictureEvent(image=image, caption=f"{one.name}: {name}")
                messages.append({"role": "tool", "tool_call_id": one.id, "name": one.name, "content": result.text()})

    def _picture(self, messages: list[Any], call: Call) -> Any:
        """The newest picture of the conversation, opened."""
        for message in reversed(normalise(messages)):
            for part in reversed(message["content"]):
                if is_media(part) and part["type"] == "image":
                    if call.before_media is not None:
                        call.before_media(part)
                    limits = {} if self._media_limits is None else {"limits": self._media_limits}
                    return load_image(part["image"], **limits)
        return None


def with_tools(model: Responder, tools: Any) -> Responder:
    """A model with tools.

    Raises:
        UserError: If it cannot call any, or the configuration is wrong.
    """
    codec = getattr(model, "codec", None)
    if codec is not None and not codec.takes_tools:
        raise UserError(f"tools: {model.name} has no tool calls")
    return ToolAgent(model, tools=tools)
