"""OpenAI's client unmodified: tools, log probabilities and several replies as streams; videos, volumes, uploads."""

from __future__ import annotations

import base64
import gzip
import io
import json
import threading

import numpy as np
import pytest
import tiny

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
from tiny_server import Running, ask, data_url, media, png, small_chat  # noqa: E402

from llavakit.generation.request import RequestHandle, StreamChunk  # noqa: E402
from llavakit.serving.app import Settings  # noqa: E402

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Ghent"}}</tool_call>'


class Scripted:
    """Stands for the engine: says what it was told, letter by letter, and keeps the prompts."""

    max_batch, max_length, waiting, active, busy = 8, 512, 0, 0, False

    def __init__(self, tokenizer, says: str, reason: str = "stop") -> None:
        self.tokenizer, self.says, self.reason, self.prompts = tokenizer, says, reason, []

    def start(self) -> None: ...

    def stop(self, drain: bool) -> None: ...

    def submit(self, request, *, stream, listener):
        handle = RequestHandle(self, request)
        handle.listener = listener
        self.prompts.append(self.tokenizer.decode(request.ids()))

        def speak() -> None:
            for reply in handle.replies:
                for letter in self.says:
                    handle.deliver(StreamChunk(reply.index, (5,), letter))
                handle.deliver(StreamChunk(reply.index, (2,), finish_reason=self.reason))

        threading.Timer(0.02, speak).start()
        return handle


@pytest.fixture
def scripted():
    started = []

    def start(says: str):
        chat = small_chat()
        chat.engine = Scripted(chat.processor.tokenizer, says)
        started.append(Running(chat, Settings(names=("tiny",))))
        return started[-1].client(), chat.engine

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="module")
def client():
    running = Running(small_chat(), Settings(names=("tiny",), default_tokens=8))
    yield running.client()
    running.stop()


def test_a_tool_is_described_called_and_answered(scripted):
    client, engine = scripted(f"Let me look. {CALL}")
    messages = ask("How is the weather in Ghent?")
    whole = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], tool_choice="auto")
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"town": "Ghent"})
    assert "The weather of a town" in engine.prompts[0]
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "dry"},
    ]
    client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
    assert '"town": "Ghent"' in engine.prompts[1]
    assert "Let me look." in engine.prompts[1]
    assert "dry" in engine.prompts[1]


def test_a_streamed_tool_call(scripted):
    client, _ = scripted(CALL)
    stream = client.chat.completions.create(model="tiny", messages=ask(), tools=[WEATHER], stream=True)
    deltas = [chunk.choices[0] for chunk in stream]
    calls = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["weather"]
    assert json.loads(calls[0].function.arguments) == {"town": "Ghent"}
    assert not any(choice.delta.content for choice in deltas)
    assert deltas[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "prompt"),
    [
        ("required", "You must call one of them"),
        ({"type": "function", "function": {"name": "weather"}}, "You must call weather"),
        ("none", None),
    ],
)
def test_tool_choice(scripted, choice, prompt):
    client, engine = scripted(CALL)
    answer = client.chat.completions.create(model="tiny", messages=ask(), tools=[WEATHER], tool_choice=choice)
    if prompt is None:
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].finish_reason == "stop"
        assert "weather" not in engine.prompts[0]
    else:
        assert answer.choices[0].finish_reason == "tool_calls"
        assert prompt in engine.prompts[0]


def test_streams_of_several_replies_with_log_probabilities(client):
    options = {"model": "tiny", "messages": ask(url=data_url(png())), "n": 2, "seed": 3, "temperature": 1.0}
    options |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    texts, logs, ends = ["", ""], [[], []], [None, None]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logs[choice.index] += choice.logprobs.content if choice.logprobs else []
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert ends == [choice.finish_reason for choice in whole.choices]
    for streamed, choice in zip(logs, whole.choices, strict=True):
        assert [entry.token for entry in streamed] == [entry.token for entry in choice.logprobs.content]
        assert all(len(entry.top_logprobs) == 2 for entry in streamed)


def test_a_stop_string_ends_a_stream_and_is_not_part_of_it(client):
    options = {"model": "tiny", "messages": ask(), "max_tokens": 12}
    whole = client.chat.completions.create(**options).choices[0].message.content
    mark = whole[len(whole) // 2 :][:2]
    chunks = list(client.chat.completions.create(**options, stop=[mark, "never said"], stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.split(mark)[0].strip()
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_error_in_a_stream_is_raised_by_the_client(client):
    """A prompt that is too long is refused by its characters, and if need be by its positions."""
    for text, said in (("word " * 2000, "10000 characters"), ("w o r d " * 300, "positions")):
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            client.chat.completions.create(model="tiny", messages=ask(text), stream=True)
        assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


@pytest.fixture(scope="module")
def every_kind():
    """A model that takes images, videos and volumes."""
    from llavakit.systems.medm_vl import encoders  # noqa: F401  (its encoder is registered with it)

    squash = {"type": "squash", "size": tiny.SIZE}
    deep = {"model_type": "m3d_clip_vision", "image_size": [8, 16, 16], "patch_size": [2, 4, 4], "hidden_size": 16}
    deep |= {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    routes = {
        "image": {"views": squash},
        "video": {"views": {"type": "frames", "frame": squash}, "arrange": {"type": "frames", "newline": "one_token"}},
        "volume": {
            "views": {"type": "volume_box", "size": [8, 16, 16]},
            "encoder": "volume_tower",
            "connector": "volume_projector",
        },
    }
    chat = small_chat(
        media=routes,
        extra_encoders={"volume_tower": {"config": deep, "layer": -1}},
        extra_connectors={"volume_projector": {"type": "pooling", "stride": [2, 2, 2], "encoder": "volume_tower"}},
    )
    running = Running(chat, Settings(names=("tiny",), default_tokens=6))
    yield running.client(), chat
    running.stop()


def clip() -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 15 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def scans() -> dict[str, bytes]:
    """One volume as .npy and as compressed NIfTI."""
    nibabel = pytest.importorskip("nibabel")
    values = np.random.default_rng(0).normal(0, 300, (12, 20, 24)).astype(np.float32)
    buffer = io.BytesIO()
    np.save(buffer, values)
    nifti = nibabel.Nifti1Image(values.transpose(2, 1, 0)[::-1, ::-1], np.diag([1.0, 1.0, 1.0, 1.0]))
    return {"npy": buffer.getvalue(), "nii.gz": gzip.compress(nifti.to_bytes())}


def test_videos_and_volumes_inline_and_uploaded(every_kind):
    client, chat = every_kind
    contents = {"video_url": [clip()], "volume_url": list(scans().values())}
    for kind, files in contents.items():
        for content in files:
            name = kind.removesuffix("_url")
            parts = [{"type": name, name: content}, {"type": "text", "text": "What is this?"}]
            wanted = chat.chat([{"role": "user", "content": parts}], max_new_tokens=6)
            stored = client.files.create(file=("medium", content), purpose="user_data")
            assert (stored.bytes, stored.purpose) == (len(content), "user_data")
            inline = f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
            for url in (inline, f"upload:{stored.id}"):
                answer = client.chat.completions.create(model="tiny", messages=media(kind, url))
                assert answer.choices[0].message.content == wanted
            client.files.delete(stored.id)


def test_media_of_the_wrong_kind_are_refused_by_field(every_kind):
    client, _ = every_kind
    for kind, words in (
        ("video_url", "not a readable video"),
        ("volume_url", "not a readable NIfTI"),
        ("image_url", "no"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            client.chat.completions.create(model="tiny", messages=media(kind, data_url(b"neither of them")))
        assert caught.value.param == f"messages.0.content.0.{kind}"
        assert "/tmp" not in caught.value.message


OTHER = {"type": "function", "function": {"name": "find"}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called_whatever_the_model_says(client, stream):
    named = {"type": "function", "function": {"name": "find"}}
    options = {"tools": [WEATHER, OTHER], "tool_choice": named, "max_tokens": 6, "stream": stream}
    said = client.chat.completions.create(model="tiny", messages=ask(), **options)
    choices = [chunk.choices[0] for chunk in said if chunk.choices] if stream else said.choices
    turns = [choice.delta if stream else choice.message for choice in choices]
    assert [call.function.name for turn in turns for call in turn.tool_calls or ()] == ["find"]
    assert not any(turn.content for turn in turns)
    assert choices[-1].finish_reason == "length"  # its arguments were cut
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        client.chat.completions.create(model="tiny", messages=ask(), **options | {"tools": [WEATHER]})


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_named_function_that_is_called_in_time_is_a_call(reason):
    chat = small_chat()
    chat.engine = Scripted(chat.processor.tokenizer, '{"town": "Ghent"}}</tool_call> and so on', reason=reason)
    running = Running(chat, Settings(names=("tiny",)))
    try:
        named = {"type": "function", "function": {"name": "weather"}}
        options = {"tools": [WEATHER], "tool_choice": named, "model": "tiny", "messages": ask()}
        (choice,) = running.client().chat.completions.create(**options).choices
        assert choice.message.tool_calls[0].function.arguments == '{"town": "Ghent"}'
        assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    finally:
        running.stop()


@pytest.mark.parametrize("parallel", [True, False])
def test_parallel_calls_are_as_many_as_a_request_wants(scripted, parallel):
    client, _ = scripted(f"{CALL}\n{CALL.replace('Ghent', 'Bruges')}")
    options = {"tools": [WEATHER], "parallel_tool_calls": parallel}
    whole = client.chat.completions.create(model="tiny", messages=ask(), **options)
    calls = [json.loads(call.function.arguments)["town"] for call in whole.choices[0].message.tool_calls]
    assert calls == (["Ghent", "Bruges"] if parallel else ["Ghent"])
    streamed = client.chat.completions.create(model="tiny", messages=ask(), stream=True, **options)
    found = [call for chunk in streamed for call in chunk.choices[0].delta.tool_calls or ()]
    assert len(found) == len(calls)


def test_a_whole_reply_goes_back_in_as_history(scripted):
    """With all its fields, most of them null."""
    client, engine = scripted(f"Let me look. {CALL}")
    first = client.chat.completions.create(model="tiny", messages=ask(), tools=[WEATHER])
    history = [*ask(), first.choices[0].message.model_dump()]
    assert None in history[1].values()
    call = history[1]["tool_calls"][0]["id"]
    result = {"role": "tool", "tool_call_id": call, "content": "dry"}
    client.chat.completions.create(model="tiny", messages=[*history, result], tools=[WEATHER])
    assert "Let me look." in engine.prompts[1]
    assert "Ghent" in engine.prompts[1]
