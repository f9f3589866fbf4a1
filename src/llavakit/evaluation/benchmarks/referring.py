"""Referring expressions: the box of what a text describes.

Record: `question_id`, `text`, `image`, `bbox` ([x, y, width, height] in pixels) and `image_size` ([width, height]). An
answer is `{<x1><y1><x2><y2>}` in hundredths of width and height, the format of MiniGPT and MedM-VL. Source: spec of
MedM-VL, section 7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import PairedBenchmark, Scored, percent
from llavakit.evaluation.metrics.answers import box_iou, mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.processors import percent_box
from llavakit.evaluation.records import Record


class Referring(PairedBenchmark):
    """Mean intersection over union, and the share of answers above 0.5."""

    title = "Referring expressions"
    questions_are_gold = True
    gold_file = "JSONL of question_id, bbox and image_size"
    keep = ("type",)
    metric = "mean_iou"
    tables = {"by_type": "type"}

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        resolution: int = 100,
        inclusive: bool = True,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Mean IoU in percent, in total and by `type`.

        Args:
            resolution: Units into which width and height are divided in answers.
            inclusive: Whether corners are pixels that belong to a box, as in the published scripts.
        """
        if resolution < 1:
            raise UserError(f"resolution={resolution}: must be at least 1")

        def value(question: Record, text: str) -> float:
            x, y, width, height = _numbers(question, "bbox", 4)
            size = _numbers(question, "image_size", 2)
            box = percent_box(text, (size[0], size[1]), resolution)
            return box_iou(box, (x, y, x + width, y + height), inclusive) if box else 0.0

        return self.score_pairs(self.pairs(predictions, gold, missing, extra), value)

    def summary(self, scored: Scored) -> dict[str, Any]:
        """Mean IoU and the share of answers above 0.5, as the published script counts."""
        return super().summary(scored) | {"accuracy_at_0.5": percent(mean(value > 0.5 for _, value in scored))}

    def measures(self, scored: Scored) -> dict[str, Measure]:
        """Both."""
        return super().measures(scored) | {"accuracy_at_0.5": Measure.mean([value > 0.5 for _, value in scored])}


def _numbers(record: Record, field: str, count: int) -> list[float]:
    values = record.get(field, list)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if len(values) != count or not numbers:
        raise record.error(field, f"must be {count} numbers")
    return [float(value) for value in values]
