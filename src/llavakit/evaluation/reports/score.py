"""Reports scored: every metric with its interval, and two systems compared by paired tests.

What decides about means, and is said in the result where it occurs:

- A condition that no reference has and no prediction says counts as 0 in `macro` F1 (as published), and is left out of
  `present` F1. A resample in which no condition is left has no `present` F1.
- A report without any label counts in no F1 of labels, since neither hits nor misses come from it. In RadGraph's F1 a
  report whose graph is empty on either side counts as 0, as published.
- A metric that is not defined for the reports is None. Resamples in which it is not defined are left out of median and
  interval, and counted as `unscored`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavakit.errors import UserError
from llavakit.evaluation.metrics import reports as measures
from llavakit.evaluation.metrics.resampling import (
    RESAMPLES,
    SEED,
    SWAPS,
    Difference,
    Estimate,
    Sums,
    compare,
    draw,
    estimates,
)
from llavakit.evaluation.reports.files import Reports, matched, read
from llavakit.evaluation.reports.metrics import NAMES, Sources, check_names, computed
from llavakit.evaluation.reports.rubric import Rubric, judge_reports

if TYPE_CHECKING:
    from llavakit.evaluation.judges import Judge

PERCENT = 100.0


def score_reports(
    predictions: str | Path,
    references: str | Path,
    *,
    against: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    sources: Sources | None = None,
    rubric: Rubric | None = None,
    judge: Callable[[str | Path], Judge] | None = None,
    coding: str | None = None,
    id_field: str | None = None,
    text_field: str | None = None,
    reference_field: str | None = None,
    empty: str = "error",
    resamples: int = RESAMPLES,
    swaps: int = SWAPS,
    seed: int = SEED,
    extra: str = "error",
) -> dict[str, Any]:
    """Score a file of predictions, or two.

    Args:
        against: Predictions of another system for the same reports.
        metrics: Names, of `reports.metrics.NAMES`; None takes all that can be computed.
        sources: Weights and programs; default: texts alone.
        rubric: What a judge counts.
        judge: Makes the judge for a file of predictions.
        coding, id_field, text_field, reference_field, empty: See `files.read`.
        resamples, swaps, seed: Of the bootstrap and of the paired test.
        extra: What a prediction without a reference is: an "error", or left out ("ignore").

    Returns:
        reports (number); scores {metric: {value, median, low, high, unscored}}; with `against` scores_against and
        difference {metric: {difference, low, high, p, unscored}}; not_computed {metric: reason}; notes; judge.
        Values are times 100, except for kappa and counts of errors.

    Raises:
        RecordError, UserError: One line for what is wrong with a file, an option or a source.
    """
    if resamples < 1 or swaps < 1:
        raise UserError(f"resamples={resamples}, swaps={swaps}: both must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be from 0 to {2**32 - 1}")
    options = {"id_field": id_field, "coding": coding}
    check_names(metrics or ())
    wanted = read(references, "reference", text_field=reference_field, empty=empty, **options)
    files = [predictions] if against is None else [predictions, against]
    systems = [matched(read(file, "prediction", text_field=text_field, **options), wanted, extra) for file in files]
    sources = sources or Sources()
    if sources.features is not None and len(sources.features["images"]) != len(wanted.ids):
        count = len(sources.features["images"])
        raise UserError(f"features: hold {count} pairs, {references} has {len(wanted.ids)} reports")
    try:
        found = [computed(own, wanted, sources, metrics) for own in systems]
        sums = [own for own, _ in found]
        missing = found[0][1]
        result: dict[str, Any] = {"reports": len(wanted.ids), "resamples": resamples, "seed": seed}
        asked: list[dict[str, Any]] = []
        if rubric is not None:
            for file, own, reports in zip(files, sums, systems, strict=True):
                more, said = _judged(judge, file, rubric, reports, wanted)
                own |= more
                asked.append(said)
        result |= _values(sums, resamples, swaps, seed)
    finally:
        sources.close()
    if rubric is None and metrics is None:
        missing["rubric"] = "needs --rubric NAME or FILE, and --judge MODEL"
    result["not_computed"] = missing
    result["notes"] = notes(systems, wanted, sums[0])
    if asked:
        result["judge"] = (
            asked[0] if against is None else {str(file): own for file, own in zip(files, asked, strict=True)}
        )
    return result


def _judged(
    make: Callable[[str | Path], Judge] | None, file: str | Path, rubric: Rubric, reports: Reports, wanted: Reports
) -> tuple[dict[str, Sums], dict[str, Any]]:
    if make is None:
        raise UserError(f"rubric {rubric.name}: needs a judge; name one with --judge")
    with make(file) as judge:
        found = judge_reports(judge, rubric, reports.texts, wanted.texts)
        said = {"rubric": rubric.name, "model": judge.responder.name, "unreadable": found.unreadable}
        return found.sums(), said | judge.report() | {"failed_calls": found.failed}


def _values(sums: Sequence[Mapping[str, Sums]], resamples: int, swaps: int, seed: int) -> dict[str, Any]:
    """Estimates of every system, and the differences of two."""
    names = list(sums[0])
    metrics = [[own[name] for name in names] for own in sums]
    cases = len(metrics[0][0].table) if names else 0
    if cases < 2:  # every resample of one report is that report, which says nothing of others
        rows = None
        values = [[one.whole for one in own] for own in metrics]
        found = [[Estimate(v, v, np.nan, np.nan, 0 if math.isfinite(v) else resamples) for v in own] for own in values]
    else:
        rows = draw(cases, resamples, seed)
        found = [estimates(own, rows) for own in metrics]
    result: dict[str, Any] = {"scores": _shown(names, found[0])}
    if len(sums) > 1:
        none = [Difference(a.whole - b.whole, *[np.nan] * 3, resamples) for a, b in zip(*metrics, strict=True)]
        differences = none if rows is None else compare(*metrics, rows, swaps=swaps, seed=seed)
        result["scores_against"] = _shown(names, found[1])
        result["difference"] = _shown(names, differences)
    return result


def factor(name: str) -> float:
    """What a metric is multiplied by where it is shown: rates are in percent, kappa and counts of errors are not."""
    rate = name.endswith("_error_free") or (name in NAMES and not name.endswith("_kappa_14"))
    return PERCENT if rate else 1.0


def _shown(names: Sequence[str], rows: Sequence[Estimate | Difference]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, row in zip(names, rows, strict=True):
        values = row._asdict()
        if isinstance(row, Difference):
            values = {"difference": values.pop("value"), **values}
        scale = factor(name)
        found[name] = {
            key: _number(value * (1.0 if key in ("p", "unscored") else scale)) for key, value in values.items()
        } | {"unscored": row.unscored}
    return found


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def notes(systems: Sequence[Reports], references: Reports, sums: Mapping[str, Sums]) -> list[str]:
    """What a reader must know about the figures, one line each."""
    found = []
    for system in systems:
        empty = sum(not text.strip() for text in system.texts)
        if empty:
            found.append(f"{system.file}: {empty} of {len(system.texts)} predictions are empty; they count as they are")
    if len(references.ids) < 2:
        found.append("one report: there is nothing to resample, so nothing has an interval")
    for prefix in ("chexbert", "rules"):
        name = f"{prefix}_f1_macro_14"
        if name in sums:
            count = len(measures.CONDITIONS)
            _, _, true = np.split(sums[name].table.sum(0), 3)
            absent = [condition for condition, n in zip(measures.CONDITIONS, true, strict=True) if not n]
            if absent:
                found.append(
                    f"{prefix}: {len(absent)} of {count} conditions are in no reference ({', '.join(absent)}); their "
                    "F1 is 0 in the macro means, and left out of the present means"
                )
            blank = int((sums[name].table.sum(1) == 0).sum())
            if blank:
                found.append(f"{prefix}: {blank} reports have no label on either side; they count in no F1")
    if "radgraph_partial" in sums and all(graph is not None for graph in references.graphs):
        empty = sum(not graph for graph in references.graphs)
        if empty:
            found.append(f"radgraph: {empty} references have no entities; their F1 is 0")
    return found
