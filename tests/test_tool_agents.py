"""Models with tools that run here: the general loop and LLaVA-Plus's, alone and behind the server."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from llavakit.conversation.codecs import Hermes
from llavakit.conversation.turns import CallEvent, Tool
from llavakit.errors import UserError
from llavakit.generation.load import tool_factory
from llavakit.generation.responder import Responder
from llavakit.generation.response import RawDelta
from llavakit.phantom.scene import Scene
from llavakit.system import get_system
from llavakit.systems.llava_plus.agent import ToolUser
from llavakit.systems.llava_plus.dialogue import Dialogue
from llavakit.systems.llava_plus.grammar import ThreeLines
from llavakit.systems.llava_plus.parity_agent import data_url
from llavakit.tools import Limits, Outcome, Skill, Toolbox, load_toolbox
from llavakit.tools.agent import ToolAgent
from llavakit.tools.rle import encode_mask
from llavakit.tools.skill import parameters

pytest.importorskip("cv2")


class Scripted(Responder):
    """Says what it is told to, read by a codec; `say` may be a function of the messages."""

    def __init__(self, say, codec=None):
        super().__init__(name="scripted", capacity=16)
        self.say, self.codec, self.asked = say, codec or ThreeLines(), []

    def run(self, call):
        messages = self.codec.prepare(call.messages, call.tools, call.tool_choice)
        self.asked.append((messages, call.sampling, call.tools))
        text = self.say(messages) if callable(self.say) else self.say.pop(0)
        parser = self.codec.parser([tool.name for tool in call.tools])
        yield RawDelta(text=text)
        for place in range(0, len(text), 7):
            yield from parser.feed(text[place : place + 7])
        for event in parser.finish():
            call.finish_reason = "tool_calls" if isinstance(event, CallEvent) else call.finish_reason
            yield event


def lines(actions, value="v", thoughts="t"):
    return f'"thoughts🤔" {thoughts}\n"actions🚀" {json.dumps(actions)}\n"value👉" {value}'


def call(name, **params):
    return [{"API_name": name, "API_params": params}]


def scene(index=1, size=96):
    return Image.fromarray(Scene(size=size).sample(3, index).items[0].media[0])


def question(text, image=None):
    parts = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


# LLaVA-Plus


def test_a_call_runs_and_the_second_answer_is_final():
    model = Scripted([lines(call("detect_shapes", caption="object")), lines([], "There.")])
    answer = ToolUser(model, tools={"skills": {"detect_shapes": {}}}).submit([question("What is there?", scene())])
    found = answer.result()
    assert found.content == "There."
    assert found.stages[0] == ("thoughts", "t")
    (called, made) = found.traces
    assert called == ("tool_call", {"name": "detect_shapes", "arguments": {"caption": "object"}})
    assert all(edge == round(edge, 2) for box in made[1]["result"]["boxes"] for edge in box)
    first, second = (asked[0] for asked in model.asked)
    assert second[: len(first)] == first  # the second prompt goes on from the first
    assert text_of(second[-1]).startswith("detect_shapes model outputs: {'boxes': [[")
    assert text_of(second[-1]).endswith("answer my first question: What is there?")


def test_only_one_known_tool_is_ever_called():
    for actions in (
        call("unknown"),
        [*call("detect_shapes"), *call("detect_shapes")],
        {"API_name": "detect_shapes"},
        [{"API_name": "detect_shapes"}],
        [{"API_params": {}}],
    ):
        model = Scripted([lines(actions)])
        found = ToolUser(model, tools={"skills": {"detect_shapes": {}}}).submit([question("?", scene())]).result()
        assert found.content == lines(actions).strip()
        assert found.traces == []
    model = Scripted([lines(call("detect_shapes")), lines(call("detect_shapes"), "Done.")])
    found = ToolUser(model, tools={"skills": {"detect_shapes": {}}}).submit([question("?", scene())]).result()
    assert (found.content, len(found.traces)) == ("Done.", 2)


def test_failures_of_tools_are_told_to_the_model():
    for name, said in (("detect_shapes", "names nothing"), ("ocr", "'no' was unexpected")):
        params = {"caption": "giraffe"} if name == "detect_shapes" else {"no": 1}
        model = Scripted([lines(call(name, **params)), lines([], "It failed.")])
        responder = ToolUser(model, tools={"skills": {"detect_shapes": {}, "ocr": {}}})
        found = responder.submit([question("?", scene())]).result()
        assert found.content == "It failed."
        assert said in found.traces[1][1]["result"]["error"]
        assert said in text_of(model.asked[1][0][-1])


def test_masks_live_as_long_as_the_picture():
    tools = {
        "skills": {"sam": {"type": "llava_plus_segmenter", "segmenter": "segment"}, "inpainting": {"type": "inpaint"}}
    }
    image = Image.new("RGB", (60, 60), (90, 90, 90))
    image.paste((200, 30, 30), (20, 15, 40, 45))
    stroke = np.zeros((60, 60), bool)
    stroke[15:45, 20:40] = True
    script = [
        lines(call("sam", boxes=[[0.3, 0.2, 0.7, 0.8]])), lines([], "Cut."),
        lines(call("inpainting")), lines([], "Gone."),
        lines(call("inpainting")), lines([], "No mask."),
    ]  # fmt: skip
    model = Scripted(script)
    responder = ToolUser(model, tools=tools)
    messages = [question("cut it", image)]
    first = responder.submit(messages, stroke=encode_mask(stroke)).result()
    assert "Input box: [0.33, 0.25, 0.67, 0.75]" in text_of(model.asked[0][0][0])
    assert len(first.pictures) == 1
    messages += [{"role": "assistant", "content": first.content}, question("remove it")]
    second = responder.submit(messages).result()
    edited = second.pictures[0][0]
    assert edited.size == (60, 60)
    assert np.abs(np.asarray(edited).astype(int) - 90).max() < 12
    assert len(model.asked[2][0]) == 5  # the hidden call and its result are part of the conversation
    messages += [{"role": "assistant", "content": second.content}, question("and here?", image)]
    third = responder.submit(messages).result()
    assert "needs a mask" in third.traces[1][1]["result"]["error"]
    assert len(model.asked[4][0]) == 1  # a new picture begins a new conversation


def test_all_tools_run_at_once_and_no_call_is_made():
    model = Scripted([lines([], "I see.")])
    responder = ToolUser(model, tools={"skills": {"detect_shapes": {}, "segment": {}}}, agent="all")
    found = responder.submit([question("What is there?", scene())]).result()
    asked = text_of(model.asked[0][0][0])
    assert found.content == "I see."
    assert asked.startswith("detect_shapes model outputs: {'boxes'")
    assert asked.endswith("What is there?")
    assert len(model.asked) == 1


def test_a_client_s_own_tools_are_the_client_s():
    model = Scripted([lines(call("weather", city="Oslo"), "wait")])
    responder = ToolUser(model, tools={"skills": {"detect_shapes": {}}})
    found = responder.submit([question("Rain?")], tools=[Tool("weather", "x", {"type": "object"})]).result()
    assert [(one.name, one.arguments) for one in found.calls] == [("weather", '{"city": "Oslo"}')]
    assert (found.content, found.reasoning) == ("wait", "t")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stroke": {"size": [2, 2], "counts": [4]}}, "2 x 2 pixels, the picture 96 x 96"),
        ({"stroke": {"size": [2]}}, "stroke"),
        ({"reference": "http://x/y.png"}, "must be a data URL"),
        ({"reference_stroke": {"size": [1, 1], "counts": [1]}}, "no reference"),
        ({"agent": "never"}, "agent"),
    ],
)
def test_mistakes_in_options_are_named(options, said):
    responder = ToolUser(Scripted([lines([])]), tools={"skills": {"detect_shapes": {}}})
    with pytest.raises(UserError, match=said):
        responder.submit([question("?", scene())], **options).result()


# Any model


HERMES = '<tool_call>{"name": "detect_shapes", "arguments": {"caption": "object"}}</tool_call>'


def test_any_model_calls_until_it_answers():
    model = Scripted(["Wait. " + HERMES, HERMES, "Two things."], Hermes())
    found = ToolAgent(model, tools={"skills": {"detect_shapes": {}}}).submit([question("?", scene())]).result()
    assert found.content == "Wait.Two things."
    assert [name for name, _ in found.traces] == ["tool_call", "tool_result"] * 2
    assert "detect_shapes" in text_of(model.asked[0][0][0])
    assert '"boxes"' in text_of(model.asked[1][0][-1])


def test_rounds_are_limited():
    model = Scripted(lambda messages: HERMES, Hermes())
    found = (
        ToolAgent(model, tools={"skills": {"detect_shapes": {}}}).submit([question("?", scene())], rounds=2).result()
    )
    assert len(found.traces) == 4
    assert found.content == HERMES  # without tools it is text


def test_loading_gives_tools_to_the_responder_that_takes_them():
    tools = {"skills": {"detect_shapes": {}}}
    plus = tool_factory(tools, None, get_system("llava-plus"), None)(Scripted([], ThreeLines()))
    assert isinstance(plus, ToolUser)
    assert list(plus.tools.skills) == ["detect_shapes"]
    assert isinstance(tool_factory(tools, "plain", None, None)(Scripted([], Hermes())), ToolAgent)


# Many at once


def test_hundreds_of_dialogues_with_faulty_tools_stay_apart():
    """Each dialogue asks a tool about its own number; a tenth of the calls fail or hang."""
    total, hang = 200, threading.Event()

    def double(number):
        if number % 20 == 3:
            raise RuntimeError(f"no {number}")
        if number % 20 == 13:
            hang.wait(20)
        time.sleep(0.001)
        return Outcome({"double": 2 * number})

    skill = Skill(
        name="double", description="x", parameters=parameters(("number",), number={"type": "integer"}), function=double
    )

    def say(messages):
        own = text_of(messages[0]).strip()
        if len(messages) == 1:
            return lines(call("double", number=int(own)))
        return lines([], text_of(messages[-1]).partition("\n")[0])

    responder = ToolUser(Scripted(say), tools=Toolbox([skill], limits=Limits(seconds=3.0, hanging=3)))
    before = threading.active_count()
    responses = [responder.submit([question(str(number))]) for number in range(total)]
    for number, response in enumerate(responses):
        found = response.result().content
        if number % 20 == 3:
            assert f"no {number}" in found
        elif number % 20 == 13:
            assert "gave no answer" in found or "does not answer" in found
        elif "does not answer" not in found:
            assert found == f"double model outputs: {{'double': {2 * number}}}"
    hang.set()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_the_server_runs_tools_and_streams_what_they_do():
    pytest.importorskip("fastapi")
    openai = pytest.importorskip("openai")
    from tiny_server import Running

    from llavakit.serving.app import Settings

    def say(messages):
        called = any(message["role"] == "assistant" for message in messages)
        return lines([], "Seen.") if called else lines(call("detect_shapes"), "wait")

    box = load_toolbox({"skills": {"detect_shapes": {}}})
    running = Running(ToolUser(Scripted(say), tools=box), Settings(names=("tiny",)))
    try:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        url = {"type": "image_url", "image_url": {"url": data_url(scene())}}
        messages = [{"role": "user", "content": [url, {"type": "text", "text": "What is there?"}]}]
        found = client.chat.completions.create(model="tiny", messages=messages)
        assert found.choices[0].message.content == "Seen."
        assert found.choices[0].finish_reason == "stop"
        pieces = client.chat.completions.create(model="tiny", messages=messages, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "Seen."
        tool = {"type": "function", "function": {"name": "detect_shapes", "parameters": {"type": "object"}}}
        own = client.chat.completions.create(model="tiny", messages=messages, tools=[tool])
        (called,) = own.choices[0].message.tool_calls
        assert (called.function.name, own.choices[0].finish_reason) == ("detect_shapes", "tool_calls")
        assert own.choices[0].message.content == "wait"
        answered = [
            *messages,
            own.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": called.id, "content": '{"boxes": []}'},
        ]
        done = client.chat.completions.create(model="tiny", messages=answered, tools=[tool])
        assert done.choices[0].message.content == "Seen."
    finally:
        running.stop()


def test_what_is_remembered_belongs_to_the_key_that_made_it(monkeypatch):
    pytest.importorskip("fastapi")
    from tiny_server import Running

    from llavakit.serving.app import Settings

    replayed, replay = [], Dialogue.replay
    monkeypatch.setattr(Dialogue, "replay", lambda own, turns: replayed.append(len(turns)) or replay(own, turns))
    responder = ToolUser(Scripted(lambda messages: lines([], "Seen.")), tools={"skills": {"detect_shapes": {}}})
    running = Running(responder, Settings(names=("tiny",), api_keys=("anna", "bert")))
    try:
        url = {"type": "image_url", "image_url": {"url": data_url(scene())}}
        messages = [{"role": "user", "content": [url, {"type": "text", "text": "What is there?"}]}]
        ask = {key: running.client(key).chat.completions.create for key in ("anna", "bert")}
        said = ask["anna"](model="tiny", messages=messages).choices[0].message.content
        more = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "And now?"}]
        replayed.clear()
        ask["anna"](model="tiny", messages=more)
        assert replayed == []  # it goes on from what is remembered
        ask["bert"](model="tiny", messages=more)
        assert replayed == [2]  # the same words of another are taken up from the messages
        assert len({owner for owner, _ in responder._kept}) == 2
    finally:
        running.stop()


def test_nobody_pushes_out_what_belongs_to_another(monkeypatch):
    from llavakit.systems.llava_plus import agent

    monkeypatch.setattr(agent, "KEPT", 8)  # two each
    responder = ToolUser(Scripted(lambda messages: lines([])), tools={"skills": {"detect_shapes": {}}})

    def kept(owner, *texts):
        turns = {text: [question(text, scene())] for text in texts}
        for own in turns.values():
            responder.submit(own, owner=owner).result()
        said = {"role": "assistant", "content": "v"}
        return [text for text, own in turns.items() if responder.dialogue_of([*own, said], owner) is not None]

    assert kept("anna", "1") == ["1"]
    assert kept("bert", "1", "2", "3") == ["2", "3"]
    assert kept("anna") + kept("anna", "2") == ["2"]
    assert [owner for owner, _ in responder._kept] == ["anna", "bert", "bert", "anna"]


def test_what_is_remembered_is_bounded_and_expires(monkeypatch):
    from llavakit.systems.llava_plus import agent

    monkeypatch.setattr(agent, "KEPT", 3)
    monkeypatch.setattr(agent, "KEPT_BYTES", 3 * 96 * 96 * 3 - 1)
    responder = ToolUser(Scripted(lambda messages: lines([])), tools={"skills": {"detect_shapes": {}}})
    asked = [[question(str(number), scene())] for number in range(4)]
    ended = [[*own, {"role": "assistant", "content": responder.submit(own).result().content}] for own in asked]
    assert [responder.dialogue_of(own) is not None for own in ended] == [False, False, True, True]
    monkeypatch.setattr(agent, "KEPT_SECONDS", -1.0)
    assert responder.dialogue_of(ended[-1]) is None
    again = responder.submit([*ended[-1], question("more")]).result()  # taken up from the messages
    assert again.content == "v"


def test_boxes_of_any_detector_are_drawn():
    model = Scripted([lines(call("detect_shapes")), lines([], "There.")])
    found = ToolUser(model, tools={"skills": {"detect_shapes": {}}}).submit([question("?", scene())]).result()
    ((drawn, caption),) = found.pictures
    assert (drawn.size, caption) == ((96, 96), "detect_shapes")
    assert np.asarray(drawn).tolist() != np.asarray(scene()).tolist()
