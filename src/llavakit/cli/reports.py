"""The command `score report`: reports by every metric, with intervals and paired tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llavakit.cli.common import Json, Judge, assignments, given, print_json, show
from llavakit.cli.evaluation import scores
from llavakit.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


@scores.command("report")
def score_report(
    predictions: Annotated[
        list[Path] | None,
        typer.Option(help="Reports that a system wrote: JSONL, JSON or CSV with ids. Twice: two systems compared."),
    ] = None,
    references: Annotated[Path | None, typer.Option(help="Reference reports with the same ids.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Names, separated by commas. Default: all that can be.")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PLACE",
            help="Folder, file or hub id: chexbert, bert_vocabulary, radgraph, bertscore, meteor, ptb, wordnet.",
        ),
    ] = None,
    bertscore_layer: Annotated[int | None, typer.Option(help="Layer that BERTScore compares.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Safetensors of images and texts [pairs, width], for retrieval R@k.")
    ] = None,
    rubric: Annotated[
        str | None, typer.Option(help="Errors that a judge counts: chexprompt, or a YAML file of your own.")
    ] = None,
    judge: Judge = None,
    coding: Annotated[
        str | None,
        typer.Option(help="Coding of `labels`: chexbert (0, 1, 2 negative, 3) or chexpert (1, 0, -1)."),
    ] = None,
    id_field: Annotated[str | None, typer.Option(help="Field of the id.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of a prediction's text.")] = None,
    reference_field: Annotated[str | None, typer.Option(help="Field of a reference's text.")] = None,
    resamples: Annotated[int | None, typer.Option(min=1, help="Of the bootstrap. Default: 500.")] = None,
    swaps: Annotated[int | None, typer.Option(min=1, help="Of the paired test. Default: 10000.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of both. Default: 3.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Score no files: damage phantom reports and say which metrics notice.")
    ] = False,
    audit_reports: Annotated[int, typer.Option(min=1, help="Phantom reports of the audit.")] = 300,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE of the judge, as base_url or max_cost.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score written reports by every metric that papers print.

    Each with the median and 95 % interval of seeded bootstrap resamples. The toolkit is part of a metric's name. What
    needs weights that were not given is listed with what it needs.

    \b
    Examples:
      llavakit score report --predictions answers.jsonl --references gold.jsonl
      llavakit score report --predictions a.jsonl --predictions b.jsonl --references gold.csv
      llavakit score report --predictions a.jsonl --references gold.jsonl --weights chexbert=StanfordAIMI/RRG_scorers
      llavakit score report --predictions a.jsonl --references gold.jsonl --rubric chexprompt --judge gpt-4o
      llavakit score report --audit
    """
    from llavakit.evaluation.score import score

    places = {key: str(value) for key, value in assignments(weights or ()).items()}
    if audit:
        if predictions or references or rubric or judge or features:
            raise UserError("--audit: scores phantom reports; leave files, judge and features out")
        _audit(audit_reports, seed, places, bertscore_layer, as_json)
        return
    if not predictions or references is None:
        raise UserError("give --predictions FILE and --references FILE")
    if len(predictions) > 2:
        raise UserError(f"--predictions: at most two files are compared, {len(predictions)} were given")
    options = assignments(option or ()) | given(
        against=predictions[1] if len(predictions) > 1 else None,
        metrics=metrics,
        weights=places or None,
        bertscore_layer=bertscore_layer,
        features=features,
        rubric=rubric,
        judge=judge,
        coding=coding,
        id_field=id_field,
        text_field=text_field,
        reference_field=reference_field,
        resamples=resamples,
        swaps=swaps,
        seed=seed,
    )
    found = score("report", predictions[0], references, **options)["metrics"]
    if as_json:
        print_json(found)
        return
    show(_table(found))
    for reason, names in _reasons(found["not_computed"]).items():
        print(f"not computed: {', '.join(names)}: {reason}")
    for note in found["notes"]:
        print(f"note: {note}")
    if "judge" in found:
        print(f"judge: {found['judge']}")


def _audit(count: int, seed: int | None, weights: dict[str, str], layer: int | None, as_json: bool) -> None:
    from rich.table import Table

    from llavakit.evaluation.reports.audit import DAMAGES, audit
    from llavakit.evaluation.reports.metrics import Sources

    found = audit(count, seed=seed or 0, sources=Sources(weights, layer))
    if as_json:
        print_json(found)
        return
    table = Table("metric", title=f"{count} phantom reports, seed {found['seed']}: right about a damaged one, %")
    for name in (*DAMAGES, "all"):
        table.add_column(name, justify="right")
    table.add_row("reports that it applies to", *(str(found["applicable"][name]) for name in DAMAGES), "")
    for name, row in found["right"].items():
        table.add_row(name, *(_number(row[key], 1) for key in (*DAMAGES, "all")))
    show(table)
    for reason, names in _reasons(found["not_computed"]).items():
        print(f"not computed: {', '.join(names)}: {reason}")


def _reasons(missing: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in missing.items():
        found[reason].append(name)
    return found


def _table(found: Mapping[str, Any]) -> Table:
    """One row per metric: value, median and interval; of two systems both, and their difference."""
    from rich.table import Table

    compared = "difference" in found
    table = Table("metric", title=f"{found['reports']} reports, {found['resamples']} resamples, seed {found['seed']}")
    for name in ("value", "median", "95 % interval", "unscored"):
        table.add_column(name, justify="right")
    for name in ("other", "95 % interval", "difference", "95 % interval", "p") if compared else ():
        table.add_column(name, justify="right")
    for name, row in found["scores"].items():
        cells = [_number(row["value"]), _number(row["median"]), _interval(row), _count(row["unscored"])]
        if compared:
            other, difference = found["scores_against"][name], found["difference"][name]
            cells += [_number(other["value"]), _interval(other), _number(difference["difference"])]
            cells += [_interval(difference), _number(difference["p"], 4)]
        table.add_row(name, *cells)
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(row: Mapping[str, Any]) -> str:
    return "-" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"


def _count(unscored: int) -> str:
    return str(unscored) if unscored else ""
