"""The editing page without its framework: what events do, what is shown, whose a session is, and how much is kept."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from llavakit.cli.app import app
from llavakit.conversation.messages import is_media
from llavakit.conversation.turns import TextDelta
from llavakit.editing.backends import SkillSegmenter, backends_of
from llavakit.editing.session import Backends
from llavakit.errors import UserError
from llavakit.generation.responder import Responder
from llavakit.media.policy import Refused
from llavakit.phantom.canvas import COLOURS
from llavakit.serving.desk import LEAST_BYTES, Desk, Desks, offers
from llavakit.serving.uploads import UploadPolicy

pytest.importorskip("cv2")
STROKE = [[0.2, 0.4], [0.3, 0.5]]


def scene(height: int = 96, width: int = 128) -> Image.Image:
    """A red square on uneven grey."""
    columns = np.mgrid[:height, :width][1]
    picture = np.repeat((100 + columns * 16 // width)[..., None], 3, axis=-1).astype(np.uint8)
    picture[height * 30 // 96 : height * 60 // 96, width * 20 // 128 : width * 50 // 128] = COLOURS["red"]
    return Image.fromarray(picture)


class Looks(Responder):
    """Says how red the last picture is that it sees, and how many messages there are."""

    def run(self, call):
        pictures = [part["image"] for turn in call.messages for part in turn["content"] if is_media(part)]
        pixels = np.asarray(pictures[-1]).reshape(-1, 3).astype(int)
        yield TextDelta(text=f"{(pixels[:, 0] - pixels[:, 1] > 100).mean():.2f} ")
        yield TextDelta(text=f"{len(call.messages)}")


def begun(**options) -> tuple[Desk, dict]:
    desk = Desk(backends_of(), Looks(name="looks"), options.get("most_bytes", 2**28))
    return desk, desk.handle({"op": "upload"}, options.get("picture", scene()))


def do(desk: Desk, view: dict, **event) -> dict:
    """What the page sends, who shows this view."""
    return desk.handle({"session": view["session"], "seen": view["version"], **event})


def last(conversation) -> str:
    return list(conversation)[-1][-1]["content"]


def test_a_stroke_a_removal_undo_and_the_chat_about_what_is_shown():
    desk, view = begun()
    assert (view["version"], view["size"], view["undo"], view["object"]) == (0, [128, 96], False, None)
    assert last(desk.say("How red?")) == "0.07 1"
    view = do(desk, view, op="segment", stroke=STROKE)
    assert view["object"]["box"] == [20, 30, 49, 59]
    assert view["note"] == "Selected: object, 7.3 % of the picture"
    tint = np.asarray(Image.open(io.BytesIO(base64.b64decode(view["object"]["tint"].split(",")[1]))).convert("RGBA"))
    assert ((tint[..., 3] > 0) == desk.session.objects.mask).all()
    view = do(desk, view, op="remove")
    assert [one["op"] for one in view["versions"]] == ["upload", "remove"]
    assert (view["version"], view["undo"], view["redo"], view["object"]) == (1, True, False, None)
    assert last(desk.say("And now?")) == "0.00 1"
    assert desk.talk[2]["content"] == "(picture 1) And now?"
    view = do(desk, view, op="undo")
    assert (view["version"], view["redo"]) == (0, True)
    assert last(desk.say("And again?")) == "0.07 1"
    assert do(desk, view, op="redo")["version"] == 1


def test_a_drag_pastes_and_what_it_leaves_is_filled():
    desk, view = begun()
    view = do(desk, do(desk, view, op="segment", stroke=STROKE), op="place", dx=50, dy=0)
    assert view["versions"][-1]["op"] == "move"
    assert view["object"]["box"] == [70, 30, 99, 59]
    assert (desk.session.image[30:60, 70:100] == COLOURS["red"]).all()
    assert not (desk.session.image[30:60, 20:50] == COLOURS["red"]).all(-1).any()


def test_any_version_can_be_shown_and_gone_on_from():
    desk, view = begun()
    view = do(desk, do(desk, view, op="segment", stroke=STROKE), op="remove")
    view = do(desk, view, op="show", version=0)
    assert view["version"] == 0
    view = do(desk, view, op="insert", boxes=[[0.5, 0.5, 0.75, 0.9]], phrases=["blue disc"])
    assert [one["parent"] for one in view["versions"]] == [None, 0, 0]
    assert "there is no version 9" in do(desk, view, op="show", version=9)["note"]


def test_of_several_things_of_a_name_each_can_be_picked():
    pixels = np.asarray(scene()).copy()
    pixels[66:90, 90:120] = COLOURS["red"]
    desk, view = begun(picture=Image.fromarray(pixels))
    first = do(desk, view, op="segment", text="red square")
    assert first["object"]["count"] == 2
    assert first["note"].endswith("; 1 more found, see Next")
    second = do(desk, first, op="segment", text="red square", pick=2)
    boxes = [one["object"]["box"] for one in (first, second)]
    assert sorted(boxes) == [[20, 30, 49, 59], [90, 66, 119, 89]]
    view = do(desk, second, op="remove")
    red = (desk.session.image == COLOURS["red"]).all(-1)
    (x0, y0, x1, y1), (a0, b0, a1, b1) = boxes
    assert red[y0 : y1 + 1, x0 : x1 + 1].all()
    assert not red[b0 : b1 + 1, a0 : a1 + 1].any()
    view = do(desk, view, op="undo")
    assert "there is no object 3; 2 were found" in do(desk, view, op="segment", text="red square", pick=3)["note"]


def test_a_saved_session_is_replayed_by_the_command(tmp_path):
    desk, view = begun()
    view = do(desk, do(desk, view, op="segment", stroke=STROKE), op="place", dx=10, dy=5)
    view = do(desk, view, op="generate", text="a green disc")
    view = do(desk, view, op="create", prompt="x", boxes=[[0, 0, 0.5, 1]], phrases=["red square"])
    view = do(desk, view, op="show", version=1)
    do(desk, view, op="insert", boxes=[[0.5, 0.5, 0.75, 0.9]], phrases=["white ring"])
    (tmp_path / "session.zip").write_bytes(desk.saved())
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "session.zip"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert result.output.count(" yes ") == 5
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files][-1] == "004-insert.png"
    assert (np.asarray(Image.open(files[-1])) == desk.session.image).all()
    (tmp_path / "broken.zip").write_bytes(desk.saved()[:90])
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "broken.zip")])
    assert "is no ZIP archive of a session" in str(result.exception)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"op": "fly"}, "op: must be one of"),
        ({"op": ["x"]}, "op: must be one of"),
        ({}, "op: must be one of"),
        ({"op": "upload"}, "upload: holds no picture"),
        ({"op": "upload", "image": "/etc/passwd"}, "upload: holds no picture"),
        ({"op": "chat", "text": "x"}, "is no event of the picture"),
        ({"op": "segment", "stroke": "x"}, "segment: stroke"),
        ({"op": "segment", "stroke": [[0.1, 2]]}, "segment: stroke"),
        ({"op": "segment", "stroke": [[0.1, float("nan")]]}, "finite numbers"),
        ({"op": "segment", "mask": {"size": [3, 3], "counts": "09"}}, "the picture 128 x 96"),
        ({"op": "segment", "colour": 3}, "segment: has no 'colour'"),
        ({"op": "place", "dx": 1, "dy": 1}, "no object is selected"),
        ({"op": "place", "dx": "a"}, "move: dx"),
        ({"op": "remove"}, "no object is selected"),
        ({"op": "dilate", "dilation": 5}, "no object is selected"),
        ({"op": "show", "version": -1}, "there is no version -1"),
        ({"op": "insert", "boxes": [[0, 0, 1]], "phrases": ["x"]}, "insert: boxes.0"),
        ({"op": "insert", "boxes": [[0, 0, 1, 1]] * 31, "phrases": ["x"] * 31}, "insert: boxes"),
        ({"op": "insert", "boxes": [], "phrases": []}, "draw a box"),
        ({"op": "insert", "boxes": [[0, 0, 1, 1]], "phrases": [3]}, "insert: phrases.0"),
        ({"op": "create", "prompt": "", "boxes": [], "phrases": []}, "describe the picture"),
        ({"op": "undo"}, "no earlier picture"),
    ],
)
def test_what_a_browser_may_send_is_one_line_at_most(event, said):
    desk, view = begun()
    after = do(desk, view, **event)
    assert said in after["note"]
    assert "\n" not in after["note"]
    assert after["failed"]
    assert len(desk.session.versions) == 1


def test_what_another_window_did_is_shown_and_an_old_session_is_told():
    desk, view = begun()
    newer = do(desk, do(desk, view, op="segment", stroke=STROKE), op="remove")
    assert "changed in another window" in do(desk, view, op="segment", stroke=STROKE)["note"]
    assert do(desk, newer, op="begin")["version"] is None
    assert "this session has ended" in do(desk, newer, op="undo")["note"]


def test_large_pictures_are_scaled_down_and_a_full_session_says_so():
    desk, view = begun(picture=scene(1000, 2048), most_bytes=3_100_000)
    assert view["size"] == [1024, 500]
    assert view["note"].endswith("scaled down from 2048 x 1000 pixels")
    view = do(desk, view, op="insert", boxes=[[0, 0, 1, 1]], phrases=["x"])
    assert (view["version"], view["failed"]) == (1, False)
    view = do(desk, view, op="insert", boxes=[[0, 0, 1, 1]], phrases=["x"])
    assert (view["version"], view["failed"]) == (1, True)
    assert "hold 3,100,000 bytes already" in view["note"]


def test_a_question_that_is_stopped_or_fails_leaves_the_picture_for_the_next():
    desk, _ = begun()
    conversation = desk.say("How red?")
    next(conversation), next(conversation)
    with pytest.raises(UserError, match="still answering"):
        next(desk.say("Hurry"))
    conversation.close()
    assert desk.talk[-1] == {"role": "assistant", "content": "Stopped", "failed": True}
    assert desk.session.events[-1]["op"] == "upload"
    desk.responder.run = lambda call: (_ for _ in ()).throw(UserError("model: is gone"))
    assert last(desk.say("How red?")) == "model: is gone"
    del desk.responder.run
    assert last(desk.say("How red?")) == "0.07 1"
    assert list(desk.say("  ")) == []


def test_desks_belong_to_a_browser_are_bounded_and_expire():
    now = [0.0]
    desks = Desks(backends_of(), Looks(name="looks"), UploadPolicy(3 * LEAST_BYTES, 2 * LEAST_BYTES, seconds=100))
    desks._kept._clock = lambda: now[0]
    one = desks.of("one", "key")
    assert desks.of("one", "key") is one
    assert desks.known("two") is None
    assert desks.known(None) is None
    now[0] = 1
    desks.of("two", "key")
    desks.of("three", "key")
    assert desks.known("one") is None, "the oldest of a key makes room"
    desks.of("four", "another")
    with pytest.raises(Refused, match="as many"):
        desks.of("five", "a third")
    now[0] = 102
    desks.expire()
    assert desks._kept.bytes == 0


def test_what_is_missing_is_not_offered_and_what_works_is_said():
    found = offers(backends_of())
    assert [tab["name"] for tab in found["tabs"]] == ["compose", "inpaint", "create"]
    assert found["marks"] == ["stroke", "box", "points", "mask", "text"]
    assert "not objects" in found["notes"]["segmenter"]
    assert "no generator" in found["notes"]["generator"]
    whole = backends_of()
    nameless = SkillSegmenter(whole.segmenter.cutter)
    assert "text" not in offers(Backends(nameless, whole.filler))["marks"]
    assert [tab["name"] for tab in offers(Backends(nameless, whole.filler))["tabs"]] == ["compose"]
    assert offers(Backends(generator=whole.generator))["marks"] == []
    assert offers(Backends()) == {"tabs": [], "marks": [], "draws": False, "notes": {}}
