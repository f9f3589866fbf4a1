"""VQA-RAD, SLAKE and PathVQA, scored as the paper's tables are.

    llavakit eval MODEL --task vqa_rad --questions test.json --images images --output predictions.jsonl

Open questions: the share of the answer's words that the prediction has (recall), mean over questions. Closed ones: hit
if the normalised answer is a substring of the normalised prediction, so "no" is found in "abnormal". Published figures
are those of models fine-tuned on the benchmark's own training split. Spec section 7; `llava/eval` of v1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    Pair,
    PairedBenchmark,
    Question,
    folder_of,
    media_parts,
    need_gold,
    percent,
    text_of,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean, token_scores
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.text import sentence_bleu
from llavakit.evaluation.processors import medical_answer
from llavakit.evaluation.records import choose, pair, read_answers, read_json
from llavakit.systems.llava_med.vqa_files import CLOSED, numbered, read_questions

PROTOCOLS = ("batch", "single")
BLEU_WEIGHTS = {"": (0.25,) * 4, "_1": (1.0, 0.0, 0.0, 0.0), "_2": (0.0, 1.0, 0.0, 0.0), "_3": (0.0, 0.0, 1.0, 0.0)}


def normalised(text: str) -> str:
    """A text as it is compared."""
    return medical_answer(text.lower())


def overlap(prediction: str, reference: str) -> dict[str, float]:
    """Precision, recall and F1 of words after normalisation; see `token_scores`."""
    return token_scores(normalised(prediction), normalised(reference))


def exact_match(prediction: str, reference: str) -> float:
    """Distinct words of the reference in the prediction, per word of the prediction; 0 without one."""
    found = normalised(prediction).split()
    return len(set(found) & set(normalised(reference).split())) / len(found) if found else 0.0


def says(prediction: str, reference: str) -> bool:
    """Whether the normalised reference is a substring of the normalised prediction."""
    return normalised(reference) in normalised(prediction)


def names_yes_or_no(prediction: str) -> bool:
    """Whether "yes" or "no" is a substring; "no" is inside "normal" and "abnormal" too."""
    text = normalised(prediction)
    return "yes" in text or "no" in text


def nearest_is(prediction: str, reference: str, candidates: Sequence[str]) -> bool:
    """Whether the candidate nearest to the prediction is the reference.

    The nearest has the largest share of its distinct words in the prediction; the first of equals.
    """
    words = set(normalised(prediction).split())

    def share(candidate: str) -> float:
        own = set(normalised(candidate).split())
        return len(own & words) / len(own) if own else 0.0

    return normalised(max(candidates, key=share)) == normalised(reference)


def answer_scores(prediction: str, reference: str) -> dict[str, float]:
    """Every metric of an open answer but its accuracy."""
    text, wanted = normalised(prediction), normalised(reference)
    scores = overlap(text, wanted) | {"exact_match": exact_match(text, wanted)}
    for name, weights in BLEU_WEIGHTS.items():
        scores[f"bleu{name}"] = sentence_bleu(text.split(), [wanted.split()], weights)
    return scores


class MedicalVQA(PairedBenchmark):
    """Medical visual question answering; gold is a file that `vqa_files.read_questions` reads."""

    max_new_tokens = 1024
    questions_are_gold = True
    gold_file = "the benchmark's own file, LLaVA-Med's JSON, or JSONL of question_id, text, answer, answer_type"

    def questions(
        self, path: str | Path, images: str | Path | None = None, *, split: str = "all", language: str = "en"
    ) -> list[Question]:
        """The questions as they stand, without a response-format sentence.

        Args:
            split: "train" or "test" of VQA-RAD's one file.
            language: Of SLAKE: "en", "zh" or "all".
        """
        folder = folder_of(path, images)
        return [
            Question(
                record.data["question_id"],
                record.data["text"],
                media_parts(record, folder),
                {"prompt": record.data["text"]},
            )
            for record in read_questions(path, split, language)
        ]

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        protocol: str = "batch",
        candidates: str | Path | None = None,
        split: str = "all",
        language: str = "en",
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """The paper's `open` and `closed`, and the further metrics of its scripts, all in percent.

        Args:
            protocol: "batch", the script of the paper's tables; "single" also demands that the reply to a closed
                question holds "yes" or "no", and takes the nearest of `candidates` as the answer to an open one.
            candidates: JSON with a list of answers under "0", for `open_accuracy` of protocol "single".
            split, language: As for the questions.
            missing, extra: See `PairedBenchmark.score`.
        """
        choose(protocol, "protocol", PROTOCOLS)
        known = None if candidates is None else read_candidates(candidates)
        questions = read_questions(need_gold(gold, self.title, self.gold_file), split, language)
        pairs = list(pair(questions, numbered(read_answers(predictions)), missing=missing, extra=extra))
        return Metrics(summary(pairs, protocol, known), self.cases(pairs, measures(pairs, protocol, known)))


def summary(pairs: Sequence[Pair], protocol: str, candidates: Sequence[str] | None) -> dict[str, Any]:
    """Metrics of questions and their predictions; one without a prediction is worth 0."""
    batch = protocol == "batch"
    open_rows: list[dict[str, float]] = []
    accuracies: list[float] = []
    closed: list[float] = []
    closed_recall: list[float] = []
    for question, prediction in pairs:
        text, reference = text_of(prediction), question.data["answer"]
        if question.data["answer_type"] == CLOSED:
            hit = text is not None and says(text, reference) and (batch or names_yes_or_no(text))
            closed.append(float(hit))
            closed_recall.append(0.0 if text is None else overlap(text, reference)["recall"])
            continue
        open_rows.append(answer_scores(text or "", reference))
        if batch:
            accuracies.append(float(text is not None and says(text, reference)))
        elif candidates is not None:
            accuracies.append(float(text is not None and nearest_is(text, reference, candidates)))
    names = tuple(answer_scores("", ""))
    of_open = {name: percent(mean(row[name] for row in open_rows)) for name in names}
    return {
        "open": of_open["recall"],
        "closed": percent(mean(closed)),
        "open_count": len(open_rows),
        "closed_count": len(closed),
        **{f"open_{name}": value for name, value in of_open.items()},
        "open_accuracy": percent(mean(accuracies)),
        **({"closed_recall": percent(mean(closed_recall))} if batch else {}),
    }


def measures(pairs: Sequence[Pair], protocol: str, candidates: Sequence[str] | None) -> dict[str, Measure]:
    """The metrics of `summary` that have an interval: each question's own, None where it does not count."""
    rows = [summary([own], protocol, candidates) for own in pairs]
    names = [name for name in (rows[0] if rows else ()) if not name.endswith("_count")]
    return {name: Measure.mean([None if row[name] is None else row[name] / 100 for row in rows]) for name in names}


def read_candidates(path: str | Path) -> list[str]:
    """The answers under the key "0" of a JSON file.

    Raises:
        UserError: If it has another form.
    """
    whole = read_json(path)
    found = whole.get("0") if isinstance(whole, Mapping) else None
    if not isinstance(found, list) or not found or not all(isinstance(text, (str, int)) for text in found):
        raise UserError(f'{path}: must be an object with a list of answers under "0"')
    return [str(text) for text in found]


class VQARad(MedicalVQA):
    """VQA-RAD: 1,797 training and 451 test questions about radiographs, CT and MRI."""

    title = "VQA-RAD"


class Slake(MedicalVQA):
    """SLAKE: 4,919, 1,053 and 1,061 English questions to train, validate and test."""

    title = "SLAKE"


class PathVQA(MedicalVQA):
    """PathVQA: 19,755, 6,279 and 6,761 questions about pathology."""

    title = "PathVQA"
