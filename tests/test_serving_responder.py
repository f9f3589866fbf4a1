"""The server over every kind of responder: reasoning and calls in their channels, options, hidden calls, failures."""

from __future__ import annotations

import base64
import io
import json
import threading
import time

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
import tiny_foreign  # noqa: E402
from fake_api import Failure, FakeAPI  # noqa: E402
from PIL import Image  # noqa: E402
from test_responder import Endless, Vote  # noqa: E402
from test_serving_client import CALL, WEATHER, Scripted  # noqa: E402
from tiny_server import Running, ask, data_url, png, small_chat  # noqa: E402

import llavakit  # noqa: E402
from llavakit.conversation.stages import Stage, Stages  # noqa: E402
from llavakit.conversation.turns import PictureEvent, ReasoningDelta, TextDelta, TraceEvent  # noqa: E402
from llavakit.errors import UserError  # noqa: E402
from llavakit.generation.remote import APIClient, RemoteResponder  # noqa: E402
from llavakit.generation.responder import Responder  # noqa: E402
from llavakit.registry import CODECS  # noqa: E402
from llavakit.serving.app import Settings, create_app  # noqa: E402


class Staged(Stages):
    """A codec of stages whose conclusion may hold a call."""

    def __init__(self):
        stages = [Stage.tagged("SUMMARY"), Stage.tagged("REASONING")]
        super().__init__(stages, answer=Stage.tagged("CONCLUSION"), content="hermes")


@pytest.fixture(scope="module", autouse=True)
def codec():
    CODECS.add("test-staged", Staged)


@pytest.fixture
def served():
    started = []

    def serve(responder, **settings):
        started.append(Running(responder, Settings(names=("tiny",), **settings)))
        return started[-1].client()

    yield serve
    for running in started:
        running.stop()


def collected(stream):
    """A stream's channels, and what came in which order."""
    found = {"content": "", "reasoning_content": "", "tool_calls": {}, "images": [], "trace": []}
    order, reason = [], None
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            for name in ("content", "reasoning_content"):
                found[name] += delta.get(name, "")
            for call in delta.get("tool_calls", ()):
                known = found["tool_calls"].setdefault(call["index"], {"ids": [], "names": [], "arguments": ""})
                known["ids"] += [call["id"]] if call.get("id") else []
                known["names"] += [call["function"]["name"]] if call["function"].get("name") else []
                known["arguments"] += call["function"]["arguments"]
            found["images"] += delta.get("images", ())
            found["trace"] += delta.get("trace", ())
            order += [name for name in delta if delta[name] and name != "role"]
            reason = choice.finish_reason or reason
    return found, order, reason


WHOLE = "<SUMMARY> I add. </SUMMARY>\n\n<REASONING> 3 < 5 </REASONING>\n<CONCLUSION> <b>5</b> </CONCLUSION>"
REPLIES = {
    "whole": (WHOLE, "stop", "I add.\n\n3 < 5", "<b>5</b>", None),
    "cut": (WHOLE.partition("</R")[0], "length", "I add.\n\n3 < 5", "", None),
    "no conclusion": (WHOLE.partition("<CONC")[0], "stop", "I add.\n\n3 < 5", "", "CONCLUSION is missing"),
    "unclosed": ("<SUMMARY> a <CONCLUSION> b", "stop", "a", "b", "CONCLUSION was not closed"),
    "no stages": ("It is <SUMMARY> 5.", "stop", "", "It is <SUMMARY> 5.", None),
    "call": (f"<SUMMARY> a </SUMMARY><CONCLUSION>Wait. {CALL}</CONCLUSION>", "stop", "a", "Wait.", None),
}


@pytest.mark.parametrize("case", REPLIES)
def test_streamed_and_whole_answers_agree_in_every_channel(served, case):
    says, reason, reasoning, content, problem = REPLIES[case]
    chat = small_chat(codec="test-staged")
    chat.engine = Scripted(chat.processor.tokenizer, says, reason=reason)
    client = served(chat)
    options = {"model": "tiny", "messages": ask(), "tools": [WEATHER], "extra_body": {"trace": True}}
    whole = client.chat.completions.create(**options).choices[0]
    found, order, ended = collected(client.chat.completions.create(**options, stream=True))
    said = whole.message.model_dump(exclude_none=True)
    assert found["content"] == (said["content"] or "") == content
    assert found["reasoning_content"] == said.get("reasoning_content", "") == reasoning
    assert found["trace"] == said["trace"] == ([{"name": "malformed", "data": {"problem": problem}}] if problem else [])
    assert ended == whole.finish_reason == ("tool_calls" if case == "call" else reason)
    if "content" in order and "reasoning_content" in order:  # the channel is switched once
        assert order.index("content") > max(n for n, name in enumerate(order) if name == "reasoning_content")
    if case == "call":
        (call,) = found["tool_calls"].values()
        assert len(call["ids"]) == 1
        assert call["names"] == ["weather"]
        assert call["arguments"] == said["tool_calls"][0]["function"]["arguments"]


def test_an_answer_comes_back_as_a_message_and_is_written_as_the_model_wrote_it(served):
    chat = small_chat(codec="test-staged")
    chat.engine = Scripted(chat.processor.tokenizer, REPLIES["call"][0])
    client = served(chat)
    first = client.chat.completions.create(model="tiny", messages=ask(), tools=[WEATHER], extra_body={"trace": True})
    message = first.choices[0].message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "dry"}
    client.chat.completions.create(model="tiny", messages=[*ask(), message, result], tools=[WEATHER])
    prompt = chat.engine.prompts[1]
    assert f"<CONCLUSION> Wait.\n{CALL} </CONCLUSION>" in prompt
    assert "<tool_response>\ndry\n</tool_response>" in prompt


def test_at_most_one_call_where_one_is_wanted(served):
    chat = small_chat()
    chat.engine = Scripted(chat.processor.tokenizer, CALL + CALL)
    client = served(chat)
    options = {"model": "tiny", "messages": ask(), "tools": [WEATHER]}
    several = client.chat.completions.create(**options).choices[0].message
    one = client.chat.completions.create(**options, parallel_tool_calls=False).choices[0].message
    assert (len(several.tool_calls), len(one.tool_calls)) == (2, 1)


def test_a_model_without_tools_refuses_them(served):
    client = served(small_chat(codec="plain"))
    with pytest.raises(openai.BadRequestError, match="takes none") as caught:
        client.chat.completions.create(model="tiny", messages=ask(), tools=[WEATHER])
    assert caught.value.param == "tools"


def test_a_composed_responder_with_options_of_its_own(served):
    chat = small_chat()
    client = served(Vote(chat))
    options = {"model": "tiny", "messages": ask(), "max_tokens": 4, "seed": 1, "temperature": 1.0}
    extra = {"members": 2, "trace": True}
    whole = client.chat.completions.create(**options, extra_body=extra)
    message = whole.choices[0].message.model_dump(exclude_none=True)
    assert message["reasoning_content"] == "vote of 2"
    assert message["trace"] == [{"name": "drafts", "data": {"texts": message["trace"][0]["data"]["texts"]}}]
    assert message["content"] in message["trace"][0]["data"]["texts"]
    assert whole.usage.completion_tokens == 8
    assert whole.usage.completion_tokens_details.model_dump()["drafted"] == 8
    stream = client.chat.completions.create(
        **options, extra_body=extra, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    found, _, reason = collected(chunks)
    assert (found["content"], found["trace"], reason) == (message["content"], message["trace"], "stop")
    assert chunks[-1].usage.completion_tokens == 8
    several = client.chat.completions.create(**options, n=3).choices
    assert [choice.index for choice in several] == [0, 1, 2]
    for body, param in (({"members": "two"}, "members"), ({"member": 2}, None), ({"logprobs": True}, "logprobs")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**options, extra_body=body)
        assert caught.value.param == param
    schema = create_app(Vote(chat)).openapi()["components"]["schemas"]["ChatRequest"]
    assert "members" in schema["properties"]


class Everything(Responder):
    """A picture between texts; fails where it is told to."""

    def run(self, call):
        text = call.messages[-1]["content"][-1]["text"]
        self.seen = call.messages
        if text == "refuse":
            raise UserError("messages.0.content: says nothing")
        yield ReasoningDelta(text="Drawing.")
        yield TextDelta(text="Here:")
        if text == "break":
            raise KeyError("x")
        yield PictureEvent(image=Image.new("RGB", (3, 2), "red"), caption="a square")
        yield TraceEvent(name="drew", data={})


def test_pictures_are_part_of_an_answer(served):
    responder = Everything(name="draws")
    client = served(responder)
    whole = client.chat.completions.create(model="tiny", messages=ask()).choices[0].message.model_dump()
    found, _, _ = collected(client.chat.completions.create(model="tiny", messages=ask(), stream=True))
    (picture,) = whole["images"]
    assert found["images"] == [picture]
    assert picture["caption"] == "a square"
    content = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(content)).size == (3, 2)
    assert "trace" not in whole  # unless it is asked for
    history = [*ask(), {name: value for name, value in whole.items() if value is not None}, *ask("again")]
    client.chat.completions.create(model="tiny", messages=history)
    (earlier,) = responder.seen[1]["images"]
    assert (bytes(earlier["image"]), earlier["caption"]) == (content, "a square")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{**ask()[0], "images": whole["images"]}])
    assert caught.value.param == "messages.0.images"


def test_failures_of_a_responder_are_answers(served):
    client = served(Everything(name="draws"))
    with pytest.raises(openai.BadRequestError, match="says nothing") as caught:
        client.chat.completions.create(model="tiny", messages=ask("refuse"))
    assert caught.value.param == "messages.0.content"
    with pytest.raises(openai.InternalServerError, match="the server's log says why"):
        client.chat.completions.create(model="tiny", messages=ask("break"))
    with pytest.raises(openai.APIError, match="the server's log says why"):
        list(client.chat.completions.create(model="tiny", messages=ask("break"), stream=True))
    assert client.chat.completions.create(model="tiny", messages=ask()).choices[0].message.content == "Here:"


def test_a_client_that_goes_away_ends_the_hidden_calls(served):
    chat = small_chat()
    endless = Endless(chat)
    client = served(endless, keep_alive=0.2)
    stream = client.chat.completions.create(model="tiny", messages=ask(), max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert endless.ended.wait(10)
    deadline = time.time() + 10
    while (endless.active or chat.active) and time.time() < deadline:
        time.sleep(0.02)
    assert (endless.active, chat.active) == (0, 0)


def test_a_model_behind_another_api(served):
    def reply(body):
        text = body["messages"][-1]["content"][-1]["text"]
        return Failure(400, "secret of the other server") if text == "fail" else f"{text.upper()}!"

    with FakeAPI(reply) as upstream:
        client = served(RemoteResponder(APIClient(upstream.url, retries=0), "m"))
        messages = ask("hello", url=data_url(png()))
        assert client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content == "HELLO!"
        found, _, _ = collected(client.chat.completions.create(model="tiny", messages=messages, stream=True))
        assert found["content"] == "HELLO!"
        assert upstream.bodies[0][2]["messages"][0]["content"][0]["image_url"]["url"] == data_url(png())
        with pytest.raises(openai.InternalServerError, match="did not answer") as caught:
            client.chat.completions.create(model="tiny", messages=ask("fail", url=data_url(png())))
        assert caught.value.status_code == 502
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.BadRequestError, match="no log probabilities"):
            client.chat.completions.create(model="tiny", messages=messages, logprobs=True)


def test_a_model_of_another_family(served, tmp_path):
    model = llavakit.load(tiny_foreign.mllama(tmp_path / "mllama"), device="cpu")
    client = served(model)
    picture = png(size=(32, 16))
    options = {"model": "tiny", "messages": ask(url=data_url(picture)), "max_tokens": 6, "logprobs": True}
    choice = client.chat.completions.create(**options).choices[0]
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in this picture?"}]
    assert choice.message.content == model.chat([{"role": "user", "content": parts}], max_new_tokens=6)
    assert len(choice.logprobs.content) == 6
    found, _, _ = collected(client.chat.completions.create(**options, stream=True))
    assert found["content"] == choice.message.content
    with pytest.raises(openai.BadRequestError, match="positions") as caught:
        client.chat.completions.create(model="tiny", messages=ask("word " * 300))
    assert caught.value.code == "context_length_exceeded"


def test_many_clients_at_once_get_what_each_would_get_alone(served):
    chat = small_chat()
    vote = Vote(chat)
    client = served(vote)
    texts = [f"What is {number}?" for number in range(12)]
    options = {"model": "tiny", "max_tokens": 4, "seed": 3, "temperature": 1.0}
    found = {}

    def one(text):
        found[text] = client.chat.completions.create(messages=ask(text), **options).choices[0].message.content

    threads = [threading.Thread(target=one, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    again = {text: client.chat.completions.create(messages=ask(text), **options) for text in texts}
    assert found == {text: answer.choices[0].message.content for text, answer in again.items()}


def test_health_and_models_know_no_engine(served):
    running = served(Everything(name="draws"))
    base = str(running.base_url).removesuffix("/v1/")
    assert json.loads(httpx.get(f"{base}/health").text) == {"status": "ok", "waiting": 0, "active": 0}
    assert "llavakit_active" in httpx.get(f"{base}/metrics").text
