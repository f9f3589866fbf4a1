"""Report error-checking: golden figures, the generator's properties, the pipeline, the benchmark, the responder."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from llavakit.cli import app as cli
from llavakit.conversation.turns import TextDelta
from llavakit.errors import FieldError, RecordError, UserError
from llavakit.evaluation.run import evaluate
from llavakit.evaluation.score import score
from llavakit.generation.responder import Responder
from llavakit.proof.golden import find_cases, run_case
from llavakit.synthesis.run import synthesize
from llavakit.system import get_system
from llavakit.systems.report_error_checking import answers
from llavakit.systems.report_error_checking.damage import damage, donor_sentences, in_case_of
from llavakit.systems.report_error_checking.donors import BLOCK, DonorIndex, DonorWriter
from llavakit.systems.report_error_checking.edits import apply, revert
from llavakit.systems.report_error_checking.pipeline import ReportErrors
from llavakit.systems.report_error_checking.reading import read
from llavakit.systems.report_error_checking.responder import DraftChecker
from llavakit.systems.report_error_checking.tables import Tables
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

GOLDEN = Path(__file__).parent / "golden" / "report-error-checking"
QUIET = Console(quiet=True)
TABLES = Tables()
NORMAL = ("Lungs are clear.", "The heart is normal in size.", "No pneumothorax is seen.", "Bones are intact.")
NAMES = ("pleural effusion", "consolidation", "edema", "nodule", "opacity", "pneumonia", "fracture", "atelectasis")


def corpus(count, seed=0, splits=("train", "test")):
    """Made-up reports, two of every subject."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        sentences = draw.sample(NORMAL, draw.randint(1, 3))
        for name in draw.sample(NAMES, draw.randint(0, 3)):
            size, side = draw.choice(("small", "moderate", "large")), draw.choice(("left", "right"))
            sentences.append(f"There is a {size} {side} {name} {draw.choice(('today', 'again', 'now'))}.")
        draw.shuffle(sentences)
        subject = number // 2
        rows.append(
            {
                "report_id": f"r{number:04d}",
                "subject_id": f"p{subject}",
                "split": splits[subject % len(splits)],
                "image": f"{number}.png",
                "findings": f" {'  '.join(sentences)}\n",
            }
        )
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


# Edits


@st.composite
def edited(draw):
    text = draw(st.text(max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    spans = [span for n, span in enumerate(spans) if not n or span[0] > spans[n - 1][1]]
    edits = [{"start": a, "end": b, "original": text[a:b], "replacement": draw(st.text(max_size=5))} for a, b in spans]
    return text, draw(st.permutations(edits))


@given(edited())
@settings(max_examples=200, deadline=None)
def test_edits_are_taken_back_byte_for_byte(case):
    text, edits = case
    modified = apply(text, edits)
    expected = text
    for edit in sorted(edits, key=lambda one: -one["start"]):
        expected = expected[: edit["start"]] + edit["replacement"] + expected[edit["end"] :]
    assert modified == expected
    assert revert(modified, edits) == text


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        ([{"start": 0, "end": 2, "original": "ab", "replacement": ""}] * 2, "overlaps"),
        ([{"start": 1, "end": 9, "original": "bc", "replacement": ""}], "outside the text of 3"),
        ([{"start": 1, "end": 2, "original": "x", "replacement": ""}], "the text there is 'b', not 'x'"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edits, problem):
    with pytest.raises(FieldError, match=problem):
        apply("abc", edits)


def test_taking_back_other_edits_is_refused():
    with pytest.raises(FieldError, match="is not in the text there"):
        revert("abc", [{"start": 0, "end": 1, "original": "x", "replacement": "z"}])


# Reading


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("No edema or effusion but a nodule.", {"edema": "negative", "effusion": "negative", "nodule": "positive"}),
        ("Without fracture; possible pneumonia", {"fracture": "negative", "pneumonia": "uncertain"}),
        ("PLEURAL EFFUSIONS suggests edema", {"effusion": "positive", "edema": "uncertain"}),
        ("Nodules and nodular change", {"nodule": "positive"}),
        ("noduleſ", {"nodule": "positive"}),
        ("", {}),
    ],
)
def test_findings_and_their_polarity(text, found):
    assert {entity.label: entity.polarity for entity in read(text, TABLES).entities} == found


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Seen by (Dr. Who. Next", ["Seen by (Dr. Who.", "Next"]),
        ("Clear?! 2 nodules... then more", ["Clear?!", "2 nodules... then more"]),
        ("a. b. C.", ["a. b.", "C."]),
        ("  \n ", []),
        ("vs.", ["vs."]),
    ],
)
def test_sentences(text, sentences):
    report = read(text, TABLES)
    assert [report.sentence(number) for number in range(len(report.sentences))] == sentences


# Damage


def damaged(text, seed, donors=(), tables=TABLES, first=None):
    return damage(read(text, tables), "r", seed, donors, tables, first)


@pytest.mark.parametrize(
    ("text", "written", "replacement"),
    [
        ("There is an upper nodule.", "an upper", "a lower"),
        ("AN UPPER NODULE.", "AN UPPER", "A LOWER"),
        ("An apical opacity.", "An apical", "A basal"),
        ("Left nodule.", "Left", "Right"),
        ("LEFT nodule.", "LEFT", "RIGHT"),
        ("A consolidation.", "A consolidation", "An edema"),
    ],
)
def test_a_substitution_keeps_the_case_and_mends_the_article(text, written, replacement):
    edits = [damaged(text, seed, first=2).edits[0] for seed in range(12)]
    assert (written, replacement) in {(edit["original"], edit["replacement"]) for edit in edits}


def test_both_sides_are_not_exchanged_and_a_finding_that_is_there_is_not_put_in():
    assert damaged("Bilateral effusions, left more.", 1, first=2).label is None
    assert damaged("A pneumonia. Some atelectasis.", 1, first=2).label == "remove"
    assert in_case_of("X", "left") == "Left"


@pytest.fixture(scope="module")
def synthesised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    rows = corpus(1200)
    source = write(folder / "reports.jsonl", rows)
    synthesize("report_errors", source, folder / "checks.jsonl", options={"repeated": "keep"})
    return {row["report_id"]: row for row in rows}, lines(folder / "checks.jsonl")


def test_what_an_operation_does_to_labels_and_sentences(synthesised):
    reports, records = synthesised
    changes = {"insert": 1, "remove": -1, "substitute": 0}
    seen = Counter()
    for record in records:
        provenance = record.get("provenance")
        if provenance is None or record["level"] == "complex":
            continue
        original = read(reports[record["report_id"]]["findings"], TABLES)
        (edit,) = provenance["edits"]
        text = record["conversations"][0]["value"].split("\n\n")[1].rpartition("\nY. ")[0]
        assert text == apply(original.text, [edit]) != original.text
        assert revert(text, [edit]) == original.text
        after = read(text, TABLES)
        assert len(after.sentences) - len(original.sentences) == changes[edit["op"]]
        lost, gained = (set(provenance[f"labels_{name}"]) for name in ("lost", "gained"))
        seen[edit["op"], edit["subtype"]] += 1
        if edit["op"] == "insert":
            donor = reports[edit["source"]["report_id"]]
            assert gained
            assert not lost
            assert donor["subject_id"] != record["subject_id"]
            assert donor["split"] == record["split"]
            assert edit["replacement"].strip() == read(donor["findings"], TABLES).sentence(edit["source"]["sentence"])
        elif edit["op"] == "remove":
            assert lost
            assert not gained
        else:
            both = (map(one.sentence, range(len(one.sentences))) for one in (original, after))
            assert sum(a != b for a, b in zip(*both, strict=True)) == 1
            assert bool(gained) == (edit["subtype"] == "finding")
        assert "  " not in text
        assert " ." not in text
    assert {op for op, _ in seen} == set(changes)


def test_half_is_damaged_in_equal_shares_and_controls_are_untouched(synthesised):
    reports, records = synthesised
    simple = [record for record in records if record["level"] == "simple"]
    assert len(simple) == len(reports)
    for split in ("train", "test"):
        said = Counter(record["conversations"][1]["value"] for record in simple if record["split"] == split)
        assert said["Y"] == said.total() // 2
    types = Counter(record["conversations"][1]["value"] for record in records if record["level"] == "complex")
    assert all(abs(types[letter] / types.total() - 1 / 3) < 0.02 for letter in "ABC")
    for record in simple:
        if record["conversations"][1]["value"] == "N":
            assert "provenance" not in record
            assert read(reports[record["report_id"]]["findings"], TABLES).text in record["conversations"][0]["value"]


def test_the_order_of_the_corpus_and_processes_change_nothing(tmp_path):
    rows = corpus(300)
    outputs = []
    for name, own, processes in (("a", rows, 1), ("b", rows[::-1], 1), ("c", rows, 2)):
        out = tmp_path / f"{name}.out.jsonl"
        synthesize("report_errors", write(tmp_path / f"{name}.jsonl", own), out, processes=processes)
        outputs.append(out)
    assert outputs[0].read_bytes() == outputs[2].read_bytes()
    first, second = (sorted(map(json.dumps, lines(out))) for out in outputs[:2])
    assert first == second


def test_the_split_of_a_subject_options_and_repeated_reports(tmp_path):
    rows = [{**row, "split": None} for row in corpus(200)]
    rows.append({**rows[0], "report_id": "again", "subject_id": "other"})
    source = write(tmp_path / "reports.jsonl", rows)
    options = {"splits": "train=0.7,test=0.3"}
    found = synthesize("report_errors", source, tmp_path / "all.jsonl", options=options)
    records = lines(tmp_path / "all.jsonl")
    splits = {
        record["subject_id"]: {r["split"] for r in records if r["subject_id"] == record["subject_id"]}
        for record in records
    }
    assert all(len(own) == 1 for own in splits.values())
    assert found["refused"] >= 1
    reasons = {entry["reason"] for entry in lines(tmp_path / "all.refused.jsonl")}
    assert reasons == {"another report has the same text; repeated=keep keeps it"}
    synthesize("report_errors", source, tmp_path / "test.jsonl", options={**options, "only": "test", "level": "simple"})
    chosen = [r for r in records if r["split"] == "test" and r["level"] == "simple"]
    assert lines(tmp_path / "test.jsonl") == chosen
    synthesize("report_errors", source, tmp_path / "twins.jsonl", options={**options, "twins": True, "level": "simple"})
    twins = Counter(record["report_id"] for record in lines(tmp_path / "twins.jsonl"))
    assert set(twins.values()) == {1, 2}


def test_reports_that_cannot_be_damaged_say_so(tmp_path):
    rows = [
        {"report_id": f"r{n}", "subject_id": f"p{n}", "split": "train", "image": "a.png", "findings": text}
        for n, text in enumerate(["Normal.", "Clear.", "  "])
    ]
    found = synthesize("report_errors", write(tmp_path / "r.jsonl", rows), tmp_path / "o.jsonl")
    assert found["refused"] == 1
    assert lines(tmp_path / "o.refused.jsonl")[0] == {
        "line": 3, "id": "r2", "outcome": "refused", "reason": "the report has no findings",
    }  # fmt: skip
    assert [record["unusable"] for record in lines(tmp_path / "o.jsonl")] == ["no operation has a candidate"] * 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"report_id": None}, "reports.jsonl:1: report_id: is missing"),
        ({"report_id": "r0001"}, "records 1 and 2 have the same report_id"),
        ({"subject_id": "p1"}, "records 1 and 3 are of one subject in two splits"),
        ({"findings": 3}, "findings: must be a text"),
        ({"findings": None}, "findings: is missing"),
        ({"image": ""}, "image: must be the name of the picture"),
        ({"split": None}, "split: is missing; name it, or give splits="),
    ],
)
def test_broken_reports_are_named(tmp_path, change, problem):
    rows = corpus(6)
    source = write(tmp_path / "reports.jsonl", [rows[0] | change, *rows[1:]])
    with pytest.raises(UserError, match=problem):
        synthesize("report_errors", source, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"level": "hard"}, {"seed": "x"}, {"share": 2}, {"splits": "train=0.5"}, {"splits": "train"},
        {"repeated": "drop"}, {"twins": "often"}, {"seeds": 3},
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(tmp_path, capsys, options):
    given = [f"{name}={value}" for name, value in options.items()]
    source = write(tmp_path / "reports.jsonl", corpus(4))
    assert cli.run(["synthesize", "report_errors", str(source), str(tmp_path / "o.jsonl"), *given]) == 2
    assert "report_errors" in capsys.readouterr().err


def test_tables_of_a_file(tmp_path):
    file = tmp_path / "tables.json"
    file.write_text(json.dumps({"lexicon": {"clip": ["clip"]}, "substitutions": {"laterality": {"left": "right"}}}))
    made = ReportErrors(tables=str(file))
    assert [entity.label for entity in read("A clip, no edema.", made.tables).entities] == ["clip"]
    assert made.tables.digest != TABLES.digest == Tables().digest
    for wrong, problem in (
        ({"lexicon": {"a": "b"}}, "lexicon: must be"),
        ({"words": {}}, "'words' is no table"),
        ({"negation": "("}, "negation: is no regular expression"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=problem):
            ReportErrors(tables=str(file))


def test_donors_are_those_of_a_list(tmp_path):
    """The index against every sentence listed and filtered."""
    rows, sentences = corpus(3 * BLOCK, seed=5), []
    writer = DonorWriter(tmp_path)
    for number, row in enumerate(rows):
        report = read(row["findings"], TABLES)
        own = [(place, report.sentence(place), labels) for place, labels in donor_sentences(report, TABLES)]
        sentences += [
            (row["split"], row["report_id"], place, text, row["subject_id"], labels) for place, text, labels in own
        ]
        writer.add(number, row["split"], row["subject_id"], row["report_id"], own)
    writer.close()
    index = DonorIndex(tmp_path)
    sentences.sort(key=lambda one: one[:3])
    for row in rows[:: len(rows) // 40]:
        asserted = read(row["findings"], TABLES).asserted
        wanted = [
            (report, place, text)
            for split, report, place, text, subject, labels in sentences
            if split == row["split"] and subject != row["subject_id"] and not labels <= asserted
        ]
        found = index.for_host(row["split"], row["subject_id"], asserted)
        assert len(found) == len(wanted)
        for number in {0, 1, len(wanted) // 2, len(wanted) - 1}:
            donor = found[number]
            assert (donor.report_id, donor.sentence, donor.text) == wanted[number]
        with pytest.raises(IndexError):
            found[len(wanted)]
    assert len(index.for_host("nowhere", "p", frozenset())) == 0


# Answers


@given(st.text(max_size=12))
def test_reading_an_answer_is_total(text):
    assert answers.simple_answer(text) in ("Y", "N", None)
    assert answers.complex_answer(text) in (*answers.TYPES, None)


def test_votes_are_ordered_and_symmetric():
    for votes in itertools.product(("Y", "N", None), repeat=3):
        found = {rule: answers.vote(votes, rule) for rule in ("all", "majority", "any")}
        assert all(answers.vote(own) == found["majority"] for own in itertools.permutations(votes))
        yes = [found[rule] == "Y" for rule in ("all", "majority", "any")]
        assert yes == sorted(yes)
        assert (found["any"] is None) == (set(votes) == {None})
    assert answers.vote(["N"]) == "N"
    assert answers.mean_vote([0.5, None]) == "Y"
    assert answers.mean_vote([None]) is None
    assert answers.type_vote(["remove", None, "insert", "insert", "remove"]) == "remove"


def test_precision_by_prevalence_and_metrics_of_nothing():
    assert answers.precision_at(0.01, 0.9, 0.9) == pytest.approx(0.009 / (0.009 + 0.099))
    assert answers.simple_metrics([], [])["accuracy"] == answers.complex_metrics([], [])["macro_f1"] == 0.0


# Evaluation


class Reader(Responder):
    """Says that there is a mistake if the picture is bright or the draft says so."""

    def __init__(self, dull=False):
        super().__init__(name="reader")
        self.dull, self.seen = dull, []

    def run(self, call):
        content = call.messages[-1]["content"]
        text = content[-1]["text"]
        self.seen.append(text)
        if "among A, B and C" in text:
            yield TextDelta(text="C. substitute")
            return
        source = content[0]["image"]
        from llavakit.media.image import load_image

        bright = load_image(source).getpixel((0, 0))[0] > 99
        yield TextDelta(text="hm" if self.dull else "Y" if bright else "No, it is fine")


@pytest.fixture
def questions(tmp_path):
    """Eight drafts; pictures of damaged ones are bright."""
    rows = []
    for number in range(8):
        wrong = number % 2
        Image.new("RGB", (6, 4), (200, 0, 0) if wrong else (50, 0, 0)).save(tmp_path / f"{number}.png")
        kinds = [("simple", "Please? \n\nx\n", "Y" if wrong else "N")]
        kinds += [("type", "Please choose the most suitable one among A, B and C", "C" if number < 4 else "A")] * wrong
        for level, prompt, answer in kinds:
            turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
            rows.append(
                {
                    "id": f"d{number}_{level}",
                    "image": f"{number}.png",
                    "subject_id": f"p{number}",
                    "conversations": turns,
                }
            )
    return write(tmp_path / "questions.jsonl", rows)


def test_a_run_is_always_beside_blank_and_swapped_pictures(questions, tmp_path):
    reader = Reader()
    found = evaluate(reader, "report-errors", questions, tmp_path / "p.jsonl", console=QUIET)["metrics"]
    assert len(reader.seen) == 3 * 12
    assert not any("<image>" in text for text in reader.seen)
    assert found["simple"]["own"]["accuracy"] == 100
    assert found["simple"]["blank"]["accuracy"] == 50
    assert found["simple_counts"]["blank"] == {"tp": 0, "tn": 4, "fp": 0, "fn": 4, "unparsed": 0}
    assert found["simple"]["swapped"]["accuracy"] < 100
    assert found["mcnemar"]["blank"] == {"only_first": 4, "only_second": 0, "p": 0.125}
    assert found["complex"]["own"]["accuracy"] == 50
    assert found["complex_confusion"]["insert"]["substitute"] == 2
    assert found["simple_precision_where_mistakes_are"]["own"] == {"1 %": 100.0, "5 %": 100.0, "50 %": 100.0}
    kept = [line for line in lines(tmp_path / "p.jsonl") if line["pictures"] == "own"]
    write(tmp_path / "short.jsonl", kept)
    with pytest.raises(RecordError, match=r"has no prediction in .*blank and swapped pictures are asked about too"):
        score("report-errors", tmp_path / "short.jsonl", questions)


def test_ensembles_readers_and_other_systems(questions, tmp_path):
    names = [f"{name}.jsonl" for name in "abc"]
    for name, reader in zip(names, (Reader(), Reader(dull=True), Reader()), strict=True):
        evaluate(reader, "report-errors", questions, tmp_path / name, model_id=name, console=QUIET)
    files = [str(tmp_path / name) for name in names]
    found = score(
        "report-errors", files[0], questions, members=",".join(files[1:]), against=files[1], reader=files[1],
        write=str(tmp_path / "votes.jsonl"),
    )["metrics"]  # fmt: skip
    assert (found["members"], found["rule"]) == (3, "majority")
    assert found["simple"]["own"]["accuracy"] == 100
    assert found["rescue"] == {"reader_wrong": 10, "rescued": 8, "rate": 80.0}
    assert found["mcnemar"]["against"]["only_first"] == 8
    again = score("report-errors", tmp_path / "votes.jsonl", questions)["metrics"]
    assert again["simple"] == found["simple"]
    strict = score("report-errors", files[0], questions, members=files[1:], rule="all")["metrics"]
    assert strict["simple"]["own"]["recall"] == 0
    with pytest.raises(RecordError, match="ask with by=likelihood"):
        score("report-errors", files[0], questions, rule="mean")
    with pytest.raises(UserError, match="must be majority or any"):
        score("report-errors", files[0], questions, rule="most")


def test_the_mean_of_probabilities(tmp_path):
    gold = write(tmp_path / "g.jsonl", [{"question_id": n, "answer": answer} for n, answer in enumerate("YN")])
    for name, values in (("a", (-1.0, -3.0)), ("b", (-2.0, -2.5))):
        rows = [
            {"question_id": n, "text": "?", "likelihoods": [{"sum": v}, {"sum": -2.0}]} for n, v in enumerate(values)
        ]
        write(tmp_path / f"{name}.jsonl", rows)
    found = score("report-errors", tmp_path / "a.jsonl", gold, members=[str(tmp_path / "b.jsonl")], rule="mean")
    assert found["metrics"]["simple"]["own"]["accuracy"] == 100


def test_a_draft_is_checked_in_a_conversation(tmp_path):
    Image.new("RGB", (6, 4), (200, 0, 0)).save(tmp_path / "a.png")
    content = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "Clear lungs."}]
    checker = DraftChecker(Reader(), members=[Reader(), Reader(dull=True)])
    reply = checker.chat([{"role": "user", "content": content}])
    assert reply == (
        "Y. There is a mistake: a statement was changed into a wrong one (substitute). (2 of 3 members see a mistake; "
        "rule majority.)"
    )
    content[-1] = {"type": "text", "text": "Please choose the most suitable one between Y and N"}
    assert checker.chat([{"role": "user", "content": content}]) == "Y"
    assert DraftChecker(Reader(dull=True)).chat([{"role": "user", "content": content}]) == "hm"


def test_the_recipe_builds_at_full_size():
    recipe = load_recipe(get_system("report-error-checking").recipe)
    model = build_meta(recipe).model
    assert sum(parameter.numel() for parameter in model.multi_modal_projector.parameters()) == 20_979_712


def test_texts_of_the_miniature_tell_nothing():
    from llavakit.systems.report_error_checking import miniature

    found = miniature.drafts(3000, np.random.default_rng(0))
    reports = found.reports.reshape(-1, miniature.MOST, 5)
    counts = (reports[..., 4] > 0).sum(-1)
    kinds = found.complex.clamp(min=0)
    for kind in (0, 2, 3, 4):
        shares = np.bincount(counts[kinds == kind], minlength=4)[1:] / int((kinds == kind).sum())
        assert abs(shares - 1 / 3).max() < 0.06  # as many sentences in all classes
    cells = (reports[..., 2] - miniature.SIDE) + 2 * (reports[..., 3] - miniature.HEIGHT)
    assert all(len(set(row[:n].tolist())) == n for row, n in zip(cells, counts, strict=True))
    filled = (found.pictures.max(-1).values > 0.6).sum(1)
    assert torch.equal(filled, counts - (kinds == 2).int() + (kinds == 3).int())


def test_the_miniature_measures_every_arm():
    from llavakit.systems.report_error_checking.miniature import one_seed

    found = one_seed(0, steps=2, items=40)
    assert {"own", "blank", "swapped", "text", "members", "ensemble", "right substitute"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values())
