"""Scores a finished predictions file, and prints the result.

    score("scienceqa", "predictions.jsonl", "gold.jsonl") -> {"task": "scienceqa", "metrics": {"accuracy": 90.9, ...}}

Rates are in percent. What a metric means is in the benchmark's module.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llavakit.errors import UserError, quoted
from llavakit.evaluation.benchmarks.base import Benchmark
from llavakit.evaluation.cases import spread
from llavakit.registry import BENCHMARKS, nearest

INTERVAL = "95 % interval"


def benchmark(task: str) -> Benchmark:
    """The benchmark called `task`.

    Raises:
        UserError: If there is none; the message names the nearest.
    """
    return BENCHMARKS.get(task)()


def checked(function: Any, options: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The options as `function` takes them, which are its keyword arguments of the annotated types.

    Raises:
        UserError: If it does not know one, or a value is of another type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = typing.get_type_hints(function)
    known = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            known.append(name)
        elif parameter.kind is parameter.VAR_KEYWORD and typing.get_origin(hints.get(name)) is typing.Unpack:
            more = typing.get_type_hints(typing.get_args(hints[name])[0])
            known, hints = known + list(more), hints | more
    found = {}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{task}: unknown option {name!r}{nearest(name, known)}")
        adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
        try:
            found[name] = adapter.validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise UserError(f"{task}: option {name}={quoted(value)}: {problem}") from None
    return found


def score(
    task: str, predictions_path: str | Path, gold_path: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Score predictions against gold answers.

    Args:
        task: Name of a benchmark (`llavakit.registry.BENCHMARKS`).
        predictions_path: JSONL of `{"question_id", "text"}`; further fields are allowed.
        gold_path: The benchmark's published annotation file, or the JSONL form that its module describes.
        options: The benchmark's own; for most `missing` ("error" or "wrong") and `extra` ("error" or "ignore").

    Returns:
        {"task": task, "metrics": {name: number, None, or {row: {column: number}}}, "n": number of cases, "pictures":
        how many they are about, if fewer, "intervals": see `llavakit.evaluation.cases.spread`}; rates in percent.

    Raises:
        UserError: For an unknown task or option.
        RecordError: For a broken record, and for questions without prediction or the reverse.
    """
    found = metrics_of(task, predictions_path, gold_path, **options)
    return {"task": task, "metrics": dict(found), **spread(found)}


def metrics_of(
    task: str, predictions_path: str | Path, gold_path: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """The metrics of `score` as the benchmark gives them, which for most is `llavakit.evaluation.cases.Metrics`."""
    chosen = benchmark(task)
    return chosen.score(predictions_path, gold_path, **checked(chosen.score, options, task))


def show(value: Any) -> str:
    """A metric as text: floats with up to three decimals, "-" for an undefined one."""
    if value is None:
        return "-"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A result as rich tables: the single metrics first, then one table per group."""
    task, metrics, bounds = result["task"], result["metrics"], result.get("intervals", {})
    title = benchmark(task).title if task in BENCHMARKS else task
    main = Table("metric", title=title, caption=caption(result))
    main.add_column("value", justify="right")
    main.add_column(INTERVAL, justify="right")
    found = [main]
    for name, value in metrics.items():
        own = bounds.get(name)
        if not isinstance(value, Mapping):
            main.add_row(name, show(value), show_interval(own) if name in bounds else "")
            continue
        rows = {row: _cells(cells) for row, cells in value.items()}
        spreads = {row: _cells(cells) for row, cells in (own or {}).items()}
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        spread_columns = {column for cells in spreads.values() for column in cells}
        table = Table(name)
        for column in columns:
            table.add_column(column, justify="right")
            if column in spread_columns:
                table.add_column(INTERVAL, justify="right")
        for row, cells in rows.items():
            line = []
            for column in columns:
                line.append(show(cells.get(column)))
                if column in spread_columns:
                    line.append(show_interval(spreads.get(row, {}).get(column)))
            table.add_row(str(row), *line)
        found.append(table)
    return found if main.row_count else found[1:]


def _cells(cells: Any) -> Mapping[str, Any]:
    return cells if isinstance(cells, Mapping) else {"value": cells}


def show_interval(bounds: Sequence[float] | None) -> str:
    """An interval as text; "-" where nothing can be said."""
    return "-" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def caption(result: Mapping[str, Any]) -> str | None:
    """What the intervals of a result rest on."""
    if result.get("n") is None:
        return None
    pictures = result.get("pictures")
    return f"n = {result['n']}" + (f", about {pictures} pictures" if pictures else "")


def print_result(result: Mapping[str, Any], as_json: bool = False, console: Console | None = None) -> None:
    """Print a result as tables, or as one JSON object."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
        return
    console = console or Console()
    for table in tables(result):
        console.print(table)
