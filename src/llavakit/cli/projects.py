"""Commands of the first hour: `new`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import Json, OnBadRecord, app, assignments, print_json


@app.command()
def new(
    source: Annotated[
        Path, typer.Argument(metavar="PICTURES_OR_FILE", help="Folder of pictures, or a CSV, JSON or JSONL of them.")
    ],
    system: Annotated[str | None, typer.Option(help="System whose published weights are the start.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id to start from.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write; default: runs/NAME.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="MEANING=NAME", help="Column of image, question, answer or subject; may be repeated."),
    ] = None,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken row.")] = OnBadRecord.stop,
    as_json: Json = False,
) -> None:
    """Make records, held-out questions and a recipe of your own pictures.

    A CSV has a column of pictures and one of answers, perhaps questions and subjects; without a table, folders or
    pictures are named by the answer. Nothing that exists is written over.

    \b
    Examples:
      llavakit new pets.csv --model runs/demo/parts/final
      llavakit new xrays --system llava-med --out runs/xrays
      llavakit new scans.csv --column image=scan_file --column answer=finding --column subject=mrn
    """
    from llavakit.projects.create import create

    columns = {meaning: str(name) for meaning, name in assignments(column or ()).items()}
    made = create(source, out, system=system, model=model, columns=columns, on_bad_record=on_bad_record.value)
    if as_json:
        print_json(made.facts())
        return
    for line in made.said:
        print(f"- {line}")
    for line in made.left_out[:20]:
        print(f"left out: {line}", file=sys.stderr)
    if len(made.left_out) > 20:
        print(f"and {len(made.left_out) - 20:,} more", file=sys.stderr)
    print(f"\n{made.folder} is ready. Go on with:\n")
    for command in made.commands:
        print(f"  {command}")
