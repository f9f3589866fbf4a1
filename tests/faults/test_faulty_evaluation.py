"""Malformed question files, gold files and predictions of every benchmark."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import Faults
from mutations import scramble, scrambled_json, twist

from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.predictions import PredictionsFile, Run
from llavakit.evaluation.score import benchmark, score
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
    "ct_rate": [OPEN | {"answer": "(a) lung"}],
}
TABLE = """index\tquestion\tA\tB\tanswer\tcategory\timage
7\tWhat?\tcat\tdog\tB\tk1\ta.png
8\tWho?\tx\ty\tA\tk2\ta.png
"""
ANSWER = {"question_id": 1, "text": "dog", "prompt": "What?\nAnswer the question using a single word or phrase."}
PREDICTIONS: dict[str, list[dict[str, Any]]] = {
    "mme": [{"question_id": "count/a.png", "text": "Yes", "prompt": "What?"}],
    "mmvet": [{"question_id": "v1_1", "score": 0.5}],
    "llava-bench": [{"question_id": 1, "tuple": [8, 9], "category": "conv", "content": "8 9"}],
    "video_qa": [{"question_id": 1, "pred": "yes", "score": 4}],
    "video_chatgpt_qa": [{"question_id": 1, "pred": "yes", "score": 4}],
    "agreement": [{"question_id": 1, "score": 2}, {"question_id": 2, "text": "3.5 points"}],
    "textvqa": [ANSWER | {"question_id": "i"}],
    "mmbench": [
        {"question_id": n, "text": "A", "round_id": r, "option_char": ["A", "B"], "options": ["x", "y"]}
        for n in (7, 8)
        for r in (0, 1)
    ],
}
PREDICTIONS["mmbench-cn"] = PREDICTIONS["mmbench"]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def gold_file(task: str, folder: Path) -> Path:
    """A sound gold file, which is the question file too."""
    if task.startswith("mmbench"):
        (folder / "gold.tsv").write_text(TABLE)
        return folder / "gold.tsv"
    (folder / "gold.json").write_text(json.dumps(GOLD.get(task, [OPEN])))
    return folder / "gold.json"


@pytest.mark.parametrize("task", sorted(BENCHMARKS))
def test_gold_and_question_files(faults: Faults, task: str, tmp_path: Path) -> None:
    gold = gold_file(task, tmp_path)
    sound = gold.read_bytes()
    predictions = tmp_path / "p.jsonl"
    predictions.write_bytes(lines(PREDICTIONS.get(task, [ANSWER])))
    score(task, predictions, gold, extra="ignore")  # the sound files are sound
    for number in range(SEEDS):
        rng = random.Random(number)
        broken = scramble(sound, rng) if gold.suffix == ".tsv" else scrambled_json(json.loads(sound), rng)
        gold.write_bytes(broken)
        faults.attempt("gold files", f"{task}, seed {number}", lambda: score(task, predictions, gold, extra="ignore"))
        if task != "agreement":
            faults.attempt("question files", f"{task}, seed {number}", lambda: benchmark(task).questions(gold))


@pytest.mark.parametrize("task", sorted(BENCHMARKS))
def test_predictions(faults: Faults, task: str, tmp_path: Path) -> None:
    gold = gold_file(task, tmp_path)
    predictions = tmp_path / "p.jsonl"
    rows = PREDICTIONS.get(task, [ANSWER])
    for number in range(SEEDS):
        rng = random.Random(number)
        twisted = lines([twist(row, rng) if rng.random() < 0.7 else row for row in rows])
        predictions.write_bytes(scramble(twisted, rng) if rng.random() < 0.3 else twisted)
        options = {} if task == "agreement" else {"missing": rng.choice(("error", "wrong"))}
        label = f"{task}, seed {number}"
        faults.attempt("predictions", label, partial(score, task, predictions, gold, extra="ignore", **options))
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
