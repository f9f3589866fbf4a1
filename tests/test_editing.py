"""Editing sessions: what each event does to pixels, versions and the chat; saving and replaying; bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from llavakit.cli.app import app
from llavakit.conversation.messages import is_media
from llavakit.conversation.turns import TextDelta
from llavakit.editing.backends import Sketch, SkillSegmenter, backends_of
from llavakit.editing.chat import PictureChat
from llavakit.editing.geometry import extent
from llavakit.editing.layout import Mismatch, layout_request
from llavakit.editing.log import read_log, replay
from llavakit.editing.objects import Objects, Segmented
from llavakit.editing.session import Backends, Session
from llavakit.editing.tabs import CREATE, INPAINT
from llavakit.errors import UserError
from llavakit.generation.responder import Responder
from llavakit.phantom.canvas import COLOURS
from llavakit.systems.llava_interactive.published import Canvas, kept_latents
from llavakit.tools.rle import encode_mask
from llavakit.tools.skill import Outcome, Skill, parameters, picture

pytest.importorskip("cv2")


def scene() -> np.ndarray:
    """A red square on the left and a blue disc on the right, on uneven grey."""
    rows, columns = np.mgrid[:96, :128]
    picture = np.repeat((100 + columns // 8)[..., None], 3, axis=-1).astype(np.uint8)
    picture[30:60, 20:50] = COLOURS["red"]
    picture[(rows - 50) ** 2 + (columns - 95) ** 2 < 225] = COLOURS["blue"]
    return picture


STROKE = [[0.2, 0.4], [0.3, 0.5]]


class Looks(Responder):
    """Says the mean colour of the last picture that it sees, and how many messages there are."""

    def run(self, call):
        pictures = [part["image"] for turn in call.messages for part in turn["content"] if is_media(part)]
        mean = np.asarray(pictures[-1]).reshape(-1, 3).mean(0).round().astype(int).tolist() if pictures else None
        yield TextDelta(text=f"{mean} {len(call.messages)}")


def begun(**options) -> Session:
    session = Session(backends_of(), **options)
    session.apply({"op": "upload", "image": scene()})
    return session


def test_an_object_is_removed_and_nothing_else_changes():
    session = begun()
    found = session.apply({"op": "segment", "stroke": STROKE})
    assert found["objects"] == [{"id": 1, "label": "object", "box": [20, 30, 49, 59]}]
    hole = ~session.objects.kept
    session.apply({"op": "remove"})
    before, after = session.versions[0].image, session.image
    assert (after[~hole] == before[~hole]).all()
    assert abs(after[30:60, 20:50].astype(int) - (100 + np.arange(20, 50) // 8)[None, :, None]).max() < 12
    assert [version.op for version in session.versions] == ["upload", "remove"]
    with pytest.raises(ValueError, match="read-only"):
        session.image[0] = 0


def test_a_drag_and_back_restores_box_and_pixels_and_a_moved_object_is_pasted():
    session = begun()
    session.apply({"op": "segment", "stroke": STROKE, "dilation": 5})
    inside = session.objects.mask
    session.apply({"op": "move", "object": 1, "dx": 12, "dy": 20})
    found = session.apply({"op": "move", "object": 1, "dx": -12, "dy": -20})
    assert found["objects"][0]["box"] == [20, 30, 49, 59]
    session.apply({"op": "generate"})
    assert (session.image[inside] == scene()[inside]).all()
    session.apply({"op": "move", "object": 1, "dx": 0, "dy": 30})
    session.apply({"op": "generate"})
    assert (session.image[60:90, 20:50] == COLOURS["red"]).all()
    assert not (session.image[32:58, 22:48] == COLOURS["red"]).all(-1).any()


def test_pixels_that_leave_the_frame_are_gone():
    objects = Objects(scene(), Segmented((scene() == COLOURS["red"]).all(-1).astype(np.uint8), {1: "square"}))
    assert objects.move(1, (-30, 0)).box == (0, 30, 19, 59)
    assert objects.move(1, (30, 0)).box == (30, 30, 49, 59)
    assert objects.move(1, (10_000, 10_000)).box is None
    with pytest.raises(UserError, match="there is no 2; found: 1"):
        objects.move(2, (0, 0))


def test_objects_are_named_replaced_inserted_and_created():
    session = begun()
    found = session.apply({"op": "segment", "text": "blue disc"})
    assert found["objects"][0]["label"] == "blue disc"
    session.apply({"op": "generate", "text": "a green disc"})
    assert tuple(session.image[50, 95]) == COLOURS["green"]
    before = session.image
    session.apply({"op": "insert", "boxes": [[0.5, 0.0, 0.75, 0.25]], "phrases": ["a white square"]})
    outside = np.ones(before.shape[:2], bool)
    outside[0:24, 64:96] = False
    assert (session.image[outside] == before[outside]).all()
    assert (session.image[4:20, 68:92] > 200).all()
    session.apply({"op": "create", "prompt": "two", "boxes": [[0, 0, 0.5, 1]], "phrases": ["red square"]})
    assert session.image.shape == (512, 512, 3)
    assert tuple(session.image[256, 128]) == COLOURS["red"]


def test_undo_redo_and_the_chat_about_the_current_picture():
    chat = PictureChat(Looks(name="looks"))
    session = begun(chat=chat)
    first = session.apply({"op": "chat", "text": "Colour?"})["answer"]
    assert session.apply({"op": "chat", "text": "Sure?"})["answer"].endswith(" 3")
    session.apply({"op": "segment", "stroke": STROKE})
    session.apply({"op": "remove"})
    removed = session.image
    second = session.apply({"op": "chat", "text": "And now?"})["answer"]
    assert second != first
    assert second.endswith(" 1")  # a new picture begins a new conversation
    session.apply({"op": "undo"})
    assert (session.image == scene()).all()
    assert session.apply({"op": "chat", "text": "Colour?"})["answer"] == first
    session.apply({"op": "redo"})
    assert session.image is removed
    with pytest.raises(UserError, match="nothing was undone"):
        session.apply({"op": "redo"})
    remembers = PictureChat(Looks(name="looks"), forgets=False)
    remembers.changed(Image.fromarray(scene()))
    remembers.say("a")
    remembers.changed(Image.fromarray(removed))
    assert remembers.say("b").endswith(" 3")


def test_a_picture_stands_first_in_a_conversation_and_last_in_one_that_runs():
    class Echoes(Responder):
        def run(self, call):
            self.told = list(call.messages)
            yield TextDelta(text=" yes \n")

    def said(chat):
        parts = (part for message in chat.responder.told for part in message["content"])
        return [part.get("text", part["type"]) for part in parts]

    chat = PictureChat(Echoes(name="echoes"))
    chat.changed(Image.fromarray(scene()))
    chat.say(" See <image> here ")
    assert said(chat) == ["image", "See  here"]
    for question, expected in (("Now?", ["Now?\n", "image"]), ("Is <image> it?", ["Is ", "image", " it?"])):
        chat = PictureChat(Echoes(name="echoes"))
        chat.say("Hi")
        chat.changed(Image.fromarray(scene()))
        chat.say(question)
        assert said(chat) == ["Hi", "yes", *expected]


def test_a_question_that_fails_is_taken_back():
    class Fails(Responder):
        def run(self, call):
            raise UserError("model: is gone")
            yield

    chat = PictureChat(Fails(name="fails"))
    with pytest.raises(UserError, match="is gone"):
        chat.say("x")
    assert chat.messages == []


def test_a_saved_session_gives_the_same_pictures(tmp_path):
    session = begun(chat=PictureChat(Looks(name="looks")))
    mask = np.zeros((96, 128), bool)
    mask[40:50, 25:45] = True
    for event in (
        {"op": "segment", "mask": encode_mask(mask)},
        {"op": "move", "object": 1, "dx": 20, "dy": 0},
        {"op": "dilate", "dilation": 9},
        {"op": "generate"},
        {"op": "undo"},
        {"op": "insert", "boxes": [[0, 0, 0.5, 0.5]], "phrases": ["yellow ring"]},
        {"op": "chat", "text": "What colour?"},
    ):
        session.apply(event)
    folder = session.save(tmp_path / "session")
    again = Session(backends_of(), PictureChat(Looks(name="looks")))
    assert replay(folder, again) == []
    assert [v.digest for v in again.versions] == [v.digest for v in session.versions]
    assert again.answers == session.answers
    log = read_log(folder)
    assert [version["parent"] for version in log["versions"]] == [None, 0, 0]
    runner = CliRunner()
    result = runner.invoke(app, ["replay", str(folder)])
    assert "name it with --model" in str(result.exception)
    log["events"] = [event for event in log["events"] if event["op"] != "chat"]
    (folder / "session.json").write_text(json.dumps(log))
    result = runner.invoke(app, ["replay", str(folder), "--json", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert [row["equal"] for row in json.loads(result.stdout)["versions"]] == [True] * 3
    assert len(list((tmp_path / "out").iterdir())) == 3
    log["versions"][1]["sha256"] = "0"
    (folder / "session.json").write_text(json.dumps(log))
    assert runner.invoke(app, ["replay", str(folder)]).exit_code == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"events": {}}, "is no event log"),
        ({"events": [{"op": "fly"}]}, r"event 0: op: must be one of .*, not 'fly'"),
        ({"events": [{"op": "upload", "image": "../x.png"}]}, "must be a file beside the log"),
        ({"events": [{"op": "generate"}]}, "event 0: generate: no object is selected"),
        ({"events": ["x"]}, "event 0: op"),
    ],
)
def test_broken_logs(tmp_path, change, message):
    log = {"format": 1, "events": [], "versions": []} | change
    (tmp_path / "session.json").write_text(json.dumps(log))
    with pytest.raises(UserError, match=message):
        replay(tmp_path, Session(backends_of()))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"op": "segment"}, "mark the object with stroke"),
        ({"op": "segment", "mask": np.zeros((3, 3), bool)}, "mask: has 3 x 3 pixels, the picture 128 x 96"),
        ({"op": "segment", "text": "elephant"}, "names nothing that can be detected"),
        ({"op": "segment", "text": "green ring"}, "was not found"),
        ({"op": "segment", "stroke": STROKE, "dilation": -1}, "must be at least 0"),
        ({"op": "move"}, "no object is selected"),
        ({"op": "dilate", "dilation": 3}, "no object is selected"),
        ({"op": "chat", "text": "x"}, "no model to talk to"),
        ({"op": "undo"}, "no earlier picture"),
        ({"op": "insert", "boxes": [[0, 0, 2, 1]], "phrases": ["x"]}, r"boxes\.0: must be"),
        ({"op": "insert", "boxes": [[0, 0, 1, 1]], "phrases": []}, "0 phrases for 1 boxes"),
        ({"op": "create"}, "describe the picture"),
        ({"op": "upload", "image": "x.png"}, "must be a picture"),
        ({"op": "upload", "image": np.zeros((9, 9, 3), np.uint8), "size": 3}, "upload: has no 'size'"),
    ],
)
def test_events_that_cannot_be_carried_out_change_nothing(event, message):
    session = begun()
    with pytest.raises(UserError, match=message):
        session.apply(event)
    assert len(session.versions) == len(session.events) == 1
    assert (session.image == scene()).all()


def test_what_is_not_configured_is_said():
    session = Session(Backends())
    session.apply({"op": "upload", "image": scene()})
    with pytest.raises(UserError, match="needs a segmenter, and none is configured"):
        session.apply({"op": "segment", "stroke": STROKE})
    with pytest.raises(UserError, match="more than 100 pixels"):
        Session(Backends(), most_pixels=100).apply({"op": "upload", "image": scene()})


def test_canvas_and_layout():
    canvas, paint = Canvas(), np.zeros((512, 512), np.uint8)
    paint[10:40, 10:30] = 1
    canvas.paint(CREATE, paint)
    paint[100:104, 100:200] = 9  # too flat
    canvas.paint(CREATE, paint)
    assert canvas.boxes == [(10, 10, 29, 39)]
    canvas.paint(CREATE, paint * 0)
    assert canvas == Canvas()
    with pytest.raises(UserError, match="must be shown a picture"):
        canvas.paint(INPAINT, paint)
    with pytest.raises(Mismatch):
        layout_request(CREATE, [[0, 0, 1, 1]], "a;b", "x")
    assert extent(np.zeros((3, 3))) is None
    assert kept_latents([[0, 0, 1, 1]]).sum() == 0
    request = layout_request(CREATE, [[0, 0, 256, 512]], "blue square", "half")
    assert tuple(Sketch().layout(request, None)[256, 128]) == COLOURS["blue"]


def test_a_configured_skill_takes_over_boxes_and_points():
    asked = []

    def cut(image, boxes=None, points=None, point_labels=None):
        asked.append((boxes, points))
        return Outcome(masks=(np.ones((image.height, image.width), bool),))

    usual = backends_of().segmenter
    marks = parameters(image=picture(), boxes={}, points={}, point_labels={})
    sam = Skill(name="sam", description="", parameters=marks, function=cut)
    segmenter = SkillSegmenter(usual.cutter, usual.detector, sam)
    assert segmenter.segment(scene(), box=[0, 0, 0.5, 0.5]).ids.all()
    segmenter.segment(scene(), points=[[0.2, 0.4]])
    assert asked == [([[0, 0, 0.5, 0.5]], None), (None, [[0.2, 0.4]])]
    assert not segmenter.segment(scene(), stroke=STROKE).ids.all()
    assert len(asked) == 2
