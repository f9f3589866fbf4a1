"""Tools in OpenAI's form for models that were trained on text: described in the system message, read from the reply.

The convention is that of Hermes and Qwen: a call is JSON between `<tool_call>` and `</tool_call>`. A reply that is
one JSON object with `name` and `arguments` counts too. Malformed calls stay text; nothing is ever evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llavakit.conversation.codecs import get_codec
from llavakit.serving.protocol import ChatMessage, ChatRequest, ToolChoice, new_id

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def describe(request: ChatRequest) -> str | None:
    """The sentences that tell the model of its tools, None if it has none to use."""
    if not request.tools or request.tool_choice == "none":
        return None
    listed = "\n".join(_json(tool.function.model_dump(exclude_none=True)) for tool in request.tools)
    must = ""
    if request.tool_choice == "required":
        must = " You must call one of them."
    elif request.tool_choice not in (None, "auto"):
        must = f" You must call {request.tool_choice.function.name}."
    return (
        "You can call functions. Each line describes one as JSON:\n"
        f"{listed}\n"
        'To call one, answer with <tool_call>{"name": NAME, "arguments": {...}}</tool_call>.' + must
    )


def as_text(message: ChatMessage) -> str:
    """Earlier calls of an assistant message as the text that the model wrote."""
    calls = [
        _json({"name": call.function.name, "arguments": _parsed(call.function.arguments)})
        for call in message.tool_calls or ()
    ]
    return "\n".join(f"<tool_call>{call}</tool_call>" for call in calls)


def _json(value: Any) -> str:
    """JSON text that every encoder takes: escapes may have smuggled in halves of characters."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read(text: str, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a reply without its calls, and the calls in OpenAI's form.

    Args:
        names: Functions that may be called; a call of another stays text.
    """
    calls = []

    def take(found: re.Match[str]) -> str:
        call = _call(found[1], names)
        if call is None:
            return found[0]
        calls.append(call)
        return ""

    rest = _CALL.sub(take, text).strip()
    if not calls and rest.startswith("{"):
        call = _call(rest, names)
        if call is not None:
            return "", [call]
    return rest, calls


def forced(request: ChatRequest) -> str | None:
    """The function that a request names in `tool_choice`."""
    return request.tool_choice.function.name if isinstance(request.tool_choice, ToolChoice) else None


def read_reply(text: str, request: ChatRequest) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls of a reply as the request wants them: of a function that it names, or at most one call."""
    name = forced(request)
    if name is not None:
        parser = get_codec(None).call_parser(name)
        (event,) = [*parser.feed(text), *parser.finish()]
        function = {"name": name, "arguments": event.call.arguments}
        return "", [{"id": new_id("call"), "type": "function", "function": function}]
    rest, calls = read(text, [tool.function.name for tool in request.tools])
    return rest, calls[:1] if request.parallel_tool_calls is False else calls


def _call(text: str, names: Sequence[str]) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, Mapping) or body.get("name") not in names:
        return None
    arguments = body.get("arguments", body.get("parameters", {}))
    arguments = arguments if isinstance(arguments, str) else _json(arguments)
    return {"id": new_id("call"), "type": "function", "function": {"name": body["name"], "arguments": arguments}}
