"""Evaluation: published metrics, file formats, judges and resumable runs."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_api import FakeAPI
from PIL import Image
from rich.console import Console
from tiny_server import small_chat

from llavakit.conversation.turns import ReasoningDelta, TextDelta
from llavakit.errors import MediaError, RecordError, UserError
from llavakit.evaluation import processors
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.metrics import answers as metrics
from llavakit.evaluation.metrics import text as text_metrics
from llavakit.evaluation.reviews import parse_pair
from llavakit.evaluation.run import evaluate
from llavakit.evaluation.score import benchmark, print_result, score
from llavakit.generation.identity import identity_of
from llavakit.generation.responder import Responder
from llavakit.proof.golden import Case, run_case
from llavakit.registry import BENCHMARKS, TEXT_METRICS
from llavakit.systems.llava_1_5.parity_eval import ADAPTERS

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

GOLDEN = Path(__file__).parent / "golden"


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answers(path, texts, **more):
    return lines(path, [{"question_id": name, "text": text, **more} for name, text in texts.items()])


def golden(case):
    return (json.loads((GOLDEN / case / f"{name}.json").read_text()) for name in ("inputs", "outputs"))


# Golden figures


@pytest.mark.parametrize(
    "name",
    [
        "eval-conversions",
        "eval-llavabench",
        "eval-pope",
        "eval-scienceqa",
        "eval-seed",
        "eval-textvqa",
        "eval-textvqa-prompt",
        "mmbench-prompt",
    ],
)
def test_llava_1_5_goldens(name):
    path = GOLDEN / "llava-1.5" / name
    report = run_case(path, adapter=ADAPTERS[Case.read(path).component])
    assert report.status == "passed", report.reason


@pytest.mark.parametrize(("case", "texts"), [("llava-mini/pope", "texts"), ("llava-uhd/metric_pope", "answers")])
def test_pope_of_other_systems(case, texts):
    inputs, outputs = golden(case)
    parsed = [processors.pope_answer(text) for text in inputs[texts]]
    assert parsed == outputs.get("answers", parsed)
    found = metrics.binary_metrics(parsed, inputs["labels"])
    names = {"TP": "tp", "FP": "fp", "TN": "tn", "FN": "fn", "Accuracy": "accuracy", "Precision": "precision"}
    names |= {"Recall": "recall", "F1 score": "f1", "Yes ratio": "yes_ratio"}
    assert {name: found[ours] for name, ours in names.items()} == pytest.approx({n: outputs[n] for n in names})


def test_textvqa_of_llava_uhd():
    inputs, outputs = golden("llava-uhd/metric_textvqa")
    assert [processors.vqa_answer(text) for text in inputs["strings"]] == outputs["normalised"]
    values = [metrics.vqa_accuracy(row["pred_answer"], row["gt_answers"]) for row in inputs["pred_list"]]
    assert metrics.mean(values) == pytest.approx(outputs["accuracy"], abs=1e-9)


def test_multiple_choice_of_llava_mini():
    inputs, outputs = golden("llava-mini/mc_metrics")
    for row in outputs["check_ans"]:
        assert metrics.bracket_choice_match(row["pred"], row["gt"]) is row["correct"]
    for row in outputs["first_char_as_answer"]:
        assert processors.first_letter(row["res"], processors.LETTERS[: row["n"]], "A") == row["letter"]
    for row in outputs["egoschema_first_char"]:
        letter = processors.first_letter(row["res"], "ABCDE")
        assert (processors.LETTERS.index(letter) if letter else -1) == row["index"]
    for row, wanted in zip(inputs["qa"], outputs["qa_template"], strict=True):
        asked = processors.bracket_question(row["question"], row["candidates"], row["answer"])
        assert asked == (wanted["question"], wanted["answer"])


def test_video_judge_of_llava_mini():
    inputs, outputs = golden("llava-mini/video_judge")
    found = metrics.judged_answers(inputs["judgements"])
    wanted = {"yes": "Yes count", "no": "No count", "accuracy": "Accuracy", "score": "Average score"}
    assert found == {ours: pytest.approx(outputs[theirs]) for ours, theirs in wanted.items()}
    # A judgement without a readable score stays in the score's denominator only.
    unreadable = [*inputs["judgements"], {"pred": "yes", "score": "much"}, {}]
    assert metrics.judged_answers(unreadable) == {"yes": 2, "no": 2, "accuracy": 0.5, "score": pytest.approx(12 / 6)}


def test_text_metrics_of_medm_vl():
    pairs, outputs = golden("medm-vl/unimed_text_metrics")
    normal = [[processors.medical_answer(text) for text in pair] for pair in pairs]
    assert normal == outputs["normalized"]
    assert [metrics.token_scores(*pair)["f1"] for pair in normal] == pytest.approx(outputs["f1_norm"])
    assert [metrics.token_scores(*pair)["f1"] for pair in pairs] == pytest.approx(outputs["f1_no_norm"])
    assert metrics.mean(a == b for a, b in normal) == outputs["equal_accuracy"]
    assert metrics.mean(b in a for a, b in normal) == outputs["containment_accuracy"]

    def bleu(pairs, **options):
        return metrics.mean(text_metrics.sentence_bleu(a.split(), [b.split()], **options) for a, b in pairs)

    one = {"weights": (1, 0, 0, 0)}
    assert bleu(pairs, **one) == pytest.approx(outputs["bleu1"]["nltk_no_norm"], abs=1e-12)
    assert bleu(normal, **one) == pytest.approx(outputs["bleu1"]["nltk_norm"], abs=1e-12)
    assert bleu(normal, **one, epsilon=0.1) == pytest.approx(outputs["bleu1"]["nltk_sm_norm"], abs=1e-12)
    assert bleu(normal, epsilon=0.1) == pytest.approx(outputs["bleu4_smoothed_norm"], abs=1e-12)


def test_choices_and_boxes_of_medm_vl():
    inputs, outputs = golden("medm-vl/ctrate_choice")
    found = []
    for row, text in zip(inputs["answers"], inputs["predictions"], strict=True):
        choice = metrics.choice_in_reply(text, row["answer"])
        if choice is not None:
            found.append({"id": row["id"], "answer": choice[0], "predict": text, "correct": choice[1]})
    assert found == outputs["per_item"]

    inputs, outputs = golden("medm-vl/refer_iou")
    assert [metrics.box_iou(*boxes, inclusive=True) for boxes in inputs["box_pairs"]] == pytest.approx(outputs["iou"])
    values = []
    for row in inputs["refer"]:
        x, y, w, h = row["bbox_xywh"]
        box = processors.percent_box(row["prediction"], row["image_size"])
        values.append(metrics.box_iou(box, (x, y, x + w, y + h), inclusive=True) if box else 0.0)
    assert values == pytest.approx(outputs["refer_iou"])


def test_caption_and_report_metrics():
    inputs, outputs = golden("kg-llava/nlg_metrics")
    hypotheses = [text.split(" ") for text in inputs["hypotheses"]]
    references = [[text.split(" ") for text in texts] for texts in inputs["references"]]
    corpus, single = text_metrics.coco_bleu(hypotheses, references)
    assert corpus == pytest.approx(outputs["bleu"], abs=1e-12)
    for ours, theirs in zip(single, outputs["bleu_per_sample"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    rouge = [text_metrics.rouge_l_of_sentence(a, b) for a, b in zip(hypotheses, references, strict=True)]
    assert rouge == pytest.approx(outputs["rouge_l_per_sample"])
    mean, each = text_metrics.cider(hypotheses, references)
    assert [mean, *each] == pytest.approx([outputs["cider"], *outputs["cider_per_sample"]])
    short, long = ["a"], ["a", "b", "c"]  # unigrams alone know no length
    assert text_metrics.cider([short, ["d"]], [[long], [["d"]]], order=1)[1][0] == pytest.approx(10 / 3**0.5)

    inputs, outputs = golden("llava-rad/eval-rouge-bleu")
    texts, references = inputs["predictions"], [[text] for text in inputs["references"]]
    for name in ("rougeL", "rouge1", "rouge2"):
        wanted = [values[name][2] for values in outputs["per_item"]]
        found = TEXT_METRICS.get(f"google_rouge_{name[5:].lower()}")(texts, references)
        assert found.each == pytest.approx(wanted)
    for order in (1, 4):
        found = TEXT_METRICS.get(f"sacrebleu_{order}")(texts, references).value
        assert 100 * found == pytest.approx(outputs[f"BLEU-{order}"]["median"], abs=1e-6)


def test_medical_overlap_of_llava_med():
    inputs, outputs = golden("llava-med/eval-vqa")
    assert [processors.medical_answer(text) for text in inputs["strings"]] == outputs["normalize_word"]
    for pair, wanted in zip(inputs["pairs"], outputs["pairs"], strict=True):
        found = metrics.token_scores(*map(processors.medical_answer, pair))
        assert found == pytest.approx({name: wanted[name] for name in found})


def test_mme_of_mg_llava():
    inputs, outputs = golden("mg-llava/metrics")
    rows = inputs["mme"]
    answer = rows.get("answer", rows.get("label"))
    found = metrics.mme_scores(zip(rows["category"], rows["image_path"], rows["prediction"], answer, strict=True))
    assert found["perception"] == pytest.approx(outputs["mme"]["perception"])
    assert found["cognition"] == pytest.approx(outputs["mme"]["reasoning"])


# Answer processors


def test_only_32_full_stops_are_removed():
    assert processors.vqa_answer("a." * 32 + "b") == "a" * 32 + "b"
    assert processors.vqa_answer("x. " * 40).count(".") == 8


def test_letters():
    assert processors.scienceqa_letter("AB", "ABCDE") is None
    assert processors.scienceqa_letter("", "ABCDE") is None
    assert processors.scienceqa_letter("The answer is A. The answer is B.") is None
    reads = {"B": "B", "b": "B", "(C)": "C", "D. dog": "D", "The answer is A": "A", "Answer: (B)": "B", "Apple": None}
    assert {text: processors.option_letter(text) for text in reads} == reads


def test_anls_and_relaxed_match_at_their_edges():
    assert metrics.anls("", [""]) == 1.0
    assert metrics.anls("abcd", ["abxy"]) == 0.5
    assert metrics.anls("abcd", ["axyz"]) == 0.0
    assert metrics.relaxed_match("104", "100")
    assert metrics.relaxed_match("12%", "0.12")
    assert not metrics.relaxed_match("106", "100")
    assert metrics.relaxed_match("Yes", "yes")


def test_rates_without_a_positive_prediction_are_zero():
    found = metrics.binary_metrics(["no", "no"], ["yes", "no"])
    assert (found["precision"], found["recall"], found["f1"], found["accuracy"]) == (0.0, 0.0, 0.0, 0.5)


# Scores of predictions files

SCIENCE = [
    {"question_id": "4", "answer": "B", "has_image": False},
    {"question_id": "5", "answer": 0, "has_image": True},
    {"question_id": "6", "answer": "C", "has_image": True},
    {"question_id": "7", "answer": "A", "has_image": False},
]


def test_scienceqa(tmp_path):
    gold = lines(tmp_path / "gold.jsonl", SCIENCE)
    texts = {4: "LECTURE: ...\nThe answer is B.", 5: "A. because", 6: "D", 7: "The answer is A. The answer is B."}
    result = score("scienceqa", answers(tmp_path / "p.jsonl", texts), gold)
    assert result["task"] == "scienceqa"
    assert result["metrics"] == {
        "accuracy": 50.0,
        "correct": 2,
        "count": 4,
        "image_accuracy": 50.0,
        "image_correct": 1,
        "image_count": 2,
    }
    assert result["n"] == 4
    assert result["intervals"]["accuracy"] == pytest.approx([15.0039, 84.9961], abs=1e-4)


def test_scienceqa_from_the_published_problems(tmp_path):
    problem = {"question": "Q?", "choices": ["x", "y"], "hint": "h", "answer": 1, "image": None, "split": "test"}
    problems = {"1": problem, "2": {**problem, "image": "image.png"}, "3": {**problem, "split": "train"}}
    gold = tmp_path / "problems.json"
    gold.write_text(json.dumps(problems))
    predictions = answers(tmp_path / "p.jsonl", {"1": "B", "2": "A"})
    metrics_ = score("scienceqa", predictions, gold)["metrics"]
    assert (metrics_["count"], metrics_["accuracy"], metrics_["image_accuracy"]) == (2, 50.0, 0.0)
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["2"]}))
    assert score("scienceqa", predictions, gold, extra="ignore")["metrics"]["count"] == 1
    asked = benchmark("scienceqa").questions(gold)
    assert [q.question_id for q in asked] == ["2"]
    letter = "Answer with the option's letter from the given choices directly."
    assert asked[0].messages()[0]["content"] == [
        {"type": "image", "image": str(tmp_path / "2" / "image.png")},
        {"type": "text", "text": f"Context: h\nQ?\nA. x\nB. y\n{letter}"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "p.jsonl:2: (line): is not JSON"),
        ('["list"]', "p.jsonl:2: (line): must be an object, is a list"),
        ({"text": "A"}, "p.jsonl:2: question_id: is missing"),
        ({"question_id": "5"}, "p.jsonl:2: text: is missing"),
        ({"question_id": "5", "text": 3}, "p.jsonl:2: text: must be a string, is an integer"),
        ({"question_id": True, "text": "A"}, "p.jsonl:2: question_id: must be"),
        ({"question_id": "4", "text": "A"}, "p.jsonl:2: question_id: '4' was used in line 1 already"),
        ({"question_id": "99", "text": "A"}, "gold.jsonl:2: question_id: '5' has no prediction (1 of 4 lack one)"),
    ],
)
def test_a_broken_prediction_is_one_clear_error(tmp_path, row, message):
    gold = lines(tmp_path / "gold.jsonl", SCIENCE)
    good = [{"question_id": name, "text": "A"} for name in ("4", "6", "7")]
    if "has no prediction" not in message:
        good.pop()  # what is wrong with a line comes before what is missing
    predictions = lines(tmp_path / "p.jsonl", [good[0], row, *good[1:]])
    with pytest.raises(RecordError) as caught:
        score("scienceqa", predictions, gold)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_surplus_predictions_can_be_allowed(tmp_path):
    gold = lines(tmp_path / "gold.jsonl", SCIENCE)
    few = answers(tmp_path / "few.jsonl", {4: "B", 5: "A"})
    assert score("scienceqa", few, gold, missing="wrong")["metrics"]["accuracy"] == 50.0
    more = answers(tmp_path / "more.jsonl", {4: "B", 5: "A", 6: "C", 7: "A", 8: "A"})
    with pytest.raises(RecordError, match=r"more.jsonl:5: question_id: '8' is not in the gold file"):
        score("scienceqa", more, gold)
    assert score("scienceqa", more, gold, extra="ignore")["metrics"]["accuracy"] == 100.0
    with pytest.raises(UserError, match="missing=perhaps: must be error or wrong"):
        score("scienceqa", few, gold, missing="perhaps")


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'scienceqa'"):
        score("sciencqa", "p", "g")
    with pytest.raises(UserError, match="did you mean 'missing'"):
        score("scienceqa", "p", "g", mising="wrong")
    with pytest.raises(UserError, match=r"p\.jsonl: cannot be read: No such file"):
        score("scienceqa", tmp_path / "p.jsonl", lines(tmp_path / "g.jsonl", SCIENCE))


def test_pope_by_category(tmp_path):
    rows = [
        {"question_id": 1, "label": "yes", "category": "random"},
        {"question_id": 2, "label": "no", "category": "random"},
        {"question_id": 3, "label": "yes", "category": "popular"},
    ]
    gold = lines(tmp_path / "gold.json", rows)
    found = score("pope", answers(tmp_path / "p.jsonl", {1: "Yes, a dog.", 2: "Yes", 3: "No"}), gold)["metrics"]
    assert (found["tp"], found["fp"], found["fn"], found["tn"]) == (1, 1, 1, 0)
    assert found["accuracy"] == pytest.approx(100 / 3)
    assert found["by_category"]["random"]["f1"] == pytest.approx(200 / 3)
    assert found["mean_f1"] == pytest.approx(100 / 3)


def test_textvqa_by_prompt_and_by_id(tmp_path):
    ten = ["nokia"] * 8 + ["phone", "samsung"]
    rows = [
        {"question_id": 1, "image_id": "im", "question": "What Brand?", "answers": ten},
        {
            "question_id": 2,
            "image_id": "im",
            "question": "What?",
            "answers": ["a"] * 9 + ["phone"],
            "ocr_tokens": ["x"],
        },
    ]
    gold = tmp_path / "val.json"
    gold.write_text(json.dumps({"data": rows}))
    short = "Answer the question using a single word or phrase."
    predictions = lines(
        tmp_path / "p.jsonl",
        [
            {"question_id": "im", "prompt": f"What brand?\n{short}", "text": "Nokia."},
            {"question_id": "im", "prompt": f"What?\nReference OCR token: x\n{short}", "text": "phone"},
        ],
    )
    assert score("textvqa", predictions, gold)["metrics"] == {"accuracy": pytest.approx(65.0), "count": 2}
    by_id = answers(tmp_path / "q.jsonl", {1: "samsung", 2: "phone"})
    assert score("textvqa", by_id, gold)["metrics"]["accuracy"] == pytest.approx(30.0)
    asked = benchmark("textvqa").questions(gold)
    assert [q.text for q in asked] == [f"What Brand?\n{short}", f"What?\nReference OCR token: x\n{short}"]
    assert "OCR" not in benchmark("textvqa").questions(gold, ocr=False)[1].text


def test_vqav2_and_vizwiz(tmp_path):
    agreed = [{"answer": "yes"}] * 10
    split = [{"answer": text} for text in ["2"] * 2 + ["three"] * 8]
    gold = tmp_path / "annotations.json"
    entries = [
        {"question_id": 1, "answers": agreed, "answer_type": "yes/no"},
        {"question_id": 2, "answers": split, "answer_type": "number"},
    ]
    gold.write_text(json.dumps({"annotations": entries}))
    found = score("vqav2", answers(tmp_path / "p.jsonl", {1: "Yes.", 2: "two"}), gold)["metrics"]
    assert found["accuracy"] == pytest.approx(80.0)
    assert found["by_answer_type"] == {"yes/no": pytest.approx(100.0), "number": pytest.approx(60.0)}

    questions = tmp_path / "questions.json"
    asked = [{"image_id": 42, "question": "Q?", "question_id": n} for n in (1, 3)]
    questions.write_text(json.dumps({"questions": asked, "data_subtype": "test-dev2015"}))
    first = benchmark("vqav2").questions(questions, "images")[0]
    assert first.media[0]["image"] == str(Path("images") / "COCO_test2015_000000000042.jpg")
    upload = benchmark("vqav2").submission(tmp_path / "p.jsonl", tmp_path / "upload.json", questions)
    assert json.loads(upload.read_text()) == [{"question_id": 1, "answer": "yes"}, {"question_id": 3, "answer": ""}]

    wild = tmp_path / "val.json"
    wild.write_text(json.dumps([{"image": "a.jpg", "question": "Q?", "answers": agreed}]))
    predictions = answers(tmp_path / "w.jsonl", {"a.jpg": "yes"})
    assert score("vizwiz", predictions, wild)["metrics"] == {"accuracy": 100.0, "count": 1}
    assert "'Unanswerable'.\nAnswer the question" in benchmark("vizwiz").questions(wild)[0].text
    upload = benchmark("vizwiz").submission(predictions, tmp_path / "vizwiz.json", wild)
    assert json.loads(upload.read_text()) == [{"image": "a.jpg", "answer": "yes"}]
    with pytest.raises(RecordError, match="has no prediction"):
        benchmark("vizwiz").submission(answers(tmp_path / "x.jsonl", {"b.jpg": "no"}), tmp_path / "o.json", wild)


def test_gqa(tmp_path):
    gold = tmp_path / "gqa.json"
    kinds = {"1": ("yes", "verify"), "2": ("table", "query"), "3": ("red", "query")}
    gold.write_text(
        json.dumps(
            {
                name: {"question": "Q?", "imageId": "7", "answer": answer, "types": {"structural": kind}}
                for name, (answer, kind) in kinds.items()
            }
        )
    )
    predictions = answers(tmp_path / "p.jsonl", {1: "Yes.", 2: "The table", 3: "Red"})
    found = score("gqa", predictions, gold)["metrics"]
    assert found == {
        "accuracy": pytest.approx(200 / 3),
        "correct": 2,
        "count": 3,
        "binary": 100.0,
        "open": 50.0,
    }
    assert benchmark("gqa").questions(gold)[0].media[0]["image"] == str(tmp_path / "7.jpg")


def test_seed(tmp_path):
    gold = tmp_path / "SEED-Bench.json"
    question = {"question": "Q?", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d"}
    rows = [
        {**question, "question_id": "1", "question_type_id": 2, "data_type": "image", "data_id": "i", "answer": "A"},
        {**question, "question_id": "v2", "question_type_id": 1, "data_type": "video", "data_id": "v", "answer": "B"},
    ]
    gold.write_text(json.dumps({"question_type": {"Scene": 1, "Action": 2}, "questions": rows}))
    found = score("seed", answers(tmp_path / "p.jsonl", {1: "A", "v2": "B."}), gold)["metrics"]
    assert found == {
        "accuracy": 50.0,
        "image": 100.0,
        "video": 0.0,
        "count": 2,
        "by_type": {"Scene": 0.0, "Action": 100.0},
    }
    asked = benchmark("seed").questions(gold)
    assert asked[1].media[0]["image"].endswith("SEED-Bench-video-image/v2.png")
    assert asked[0].text.startswith("Q?\nA. a\nB. b\nC. c\nD. d\nAnswer with")


def test_mme_from_the_official_folder(tmp_path):
    folder = tmp_path / "MME"
    for task, image in (("count", "a"), ("count", "b"), ("OCR", "c")):
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / f"{image}.txt").write_text(
            f"Is it {image}?  Please answer yes or no.\tYes\nIs it x? Please answer yes or no.\tNo\n"
        )
    short = "Answer the question using a single word or phrase."
    rows = []
    for task, image, first, second in (
        ("count", "a", "Yes", "No"),
        ("count", "b", "Yes", "Yes"),
        ("OCR", "c", "?", "No"),
    ):
        for text, reply in ((f"Is it {image}?", first), ("Is it x?", second)):
            rows.append({"question_id": f"{task}/{image}.png", "prompt": f"{text}\n{short}", "text": reply})
    found = score("mme", lines(tmp_path / "p.jsonl", rows), folder)["metrics"]
    assert found["by_task"]["count"] == {"accuracy": 75.0, "accuracy_plus": 50.0, "score": 125.0}
    assert (found["perception"], found["cognition"], found["count"]) == (175.0, 0, 6)


def test_mmbench(tmp_path):
    image = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(image, "PNG")
    data = base64.b64encode(image.getvalue()).decode()
    table = tmp_path / "dev.tsv"
    table.write_text(
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
        f"7\tWhat?\tnan\tcat\tdog\t\t\tB\tk1\t{data}\n8\tWhere?\tRead.\tn\ts\te\tw\tD\tk2\t{data}\n"
    )
    asked = benchmark("mmbench").questions(table, all_rounds=True)
    assert len(asked) == 2 + 4
    assert Image.open(io.BytesIO(asked[0].media[0]["image"])).size == (32, 32)
    content = asked[0].messages()[0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]
    assert content[1]["text"].startswith("\nWhat?\nA. cat\nB. dog\nAnswer with")

    # Right in every round of question 7, wrong in one round of question 8.
    rows = []
    for question in asked:
        right = {7: "B", 8: "D"}[question.question_id]
        text = "ABCD"[question.stored["option_char"].index(right)]
        if question.question_id == 8 and question.stored["round_id"] == 2:
            text = "ABCD"[("ABCD".index(text) + 1) % 4]
        rows.append({"question_id": question.question_id, **question.stored, "text": text})
    predictions = lines(tmp_path / "p.jsonl", rows)
    found = score("mmbench", predictions, table)["metrics"]
    assert found["accuracy"] == pytest.approx(500 / 6)
    assert (found["circular_accuracy"], found["circular_count"]) == (50.0, 2)
    assert found["by_category"] == {"k1": 100.0, "k2": 75.0}
    upload = benchmark("mmbench").submission(predictions, tmp_path / "upload.tsv", table)
    header, first, _ = upload.read_text().splitlines()
    assert header.split("\t") == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert first.split("\t")[6] == "B"
    assert "请直接回答选项字母。" in benchmark("mmbench-cn").questions(table)[0].text


def test_exact_match_by_type(tmp_path):
    rows = [
        {"question_id": 1, "image": "a.png", "text": "How many?", "answer": 2, "type": "count"},
        {"question_id": 2, "image": "a.png", "text": "Colour?", "answers": ["red", "crimson"], "type": "colour"},
        {"question_id": 3, "text": "Colour?", "answer": "blue", "type": "colour"},
    ]
    gold = lines(tmp_path / "q.jsonl", rows)
    found = score("phantom", answers(tmp_path / "p.jsonl", {1: "2", 2: " Crimson.", 3: "red"}), gold)["metrics"]
    assert (found["correct"], found["count"]) == (2, 3)
    assert found["by_type"]["colour"] == {"accuracy": 50.0, "correct": 1, "count": 2}
    two = answers(tmp_path / "r.jsonl", {1: "two", 2: "red", 3: "blue"})
    assert score("exact_match", two, gold, process="vqa")["metrics"]["accuracy"] == 100.0
    assert score("anls", two, gold)["metrics"]["by_type"] == {"count": 0.0, "colour": 100.0}
    assert score("relaxed_accuracy", answers(tmp_path / "s.jsonl", {1: "2.05", 2: "red", 3: "x"}), gold)["metrics"][
        "relaxed_accuracy"
    ] == pytest.approx(200 / 3)


def test_results_are_printed_as_tables_and_json(tmp_path, capsys):
    gold = lines(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?", "answer": "a", "type": "t"}])
    result = score("exact_match", answers(tmp_path / "p.jsonl", {1: "a"}), gold)
    print_result(result)
    assert "by_type" in capsys.readouterr().out
    print_result(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == result


def test_every_benchmark_loads_and_has_a_title():
    for name in BENCHMARKS:
        assert benchmark(name).title


# Judges


def ask(text):
    return [{"role": "user", "content": text}]


def test_judge_caches_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    cache = tmp_path / "judge.jsonl"
    questions = [ask(f"q{n}") for n in range(12)]
    with FakeAPI(lambda body: body["messages"][0]["content"].upper()) as server:
        options = {"api_key_env": "JUDGE_KEY", "cache": cache}
        with Judge("m", server.url, **options) as judge:
            assert judge.ask_all(questions) == [f"Q{n}" for n in range(12)]
        path, headers, body = server.bodies[0]
        assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.2, 1024)
        assert len(server.bodies) == 12
        # Killed while it wrote the last reply: only that one is asked again.
        text = cache.read_text()
        cache.write_text(text[: len(text) - 5])
        with Judge("m", server.url, **options) as judge:
            assert judge.ask_all(questions) == [f"Q{n}" for n in range(12)]
            assert judge.report() == {
                "asked": 1,
                "kept": 11,
                "failed_calls": 0,
                "prompt_tokens": 10,
                "completion_tokens": 5,
            }
        assert len(server.bodies) == 13
        with Judge(f"{server.url}#m", **options) as judge:  # the same judge by its address
            judge.ask_all(questions)
            assert len(server.bodies) == 13
            judge.ask(ask("q0"), temperature=1.0)  # another question as far as the cache is concerned
        assert len(server.bodies) == 14


@pytest.fixture
def bench(tmp_path):
    lines(
        tmp_path / "questions.jsonl",
        [
            {"question_id": n, "image": "1.jpg", "text": f"Q{n}?", "category": category}
            for n, category in enumerate(["conv", "detail", "conv"])
        ],
    )
    lines(tmp_path / "context.jsonl", [{"image": "1.jpg", "caption": ["A lamp.", "It is red."]}])
    lines(tmp_path / "ref.jsonl", [{"question_id": n, "text": f"ref {n}", "answer_id": f"r{n}"} for n in range(3)])
    answers(tmp_path / "p.jsonl", {n: f"cand {n}" for n in range(3)}, answer_id="c")
    return tmp_path


def test_llava_bench_reviews_answers(bench):
    replies = {"ref 0": "8 6\nFine.", "ref 1": "10 5", "ref 2": "no scores"}

    def reply(body):
        assert "A lamp.\nIt is red." in body["messages"][1]["content"]
        return next(text for name, text in replies.items() if name in body["messages"][1]["content"])

    with FakeAPI(reply) as server:
        options = {"context": bench / "context.jsonl", "reference": bench / "ref.jsonl", "base_url": server.url}
        result = score("llava-bench", bench / "p.jsonl", bench / "questions.jsonl", judge="m", **options)
        asked = len(server.bodies)
        score("llava-bench", bench / "p.jsonl", bench / "questions.jsonl", judge="m", **options)
        assert (asked, len(server.bodies)) == (3, 3)
    found = result["metrics"]
    # Failed reviews enter the means as -1, as published: (8 + 10 - 1) / 3 and (6 + 5 - 1) / 3.
    assert (found["reference"], found["candidate"], found["failed"]) == (56.7, 33.3, 1)
    assert found["relative_score"] == round(3.333 / 5.667 * 100, 1)
    assert found["by_category"]["llava_bench_detail"]["relative_score"] == 50.0
    reviews = [json.loads(line) for line in (bench / "p.reviews.jsonl").read_text().splitlines()]
    assert reviews[1]["tuple"] == [10.0, 5.0]
    assert (reviews[1]["answer1_id"], reviews[1]["answer2_id"]) == ("r1", "c")
    assert (found["failed_calls"], found["judge"]["asked"]) == (0, 3)
    again = score("llava-bench", bench / "p.reviews.jsonl", ignore=[2])["metrics"]
    assert (again["count"], again["failed"]) == (2, 0)
    with pytest.raises(UserError, match="holds answers, not reviews; give judge"):
        score("llava-bench", bench / "p.jsonl", bench / "questions.jsonl")


def test_a_judge_of_llava_bench_that_sees_is_shown_the_picture(bench):
    Image.new("RGB", (8, 8), "red").save(bench / "1.jpg")
    options = {"context": bench / "context.jsonl", "reference": bench / "ref.jsonl", "judge": "m"}
    asked = []

    def reply(body):
        asked.append(body["messages"][1]["content"])
        return "8 6"

    with FakeAPI(reply) as server:
        files = (bench / "p.jsonl", bench / "questions.jsonl")
        found = score("llava-bench", *files, look=True, base_url=server.url, **options)["metrics"]
        assert found["relative_score"] == 75.0
        assert [part["type"] for part in asked[0]] == ["image_url", "text"]
        assert asked[0][1]["text"].startswith("\n[Context]\nA lamp.\nIt is red.\n\n[Question]\nQ")
        assert "The image is shown to you" in asked[0][1]["text"]
        score("llava-bench", *files, base_url=server.url, **options)  # text alone is another question
        assert isinstance(asked[3], str)
        assert "You cannot see the image" in asked[3]
        (bench / "1.jpg").unlink()
        with pytest.raises(UserError, match=r"1\.jpg"):
            score("llava-bench", *files, look=True, base_url=server.url, cache=bench / "new.jsonl", **options)


def test_a_failed_judge_call_is_no_verdict(bench, monkeypatch):
    def reply(body):
        content = body["messages"][1]["content"]
        if "cand 1" in content and broken:
            raise ConnectionError
        return "8 4" if "cand 0" in content else "8 6"

    broken = True
    with FakeAPI(reply) as server:
        options = {"context": bench / "context.jsonl", "reference": bench / "ref.jsonl", "base_url": server.url}
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
        found = score("llava-bench", bench / "p.jsonl", bench / "questions.jsonl", judge="m", **options)["metrics"]
        assert (found["count"], found["failed_calls"], found["relative_score"]) == (2, 1, 62.5)
        broken = False
        asked = len(server.bodies)
        found = score("llava-bench", bench / "p.jsonl", bench / "questions.jsonl", judge="m", **options)["metrics"]
        assert (found["count"], found["failed_calls"], found["candidate"]) == (3, 0, 53.3)
        assert len(server.bodies) == asked + 1
    options["cache"] = bench / "other.jsonl"
    with pytest.raises(UserError, match="so did all 3 calls"):  # nobody is there any more
        score("llava-bench", bench / "p.jsonl", bench / "questions.jsonl", judge="m", **options)


def test_reviews_without_category_take_it_from_the_questions(tmp_path):
    reviews = lines(tmp_path / "r.jsonl", [{"question_id": 1, "text": "9 8.5\nGood", "score": [9.0, 8.5]}])
    questions = lines(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?", "category": "generic"}])
    for reparse in (False, True):
        found = score("llava-bench", reviews, questions, reparse=reparse)["metrics"]
        assert found["by_category"]["generic"]["relative_score"] == 94.4
    assert parse_pair("9, 8") == [-1, -1]


def test_mmvet_grades_with_rising_temperature(tmp_path):
    gold = tmp_path / "mm-vet.json"
    rows = {
        "v1_0": {"imagename": "a", "question": "Q0", "answer": "x<AND>y", "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "b", "question": "Q1", "answer": "z", "capability": ["ocr"]},
    }
    gold.write_text(json.dumps(rows))
    predictions = answers(tmp_path / "p.jsonl", {0: "x", "v1_1": "z"})

    def reply(body):
        prompt = body["messages"][0]["content"]
        if "Q0" in prompt:
            assert prompt.endswith("\nQ0 | x <AND> y | x |")
            return "0.5"
        return "score: 1" if body["temperature"] < 1 else "1.0 right"

    with FakeAPI(reply) as server:
        found = score("mmvet", predictions, gold, judge="m", base_url=server.url)["metrics"]
        assert sorted(body["temperature"] for _, _, body in server.bodies) == [0.0, 0.0, 0.5, 1.0]
    report = {"asked": 4, "kept": 0, "failed_calls": 0, "prompt_tokens": 40, "completion_tokens": 20}
    assert found == {
        "score": 75.0,
        "count": 2,
        "by_capability": {"ocr": 75.0, "math": 50.0},
        "unparsed": 0,
        "failed_calls": 0,
        "judge": report,
    }
    graded = lines(tmp_path / "g.jsonl", [{"question_id": n, "score": value} for n, value in ((0, 1), (1, 0.2))])
    assert score("mmvet", graded, gold)["metrics"]["score"] == 60.0
    upload = benchmark("mmvet").submission(predictions, tmp_path / "up.json")
    assert json.loads(upload.read_text()) == {"v1_0": "x", "v1_1": "z"}


# Runs


class Model(Responder):
    """Answers with the last word of the question; an unreadable image or a scheduled kill stops a call."""

    def __init__(self, kill_at=None):
        super().__init__(name="tiny")
        self.calls, self.kill_at = [], kill_at

    def answer_all(self, conversations, sampling=None, **fields):
        if len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        self.calls.append(len(conversations))
        return super().answer_all(conversations, sampling, **fields)

    def run(self, call):
        for part in call.messages[0]["content"]:
            if part["type"] == "image" and part["image"].endswith("broken.png"):
                raise MediaError(f"{part['image']}: not an image")
        yield ReasoningDelta(text="Let me see.")
        yield TextDelta(text=call.messages[0]["content"][-1]["text"].split()[-1] + " ")


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"question_id": n, "image": f"{n}.png", "text": f"Say w{n}", "answer": f"w{n % 4}", "type": f"t{n % 2}"}
        for n in range(7)
    ]
    return lines(tmp_path / "q.jsonl", rows)


def test_a_run_survives_a_kill(questions, tmp_path):
    output = tmp_path / "out" / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Model(kill_at=2), "phantom", questions, output, batch_size=2)
    whole = output.read_bytes()
    assert whole.count(b"\n") == 4
    output.write_bytes(whole[:-9])  # the last line is cut short
    model = Model()
    result = evaluate(model, "phantom", questions, output, batch_size=2)
    assert (sum(model.calls), result["asked"]) == (4, 4)
    assert [json.loads(line)["question_id"] for line in output.read_text().splitlines()] == list(range(7))
    assert result["metrics"]["correct"] == 4
    assert result["metrics"]["by_type"]["t0"]["count"] == 4
    assert evaluate(Model(), "phantom", questions, output)["asked"] == 0


def test_an_unreadable_image_stops_no_other_question(questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[1]["image"] = "broken.png"
    lines(questions, rows)
    output = tmp_path / "p.jsonl"
    with pytest.raises(UserError, match=r"question 1 failed: .*broken.png: not an image \(1 of 7 failed"):
        evaluate(Model(), "phantom", questions, output, batch_size=3)
    assert len(output.read_text().splitlines()) == 6
    rows[1]["image"] = "1.png"
    lines(questions, rows)
    assert evaluate(Model(), "phantom", questions, output, batch_size=3)["metrics"]["count"] == 7


def test_predictions_of_another_model_are_refused(questions, tmp_path):
    output = tmp_path / "p.jsonl"
    evaluate(Model(), "phantom", questions, output, limit=2)
    with pytest.raises(RecordError, match=r"model_id: is 'tiny', this run is of 'other'"):
        evaluate(Model(), "phantom", questions, output, model_id="other")
    with pytest.raises(UserError, match="exists; choose another output"):
        evaluate(Model(), "phantom", questions, output, resume=False)


def test_a_run_keeps_what_tells_repeated_ids_apart(tmp_path):
    rows = [
        {"question_id": "count/a.png", "image": "a.png", "text": f"Is it {word}?", "category": "count"}
        for word in ("x", "y")
    ]
    output = tmp_path / "p.jsonl"
    evaluate(Model(), "mme", lines(tmp_path / "q.jsonl", rows), output, images="pictures")
    stored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"].splitlines()[0] for row in stored] == ["Is it x?", "Is it y?"]
    assert (stored[0]["text"], stored[0]["reasoning"]) == ("phrase.", "Let me see.")


def test_media_stand_where_the_text_says():
    media = tuple({"type": "image", "image": name} for name in "ab")
    first = Question(1, "<image>\nand <image> differ?", media).messages()[0]["content"]
    assert [part.get("image", part.get("text")) for part in first] == ["a", "\nand ", "b", " differ?"]
    front = Question(1, "differ?", media).messages()[0]["content"]
    assert [part.get("image", part.get("text")) for part in front] == ["a", "b", "differ?"]


def test_listing_benchmarks_imports_nothing_heavy():
    code = "import sys, llavakit.evaluation.score as s; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.skipif("LLAVAKIT_REAL_EVAL" not in os.environ, reason="needs the published ScienceQA files")
def test_published_scienceqa_figure():
    folder = Path(os.environ["LLAVAKIT_REAL_EVAL"])
    predictions = folder / "scienceqa_llava_13b_v0_predictions.jsonl"
    found = score("scienceqa", predictions, folder / "scienceqa_gold.jsonl")["metrics"]
    assert (found["correct"], found["count"], round(found["accuracy"], 3)) == (3855, 4241, 90.898)


# Identity of predictions


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (24, 24), colour).save(folder / f"{number}.png")
        rows.append({"question_id": number, "image": f"{number}.png", "text": "Colour?", "answer": colour})
    return lines(tmp_path / "q.jsonl", rows)


def asked(chat, pictures, tmp_path, images="pictures", **options):
    options = {"max_new_tokens": 3, "console": Console(file=io.StringIO())} | options
    return evaluate(chat, "phantom", pictures, tmp_path / "p.jsonl", images=tmp_path / images, **options)["asked"]


def first_row(chat):
    return next(p for name, p in chat.model.named_parameters() if name.endswith("embed_tokens.weight"))[7]


def test_a_model_that_was_retrained_in_place_is_asked_again(pictures, tmp_path):
    chat = small_chat()
    chat.name = str(tmp_path)  # a place, which does not change
    assert asked(chat, pictures, tmp_path) == 3
    assert asked(chat, pictures, tmp_path) == 0
    before = (tmp_path / "p.jsonl").read_text()
    with torch.no_grad():
        row = first_row(chat)
        row += 1e-3  # one row of one table
    assert asked(chat, pictures, tmp_path) == 3
    assert [path.read_text() for path in tmp_path.glob("p.*.jsonl")] == [before]
    with torch.no_grad():
        row -= 1e-3
        chat.model.load_state_dict(small_chat().model.state_dict())
    assert asked(chat, pictures, tmp_path) == 0  # the answers of the first state are taken up again
    assert (tmp_path / "p.jsonl").read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda chat: chat.model.to(torch.bfloat16),
        lambda chat: setattr(chat.processor, "template", "llava_v1"),
        lambda chat: setattr(chat.processor, "reading", {"image": {"exif_transpose": False}}),
        lambda chat: chat.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]}),
        lambda chat: setattr(chat.model.generation_config, "eos_token_id", [2, 9]),
    ],
    ids=["dtype", "template", "reading", "tokenizer", "end ids"],
)
def test_settings_that_decide_answers_belong_to_the_run(pictures, tmp_path, change):
    chat = small_chat()
    assert asked(chat, pictures, tmp_path) == 3
    change(chat)
    with pytest.raises(UserError, match=r"run: the predictions belong to other \w+"):
        asked(chat, pictures, tmp_path)
    chat.name = "elsewhere"
    with pytest.raises(UserError, match="model_id: is 'tiny', this run is of 'elsewhere'; choose another output"):
        asked(chat, pictures, tmp_path)


def test_the_length_of_answers_belongs_to_the_run(pictures, tmp_path):
    chat = small_chat()
    asked(chat, pictures, tmp_path)
    with pytest.raises(UserError, match="belong to other max_new_tokens; choose another output"):
        asked(chat, pictures, tmp_path, max_new_tokens=4)


def test_paths_do_not_belong_to_the_run(pictures, tmp_path):
    asked(small_chat(), pictures, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    chat = small_chat()
    chat.name = "another/spelling"
    assert asked(chat, pictures, tmp_path, images="link") == 0
    os.rename(tmp_path / "pictures", tmp_path / "moved")
    assert asked(chat, pictures, tmp_path, images="moved") == 0
    assert str(tmp_path) not in (tmp_path / "p.jsonl").read_text()


def test_a_changed_picture_or_text_is_asked_again(pictures, tmp_path):
    chat = small_chat()
    asked(chat, pictures, tmp_path)
    Image.new("RGB", (24, 24), "white").save(tmp_path / "pictures" / "1.png")
    assert asked(chat, pictures, tmp_path) == 1
    rows = [json.loads(line) for line in pictures.read_text().splitlines()]
    rows[2]["text"] = "Which colour?"
    lines(pictures, rows)
    assert asked(chat, pictures, tmp_path) == 1
    stored = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert sorted(row["question_id"] for row in stored) == [0, 1, 2]
    assert stored[-1]["prompt"] == "Which colour?"


def test_predictions_without_a_run_are_not_taken_for_ones_own(pictures, tmp_path):
    answers(tmp_path / "p.jsonl", {0: "red"})
    with pytest.raises(RecordError, match=r"p.jsonl:1: model_id: is None, this run is of 'tiny'"):
        asked(small_chat(), pictures, tmp_path)


def test_identity_is_content():
    one, other = small_chat(), small_chat()
    other.name = "another"
    assert identity_of(one) == identity_of(other)
    assert set(identity_of(one)) == {
        *("responder", "weights", "dtype", "configuration", "tokenizer", "template", "media", "ends", "codec"),
    }
    with torch.no_grad():
        other.model.lm_head.weight[3, 5] += 1
    differing = {key for key, value in identity_of(one).items() if identity_of(other)[key] != value}
    assert differing == {"weights"}
    assert identity_of(Model()) == identity_of(Model())
