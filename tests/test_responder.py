"""Responders: composed of others, batched, cancelled; reached from chat, evaluation and server by a system's card."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from tiny_server import small_chat

import llavakit
from llavakit.cli import app as cli
from llavakit.conversation.turns import CallEvent, PictureEvent, ReasoningDelta, TextDelta, Tool, ToolCall, TraceEvent
from llavakit.errors import UserError
from llavakit.evaluation.run import evaluate
from llavakit.generation import RequestFailed, SamplingParams
from llavakit.generation.chat import Chat
from llavakit.generation.identity import identity_of
from llavakit.generation.responder import Responder
from llavakit.generation.response import FinishEvent, Usage
from llavakit.system import System, systems

QUESTION = [{"role": "user", "content": "What is this?"}]
OTHER = [{"role": "user", "content": "Is it red?"}]
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_new_tokens=6)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return small_chat()


class Vote(Responder):
    """Asks three times, keeps what is said most, and says so; options and hidden calls as later systems need them."""

    class options(BaseModel):
        members: int = 3
        shout: bool = False

    def __init__(self, chat: Responder, *, prefix: str = "vote") -> None:
        super().__init__(chat)
        self.prefix = prefix

    def run(self, call):
        members = [(self.main, None, {"max_new_tokens": 4})] * call.options.members
        drafts = [draft.content for draft in call.ask_all(members, purpose="drafted")]
        yield TraceEvent(name="drafts", data={"texts": drafts})
        yield ReasoningDelta(text=f"{self.prefix} of {len(drafts)}")
        winner = max(drafts, key=drafts.count)
        yield TextDelta(text=winner.upper() if call.options.shout else winner)


def test_a_composed_responder_counts_its_hidden_calls(chat):
    response = Vote(chat).submit(QUESTION, SAMPLED)
    answer = response.result()
    drafts = answer.traces[0][1]["texts"]
    assert answer.content in drafts
    assert len(set(drafts)) > 1  # calls that follow each other draw apart
    assert drafts[0] == chat.chat(QUESTION, temperature=1.0, seed=5, max_new_tokens=4)
    assert (answer.reasoning, answer.finish_reason) == ("vote of 3", "stop")
    prompt = chat.submit(QUESTION, max_new_tokens=1)
    prompt.result()
    assert response.usage.prompt_tokens == 3 * prompt.usage.prompt_tokens
    assert response.usage.completion_tokens == response.usage.details["drafted"] == 12
    assert response.usage + Usage(1, 2, 3, {"drafted": 1}) == Usage(
        response.usage.prompt_tokens + 1, 14, response.usage.cached_tokens + 3, {"drafted": 13}
    )


def test_many_conversations_and_choices_run_together(chat):
    vote = Vote(chat)
    conversations = [QUESTION, OTHER] * 5
    assert vote.chat_batch(conversations, seed=1, temperature=1.0) == [
        vote.chat(messages, seed=1, temperature=1.0) for messages in conversations
    ]
    several = vote.submit(QUESTION, SAMPLED, n=4).result()
    assert [answer.index for answer in several] == [0, 1, 2, 3]
    assert several[0].content == vote.submit(QUESTION, SAMPLED).result().content
    assert len({json.dumps(answer.traces[0][1]) for answer in several}) == 4


def test_choices_draw_from_streams_of_their_own(chat):
    alone = chat.submit(QUESTION, SAMPLED).result()
    four = chat.submit(QUESTION, SAMPLED, n=4).result()
    assert four[0].token_ids == alone.token_ids
    assert len({tuple(answer.token_ids) for answer in four}) == 4


def test_options_are_checked_and_have_defaults(chat):
    vote = Vote(chat)
    vote.preset(shout=True)
    loud = vote.chat(QUESTION, members=1, max_new_tokens=4)
    assert loud == chat.chat(QUESTION, max_new_tokens=4).upper()
    for fields, problem in (
        ({"member": 2}, "unknown option 'member'; did you mean 'members'"),
        ({"members": "many"}, "members: .*'many'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"n": 0}, "n is 0"),
    ):
        with pytest.raises(UserError, match=problem):
            vote.submit(QUESTION, **fields)
    with pytest.raises(UserError, match="unknown option 'member'"):
        chat.submit(QUESTION, member=2)


class Endless(Responder):
    """Streams and asks until nobody listens."""

    def __init__(self, chat):
        super().__init__(chat)
        self.ended = threading.Event()

    def run(self, call):
        try:
            while True:
                yield from call.stream(self.main, max_new_tokens=500)
        finally:
            self.ended.set()


@pytest.mark.parametrize("started", [True, False])
def test_cancelling_reaches_the_calls_inside(started):
    chat = small_chat()
    endless = Endless(chat)
    if started:
        endless.start()
    events = endless.respond(QUESTION)
    assert isinstance(next(events), TextDelta)
    events.close()
    assert endless.ended.wait(10)
    deadline = time.time() + 10
    while (endless.active or chat.active) and time.time() < deadline:
        chat.engine.step() if not started else time.sleep(0.01)
    assert (endless.active, chat.active, chat.waiting) == (0, 0, 0)
    response = endless.submit(QUESTION)
    endless.stop(drain=False)
    assert response.result().finish_reason == "cancelled"


class Broken(Responder):
    def __init__(self, error, chat=None):
        super().__init__(*([chat] if chat else []), name="broken")
        self.error = error

    def run(self, call):
        yield TextDelta(text="so far ")
        if self.parts:
            yield from call.stream(self.main, [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}])
        raise self.error


def test_a_failing_request_fails_alone(chat):
    response = Broken(KeyError("x")).submit(QUESTION, n=2)
    with pytest.raises(RequestFailed, match="x"):
        response.result()
    assert response.answers[0].content in ("", "so far ")
    with pytest.raises(UserError, match=r"none\.png"):
        Broken(KeyError("x"), chat).chat(QUESTION)
    answers = Broken(UserError("no")).answer_all([QUESTION] * 3)
    assert [str(answer) for answer in answers] == ["no"] * 3
    whole, bad = chat.answer_all([QUESTION, [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}]])
    assert whole.content
    assert isinstance(bad, UserError)
    for method in ("score", "continue_from"):
        with pytest.raises(UserError, match="needs a model that runs here"):
            getattr(Broken(None), method)(QUESTION, ["x"])


def test_a_codec_that_fails_ends_its_request(chat, monkeypatch):
    parser = chat.codec.parser()
    monkeypatch.setattr(type(parser), "feed", lambda self, text: 1 / 0)
    with pytest.raises(RequestFailed, match="division"):
        chat.chat(QUESTION, max_new_tokens=3)
    monkeypatch.undo()
    assert chat.chat(QUESTION, max_new_tokens=3)
    assert not chat.engine.busy


class Everything(Responder):
    """Every kind of event."""

    def run(self, call):
        from PIL import Image

        yield ReasoningDelta(text="plan", stage="PLAN")
        yield TextDelta(text="Here.")
        yield PictureEvent(image=Image.new("RGB", (4, 4)), caption="a map")
        yield CallEvent(call=ToolCall("find", "{}"))
        yield FinishEvent(reason="tool_calls")


def test_events_and_the_message_that_they_make():
    events = list(Everything().respond(QUESTION, tools=[Tool("find")]))
    assert [type(event).__name__ for event in events][-2:] == ["CallEvent", "FinishEvent"]
    answer = Everything().submit(QUESTION).result()
    assert (answer.finish_reason, answer.pictures[0][1], answer.stages) == ("tool_calls", "a map", [("PLAN", "plan")])
    message = answer.message()
    assert (message["reasoning_content"], message["tool_calls"][0]["function"]["name"]) == ("plan", "find")


# ---------------------------------------------------------------------- likelihoods


def full(chat: Chat, ids: list[int], scored: int) -> list[float]:
    with torch.no_grad():
        logprobs = chat.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[place - 1, ids[place]]) for place in range(len(ids) - scored, len(ids))]


def test_replies_to_a_conversation_are_scored_behind_one_begin_token(chat):
    replies = ["A red square", "blue"]
    scores = chat.score(QUESTION, replies)
    tokenizer = chat.processor.tokenizer
    for reply, score in zip(replies, scores, strict=True):
        sample = chat.processor.encode(
            [*QUESTION, {"role": "assistant", "content": reply}], continue_final_message=True
        )
        ids = sample["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(score.token_ids).strip() == reply
        assert list(score.logprobs) == pytest.approx(full(chat, ids, len(score.token_ids)), abs=1e-3)
        assert score.per_character == pytest.approx(score.sum / len(reply))
        assert score.per_token == pytest.approx(score.sum / len(score.token_ids))


def test_a_plain_context_is_tokenised_together_with_its_reply(chat):
    tokenizer = chat.processor.tokenizer
    for context, reply in (("What is", " red"), ("What is ", "red"), ("", "What is"), ("What", "ever")):
        (score,) = chat.score(context, [reply])
        whole = tokenizer(context + reply).input_ids
        whole = whole if whole[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *whole]
        assert whole[len(whole) - len(score.token_ids) :] == list(score.token_ids)
        assert score.token_ids[0] != tokenizer.bos_token_id
        assert list(score.logprobs) == pytest.approx(full(chat, whole, len(score.token_ids)), abs=1e-3)
    spaced, glued = chat.score("What is ", ["red"]), chat.score("What is", [" red"])
    assert spaced[0].token_ids == glued[0].token_ids


def test_a_picture_is_part_of_the_context(chat):
    from PIL import Image

    def asked(colour):
        image = {"type": "image", "image": Image.new("RGB", (32, 32), colour)}
        return [{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}]

    red, again, blue = (chat.score(asked(colour), ["A square"])[0].sum for colour in ("red", "red", "blue"))
    assert red == pytest.approx(again, abs=1e-5)
    assert red != pytest.approx(blue, abs=1e-3)


@pytest.mark.parametrize("replies", [[], ["x", " "]])
def test_nothing_to_score_is_refused(chat, replies):
    with pytest.raises(UserError, match="score: "):
        chat.score(QUESTION, replies)
    with pytest.raises(UserError, match="positions"):
        chat.score(QUESTION, ["word " * 600])


def test_a_reply_is_continued_from_its_beginning(chat):
    whole = chat.submit(QUESTION, max_new_tokens=8).result()
    (answer,) = chat.continue_from(QUESTION, "A red", SamplingParams(max_new_tokens=4))
    assert answer.content.startswith("A red")
    assert len(answer.token_ids) == 4
    root = chat.begin(QUESTION)
    ((branch,),) = chat.expand([root], SamplingParams(max_new_tokens=3))
    ((branch,),) = chat.expand([branch], SamplingParams(max_new_tokens=5))
    assert list(branch.ids) == whole.token_ids


# ---------------------------------------------------------------------- a system's own way to answer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model folder of a system whose card names a responder and a codec."""
    folder = tmp_path_factory.mktemp("voting")
    chat = small_chat()
    chat.config.system = "voting"
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    card = System(
        slug="voting",
        title="Voting",
        paper="0000.00000",
        summary="A test.",
        responder=f"{__name__}:Vote",
        codec="think",
    )
    systems()[card.slug] = card
    yield folder
    del systems()[card.slug]


def test_a_card_names_the_responder_that_load_gives(checkpoint, chat):
    loaded = llavakit.load(checkpoint)
    assert isinstance(loaded, Vote)
    assert type(loaded.main.codec).__name__ == "Stages"
    assert loaded.modalities == ("image",)
    plain = llavakit.load(checkpoint, responder="plain")
    assert isinstance(plain, Chat)
    same = llavakit.load(checkpoint.parent / "." / checkpoint.name)
    assert identity_of(loaded) == identity_of(same)
    assert identity_of(loaded)["parts"] == [identity_of(plain)]
    options = {"prefix": "majority", "members": 1}
    named = llavakit.load(checkpoint, responder=f"{__name__}:Vote", responder_options=options)
    assert named.submit(QUESTION).result().reasoning == "majority of 1"
    assert identity_of(named)["settings"] == {"prefix": "majority"}


@pytest.mark.parametrize(
    ("responder", "options", "problem"),
    [
        ("votin", None, "unknown system 'votin'; did you mean 'voting'"),
        ("llava-1.5", None, "answers by its model alone"),
        ("nowhere:Vote", None, "cannot be imported"),
        (None, {"member": 1}, "responder option 'member' is unknown; did you mean 'members'"),
        ("plain", {"members": 1}, "a model alone has none"),
    ],
)
def test_a_wrong_responder_is_one_line_before_weights_are_read(checkpoint, monkeypatch, responder, options, problem):
    monkeypatch.setattr("llavakit.generation.load.build", None)
    with pytest.raises(UserError, match=problem):
        llavakit.load(checkpoint, responder=responder, responder_options=options)


def test_chat_and_evaluation_reach_it(checkpoint, tmp_path, capsys):
    arguments = ["chat", str(checkpoint), "--prompt", "What is this?", "--max-new-tokens", "4", "--device", "cpu"]
    assert cli.run([*arguments, "--responder-option", "members=2"]) == 0
    captured = capsys.readouterr()
    plain = llavakit.load(checkpoint, responder="plain", device="cpu")
    assert captured.out.strip() == plain.chat(QUESTION, max_new_tokens=4)
    assert "[reasoning] vote of 2" in captured.err
    questions = tmp_path / "q.jsonl"
    rows = [{"question_id": n, "text": "What is this?", "answer": "x", "type": "t"} for n in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(llavakit.load(checkpoint), "exact_match", questions, tmp_path / "p.jsonl", max_new_tokens=4)
    stored = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert result["asked"] == 3
    assert {(row["reasoning"], row["text"]) for row in stored} == {("vote of 3", captured.out.strip())}


def test_the_examples_of_the_documentation_run(chat, monkeypatch, capsys, tmp_path):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20), "red").save("photo.jpg")
    text = (Path(__file__).parents[1] / "docs" / "generation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setitem(llavakit.__dict__, "load", lambda *arguments, **options: chat)
    names = {"messages": QUESTION, "conversations": [QUESTION, OTHER], "model": chat}
    wanted = ("llavakit.load", "class Vote", "stage_beam_search", "StagedSearch")
    found = [block for block in blocks if any(word in block for word in wanted)]
    assert len(found) == 4
    for block in found:
        exec(block, names)
    assert len(names["answers"]) == 2
    assert all(answer.content for answers in names["answers"] for answer in answers)
    assert names["ensemble"].chat(QUESTION) == chat.chat(QUESTION, max_new_tokens=4)
    assert names["branch"].text
    assert "FinishEvent" in capsys.readouterr().out
