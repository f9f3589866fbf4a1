"""Codecs: replies to turns and back, however the text is cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.conversation.codecs import get_codec
from llavakit.conversation.stages import Stage, Stages
from llavakit.conversation.turns import CallEvent, ReasoningDelta, TextDelta, Tool, ToolCall, Turn
from llavakit.errors import UserError
from llavakit.registry import CODECS

TOOLS = ["weather", "find"]
CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Ghent"}}</tool_call>'
STAGED = Stages(
    [
        Stage.tagged("SUMMARY"),
        Stage("REASONING", ("<REASONING>", "(Here begins REASONING)"), ("</REASONING>", "(Here ends REASONING)")),
    ],
    answer=Stage.tagged("CONCLUSION"),
)


def ghent(name="weather", **arguments):
    return ToolCall(name, json.dumps(arguments or {"town": "Ghent"}))


HERMES = {
    "plain": (" It is dry.\n", Turn("It is dry.")),
    "call": (f"Let me look. {CALL}", Turn("Let me look.", calls=[ghent()])),
    "two": (f"{CALL}\n{CALL.replace('weather', 'find')}", Turn(calls=[ghent(), ghent("find")])),
    "around": (f"A {CALL} B", Turn("A  B", calls=[ghent()])),
    "object": (' {"name": "find", "parameters": {"x": 1}} ', Turn(calls=[ghent("find", x=1)])),
    "other object": ('{"x": 1}', Turn('{"x": 1}')),
    "object and call": (f'{{"x": 1}} {CALL}', Turn('{"x": 1}', calls=[ghent()])),
    "text arguments": (CALL.replace('{"town": "Ghent"}', '"{\\"town\\": 1}"'), Turn(calls=[ghent(town=1)])),
    "unknown": (CALL.replace("weather", "rm"), Turn(CALL.replace("weather", "rm"))),
    "broken": ("<tool_call>{broken</tool_call>", Turn("<tool_call>{broken</tool_call>")),
    "broken then whole": (
        f"<tool_call>{{broken</tool_call> {CALL}",
        Turn("<tool_call>{broken</tool_call>", calls=[ghent()]),
    ),
    "open then whole": (f'<tool_call>{{"name": 1, {CALL}', Turn('<tool_call>{"name": 1,', calls=[ghent()])),
    "mentioned": ("Tags such as <tool_call> open a call.", Turn("Tags such as <tool_call> open a call.")),
    "marker in a string": (
        '<tool_call>{"name": "find", "arguments": {"x": "a</tool_call>b\\""}}</tool_call>',
        Turn(calls=[ToolCall("find", '{"x": "a</tool_call>b\\""}')]),
    ),
    "not closed": (CALL.removesuffix("</tool_call>"), Turn(calls=[ghent()])),
    "cut": ('<tool_call>{"name": "weather", "arg', Turn('<tool_call>{"name": "weather", "arg')),
    "cut marker": ("Wait <tool_ca", Turn("Wait <tool_ca")),
    "no number": (CALL.replace('"Ghent"', "NaN"), Turn(CALL.replace('"Ghent"', "NaN"))),
    "half a character": (CALL.replace("Ghent", r"\ud800"), Turn(CALL.replace("Ghent", r"\ud800"))),
    "deep": ("<tool_call>" + "{" * 5000 + "</tool_call>", Turn("<tool_call>" + "{" * 5000 + "</tool_call>")),
}
SUMMARY, REASONING = ("SUMMARY", "I add."), ("REASONING", "3 < 5")


def staged(*stages, content=""):
    return Turn(content, reasoning="\n\n".join(text for _, text in stages), stages=list(stages))


STAGES = {
    "whole": (
        "<SUMMARY> I add. </SUMMARY>\n\n<REASONING> 3 < 5 </REASONING>\n<CONCLUSION> <b>5</b> </CONCLUSION>\n",
        staged(SUMMARY, REASONING, content="<b>5</b>"),
    ),
    "other spelling": (
        "<SUMMARY>I add.</SUMMARY>(Here begins REASONING) 3 < 5 (Here ends REASONING)<CONCLUSION>5</CONCLUSION>",
        staged(SUMMARY, REASONING, content="5"),
    ),
    "no stages": ("The answer is <SUMMARY> 5.", Turn("The answer is <SUMMARY> 5.")),
    "answer alone": ("<CONCLUSION> 5 </CONCLUSION>", Turn("5")),
    "unclosed": ("<SUMMARY> I add. <CONCLUSION> 5 </CONCLUSION>", staged(SUMMARY, content="5")),
    "text outside": ("<SUMMARY> I add. </SUMMARY> So it is 5.", staged(SUMMARY, content="So it is 5.")),
    "empty": ("  \n", Turn()),
}
THINK = {
    "thought": ("<think>\nHm.\n</think>\n\nYes.", staged(("think", "Hm."), content="Yes.")),
    "mentions": ("<think>a</think>Use <think> tags.", staged(("think", "a"), content="Use <think> tags.")),
    "call": (f"<think>a</think>\n{CALL}", Turn(reasoning="a", stages=[("think", "a")], calls=[ghent()])),
    "none": ("Yes.", Turn("Yes.")),
}
CASES = [
    pytest.param(codec, text, turn, id=f"{name} {case}")
    for name, codec, cases in (("hermes", "hermes", HERMES), ("stages", STAGED, STAGES), ("think", "think", THINK))
    for case, (text, turn) in cases.items()
]


def streamed(codec, pieces, reason="stop", tools=TOOLS):
    parser = get_codec(codec).parser(tools)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return [*events, *parser.finish(reason)]


def bare(turn):
    return (turn.content, turn.reasoning, turn.stages, turn.calls)


@pytest.mark.parametrize(("codec", "text", "turn"), CASES)
def test_a_reply_is_read_alike_wherever_it_is_cut(codec, text, turn):
    assert bare(get_codec(codec).parse(text, TOOLS)) == bare(turn)
    cuts = range(1, len(text)) if len(text) < 200 else (1, 7, 2000, len(text) - 3)
    for cut in cuts:
        assert bare(Turn.of(streamed(codec, [text[:cut], text[cut:]]))) == bare(turn), cut
    assert bare(Turn.of(streamed(codec, text))) == bare(turn)


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "find"}', "{", '"', "ö", " ", "\n", "\\"]
        ),
        max_size=12,
    ).map("".join),
    st.integers(1, 5),
    st.sampled_from(["stop", "length"]),
)
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_alike_in_pieces_and_loses_nothing(text, size, reason):
    whole = Turn.of(streamed("think", [text], reason))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert bare(Turn.of(streamed("think", pieces, reason))) == bare(whole)
    assert (whole.content + whole.reasoning).count("ö") == text.count("ö")


@pytest.mark.parametrize(("codec", "text", "turn"), [case for case in CASES if "cut" not in case.id])
def test_what_was_read_is_written_so_that_it_is_read_again(codec, text, turn):
    codec = get_codec(codec)
    assert bare(codec.parse(codec.render(turn), TOOLS)) == bare(turn)


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_reply_cut_in_its_reasoning_has_no_content(reason):
    text = "<SUMMARY> I add. </SUMMARY><REASONING> 3 < 5 so"
    events = streamed(STAGED, text, reason)
    turn = Turn.of(events)
    assert (turn.content, turn.reasoning) == ("", "I add.\n\n3 < 5 so")
    assert bool(turn.traces) == (reason == "stop")
    assert not any(isinstance(event, TextDelta) for event in events)
    cut = Turn.of(streamed(STAGED, "<SUMMARY> I add. </SUMMARY><CONCLU", reason))
    assert cut.content == ("" if reason == "length" else "<CONCLU")
    missing = Turn.of(streamed(STAGED, "<SUMMARY> I add. </SUMMARY>", reason))
    assert missing.traces == ([] if reason == "length" else [("malformed", {"problem": "CONCLUSION is missing"})])


def test_text_is_let_out_as_soon_as_it_is_certain():
    parser = get_codec("hermes").parser(TOOLS)
    assert parser.feed("Let me <too") == [TextDelta(text="Let me")]
    assert parser.feed("lbox> ") == [TextDelta(text=" <toolbox>")]
    assert parser.feed(CALL[:-1]) == []
    assert parser.feed(">") == [CallEvent(call=ghent())]
    parser = STAGED.parser()
    assert parser.feed("<SUMMARY> I a") == [ReasoningDelta(text="I a", stage="SUMMARY")]


def test_without_tools_a_call_is_text_and_of_several_one_may_be_wanted():
    assert get_codec("hermes").parse(CALL) == Turn(CALL)
    parser = get_codec("hermes").parser(TOOLS, parallel=False)
    turn = Turn.of([*parser.feed(CALL + CALL), *parser.finish()])
    assert len(turn.calls) == 1
    assert turn.traces[0][0] == "surplus_call"


def test_a_conversation_with_tools_becomes_plain_messages():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {**Turn("I look.", calls=[ghent(), ghent("find")]).message()},
        {"role": "tool", "tool_call_id": "1", "content": "dry"},
        {"role": "tool", "content": [{"type": "text", "text": "a map:"}, {"type": "image", "image": "m.png"}]},
        {"role": "user", "content": "Thanks"},
    ]
    tools = [Tool("weather", "The weather of a town"), Tool("find")]
    system, user, called, results, thanks = get_codec("hermes").prepare(messages, tools, "required")
    assert system["content"][0]["text"] == "Be brief."
    assert (
        '{"name": "weather", "description": "The weather of a town"}\n{"name": "find"}' in system["content"][2]["text"]
    )
    assert system["content"][2]["text"].endswith("You must call one of them.")
    assert (user, thanks) == (messages[1], messages[5])
    assert called == {"role": "assistant", "content": f"I look.\n{CALL}\n{CALL.replace('weather', 'find')}"}
    assert results["role"] == "user"
    assert [part.get("text", part["type"]) for part in results["content"]] == [
        "<tool_response>\n",
        "dry",
        "\n</tool_response>",
        "\n<tool_response>\n",
        "a map:",
        "image",
        "\n</tool_response>",
    ]
    assert get_codec("hermes").prepare(messages, tools, "none")[0] == messages[0]
    assert get_codec("hermes").prepare(messages[1:2], tools)[0]["role"] == "system"


def test_what_a_codec_cannot_say_is_refused_in_one_line():
    for problem, arguments in (
        ("takes none", ([], [Tool("x")])),
        ("no tool calls", ([Turn(calls=[ghent()]).message()],)),
        (r"messages\.0\.tool_calls\.0", ([{"role": "assistant", "tool_calls": ["x"]}],)),
    ):
        with pytest.raises(UserError, match=problem):
            get_codec("plain").prepare(*arguments)
    with pytest.raises(UserError, match="unknown assistant codec 'hermse'; did you mean 'hermes'"):
        get_codec("hermse")
    assert {get_codec(name).parse("a").content for name in CODECS} == {"a"}


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"town": "Ghent"}}</tool_call>', '{"town": "Ghent"}'),
        ('{"town": "Ghent"}}</tool_call> and <tool_call>{"name": "find"}</tool_call>', '{"town": "Ghent"}'),
        ('{"mark": "</tool_call>"}}</tool_call>', '{"mark": "</tool_call>"}'),
        ('{"town": "Ghe', '{"town": "Ghe'),
        ("no idea", "no idea"),
        ("", ""),
    ],
)
def test_a_reply_that_was_begun_as_a_call_is_that_call(written, arguments, cut):
    codec = get_codec("hermes")
    parser = codec.call_parser("weather")
    events = [event for place in range(0, len(written), cut) for event in parser.feed(written[place : place + cut])]
    turn = Turn.of([*events, *parser.finish()])
    assert (turn.content, turn.calls) == ("", [ToolCall("weather", arguments)])
    if arguments.endswith("}"):
        assert codec.parse(codec.opening("weather") + arguments + "}</tool_call>", ["weather"]).calls == turn.calls


def test_a_named_function_is_called_whatever_the_model_would_say():
    from tiny_server import small_chat

    chat, tools = small_chat(), [Tool("find"), Tool("weather", "The weather of a town")]
    question = [{"role": "user", "content": "Is this a picture?"}]
    options = {"tools": tools, "max_new_tokens": 6}
    assert chat.submit(question, **options).result().calls == []
    for name in ("find", "weather"):
        answer = chat.submit(question, tool_choice=name, **options).result()
        assert [call.name for call in answer.calls] == [name]
        assert answer.content == ""
    with pytest.raises(UserError, match="'sing' is none of the tools"):
        chat.submit(question, tool_choice="sing", **options)
    chat.codec = get_codec("plain")
    with pytest.raises(UserError, match="tools: this model takes none"):
        chat.submit(question, tool_choice="find", **options)
