"""POPE: is there a certain object in the image? Yes or no.

The published files `coco_pope_{random,popular,adversarial}.json` are JSONL of `question_id`, `image`, `text`, `label`
and serve as questions and as gold. The headline is the mean F1 of the three splits. Source: spec of LLaVA-1.5,
section 7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.evaluation.benchmarks.base import SHORT_ANSWER, PairedBenchmark, text_of
from llavakit.evaluation.metrics.answers import binary_metrics, mean
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
        for question, prediction in self.pairs(predictions, gold, missing, extra):
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
        return metrics


def _percent(values: dict[str, float]) -> dict[str, float]:
    return {name: 100 * value if name in _RATES else value for name, value in values.items()}
