"""The phantom worlds: determinism, splits, balance, physics, records, tokenizer."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from llavakit.conversation.messages import from_llava, media_of
from llavakit.errors import UserError
from llavakit.phantom import anatomy, endoscope, glyphs, patient, report, words
from llavakit.phantom.base import Box, cell_labels, generator, indices, split_of
from llavakit.phantom.canvas import COLOURS, SHAPES, render
from llavakit.phantom.endoscope import METAL, Action, Field, tip_of
from llavakit.phantom.procedure import INSTRUMENTS, PHASES, Procedure
from llavakit.phantom.scene import Scene
from llavakit.phantom.thorax import Thorax
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import build_world, converse, phrase, write_world

FULL = {
    "thorax": {"size": 32, "volumes": True, "grid": 12, "followups": True, "masks": True},
    "scene": {"size": 48, "pairs": True, "videos": True, "frames": 4},
    "procedure": {"size": 24, "frames": 4},
}


def chest_of(seed, index, difficulty="full"):
    """The findings and the anatomy of a patient as the world draws them."""
    rng = generator(seed, index, "thorax/patient")
    kinds = Thorax(difficulty=difficulty).kinds
    findings = patient.draw_findings(rng, kinds, 3 if difficulty == "full" else 1, patient.SETTINGS[difficulty])
    return findings, patient.build_chest(rng, findings, patient.SETTINGS[difficulty])


def fingerprint(case):
    digest = hashlib.sha256(json.dumps([case.facts, case.report, case.triples, case.split]).encode())
    for item in case.items:
        digest.update(repr((item.id, item.questions, item.caption, item.boxes)).encode())
        for array in item.media:
            digest.update(array.tobytes())
    return digest.hexdigest()


# -- every world ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
def test_a_case_depends_on_seed_and_index_alone(name):
    first, second = build_world(name, **FULL[name]), build_world(name, **FULL[name])
    expected = {(seed, i): fingerprint(first.sample(seed, i)) for seed in (0, 1) for i in range(4)}
    for key in reversed(expected):
        assert fingerprint(second.sample(*key)) == expected[key]
    assert len(set(expected.values())) == len(expected)


def test_the_same_case_in_another_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_phantom import *;"
        "print([fingerprint(build_world(n, **FULL[n]).sample(3, 5)) for n in FULL])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == str([fingerprint(build_world(n, **FULL[n]).sample(3, 5)) for n in FULL])


def test_splits_never_share_a_case():
    train, heldout = set(indices("train", 900)), set(indices("heldout", 100))
    assert not train & heldout
    assert train | heldout == set(range(1000))
    assert all(split_of(i) == "heldout" for i in heldout)
    for name, options in FULL.items():
        case = build_world(name, **options).sample(0, 9)
        assert case.split == "heldout"
        assert all(item.id.startswith(case.id) for item in case.items)


@pytest.mark.parametrize("name", FULL)
def test_every_word_is_among_the_texts(name):
    world = build_world(name, **FULL[name])
    known = set(re.findall(r"\w+", " ".join(world.texts())))
    for index in range(60):
        case = world.sample(11, index)
        said = [*case.report.values(), *(" ".join(t) for t in case.triples)]
        for item in case.items:
            said += [item.caption, item.caption_prompt]
            said += [f"{q.text} {q.answer} {q.sentence} {' '.join(q.choices)}" for q in item.questions]
        assert set(re.findall(r"[^\W\d]\w*", " ".join(said))) <= known


def thorax_questions(difficulty, count):
    """Questions of many patients, without the pictures."""
    world = Thorax(difficulty=difficulty)
    for index in range(count):
        findings, _ = chest_of(2, index, difficulty)
        rng = generator(2, index, "questions")
        yield from report.ask(rng, findings, world.types, world.kinds, world.setting)
        if difficulty == "full":
            yield from report.ask(rng, findings, report.VOLUME_TYPES, world.kinds, world.setting, picture="scan")


def scene_questions(options, count):
    world = Scene(**options)
    for index in range(count):
        for item in world.sample(2, index).items:
            yield from item.questions


def procedure_questions(options, count):
    """Questions of many operations, without the pictures."""
    world = Procedure(**options)
    for index in range(count):
        rng = generator(2, index, "procedure")
        segments, main = world._operation(rng)
        yield from world._ask(rng, segments[main])
        yield from world._ask_clip(rng, segments, main)


@pytest.mark.parametrize(
    "questions",
    [
        lambda: thorax_questions("easy", 1500),
        lambda: thorax_questions("full", 1500),
        lambda: scene_questions({"difficulty": "easy", "size": 24}, 800),
        lambda: scene_questions({"pairs": True, "videos": True, "frames": 4, "size": 24}, 600),
        lambda: procedure_questions({"difficulty": "easy"}, 4000),
        lambda: procedure_questions({}, 4000),
    ],
    ids=["thorax-easy", "thorax", "scene-easy", "scene", "procedure-easy", "procedure"],
)
def test_no_answer_can_be_guessed_from_the_question(questions):
    by_type, by_text = defaultdict(Counter), defaultdict(Counter)
    for question in questions():
        by_type[question.type][question.answer] += 1
        by_text[question.text][question.answer] += 1
    for type_, answers in by_type.items():
        total = answers.total()
        assert max(answers.values()) / total < 0.55 + 1.0 / total**0.5, (type_, answers)
    often = [answers for answers in by_text.values() if answers.total() >= 150]
    assert often
    for answers in often:
        assert max(answers.values()) / answers.total() < 0.62
    guessed = sum(max(answers.values()) for answers in often) / sum(answers.total() for answers in often)
    assert guessed < 0.57


@pytest.mark.parametrize("name", FULL)
def test_answers_are_among_the_choices_and_in_the_sentence(name):
    world = build_world(name, **FULL[name])
    for index in range(30):
        for item in world.sample(4, index).items:
            for question in item.questions:
                assert not question.choices or question.answer in question.choices
                if question.answer not in ("Yes", "No") and question.type not in ("edit", "change"):
                    assert question.answer.lower() in question.sentence.lower()


def test_no_answer_can_be_read_from_the_dialogue_about_a_chest():
    """Presence, then number, then the rest of each finding."""
    rank = {"presence": 0, "count": 1}
    for index in range(300):
        findings, _ = chest_of(6, index)
        world = Thorax()
        seen = defaultdict(list)
        questions = report.ask(generator(6, index, "q"), findings, world.types, world.kinds, world.setting)
        for question in questions:
            kind = next((n for n in report.NAMES.values() if n in question.text), "cardiomegaly")
            seen[kind].append(rank.get(question.type, 2))
        assert all(order == sorted(order) for order in seen.values())
        assert len({q.text for q in questions}) == len(questions)


def test_no_answer_can_be_read_from_the_dialogue_about_a_scene():
    world = Scene(size=24)
    opening = Counter()
    for index in range(400):
        questions = world.sample(6, index).items[0].questions
        opening[questions[0].type] += 1
        early = [q.type in ("exist", "count") for q in questions]
        assert early == sorted(early, reverse=True)
        rest = [q for q in questions if q.type not in ("exist", "count")]
        for place, question in enumerate(rest):
            if question.type in ("colour", "shape"):
                words_of_it = {*question.sentence.lower().strip(".").split()} & {*COLOURS, *SHAPES}
                assert len(words_of_it) == 2
                others = " ".join(q.text.lower() for q in rest[:place] + rest[place + 1 :])
                assert " ".join(sorted(words_of_it, key=lambda w: w in SHAPES)) not in others
                assert not (question.type == "colour" and f"the {question.answer.lower()} object" in others)
    assert min(opening[type_] for type_ in ("colour", "shape", "row", "column", "count", "exist")) >= 5


def test_cell_labels_follow_the_boxes():
    box = Box("disc", "red disc", (0.0, 0.0, 0.5, 0.25))
    labels = cell_labels([box], 4, 4, ["red", "disc", "blue"])
    assert labels.shape == (4, 4, 3)
    assert labels[0, :2, :2].all()
    assert labels.sum() == 4
    small = cell_labels([Box("nodule", "nodule", (0.6, 0.6, 0.62, 0.62))], 2, 2, ["nodule"])
    assert small[:, :, 0].tolist() == [[0, 0], [0, 1]]


def test_options_that_do_not_exist_are_named():
    for name, options, message in [
        ("torax", {}, "did you mean 'thorax'"),
        ("scene", {"siz": 3}, "did you mean 'size'"),
        ("scene", {"size": 3}, "size: 3 is no number from 24 to 4096"),
        ("scene", {"aspect": "wide"}, "aspect: 'wide' is no number"),
        ("thorax", {"difficulty": "hard"}, "use one of 'full', 'easy'"),
        ("thorax", {"types": "presence,colour"}, "'colour'"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            build_world(name, **options)
    with pytest.raises(UserError, match="must not be negative"):
        Scene().sample(-1, 0)


# -- thorax -----------------------------------------------------------------------------------------------------------


def test_the_radiograph_is_the_projection_of_the_volume():
    for index in range(4):
        _, chest = chest_of(1, index)
        volume, spacing = anatomy.volume(chest, (128, 96, 128))
        assert volume.dtype == np.int16
        projected, written = anatomy.project(volume, spacing), anatomy.line_integrals(chest, (128, 128))
        difference = np.abs(projected - written)
        # A ray gains or loses up to one voxel at each surface that it crosses; edges of parts differ by a pixel.
        assert difference.mean() < 0.04
        assert np.percentile(difference, 95) < 0.09
        assert np.corrcoef(projected.ravel(), written.ravel())[0, 1] > 0.998


def test_projection_error_shrinks_with_the_voxel():
    _, chest = chest_of(1, 2)
    errors = []
    for cells in (24, 48, 96):
        volume, spacing = anatomy.volume(chest, (cells, cells, cells))
        written = anatomy.line_integrals(chest, (cells, cells))
        errors.append(np.abs(anatomy.project(volume, spacing) - written).mean())
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


def test_line_integrals_are_never_negative():
    for index in range(60):
        assert anatomy.line_integrals(chest_of(2, index)[1], (48, 48)).min() >= 0.0


def test_depth_cannot_be_seen_in_a_radiograph():
    depths_differ = 0
    for index in range(12):
        _, chest = chest_of(3, index)
        mirrored = anatomy.mirror_depth(chest)
        here, there = (anatomy.line_integrals(c, (64, 64)) for c in (chest, mirrored))
        np.testing.assert_allclose(here, there, atol=1e-5)
        volume, other = (anatomy.volume(c, (32, 32, 32))[0] for c in (chest, mirrored))
        assert (volume[:, ::-1] == other).mean() > 0.9999
        depths_differ += bool((volume != other).any())
    assert depths_differ == 12


def test_a_small_nodule_shows_only_at_high_resolution():
    """An observer who knows where to look: signal over noise of the difference that the nodule makes."""

    def visibility(size):
        values = []
        for index in range(60):
            findings, chest = chest_of(5, index)
            for finding in findings:
                if finding.kind == "nodule" and finding.size == "small":
                    lung = chest.lungs[finding.side]
                    with_it = anatomy.expose(anatomy.line_integrals(chest, (size, size)), None).astype(float)
                    noisy = anatomy.expose(anatomy.line_integrals(chest, (size, size)), np.random.default_rng(0))
                    kept = lung.nodules[:]
                    lung.nodules = [n for n in kept if n.center != finding.center]
                    without = anatomy.expose(anatomy.line_integrals(chest, (size, size)), None).astype(float)
                    lung.nodules = kept
                    changed = with_it != without
                    sigma = max((noisy - with_it)[60 * size // 128 : 70 * size // 128].std(), 1.0)
                    values.append(np.sqrt(((with_it - without)[changed] ** 2).sum()) / sigma)
        return np.array(values)

    low, high = visibility(64), visibility(336)
    assert len(low) >= 10
    assert np.median(low) < 1.2
    assert np.median(high) > 4.0


def test_large_findings_change_many_pixels():
    for index in range(40):
        findings, chest = chest_of(7, index, "easy")
        masks = patient.find_masks(chest, findings, (64, 64))
        for finding, mask in zip(findings, masks.values(), strict=True):
            assert mask.sum() >= 12, finding
            rows, columns = np.nonzero(mask)
            if finding.side:
                half = "left" if columns.mean() > 31.5 else "right"
                assert half == finding.side
            if finding.zone:
                top, bottom = patient.zone_limits(chest.lungs[finding.side])
                z = (rows.mean() + 0.5) / 64 * anatomy.HEIGHT - anatomy.HEIGHT / 2
                assert min(int(3 * (z - top) / (bottom - top)), 2) == patient.ZONES.index(finding.zone)


def test_boxes_hold_the_masks():
    world = Thorax(size=180, masks=True)
    seen = set()
    for index in range(40):
        item = world.sample(8, index).items[0]
        assert len(item.boxes) == len(item.masks)
        for box, (label, mask) in zip(item.boxes, item.masks.items(), strict=True):
            assert label.startswith(box.label)
            seen.add(box.label)
            rows, columns = np.nonzero(mask)
            left, top, right, bottom = (value * 180 for value in box.xyxy)
            assert columns.min() >= left - 2
            assert columns.max() <= right + 1
            assert rows.min() >= top - 2
            assert rows.max() <= bottom + 1
            assert right - left <= np.ptp(columns) + 6
    assert seen == set(patient.MODALITIES)


def test_depth_is_asked_about_volumes_only_and_is_true():
    world = Thorax(size=16, volumes=True, grid=64, findings="nodule", types="presence,side")
    asked = 0
    for index in range(40):
        image, scan = world.sample(9, index).items
        assert all(question.type != "depth" for question in image.questions)
        question = next((q for q in scan.questions if q.type == "depth"), None)
        rows = np.nonzero(scan.media[0] == int(anatomy.SOLID))[1]
        if question is not None and len(rows):
            asked += 1
            assert question.answer == ("Anterior" if rows.mean() < 31.5 else "Posterior")
    assert asked >= 6


def test_followup_findings_grow_shrink_and_go():
    area = defaultdict(list)
    for index in range(60):
        findings, chest = chest_of(10, index)
        nodules = [i for i, f in enumerate(findings) if f.kind == "nodule" and f.size == "large"]
        if len(nodules) != 1:
            continue
        before = anatomy.line_integrals(chest, (96, 96))
        none = anatomy.line_integrals(patient.progress(chest, findings, {nodules[0]: "gone"}), (96, 96))
        for change in patient.CHANGES:
            later = patient.progress(chest, findings, {nodules[0]: change})
            area[change].append((anatomy.line_integrals(later, (96, 96)) - none).sum() / (before - none).sum())
    assert len(area["grown"]) >= 4
    assert min(area["grown"]) > 1.5
    assert max(area["shrunk"]) < 0.7
    np.testing.assert_allclose(area["unchanged"], 1.0, atol=1e-3)
    np.testing.assert_allclose(area["gone"], 0.0, atol=1e-6)


def test_the_patient_is_the_same_at_any_resolution():
    cases = [Thorax(size=size, masks=masks).sample(1, 3) for size, masks in ((32, False), (64, True))]
    assert cases[0].facts == cases[1].facts
    assert cases[0].report == cases[1].report
    assert cases[0].items[0].questions == cases[1].items[0].questions


def test_the_report_names_what_is_there():
    world = Thorax(size=16)
    for index in range(60):
        case = world.sample(12, index)
        for kind, present in case.facts["labels"].items():
            negative = "heart size is normal" if kind == "cardiomegaly" else f"no {patient_name(kind)}"
            assert (negative in case.report["findings"]) != present
        assert (case.report["impression"] == "No acute findings.") != any(case.facts["labels"].values())


def patient_name(kind):
    return "pleural effusion" if kind == "effusion" else kind


# -- scene ------------------------------------------------------------------------------------------------------------


def test_colours_and_places_are_in_the_pixels():
    world = Scene(size=96, difficulty="easy", most=1)
    for index in range(40):
        item = world.sample(0, index).items[0]
        box = item.boxes[0]
        left, top, right, bottom = (round(value * 96) for value in box.xyxy)
        part = item.media[0][top:bottom, left:right].astype(float)
        colour = np.array(COLOURS[box.description.split()[0]], float)
        near = np.abs(part - colour).sum(axis=2) < 30
        assert near.mean() > 0.2
        outside = np.abs(item.media[0].astype(float) - colour).sum(axis=2) < 30
        outside[top:bottom, left:right] = False
        assert not outside.any()


def test_canvases_keep_their_area_and_aspect():
    wide = Scene(size=96, aspect=4.0).sample(0, 0).items[0].media[0]
    assert wide.shape == (48, 192, 3)
    shapes = [Scene(size=96, aspect="mixed").sample(0, i).items[0].media[0].shape for i in range(30)]
    ratios = [width / height for height, width, _ in shapes]
    assert min(ratios) < 0.5
    assert max(ratios) > 2
    assert all(0.8 < height * width / 96**2 < 1.25 for height, width, _ in shapes)


def test_the_clip_moves_as_its_answer_says():
    world = Scene(size=48, videos=True, frames=6)
    for index in range(25):
        clip = world.sample(3, index).items[-1]
        frames = clip.media[0].astype(float)
        assert frames.shape == (6, 48, 48, 3)
        questions = {q.type: q for q in clip.questions}
        name = re.search("the (.*) move", questions["direction"].text).group(1)
        colour = np.array(COLOURS[name.split()[0]], float)
        centers = []
        for frame in (frames[0], frames[-1]):
            centers.append(np.argwhere(np.abs(frame - colour).sum(axis=2) < 24).mean(axis=0))
        dy, dx = centers[1] - centers[0]
        horizontal = "Left" if dx < 0 else "Right"
        vertical = "Up" if dy < 0 else "Down"
        assert questions["direction"].answer == (horizontal if abs(dx) > abs(dy) else vertical)
        first_color = np.array(COLOURS[questions["order"].answer.lower().split()[0]], float)
        other = next(c for c in questions["order"].choices if c != questions["order"].answer)
        other_color = np.array(COLOURS[other.lower().split()[0]], float)
        starts = [
            next(t for t in range(6) if (np.abs(frames[t] - c).sum(axis=2) < 24).any())
            for c in (first_color, other_color)
        ]
        assert starts[0] < starts[1]


def test_pairs_differ_by_one_edit():
    world = Scene(size=48, pairs=True)
    for index in range(40):
        pair = world.sample(5, index).items[1]
        first, second = pair.media
        assert first.shape == second.shape
        assert (first != second).any()
        assert pair.questions


def test_glyphs_differ_and_scale():
    drawn = {c: glyphs.render(c).tobytes() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"}
    assert len(set(drawn.values())) == 36
    assert glyphs.render("AB", 2).shape == (14, 22)


def test_shapes_differ():
    from llavakit.phantom.canvas import stencil

    masks = [stencil(shape, 16)[:, :, 0] for shape in SHAPES]
    for i, a in enumerate(masks):
        assert 0.1 < a.mean() < 0.95
        assert all(np.abs(a - b).mean() > 0.05 for b in masks[:i])
    assert render([], None, 8, 9, np.random.default_rng(0)).shape == (8, 9, 3)


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
def test_a_folder_is_complete_and_repeatable(name, tmp_path):
    out = tmp_path / "world"
    manifest = write_world(name, out, n=20, seed=1, **FULL[name])
    assert not manifest["reused"]
    assert manifest["counts"]["train"] > 18
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = write_world(name, out, n=20, seed=1, **FULL[name])
    assert again["reused"]
    assert again["counts"] == manifest["counts"]
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert [p.name for p in tmp_path.iterdir()] == ["world"]
    other = tmp_path / "other"
    write_world(name, other, n=20, seed=1, **FULL[name])
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (other / path.relative_to(out)).read_bytes(), path

    ids = {}
    for split in ("train", "heldout"):
        records = json.loads((out / f"{split}.json").read_text())
        ids[split] = {re.match(r"\w+-\d+-\d+", record["id"]).group() for record in records}
        for record in records:
            messages = from_llava(record)
            media = media_of(messages)
            assert media
            assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
            for media_item in media:
                path = out / media_item[media_item["type"]]
                assert path.stat().st_size > 0
                if media_item["type"] == "image":
                    assert np.asarray(Image.open(path)).dtype == np.uint8
                if media_item["type"] == "volume":
                    assert np.load(path).shape == (12, 12, 12)
    assert not ids["train"] & ids["heldout"]
    questions = [json.loads(line) for line in (out / "heldout_questions.jsonl").read_text().splitlines()]
    assert len({q["question_id"] for q in questions}) == len(questions) == manifest["counts"]["heldout_questions"]
    assert all(q["text"].endswith(words.SHORT) or q["type"] == "box" for q in questions)
    assert all({"text", "answer", "type"} <= q.keys() for q in questions)
    for record in json.loads((out / "captions.json").read_text()):
        assert len(from_llava(record)) == 2
    assert json.loads((out / "texts.json").read_text())
    assert json.loads((out / "kg.json").read_text())["cases"]
    assert json.loads((out / "boxes.json").read_text())


def test_other_data_in_the_folder_is_kept(tmp_path):
    out = tmp_path / "world"
    write_world("scene", out, n=3)
    with pytest.raises(UserError, match="another n"):
        write_world("scene", out, n=4)
    with pytest.raises(UserError, match="another options"):
        write_world("scene", out, n=3, size=32)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        write_world("scene", mine, n=3)
    assert (mine / "notes.txt").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert not write_world("scene", tmp_path / "empty", n=2)["reused"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Scene, "texts", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_world("scene", tmp_path / "world", n=3)
    assert not list(tmp_path.iterdir())


def test_nifti_volumes_stand_in_patient_space(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    write_world("thorax", tmp_path / "w", n=1, volumes=True, grid=16, volume_format="nii", size=16)
    image = nibabel.load(next((tmp_path / "w" / "volumes").iterdir()))
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "I")
    expected = Thorax(volumes=True, grid=16, size=16).sample(0, 0).items[1].media[0]
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), expected)


def test_response_formats():
    rng = np.random.default_rng(0)
    question = Scene(difficulty="easy", types="count").sample(0, 0).items[0].questions[0]
    text, answer = phrase(question, "short", rng)
    assert (text, answer) == (f"{question.text}\n{words.SHORT}", question.answer)
    assert phrase(question, "sentence", rng) == (question.text, question.sentence)
    text, letter = phrase(question, "choice", rng)
    assert text.endswith(words.CHOICE)
    assert f"\n{letter}. {question.answer}\n" in text
    turns = converse("images", [question] * 3, "short", rng)
    assert turns[0]["value"].startswith("<image>\n<image>\n")
    assert sum(words.SHORT in turn["value"] for turn in turns) == 1


def test_letters_of_multiple_choice_are_balanced():
    rng = np.random.default_rng(0)
    question = Scene(difficulty="easy", types="row").sample(0, 0).items[0].questions[-1]
    letters = Counter(phrase(question, "choice", rng)[1] for _ in range(600))
    assert max(letters.values()) / 600 < 0.4


# -- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer([*Thorax().texts(), *Scene().texts()], vocab_size=1500)


def test_tokenizer_round_trip(tokenizer):
    world = Scene(size=48)
    samples = [item.caption for i in range(20) for item in world.sample(1, i).items]
    samples += ["", "plain", " leading", "two  blanks ", "line\n\nbreaks", "ünïcödé ☃ 日本", words.SYSTEM]
    for text in samples:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_has_llamas_conventions(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1
    assert tokenizer.eos_token_id == 2
    ids = tokenizer("USER: <image>\nIs there a nodule?</s>USER:").input_ids
    expected = "<s> ▁USER : ▁ <image> ▁ NEWLINE Is ▁there ▁a ▁nodule ? </s> ▁USER :".replace("NEWLINE", "\n")
    assert tokenizer.convert_ids_to_tokens(ids) == re.split(" ", expected)


def test_prompts_take_one_token_per_word(tokenizer):
    for world in (Thorax(size=16), Scene()):
        questions = [q for i in range(60) for q in world.sample(0, i).items[0].questions if q.type != "box"]
        for question in questions:
            prompt = f"{words.SYSTEM} USER: {question.text}\n{words.SHORT} ASSISTANT: {question.answer}"
            pieces = re.findall(r"\w+|[^\w\s]|\n", prompt)
            assert len(tokenizer(prompt, add_special_tokens=False).input_ids) <= len(pieces)


def test_tokenizer_is_deterministic_and_survives_saving(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    again = tiny_tokenizer([*Thorax().texts(), *Scene().texts()], vocab_size=1500)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = f"{words.SYSTEM} USER: <image>\nWhat colour is the disc? ASSISTANT: Red</s>"
    assert loaded(text).input_ids == tokenizer(text).input_ids


def test_tokenizer_refuses_a_tiny_vocabulary():
    with pytest.raises(UserError, match="vocab_size"):
        tiny_tokenizer(["a"], vocab_size=50)


# -- procedure --------------------------------------------------------------------------------------------------------


def test_phases_follow_their_order_and_segments_fill_the_clip():
    world, names = Procedure(size=24, frames=9), list(PHASES)
    seen = Counter()
    for index in range(60):
        case = world.sample(3, index)
        segments = case.facts["segments"]
        places = [names.index(segment["phase"]) for segment in segments]
        assert places == list(range(places[0], places[0] + len(places)))
        assert segments[0]["start"] == 0
        assert segments[-1]["end"] == 9 / case.facts["fps"]
        assert all(one["end"] == other["start"] for one, other in itertools.pairwise(segments))
        assert all(tuple(segment["triplets"][0]) in PHASES[segment["phase"]] for segment in segments)
        assert case.items[1].media[0].shape == (9, 24, 24, 3)
        seen[len(segments)] += 1
    assert set(seen) == {1, 2}
    assert len(Procedure(segments=7, frames=14).sample(0, 0).facts["segments"]) == 7


def test_what_an_instrument_does_shows_in_its_motion():
    def path(verb, target=(0.5, 0.5)):
        return np.array(
            [tip_of(Action("grasper", verb, "gallbladder", "left"), target, t) for t in np.linspace(0, 1, 9)]
        )

    retract, grasp, pack, dissect = (path(verb) for verb in ("retract", "grasp", "pack", "dissect"))
    assert retract[-1, 1] < retract[0, 1] - 0.15  # to the side that it comes from
    assert grasp[-1, 1] > grasp[0, 1] + 0.15
    assert abs(pack[-1, 0] - pack[0, 0]) > 0.15
    assert np.ptp(dissect[:, 0]) > 0.12
    assert np.allclose(path("clip"), 0.5)
    still = {verb: frame_of(verb, 0.5) for verb in ("irrigate", "aspirate")}
    assert not np.array_equal(still["irrigate"], still["aspirate"])


def frame_of(verb, time, instrument="irrigator", target="fluid"):
    view = Field({"liver": (0.3, 0.3), "gallbladder": (0.3, 0.7), target: (0.65, 0.6)})
    return endoscope.frame(view, [Action(instrument, verb, target, "left")], time, 48, np.random.default_rng(0))


def test_effects_grow_and_the_border_is_black():
    pools = [(frame_of("aspirate", time)[..., 0] < 180).sum() for time in (0.0, 1.0)]
    assert pools[0] > pools[1] + 20
    clips = [(frame_of("clip", t, "clipper", "cystic duct").min(-1) > 225).sum() for t in (0.0, 1.0)]
    assert clips[1] > clips[0] + 2
    assert not frame_of("aspirate", 0.5)[0, 0].any()
    assert set(METAL) == set(INSTRUMENTS)
