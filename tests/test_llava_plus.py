"""LLaVA-Plus: golden figures, the three lines as a codec, the agent, training records, tools, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavakit.conversation.turns import ToolCall, Turn
from llavakit.proof.golden import find_cases, run_case
from llavakit.systems.llava_plus.grammar import ThreeLines, decode, split

GOLDEN = Path(__file__).parent / "golden" / "llava-plus"
DECLINED = {"dispatch"}


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == ("declined" if path.name in DECLINED else "passed"), report.reason


# The codec


def lines(actions="[]", thoughts="t", value="v"):
    return f'"thoughts🤔" {thoughts}\n"actions🚀" {actions}\n"value👉" {value}\n'


CALL = '[{"API_name": "ocr", "API_params": {"least": 0.5}}]'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "tools", "turn"),
    [
        (lines(), ["ocr"], Turn("v", "t")),
        (lines(CALL), ["ocr"], Turn("v", "t", [ToolCall("ocr", '{"least": 0.5}')])),
        (lines(CALL.replace('"', "'")), ["ocr"], Turn("v", "t", [ToolCall("ocr", '{"least": 0.5}')])),
        (lines(CALL), [], Turn(lines(CALL).strip())),
        (lines("[{"), ["ocr"], Turn(lines("[{").strip())),
        (lines('{"API_name": "ocr"}'), ["ocr"], Turn(lines('{"API_name": "ocr"}').strip())),
        (lines("__import__('os').system('x')"), ["ocr"], Turn(lines("__import__('os').system('x')").strip())),
        ("plain", ["ocr"], Turn("plain")),
        ('"thoughts🤔" only', ["ocr"], Turn('"thoughts🤔" only')),
        ("", ["ocr"], Turn("")),
        ("Well. " + lines(), ["ocr"], Turn("v", "t")),
    ],
)
def test_replies_are_read_alike_whole_and_in_pieces(text, tools, turn, size):
    parser = ThreeLines().parser(tools)
    events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
    found = Turn.of([*events, *parser.finish()])
    assert (found.content, found.reasoning, found.calls) == (turn.content, turn.reasoning, turn.calls)


def test_a_value_without_a_call_is_streamed():
    parser = ThreeLines().parser(["ocr"])
    assert parser.feed('"thoughts🤔" t\n"actions🚀" []\n"val') == []
    assert [event.text for event in parser.feed('ue👉" It is')] == ["t", "It is"]
    assert [event.text for event in parser.feed(" red.")] == [" red."]
    assert parser.finish() == []


@pytest.mark.parametrize(
    "turn",
    [
        Turn("v", "t"),
        Turn("wait", "t", [ToolCall("ocr", '{"least": 0.5}')]),
        Turn("wait", "", [ToolCall("ocr", "{}")]),
        Turn('says "quoted" and é', "l1\nl2"),
    ],
)
def test_what_is_written_is_read_again(turn):
    found = ThreeLines().parse(ThreeLines().render(turn), ["ocr"])
    assert (found.content, found.reasoning, found.calls) == (turn.content, turn.reasoning, turn.calls)


def test_actions_are_json_and_never_evaluated():
    assert decode("[1]") == [1]
    assert decode("['a']") == ["a"]
    assert decode("open('/etc/passwd').read()") is None
    assert decode("[" * 100_000) is None
    assert split(lines(thoughts='"actions🚀" []', actions=CALL)).actions.strip() == CALL


def test_openai_messages_become_published_turns():
    call = {"id": "c1", "type": "function", "function": {"name": "grounding_dino", "arguments": '{"caption": "dog"}'}}
    found = ThreeLines().prepare(
        [
            {"role": "user", "content": "Where is the dog?"},
            {"role": "assistant", "content": None, "reasoning_content": "find", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": json.dumps({"boxes": [[0.125, 0.4, 0.5, 0.335]]})},
        ]
    )
    assert found[1]["content"] == (
        '"thoughts🤔" find\n"actions🚀" [{"API_name": "grounding_dino", "API_params": {"caption": "dog"}}]\n'
        '"value👉" I will use grounding_dino to help to answer the question. Please wait for a moment.'
    )
    assert found[2]["content"][0]["text"] == (
        "grounding_dino model outputs: {'boxes': [[0.12, 0.4, 0.5, 0.34]]}\n\n"
        "Please summarize the model outputs and answer my first question: Where is the dog?"
    )
