"""The API client, remote responders, and asking many things: against a scripted server on the loopback interface."""

from __future__ import annotations

import base64
import io
import json
import threading
import time

import pytest
from fake_api import Failure, FakeAPI
from PIL import Image
from tiny_server import small_chat

import llavakit
from llavakit.conversation.turns import ReasoningDelta, TextDelta, Tool
from llavakit.errors import MediaError, UserError
from llavakit.generation import SamplingParams
from llavakit.generation.asking import Asker, content_of
from llavakit.generation.chat import Chat
from llavakit.generation.remote import APIClient, APIRefused, CallFailed, RemoteResponder
from llavakit.generation.response import Answer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Repeats wait milliseconds."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def ask(text):
    return [{"role": "user", "content": text}]


def said(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def echo(body):
    return said(body).upper()


def remote(server, **options):
    return RemoteResponder(APIClient(server.url, **{"retries": 2, **options}), "m")


# ---------------------------------------------------------------------- the client


def test_transient_failures_are_repeated_and_retry_after_is_kept():
    script = [Failure(429, headers={"Retry-After": "0.3"}), Failure(503), None]
    with FakeAPI(lambda body: script.pop(0) or "fine") as server:
        began = time.perf_counter()
        assert remote(server).chat(ask("q")) == "fine"
        assert time.perf_counter() - began >= 0.3
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, APIRefused, r"HTTP 401: .*is the key in \$OPENAI_API_KEY right\?"),
        (404, APIRefused, "HTTP 404"),
        (402, APIRefused, "HTTP 402"),
        (400, CallFailed, "HTTP 400: .*no such field"),
        (503, CallFailed, "still failing after 3 tries; .*HTTP 503"),
    ],
)
def test_errors_are_one_line_and_say_whether_others_may_succeed(status, kind, words):
    with FakeAPI(lambda body: Failure(status, "no such\nfield")) as server:
        responder = remote(server)
        with pytest.raises(kind, match=words) as caught:
            responder.chat(ask("q"))
        assert "\n" not in str(caught.value)
        assert responder.client.spent.failed == (kind is CallFailed)


def test_servers_that_are_gone_or_talk_nonsense_are_one_line():
    def hang_up(body):
        raise ConnectionError

    with FakeAPI(hang_up) as server, pytest.raises(CallFailed, match="still failing after 3 tries"):
        remote(server).chat(ask("q"))
    with pytest.raises(CallFailed, match="still failing"):
        remote(server).chat(ask("q"))
    with FakeAPI(lambda body: {"object": "list"}) as server, pytest.raises(CallFailed, match="not a chat completion"):
        remote(server).chat(ask("q"))
    for options, words in (
        ({"base_url": "localhost:8000"}, "is not a URL"),
        ({"max_cost": 1.0}, "max_cost needs prices"),
        ({"concurrency": 0}, "concurrency is 0"),
    ):
        with pytest.raises(UserError, match=words):
            APIClient(**options)


def test_calls_in_flight_are_bounded():
    def slow(body):
        time.sleep(0.03)
        return "x"

    with FakeAPI(slow) as server:
        client = APIClient(server.url, concurrency=3)
        with Asker(RemoteResponder(client, "m"), concurrency=9) as asker:
            asker.ask_all([ask(f"q{n}") for n in range(12)])
        assert server.most == 3


def test_money_is_counted_and_never_passes_its_ceiling():
    with FakeAPI(echo) as server:
        # A reply of 5 tokens costs 5; one call may cost its 100 tokens, and prompts are free here.
        responder = remote(server, price_out=1e6, max_cost=112, concurrency=4)
        with Asker(responder, sampling=SamplingParams(max_new_tokens=100)) as asker:
            with pytest.raises(APIRefused, match=r"15 of max_cost 112 is spent, and the next call may cost 100"):
                asker.ask_all([ask(f"q{n}") for n in range(12)])
            assert asker.responder.client.spent.cost == 15
        responder = remote(server, price_in=1e6, price_out=2e6)
        responder.chat(ask("q"))
        assert (responder.client.spent.cost, responder.client.spent.prompt_tokens) == (20, 10)


# ---------------------------------------------------------------------- responders


def test_a_request_and_an_answer_with_everything_in_it():
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": "Here.", "reasoning_content": "Hm.", "tool_calls": [call]}
    earlier = Answer(content="a", reasoning="b").message()
    sampling = SamplingParams(temperature=0.5, top_p=0.9, top_k=5, seed=1, max_new_tokens=7, stop=["x"])
    with FakeAPI(lambda body: message) as server:
        responder = remote(server)
        messages = [*ask("q"), earlier, {"role": "user", "content": [{"type": "text", "text": "r"}]}]
        for stream in (False, True):
            response = responder.submit(
                messages, sampling, tools=[Tool("find")], tool_choice="find", parallel_calls=False, stream=stream
            )
            events = list(response)
            answer = response.answers[0]
            assert (answer.content, answer.reasoning, answer.finish_reason) == ("Here.", "Hm.", "tool_calls")
            assert [(one.id, one.name, one.arguments) for one in answer.calls] == [("c1", "find", '{"x": 1}')]
            assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (10, 5)
            assert (len(events) > 6) == stream
        body = server.bodies[0][2]
    assert body == {
        "model": "m",
        "messages": [*ask("q"), {"role": "assistant", "content": "a"}, *ask("r")],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 1,
        "max_tokens": 7,
        "stop": ["x"],
        "tools": [{"type": "function", "function": {"name": "find"}}],
        "tool_choice": {"type": "function", "function": {"name": "find"}},
        "parallel_tool_calls": False,
    }


def test_several_choices_have_seeds_of_their_own():
    with FakeAPI(lambda body: f"{body.get('seed')}") as server:
        answers = remote(server).submit(ask("q"), n=3, seed=7, temperature=1.0).result()
        assert answers[0].content == "7"
        assert len({answer.content for answer in answers}) == len(server.bodies) == 3
        server.bodies.clear()
        answers = remote(server).submit(ask("q"), n=3, temperature=1.0).result()
        assert [answer.index for answer in answers] == [0, 1, 2]
        assert [body["n"] for _, _, body in server.bodies] == [3]


def test_a_server_that_wants_the_newer_name_of_the_length_gets_it():
    def picky(body):
        return Failure(400, "use max_completion_tokens") if "max_tokens" in body else echo(body)

    with FakeAPI(picky) as server:
        responder = remote(server)
        assert [responder.chat(ask("a")), "".join(responder.stream(ask("b")))] == ["A", "B"]
        assert len(server.bodies) == 3
        assert "".join(remote(server).stream(ask("b"))) == "B"


@pytest.mark.parametrize("field", [{"eos_token_ids": (2,)}, {"skip_special_tokens": False}, {"logprobs": 1}])
def test_what_an_api_cannot_do_is_refused(field):
    with FakeAPI(echo) as server:
        responder = remote(server)
        with pytest.raises(UserError, match=f"sampling: {next(iter(field))} cannot be told to an API"):
            responder.chat(ask("q"), **field)
        with pytest.raises(UserError, match="needs a model that runs here"):
            responder.score(ask("q"), ["x"])
        assert not server.bodies


def test_media_travel_as_data_urls(tmp_path):
    def content(image, fmt, **options):
        buffer = io.BytesIO()
        image.save(buffer, fmt, **options)
        return buffer.getvalue()

    picture = Image.new("RGB", (6, 4), "red")
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg, tiff = content(picture, "JPEG"), content(picture, "TIFF")
    sideways = content(picture, "JPEG", exif=turned)
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg)
    sources = [str(path), jpeg, tiff, picture, sideways, "https://example.org/x.png"]
    parts = [{"type": "image", "image": source} for source in sources]
    clip = {"type": "video", "video": b"clip"}
    with FakeAPI(echo) as server:
        remote(server).chat([{"role": "user", "content": [*parts, clip, {"type": "text", "text": "q"}]}])
        sent = server.bodies[0][2]["messages"][0]["content"]
        with pytest.raises(MediaError, match="not an image"):
            remote(server).chat([{"role": "user", "content": [{"type": "image", "image": b"x" * 99}]}])
        with pytest.raises(UserError, match=r"messages\.0\.content\.0: parts of type 'boxes'"):
            remote(server).chat([{"role": "user", "content": [{"type": "boxes", "boxes": []}]}])
        assert len(server.bodies) == 1
    urls = [part["image_url"]["url"] for part in sent[:6]]
    heads = [url.split(",")[0] for url in urls]
    assert heads == ["data:image/jpeg;base64"] * 2 + ["data:image/png;base64"] * 3 + ["https://example.org/x.png"]
    assert base64.b64decode(urls[0].split(",")[1]) == jpeg
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size for url in urls[:5]]
    assert sizes == [(6, 4)] * 4 + [(4, 6)]  # upright
    assert sent[6] == {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,Y2xpcA=="}}


def test_load_takes_an_address(tmp_path):
    with FakeAPI(echo, models=("first", "second")) as server:
        assert llavakit.load(server.url).model == "first"
        responder = llavakit.load(f"{server.url}#second")
        assert (responder.chat(ask("q")), server.bodies[0][2]["model"]) == ("Q", "second")
        for options, words in (
            ({"dtype": "float32"}, "dtype: belongs to a model that runs here"),
            ({"api": {"retry": 1}}, "api option 'retry' is unknown; did you mean 'retries'"),
        ):
            with pytest.raises(UserError, match=words):
                llavakit.load(server.url, **options)
    with pytest.raises(UserError, match="belongs to the address of an API"):
        llavakit.load(tmp_path, api={"retries": 1})


# ---------------------------------------------------------------------- asking


def test_failed_calls_are_results_of_their_own_and_are_asked_again(tmp_path):
    bad = {"q3", "q5", "q7", "q9"}

    def flaky(body):
        return Failure(500) if said(body) in bad else echo(body)

    questions = [ask(f"q{n}") for n in range(10)]
    with FakeAPI(flaky) as server:
        with Asker(remote(server), cache=tmp_path / "c.jsonl") as asker:
            answers = asker.ask_all(questions)
            assert [isinstance(answer, CallFailed) for answer in answers] == [f"q{n}" in bad for n in range(10)]
            assert asker.report()["failed_calls"] == 4
        bad.clear()
        server.bodies.clear()
        with Asker(remote(server), cache=tmp_path / "c.jsonl") as asker:
            assert [answer.content for answer in asker.ask_all(questions)] == [f"Q{n}" for n in range(10)]
            assert (asker.asked, asker.kept) == (4, 6)
        assert len(server.bodies) == 4


def test_a_run_in_which_nothing_succeeds_is_given_up():
    with FakeAPI(lambda body: Failure(400)) as server:
        with Asker(remote(server), concurrency=2) as asker, pytest.raises(APIRefused, match="so did the 8 first calls"):
            asker.ask_all([ask(f"q{n}") for n in range(100)])
        assert len(server.bodies) < 20


def test_the_same_question_is_asked_once(tmp_path):
    with FakeAPI(echo) as server:
        with Asker(remote(server)) as asker:
            assert {answer.content for answer in asker.ask_all([ask("q")] * 20)} == {"Q"}
            asker.answer(ask("q"), attempt=1)
            asker.answer(ask("q"), temperature=0.5)
        assert len(server.bodies) == 3


def test_the_cache_survives_a_kill_and_refuses_other_files(tmp_path):
    cache = tmp_path / "deep" / "c.jsonl"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with FakeAPI(lambda body: {"role": "assistant", "content": "\ud800 a", "tool_calls": [call]}) as server:
        with Asker(remote(server), cache=cache) as asker:
            first = asker.answer(ask("q"))
        with cache.open("ab") as file:
            file.write(b'{"key": "x", "ans')
        with Asker(remote(server), cache=cache) as asker:
            assert asker.answer(ask("q")).calls == first.calls
            asker.answer(ask("r"))
        with Asker(remote(server), cache=cache) as asker:
            asker.answer(ask("r"))
            assert asker.asked == 0
    for content in ('{"question_id": 1, "text": "a"}\n', '{"key": "x", "answer": "old"}\n', "[1]\n"):
        other = tmp_path / "predictions.jsonl"
        other.write_text(content)
        with pytest.raises(UserError, match=r"predictions\.jsonl:1: is no kept answer"):
            Asker(remote(server), cache=other)
        assert other.read_text() == content


def test_media_are_known_by_content_and_texts_by_what_they_say(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"same")
    (tmp_path / "b.png").write_bytes(b"same")
    (tmp_path / "c.png").write_bytes(b"other")
    part = {name: content_of({"type": "image", "image": str(tmp_path / name)}) for name in ("a.png", "b.png", "c.png")}
    assert part["a.png"] == part["b.png"] != part["c.png"]
    assert content_of({"type": "image", "image": tmp_path / "a.png"}) == part["a.png"]
    monkeypatch.chdir(tmp_path)
    assert content_of({"type": "image", "image": "a.png"}) == part["a.png"]
    assert content_of({"type": "text", "text": "a.png"}) == {"type": "text", "text": "a.png"}
    red, blue = (content_of({"type": "image", "image": Image.new("RGB", (2, 2), colour)}) for colour in ("red", "blue"))
    assert red != blue == content_of({"type": "image", "image": Image.new("RGB", (2, 2), "blue")})
    json.dumps([part, red])


def test_a_model_that_runs_here_is_asked_in_the_same_way(tmp_path):
    chat = small_chat()
    assert isinstance(chat, Chat)
    conversations = [ask("What is this?"), [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}]]
    sampling = SamplingParams(max_new_tokens=4)
    with Asker(chat, sampling=sampling, cache=tmp_path / "c.jsonl") as asker:
        whole, bad = asker.ask_all(conversations)
        assert whole.content == chat.chat(conversations[0], max_new_tokens=4)
        assert isinstance(bad, CallFailed)
        assert asker.report() == {"asked": 2, "kept": 0, "failed_calls": 1}
    with Asker(chat, sampling=sampling, cache=tmp_path / "c.jsonl") as asker:
        asker.ask_all(conversations[:1])
        assert asker.kept == 1


def test_a_stream_that_nobody_reads_is_closed():
    begun = threading.Event()

    def long(body):
        begun.set()
        return "word " * 200

    with FakeAPI(long) as server:
        responder = remote(server)
        events = responder.respond(ask("q"))
        assert isinstance(next(events), (TextDelta, ReasoningDelta))
        events.close()
        deadline = time.time() + 5
        while responder.active and time.time() < deadline:
            time.sleep(0.01)
        assert responder.active == 0
        assert responder.client.spent.failed == 0
