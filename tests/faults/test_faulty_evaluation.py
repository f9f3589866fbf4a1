"""Malformed question files, gold files and predictions of every benchmark."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import Faults
from mutations import scramble, scrambled_json, twist
from PIL import Image

from llavakit.conversation.turns import TextDelta
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.predictions import PredictionsFile, Run
from llavakit.evaluation.score import benchmark, score
from llavakit.generation.responder import Responder
from llavakit.registry import BENCHMARKS

SEEDS = 60

OPEN = {"question_id": 1, "image": "a.png", "text": "What?", "answer": "dog", "type": "t"}
VQA = {"question_id": 1, "image": "a.png", "question": "What?", "answers": [{"answer": "dog"}] * 10, "answer_type": "x"}
TEXTVQA = {"image_id": "i", "question": "What?", "answers": ["dog"] * 10, "ocr_tokens": ["a"]}
SEED = {
    "question_id": "1",
    "question": "What?",
    "answer": "A",
    "data_type": "image",
    "data_id": "a",
    "question_type_id": 1,
    "choice_a": "w",
    "choice_b": "x",
    "choice_c": "y",
    "choice_d": "z",
}
PROBLEM = {"question": "Q?", "choices": ["x", "y"], "hint": "h", "answer": 1, "image": "image.png", "split": "test"}
CHOICE = {"question_id": 1, "video": "a.mp4", "question": "Q?", "candidates": ["x", "y"], "answer": "y", "task": ""}
VIDEO = {"question_id": 1, "video": "a.mp4", "text": "Q?", "answer": "dog"}
OPEN_ENDED, MULTI_CHOICE = ({"dataset": "D", "question_type": kind} for kind in ("open-ended", "multi-choice"))
SEVERAL_PICTURES = {
    "sample_id": 1,
    "image": ["a.png", "b.png"],
    "conversations": [{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "A"}],
    "metadata": MULTI_CHOICE,
}
COMPARED = {"id": "mmmu-1", "query": "Q?", "image": "a.png", "response": ["x", "yy"], "human_ranking": [0, 1]}
VIDEO_CHATGPT = {"video_name": "a", "Q": "Q?", "A": "dog"}
GOLD: dict[str, Any] = {
    "vqav2": {"data_subtype": "val2014", "questions": [VQA | {"image_id": 1}], "annotations": [VQA]},
    "vizwiz": [VQA],
    "gqa": {"1": {"question": "What?", "answer": "dog", "imageId": "7", "types": {"structural": "query"}}},
    "textvqa": {"data": [TEXTVQA]},
    "scienceqa": {"1": PROBLEM},
    "pope": [OPEN | {"label": "yes", "category": "random"}],
    "seed": {"question_type": {"Scene": 1}, "questions": [SEED]},
    "mme": [OPEN | {"question_id": "count/a.png", "answer": "Yes"}],
    "mmvet": {"v1_1": {"question": "Q?", "answer": "x<AND>y", "imagename": "a.png", "capability": ["ocr"]}},
    "llava-bench": [OPEN | {"category": "conv"}],
    "video_qa": [VIDEO],
    "video_chatgpt_qa": [{"question_id": 1, "video_name": "a", "question": "Q?", "answer": "dog"}],
    "mvbench": [CHOICE],
    "mlvu": [CHOICE],
    "egoschema": [VIDEO | {"answer": "A"}],
    "referring": [OPEN | {"bbox": [1, 2, 3, 4], "image_size": [10, 10]}],
    "agreement": [{"question_id": 1, "score": 3, "group": 1}, {"question_id": 2, "score": 4, "group": 1}],
    "encyclopedic-vqa": [OPEN | {"answer": "dog|a dog", "question_type": "automatic"}],
    "infoseek": [
        OPEN | {"answer_eval": ["dog"], "data_split": "val_unseen_entity", "question_type": "String"},
        OPEN
        | {"question_id": 2, "answer_eval": {"range": [1, 2]}, "data_split": "unseen_question"}
        | {"question_type": "Numerical"},
    ],
    "ct_rate": [OPEN | {"answer": "(a) lung"}],
    "cholec80_vqa": [OPEN | {"answer": "yes"}],
    "endovis18_vqa": [OPEN | {"answer": "kidney"}],
    "psi_ava_vqa": [OPEN | {"answer": "LPAD"}],
    "interleave_bench": [SEVERAL_PICTURES, SEVERAL_PICTURES | {"metadata": OPEN_ENDED, "sample_id": "s"}],
    "likelihood": [OPEN | {"options": ["A. cat", "B. dog"], "answer": 1, "group": "g"}],
    "llava-wilder": [OPEN | {"reference": "a dog"}],
    "wildvision": [OPEN | {"baseline": "a dog"}],
    "mg_mme": [OPEN | {"question_id": "count/a.png", "answer": "Yes"}],
    "mg_pope": [OPEN | {"label": "yes", "category": "random"}],
    "verdict_agreement": [{"question_id": 1, "verdict": "first"}, {"question_id": 2, "verdict": "tie"}],
    "vl-rewardbench": [COMPARED],
    "vqa_rad": [
        {"qid": 1, "image_name": "a.png", "question": "Q?", "answer": "dog", "answer_type": "OPEN", "phrase_type": "x"}
    ],
    "slake": [
        {"qid": 1, "img_name": "a.png", "question": "Q?", "answer": "no", "answer_type": "CLOSED", "q_lang": "en"}
    ],
    "path_vqa": [
        {
            "id": 1,
            "image": "a.png",
            "answer_type": "OPEN",
            "conversatons": [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "dog"}],
        }
    ],
    "report-errors": [
        {
            "question_id": number,
            "image": f"{image}.png",
            "subject_id": number,
            "conversations": [{"from": "human", "value": "<image>\nAny mistake?"}, {"from": "gpt", "value": "Y"}],
        }
        for number, image in enumerate("ab", 1)
    ],
    "robust_vqa": [OPEN | {"answers": ["dog"] * 10}],
    "llava_med_chat": [OPEN | {"type": "conversation", "domain": {"mri": True}}],
    "five_aspects": [VIDEO_CHATGPT, VIDEO_CHATGPT],
    "five_aspects, two questions": [{"video_name": "a", "Q1": "Q?", "Q2": "W?", "A": "dog"}],
}
TEXT_LINES: dict[str, str] = {  # gold files of bars
    "cholec80_vqa, lines": "is it?|yes\nhow many tools?|2\n",
    "endovis18_vqa, lines": "what organ?|kidney\nwhat is the state?|Idle\n",
    "psi_ava_vqa, lines": "1/2.jpg|what phase?|LPAD\n1/2.jpg|what step?|Corte\n",
}
TABLE = """index\tquestion\tA\tB\tanswer\tcategory\timage
7\tWhat?\tcat\tdog\tB\tk1\ta.png
8\tWho?\tx\ty\tA\tk2\ta.png
"""
ANSWER = {"question_id": 1, "text": "dog", "prompt": "What?\nAnswer the question using a single word or phrase."}
BATTLES = [
    {"model_a": "m", "model_b": "n", "verdict": "first"},
    {"model_a": "n", "model_b": "m", "verdict": "first"},
    {"model_a": "m", "model_b": "n", "verdict": "tie"},
]
RESULTS = [
    {"dataset": "D", "question_type": kind, "sample_id": n, "gt_response": "A", "pred_response": "B"}
    for n, kind in enumerate(("open-ended", "multi-choice"))
]
LIKELIHOODS = [
    {"sum": -3.5, "characters": 6, "tokens": 3, "unconditional": -5.0},
    {"sum": -2.0, "characters": 6, "tokens": 3, "unconditional": -4.0},
]
PREDICTIONS: dict[str, list[dict[str, Any]]] = {
    "report-errors": [
        {"question_id": f"{number}{run}", "text": "Y"} for number in (1, 2) for run in ("", "#blank", "#swapped")
    ],
    "mme": [{"question_id": "count/a.png", "text": "Yes", "prompt": "What?"}],
    "mmvet": [{"question_id": "v1_1", "score": 0.5}],
    "infoseek": [ANSWER, ANSWER | {"question_id": 2, "text": "1.5"}],
    "llava-bench": [{"question_id": 1, "tuple": [8, 9], "category": "conv", "content": "8 9"}],
    "video_qa": [{"question_id": 1, "pred": "yes", "score": 4}],
    "video_chatgpt_qa": [{"question_id": 1, "pred": "yes", "score": 4}],
    "agreement": [{"question_id": 1, "score": 2}, {"question_id": 2, "text": "3.5 points"}],
    "textvqa": [ANSWER | {"question_id": "i"}],
    "arena": BATTLES,
    "interleave_bench": [ANSWER | {"question_id": name, "text": "A"} for name in ("D/1", "D/s")],
    "interleave_bench, results": RESULTS,
    "likelihood": [{"question_id": 1, "text": "", "likelihoods": LIKELIHOODS}],
    "mg_mme": [{"question_id": "count/a.png", "text": "Yes", "prompt": "What?"}],
    "verdict_agreement": [{"question_id": 1, "verdict": "first"}, {"question_id": 2, "verdict": "second"}],
    "vl-rewardbench": [{"question_id": "mmmu-1", "text": "Overall Judgment: Answer 1 is better."}],
    "critic-pointwise": [{"question_id": 1, "review": "Score: 80"}],
    "llava-wilder": [{"question_id": 1, "review": "8 9\nBoth are right."}],
    "wildvision": [{"question_id": 1, "review": "My final verdict is: [[B>A]]"}],
    "llava_med_chat": [{"question_id": 1, "gpt_eval": "8 9\nBoth are right."}],
    "video-captions": [{"question_id": 1, "review": "{'pred': 'yes', 'score': 4}"}],
    "five_aspects": [ANSWER | {"question_id": "a_0"}, ANSWER | {"question_id": "a_1"}],
    "five_aspects, two questions": [ANSWER | {"question_id": "a_0:1"}, ANSWER | {"question_id": "a_0:2"}],
    "five_aspects, published": [VIDEO_CHATGPT | {"pred": "dog"}, VIDEO_CHATGPT | {"pred": 3}],
    "mmbench": [
        {"question_id": n, "text": "A", "round_id": r, "option_char": ["A", "B"], "options": ["x", "y"]}
        for n in (7, 8)
        for r in (0, 1)
    ],
}
for alike in ("mmbench-cn", "mg_multiple_choice"):
    PREDICTIONS[alike] = PREDICTIONS["mmbench"]
for lined in TEXT_LINES:
    PREDICTIONS[lined] = [{"question_id": f"gold.txt:{n}", "text": "yes"} for n in (1, 2)]
TABLES = ("mmbench", "mmbench-cn", "mg_multiple_choice")
NOT_ASKED = ("agreement", "verdict_agreement")  # benchmarks of what was asked already
NO_GOLD = ("arena", "interleave_bench, results", "five_aspects, published")
"""Whose predictions bring all that is needed."""
JUDGED = ("critic-pointwise, judged", "llava-wilder, judged", "wildvision, judged")
"""Answers that a judge reviews first; those under the benchmarks' own names are reviewed already."""
WITH_JUDGE = (*JUDGED, "critic-pairwise", *(case for case in PREDICTIONS if case.startswith("five_aspects")))
CASES = sorted({*BENCHMARKS, *GOLD, *PREDICTIONS, *TEXT_LINES, *JUDGED})
"""Names of benchmarks, with another form of their files behind a comma."""


def name_of(case: str) -> str:
    """The benchmark of a case."""
    return case.partition(",")[0]


class Agreeable(Responder):
    """A judge without a model."""

    def identity(self) -> dict[str, Any]:
        return {"agreeable": 1}

    def run(self, call: Any) -> Iterator[TextDelta]:
        yield TextDelta(text="{'score': 4}")


def options_of(case: str, folder: Path) -> dict[str, Any]:
    """What a score needs beside its files."""
    options: dict[str, Any] = {"extra": "ignore"}
    if case in WITH_JUDGE:
        options["judge"] = Judge(Agreeable(), concurrency=1)
    if case == "critic-pairwise":
        options["against"] = folder / "others.jsonl"
        options["against"].write_bytes(lines([ANSWER]))
    return options


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def predictions_of(case: str) -> list[dict[str, Any]]:
    """Sound predictions."""
    return [ANSWER] if case in JUDGED else PREDICTIONS.get(case, [ANSWER])


def gold_file(case: str, folder: Path) -> Path:
    """A sound gold file, which is the question file too."""
    (folder / "a.mp4").touch()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    for suffix, text in ((".tsv", TABLE if case in TABLES else None), (".txt", TEXT_LINES.get(case))):
        if text is not None:
            (folder / f"gold{suffix}").write_text(text)
            return folder / f"gold{suffix}"
    (folder / "gold.json").write_text(json.dumps(GOLD.get(case, GOLD.get(name_of(case), [OPEN]))))
    return folder / "gold.json"


@pytest.mark.parametrize("case", [case for case in CASES if case not in NO_GOLD])
def test_gold_and_question_files(faults: Faults, case: str, tmp_path: Path) -> None:
    task, gold = name_of(case), gold_file(case, tmp_path)
    sound = gold.read_bytes()
    predictions = tmp_path / "p.jsonl"
    predictions.write_bytes(lines(predictions_of(case)))
    options = options_of(case, tmp_path)
    score(task, predictions, gold, **options)  # the sound files are sound
    if case not in NOT_ASKED:
        assert benchmark(task).questions(gold)
    for number in range(SEEDS):
        rng = random.Random(number)
        broken = scrambled_json(json.loads(sound), rng) if gold.suffix == ".json" else scramble(sound, rng)
        gold.write_bytes(broken)
        label = f"{case}, seed {number}"
        faults.attempt("gold files", label, lambda: score(task, predictions, gold, **options))
        if case not in NOT_ASKED:
            faults.attempt("question files", label, lambda: benchmark(task).questions(gold))


@pytest.mark.parametrize("case", CASES)
def test_predictions(faults: Faults, case: str, tmp_path: Path) -> None:
    task, gold = name_of(case), None if case in NO_GOLD else gold_file(case, tmp_path)
    predictions = tmp_path / "p.jsonl"
    rows, options = predictions_of(case), options_of(case, tmp_path)
    predictions.write_bytes(lines(rows))
    score(task, predictions, gold, **options)
    takes_missing = "missing" in inspect.signature(benchmark(task).score).parameters
    for number in range(SEEDS):
        rng = random.Random(number)
        twisted = lines([twist(row, rng) if rng.random() < 0.7 else row for row in rows])
        predictions.write_bytes(scramble(twisted, rng) if rng.random() < 0.3 else twisted)
        chosen = {"missing": rng.choice(("error", "wrong"))} if takes_missing else {}
        label = f"{case}, seed {number}"
        faults.attempt("predictions", label, partial(score, task, predictions, gold, **options, **chosen))
        faults.attempt("submissions", label, partial(benchmark(task).submission, predictions, tmp_path / "o", gold))


def test_predictions_that_are_resumed(faults: Faults, tmp_path: Path) -> None:
    path, run = tmp_path / "p.jsonl", Run("m", "r", {"weights": "w"}, "/there")
    question = Question(1, "What?", ({"type": "image", "image": "a.png"},), {"prompt": ANSWER["prompt"]})
    rows = lines([ANSWER | {"question_id": n, "model_id": "m", "run": "r", "asked": "0"} for n in range(3)])
    description = {"run": "r", "model": "m", "place": "/there", "weights": "w"}

    def resume() -> None:
        file = PredictionsFile(path, run)
        try:
            file.open_questions([question], [question])
        finally:
            file.close()

    for number in range(4 * SEEDS):
        rng = random.Random(number)
        path.write_bytes(scramble(rows, rng))
        (tmp_path / "p.run.json").write_bytes(scrambled_json(description, rng))
        faults.attempt("resumed predictions", f"seed {number}", resume)
