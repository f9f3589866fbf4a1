"""Skills, and the toolbox that runs them for models: what they find, and every way in which a call can go wrong."""

from __future__ import annotations

import base64
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from llavakit.errors import UserError
from llavakit.phantom.scene import Scene
from llavakit.registry import SKILLS
from llavakit.tools import Artefacts, Limits, Outcome, Skill, Toolbox, load_toolbox
from llavakit.tools.configuration import build_skill
from llavakit.tools.inpainting import inpaint
from llavakit.tools.rle import decode_mask, encode_mask
from llavakit.tools.segmentation import segment
from llavakit.tools.shapes import detect_shapes
from llavakit.tools.skill import SkillError, parameters, picture

cv2 = pytest.importorskip("cv2")
SCENE = Scene(size=192)


def scene(index, world=SCENE):
    case = world.sample(3, index)
    return case, Image.fromarray(case.items[0].media[0])


def blank(width=32, height=24, colour=(10, 20, 30)):
    return Image.new("RGB", (width, height), colour)


# Masks


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (64, 3), (0, 0), (0, 4)])
def test_masks_survive_run_lengths(shape):
    mask = np.random.default_rng(0).random(shape) > 0.5
    assert (decode_mask(encode_mask(mask)) == mask).all()


def test_run_lengths_are_those_of_coco():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2] = mask[1, 3] = True
    assert encode_mask(mask) == {"size": [4, 6], "counts": "922O8"}
    assert decode_mask({"size": [4, 6], "counts": "0h0"}).all()
    assert encode_mask(np.ones((4, 6), bool))["counts"] == "0h0"
    assert decode_mask({"size": [2, 2], "counts": [1, 2, 1]}).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "x",
        {"size": [2]},
        {"size": [2, -1], "counts": "0"},
        {"size": [2, 2], "counts": "0é"},
        {"size": [2, 2], "counts": "o"},
        {"size": [1, 1], "counts": [0, 9]},
        {"size": [2**20, 2**20]},
    ],
)
def test_broken_run_lengths_are_named(value):
    with pytest.raises(UserError, match="mask"):
        decode_mask(value)


# Skills


def test_every_object_of_a_scene_is_detected():
    right = 0
    for index in range(20):
        case, image = scene(index)
        found = detect_shapes(image)
        right += sorted(found.data["phrases"]) == sorted(f"{t['colour']} {t['shape']}" for t in case.facts["things"])
        for box, mask in zip(found.data["boxes"], found.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box[0] == pytest.approx(columns.min() / 192, abs=1e-4)
            assert box[3] == pytest.approx((rows.max() + 1) / 192, abs=1e-4)
    assert right >= 19


def test_a_caption_chooses_among_objects():
    _, image = scene(3)
    everything = detect_shapes(image).data["phrases"]
    one = everything[0]
    assert set(detect_shapes(image, one).data["phrases"]) == {one}
    plural = f"{one.split()[0]} {one.split()[1]}{'es' if one.endswith('cross') else 's'}"
    assert one in detect_shapes(image, plural).data["phrases"]
    assert detect_shapes(image, " . ".join(everything)).data["phrases"] == everything
    with pytest.raises(SkillError, match="known words"):
        detect_shapes(image, "a giraffe")


def test_a_stroke_is_segmented():
    overlaps = []
    for index in range(12):
        _, image = scene(index, Scene(size=96, types=["shape"], most=2))
        found = detect_shapes(image)
        name, truth = found.data["phrases"][0], found.masks[0]
        if "ring" in name:
            continue
        rows, columns = np.nonzero(truth)
        chosen = np.argsort(columns)[[len(columns) // 4, len(columns) // 2, 3 * len(columns) // 4]]
        stroke = [[(columns[k] + 0.5) / 96, (rows[k] + 0.5) / 96] for k in chosen]
        mask = segment(image, stroke=stroke).masks[0]
        overlaps.append((mask & truth).sum() / (mask | truth).sum())
    assert np.mean(overlaps) >= 0.9


def test_box_point_and_scribble_find_the_same_thing():
    image = blank(60, 60, (90, 90, 90))
    image.paste((200, 30, 30), (20, 15, 40, 45))
    truth = np.zeros((60, 60), bool)
    truth[15:45, 20:40] = True
    scribble = np.zeros((60, 60), bool)
    scribble[30, 25:35] = True
    for marks in (
        {"box": [0.2, 0.1, 0.8, 0.9]},
        {"points": [[0.5, 0.5]]},
        {"points": [[0.5, 0.5], [0.1, 0.1]], "point_labels": [1, 0]},
        {"scribble": scribble},
        {"stroke": [[0.5, 0.5]]},
    ):
        found = segment(image, **marks)
        assert (found.masks[0] == truth).mean() > 0.99, marks
        assert found.data["boxes"][0] == pytest.approx([20 / 60, 15 / 60, 40 / 60, 45 / 60], abs=0.02)


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ({}, "mark something"),
        ({"box": [0.9, 0.9, 0.1, 0.1]}, "holds nothing"),
        ({"points": [[0.5, 0.5]], "point_labels": []}, "0 for 1 points"),
        ({"scribble": np.ones((3, 3), bool)}, "3 x 3 pixels, the picture 32 x 24"),
        ({"scribble": np.ones((24, 32), bool)}, "whole picture"),
    ],
)
def test_marks_that_do_not_fit_are_named(marks, said):
    with pytest.raises(SkillError, match=said):
        segment(blank(), **marks)


def test_removal_fills_from_the_surroundings():
    image = blank(64, 64, (80, 120, 160))
    clean = np.asarray(image).astype(float)
    image.paste((250, 250, 250), (20, 20, 34, 40))
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:34] = True
    for method in ("telea", "navier_stokes"):
        filled = np.asarray(inpaint(image, mask, method=method).pictures["edited_image"]).astype(float)
        assert np.abs(filled - clean).max() <= 4
    with pytest.raises(SkillError, match="64 x 64"):
        inpaint(image, np.ones((3, 4), bool))
    with pytest.raises(SkillError, match="empty"):
        inpaint(image, np.zeros((64, 64), bool))
    with pytest.raises(SkillError, match="whole picture"):
        inpaint(image, np.ones((64, 64), bool))


def test_text_is_read():
    pytest.importorskip("rapidocr_onnxruntime")
    image = np.full((80, 240, 3), 255, np.uint8)
    cv2.putText(image, "OPEN 24", (20, 50), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (0, 0, 0), 3)
    found = build_skill("ocr")(image=Image.fromarray(image)).data
    assert "".join(found["texts"]).replace(" ", "") == "OPEN24"
    assert all(0 <= edge <= 1 for box in found["boxes"] for edge in box)
    assert build_skill("ocr")(image=blank()).data["texts"] == []


def test_every_skill_says_what_it_needs_and_why_it_cannot_run():
    for name in SKILLS:
        skill = build_skill(name)
        assert skill.name == name
        assert skill.description
        assert skill.needs
        assert skill.parameters["type"] == "object"
        if skill.missing:
            with pytest.raises(SkillError, match=name):
                skill()
    assert "not configured" in build_skill("grounding_dino").missing
    assert "no config.json" in build_skill("sam", {"model": "/nowhere"}).missing


# The toolbox


def simple(name="echo", function=None, **options):
    schema = parameters(("word",), word={"type": "string"})
    return Skill(name=name, description="x", parameters=schema, function=function or echo, **options)


def echo(word):
    return Outcome({"word": word})


def test_calls_are_checked_before_the_skill_sees_them():
    box = Toolbox([simple()], limits=Limits(argument_bytes=100))
    assert box.call("echo", {"word": "hi"}).data == {"word": "hi"}
    assert box.call("echo", '{"word": "hi"}').error is None
    for name, arguments, said in (
        ("ehco", {}, "did you mean 'echo'"),
        ({"a": 1}, {}, "no tool"),
        ("echo", {}, "'word' is a required property"),
        ("echo", {"word": 3}, "word: 3 is not of type 'string'"),
        ("echo", {"word": "a", "more": 1}, "more"),
        ("echo", "{", "not JSON"),
        ("echo", [1], "must be an object"),
        ("echo", {"word": "x" * 200}, "100 are allowed"),
        ("echo", {"word": float("nan")}, "finite"),
    ):
        found = box.call(name, arguments)
        assert said in str(found.error), (name, arguments)
        assert "\n" not in found.error


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("text", "not an Outcome"),
        (Outcome({"x": object()}), "not made of JSON"),
        (Outcome({"x": "y" * 2000}), "1000 are allowed"),
        (Outcome({"x": [1.0, float("inf")]}), "not finite"),
        (Outcome(pictures={"a": blank(100, 100)}), "more than 900 pixels"),
        (Outcome(masks=(np.zeros((5, 5)),) * 3), "more pictures or masks"),
    ],
)
def test_results_stay_within_their_limits(outcome, said):
    box = Toolbox([simple(function=lambda word: outcome)], limits=Limits(result_bytes=1000, pixels=900, masks=2))
    assert said in box.call("echo", {"word": "x"}).error


def test_a_skill_that_fails_is_one_line():
    def broken(word):
        raise RuntimeError("line one\nline two")

    error = Toolbox([simple(function=broken)]).call("echo", {"word": "x"}).error
    assert error == "echo: failed (RuntimeError: line one line two)"


def test_a_skill_that_hangs_is_left_alone_and_then_refused():
    go = threading.Event()

    def slow(word):
        go.wait(20)
        return Outcome({"word": word})

    box = Toolbox([simple(function=slow)], limits=Limits(seconds=0.05, hanging=2))
    began = time.perf_counter()
    for _ in range(2):
        assert "no answer within 0.05 s" in box.call("echo", {"word": "x"}).error
    assert "2 earlier calls are still running" in box.call("echo", {"word": "x"}).error
    assert time.perf_counter() - began < 5
    go.set()
    deadline = time.perf_counter() + 10
    while box.call("echo", {"word": "x"}).error and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert box.call("echo", {"word": "x"}).error is None


def test_effects_have_to_be_allowed():
    skill = simple(effects=frozenset({"writes"}))
    assert "not allowed" in Toolbox([skill]).call("echo", {"word": "x"}).error
    assert Toolbox([skill]).tools() == []
    assert Toolbox([skill], allow=["writes"]).call("echo", {"word": "x"}).error is None


def size_of(image):
    return Outcome({"size": list(image.size)})


SIZES = Skill(name="size", description="x", parameters=parameters(image=picture()), function=size_of)


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_pictures_come_by_id_data_url_or_from_the_session():
    box, artefacts = Toolbox([SIZES]), Artefacts(blank(5, 6))
    assert box.call("size", {}, artefacts).data == {"size": [5, 6]}
    assert box.call("size", {"image": None}, artefacts).data == {"size": [5, 6]}
    assert box.call("size", {"image": artefacts.add(blank(7, 8))}, artefacts).data == {"size": [7, 8]}
    assert box.call("size", {"image": data_url(blank(9, 3))}).data == {"size": [9, 3]}
    assert box.call("size", {"image": blank(2, 3)}).data == {"size": [2, 3]}
    for value, said in (
        ("http://127.0.0.1/x.png", "not fetched here"),
        ("file:///etc/passwd", "size: image"),
        ("/etc/passwd", "no id of a picture"),
        ("picture-nobody", "in this session"),
        ("data:image/png;base64,AAAA", "size|image"),
        (7, "must be the id"),
    ):
        error = box.call("size", {"image": value}).error
        assert error is not None, value
        assert any(part in error for part in said.split("|")), (value, error)
    assert "needs a picture" in box.call("size").error
    assert SIZES.tool().parameters["properties"] == {}


def test_addresses_go_through_the_media_policy():
    from llavakit.media.policy import MediaPolicy

    box = Toolbox([SIZES], media=MediaPolicy(fetch=True))
    assert "not a public address" in box.call("size", {"image": "http://127.0.0.1:9/x.png"}).error


def test_what_tools_make_can_be_used_by_the_next_call():
    image = blank(60, 60, (90, 90, 90))
    image.paste((200, 30, 30), (20, 15, 40, 45))
    box, artefacts = load_toolbox(), Artefacts(image)
    assert "needs a mask" in box.call("inpaint", {}, artefacts).error
    found = box.call("segment", {"points": [[0.5, 0.5]]}, artefacts)
    assert found.error is None
    assert set(found.artefacts) == {"mask"}
    edited = box.call("inpaint", {}, artefacts)
    again = box.call("inpaint", {"mask": found.whole()["masks_rle"][0]}, artefacts)
    assert np.asarray(edited.pictures["edited_image"]).std() < 3
    assert (np.asarray(again.pictures["edited_image"]) == np.asarray(edited.pictures["edited_image"])).all()
    removed = box.call("detect_shapes", {"image": edited.artefacts["edited_image"]}, artefacts)
    assert removed.data["phrases"] == []


def test_artefacts_are_bounded_and_expire():
    now = [0.0]
    artefacts = Artefacts(most=3, most_bytes=1000, seconds=10, clock=lambda: now[0])
    names = [artefacts.add(blank(5, 5)) for _ in range(5)]
    assert [name in artefacts for name in names] == [False, False, True, True, True]
    artefacts.add(np.zeros((30, 30), bool))
    assert len(artefacts) <= 2
    with pytest.raises(SkillError, match="may keep"):
        artefacts.add(blank(100, 100))
    now[0] = 11
    with pytest.raises(SkillError, match="expired"):
        artefacts.get(names[-1], "picture")
    assert len(artefacts) == 0


# Configuration


def test_a_configuration_chooses_names_and_limits(tmp_path):
    file = tmp_path / "tools.yaml"
    file.write_text(
        "skills:\n  grounding_dino: {type: detect_shapes}\n  ocr:\nlimits: {seconds: 3}\nallow: [fetches]\n"
    )
    box = load_toolbox(file)
    assert list(box.skills) == ["grounding_dino", "ocr"]
    assert box.limits.seconds == 3
    case, image = scene(1)
    found = box.call("grounding_dino", {"caption": "object ."}, Artefacts(image))
    assert len(found.data["boxes"]) == len(case.facts["things"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must be a mapping"),
        ("skils: {}", "did you mean 'skills'"),
        ("skills: {nothing: {}}", "unknown skill 'nothing'"),
        ("skills: {ocr: {size: 3}}", "has no option 'size'"),
        ("skills: {ocr: 3}", "must be a mapping of options"),
        ("allow: [everything]", "allow must be"),
        ("limits: {seconds: -1}", "seconds must be a number above 0"),
        ("limits: {hours: 1}", "unknown key 'hours'"),
        ("media: {fetch: 1}", "true or false"),
        ("skills: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, text, said):
    file = tmp_path / "tools.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        load_toolbox(file)
