"""Dialogues about operations: annotations with their own rates, exact questions, a teacher and what it may say."""

from __future__ import annotations

import json
import re

import pytest
from fake_api import Failure, FakeAPI

from llavakit.data.preparation import prepare
from llavakit.data.records import read_record
from llavakit.errors import RecordError, UserError
from llavakit.phantom.write import write_world
from llavakit.systems.surgical_llava.annotations import cholec80, merged, read_operations
from llavakit.systems.surgical_llava.clips import Vocabulary, cut_clips, questions
from llavakit.systems.surgical_llava.dialogues import parse_pairs

SECONDS = 60
PHASES = ["Preparation"] * 20 + ["CalotTriangleDissection"] * 40
TOOLS = ("Grasper", "Bipolar", "Hook", "Scissors", "Clipper", "Irrigator", "SpecimenBag")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def stop(error):
    raise error


def write_cholec80(folder, name="video01", rate=25, phases=PHASES):
    """A minute of an operation: phases with `rate` rows per second, tools once a second."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{row * 25 // rate}\t{phases[row // rate]}" for row in range(rate * len(phases))]
    (folder / f"{name}-phase.txt").write_text("\n".join(["Frame\tPhase", *rows]) + "\n")
    cells = [f"{25 * second}\t1\t0\t{int(second >= 20)}\t0\t0\t0\t0" for second in range(SECONDS)]
    (folder / f"{name}-tool.txt").write_text("\n".join(["\t".join(["Frame", *TOOLS]), *cells]) + "\n")
    return folder


def cholect50(annotations, **fields):
    names = {
        "instrument": {"0": "grasper", "1": "bipolar", "2": "hook"},
        "verb": {"0": "grasp", "1": "retract", "2": "dissect", "9": "null_verb"},
        "target": {"0": "gallbladder", "2": "cystic_duct", "14": "null_target"},
        "phase": {"0": "preparation", "1": "carlot-triangle-dissection"},
    }
    return {"video": 1, "fps": 1, "categories": names, "annotations": annotations, **fields}


def label(tool, verb, target, phase):
    return [0, tool, 1, 0, 0, 0, 0, verb, target, 1, 0, 0, 0, 0, phase]


# Annotations


@pytest.mark.parametrize("rate", [25, 1])
def test_a_label_is_looked_up_by_time_whatever_the_rate_of_its_file(tmp_path, rate):
    folder = write_cholec80(tmp_path, rate=rate)
    operation = cholec80(folder / "video01-phase.txt", folder / "video01-tool.txt")
    assert [(span.start, span.end, span.phase, span.tools) for span in operation.spans] == [
        (0, 20, "preparation", ("grasper",)),
        (20, 60, "calot triangle dissection", ("grasper", "hook")),
    ]
    alone = cholec80(folder / "video01-phase.txt", None)
    assert [(span.start, span.end) for span in alone.spans] == [(0, 20), (20, 60)]


def test_a_file_whose_length_fits_neither_rate_is_refused(tmp_path):
    folder = write_cholec80(tmp_path)
    file = folder / "video01-phase.txt"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:800]))
    problem = r"video01-phase\.txt:2: \(rows\): has 799 rows for 60 s of video; about 1,500 rows \(25 per second\) or"
    with pytest.raises(RecordError, match=problem):
        list(read_operations(folder, stop))
    other = write_cholec80(tmp_path / "other", "video02")
    left = []
    good = list(read_operations(tmp_path, left.append))
    assert [operation.name for operation in good] == ["video02"]
    assert len(left) == 1
    rows = [f"{10 * row}\tPreparation" for row in range(30)]
    (other / "video03-phase.txt").write_text("\n".join(["Frame\tPhase", *rows]))
    with pytest.raises(RecordError, match="rows are 10 frames apart"):
        cholec80(other / "video03-phase.txt", None)


@pytest.mark.parametrize(
    ("name", "line", "text", "problem"),
    [
        ("phase", 3, "x\tPreparation", r"phase\.txt:3: Frame: must be the number of a frame, not 'x'"),
        (
            "phase",
            3,
            "1 Preparation",
            r"phase\.txt:3: \(line\): is '1 Preparation', it should hold a frame number",
        ),
        ("phase", 3, "0\tPreparation", r"phase\.txt:3: Frame: 0 does not follow 0"),
        ("phase", 2, "0\tLunch", r"phase\.txt:2: Phase: 'Lunch' is no phase of Cholec80"),
        ("phase", 1, "Phase", r"phase\.txt:1: \(header\)"),
        ("tool", 3, "25\t1\t0\t2\t0\t0\t0\t0", r"tool\.txt:3: hook: must be 0 or 1, not '2'"),
        ("tool", 1, "Frame\tSpoon", r"tool\.txt:2: \(line\)"),
    ],
)
def test_lines_that_do_not_parse_are_named(tmp_path, name, line, text, problem):
    folder = write_cholec80(tmp_path)
    file = folder / f"video01-{name}.txt"
    lines = file.read_text().split("\n")
    lines[line - 1] = text
    file.write_text("\n".join(lines))
    with pytest.raises(RecordError, match=problem):
        list(read_operations(folder, stop))


def test_triplets_of_cholect50_lose_their_nulls(tmp_path):
    first = [label(2, 2, 2, 1), label(0, 9, 14, 1)]
    labels = {"0": first, "1": first, "2": [label(-1, -1, -1, 0)], "10": [label(0, 1, 0, 1.0)]}
    (tmp_path / "VID01.json").write_text(json.dumps(cholect50(labels)))
    (operation,) = read_operations(tmp_path, stop)
    spans = [(s.start, s.end, s.phase, s.triplets, s.tools) for s in operation.spans]
    phase = "carlot triangle dissection"
    assert spans == [
        (0, 2, phase, (("hook", "dissect", "cystic duct"),), ("hook", "grasper")),
        (2, 3, "preparation", (), ()),
        (10, 11, phase, (("grasper", "retract", "gallbladder"),), ("grasper",)),
    ]
    for labels, problem in (
        ({"a": []}, r"VID01\.json:1: annotations\.a: must be the number of a frame"),
        ({"0": [[1, 2]]}, r"annotations\.0\.0: must be a list of 15 numbers"),
        ({"0": [label(7, 0, 0, 0)]}, r"annotations\.0\.0\.1: 7 is no instrument"),
        ({}, "annotations: holds no frame"),
    ):
        (tmp_path / "VID01.json").write_text(json.dumps(cholect50(labels)))
        with pytest.raises(RecordError, match=problem):
            list(read_operations(tmp_path, stop))


@pytest.mark.parametrize(
    ("segments", "problem"),
    [
        ([], r"segments: must be a list"),
        ([{"start": 0, "end": 0, "phase": "a"}], r"segments\.0\.start: the segment from 0 s to 0 s"),
        ([{"start": 0, "end": 2}, {"start": 1, "end": 3}], r"segments\.1\.start: the segment from 1 s to 3 s"),
        ([{"start": 0, "end": "2"}], r"segments\.0\.end: must be a number of seconds"),
        ([{"start": 0, "end": 2, "triplets": [["hook", "cut"]]}], r"segments\.0\.triplets: must be a list of"),
    ],
)
def test_broken_segments_are_named(tmp_path, segments, problem):
    file = tmp_path / "operations.jsonl"
    good = {"id": "a", "segments": [{"start": 0, "end": 2, "phase": "Preparation"}]}
    file.write_text(json.dumps(good) + "\n" + json.dumps({"id": "b", "segments": segments}) + "\n")
    with pytest.raises(RecordError, match=rf"operations\.jsonl:2: {problem}"):
        list(read_operations(file, stop))
    found = prepare("surgical_dialogues", file, tmp_path / "out.jsonl", on_bad_record="skip")
    assert (found["operations"], len(found["left_out"])) == (1, 1)


# Clips and exact questions


def test_clips_stay_inside_phases_and_tell_the_truth(tmp_path):
    folder = write_cholec80(tmp_path)
    (operation,) = read_operations(folder, stop)
    clips = list(cut_clips(operation, 15, 1))
    assert [(clip.id, clip.start, clip.end) for clip in clips] == [
        ("video01_0000", 0, 10),
        ("video01_0010", 10, 20),
        ("video01_0020", 20, 33.333),
        ("video01_0033.333", 33.333, 46.667),
        ("video01_0046.667", 46.667, 60),
    ]
    assert [(clip.phase, clip.before, clip.after) for clip in clips[1:3]] == [
        ("preparation", "", "calot triangle dissection"),
        ("calot triangle dissection", "preparation", ""),
    ]
    assert clips[0].caption == "from 0 s to 10 s: preparation; grasper present"
    assert dict(questions(clips[2])) == {
        "Which phase of the operation is shown?": "The phase is calot triangle dissection.",
        "Which instruments are present?": "The grasper and the hook are present.",
        "How many instruments are present?": "Two instruments are present.",
        "Which phase came before?": "The phase before was preparation.",
    }
    assert next(cut_clips(operation, 40, 30)).start == 20


def test_exact_answers_hold_nothing_but_the_facts(tmp_path):
    write_world("procedure", tmp_path / "world", n=12, seed=0, size=24, frames=8)
    vocabulary = Vocabulary()
    count = 0
    for operation in read_operations(tmp_path / "world" / "cases.jsonl", stop):
        for clip in cut_clips(operation, 40, 0.5):
            facts = vocabulary(json.dumps(clip.facts))
            for question, answer in questions(clip):
                count += 1
                assert vocabulary(f"{question} {answer}") <= facts
            assert questions(clip) == questions(clip)
    assert count > 40
    assert merged(operation.spans) == operation.spans


def test_labels_are_found_in_other_forms():
    found = Vocabulary(["robot arm"])
    assert found("Two graspers, one clipping the cystic-duct during Gallbladder_Dissection") == {
        *("grasper", "clip", "cystic duct", "gallbladder dissection"),
    }
    assert found("The clipper was coagulating; scissors cut, robot arms irrigated.") == {
        *("clipper", "coagulate", "scissors", "cut", "robot arm", "irrigate"),
    }
    assert found("a clipboard, the shortcut, grass") == set()


def test_records_train_on_the_stretch_of_their_clip(tmp_path):
    write_world("procedure", tmp_path / "world", n=4, seed=0, size=24, frames=8)
    source, output = tmp_path / "world" / "cases.jsonl", tmp_path / "dialogues.jsonl"
    found = prepare("surgical_dialogues", source, output, shortest=0.5)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert found["operations"] == 4
    assert found["records"] == found["clips"] == len(lines) >= 4
    part = lines[0]["messages"][0]["content"][0]
    assert (part["type"], part["start"]) == ("video", 0.0)
    assert lines[0]["provenance"]["kind"] == "template"
    assert lines[0]["provenance"]["annotations"] == ["cases.jsonl"]
    record = read_record(lines[0], str(output), 1, media_root=tmp_path / "world")
    assert record.messages[0]["content"][0]["end"] == part["end"]
    again = tmp_path / "again.jsonl"
    prepare("surgical_dialogues", source, again, shortest=0.5)
    assert again.read_text() == output.read_text()


# The teacher


def test_replies_are_read_as_python_or_json():
    pairs = [("a?", "it's b"), ("c", "d")]
    assert parse_pairs("""Sure: [{'Q': 'a?', 'A': "it's b"}, {'Q': 'c', 'A': 'd'}]""") == pairs
    assert parse_pairs('```json\n[{"Q": "a?", "A": "it\'s b"}, {"Q": "c", "A": "d"}]\n```', 2) == pairs
    for reply in ("no", "[]", "[1]", "[{'Q': 'a'}]", "[{'Q': 'a', 'A': ''}]", "[{'Q': 'a', 'A': 1}]", "[open('x')]"):
        assert parse_pairs(reply) is None
    assert parse_pairs("[{'Q': 'a', 'A': 'b'}]", 2) is None


def teacher(body):
    """Writes what it is asked for; one clip gets a word that is not true of it, another nothing that can be read."""
    text = body["messages"][-1]["content"]
    told = re.search(r"from 0 s to \S+ s: (.*)", text)[1]
    if "Rephrase" in text:
        pairs = eval(text.split("Questions and answers:\n")[1].split("\n\n")[0])
        pairs[0]["A"] = "It is something else."  # loses the phase
        return repr(pairs)
    if "summary" in text:
        lies = "The bipolar coagulates the liver." if "preparation" in told else f"In short: {told}."
        return repr([{"Q": f"Summary {n}?", "A": lies if n == 0 else told} for n in range(3)])
    return "I would rather not."


def test_a_teacher_writes_and_is_checked(tmp_path):
    source, output = write_cholec80(tmp_path / "cholec80"), tmp_path / "out.jsonl"
    kinds = "template,paraphrase,summary,description"
    with FakeAPI(teacher) as server:
        options = {"teacher": f"{server.url}#m", "kinds": kinds}
        found = prepare("surgical_dialogues", source, output, **options)
        asked = len(server.bodies)
        assert prepare("surgical_dialogues", source, output, **options) == found
        assert len(server.bodies) == asked  # everything is kept
    assert (found["clips"], found["unreadable"], found["failed_calls"]) == (2, 2, 0)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert found["records"] == len(lines) == 6
    assert [line["provenance"]["kind"] for line in lines] == ["template", "paraphrase", "summary"] * 2
    exact, rephrased, summary = lines[:3]
    assert len(rephrased["messages"]) == len(exact["messages"]) - 2  # the pair that lost its phase
    assert len(summary["messages"]) == 4  # without the one that lies
    assert len(lines[5]["messages"]) == 6
    assert found["dropped"] == 3
    assert rephrased["id"] == "video01_0000_paraphrase"
    assert (rephrased["provenance"]["teacher"], rephrased["provenance"]["instructions"]) == ("m", 1)
    assert exact["provenance"]["caption"] == "from 0 s to 20 s: preparation; grasper present"


def test_failed_calls_are_counted_and_asked_again(tmp_path):
    source, output = write_cholec80(tmp_path / "cholec80"), tmp_path / "out.jsonl"
    broken = {"now": True}

    def reply(body):
        if broken["now"] and "calot" in body["messages"][-1]["content"]:
            return Failure(400)
        return teacher(body)

    with FakeAPI(reply) as server:
        options = {"teacher": f"{server.url}#m", "kinds": "summary"}
        first = prepare("surgical_dialogues", source, output, **options)
        assert (first["failed_calls"], first["records"]) == (1, 1)
        broken["now"] = False
        asked = len(server.bodies)
        second = prepare("surgical_dialogues", source, output, **options)
        assert (second["failed_calls"], second["records"]) == (0, 2)
        assert len(server.bodies) == asked + 1


def test_what_cannot_be_made_is_said_at_once(tmp_path):
    source, output = write_cholec80(tmp_path / "cholec80"), tmp_path / "out.jsonl"
    for options, problem in (
        ({"kinds": "summary"}, "only a teacher writes these"),
        ({"kinds": "poem"}, "'poem' is unknown; known: template, paraphrase"),
        ({"clip": 0}, "must be positive seconds"),
    ):
        with pytest.raises(UserError, match=problem):
            prepare("surgical_dialogues", source, output, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no annotations"):
        prepare("surgical_dialogues", tmp_path / "empty", output)
    (source / "video01-phase.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"no operation could be read: .*video01-phase\.txt:1: \(header\)"):
        prepare("surgical_dialogues", source, output, on_bad_record="skip")
    assert not output.exists()
