"""POPE: is there a certain object in the image? Yes or no.

The published files `coco_pope_{random,popular,adversarial}.json` are JSONL of `question_id`, `image`, `text`, `label`
and serve as questions and as gold. The headline is the mean F1 of the three splits. Source: spec of LLaVA-1.5,
section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.evaluation.benchmarks.base import SHORT_ANSWER, PairedBenchmark, text_of
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import binary_metrics, mean
from llavakit.evaluation.metrics.intervals import Measure, mean_ratio
from llavakit.evaluation.metrics.resampling import divide
from llavakit.evaluation.processors import pope_answer

_RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


class POPE(PairedBenchmark):
    """Accuracy, precision, recall, F1 and share of yes; "yes" is the positive class."""

    title = "POPE"
    questions_are_gold = True
    gold_file = "JSONL of question_id and label, such as coco_pope_random.json"
    suffix = SHORT_ANSWER
    keep = ("category",)

    def answer(self, text: str) -> str:
        """What a reply says, "yes" or "no"."""
        return pope_answer(text)

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Rates in percent and counts.

        Args:
            gold: JSONL of `question_id` and `label`; where it has `category`, rates are also given per category, and
                `mean_f1` over them.
            missing: "wrong" counts a question without a prediction as answered with the other label.
        """
        answers, labels, categories = [], [], []
        pairs = self.pairs(predictions, gold, missing, extra)
        for question, prediction in pairs:
            label = question.get("label", str).strip().lower()
            if label not in ("yes", "no"):
                raise question.error("label", f"must be yes or no, is {label!r}")
            text = text_of(prediction)
            wrong = "no" if label == "yes" else "yes"
            answers.append(wrong if text is None else self.answer(text))
            labels.append(label)
            categories.append(question.get("category", str, None))
        metrics: dict[str, Any] = {"count": len(labels), **_percent(binary_metrics(answers, labels))}
        names = [name for name in dict.fromkeys(categories) if name is not None]
        if names:
            table = {}
            for name in names:
                chosen = [i for i, category in enumerate(categories) if category == name]
                rows = binary_metrics([answers[i] for i in chosen], [labels[i] for i in chosen])
                table[str(name)] = {key: value for key, value in _percent(rows).items() if key in _RATES}
            metrics["mean_f1"] = mean(row["f1"] for row in table.values())
            metrics["by_category"] = table
        measures = binary_measures([answer == "yes" for answer in answers], [label == "yes" for label in labels])
        if names:
            measures["mean_f1"] = _mean_f1(measures["f1"], categories, names)
        return Metrics(metrics, self.cases(pairs, measures, {"by_category": categories}))


def binary_measures(said: Sequence[bool], truth: Sequence[bool]) -> dict[str, Measure]:
    """The rates of `binary_metrics` as measures; a rate whose denominator is zero has no interval."""
    pairs = list(zip(said, truth, strict=True))
    return {
        "accuracy": Measure.mean([own == right for own, right in pairs]),
        "precision": Measure.mean([right if own else None for own, right in pairs]),
        "recall": Measure.mean([own if right else None for own, right in pairs]),
        "f1": Measure(
            np.array([(2 * (own and right), own + right) for own, right in pairs], float).reshape(-1, 2), _f1
        ),
        "yes_ratio": Measure.mean(said),
    }


def _f1(sums: np.ndarray) -> np.ndarray:
    return divide(sums[..., 0], sums[..., 1], empty=0.0)


def _mean_f1(f1: Measure, categories: Sequence[str | None], names: Sequence[str]) -> Measure:
    """The mean over categories of each one's F1."""
    mine = np.array([[category == name for name in names] for category in categories], float)
    table = np.concatenate([mine * f1.table[:, :1], mine * f1.table[:, 1:]], axis=1)
    return Measure(table, mean_ratio, f1.scale)


def _percent(values: dict[str, float]) -> dict[str, float]:
    return {name: 100 * value if name in _RATES else value for name, value in values.items()}
