"""Two models, or two predictions files, on the same questions: differences with intervals and paired tests.

    compare("pope", "a.jsonl", "b.jsonl", gold="coco_pope_random.json")

Differences are those of the first minus the second. The tests are in `llavakit.evaluation.metrics.intervals.paired`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavakit.errors import UserError, quoted
from llavakit.evaluation.cases import Cases, Metrics
from llavakit.evaluation.metrics.intervals import Paired, intervals, numbered, paired
from llavakit.evaluation.predictions import description_of
from llavakit.evaluation.records import Record, read_records
from llavakit.evaluation.score import benchmark, metrics_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same cases.

    Attributes:
        task: Name of the benchmark.
        names: What the two are called.
        cases: Of both.
        answers: Text of every answer by the question's id, of both.
    """

    task: str
    names: tuple[str, str]
    cases: tuple[Cases, Cases]
    answers: tuple[Mapping[str, str], Mapping[str, str]]

    def result(self) -> dict[str, Any]:
        """All differences, JSON-able.

        Returns:
            `task`, `first`, `second` (names), `n`, `pictures` (if several cases share one), `metric` (the main one),
            `by_row` (that of the tables), and `metrics`: per metric `first` and `second` (value and interval),
            `difference`, `low`, `high`, `p`, `test`, of shares also `only_first` and `only_second`; `tables`: the same
            per row, with `n`.
        """
        one, other = self.cases
        groups = one.groups
        found: dict[str, Any] = {"task": self.task, "first": self.names[0], "second": self.names[1]}
        found |= {"n": len(one.pairs), "metric": one.main, "by_row": one.by_case}
        if len(set(one.pictures)) < len(one.pairs):
            found["pictures"] = len(set(one.pictures))
        every = np.arange(len(one.pairs))
        defined = {name for name, own in one.measures.items() if own.whole is not None} | {one.main}
        known = [name for name in one.measures if name in defined and name in other.measures]
        found["metrics"] = {name: self._row(name, every, groups) for name in known}
        found["tables"] = {}
        for table in one.tables:
            rows = one.rows(table)
            if len(rows) > 1:
                found["tables"][table] = {
                    name: {"n": len(own)} | self._row(one.by_case, own, groups) for name, own in rows.items()
                }
        return found

    def _row(self, name: str, rows: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
        own = numbered(groups[rows].tolist())
        measures = [cases.measures[name].of(rows) for cases in self.cases]
        sides = [{"value": one.whole, "interval": intervals({name: one}, own)[name]} for one in measures]
        return {"first": sides[0], "second": sides[1], **shown(paired(*measures, own))}

    def differing(self) -> list[int]:
        """Numbers of the cases that the two do not answer equally well, those with the largest differences first."""
        values = [cases.each for cases in self.cases]
        gaps = np.nan_to_num(np.abs(values[0] - values[1]))
        order = np.argsort(-gaps, kind="stable")
        return [int(number) for number in order if gaps[number] > 1e-9]


def shown(found: Paired) -> dict[str, Any]:
    """A difference, JSON-able."""
    low, high = found.interval or (None, None)
    row = {"difference": found.value, "low": low, "high": high, "p": found.p, "test": found.test}
    if found.only_first is not None:
        row |= {"only_first": found.only_first, "only_second": found.only_second}
    return row


def compare(
    task: str,
    first: str | Path,
    second: str | Path,
    gold: str | Path | None,
    *,
    common: bool = False,
    control: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Comparison:
    """Two predictions files on the same questions.

    Args:
        task: Name of the benchmark.
        first, second: Predictions files, or folders that hold one, see `predictions_in`.
        gold: As for `score`.
        common: Compare the questions that both answered, where not all are answered by both.
        control: Whether the second was asked about other pictures on purpose.
        options: Of the benchmark's `score`.

    Raises:
        UserError: If they are of another task, or do not answer the same questions.
    """
    benchmark(task)
    files = [predictions_in(first), predictions_in(second)]
    if files[0].resolve() == files[1].resolve():
        raise UserError(f"{first}: is compared with itself; name two predictions files or models")
    records = [read_records(file) for file in files]
    for file in files:
        said = description_of(file).get("task")
        if said is not None and said != task:
            raise UserError(f"{file}: holds answers to the task {said}, not to {task}")
    shared = _shared(files, records, common, control)
    chosen = dict(options or {})
    with tempfile.TemporaryDirectory() as scratch:
        if shared is not None:
            chosen.setdefault("missing", "wrong")
            files_ = [_part(own, shared, Path(scratch, f"{n}.jsonl")) for n, own in enumerate(records)]
        else:
            files_ = files
        found = [metrics_of(task, file, gold, **chosen) for file in files_]
    cases = []
    for metrics in found:
        if not isinstance(metrics, Metrics) or not metrics.cases.measures:
            advice = "; `llavakit score report` compares reports" if task == "report" else ""
            raise UserError(f"{task}: has no value per question, so two systems cannot be paired{advice}")
        cases.append(metrics.cases if shared is None else _answered(metrics.cases))
    cases = _aligned(cases, files)
    texts = [{record.id: str(record.data.get("text", "")) for record in own} for own in records]
    return Comparison(task, _names(files, records), (cases[0], cases[1]), (texts[0], texts[1]))


def predictions_in(place: str | Path) -> Path:
    """The predictions file that a place is, or the only one in a folder.

    Raises:
        UserError: If there is none, or there are several.
    """
    place = Path(place)
    if not place.is_dir():
        if not place.exists():
            raise UserError(f"{place}: no such file")
        return place
    found = results_in(place)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{place}: holds no predictions file of `llavakit eval`")
    names = ", ".join(file.name for file in found[:3])
    raise UserError(
        f"{place}: holds {len(found)} predictions files ({names}{', ...' if len(found) > 3 else ''}); name one"
    )


def results_in(folder: Path) -> list[Path]:
    """The predictions files of a folder, without those of earlier states of a model."""
    runs = {file: description_of(file).get("run") for file in sorted(folder.glob("*.jsonl"))}
    return [file for file, run in runs.items() if run is not None and not file.stem.endswith(f".{run}")]


def _key(record: Record) -> tuple[str, str]:
    return record.id, str(record.data.get("round_id", ""))


def _shared(
    files: Sequence[Path], records: Sequence[Sequence[Record]], common: bool, control: bool
) -> set[tuple[str, str]] | None:
    """The questions that both files answer; None if they are all of both.

    Raises:
        UserError: If there are none, or others and `common` is false; or a question was asked otherwise.
    """
    keys = [{_key(record): record for record in own} for own in records]
    shared = keys[0].keys() & keys[1].keys()
    for file, own in zip(files, keys, strict=True):
        if not own:
            raise UserError(f"{file}: holds no answer")
    if not shared:
        examples = " and ".join(quoted(next(iter(own))[0]) for own in keys)
        raise UserError(f"{files[0]} and {files[1]} share no question; they begin with {examples}")
    for key in (key for key in keys[0] if key in shared):
        asked = [own[key].data.get("asked") for own in keys]
        if not control and None not in asked and asked[0] != asked[1]:
            raise keys[1][key].error("asked", f"question {quoted(key[0])} had another text or picture in {files[0]}")
    alone = [len(own) - len(shared) for own in keys]
    if not any(alone) and not common:
        return None
    if not common:
        where = " and ".join(f"{count} of {file}" for count, file in zip(alone, files, strict=True) if count)
        raise UserError(
            f"the two do not answer the same questions: {len(shared)} are in both, {where} are not in the other; "
            "finish both runs, or compare the shared ones with --common"
        )
    return set(shared)


def _part(records: Sequence[Record], shared: set[tuple[str, str]], path: Path) -> Path:
    rows = (json.dumps(record.data, ensure_ascii=False) + "\n" for record in records if _key(record) in shared)
    path.write_text("".join(rows), encoding="utf-8")
    return path


def _answered(cases: Cases) -> Cases:
    """The cases that have an answer."""
    kept = np.array([number for number, (_, answer) in enumerate(cases.pairs) if answer is not None], int)
    if not len(kept):
        raise UserError("--common: this task does not say which questions were answered; compare whole files")
    return _subset(cases, kept)


def _subset(cases: Cases, kept: np.ndarray) -> Cases:
    def some(column: Sequence[Any]) -> list[Any]:
        return [column[number] for number in kept]

    tables = {name: some(rows) for name, rows in cases.tables.items()}
    return replace(
        cases,
        pairs=some(cases.pairs),
        keys=some(cases.keys),
        pictures=some(cases.pictures),
        measures=cases.chosen(kept),
        tables=tables,
    )


def _aligned(cases: Sequence[Cases], files: Sequence[Path]) -> list[Cases]:
    """Both in the order of the first.

    Raises:
        UserError: If they do not hold the same cases.
    """
    places: list[dict[Hashable, int]] = [{key: n for n, key in enumerate(own.keys)} for own in cases]
    if places[0].keys() != places[1].keys():
        odd = next(iter(places[0].keys() ^ places[1].keys()))
        raise UserError(f"{files[0]} and {files[1]} are scored on other questions: {odd[0]!r} is in one of them only")
    order = np.array([places[1][key] for key in cases[0].keys], int)
    return [cases[0], _subset(cases[1], order)]


def _names(files: Sequence[Path], records: Sequence[Sequence[Record]]) -> tuple[str, str]:
    """Names of the models where the files know them and they differ, else of the files."""
    names = [str(own[0].data.get("model_id") or file) for file, own in zip(files, records, strict=True)]
    return (names[0], names[1]) if names[0] != names[1] else (str(files[0]), str(files[1]))


# For a terminal


def verdict(result: Mapping[str, Any]) -> str:
    """What a comparison shows, in one sentence."""
    row = result["metrics"][result["metric"]]
    if row["low"] is None:
        return "no difference can be computed: the metric is not defined, or all resamples are alike"
    interval = f"{row['difference']:+.1f}, 95 % {row['low']:+.1f} to {row['high']:+.1f}{_p(row['p'])}"
    if row["low"] > 0 or row["high"] < 0:
        better = result["first"] if row["difference"] > 0 else result["second"]
        return f"{better} is better in {result['metric']} (first minus second {interval})"
    return f"no difference in {result['metric']} is shown (first minus second {interval})"


def _p(p: float | None) -> str:
    return "" if p is None else f", p {'< 0.0001' if p < 0.0001 else f'= {p:.4f}'}"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The metrics and every table of a comparison."""
    from rich.markup import escape
    from rich.table import Table

    pictures = f" about {result['pictures']} pictures" if "pictures" in result else ""
    title = f"{result['task']}: {result['n']} questions{pictures}"
    found = []
    for name, rows in {"metric": result["metrics"], **result["tables"]}.items():
        table = Table(escape(name), title=escape(title) if name == "metric" else None)
        columns = ("n",) if name != "metric" else ()
        shares = any("only_first" in row for row in rows.values())
        counts = ("only first right", "only second right") if shares else ()
        for column in (*columns, "first", "second", "first minus second", "95 % interval", *counts, "p"):
            table.add_column(column, justify="right")
        for key, row in rows.items():
            interval = "-" if row["low"] is None else f"{row['low']:+.1f} to {row['high']:+.1f}"
            cells = [str(row["n"])] if columns else []
            cells += [_value(row["first"]["value"]), _value(row["second"]["value"])]
            cells += ["-" if row["difference"] is None else f"{row['difference']:+.2f}", interval]
            if shares:
                cells += [str(row.get("only_first", "")), str(row.get("only_second", ""))]
            table.add_row(escape(str(key)), *cells, "-" if row["p"] is None else f"{row['p']:.4f}")
        found.append(table)
    return found


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
