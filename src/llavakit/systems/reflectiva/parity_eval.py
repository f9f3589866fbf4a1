"""Golden components of ReflectiVA that concern evaluation and passages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import FieldError, RecordError
from llavakit.evaluation.score import score
from llavakit.proof.entries import scored
from llavakit.proof.golden import Case, Example, examples, take
from llavakit.systems.reflectiva import metrics

SHOWN = 72  # characters of an error that the cases keep


def split_passages(case: Case) -> Iterator[Example]:
    """Pages packed into passages; sentences and their lengths are given."""
    from llavakit.retrieval.passages import pack

    case.informational("config.spacy")

    def split(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        sentences = [tuple(sentence) for sentence in item["sentences"]]
        return {"name": item["name"], "passages": pack(sentences, item["n"]), "sentences": item["sentences"]}

    case.informational("inputs.*.text")
    yield from examples(split, case.inputs)


UNITS: dict[str, tuple[str, Callable[..., Any]]] = {
    "normalize_answer": ("strings", metrics.normalize_answer),
    "clean_str_range": ("strings", metrics.spaced_range),
    "process_numerical_answer": ("strings", metrics.parse_number),
    "range_iou": ("iou", lambda pair: metrics.range_iou(*pair)),
    "exact_match": ("exact", lambda pair: metrics.exact_match(*pair)),
}


def infoseek_scores(case: Case) -> Iterator[Example]:
    """The functions of the published script, and its whole evaluation."""
    inputs, tolerance = take(case.inputs), case.config.get("tolerance", metrics.TOLERANCE)
    case.informational("config.adjust_score")  # which references are looked at follows from the predictions
    for name, (key, function) in UNITS.items():
        yield from examples(function, inputs.get(key, ()), name)

    def matched(pair: Sequence[Any]) -> int:
        return int(metrics.number_match(*pair, tolerance))

    yield from examples(matched, inputs.get("numeric", ()), "metric_numerical_range")

    def evaluated() -> dict[str, Any]:
        rows = {
            "predictions": [{"question_id": p["data_id"], "text": p["prediction"]} for p in inputs["predictions"]],
            # of several entries with one id the original keeps the last; `score` refuses such files
            **{
                name: {row["data_id"]: row for row in inputs[name]}.values()
                for name in ("references", "question_types")
            },
        }
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.jsonl" for name in rows}
            for name, file in files.items():
                file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]), encoding="utf-8")
            given = {"question_types": files["question_types"], "tolerance": tolerance}
            found = score("infoseek", files["predictions"], files["references"], **given)["metrics"]
        splits = {f"{split}_score": own for split, own in found["splits"].items()}
        return {"final_score": found["final_score"], **splits}

    yield Example("evaluate", evaluated, "evaluate")


def _overlap(candidate: str, reference: str, question: str) -> float:
    """The cases' stand-in for the answer equivalence model: the share of the reference's words in the candidate."""
    wanted, found = (set(metrics.preprocess_answer(text).split()) for text in (reference, candidate))
    return len(wanted & found) / len(wanted) if wanted else 0.0


def encyclopedic_vqa_scores(case: Case) -> Iterator[Example]:
    """Texts as they are compared, lists of answers, and whole questions."""
    case.informational("config.bem")
    inputs = take(case.inputs)
    thresholds = {name: case.config.get(name, 0.5) for name in ("iou_threshold", "bem_threshold")}
    yield from examples(metrics.preprocess_answer, inputs.get("strings", ()), "preprocess_answer")

    def listed(pair: Sequence[Any]) -> Any:
        try:
            return metrics.listed_match(*pair, thresholds["iou_threshold"])
        except FieldError as error:
            return f"ValueError: {error.problem}"[:SHOWN]

    yield from examples(listed, inputs.get("multi", ()), "multianswer_exact_match")

    def right(example: Sequence[Any]) -> Any:
        question, references, candidate, kind = example
        gold = {"text": question, "answer": references, "question_type": kind}
        try:
            found = scored("encyclopedic-vqa", [candidate], [gold], bem=_overlap, **thresholds)
        except RecordError as error:
            return f"ValueError: {error.problem}"[:SHOWN]
        return found["accuracy"] / 100

    yield from examples(right, inputs.get("examples", ()), "evaluate_example")


__all__ = ["encyclopedic_vqa_scores", "infoseek_scores", "split_passages"]
