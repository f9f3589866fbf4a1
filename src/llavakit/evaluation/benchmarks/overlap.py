"""Running text against references: captions, reports, explanations, by any of the registered text metrics.

Record: `question_id`, `text`, `answer` (or a list `answers`), optionally media and `type`. One file serves as questions
and as gold. Which toolkit a figure comes from is part of the metric's name (`llavakit.evaluation.metrics.text`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import percent, text_of
from llavakit.evaluation.benchmarks.generic import PROCESSORS, ListedBenchmark, texts_of
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.overlap import OVERLAP, Overlap
from llavakit.evaluation.records import choose
from llavakit.registry import TEXT_METRICS

DEFAULT = ("coco_bleu_1", "coco_bleu_4", "coco_rouge_l", "coco_cider")


class TextOverlap(ListedBenchmark):
    """Overlap of running text with reference texts, times 100 as papers print it."""

    title = "Text overlap"
    max_new_tokens = 512

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        metrics: str | Sequence[str] = DEFAULT,
        process: str = "none",
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Every metric over all texts, and over those of each `type`.

        Args:
            metrics: Names of text metrics; a single text may hold several, separated by commas.
            process: Normalisation of both sides first: "none", "plain", "vqa" or "medical".
            missing: "wrong" takes a question without a prediction for an empty text.
        """
        names = metrics.split(",") if isinstance(metrics, str) else list(metrics)
        names = [name.strip() for name in names]
        if not names or len(set(names)) < len(names):
            raise UserError(f"metrics={','.join(names)}: must name at least one metric, and each once")
        chosen = {name: TEXT_METRICS.get(name) for name in names}
        normalise = PROCESSORS[choose(process, "process", tuple(PROCESSORS))]
        pairs = self.pairs(predictions, gold, missing, extra)
        rows = [
            (question.data.get("type"), normalise(text_of(prediction) or ""), list(map(normalise, texts_of(question))))
            for question, prediction in pairs
        ]

        def values(part: Sequence[tuple[Any, str, list[str]]]) -> dict[str, Any]:
            texts, references = [row[1] for row in part], [row[2] for row in part]
            return {name: percent(metric(texts, references).value) for name, metric in chosen.items()}

        found: dict[str, Any] = {**values(rows), "count": len(rows)}
        kinds = dict.fromkeys(str(kind) for kind, *_ in rows if kind is not None)
        if kinds:
            found["by_type"] = {kind: values([row for row in rows if str(row[0]) == kind]) for kind in kinds}
        texts, references = [row[1] for row in rows], [row[2] for row in rows]
        measures = {name: text_measure(name, texts, references) for name in names}
        known = {name: measure for name, measure in measures.items() if measure is not None}
        return Metrics(found, self.cases(pairs, known, {"by_type": [row[0] for row in rows]})) if known else found


def text_measure(name: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Measure | None:
    """A text metric case by case; None for one of a whole corpus that is not known as sums."""
    if name in OVERLAP and all(len(own) == 1 for own in references):
        sums = Overlap(texts, [own[0] for own in references]).sums(name)
        return Measure(sums.table, sums.value)
    found = TEXT_METRICS.get(name)(texts, references)
    if found.each is None or not texts or abs(sum(found.each) / len(texts) - found.value) > 1e-9:
        return None
    return Measure.mean(found.each)
