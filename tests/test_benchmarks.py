"""Scores of benchmarks where the obvious reading of an answer or file is not the only one."""

import base64
import inspect
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import Benchmark
from llavakit.evaluation.benchmarks.video_qa import parse_judgement
from llavakit.evaluation.processors import option_letter
from llavakit.evaluation.score import benchmark, score
from llavakit.registry import BENCHMARKS

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path, texts, **more):
    return write(path, [{"question_id": name, "text": text, **more} for name, text in texts.items()])


# Letters


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[("**B**", "B"), ("(b)", "B"), ("Ｂ", "B"), ("（Ｂ）", "B"), ("Ｂ．猫", "B"), ("`B`", "B"), ("[B]", "B")],
        *[("b", "B"), ("b) cat", "B"), ("B\nBecause", "B"), ("B because of it", "B"), ("$\\boxed{B}$", "B")],
        *[("The answer is **B**.", "B"), ("The correct option is (b).", "B"), ("Answer:\nB", "B"), ("答案是B。", "B")],
        *[("选B", "B"), ("The choice is B, since", "B"), ("A.", "A"), ("A, because", "A"), ("A", "A"), ("“A”", "A")],
        *[("A dog is running", None), ("A", "A"), ("a dog", None), ("The answer is a dog", None), ("A-frame", None)],
        *[("The answer is A dog", None), ("I think so", None), ("Both", None), ("E", None), ("", None), ("D'oh", None)],
    ],
)
def test_letters_are_read_as_people_read_them(text, letter):
    assert option_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[("dog", "A"), ("A dog", "A"), ("Dog.", "A"), ("A dog is running", "A"), ("cat", "B"), ("It is a cat.", "B")],
        *[("A bird", "C"), ("a red apple", "D"), ("The answer is A bird", "C"), ("The dog and a cat", None)],
        *[("B", "B"), ("an apple", None), ("A", "A"), ("The answer is a cat", "B")],
    ],
)
def test_the_text_of_an_option_is_its_letter(text, letter):
    assert option_letter(text, "ABCD", ["dog", "a cat", "A bird", "red apple"]) == letter


# MMBench


def table(path, rows, image=""):
    columns = ("index", "question", "A", "B", "C", "D", "answer", "category", "image")
    lines = ["\t".join(columns), *("\t".join(str(row.get(name, "")) for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


ROWS = [
    {"index": 7, "question": "What?", "A": "cat", "B": "dog", "answer": "B", "category": "k1"},
    {"index": 8, "question": "Where?", "A": "n", "B": "s", "C": "e", "D": "w", "answer": "D", "category": "k2"},
]


def rounds(index, *texts):
    letters = "ABCD"[:2] if index == 7 else "ABCD"
    return [
        {
            "question_id": index,
            "text": text,
            "round_id": number,
            "option_char": [*letters[number:], *letters[:number]],
        }
        for number, text in enumerate(texts)
    ]


def test_incomplete_circular_questions_are_not_right(tmp_path):
    gold = table(tmp_path / "dev.tsv", ROWS)
    whole = write(tmp_path / "whole.jsonl", [*rounds(7, "B", "A"), *rounds(8, "D", "C", "B", "A")])
    found = score("mmbench", whole, gold)["metrics"]
    assert (found["accuracy"], found["circular_accuracy"], found["circular_count"]) == (100.0, 100.0, 2)
    part = write(tmp_path / "part.jsonl", [*rounds(7, "B", "A"), *rounds(8, "D", "C")])
    with pytest.raises(RecordError, match=r"index: '8' has predictions of 2 of its 4 rounds; finish the run"):
        score("mmbench", part, gold)
    found = score("mmbench", part, gold, missing="wrong")["metrics"]
    assert (found["circular_accuracy"], found["circular_count"]) == (50.0, 2)
    assert found["accuracy"] == pytest.approx(100 * 4 / 6)
    none = write(tmp_path / "none.jsonl", rounds(7, "B", "A"))
    found = score("mmbench", none, gold, missing="wrong")["metrics"]
    assert (found["circular_accuracy"], found["count"]) == (50.0, 6)


def test_single_rounds_need_no_others(tmp_path):
    gold = table(tmp_path / "dev.tsv", ROWS)
    found = score("mmbench", answers(tmp_path / "p.jsonl", {7: "A dog", 8: "(d)"}), gold)["metrics"]
    assert found["accuracy"] == 100.0
    assert "circular_accuracy" not in found


def test_a_round_that_was_answered_twice_is_an_error(tmp_path):
    gold = table(tmp_path / "dev.tsv", ROWS)
    twice = write(tmp_path / "p.jsonl", [*rounds(7, "B"), *rounds(7, "A")])
    with pytest.raises(RecordError, match=r"p.jsonl:2: question_id: '7', round 0, was used in line 1 already"):
        score("mmbench", twice, gold)


def test_rotated_copies_in_the_table_are_rounds_of_one_question(tmp_path):
    copies = [ROWS[0], ROWS[0] | {"index": 1000007, "A": "dog", "B": "cat", "answer": "A"}]
    gold = table(tmp_path / "dev.tsv", copies)
    found = score("mmbench", answers(tmp_path / "p.jsonl", {7: "B", 1000007: "B"}), gold)["metrics"]
    assert (found["accuracy"], found["circular_accuracy"]) == (50.0, 0.0)
    alone = answers(tmp_path / "alone.jsonl", {7: "B"})
    assert score("mmbench", alone, gold, missing="wrong")["metrics"]["circular_accuracy"] == 0.0


def test_text_of_a_rotated_option_is_read_by_its_round(tmp_path):
    image = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(image, "PNG")
    data = base64.b64encode(image.getvalue()).decode()
    gold = table(tmp_path / "dev.tsv", [row | {"image": data} for row in ROWS])
    asked = benchmark("mmbench").questions(gold, all_rounds=True)
    right = {7: "dog", 8: "w"}
    rows = [{"question_id": q.question_id, "text": f"It is {right[q.question_id]}.", **q.stored} for q in asked]
    assert score("mmbench", write(tmp_path / "p.jsonl", rows), gold)["metrics"]["circular_accuracy"] == 100.0


# Numbers and spaces


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        *[(3.0, "3", True), (3, "3.0", True), (3.0, "3.", True), (3, "Three", False), (0.5, "0.50", True)],
        *[("3.0", "3", False), ("3", "3", True), (3.0, "4", False), (10, "1e1", True), (3, "nan", False)],
    ],
)
def test_a_gold_number_is_compared_as_a_number(tmp_path, answer, text, right):
    gold = write(tmp_path / "g.jsonl", [{"question_id": 1, "text": "?", "answer": answer}])
    found = score("exact_match", answers(tmp_path / "p.jsonl", {1: text}), gold)["metrics"]
    assert found["correct"] == int(right)


def test_numbers_in_lists_of_answers(tmp_path):
    gold = write(tmp_path / "g.jsonl", [{"question_id": 1, "text": "?", "answers": ["many", 2.0]}])
    predictions = answers(tmp_path / "p.jsonl", {1: "2"})
    for task, name in (("exact_match", "accuracy"), ("anls", "anls"), ("relaxed_accuracy", "relaxed_accuracy")):
        assert score(task, predictions, gold)["metrics"][name] == 100.0
    for broken in ([], [True], [None]):
        bad = write(tmp_path / "b.jsonl", [{"question_id": 1, "text": "?", "answers": broken}])
        with pytest.raises(RecordError, match="answers: must be a non-empty list of texts or numbers"):
            score("exact_match", predictions, bad)


def test_anls_takes_runs_of_spaces_for_one(tmp_path):
    gold = write(tmp_path / "g.jsonl", [{"question_id": 1, "text": "?", "answer": "new  york\tcity"}])
    predictions = answers(tmp_path / "p.jsonl", {1: " New York \n City"})
    assert score("anls", predictions, gold)["metrics"]["anls"] == 100.0
    assert score("anls", predictions, gold, collapse=False)["metrics"]["anls"] < 100.0


def test_options_of_scores_are_checked(tmp_path):
    gold = write(tmp_path / "g.jsonl", [{"question_id": 1, "text": "?", "answer": "x"}])
    predictions = answers(tmp_path / "p.jsonl", {1: "x"})
    with pytest.raises(UserError, match="anls: option threshold='much': Input should be a valid number"):
        score("anls", predictions, gold, threshold="much")
    assert score("anls", predictions, gold, threshold="0.9")["metrics"]["anls"] == 100.0
    with pytest.raises(UserError, match="scienceqa: option split=5"):
        score("scienceqa", predictions, gold, split=5)
    with pytest.raises(UserError, match=r"is not problems\.json, so it has no split 'val'"):
        score("scienceqa", predictions, gold, split="val")
    prompts = write(tmp_path / "q.jsonl", [{"question_id": 1, "image": "a.png", "text": "Q?\nReference OCR token: x"}])
    with pytest.raises(UserError, match="hold their hints already"):
        benchmark("textvqa").questions(prompts, ocr=False)


# Benchmarks about videos and boxes


def test_options_in_brackets(tmp_path):
    rows = [
        {"video": "a.mp4", "question": "What?", "candidates": ["run", "sit"], "answer": "sit", "task_type": "Action"},
        {"video": "b.mp4", "question": "How many?", "candidates": [1, 2], "answer": 1, "task_type": "Action"},
        {"video": "c.mp4", "question": "Where?", "candidates": ["in", "out"], "answer": "in", "task_type": "Place"},
    ]
    file = tmp_path / "mv.json"
    file.write_text(json.dumps(rows))
    asked = benchmark("mvbench").questions(file, tmp_path / "videos")
    assert [question.question_id for question in asked] == ["1", "2", "3"]
    assert asked[0].media[0] == {"type": "video", "video": str(tmp_path / "videos" / "a.mp4")}
    assert asked[0].text.startswith("Question: What?\nOptions:\n(A) run\n(B) sit")
    found = score("mvbench", answers(tmp_path / "p.jsonl", {1: "(B) sit", 2: "A) one", 3: "out"}), file)["metrics"]
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert (found["average"], found["by_task"]) == (50.0, {"Action": 100.0, "Place": 0.0})
    file.write_text(json.dumps([rows[0] | {"answer": "jump"}]))
    with pytest.raises(RecordError, match=r"mv\.json:1: answer: must be one of the candidates"):
        score("mlvu", answers(tmp_path / "p.jsonl", {1: "B"}), file)


def test_the_first_letter_counts_in_egoschema(tmp_path):
    gold = write(tmp_path / "g.jsonl", [{"question_id": n, "text": "?", "answer": a} for n, a in enumerate((1, "C"))])
    found = score("egoschema", answers(tmp_path / "p.jsonl", {0: "it is B or A", 1: "none"}), gold)["metrics"]
    assert found == {"accuracy": 50.0, "count": 2}
    bad = write(tmp_path / "b.jsonl", [{"question_id": 0, "text": "?", "answer": 7}])
    with pytest.raises(RecordError, match="answer: must be one of A, B, C, D, E, or an index"):
        score("egoschema", answers(tmp_path / "p.jsonl", {0: "A"}), bad)


def test_boxes_of_referring_expressions(tmp_path):
    row = {"text": "The nodule", "image": "a.png", "bbox": [10, 10, 20, 20], "image_size": [100, 50]}
    gold = write(tmp_path / "g.jsonl", [{"question_id": n, **row} for n in range(3)])
    texts = {0: "{<10><20><30><60>}", 1: "{<10><20><20><60>}", 2: "here"}
    found = score("referring", answers(tmp_path / "p.jsonl", texts), gold)["metrics"]
    assert found["mean_iou"] == pytest.approx(100 * (1 + 11 / 21) / 3)
    assert found["accuracy_at_0.5"] == pytest.approx(200 / 3)
    half = write(tmp_path / "h.jsonl", [{"question_id": 0, **row, "bbox": [0, 0, 9, 9], "image_size": [100, 100]}])
    found = score("referring", answers(tmp_path / "p.jsonl", {0: "{<0><0><9><4>}"}), half)["metrics"]
    assert found == {"mean_iou": 50.0, "accuracy_at_0.5": 0.0, "count": 1}  # exactly half is too little
    bad = write(tmp_path / "b.jsonl", [{"question_id": 0, **row, "bbox": [1, 2, 3]}])
    with pytest.raises(RecordError, match="bbox: must be 4 numbers"):
        score("referring", answers(tmp_path / "p.jsonl", {0: texts[0]}), bad)


def test_ct_rate_reads_the_bracketed_option(tmp_path):
    rows = [{"question_id": n, "text": "?", "answer": a} for n, a in enumerate(("(b) lung", "(a) heart", "No finding"))]
    gold = write(tmp_path / "g.jsonl", rows)
    found = score("ct_rate", answers(tmp_path / "p.jsonl", {0: "It is (b).", 1: "(c)", 2: "x"}), gold)["metrics"]
    assert found == {"accuracy": 50.0, "count": 2}


@pytest.mark.parametrize(
    ("reply", "judgement"),
    [
        ("{'pred': 'yes', 'score': 4}", {"pred": "yes", "score": 4}),
        ('Sure: {"pred": "no", "score": 1.8}.', {"pred": "no", "score": 1.8}),
        ("{'pred': 'yes'}", None),
        ("{pred: yes}", None),
        ("yes, 4", None),
        ("{" * 9000, None),
    ],
)
def test_judgements_are_read_and_never_evaluated(reply, judgement):
    assert parse_judgement(reply) == judgement


def test_video_answers_are_judged(tmp_path):
    gold = write(
        tmp_path / "g.jsonl",
        [{"question_id": n, "video": f"{n}.mp4", "text": f"Q{n}?", "answer": f"A{n}"} for n in range(3)],
    )
    predictions = answers(tmp_path / "p.jsonl", {0: "right", 1: "wrong", 2: "odd"})

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            reply = "?" if "odd" in asked else str({"pred": "yes" if "right" in asked else "no", "score": 4.8})
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        found = score("video_qa", predictions, gold, judge="m", base_url=url)["metrics"]
    finally:
        server.shutdown()
        server.server_close()
    assert found.pop("judge")["failed_calls"] == found.pop("failed_calls") == 0
    assert found == {"accuracy": 50.0, "score": pytest.approx(8 / 3), "yes": 1, "no": 1, "count": 3, "unreadable": 1}
    with pytest.raises(UserError, match="holds answers, not judgements; give judge"):
        score("video_qa", predictions, gold)
    judged = write(tmp_path / "j.jsonl", [{"question_id": n, "pred": "yes", "score": 5} for n in range(3)])
    assert score("video_qa", judged, gold)["metrics"]["score"] == 5.0


# What every benchmark keeps to


@pytest.mark.parametrize("task", sorted(BENCHMARKS))
def test_every_benchmark_is_documented_and_knows_its_options(task):
    chosen = benchmark(task)
    assert isinstance(chosen, Benchmark)
    assert chosen.title
    assert chosen.max_new_tokens > 0
    assert type(chosen).__doc__
    with pytest.raises(UserError, match=rf"{task}: unknown option 'mssing'"):
        score(task, "p", "g", mssing="wrong")
    assert "extra" in inspect.signature(chosen.score).parameters
