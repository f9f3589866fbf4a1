"""The command of synthesis: `synthesize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import Json, OnBadRecord, RunnerName, app, assignments, given, print_json, writing


@app.command()
def synthesize(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="Name of a pipeline, as report_errors.")],
    source: Annotated[str, typer.Argument(metavar="IN", help="What it reads, mostly a .json or .jsonl file.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Records to write: .jsonl or .json.")],
    key_values: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the pipeline.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model that is asked: a folder, http://host/v1#NAME, or a name at --base-url.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Address of the API up to /v1; default: OpenAI's.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the key.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Items that a teacher is asked about at a time.")] = 8,
    processes: Annotated[int, typer.Option(min=1, help="Processes, where no teacher is asked; workers of Ray.")] = 1,
    retries: Annotated[int | None, typer.Option(min=0, help="How often a call is repeated; default 6.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds for one call; default 120.")] = None,
    price_in: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens of prompts.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens of replies.")] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(min=0, help="Ceiling of the run, resumed ones included; no call that could cross it is made."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of replies; default: the pipeline's.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply; default: the pipeline's.")] = None,
    runner: Annotated[RunnerName, typer.Option(help="ray: workers on this machine or a cluster.")] = RunnerName.local,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken record.")] = OnBadRecord.stop,
    as_json: Json = False,
) -> None:
    """Make training records of other records, with a teacher or by rules.

    Killed, or stopped by --max-cost, the same command goes on. OUT.refused.jsonl says what became no record, and why.

    \b
    Examples:
      llavakit synthesize report_errors reports.jsonl damaged.jsonl seed=1 --processes 8
      llavakit synthesize NAME facts.jsonl out.jsonl --teacher http://localhost:8000/v1#MODEL --concurrency 32
      llavakit synthesize NAME facts.jsonl out.jsonl --teacher gpt-4o --price-in 2.5 --price-out 10 --max-cost 20
    """
    options = assignments(key_values or ())
    from llavakit.synthesis.run import synthesize as run

    api = given(
        api_key_env=api_key_env,
        retries=retries,
        timeout=timeout,
        price_in=price_in,
        price_out=price_out,
        max_cost=max_cost,
    )
    with writing(output):
        found = run(
            pipeline,
            source,
            output,
            options=options,
            teacher=teacher,
            base_url=base_url,
            temperature=temperature,
            max_tokens=max_new_tokens,
            concurrency=concurrency,
            processes=processes,
            runner=runner.value,
            on_bad_record=on_bad_record.value,
            api=api,
        )
    if as_json:
        print_json(found)
        return
    print(f"{output}: {', '.join(f'{value} {key}' for key, value in found.items())}")
    if without := found["refused"] + found["bad"] + found["failed"]:
        refusals = output.with_name(f"{output.stem}.refused.jsonl")
        print(f"{without} items became no record; {refusals} has the reasons", file=sys.stderr)
    if found["failed"]:
        print(f"{found['failed']} of them had no answer; the same command asks again", file=sys.stderr)
