"""Written reports against reference reports, by every metric there is, each with its interval.

Record: `question_id` (or `id`), `answer` (or `reference`), and to have a model asked `text` and `image`. What the
metrics are is in `llavakit.evaluation.reports`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import need_gold
from llavakit.evaluation.benchmarks.generic import ListedBenchmark
from llavakit.evaluation.benchmarks.judged import JudgeOptions, make_judge
from llavakit.evaluation.cases import Metrics, bounds_of
from llavakit.evaluation.metrics.resampling import RESAMPLES, SEED, SWAPS
from llavakit.evaluation.records import as_records

if TYPE_CHECKING:
    from llavakit.evaluation.judges import Judge


class ReportScores(ListedBenchmark):
    """Every metric of reports with median and 95 % interval of 500 resamples, and two systems compared."""

    title = "Reports"
    max_new_tokens = 256

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        against: str | Path | None = None,
        metrics: str | Sequence[str] | None = None,
        weights: Mapping[str, str] | None = None,
        bertscore_layer: int | None = None,
        features: str | Path | Mapping[str, Any] | None = None,
        rubric: str | Path | None = None,
        coding: str | None = None,
        id_field: str | None = None,
        text_field: str | None = None,
        reference_field: str | None = None,
        empty: str = "error",
        resamples: int = RESAMPLES,
        swaps: int = SWAPS,
        seed: int = SEED,
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """See `llavakit.evaluation.reports.score.score_reports`.

        Args:
            metrics: Names; a single text may hold several, separated by commas.
            weights: Folders, files or hub ids by what they are, see `llavakit.evaluation.reports.metrics.WEIGHTS`.
            features: Safetensors file of `images` and `texts` [pairs, width] in the order of the references.
            rubric: Registered name or YAML file of a rubric that the judge follows.
        """
        from llavakit.evaluation.reports.metrics import Sources, read_features
        from llavakit.evaluation.reports.rubric import read_rubric
        from llavakit.evaluation.reports.score import score_reports

        names = metrics.split(",") if isinstance(metrics, str) else metrics
        chosen = None if rubric is None else read_rubric(rubric)
        if chosen is None and judging.get("judge") is not None:
            raise UserError("judge: needs a rubric to follow; name one with --rubric")
        found = features if features is None or isinstance(features, Mapping) else read_features(features)
        result = score_reports(
            predictions,
            need_gold(gold, self.title, "reference reports"),
            against=against,
            metrics=None if names is None else [name.strip() for name in names],
            sources=Sources(dict(weights or {}), bertscore_layer, found),
            rubric=chosen,
            judge=functools.partial(_judge, judging, chosen) if judging.get("judge") is not None else None,
            coding=coding,
            id_field=id_field,
            text_field=text_field,
            reference_field=reference_field,
            empty=empty,
            resamples=resamples,
            swaps=swaps,
            seed=seed,
            extra=extra,
        )
        bounds = {name: bounds_of(row) for name, row in result["scores"].items()}
        reports = as_records(gold or "", ({} for _ in range(result["reports"])))
        return Metrics(result, self.cases([(report, None) for report in reports], {}), {"scores": bounds})


def _judge(judging: JudgeOptions, rubric: Any, predictions: str | Path) -> Judge:
    defaults = {"temperature": 0.0} | {key: value for key, value in rubric.sampling.items() if key != "top_p"}
    return make_judge(judging, predictions, **defaults)
