"""Commands of the first hour: `new` and `show`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import Base, Json, OnBadRecord, Template, app, assignments, given, print_json, show, writing


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


@app.command("show")
def show_sample(
    sample: Annotated[
        str, typer.Argument(metavar="SAMPLE", help="A media file, or FILE:LINE of records or questions.")
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, or a recipe (.yaml).")],
    prompt: Annotated[str | None, typer.Option(help="What is asked about a media file.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the record's media; default: that of its file.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Stage of a recipe; default: the last.")] = None,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with the views.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="List every position with its id.")] = False,
    template: Template = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Show which tokens and views a model really sees of a sample.

    Views and tiles, grids, visual tokens counted, the prompt with its special tokens, what is learned, what ends a
    reply. Weights are not read. With a recipe, as its stage trains: its template, labels, media and edits.

    \b
    Examples:
      llavakit show photo.jpg runs/demo/final --prompt "What is this?"
      llavakit show runs/pets/train.jsonl:12 runs/pets/recipe.yaml --html sample.html
      llavakit show heldout.jsonl:3 MODEL --tokens
    """
    from llavakit.inspection.model import look_with

    seen = look_with(sample, model, prompt=prompt, images=images, stage=stage, **given(template=template, base=base))
    if page is not None:
        from llavakit.inspection.page import sample_page

        with writing(page):
            page.write_text(sample_page(seen, sample, model), encoding="utf-8")
        print(page)
    elif as_json:
        print_json(seen.facts())
    else:
        from llavakit.inspection.terminal import renderables

        show(*renderables(seen, tokens=tokens))
