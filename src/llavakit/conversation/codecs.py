"""Codecs: how a model writes reasoning, tool calls and answer as text, and how that text is read.

A codec turns structured messages into plain ones for the chat template (`prepare`), and the text that the model
generates into a `Turn`, whole (`parse`) or while it comes (`parser`). Whatever a model writes is data: what does not
follow its grammar stays text, nothing is evaluated, and a stream never takes back what it sent, because `parse` is the
stream parser fed once.

A model's configuration (`codec`) or its system's card names one; a system registers its own in `System.parts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llavakit.conversation.messages import Message, Part
from llavakit.conversation.turns import CallEvent, Event, TextDelta, Tool, ToolCall, TraceEvent, Turn
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import UserError, quoted
from llavakit.registry import CODECS

DEFAULT = "hermes"
AUTO, NONE, REQUIRED = "auto", "none", "required"  # tool choices beside the name of a function


class Trimmer:
    """A text that arrives in pieces, without white space at its two ends: what may be the end is held back."""

    def __init__(self) -> None:
        self._held, self._begun = "", False

    def __call__(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept


def held_back(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of a text with which one of the markers begins, and which is not all of it."""
    for size in range(min(len(text), max(map(len, markers), default=0)), 0, -1):
        if any(len(marker) > size and marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0


class Parser:
    """Reads one reply as it comes; this one takes everything as the answer.

    Attributes:
        complete: Whether the turn is whole, whatever else the model writes.
    """

    complete = False

    def __init__(self) -> None:
        self._trim = Trimmer()

    def feed(self, text: str) -> list[Event]:
        """What is certain after more text."""
        return self._content(text)

    def finish(self, reason: str | None = "stop") -> list[Event]:
        """The rest.

        Args:
            reason: Why the reply ended, as in `Reply.finish_reason`.
        """
        return []

    def _content(self, text: str) -> list[Event]:
        text = self._trim(text)
        return [TextDelta(text=text)] if text else []


class Codec:
    """The codec of models that write plain text: no tools, no reasoning. Base class of the others."""

    takes_tools = False

    def parser(self, tools: Sequence[str] = (), *, parallel: bool = True) -> Parser:
        """A parser for one reply.

        Args:
            tools: Functions that may be called; a call of another stays text.
            parallel: Whether one reply may hold several calls; if not, those after the first go into the trace.
        """
        return Parser()

    def opening(self, name: str) -> str:
        """The beginning of a reply that can only go on as a call of this function.

        Raises:
            UserError: If this codec has none.
        """
        raise UserError(f"tool_choice: this model cannot be made to call {quoted(name)}; use 'auto'")

    def call_parser(self, name: str) -> Parser:
        """A parser for what follows `opening`: it makes one call of that function, whatever the model writes.

        Raises:
            UserError: If this codec has none.
        """
        raise UserError(f"tool_choice: this model cannot be made to call {quoted(name)}; use 'auto'")

    def reply(self, tools: Sequence[Tool], choice: str, *, parallel: bool = True) -> tuple[str, Callable[[], Parser]]:
        """How a reply is to be read under a tool choice: its beginning, "" if it is free, and what makes its parser.

        Raises:
            UserError: If a function is named that is none of the tools, or cannot be enforced.
        """
        names = [tool.name for tool in tools] if choice != NONE else []
        if choice in (AUTO, NONE, REQUIRED):
            return "", lambda: self.parser(names, parallel=parallel)
        if choice not in names:
            raise UserError(f"tool_choice: {quoted(choice)} is none of the tools")
        return self.opening(choice), lambda: self.call_parser(choice)

    def parse(self, text: str, tools: Sequence[str] = (), *, reason: str | None = "stop") -> Turn:
        """A whole reply as a turn."""
        parser = self.parser(tools)
        return Turn.of([*parser.feed(text), *parser.finish(reason)])

    def render(self, turn: Turn) -> str:
        """A turn as the text that the model would have written; the inverse of `parse`.

        Reasoning that this codec cannot write is left out.

        Raises:
            UserError: If this codec has no way to write a part of it.
        """
        if turn.calls:
            raise UserError("messages: this model's codec has no tool calls")
        return turn.content

    def describe(self, tools: Sequence[Tool], choice: str) -> str:
        """The text that tells the model of its tools; goes into the system message.

        Args:
            choice: "auto", "required", or the name of the function that must be called.
        """
        raise UserError("tools: this model's codec has no tool calls")

    def results(self, messages: Sequence[Message], question: str) -> list[Message]:
        """Results of tools as messages that the chat template takes.

        Args:
            messages: Adjacent `tool` messages; `name` is the function where the call is known.
            question: The text of the latest user message.
        """
        return [{"role": "tool", "content": message["content"]} for message in messages]

    def prepare(self, messages: Sequence[Any], tools: Sequence[Tool] = (), choice: str = AUTO) -> list[Message]:
        """Messages for the chat template: earlier calls, reasoning, results and the tools are text.

        Args:
            messages: Messages in OpenAI's form; those of the assistant may have `tool_calls` and `reasoning_content`.
            tools: Functions that the model may call.
            choice: See `describe`; "none" leaves the tools out.

        Raises:
            UserError: If this codec cannot express them.
        """
        if tools and choice != NONE and not self.takes_tools:
            raise UserError("tools: this model takes none")
        prepared: list[Message] = []
        names: dict[str, str] = {}
        question, waiting = "", []
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping):
                prepared.append(message)  # the template's reader says what is wrong
                continue
            if message.get("role") == "tool":
                known = message.get("name") or names.get(message.get("tool_call_id"))
                waiting.append({**message, "name": known})
                continue
            if waiting:
                prepared += self.results(waiting, question)
                waiting = []
            if message.get("role") == "user":
                question = _text(message.get("content"))
            turn = _turn(message, f"messages.{number}") if message.get("role") == "assistant" else None
            if turn is not None:
                names |= {call.id: call.name for call in turn.calls}
                prepared.append({"role": "assistant", "content": self.render(turn)})
            else:
                placement = {"placement": message["placement"]} if "placement" in message else {}
                prepared.append({"role": message.get("role"), "content": message.get("content"), **placement})
        if waiting:
            prepared += self.results(waiting, question)
        return _told(prepared, self.describe(tools, choice)) if tools and choice != NONE else prepared


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(part["text"] for part in parts if isinstance(part, Mapping) and part.get("type") == "text")


def _turn(message: Mapping[str, Any], where: str) -> Turn | None:
    """An assistant's message that is more than content as a turn, else None."""
    calls = message.get("tool_calls") or ()
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not calls and not reasoning:
        return None
    turn = Turn(content=_text(message.get("content")), reasoning=reasoning)
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}.tool_calls.{number}: must be an object with a function that has a name")
        arguments = function.get("arguments", "{}")
        arguments = arguments if isinstance(arguments, str) else to_json(arguments)
        turn.calls.append(ToolCall(function["name"], arguments, str(call.get("id"))))
    return turn


def _told(messages: list[Message], text: str) -> list[Message]:
    """Messages whose system message ends with a text."""
    part: Part = {"type": "text", "text": text}
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": [part]}, *messages]
    content = messages[0]["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    return [{"role": "system", "content": [*content, {"type": "text", "text": "\n"}, part]}, *messages[1:]]


def to_json(value: Any) -> str:
    """JSON text that every encoder takes: escapes may have smuggled in halves of characters."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


class Hermes(Codec):
    """Calls as JSON between `<tool_call>` and `</tool_call>`, the convention of Hermes and Qwen; the default.

    A reply that is one JSON object with `name` and `arguments` is a call too. Results are user messages between
    `<tool_response>` and `</tool_response>`.
    """

    takes_tools = True
    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def parser(self, tools: Sequence[str] = (), *, parallel: bool = True) -> Parser:
        return HermesParser(tools, parallel) if tools else Parser()

    def opening(self, name: str) -> str:
        return f'{self.OPEN}{{"name": {to_json(name)}, "arguments": '

    def call_parser(self, name: str) -> Parser:
        return ArgumentsParser(name)

    def render(self, turn: Turn) -> str:
        calls = [
            f"{self.OPEN}{to_json({'name': call.name, 'arguments': _parsed(call.arguments)})}{self.CLOSE}"
            for call in turn.calls
        ]
        return "\n".join([turn.content, *calls] if turn.content else calls)

    def describe(self, tools: Sequence[Tool], choice: str) -> str:
        listed = "\n".join(to_json(tool.schema()) for tool in tools)
        must = {AUTO: "", REQUIRED: " You must call one of them."}.get(choice, f" You must call {choice}.")
        return (
            "You can call functions. Each line describes one as JSON:\n"
            f"{listed}\n"
            f'To call one, answer with {self.OPEN}{{"name": NAME, "arguments": {{...}}}}{self.CLOSE}.' + must
        )

    def results(self, messages: Sequence[Message], question: str) -> list[Message]:
        parts: list[Part] = []
        for message in messages:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
            gap = "\n" if parts else ""
            parts += [
                {"type": "text", "text": f"{gap}<tool_response>\n"},
                *content,
                {"type": "text", "text": "\n</tool_response>"},
            ]
        return [{"role": "user", "content": parts}]


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except JsonError:
        return text


class HermesParser(Parser):
    """Finds calls in a reply; text in front of them is let out at once.

    Args:
        tools: Functions that may be called.
        parallel: See `Codec.parser`.
    """

    def __init__(self, tools: Sequence[str], parallel: bool = True) -> None:
        super().__init__()
        self._tools, self._parallel = frozenset(tools), parallel
        self._held, self._mode, self._called = "", "start", False
        self._looked = 0  # closing markers in front of this place do not close the open call

    def feed(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        step = True
        while step:
            step = self._step(events)
        return events

    def finish(self, reason: str | None = "stop") -> list[Event]:
        events: list[Event] = []
        if self._mode == "object":
            call = self._call(self._held)
            if call is not None:
                return self._take(call)
            self._mode = "text"
            events += self.feed("")
        while self._mode == "call":  # the end of the reply closes a call that is whole
            call = self._call(self._held.removeprefix(Hermes.OPEN))
            if call is not None:
                self._held, self._mode = "", "text"
                return events + self._take(call)
            events += self._give_up()
            events += self.feed("")
        held, self._held = self._held, ""
        return events + self._content(held)

    def _step(self, events: list[Event]) -> bool:
        """Read one thing; False when more text is needed."""
        if self._mode == "start":
            seen = self._held.lstrip()
            if seen:
                self._mode = "object" if seen[0] == "{" else "text"
            return bool(seen)
        if self._mode == "object":  # a whole reply that is one call can only be told from other JSON at its end
            return False
        if self._mode == "text":
            place = self._held.find(Hermes.OPEN)
            cut = place if place >= 0 else len(self._held) - held_back(self._held, [Hermes.OPEN])
            events += self._content(self._held[:cut])
            self._held = self._held[cut:]
            if place >= 0:
                self._mode, self._looked = "call", len(Hermes.OPEN)
            return place >= 0
        return self._step_in_call(events)

    def _step_in_call(self, events: list[Event]) -> bool:
        body = self._held[len(Hermes.OPEN) :].lstrip()
        if body and body[0] != "{":
            events += self._give_up()
            return True
        place = self._held.find(Hermes.CLOSE, self._looked)
        if place < 0:
            self._looked = max(self._looked, len(self._held) - len(Hermes.CLOSE) + 1)
            return False
        inside = self._held[len(Hermes.OPEN) : place]
        if _in_string(inside):
            self._looked = place + 1
            return True
        call = self._call(inside)
        if call is None:
            events += self._give_up()
        else:
            events += self._take(call)
            self._held, self._mode = self._held[place + len(Hermes.CLOSE) :], "text"
        return True

    def _give_up(self) -> list[Event]:
        """The opening marker was text."""
        self._held, self._mode = self._held[len(Hermes.OPEN) :], "text"
        return self._content(Hermes.OPEN)

    def _take(self, call: ToolCall) -> list[Event]:
        if self._called and not self._parallel:
            return [TraceEvent(name="surplus_call", data={"name": call.name, "arguments": call.arguments})]
        self._called = True
        return [CallEvent(call=call)]

    def _call(self, text: str) -> ToolCall | None:
        try:
            body = parse_json(text)
        except JsonError:
            return None
        if not isinstance(body, dict) or not isinstance(body.get("name"), str) or body["name"] not in self._tools:
            return None
        arguments = body.get("arguments", body.get("parameters", {}))
        return ToolCall(body["name"], arguments if isinstance(arguments, str) else to_json(arguments))


class ArgumentsParser(Parser):
    """Reads the arguments of one call, up to the marker that closes it; all that follows is left out.

    Args:
        name: The function.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._held, self._called = name, "", False

    def feed(self, text: str) -> list[Event]:
        if self._called:
            return []
        self._held += text
        place = self._held.find(Hermes.CLOSE)
        while place >= 0 and _in_string(self._held[:place]):
            place = self._held.find(Hermes.CLOSE, place + 1)
        self.complete = place >= 0
        return self._call(self._held[:place]) if place >= 0 else []

    def finish(self, reason: str | None = "stop") -> list[Event]:
        return [] if self._called else self._call(self._held)

    def _call(self, text: str) -> list[Event]:
        self._called = True
        text = text.strip()
        try:
            end = json.JSONDecoder().raw_decode(text)[1]
        except (ValueError, RecursionError):  # cut off, or no JSON: the client sees what the model wrote
            end = len(text)
        return [CallEvent(call=ToolCall(self._name, text[:end]))]


def _in_string(text: str) -> bool:
    """Whether a JSON text ends inside a string."""
    inside = escaped = False
    for letter in text:
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = inside
        elif letter == '"':
            inside = not inside
    return inside


def get_codec(codec: str | Codec | None) -> Codec:
    """The codec of that name, the default one for None; a codec comes back as it is.

    Raises:
        UserError: If there is none; the message names the nearest known name.
    """
    if isinstance(codec, Codec):
        return codec
    found = CODECS.get(codec or DEFAULT)()
    if not isinstance(found, Codec):
        raise UserError(f"assistant codec {quoted(codec)} is a {type(found).__name__}, not a Codec")
    return found
