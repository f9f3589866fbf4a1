"""Golden cases of LLaVA-1.5's evaluation: metrics, prompts and submission files.

The one component `metric` covers five metrics; which one a case is about shows in the shape of its inputs.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavakit.errors import RecordError, UserError
from llavakit.evaluation import processors
from llavakit.evaluation.benchmarks import gqa, judged, mmbench, mmvet, scienceqa, seed, vqa
from llavakit.evaluation.benchmarks.base import write_json, write_lines
from llavakit.evaluation.metrics import answers as metrics
from llavakit.evaluation.records import Record, as_records, read_records
from llavakit.evaluation.reviews import parse_pair, review_content, review_record
from llavakit.evaluation.score import score
from llavakit.proof.entries import pope, scored
from llavakit.proof.golden import Case, Result, component


def metric(case: Case) -> Result:
    """POPE, ScienceQA, SEED-Bench, TextVQA or the TextVQA prompt, by the inputs' fields."""
    case.informational("config.contractions", "config.number_map", "config.articles", "config.punctuation", "inputs.*")
    inputs = case.inputs
    for field, compute in (
        ("labels", _pope),
        ("problems", _scienceqa),
        ("annotation", _seed),
        ("prompts", _textvqa_prompt),
        ("strings", _textvqa),
        ("textvqa", _textvqa),
        ("stvqa", _textvqa),
    ):
        if field in inputs:
            return Result(json=compute(inputs, case.config))
    raise UserError(f"{case.path}: inputs are of no known metric; fields {', '.join(inputs)}")


def _pope(inputs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    found = pope(inputs["answers"], inputs["labels"])
    summary = [found[name] for name in ("F1 score", "Accuracy", "Precision", "Recall", "Yes ratio")]
    return {
        "parsed": [processors.pope_answer(text) for text in inputs["answers"]],
        **found,
        "summary_line": ", ".join(f"{value:.3f}" for value in summary),
    }


def _scienceqa(inputs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    options = config.get("options", list(scienceqa.OPTIONS))
    predictions = {row["question_id"]: row for row in inputs["predictions"]}
    parsed, indices, hits, image_hits = {}, {}, [], []
    for name, problem in inputs["problems"].items():
        row = predictions.get(name, {"text": "FAILED", "prompt": "Unknown"})
        letter = processors.scienceqa_letter(row["text"], options)
        parsed[name] = letter or "FAILED"
        # As published, a letter is looked up in the options of this question.
        indices[name] = metrics.scienceqa_index(letter or "FAILED", len(problem["choices"]), options)
        hits.append(indices[name] == problem["answer"])
        if "<image>" in row.get("prompt", ""):
            image_hits.append(hits[-1])
    accuracy = 100 * (metrics.mean(hits) or 0.0)
    image_accuracy = metrics.mean(image_hits)
    printed = f"Total: {len(hits)}, Correct: {sum(hits)}, Accuracy: {accuracy:.2f}%"
    if image_accuracy is not None:
        printed += f", IMG-Accuracy: {100 * image_accuracy:.2f}%"
    return {
        "printed": printed,
        "acc": accuracy,
        "correct": sum(hits),
        "count": len(hits),
        "pred_index": indices,
        "parsed": parsed,
    }


def _seed(inputs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    annotation, printed = inputs["annotation"], []
    outputs: dict[str, Any] = {"printed": printed, "error": None}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        answers, gold, upload = folder / "answers.jsonl", folder / "SEED-Bench.json", folder / "upload.jsonl"
        last = {row["question_id"]: row for row in inputs["results"]}  # of several the script reads the last
        write_lines(answers, last.values())
        try:
            for data_type in (None, "image", "video"):
                questions = [row for row in annotation["questions"] if data_type in (None, row["data_type"])]
                write_json(gold, {**annotation, "questions": questions})
                printed.extend(_seed_lines(answers, gold, data_type))
            write_json(gold, annotation)
            rows = read_records(seed.SEEDBench().submission(answers, upload, gold))
            outputs["upload"] = [row.data for row in rows]
        except (KeyError, ZeroDivisionError) as stopped:
            outputs["error"] = type(stopped).__name__
        except RecordError as unanswered:  # the published script looks such a question up by its id as a number
            number = annotation["questions"][unanswered.line - 1]["question_id"]
            outputs["error"] = "KeyError" if str(number).isdigit() else "ValueError"
    return outputs


def _seed_lines(answers: Path, gold: Path, data_type: str | None) -> Iterator[str]:
    """What the published script prints for a file with all questions or those of one data type.

    It stops at a data type without questions and at a question type that was answered without one right answer, for
    which llavakit gives nothing and 0.
    """
    whole = json.loads(gold.read_text(encoding="utf-8"))
    if not whole["questions"]:
        raise ZeroDivisionError
    found = score("seed", answers, gold, missing="wrong", extra="ignore")["metrics"]
    answered = {answer.id for answer in read_records(answers)}
    names = {number: name for name, number in whole["question_type"].items()}
    for number in sorted({row["question_type_id"] for row in whole["questions"]}):
        accuracy = found["by_type"][names.get(number, str(number))]
        own = [str(row["question_id"]) for row in whole["questions"] if row["question_type_id"] == number]
        if not accuracy and answered.issuperset(own):
            raise KeyError(number)
        if data_type is None:
            yield f"{names[number]}: {accuracy:.2f}%"
    yield f"{data_type or 'Total'} accuracy: {found['accuracy']:.2f}%"


def _textvqa(inputs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    if "strings" in inputs:
        outputs["normalised"] = [processors.vqa_answer(text) for text in inputs["strings"]]
    if "textvqa" in inputs:
        items = inputs["textvqa"]
        values = [metrics.vqa_accuracy(item["pred_answer"], item["gt_answers"]) for item in items]
        outputs["textvqa_per_item"] = values
        texts = [item["pred_answer"] for item in items]
        found = scored("textvqa", texts, [{"answers": item["gt_answers"]} for item in items])
        outputs["textvqa_accuracy"] = found["accuracy"] / 100
        outputs["textvqa_unique_scores"] = [metrics.consensus_scores(item["gt_answers"]) for item in items]
    if "stvqa" in inputs:
        items = inputs["stvqa"]
        values = [metrics.anls(item["pred_answer"], item["gt_answers"], collapse=False) for item in items]
        outputs["anls_items"] = values
        outputs["stvqa_anls"] = metrics.mean(values)
        outputs["stvqa_accuracy"] = metrics.mean(
            metrics.any_match(item["pred_answer"], item["gt_answers"]) for item in items
        )
    return outputs


def _textvqa_prompt(inputs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return {"questions": [processors.stored_question(prompt) for prompt in inputs["prompts"]]}


@component(echoes=[f"review_record.{name}" for name in ("id", "answer1_id", "answer2_id", "content")])
def gpt_judge(case: Case) -> Result:
    """LLaVA-Bench: parsing of reviews, summary lines, what the judge is shown, the record that is kept."""
    case.informational("config.*", "inputs.content_example.*")
    inputs = case.inputs
    reviews = [
        (row.get("category"), row.get("tuple", row.get("score")), row["question_id"]) for row in inputs["tuples"]
    ]
    outputs: dict[str, Any] = {
        "parsed": [parse_pair(text) for text in inputs["reviews"]],
        "summary_printed": _summary_lines((category, scores) for category, scores, _ in reviews),
    }
    # The question that a summary leaves out is named only by the summary's key.
    for name in case.wanted.json or {}:
        left_out = re.fullmatch(r"summary_ignore_question_(\d+)", name)
        if left_out:
            kept = [(category, scores) for category, scores, number in reviews if number != int(left_out.group(1))]
            outputs[name] = _summary_lines(kept)
    example = inputs.get("content_example")
    if example is not None:
        question = example["question"]
        outputs["judge_content"] = review_content(
            example["context"]["caption"], question["text"], example["answer1"], example["answer2"], "RULE TEXT"
        )
        # The judge's reply and the ids of the answers are kept in the recorded review only.
        kept = (case.wanted.json or {}).get("review_record")
        if kept is not None:
            outputs["review_record"] = review_record(
                kept["id"],
                question,
                kept["answer1_id"],
                kept["answer2_id"],
                f"llava_bench_{question['category']}",
                kept["content"],
            )
    return Result(json=outputs)


def _summary_lines(reviews: Any) -> list[str]:
    summary = judged.summarise(reviews)
    rows = {"all": summary, **summary.get("by_category", {})}
    return [
        f"{name} {row['relative_score']} {row['reference']} {row['candidate']}" for name, row in sorted(rows.items())
    ]


def submission_files(case: Case) -> Result:
    """GQA, VQAv2, VizWiz and MM-Vet files from one predictions file that has a broken line."""
    case.informational("inputs.test_split.*")
    inputs = case.inputs
    split = as_records("test_split", inputs["test_split"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in inputs["answers"]) + "{broken\n", encoding="utf-8")
        answers, broken = vqa.read_predictions(file, "skip")
    answered = {record.id for record in answers}
    complete: list[Record] = [question for question in split if question.id in answered]
    return Result(
        json={
            "gqa": gqa.gqa_submission(answers),
            "vqav2": vqa.vqav2_submission(answers, split),
            "vqav2_printed": f"total results: {len(answers)}, total split: {len(split)}, error_line: {broken}",
            "vizwiz": vqa.vizwiz_submission(answers, complete),
            "mmvet": mmvet.mmvet_submission(answers),
        }
    )


def evaluation_prompt(case: Case) -> Result:
    """MMBench prompts: all rotations in English, the first in Chinese."""
    case.informational("inputs.rows.*")
    rows = case.inputs["rows"]
    names = ("prompt", "message", "options", "option_char")
    english = [[{name: turn[name] for name in names} for turn in mmbench.rounds(row, all_rounds=True)] for row in rows]
    return Result(
        json={"en": english, "cn_first_round": [mmbench.rounds(row, chinese=True)[0]["message"] for row in rows]}
    )


ADAPTERS = {
    "metric": metric,
    "metric_gpt_judge": gpt_judge,
    "submission_files": submission_files,
    "evaluation_prompt": evaluation_prompt,
}
