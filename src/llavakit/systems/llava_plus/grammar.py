"""The three lines in which LLaVA-Plus answers, and the codec that reads and writes them.

    "thoughts🤔" {text}
    "actions🚀" {JSON list of {"API_name": NAME, "API_params": {...}}}
    "value👉" {text}

The labels are ordinary text of the model. Actions are JSON and never evaluated; with single quotes instead of double
ones they are read all the same, and what cannot be decoded is no call. Spec: paper section 3.2, `http_bot` and
`reorganize_source_for_tool_use_batch` of the published code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llavakit.conversation.codecs import AUTO, REQUIRED, Codec, Parser, to_json
from llavakit.conversation.messages import Message
from llavakit.conversation.turns import CallEvent, Event, ReasoningDelta, Tool, ToolCall, TraceEvent, Turn
from llavakit.errors import UserError, quoted

THOUGHTS, ACTIONS, VALUE = '"thoughts🤔"', '"actions🚀"', '"value👉"'
FIELDS = {"thoughts": THOUGHTS, "actions": ACTIONS, "value": VALUE}
_LINES = re.compile(f"{THOUGHTS}(.*){ACTIONS}(.*){VALUE}(.*)", re.DOTALL)
NOTICE = "I will use {} to help to answer the question. Please wait for a moment."


class Lines(NamedTuple):
    """The three fields as they stand, white space included."""

    thoughts: str
    actions: str
    value: str


def split(text: str) -> Lines | None:
    """The three fields of a reply; None without all three labels.

    A label that a field repeats belongs to the field before the last actions label, or the last value label.
    """
    found = _LINES.search(text)
    return None if found is None else Lines(*found.groups())


def decode(text: str) -> Any:
    """What an actions field says; None if it is no JSON, also after single quotes are read as double ones."""
    text = text.strip()
    for attempt in (text, text.replace("'", '"')):
        try:
            return json.loads(attempt)
        except (ValueError, RecursionError):
            continue
    return None


class Action(NamedTuple):
    """A tool and its arguments."""

    name: str
    params: dict[str, Any]


def the_action(decoded: Any) -> Action | None:
    """The one action of a decoded field; None if it holds none, several, or something else."""
    if not isinstance(decoded, list) or len(decoded) != 1 or not isinstance(decoded[0], Mapping):
        return None
    name, params = decoded[0].get("API_name"), decoded[0].get("API_params")
    if not isinstance(name, str) or not name or not isinstance(params, Mapping):
        return None
    return Action(name, dict(params))


def join(turn: Mapping[str, Any]) -> str:
    """The fields that a turn of a training record has, a line each; lines end with a line break, also the last."""
    lines = []
    for name, label in FIELDS.items():
        if name in turn:
            value = json.dumps(turn[name]) if name == "actions" else turn[name]
            lines.append(f"{label} {value}\n")
    return "".join(lines)


def written(name: str, arguments: Any) -> dict[str, Any]:
    """A call as an action."""
    return {"API_name": name, "API_params": arguments}


class ThreeLines(Codec):
    """Thoughts are reasoning, actions are calls, and value is the answer (or, with a call, a notice)."""

    takes_tools = True

    def parser(self, tools: Sequence[str] = (), *, parallel: bool = True) -> Parser:
        return LinesParser(tools)

    def render(self, turn: Turn) -> str:
        actions = [written(call.name, _arguments(call)) for call in turn.calls]
        value = turn.content or (NOTICE.format(turn.calls[0].name) if turn.calls else "")
        return join({"thoughts": turn.reasoning, "actions": actions, "value": value}).strip()

    def opening(self, name: str) -> str:
        return f'{THOUGHTS} \n{ACTIONS} [{{"API_name": {json.dumps(name)}, "API_params": '

    def call_parser(self, name: str) -> Parser:
        return ParamsParser(name)

    def describe(self, tools: Sequence[Tool], choice: str) -> str:
        listed = "\n".join(to_json(tool.schema()) for tool in tools)
        must = {AUTO: "", REQUIRED: " Use one of them."}.get(choice, f" Use {choice}.")
        return f"These tools can be used in actions. Each line describes one as JSON:\n{listed}{must}"

    def results(self, messages: Sequence[Message], question: str) -> list[Message]:
        from llavakit.systems.llava_plus.results import result_text

        text = "\n\n".join(
            result_text(message.get("name") or "tool", _result(message["content"])) for message in messages
        )
        return [{"role": "user", "content": [{"type": "text", "text": asked_again(text, question)}]}]


def asked_again(results: str, question: str) -> str:
    """The user's turn behind a call: what tools found, and the question before it ("first" as published)."""
    return f"{results}\n\nPlease summarize the model outputs and answer my first question: {question.strip()}"


def _arguments(call: ToolCall) -> Any:
    try:
        found = json.loads(call.arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"messages: the arguments of {quoted(call.name)} must be a JSON object")
    return found


def _result(content: Any) -> Any:
    """A tool message as a value: its JSON if it is some, else its text."""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, (dict, list)) else text


class LinesParser(Parser):
    """Reads three lines as they come: nothing is certain before the value of a reply without a call begins.

    What is not three lines is the answer as it was written; so is a reply whose actions cannot be decoded, or call a
    tool that may not be called.

    Args:
        tools: Functions that may be called.
    """

    def __init__(self, tools: Sequence[str]) -> None:
        super().__init__()
        self._tools = frozenset(tools)
        self._held, self._in_value = "", False

    def feed(self, text: str) -> list[Event]:
        if self._in_value:
            return self._content(text)
        self._held += text
        lines = self._first_lines()
        if lines is None or decode(lines.actions) != []:
            return []
        self._in_value = True
        return [*_thoughts(lines), *self._content(lines.value)]

    def _first_lines(self) -> Lines | None:
        """The fields by the first of every label."""
        _, thoughts, rest = self._held.partition(THOUGHTS)
        between, actions, rest = rest.partition(ACTIONS)
        inside, value, rest = rest.partition(VALUE)
        return Lines(between, inside, rest) if thoughts and actions and value else None

    def finish(self, reason: str | None = "stop") -> list[Event]:
        if self._in_value:
            return []
        lines = split(self._held)
        decoded = None if lines is None else decode(lines.actions)
        action = the_action(decoded)
        if decoded != [] and (action is None or action.name not in self._tools):
            return self._content(self._held)
        events = [*_thoughts(lines), *self._content(lines.value)]
        if action is not None:
            events.append(CallEvent(call=ToolCall(action.name, to_json(action.params))))
        return events


def _thoughts(lines: Lines) -> list[Event]:
    thoughts = lines.thoughts.strip()
    return [ReasoningDelta(text=thoughts)] if thoughts else []


class ParamsParser(Parser):
    """Reads the arguments of one call behind `ThreeLines.opening`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._held = name, ""

    def feed(self, text: str) -> list[Event]:
        self._held += text
        return []

    def finish(self, reason: str | None = "stop") -> list[Event]:
        text = self._held.strip()
        try:
            end = json.JSONDecoder().raw_decode(text)[1]
        except (ValueError, RecursionError):  # cut off, or no JSON: the client sees what the model wrote
            return [CallEvent(call=ToolCall(self._name, text)), TraceEvent(name="broken_call", data={"text": text})]
        return [CallEvent(call=ToolCall(self._name, text[:end]))]
