"""`/v1/responses` with OpenAI's client unmodified: items, pictures, tools, streams, and going on from a response."""

from __future__ import annotations

import base64
import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
import httpx  # noqa: E402
from test_serving_client import CALL, Scripted  # noqa: E402
from test_serving_responder import Everything  # noqa: E402
from tiny_server import Running, data_url, expected, png, small_chat  # noqa: E402

from llavakit.serving.app import Settings  # noqa: E402
from llavakit.serving.uploads import UploadPolicy  # noqa: E402

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}


@pytest.fixture(scope="module")
def running():
    running = Running(small_chat(), Settings(names=("tiny",), default_tokens=8))
    yield running
    running.stop()


@pytest.fixture
def client(running):
    return running.client()


@pytest.fixture
def scripted():
    started = []

    def start(says: str, reason: str = "stop", **settings):
        chat = small_chat()
        chat.engine = Scripted(chat.processor.tokenizer, says, reason)
        started.append(Running(chat, Settings(names=("tiny",), **settings)))
        return started[-1], chat.engine

    yield start
    for running in started:
        running.stop()


def picture(url: str, text: str = "What is in this picture?"):
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_text_and_pictures_are_answered_as_in_the_chat_api(client):
    chat = small_chat()
    plain = client.responses.create(model="tiny", input="What is in this picture?")
    assert plain.output_text == expected(chat, max_new_tokens=8)
    assert (plain.status, plain.object, plain.error) in (
        ("completed", "response", None),
        ("incomplete", "response", None),
    )
    assert plain.usage.total_tokens == plain.usage.input_tokens + plain.usage.output_tokens
    seen = client.responses.create(model="tiny", input=picture(data_url(png("blue"))))
    from io import BytesIO

    from PIL import Image

    assert seen.output_text == expected(chat, image=Image.open(BytesIO(png("blue"))), max_new_tokens=8)
    uploaded = client.files.create(file=("a.png", png("blue")), purpose="vision")
    part = {"type": "input_image", "file_id": uploaded.id, "detail": "auto"}
    named = client.responses.create(
        model="tiny",
        input=[{"role": "user", "content": [part, {"type": "input_text", "text": "What is in this picture?"}]}],
    )
    assert named.output_text == seen.output_text


def test_a_stream_adds_up_to_the_whole_answer(client):
    options = {"model": "tiny", "input": picture(data_url(png())), "max_output_tokens": 6}
    whole = client.responses.create(**options)
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added")
    ]
    assert kinds[-4:] == [
        *("response.output_text.done", "response.content_part.done"),
        *("response.output_item.done", "response.incomplete"),
    ]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text == events[-1].response.output_text == events[-4].text
    with client.responses.stream(**options) as stream:  # the client's own accumulation
        *_, last = stream
    assert last.response.output[0].content[0].text == whole.output_text


def test_log_probabilities(client):
    options = {"model": "tiny", "input": "What is it?", "top_logprobs": 2, "max_output_tokens": 5}
    whole = client.responses.create(**options, include=["message.output_text.logprobs"])
    entries = whole.output[0].content[0].logprobs
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == whole.output_text
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert client.responses.create(model="tiny", input="What is it?").output[0].content[0].logprobs == []


def test_a_function_is_called_and_its_output_answered(scripted):
    running, engine = scripted(f"Let me look. {CALL}")
    client = running.client()
    first = client.responses.create(model="tiny", input="How is the weather in Ghent?", tools=[WEATHER])
    message, call = first.output
    assert message.content[0].text.strip() == "Let me look."
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"town": "Ghent"})
    assert "The weather of a town" in engine.prompts[0]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "dry"}
    client.responses.create(model="tiny", input=[output], previous_response_id=first.id, tools=[WEATHER])
    history = [{"role": "user", "content": "How is the weather in Ghent?"}, *first.output, output]
    client.responses.create(model="tiny", input=history, tools=[WEATHER])
    assert engine.prompts[1] == engine.prompts[2]
    for said in ("How is the weather", "Let me look.", '"town": "Ghent"', "dry"):
        assert said in engine.prompts[1]
    forced = client.responses.create(
        model="tiny", input="x", tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}
    )
    assert "You must call weather" in engine.prompts[3]
    assert forced.tool_choice.name == forced.tools[0].name == "weather"


def test_a_streamed_call(scripted):
    running, _ = scripted(CALL)
    events = list(running.client().responses.create(model="tiny", input="?", tools=[WEATHER], stream=True))
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments) == {"town": "Ghent"}
    assert events[-1].response.output[0].name == "weather"
    assert not [event for event in events if event.type == "response.output_text.delta" and event.delta.strip()]


def test_a_response_goes_on_with_its_pictures(client):
    first = client.responses.create(model="tiny", input=picture(data_url(png("green"))), instructions="Be brief.")
    second = client.responses.create(model="tiny", input="And now?", previous_response_id=first.id)
    again = [*picture(data_url(png("green"))), *first.output, {"role": "user", "content": "And now?"}]
    assert second.output_text == client.responses.create(model="tiny", input=again).output_text
    third = client.responses.create(model="tiny", input="And then?", previous_response_id=second.id)
    again += [*second.output, {"role": "user", "content": "And then?"}]
    assert third.output_text == client.responses.create(model="tiny", input=again).output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_what_is_kept_belongs_to_a_key_is_bounded_and_forgotten():
    policy = UploadPolicy(total_bytes=200_000, owner_bytes=20_000)
    running = Running(small_chat(), Settings(names=("tiny",), api_keys=("a", "b"), default_tokens=3, responses=policy))
    try:
        mine, other = running.client("a"), running.client("b")
        first = mine.responses.create(model="tiny", input="x")
        assert first.model_extra["store"] is True
        for use in (
            lambda: other.responses.retrieve(first.id),
            lambda: other.responses.delete(first.id),
            lambda: other.responses.create(model="tiny", input="y", previous_response_id=first.id),
        ):
            with pytest.raises(openai.NotFoundError, match="is unknown or has been forgotten"):
                use()
        mine.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            mine.responses.retrieve(first.id)
        unkept = mine.responses.create(model="tiny", input="x", store=False)
        with pytest.raises(openai.NotFoundError):
            mine.responses.retrieve(unkept.id)
        large = mine.responses.create(model="tiny", input=picture(data_url(png(size=(40, 30)) + bytes(20_000))))
        assert large.model_extra["store"] is False
        several = [mine.responses.create(model="tiny", input="x") for _ in range(8)]
        with pytest.raises(openai.NotFoundError):  # the oldest made room
            mine.responses.retrieve(several[0].id)
        assert mine.responses.retrieve(several[-1].id).id == several[-1].id
        assert running.app.state.service.responses.bytes <= 20_000
    finally:
        running.stop()


def test_reasoning_and_pictures_are_items():
    responder = Everything(name="draws")
    running = Running(responder, Settings(names=("tiny",)))
    try:
        client = running.client()
        whole = client.responses.create(model="tiny", input="x", extra_body={"trace": True})
        assert [item.type for item in whole.output] == ["reasoning", "message", "image_generation_call"]
        reasoning = next(item for item in whole.output if item.type == "reasoning")
        assert reasoning.content[0].text
        streamed = list(client.responses.create(model="tiny", input="x", stream=True))[-1].response
        assert [item.type for item in streamed.output] == [item.type for item in whole.output]
        assert streamed.output_text == whole.output_text
        for item in whole.output:
            if item.type == "image_generation_call":
                assert base64.b64decode(item.result).startswith(b"\x89PNG")
        assert whole.model_extra["trace"]
        asked = {"role": "user", "content": "x"}
        for more in ({"input": [asked, *whole.output, asked]}, {"input": "x", "previous_response_id": whole.id}):
            client.responses.create(model="tiny", **more)
            (earlier,) = responder.seen[1]["images"]
            assert earlier["caption"] == "a square"
            assert bytes(earlier["image"]) == base64.b64decode(whole.output[2].result)
            assert responder.seen[1]["reasoning_content"] == "Drawing."
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0",
            "image_url or file_id",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "item_reference"),
        ({"input": "x", "previous_response_id": "resp-1"}, "previous_response_id", "unknown"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, None, "tool_choice"),
        ({"input": "x", "background": True}, "background", "False"),
        ({"input": "x", "maxtokens": 3}, None, "unknown field 'maxtokens'"),
        ({"input": []}, "input", "nothing to answer"),
        (
            {"input": [{"role": "user", "content": "a"}, *picture("data:image/png;base64,AAAA")]},
            "input",
            "input.1.content.0.image_url",
        ),
        ({"input": "word " * 2000}, "input", "characters"),
    ],
)
def test_a_wrong_field_is_named(running, body, param, said):
    answer = httpx.post(f"{running.url}/v1/responses", json={"model": "tiny", **body}, timeout=60)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert param is None or (error["param"] or "").startswith(param)
    assert "messages" not in error["message"]


def test_a_failure_in_a_stream_is_an_event(scripted):
    running, engine = scripted("x")

    def fails(request, *, stream, listener):
        raise RuntimeError("broken")

    engine.submit = fails
    with pytest.raises(openai.InternalServerError):
        running.client().responses.create(model="tiny", input="x", stream=True)
