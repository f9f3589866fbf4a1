"""Encyclopedic-VQA and InfoSeek: questions whose answers are in an encyclopedia and not in the picture.

Predictions: JSONL of `question_id` and `text`. Both benchmarks are asked from JSONL of `question_id`, `image` and
`text`; InfoSeek's own files call the id `data_id`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from llavakit.errors import FieldError, UserError, quoted
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    PairedBenchmark,
    Question,
    Scored,
    need_gold,
    percent,
    stored_questions,
    text_of,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.resampling import divide
from llavakit.evaluation.records import Record, index, pair, read_answers, read_records
from llavakit.registry import resolve
from llavakit.systems.reflectiva.metrics import (
    QUESTION_TYPES,
    TOLERANCE,
    Equivalence,
    encyclopedic_score,
    harmonic,
    infoseek_match,
)

TWO_HOP = "2_hop"


def equivalence_of(named: str | Equivalence | None) -> Equivalence | None:
    """The model that says whether two answers mean the same.

    Args:
        named: "module:function", called with candidate, reference and question, which returns a probability; or the
            folder of a BERT sequence classifier of transformers in BEM's form; or None.

    Raises:
        UserError: If it is neither.
    """
    if named is None or callable(named):
        return cast("Equivalence | None", named)
    if Path(named).is_dir():
        from llavakit.systems.reflectiva.equivalence import AnswerEquivalence

        return AnswerEquivalence(Path(named))
    try:
        return resolve(named)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"bem: {quoted(named)} is neither a folder nor module:function ({error})") from None


class EncyclopedicVQA(PairedBenchmark):
    """Share of right answers: exact match, then equivalence of meaning (BEM) where a model for it is given.

    Gold: JSONL of `question_id`, `text` (the question), `answer` (references separated by `|`, or a list) and
    `question_type`. Without a model the metrics are named `exact_match`, because the published figures are higher.
    """

    title = "Encyclopedic-VQA"
    gold_file = "JSONL of question_id, text, answer and question_type"
    questions_are_gold = True
    tables = {"by_question_type": "question_type"}

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        bem: str | Equivalence | None = None,
        bem_threshold: float = 0.5,
        iou_threshold: float = 0.5,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Right answers in percent: of all questions, of those that need one page (`single_hop`), and by type.

        Args:
            bem: See `equivalence_of`.
            bem_threshold: Least probability of equivalence.
            iou_threshold: Least intersection over union of lists of answers.
        """
        equivalence = equivalence_of(bem)
        self._named = "exact_match" if equivalence is None else "accuracy"

        def value(question: Record, text: str) -> float:
            try:
                return encyclopedic_score(
                    question.get("text", str),
                    references_of(question),
                    text,
                    question.get("question_type", str),
                    equivalence,
                    iou_threshold=iou_threshold,
                    bem_threshold=bem_threshold,
                )
            except FieldError as error:
                raise question.error(error.field, error.problem) from None

        return self.score_pairs(self.pairs(predictions, gold, missing, extra), value)

    def summary(self, scored: Scored) -> dict[str, Any]:
        """Metrics from all questions and their values."""
        kinds = {kind: [v for q, v in scored if q.data.get("question_type") == kind] for kind in QUESTION_TYPES}
        single = [value for kind, values in kinds.items() if kind != TWO_HOP for value in values]
        return {
            self._named: percent(mean(value for _, value in scored)),
            "single_hop": percent(mean(single)),
            "count": len(scored),
            "by_question_type": {kind: percent(mean(values)) for kind, values in kinds.items() if values},
        }

    def measures(self, scored: Scored) -> dict[str, Measure]:
        """The metrics of all questions and of those that need one page."""
        values = [value for _, value in scored]
        single = [value if question.data.get("question_type") != TWO_HOP else None for question, value in scored]
        return {self._named: Measure.mean(values), "single_hop": Measure.mean(single)}


def references_of(question: Record) -> list[str]:
    """The references of a question."""
    given = question.get("answer", (str, list))
    texts = given.split("|") if isinstance(given, str) else given
    if not all(isinstance(text, str) for text in texts):
        raise question.error("answer", "must be a text with | between references, or a list of texts")
    return texts


class InfoSeek(Benchmark):
    """Right answers in percent of questions that are new and of entities that are new; both count alike.

    Gold: JSONL of `data_id`, `answer_eval`, `data_split`, and `question_type` (or a second JSONL of `data_id` and
    `question_type`, as published).
    """

    title = "InfoSeek"
    gold_file = "JSONL of data_id, answer_eval, data_split and question_type"

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions of a JSONL of `question_id`, `image` and `text`."""
        return stored_questions(path, images)

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        question_types: str | Path | None = None,
        tolerance: float = TOLERANCE,
        missing: str = "ignore",
        extra: str = "ignore",
    ) -> dict[str, Any]:
        """The published score and its parts.

        Args:
            question_types: JSONL of `data_id` and `question_type`.
            tolerance: Of numerical references that are one number.
            missing: What a question without a prediction is: left out ("ignore", as published), "wrong" or an "error".
            extra: What a prediction without a question is: left out ("ignore", as published), or an "error".

        Returns:
            `final_score`, the harmonic mean of both splits' scores, and a table of `splits`: `score` of all questions,
            `score_time`, `score_num` and `score_string`; 0 for a group without a question.
        """
        if missing not in ("ignore", "wrong", "error"):
            raise UserError(f"missing={missing}: must be ignore, wrong or error")
        references = read_records(need_gold(gold, self.title, self.gold_file))
        kinds = {} if question_types is None else index(read_records(question_types), _data_id)
        chosen = {"missing": "error" if missing == "error" else "wrong", "extra": extra}
        pairs = list(pair(references, read_answers(predictions), gold_key=_data_id, **chosen))
        splits: dict[str, dict[str, list[bool]]] = {
            split: {kind: [] for kind in _GROUPS} for split in ("unseen_question", "unseen_entity")
        }
        kept, rights, places = [], [], []
        for question, answer in pairs:
            if answer is None and missing == "ignore":
                continue
            kind = _kind_of(question, kinds)
            split = question.get("data_split", str)
            right = answer is not None and _right(question, text_of(answer) or "", kind, tolerance)
            group = splits["unseen_question" if split.endswith("unseen_question") else "unseen_entity"]
            group[_GROUP_OF.get(kind.lower(), "string")].append(right)
            kept.append((question, answer))
            rights.append(right)
            places.append("unseen_question" if split.endswith("unseen_question") else "unseen_entity")
        table = {split: _scores(groups) for split, groups in splits.items()}
        metrics = {
            "final_score": harmonic(*(own["score"] for own in table.values())),
            "count": sum(len(values) for groups in splits.values() for values in groups.values()),
            "splits": table,
        }
        halves = np.array([[place == split for split in splits] for place in places], float).reshape(-1, 2)
        hits = halves * np.array(rights, float)[:, None]
        measures = {
            "final_score": Measure(np.concatenate([hits, halves], axis=1), _harmonic),
            "score": Measure.mean(rights),
        }
        return Metrics(metrics, self.cases(kept, measures, {"splits": places}))


def _harmonic(sums: np.ndarray) -> np.ndarray:
    """Harmonic mean of both splits' shares from right questions and questions of each; 0 of nothing."""
    one, other = np.moveaxis(divide(sums[..., :2], sums[..., 2:], empty=0.0), -1, 0)
    return divide(2 * one * other, one + other, empty=0.0)


_GROUPS = ("time", "num", "string")
_GROUP_OF = {"time": "time", "numerical": "num"}


def _data_id(record: Record) -> str:
    return record.id if "question_id" in record.data else str(record.get("data_id", (str, int)))


def _kind_of(question: Record, kinds: Mapping[str, Record]) -> str:
    known = kinds.get(_data_id(question), question)
    return known.get("question_type", str)


def _right(question: Record, text: str, kind: str, tolerance: float) -> bool:
    if question.data.get("answer_eval") is None:
        raise question.error("answer_eval", "is missing; give the right answers")
    try:
        return infoseek_match(text, question.data["answer_eval"], kind, tolerance)
    except FieldError as error:
        raise question.error(error.field, error.problem) from None


def _scores(groups: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    def share(values: Sequence[bool]) -> float:
        return round(100 * sum(values) / len(values), 2) if values else 0.0

    everything = [value for values in groups.values() for value in values]
    return {"score": share(everything)} | {f"score_{name}": share(values) for name, values in groups.items()}
