"""What a score was computed from, case by case: for intervals, and for pairs of systems on the same cases."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llavakit.evaluation.metrics.intervals import Interval, Measure, intervals, numbered
from llavakit.evaluation.metrics.resampling import ratio
from llavakit.evaluation.records import Record

PICTURE_FIELDS = ("image", "video", "volume", "image_id", "imageId", "imagename", "video_name")
"""Fields of a gold record that say which picture its question is about."""

Bounds = list[float] | None


@dataclass(frozen=True)
class Cases:
    """The questions of a score.

    Attributes:
        pairs: Gold record and prediction of every case.
        keys: What identifies a case among those of the same gold file.
        pictures: What tells the pictures apart that the cases are about; a case without one has its own key.
        measures: Metrics by the name under which the score has them, the main one first.
        tables: Name of a table of the score -> the rows in which each case counts.
    """

    pairs: Sequence[tuple[Record, Record | None]]
    keys: Sequence[Hashable]
    pictures: Sequence[Hashable]
    measures: Mapping[str, Measure]
    tables: Mapping[str, Sequence[Collection[str]]]

    @property
    def main(self) -> str:
        """Name of the main metric."""
        return next(iter(self.measures))

    @functools.cached_property
    def by_case(self) -> str:
        """Name of the first metric that has a value for a single case: a mean."""
        return next((name for name, measure in self.measures.items() if measure.value is ratio), self.main)

    @functools.cached_property
    def each(self) -> np.ndarray:
        """What every case is worth, by the first mean in which it counts; NaN for none [cases]."""
        found = np.full(len(self.pairs), np.nan)
        for measure in self.measures.values():
            if measure.value is ratio:
                found = np.where(np.isnan(found), measure.sums.each, found)
        return found

    @property
    def groups(self) -> np.ndarray:
        """Number of every case's picture [cases]."""
        return numbered(self.pictures)

    def rows(self, table: str) -> dict[str, np.ndarray]:
        """Numbers of the cases in every row of a table."""
        found: dict[str, list[int]] = {}
        for number, names in enumerate(self.tables[table]):
            for name in names:
                found.setdefault(name, []).append(number)
        return {name: np.array(numbers) for name, numbers in found.items()}

    def chosen(self, numbers: np.ndarray) -> dict[str, Measure]:
        """The measures of some of the cases."""
        return {name: measure.of(numbers) for name, measure in self.measures.items()}


class Metrics(dict[str, Any]):
    """Metrics of a score, which know the cases that they were computed from.

    Args:
        intervals: Those that the score computed itself, in the form of `spread`.
    """

    def __init__(self, metrics: Mapping[str, Any], cases: Cases, intervals: Mapping[str, Any] | None = None) -> None:
        super().__init__(metrics)
        self.cases, self.intervals = cases, dict(intervals or {})


def cases_of(
    pairs: Iterable[tuple[Record, Record | None]],
    measures: Mapping[str, Measure],
    tables: Mapping[str, Sequence[Any]] | None = None,
    *,
    pictures: Sequence[Hashable] | None = None,
    fields: Sequence[str] = PICTURE_FIELDS,
) -> Cases:
    """Cases of gold records and predictions.

    Args:
        tables: Per case the row's name, None for none, or a list or tuple of names.
        pictures: Which picture each case is about; by default what the first of `fields` says that the gold record has,
            else what `eval` stored beside the prediction.
    """
    pairs = list(pairs)
    keys = _keys([question for question, _ in pairs])
    if pictures is None:
        pictures = [_picture(*pair, key, fields) for pair, key in zip(pairs, keys, strict=True)]
    rows = {name: [_names(row) for row in column] for name, column in (tables or {}).items()}
    return Cases(pairs, keys, pictures, measures, rows)


def _keys(records: Sequence[Record]) -> list[Hashable]:
    """Ids where they tell records apart, otherwise also how often an id was used before."""
    used: dict[str, int] = {}
    found = []
    for record in records:
        name = str(next((record.data[field] for field in ("question_id", "id", "index") if field in record.data), ""))
        used[name] = used.get(name, -1) + 1
        found.append((name, used[name]))
    return found


def _picture(question: Record, prediction: Record | None, key: Hashable, fields: Sequence[str]) -> Hashable:
    for field in fields:
        if question.data.get(field) not in (None, []):
            return json.dumps([field, question.data[field]], sort_keys=True, default=str)
    stored = None if prediction is None else prediction.data.get("media")
    return ("media", stored) if isinstance(stored, str) else ("case", key)


def _names(row: Any) -> tuple[str, ...]:
    if row is None:
        return ()
    return tuple(map(str, row)) if isinstance(row, (list, tuple)) else (str(row),)


def spread(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """n and intervals of a score's metrics.

    Returns:
        `n`, the number of cases; `pictures`, how many different ones they are about, if fewer; `intervals`, 95 %, in
        the form of the metrics: [low, high] for a number, {row: [low, high]} or {row: {column: [low, high]}} for a
        table; None where there is none. Metrics that are counts, or have no measure, are left out.
    """
    if not isinstance(metrics, Metrics):
        return {"n": metrics.get("count"), "intervals": {}}
    cases = metrics.cases
    groups = cases.groups
    found: dict[str, Any] = {"n": len(cases.pairs)}
    if len(set(cases.pictures)) < len(cases.pairs):
        found["pictures"] = len(set(cases.pictures))
    single = {name: measure for name, measure in cases.measures.items() if name in metrics}
    bounds: dict[str, Any] = {name: _listed(own) for name, own in intervals(single, groups).items()}
    for table in cases.tables:
        if table in metrics:
            bounds[table] = _of_table(metrics[table], cases, table, groups)
    return found | {"intervals": bounds | metrics.intervals}


def _of_table(cells: Mapping[str, Any], cases: Cases, table: str, groups: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, numbers in cases.rows(table).items():
        row = cells.get(name)
        if row is None:
            continue
        measures = cases.chosen(numbers)
        wanted = [column for column in row if column in measures] if isinstance(row, Mapping) else [cases.main]
        own = intervals({column: measures[column] for column in wanted}, numbered(groups[numbers].tolist()))
        bounds = {column: _listed(value) for column, value in own.items()}
        found[name] = bounds if isinstance(row, Mapping) else bounds[cases.main]
    return found


def bounds_of(row: Mapping[str, Any]) -> Bounds:
    """`low` and `high` of a row."""
    return None if row["low"] is None else [row["low"], row["high"]]


def _listed(interval: Interval | None) -> Bounds:
    return None if interval is None else list(interval)
